"""Random LoRA adapters for the models of ``llama_variants``, as PEFT saves them, and weights with them merged in."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.references.llama_variants import BASE, VARIANTS, hf_weights

PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
ALL = tuple(name for names in PROJECTIONS.values() for name in names)


def modules(config: dict[str, Any], targets: tuple[str, ...] = ALL) -> list[str]:
    """The names in a Hugging Face model of the projections that ``targets`` name."""
    layers = range(config["num_hidden_layers"])
    parts = [f"{block}.{name}" for block, names in PROJECTIONS.items() for name in names if name in targets]
    return [f"model.layers.{layer}.{part}" for layer in layers for part in parts]


def adapter_tensors(
    config: dict[str, Any], *, rank: int, seed: int, targets: tuple[str, ...] = ALL, size: float = 0.3
) -> dict[str, np.ndarray]:
    """A and B of each module under PEFT's names, large enough that the adapter changes what is generated."""
    rng = np.random.default_rng(seed)
    weights, tensors = hf_weights(config), {}
    for module in modules(config, targets):
        out, into = weights[f"{module}.weight"].shape
        name = f"base_model.model.{module}"
        tensors[f"{name}.lora_A.weight"] = rng.normal(0, size, (rank, into)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = rng.normal(0, size, (out, rank)).astype(np.float32)
    return tensors


def write_adapter(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    """An adapter's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder


def random_adapter(
    folder: Path,
    *,
    variant: str = "gqa",
    rank: int = 4,
    alpha: float = 8.0,
    seed: int = 1,
    targets: tuple[str, ...] = ALL,
    rslora: bool = False,
) -> Path:
    """The folder of a random adapter for one of ``llama_variants``."""
    tensors = adapter_tensors(BASE | VARIANTS[variant], rank=rank, seed=seed, targets=targets)
    said = {"r": rank, "lora_alpha": alpha, "use_rslora": rslora, "target_modules": list(targets)}
    return write_adapter(folder, tensors, **said)


def write_merged(folder: Path, adapter: Path, variant: str = "gqa") -> Path:
    """A checkpoint of a variant with an adapter's changes added to its weights, in float64."""
    from safetensors.numpy import load_file

    config = BASE | VARIANTS[variant]
    weights, tensors = hf_weights(config), load_file(adapter / "adapter_model.safetensors")
    said = json.loads((adapter / "adapter_config.json").read_text())
    scale = said["lora_alpha"] / (math.sqrt(said["r"]) if said["use_rslora"] else said["r"])
    for module in modules(config, tuple(said["target_modules"])):
        a, b = (tensors[f"base_model.model.{module}.lora_{end}.weight"].astype(np.float64) for end in "AB")
        weights[f"{module}.weight"] = (weights[f"{module}.weight"] + scale * (b @ a)).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder
