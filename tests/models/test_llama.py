"""Llama decoders: right, the same on every mesh at the price that the layout implies, and step by step as at once."""

from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from spmd_infer.axes import ATTN_HEADS, ATTN_KV_HEADS, HEADS, KV_HEADS
from spmd_infer.engine import Engine
from spmd_infer.errors import ModelError
from spmd_infer.models.llama import Config, RopeScaling, name_table
from spmd_infer.planning.audit import collectives, summary
from tests.references.llama_variants import BASE, LLAMA3, VARIANTS, token_ids, write_checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures"
# float32 sums of at most 1,536 products in another order; relative to the largest logit.
TOLERANCE = 1e-4


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def load(variant: str, mesh: str, **changes: Any) -> Engine:
    with TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), variant, **changes)
        return Engine.load(folder, mesh=mesh, buckets=[8])


@cache
def unsharded(variant: str) -> np.ndarray:
    return np.asarray(load(variant, "data=1,model=1").infer({"input_ids": token_ids(8, 16)}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str) -> None:
    saved = np.load(FIXTURES / "llama_variants.npz")[variant]
    found = load(variant, "data=1,model=1").infer({"input_ids": token_ids()})
    assert found.dtype == np.float32
    assert relative_error(found[:, -8:], saved) <= TOLERANCE


@pytest.mark.parity
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers_live(variant: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tests.references.llama_variants import reference_logits

    write_checkpoint(tmp_path, variant)
    ids = np.random.default_rng().integers(0, BASE["vocab_size"], (3, 70)).astype(np.int32)
    found = Engine.load(tmp_path, mesh="data=1").infer({"input_ids": ids})
    assert relative_error(found, reference_logits(tmp_path, ids)) <= TOLERANCE


# What is split over model=m: attention where the heads allow it, feed-forward and vocabulary always.
# Attention then costs one all-reduce a layer, feed-forward another, the embedding lookup one.
SPLIT_ATTENTION = {
    "gqa": {2: True, 4: True, 8: True},
    "kv2": {2: True, 4: True, 8: True},
    "mqa": {2: True, 4: True, 8: True},
    "9 heads, 3 kv": {2: False, 4: False, 8: False},
    "tied": {2: True, 4: True, 8: True},
}


@pytest.mark.parametrize("variant", SPLIT_ATTENTION)
def test_sharded_equals_unsharded(variant: str, mesh_text: str) -> None:
    engine = load(variant, mesh_text)
    found = engine.infer({"input_ids": token_ids(8, 16)})
    assert relative_error(found, unsharded(variant)) <= TOLERANCE
    (program,) = engine.programs
    used = collectives(program.compiled)
    print(f"\n{variant} {mesh_text}: {summary(used, engine.mesh)}")
    parts = dict(engine.mesh.shape)
    if parts["model"] == 1:
        assert used == []
        return
    layers = BASE["num_hidden_layers"]
    expected = 1 + layers * (2 if SPLIT_ATTENTION[variant][parts["model"]] else 1)
    counted = Counter((each.kind, each.axes(engine.mesh)) for each in used)
    assert counted == {("all-reduce", ("model",)): expected}
    # Activations are summed; no weight or cache is ever gathered.
    width = engine.config.embed_dim
    assert {each.nbytes for each in used} == {8 // parts["data"] * 16 * width * 4}


def test_plan_reports_heads_that_do_not_divide() -> None:
    engine = load("9 heads, 3 kv", "data=2,model=4")
    kept_whole = {layout.path for layout in engine.plan.weights if not layout.spec}
    assert "layers.0.self_attn.q_proj.weight" in kept_whole
    assert "layers.0.mlp.up_proj.weight" not in kept_whole
    assert "9" in engine.plan.explain()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "units"),
    [(9, 3, 9), (32, 8, 32), (8, 8, 8), (8, 1, 8), (64, 8, 64), (12, 3, 3), (28, 4, 4), (40, 8, 8), (12, 2, 4)],
)
def test_query_heads_split_only_with_their_key_heads(heads: int, kv_heads: int, units: int) -> None:
    config = Config.from_hf(BASE | {"num_attention_heads": heads, "num_key_value_heads": kv_heads})
    found = config.axis_units()
    assert found[HEADS] == found[ATTN_HEADS] == units
    assert found[KV_HEADS] == found[ATTN_KV_HEADS] == kv_heads
    for parts in range(1, units + 1):
        if units % parts == 0:
            per_part = heads // parts
            group = heads // kv_heads
            for part in range(parts):
                first, last = part * per_part, (part + 1) * per_part - 1
                read = last // group - first // group + 1
                # Either whole groups, or some of one group's queries.
                assert read == 1 or per_part == read * group


def test_right_padding_changes_nothing_before_it() -> None:
    engine = load("gqa", "data=1,model=1")
    ids = token_ids(2, 20)
    padded = np.concatenate([ids, np.full((2, 12), 5, np.int32)], axis=1)
    full = engine.infer({"input_ids": padded})[:, :20]
    assert relative_error(full, engine.infer({"input_ids": ids})) <= TOLERANCE


def test_long_prompts_attend_in_blocks() -> None:
    # Above 1,024 positions queries go in blocks; the first 1,024 positions of a longer prompt must not notice.
    engine = load("gqa", "data=1,model=1", max_position_embeddings=4096, vocab_size=128)
    ids = token_ids(1, 1300)
    whole = engine.infer({"input_ids": ids[:, :1024]})
    blocks = engine.infer({"input_ids": ids})
    assert relative_error(blocks[:, :1024], whole) <= TOLERANCE
    # And what follows reads across the blocks: its own logits from a cache built token by token are the judge of that
    # in tests/generation/test_loop.py; here, that an early token still shows at the end.
    changed = ids.copy()
    changed[0, 3] = (changed[0, 3] + 1) % 128
    assert np.abs(engine.infer({"input_ids": changed})[0, -1] - blocks[0, -1]).max() > 1e-3


def test_smollm2_logits_equal_transformers(smollm2: Path) -> None:
    saved = np.load(FIXTURES / "llama_smollm2.npz")
    engine = Engine.load(smollm2, mesh="data=1,model=1", dtype="float32", buckets=[1])
    logits = engine.infer({"input_ids": saved["prompt_ids"][None].astype(np.int32)})[0]
    # 30 layers of float32 sums in another order.
    assert relative_error(logits[:, ::12], saved["logits"]) <= TOLERANCE
    assert np.abs(np.log(np.exp(logits.astype(np.float64)).sum(-1)) - saved["logsumexp"]).max() <= 1e-3


def test_gguf_names_and_row_order() -> None:
    config = Config.from_hf(BASE | {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True})
    table = name_table(config, "gguf")
    assert table.keys() == name_table(config, "safetensors").keys()
    source = table["layers.1.self_attn.k_proj.weight"]
    assert source.name == "blk.1.attn_k.weight"
    assert source.transform is not None
    # Two heads of 6: llama.cpp keeps rows 0, 3 of a head (a rotated pair) side by side.
    stored = np.array([0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11], np.float32)[:, None] * np.ones((1, 3), np.float32)
    assert (source.transform(stored)[:, 0] == np.arange(12)).all()
    assert table["layers.1.self_attn.q_proj.bias"].transform is not None
    assert table["layers.1.self_attn.v_proj.weight"].transform is None
    assert table["lm_head.weight"].name == "output.weight"


def test_rope_factors_of_gguf_files_equal_llama3() -> None:
    from spmd_infer.models.llama import rope_frequencies

    plain = rope_frequencies(Config.from_hf(BASE | {"head_dim": 64}))
    scaled = rope_frequencies(Config.from_hf(BASE | {"head_dim": 64, "rope_scaling": LLAMA3}))
    factors = {"rope_type": "frequency_factors", "factors": (plain / scaled).tolist()}
    by_factors = rope_frequencies(Config.from_hf(BASE | {"head_dim": 64, "rope_scaling": factors}))
    np.testing.assert_allclose(by_factors, scaled, rtol=1e-6)
    assert (plain / scaled).max() == pytest.approx(8.0)
    assert (plain / scaled).min() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "feed-forward uses silu, not 'gelu'"),
        ({"num_key_value_heads": 3}, "8 query heads cannot share 3 key heads evenly"),
        ({"head_dim": 5}, "even head dimension, not 5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "scaling of kind 'yarn' is not implemented"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs 'factor'"),
        ({"rope_scaling": {"rope_type": "frequency_factors", "factors": [1.0]}}, "1 rope frequency factors for 3"),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Config.from_hf(BASE | changes)


def test_missing_keys_and_unknown_formats_are_named() -> None:
    with pytest.raises(ModelError, match="needs 'intermediate_size'"):
        Config.from_hf({key: value for key, value in BASE.items() if key != "intermediate_size"})
    with pytest.raises(ModelError, match="safetensors or gguf, not 'pth'"):
        name_table(Config.from_hf(BASE), "pth")


def test_rope_parameters_of_newer_configs() -> None:
    old = Config.from_hf(BASE | {"rope_theta": 123.0, "rope_scaling": LLAMA3})
    new = {key: value for key, value in BASE.items() if key != "rope_theta"}
    assert Config.from_hf(new | {"rope_parameters": LLAMA3 | {"rope_theta": 123.0}}) == old
    assert old.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
