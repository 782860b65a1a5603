"""LoRA adapters (Hu et al. 2021) as PEFT saves them: read, and merged into weights, ``W + alpha / r · B A``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints.boxes import Box, as_slices
from spmd_infer.checkpoints.casting import cast
from spmd_infer.checkpoints.derived import Derived, DerivedReader, same
from spmd_infer.checkpoints.folder_files import inside, read_json
from spmd_infer.checkpoints.reader import Reader, find_tensor
from spmd_infer.checkpoints.safetensors_reader import SafetensorsReader
from spmd_infer.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
_NAME = re.compile(r"[\w.]+")
_REFUSED = {"use_dora": "DoRA", "fan_in_fan_out": "weights stored [in, out]", "lora_bias": "biases"}
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class LoraPart:
    """The change of one module's weight.

    Attributes:
        module: the module, by its name in the Hugging Face model that the adapter was trained on.
        down: stored name of A, ``[r, in]``.
        up: stored name of B, ``[out, r]``.
        scale: what ``B A`` is multiplied by: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
    """

    module: str
    down: str
    up: str
    scale: float


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter whose headers have been read and whose tensors have not.

    Attributes:
        path: its folder.
        weights: reads its tensors.
        parts: one for each module that it changes.
    """

    path: Path
    weights: Reader
    parts: tuple[LoraPart, ...]

    @classmethod
    def open(cls, path: Path) -> LoraAdapter:
        """Read the headers of a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

        Raises:
            CheckpointError: the adapter is damaged, or of a kind that is not implemented.
        """
        config = read_json(inside(path, CONFIG_NAME))
        for key, kind in _REFUSED.items():
            if config.get(key):
                raise CheckpointError(f"{path / CONFIG_NAME}: {key} is set; adapters with {kind} are not implemented")
        if str(config.get("peft_type", "LORA")).upper() != "LORA":
            raise CheckpointError(f"{path / CONFIG_NAME}: is a {config['peft_type']} adapter, expected LORA")
        weights = SafetensorsReader(inside(path, WEIGHTS_NAME))
        modules: dict[str, dict[str, str]] = {}
        for stored in weights.tensors:
            match = _TENSOR.fullmatch(stored)
            if match is None:
                raise CheckpointError(
                    f"{path / WEIGHTS_NAME}: tensor {stored!r} is not a lora_A or lora_B weight; embeddings, biases "
                    "and modules that were trained whole are not implemented"
                )
            modules.setdefault(match.group(1), {})[match.group(2)] = stored
        if not modules:
            raise CheckpointError(f"{path / WEIGHTS_NAME}: holds no adapter")
        return cls(path, weights, tuple(_part(weights, config, *each) for each in modules.items()))

    def rank(self, part: LoraPart) -> int:
        """The r of one part."""
        return self.weights.tensors[part.down].shape[0]

    def check(self, part: LoraPart, shape: Sequence[int], weight: object) -> None:
        """Refuse a part that does not change a weight of ``shape``, which ``weight`` names.

        Raises:
            CheckpointError: with both shapes.
        """
        a, b = self.weights.tensors[part.down], self.weights.tensors[part.up]
        if (b.shape[0], a.shape[1]) != tuple(shape):
            raise CheckpointError(f"{a} and {b} do not make a change of {weight}")

    def read(self, part: LoraPart, rows: slice = slice(None), columns: slice = slice(None)) -> tuple[Array, Array]:
        """``A [r, columns]`` and, scaled, ``B [rows, r]`` in float32, whose product is the change of the weight."""
        down = self.weights.read(part.down, (slice(None), columns)).astype(np.float32)
        up = self.weights.read(part.up, (rows,)).astype(np.float32)
        up *= np.float32(part.scale)
        return down, up


def merge_lora(base: Reader, adapter: Path, name_of: Callable[[str], str] = lambda name: name) -> DerivedReader:
    """A checkpoint with an adapter merged into its weights, in the weights' dtype; the sums are taken in float32.

    Args:
        base: the checkpoint that the adapter was trained on, its weights ``[out, in]``.
        adapter: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        name_of: from the adapter's name of a weight to the base's.

    Raises:
        CheckpointError: the adapter is damaged, of a kind that is not implemented, or not one for this checkpoint.
    """
    lora = LoraAdapter.open(adapter)
    tensors = {name: same(base, name) for name in base.tensors}
    for part in lora.parts:
        name = name_of(part.module + ".weight")
        info = find_tensor(base.tensors, name, base.path)
        lora.check(part, info.shape, info)
        tensors[name] = Derived(info, partial(_read, base, name, lora, part))
    return DerivedReader(base, tensors)


def _part(weights: Reader, config: dict[str, Any], module: str, stored: dict[str, str]) -> LoraPart:
    if len(stored) != 2:
        raise CheckpointError(f"{weights.path}: {module!r} has lora_{next(iter(stored))} alone")
    a, b = weights.tensors[stored["A"]], weights.tensors[stored["B"]]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise CheckpointError(f"{weights.path}: {a} and {b} do not make a product B A")
    rank = a.shape[0]
    alpha = _by_pattern(weights, config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
    said = _by_pattern(weights, config.get("rank_pattern"), module, config.get("r", rank))
    if said != rank or not isinstance(alpha, int | float) or rank == 0:
        raise CheckpointError(
            f"{weights.path}: {module!r} has rank {rank}, but {CONFIG_NAME} says {said}, alpha {alpha}"
        )
    scale = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LoraPart(module, stored["A"], stored["B"], scale)


def _read(base: Reader, name: str, lora: LoraAdapter, part: LoraPart, box: Box) -> Array:
    stored = base.read(name, as_slices(box))
    down, up = lora.read(part, *(slice(*bounds) for bounds in box))
    change: Array = up @ down
    change += stored.astype(np.float32)
    out = np.empty(stored.shape, stored.dtype)
    cast(change, out, name)
    return out


def _by_pattern(weights: Reader, patterns: Any, module: str, default: Any) -> Any:
    """PEFT's exceptions by module: a key stands for modules whose name is it, or ends in a dot and it."""
    for key, value in (patterns if isinstance(patterns, dict) else {}).items():
        name = str(key).removeprefix("^").removesuffix("$")
        if not _NAME.fullmatch(name):
            raise CheckpointError(f"{weights.path}: {CONFIG_NAME} has a pattern {key!r}; only names are implemented")
        if module == name or (module.endswith("." + name) and not str(key).startswith("^")):
            return value
    return default
