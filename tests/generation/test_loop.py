"""The decode loop on small random models: whatever shares a batch or a mesh with a request, its tokens are the same."""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spmd_infer.axes import BATCH, SEQ
from spmd_infer.engine import Engine
from spmd_infer.errors import TaskError
from spmd_infer.generation import loop as loop_module
from spmd_infer.generation.cache import KVCache, cache_axes
from spmd_infer.generation.groups import Request, check_requests, make_groups
from spmd_infer.generation.loop import DecodeLoop
from spmd_infer.generation.sampling import SamplingParams
from spmd_infer.generation.scoring import Scorer
from spmd_infer.generation.thresholds import CANDIDATES
from spmd_infer.planning.audit import collectives, summary
from tests.references.llama_variants import BASE, token_ids, write_checkpoint

EOS = 127
LENGTHS = (3, 17, 1, 9, 30, 5)


@cache
def _engine(variant: str, mesh: str) -> Engine:
    with TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), variant)
        return Engine.load(folder, mesh=mesh, buckets=[8])


@cache
def _decode_loop(mesh: str) -> DecodeLoop:
    return DecodeLoop(_engine("gqa", mesh), _engine("gqa", mesh).config, {EOS})


def engine(variant: str = "gqa", mesh: str = "data=1,model=1") -> Engine:
    return _engine(variant, mesh)


def decode_loop(mesh: str = "data=1,model=1") -> DecodeLoop:
    return _decode_loop(mesh)


def prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    return [token_ids(len(lengths), 40)[row, :length].tolist() for row, length in enumerate(lengths)]


def run(loop: DecodeLoop, ids: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[list[int]]:
    """Tokens of each prompt, ended by max_tokens or the end token."""
    each = params if isinstance(params, list) else [params] * len(ids)
    tokens: list[list[int]] = [[] for _ in ids]

    def accept(request: Request, token: int, _: object) -> bool:
        tokens[request.index].append(token)
        ended = token == EOS and not request.params.ignore_eos
        return ended or len(tokens[request.index]) == request.params.max_tokens

    loop.run([Request(index, prompt, each[index]) for index, prompt in enumerate(ids)], accept)
    return tokens


def naive(prompt: list[int], count: int) -> list[int]:
    """Greedy tokens from whole forward passes."""
    ids = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(engine().infer({"input_ids": padded})[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


@cache
def greedy() -> list[list[int]]:
    return [naive(prompt, GREEDY.max_tokens) for prompt in prompts()]


def test_rows_of_different_lengths_equal_whole_passes_one_by_one(mesh_text: str) -> None:
    assert run(decode_loop(mesh_text), prompts(), GREEDY) == greedy()


@pytest.mark.parametrize("variant", ["gqa", "9 heads, 3 kv", "tied"])
def test_prefill_and_decode_logits_equal_the_full_forward(variant: str, mesh_text: str) -> None:
    found = engine(variant, mesh_text)
    ids, config = token_ids(8, 24), found.config
    full = found.infer({"input_ids": ids})
    lengths = np.array([1, 3, 8, 16, 2, 5, 13, 9], np.int32)

    def start(model: Any, ids: Any, lengths: Any) -> Any:
        empty = KVCache.zeros(config, 8, 32, np.float32)
        logits, layers = model.prefill(ids, lengths, empty.layers)
        return logits, KVCache(layers, lengths)

    def step(model: Any, cache: KVCache, tokens: Any) -> Any:
        logits, layers = model.decode(tokens, cache.lengths, cache.layers)
        return logits, KVCache(layers, cache.lengths + 1)

    out_axes = ((BATCH, None), cache_axes(config))
    prefill = found.jit("test_prefill", start, out_axes=out_axes)
    decode = found.jit("test_decode", step, donate=(0,), out_axes=out_axes)
    logits, cache = prefill(found.place(ids[:, :16], (BATCH, SEQ)), found.place(lengths, (BATCH,)))
    rows = np.arange(8)
    for offset in range(8):
        expected = full[rows, lengths - 1 + offset]
        # float32 sums in another order, relative to the largest logit.
        assert np.abs(np.asarray(logits) - expected).max() <= 1e-4 * np.abs(full).max()
        logits, cache = decode(cache, found.place(ids[rows, lengths + offset], (BATCH,)))
    # Donation only works if a step returns the cache as it was laid out.
    assert sum(1 for program in found.programs if program.name == "test_decode") == 1


def test_collectives_of_a_decode_step(mesh_text: str) -> None:
    loop = decode_loop(mesh_text)
    run(loop, prompts(), GREEDY)
    found = engine(mesh=mesh_text)
    program = next(program for program in found.programs if program.name == "decode")
    used = collectives(program.compiled)
    print(f"\ndecode {mesh_text}: {summary(used, found.mesh)}")
    parts = dict(found.mesh.shape)
    if parts["model"] == 1:
        assert used == []
        return
    assert {each.axes(found.mesh) for each in used} == {("model",)}
    rows, layers = 8 // parts["data"], BASE["num_hidden_layers"]
    counted = Counter((each.kind, each.nbytes) for each in used)
    assert counted == {
        # attention and feed-forward of each layer, and the lookup
        ("all-reduce", rows * BASE["hidden_size"] * 4): 2 * layers + 1,
        # a number a row: the largest logit and its place, both greedy and sampled (4); only for top-k and top-p the sum
        # of the weights (1), and where the candidates do not settle it the passes (two loops and a sum)
        ("all-reduce", rows * 4): 8,
        # only for top-k and top-p: the candidates, which here are all of the small vocabulary
        ("all-gather", rows * min(CANDIDATES * parts["model"], BASE["vocab_size"]) * 4): 1,
    }


def test_sampled_tokens_do_not_depend_on_batch_or_mesh(mesh_text: str) -> None:
    params = [
        SamplingParams(max_tokens=10, temperature=1.0, seed=seed, top_k=50, top_p=0.95, ignore_eos=True)
        for seed in range(6)
    ]
    alone = [run(decode_loop(), [prompt], [each])[0] for prompt, each in zip(prompts(), params, strict=True)]
    assert run(decode_loop(mesh_text), prompts(), params) == alone
    assert alone != greedy()


def test_more_prompts_than_the_largest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "MOST_ROWS", 4)
    assert run(decode_loop(), prompts(), GREEDY) == greedy()


def test_rows_end_one_by_one() -> None:
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (1, 12, 3, 7, 2, 5)]
    found = run(decode_loop(), prompts(), params)
    assert found == [tokens[: each.max_tokens] for tokens, each in zip(greedy(), params, strict=True)]


def test_buckets_bound_the_number_of_programs() -> None:
    found = engine("mqa")
    loop = DecodeLoop(found, found.config, {EOS})
    before = found.compiles
    for rows in range(1, 9):
        for length in (1, 9, 32):
            run(loop, prompts([length] * rows), SamplingParams(max_tokens=4, ignore_eos=True))
    # Batches of 1, 2, 4 and 8 rows, one prompt length, one cache length: a prefill and a decode program each.
    assert found.compiles - before == 8


def test_the_device_is_one_step_ahead_and_stops_with_the_last_row() -> None:
    loop, events = decode_loop(), []
    original = loop._decode
    loop._decode = lambda *args: (events.append("step"), original(*args))[1]  # type: ignore[func-returns-value]
    try:

        def accept(request: Request, token: int, _: object) -> bool:
            events.append("read")
            return events.count("read") == 4  # as if the fourth token were an end token

        loop.run([Request(0, [5, 6], SamplingParams(max_tokens=50))], accept)
    finally:
        loop._decode = original
    # The first token is read at once; after that each is read while the next step runs, and the step that was under way
    # when the fourth came is the last.
    assert events == ["read", "step", "step", "read", "step", "read", "step", "read"]


def test_scores_equal_the_logits_of_infer(mesh_text: str) -> None:
    found = engine("gqa", mesh_text)
    ids = token_ids(6, 40)
    logits = np.asarray(engine().infer({"input_ids": ids}), np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    scores = Scorer(found, found.config)(
        [row[:length] for row, length in zip(ids, (40, 2, 33, 7, 32, 12), strict=True)]
    )
    for row, score in enumerate(scores):
        expected = logprobs[row, np.arange(len(score)), ids[row, 1 : len(score) + 1]]
        np.testing.assert_allclose(score, expected, atol=1e-3)
    assert [len(score) for score in scores] == [39, 1, 32, 6, 31, 11]


@pytest.mark.parametrize(
    ("ids", "params", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1], [2, 128]], {}, "prompt 1 has token id 128; the vocabulary has ids 0 to 127"),
        ([[1] * 300], {}, "prompt 0 has 300 tokens, but the model's context is 256"),
        (
            [[1] * 250],
            {"max_tokens": 7},
            "asks for 7 more, but the model's context is 256; use max_tokens of at most 6",
        ),
        ([[1]], {"stop_token_ids": (500,)}, "stop_token_ids has 500; the vocabulary has ids 0 to 127"),
    ],
)
def test_requests_that_are_refused(ids: list[list[int]], params: dict[str, Any], message: str) -> None:
    requests = [Request(index, prompt, SamplingParams(**params)) for index, prompt in enumerate(ids)]
    with pytest.raises(TaskError, match=message):
        check_requests(requests, 128, 256)


@pytest.mark.parametrize(("ids", "message"), [([5], "has 1 tokens"), ([1] * 257, "257 tokens"), ([1, 999], "id 999")])
def test_sequences_that_cannot_be_scored(ids: list[int], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        Scorer(engine(), engine().config)([[1, 2], ids])


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 50)), min_size=1, max_size=70),
    parts=st.sampled_from([1, 2, 3, 8]),
    most_rows=st.sampled_from([1, 8, 32]),
    most_positions=st.sampled_from([1, 2000, 10**6]),
)
def test_groups(sizes: list[tuple[int, int]], parts: int, most_rows: int, most_positions: int) -> None:
    requests = [
        Request(index, [1] * length, SamplingParams(max_tokens=count)) for index, (length, count) in enumerate(sizes)
    ]
    groups = make_groups(requests, parts=parts, context_len=250, most_rows=most_rows, most_positions=most_positions)
    rows = [row for group in groups for row in group.rows if row is not None]
    assert sorted(row.index for row in rows) == list(range(len(requests)))
    for group in groups:
        held = [row for row in group.rows if row is not None]
        assert held
        assert len(group.rows) % parts == 0
        assert len(group.rows) * group.capacity <= most_positions or len(group.rows) == parts
        assert max(row.positions for row in held) <= group.capacity <= 250
        assert max(len(row.ids) for row in held) <= group.prompt_len <= group.capacity
        ids, lengths = group.input_ids(), group.lengths()
        for line, length, row in zip(ids, lengths, group.rows, strict=True):
            assert line.sum() == (0 if row is None else length)
        shares = np.array([0 if row is None else len(row.ids) for row in group.rows]).reshape(parts, -1).sum(1)
        assert group.imbalance == pytest.approx(shares.max() / shares.mean())
