"""A bounded run of the fuzzer over the headers of four formats, from sound files as seeds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.numpy import save as safetensors_bytes

from spmd_infer.checkpoints import save
from spmd_infer.checkpoints.manifest import MANIFEST_NAME

SECONDS = 15
RUNS = 20_000


def seeds(folder: Path, work: Path) -> None:
    """A sound input of each kind."""
    folder.mkdir()
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
    (folder / "0").write_bytes(b"\0" + safetensors_bytes(values, {"format": "pt"}))
    writer = GGUFWriter(work / "seed.gguf", "llama")
    writer.add_block_count(2)
    writer.add_key_value("llama.words", ["a", "bc"], 9)
    writer.add_tensor("a", values["a"])
    packed = quantize(np.ones((2, 64), np.float32), GGMLQuantizationType.Q4_0)
    writer.add_tensor("q", packed, raw_dtype=GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "1").write_bytes(b"\1" + (work / "seed.gguf").read_bytes())
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (folder / "2").write_bytes(b"\2" + json.dumps(index).encode())
    save({"w": jnp.zeros((4, 6), np.float32)}, work / "saved")
    (folder / "3").write_bytes(b"\3" + (work / "saved" / MANIFEST_NAME).read_bytes())


@pytest.mark.slow
def test_nothing_but_a_checkpoint_error_comes_of_any_header(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    seeds(tmp_path / "seeds", tmp_path)
    fuzzer = Path(__file__).with_name("fuzz_formats.py")
    options = [f"-max_total_time={SECONDS}", f"-runs={RUNS}", "-timeout=10", "-seed=1"]
    # Not the resident memory: what Linux tells a process of its peak includes that of the process that started it.
    options += ["-rss_limit_mb=0", "-malloc_limit_mb=2048"]
    answer = subprocess.run(
        [sys.executable, str(fuzzer), str(tmp_path / "seeds"), *options],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr[-3000:]
    done = next(line for line in answer.stderr.splitlines() if line.startswith("Done "))
    assert int(done.split()[1]) > 200, done  # inputs that were tried
    assert not list(tmp_path.glob("crash-*"))
