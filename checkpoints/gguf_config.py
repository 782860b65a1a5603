"""GGUF fields in the terms of a Hugging Face ``config.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy.typing as npt

from spmd_infer.checkpoints.reader import TensorInfo

_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "vocab_size": "vocab_size",
}
_TOKENS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.unknown_token_id": "unk_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
_EMBEDDING, _HEAD, _ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
_MOST_ROPE_FACTORS = 1 << 16


def config_from_fields(
    fields: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Callable[[str], npt.NDArray[Any]]
) -> dict[str, Any]:
    """The model's configuration, as far as the fields of a GGUF file tell it.

    Args:
        fields: the file's fields.
        tensors: its tensors; a missing output projection says that the embedding is tied to it.
        read: reads one tensor (the frequency factors that Llama 3.1 files carry as a tensor).

    Returns:
        Keys of a Hugging Face ``config.json``; empty where the file names no architecture. ``rope_scaling`` has
        ``rope_type`` ``linear``, ``yarn``, … with ``factor``, or ``frequency_factors`` with the ``factors`` by which
        each frequency is divided (llama.cpp stores Llama 3.1's scaling in that form).
    """
    architecture = fields.get("general.architecture")
    if not isinstance(architecture, str):
        return {}
    prefix = architecture + "."
    config: dict[str, Any] = {"model_type": architecture, "architectures": [architecture]}
    for key, name in _KEYS.items():
        if prefix + key in fields:
            config[name] = _one_for_all_layers(fields[prefix + key])
    for key, name in _TOKENS.items():
        if key in fields:
            config[name] = fields[key]
    _add_sizes(config, fields, prefix, tensors)
    scaling = _rope_scaling(fields, prefix, tensors, read)
    if scaling is not None:
        config["rope_scaling"] = scaling
    config["tie_word_embeddings"] = _HEAD not in tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    return config


def _add_sizes(
    config: dict[str, Any], fields: Mapping[str, Any], prefix: str, tensors: Mapping[str, TensorInfo]
) -> None:
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    turned = fields.get(prefix + "rope.dimension_count")
    if isinstance(heads, int) and heads > 0:
        config.setdefault("num_key_value_heads", heads)
        if isinstance(width, int):
            config.setdefault("head_dim", width // heads)
    head_dim = config.get("head_dim")
    if isinstance(turned, int) and isinstance(head_dim, int) and head_dim > 0 and turned != head_dim:
        config["partial_rotary_factor"] = turned / head_dim
    tokens = fields.get("tokenizer.ggml.tokens")
    embedding = tensors.get(_EMBEDDING)
    if embedding is not None and len(embedding.shape) == 2:
        config["vocab_size"] = embedding.shape[0]
    elif isinstance(tokens, list):
        config.setdefault("vocab_size", len(tokens))


def _rope_scaling(
    fields: Mapping[str, Any],
    prefix: str,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], npt.NDArray[Any]],
) -> dict[str, Any] | None:
    factors = tensors.get(_ROPE_FACTORS)
    if factors is not None and factors.size <= _MOST_ROPE_FACTORS:
        return {"rope_type": "frequency_factors", "factors": read(_ROPE_FACTORS).ravel().tolist()}
    kind = fields.get(prefix + "rope.scaling.type")
    factor = fields.get(prefix + "rope.scaling.factor", fields.get(prefix + "rope.scale_linear"))
    if kind == "none" or factor is None or (kind is None and factor == 1.0):
        return None
    scaling: dict[str, Any] = {"rope_type": kind or "linear", "factor": factor}
    original = fields.get(prefix + "rope.scaling.original_context_length")
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    return scaling


def _one_for_all_layers(value: Any) -> Any:
    """A field that some files give layer by layer, as one number where all layers agree."""
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        return value[0]
    return value
