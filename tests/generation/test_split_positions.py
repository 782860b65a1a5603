"""Prefill and decode with positions over `seq`: the same tokens, and only the messages that docs/layouts.md states."""

from collections import Counter
from functools import cache, partial

import numpy as np
import pytest
from flax import nnx

from spmd_infer.axes import BATCH, SEQ
from spmd_infer.engine import Engine
from spmd_infer.generation.cache import cache_axes
from spmd_infer.generation.sampling import SAMPLING_AXES, SamplingArrays, SamplingParams, sampling_arrays
from spmd_infer.generation.steps import decode, prefill, token_logprobs
from spmd_infer.models.llama import Config, Llama, input_spec
from spmd_infer.planning.audit import collectives
from spmd_infer.planning.layouts import LAYOUTS

CONFIG = Config(256, 64, 128, 2, 8, 2, 8, context_len=128)
ROWS, LENGTH, CAPACITY, STEPS = 4, 32, 64, 4


@cache
def generated(layout: str, mesh: str) -> tuple[np.ndarray, np.ndarray, dict[str, Counter[tuple[str, str]]]]:
    rules = LAYOUTS[layout].with_units(CONFIG.axis_units())
    engine = Engine(Llama(CONFIG, rngs=nnx.Rngs(0)), mesh=mesh, rules=rules, inputs=input_spec(CONFIG), buckets=[ROWS])
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    lengths = engine.place(np.array([LENGTH, 3, 17, 1], np.int32), (BATCH,))  # the rest is padding
    params = [SamplingParams(temperature=row / 2, top_k=20, top_p=0.9, seed=row) for row in range(ROWS)]
    fields = sampling_arrays(params, ())
    sampling = SamplingArrays(**{name: engine.place(value, SAMPLING_AXES[name]) for name, value in fields.items()})
    out_axes = ((BATCH,), cache_axes(CONFIG))
    first = engine.jit("prefill", partial(prefill, capacity=CAPACITY, dtype=np.float32), out_axes=out_axes)
    following = engine.jit("decode", decode, donate=(0,), out_axes=out_axes)
    placed = engine.place(ids, (BATCH, SEQ))
    tokens, cache_ = first(placed, lengths, sampling)
    chosen = [np.asarray(tokens)]
    for _ in range(STEPS):
        tokens, cache_ = following(cache_, tokens, lengths, sampling)
        chosen.append(np.asarray(tokens))
    scores = np.asarray(engine.jit("scores", token_logprobs)(placed))
    used = {
        program.name: Counter((each.kind, ",".join(each.axes(engine.mesh))) for each in collectives(program.compiled))
        for program in engine.programs
    }
    return np.stack(chosen), scores, used


@pytest.mark.parametrize("mesh", ["seq=4", "seq=2,model=4", "data=2,seq=2,model=2"])
@pytest.mark.parametrize("layout", ["1d", "ring"])
def test_same_tokens(layout: str, mesh: str) -> None:
    tokens, scores, used = generated(layout, mesh)
    whole_tokens, whole_scores, _ = generated("1d", "data=1")
    assert (tokens == whole_tokens).all()
    np.testing.assert_allclose(scores, whole_scores, atol=1e-4)  # float32 logits of about 1, over 256 tokens
    name = next(name for name in used if "decode" in name)
    along_seq = {kind: count for (kind, axes), count in used[name].items() if "seq" in axes}
    # A split cache: maximum, sum and mixed values of each layer. A whole one: nothing.
    assert along_seq == ({"all-reduce": 3 * CONFIG.num_layers} if layout == "ring" else {})
