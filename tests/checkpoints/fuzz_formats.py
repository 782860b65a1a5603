"""Coverage-guided fuzzing of the formats' headers with atheris: anything but a ``CheckpointError`` is a crash.

    python tests/checkpoints/fuzz_formats.py FOLDER_OF_SEEDS [-max_total_time=600] [other options of libFuzzer]

The first byte of an input says which kind of file the rest is. ``test_fuzz.py`` runs this for a bounded time.
"""

import hashlib
import sys
import tempfile
from pathlib import Path

import atheris
import numpy as np

with atheris.instrument_imports(include=["spmd_infer.checkpoints"]):
    from spmd_infer.checkpoints import open_checkpoint
    from spmd_infer.checkpoints.manifest import DIGEST_NAME, MANIFEST_NAME
    from spmd_infer.checkpoints.safetensors_reader import INDEX_NAME

from safetensors.numpy import save

from spmd_infer.errors import CheckpointError

KINDS = ("safetensors", "gguf", "index", "manifest")
HOME = Path(tempfile.mkdtemp(prefix="fuzz-"))
MOST_BYTES = 1 << 16  # no input is longer, so nothing that is read may be


def place(kind: str, content: bytes) -> Path:
    """The input where its kind of file belongs."""
    if kind in ("safetensors", "gguf"):
        path = HOME / f"input.{kind}"
        path.write_bytes(content)
        return path
    folder = HOME / kind
    folder.mkdir(exist_ok=True)
    if kind == "index":
        (folder / "a.safetensors").write_bytes(save({"a": np.ones(3, np.float32)}))
        (folder / "b.safetensors").write_bytes(save({"b": np.ones(3, np.float32)}))
        (folder / INDEX_NAME).write_bytes(content)
        return folder
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "host-0000-0000.bin").write_bytes(bytes(96))
    (folder / MANIFEST_NAME).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()  # whoever could write the one could write the other
    (folder / DIGEST_NAME).write_text(f"{digest}  {MANIFEST_NAME}\n")
    return folder


def read(data: bytes) -> None:
    """One input: it is refused, or all that it holds can be read."""
    if not data:
        return
    path = place(KINDS[data[0] % len(KINDS)], data[1:])
    try:
        reader = open_checkpoint(path)
        for name, info in reader.tensors.items():
            values = reader.read(name)
            if values.nbytes > 64 * MOST_BYTES:  # the smallest quantised types grow so much
                raise AssertionError(f"{info} took {values.nbytes} bytes")
    except CheckpointError:
        return


if __name__ == "__main__":
    atheris.Setup([*sys.argv, f"-max_len={MOST_BYTES}"], read)
    atheris.Fuzz()
