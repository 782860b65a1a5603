"""Merging a LoRA adapter (Hu et al. 2021), as PEFT saves it, into the weights: ``W + alpha / r · B A``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
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
_REFUSED = {"use_dora": "DoRA", "fan_in_fan_out": "weights stored [in, out]", "lora_bias": "biases"}
Array = npt.NDArray[Any]


def merge_lora(base: Reader, adapter: Path, name_of: Callable[[str], str] = lambda name: name) -> DerivedReader:
    """A checkpoint with an adapter merged into its weights, in the weights' dtype; the sums are taken in float32.

    Args:
        base: the checkpoint that the adapter was trained on, its weights ``[out, in]``.
        adapter: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        name_of: from the adapter's name of a weight to the base's.

    Raises:
        CheckpointError: the adapter is damaged, of a kind that is not implemented, or not one for this checkpoint.
    """
    config = read_json(inside(adapter, CONFIG_NAME))
    for key, kind in _REFUSED.items():
        if config.get(key):
            raise CheckpointError(f"{adapter / CONFIG_NAME}: {key} is set; adapters with {kind} cannot be merged")
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise CheckpointError(f"{adapter / CONFIG_NAME}: is a {config['peft_type']} adapter, expected LORA")
    weights = SafetensorsReader(inside(adapter, WEIGHTS_NAME))
    modules: dict[str, dict[str, str]] = {}
    for stored in weights.tensors:
        match = _TENSOR.fullmatch(stored)
        if match is None:
            raise CheckpointError(
                f"{adapter / WEIGHTS_NAME}: tensor {stored!r} is not a lora_A or lora_B weight; others cannot be merged"
            )
        modules.setdefault(match.group(1), {})[match.group(2)] = stored
    tensors = {name: same(base, name) for name in base.tensors}
    for module, pair in modules.items():
        if len(pair) != 2:
            raise CheckpointError(f"{adapter / WEIGHTS_NAME}: {module!r} has lora_{next(iter(pair))} alone")
        name = name_of(module + ".weight")
        tensors[name] = _merged(base, name, weights, pair["A"], pair["B"], _scale(config, module, weights, pair["A"]))
    if not modules:
        raise CheckpointError(f"{adapter / WEIGHTS_NAME}: holds no adapter")
    return DerivedReader(base, tensors)


def _merged(base: Reader, name: str, weights: Reader, down: str, up: str, scale: float) -> Derived:
    info = find_tensor(base.tensors, name, base.path)
    a, b = weights.tensors[down], weights.tensors[up]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or info.shape != (b.shape[0], a.shape[1]):
        raise CheckpointError(f"{a} and {b} do not make a change of {info}")
    read = partial(_read, base, name, weights, down, up, scale)
    return Derived(info, read)


def _read(base: Reader, name: str, weights: Reader, down: str, up: str, scale: float, box: Box) -> Array:
    stored = base.read(name, as_slices(box))
    rows, columns = (slice(*bounds) for bounds in box)
    change = weights.read(up, (rows,)).astype(np.float32) @ weights.read(down, (slice(None), columns)).astype(
        np.float32
    )
    change *= np.float32(scale)
    change += stored.astype(np.float32)
    out = np.empty(stored.shape, stored.dtype)
    cast(change, out, name)
    return out


def _scale(config: dict[str, Any], module: str, weights: Reader, down: str) -> float:
    rank = weights.tensors[down].shape[0]
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
    said = _by_pattern(config.get("rank_pattern"), module, config.get("r", rank))
    if said != rank or not isinstance(alpha, int | float) or rank == 0:
        raise CheckpointError(
            f"{weights.path}: {module!r} has rank {rank}, but {CONFIG_NAME} says {said}, alpha {alpha}"
        )
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """PEFT's exceptions by module: a key stands for modules whose name is it, or ends in a dot and it."""
    for key, value in (patterns if isinstance(patterns, dict) else {}).items():
        if module == key or module.endswith("." + key):
            return value
    return default
