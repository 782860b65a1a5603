"""Small random Llama models of every variant, and what transformers makes of them: tests/fixtures/llama_variants.npz.

    python tests/references/llama_variants.py

Needs torch and transformers (extra `parity`). The weights are drawn by numpy from a seed, so the fixture holds only
logits, and the tests that read it draw the same weights without torch.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 8},
    "mqa": {"num_key_value_heads": 1},
    "kv2": {"num_key_value_heads": 2},
    "9 heads, 3 kv": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36, "head_dim": 4},
    "tied": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "wide heads": {"head_dim": 16},
    "rope linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "rope llama3": {"rope_scaling": LLAMA3},
}
SEED = 7


def hf_weights(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face's names, large enough that every part shows in the logits."""
    rng = np.random.default_rng(SEED)
    width, hidden, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes = {"model.embed_tokens": (config["vocab_size"], width)}
    biased = []
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        attention = {"q": (query, width), "k": (kv, width), "v": (kv, width), "o": (width, query)}
        shapes |= {f"{layer}.self_attn.{name}_proj": shape for name, shape in attention.items()}
        mlp = {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}
        shapes |= {f"{layer}.mlp.{name}_proj": shape for name, shape in mlp.items()}
        biased += [f"{layer}.self_attn.{name}_proj" for name in attention if config.get("attention_bias")]
        biased += [f"{layer}.mlp.{name}_proj" for name in mlp if config.get("mlp_bias")]
    if not config["tie_word_embeddings"]:
        shapes["lm_head"] = (config["vocab_size"], width)
    weights = {f"{name}.weight": rng.normal(0, 0.2, shape) for name, shape in shapes.items()}
    weights |= {f"{name}.bias": rng.normal(0, 0.2, shapes[name][:1]) for name in biased}
    norms = [
        f"model.layers.{index}.{name}_layernorm"
        for index in range(config["num_hidden_layers"])
        for name in ("input", "post_attention")
    ]
    weights |= {f"{name}.weight": rng.uniform(0.5, 1.5, width) for name in [*norms, "model.norm"]}
    return {name: value.astype(np.float32) for name, value in weights.items()}


def write_checkpoint(folder: Path, variant: str, **changes: Any) -> dict[str, Any]:
    """A checkpoint of a variant; returns its configuration."""
    config = BASE | VARIANTS[variant] | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(hf_weights(config), folder / "model.safetensors")
    return config


def token_ids(rows: int = 2, length: int = 40) -> np.ndarray:
    """Random prompts."""
    return np.random.default_rng(SEED + 1).integers(0, BASE["vocab_size"], (rows, length)).astype(np.int32)


def reference_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Logits of transformers, ``[B, T, V]``."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(ids, dtype=torch.long)).logits.numpy()


def main(output: Path) -> None:
    """Write the last 8 positions' logits of every variant."""
    from tempfile import TemporaryDirectory

    logits = {}
    for variant in VARIANTS:
        with TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), variant)
            logits[variant] = reference_logits(Path(folder), token_ids())[:, -8:]
    np.savez_compressed(output, **logits)


if __name__ == "__main__":
    main(Path(__file__).parents[1] / "fixtures" / "llama_variants.npz")
