"""Prefill and decode with positions over `seq`: the same tokens, and only the messages that docs/layouts.md states."""

from collections import Counter
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from flax import nnx

from spmd_infer.engine import Engine
from spmd_infer.generation.detokenizer import ByteTable, Detokenizer
from spmd_infer.generation.loop import GenerationLoop
from spmd_infer.generation.requests import Request
from spmd_infer.generation.sampling_params import SamplingParams
from spmd_infer.generation.scoring import SCORING, score_texts
from spmd_infer.models.llama import Config, Llama, input_spec
from spmd_infer.planning.audit import collectives
from spmd_infer.planning.layouts import LAYOUTS

CONFIG = Config(256, 64, 128, 2, 8, 2, 8, context_len=128)
ROWS, LENGTH, STEPS = 4, 32, 4
LENGTHS = (LENGTH, 3, 17, 1)


@cache
def generated(layout: str, mesh: str) -> tuple[list[list[int]], np.ndarray, dict[str, Counter[tuple[str, str]]]]:
    rules = LAYOUTS[layout].with_units(CONFIG.axis_units())
    engine = Engine(Llama(CONFIG, rngs=nnx.Rngs(0)), mesh=mesh, rules=rules, inputs=input_spec(CONFIG), buckets=[ROWS])
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    table = ByteTable([b"."] * CONFIG.vocab_size, frozenset())
    requests = [
        Request(
            str(row),
            ids[row, :length].tolist(),
            SamplingParams(temperature=row / 2, top_k=20, top_p=0.9, seed=row, max_tokens=STEPS + 1),
            ends=frozenset(),
            detokenizer=Detokenizer(table),
            vocab_size=CONFIG.vocab_size,
        )
        for row, length in enumerate(LENGTHS)
    ]
    loop = GenerationLoop(engine, CONFIG, ())
    for request in requests:
        loop.submit([request])
    loop.run(requests)

    def text(index: int, tokens: Sequence[int]) -> Request:
        one = Request(
            f"text {index}",
            tokens[:-1],
            SCORING.seeded(),
            ends=frozenset(),
            detokenizer=Detokenizer(table),
            vocab_size=CONFIG.vocab_size,
        )
        one.score(tokens)
        return one

    scores = np.stack(score_texts(loop, text, ids.tolist()))
    used = {
        program.name: Counter((each.kind, ",".join(each.axes(engine.mesh))) for each in collectives(program.compiled))
        for program in engine.programs
    }
    return [request.token_ids for request in requests], scores, used


@pytest.mark.parametrize("mesh", ["seq=4", "seq=2,model=4", "data=2,seq=2,model=2"])
@pytest.mark.parametrize("layout", ["1d", "ring"])
def test_same_tokens(layout: str, mesh: str) -> None:
    tokens, scores, used = generated(layout, mesh)
    whole_tokens, whole_scores, _ = generated("1d", "data=1")
    assert tokens == whole_tokens
    np.testing.assert_allclose(scores, whole_scores, atol=1e-4)  # float32 logits of about 1, over 256 tokens
    name = next(name for name in used if "decode" in name)
    along_seq = {kind: count for (kind, axes), count in used[name].items() if "seq" in axes}
    # Pages over devices: the maximum of each layer, then its sum and mixed values in one. Whole pages: nothing.
    assert along_seq == ({"all-reduce": 2 * CONFIG.num_layers} if layout == "ring" else {})
