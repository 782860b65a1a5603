"""The decode loop on small random models: whatever shares a batch or a mesh with a request, its tokens are the same."""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
import pytest

from spmd_infer.axes import BATCH, SEQ
from spmd_infer.engine import Engine
from spmd_infer.errors import TaskError
from spmd_infer.generation.cache import KVCache, cache_axes
from spmd_infer.generation.detokenizer import ByteTable, Detokenizer
from spmd_infer.generation.generation_options import GenerationOptions
from spmd_infer.generation.kv_pages import PAGE_SIZE, page_bytes
from spmd_infer.generation.loop import GenerationLoop
from spmd_infer.generation.requests import Request
from spmd_infer.generation.sampling_params import SamplingParams, stop_tokens
from spmd_infer.generation.thresholds import CANDIDATES
from spmd_infer.models.cache_formats import CacheFormat
from spmd_infer.planning.audit import collectives, summary
from spmd_infer.tasks.generate import check_prompt
from spmd_infer.transfer import fetch
from tests.references.llama_variants import BASE, token_ids, write_checkpoint

EOS = 127
LENGTHS = (3, 17, 1, 9, 30, 5)
FLOATS = CacheFormat.of("auto", "cpu", np.float32)


@cache
def _engine(variant: str, mesh: str) -> Engine:
    with TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), variant)
        return Engine.load(folder, mesh=mesh, buckets=[8])


@cache
def _loop(mesh: str) -> GenerationLoop:
    return GenerationLoop(_engine("gqa", mesh), _engine("gqa", mesh).config, {EOS})


def engine(variant: str = "gqa", mesh: str = "data=1,model=1") -> Engine:
    return _engine(variant, mesh)


def loop(mesh: str = "data=1,model=1", **options: Any) -> GenerationLoop:
    if not options:
        return _loop(mesh)
    return GenerationLoop(_engine("gqa", mesh), _engine("gqa", mesh).config, {EOS}, GenerationOptions(**options))


def prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    return [token_ids(len(lengths), 40)[row, :length].tolist() for row, length in enumerate(lengths)]


_numbers = count()
_table = ByteTable([b"."] * 128, frozenset())


def request(prompt: list[int], params: SamplingParams) -> Request:
    return Request(
        f"test {next(_numbers)}",
        prompt,
        params.seeded(),
        ends=stop_tokens(params, {EOS}),
        detokenizer=Detokenizer(_table),
        vocab_size=128,
    )


def run(loop: GenerationLoop, ids: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[list[int]]:
    """Tokens of each prompt, ended by max_tokens or the end token; no page is left in use."""
    each = params if isinstance(params, list) else [params] * len(ids)
    requests = [request(prompt, own) for prompt, own in zip(ids, each, strict=True)]
    for one in requests:
        loop.submit([one])
    loop.run(requests)
    for part in loop.scheduler.parts:
        part.pool.check()
        assert part.pool.used == 0
    return [one.token_ids for one in requests]


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
    assert run(loop(mesh_text), prompts(), GREEDY) == greedy()


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
    run(loop(mesh_text), prompts(), GREEDY)
    found = engine(mesh=mesh_text)
    programs = {program.name: program for program in found.programs}
    used = [each for name in ("decode", "choose") for each in collectives(programs[name].compiled)]
    print(f"\ndecode {mesh_text}: {summary(used, found.mesh)}")
    parts = dict(found.mesh.shape)
    if parts["model"] == 1:
        assert used == []
        return
    assert {each.axes(found.mesh) for each in used} == {("model",)}
    rows, layers = 8 // parts["data"], BASE["num_hidden_layers"]
    counted = Counter((each.kind, each.nbytes) for each in used)
    # Attention and feed-forward of each layer, and the lookup.
    assert counted.pop(("all-reduce", rows * BASE["hidden_size"] * 4)) == 2 * layers + 1
    # The best token of each device, its number and its logit: greedy, drawn, and for each pass of the filters.
    assert counted.pop(("all-gather", rows * parts["model"] * 3 * 4)) == 3
    # Only for rows with both top-k and top-p: the candidates, which here are all of the small vocabulary.
    candidates = rows * min(CANDIDATES * parts["model"], BASE["vocab_size"]) * 4
    assert counted.pop(("all-gather", candidates)) == 1
    # Only for the filters, a few numbers a row, some joined by XLA: the largest logit, the sum of the weights, a bound
    # on the k-th logit, what is likelier than a drawn token; where the candidates do not settle the k-th, its passes.
    assert {kind for kind, _ in counted} == {"all-reduce"}
    assert max(nbytes for _, nbytes in counted) <= 3 * rows * 4
    assert counted.total() <= 5


def test_sampled_tokens_do_not_depend_on_batch_or_mesh(mesh_text: str) -> None:
    params = [
        SamplingParams(max_tokens=10, temperature=1.0, seed=seed, top_k=50, top_p=0.95, ignore_eos=True)
        for seed in range(6)
    ]
    alone = [run(loop(), [prompt], [each])[0] for prompt, each in zip(prompts(), params, strict=True)]
    assert run(loop(mesh_text), prompts(), params) == alone
    assert alone != greedy()


@pytest.mark.parametrize(
    "options",
    [
        {"max_rows": 2},
        {"max_chunk": PAGE_SIZE, "token_budget": 2 * PAGE_SIZE},
        {"chunked": False},
        {"prefix_cache": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("mesh", ["data=1,model=1", "data=2,model=4", "data=8,model=1"])
def test_whatever_the_options_the_tokens_are_the_same(mesh: str, options: dict[str, Any]) -> None:
    ids = prompts([3, 17, 30, 5, 9, 1])
    ids += [ids[2] * 5, ids[2] * 5 + [7], ids[2] * 5]  # 150 tokens: two full pages alike
    expected = run(loop(), ids, GREEDY)
    assert run(loop(mesh, **options), ids, GREEDY) == expected
    assert expected[:6] == [naive(prompt, GREEDY.max_tokens) for prompt in ids[:6]]


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(max_tokens=12, ignore_eos=True, repetition_penalty=1.3)])
def test_a_loop_for_more_rows_follows_one_for_few(params: SamplingParams) -> None:
    with TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), "mha")
        own = Engine.load(folder, mesh="data=1,model=1", buckets=[8])
    few, many = (GenerationLoop(own, own.config, {EOS}, GenerationOptions(max_rows=rows)) for rows in (1, 8))
    assert run(few, prompts(), params) == run(many, prompts(), params)


def test_a_prompt_that_begins_like_an_earlier_one_takes_its_pages() -> None:
    used = loop(prefix_cache=True)
    ids = prompts([30])[0] * 5
    first, second = request(ids, GREEDY), request([*ids, 3, 4], GREEDY)
    for one in (first, second):
        used.submit([one])
        used.run([one])
    assert first.cached_tokens == 0
    assert second.cached_tokens == 2 * PAGE_SIZE
    assert second.token_ids == run(loop(prefix_cache=False), [[*ids, 3, 4]], GREEDY)[0]


def test_rows_that_share_pages_while_they_run_equal_rows_alone() -> None:
    ids = [prompts([30])[0] * 5 + [row] for row in range(8)]
    alone = [run(loop(prefix_cache=False), [each], GREEDY)[0] for each in ids]
    shared = loop(prefix_cache=True)
    assert run(shared, ids[:1], GREEDY) == alone[:1]
    assert run(shared, ids, GREEDY) == alone


@pytest.mark.parametrize("mesh", ["data=1,model=1", "data=2,model=4"])
def test_requests_that_lose_their_pages_end_with_the_same_tokens(mesh: str) -> None:
    ids = prompts([30, 17, 9, 25, 30, 11, 28, 19])
    params = SamplingParams(max_tokens=150, ignore_eos=True, temperature=0.7, seed=5)
    parts = engine(mesh=mesh).data_parts
    small = loop(mesh, cache_bytes=5 * parts * page_bytes(engine().config, FLOATS))
    requests = [request(prompt, params) for prompt in ids]
    scheduled = []
    for one in requests:
        small.submit([one])
        scheduled.append(small.scheduler[one.request_id])
    small.run(requests)
    assert sum(each.preemptions for each in scheduled) > 0
    assert all(part.pool.used == 0 for part in small.scheduler.parts)
    assert [one.token_ids for one in requests] == run(loop(), ids, params)


def test_a_long_request_that_waits_keeps_its_room() -> None:
    used = loop(max_rows=1)
    run(used, prompts([3]), GREEDY)
    long = request(prompts([30])[0] * 8, SamplingParams(max_tokens=8, ignore_eos=True))  # 4 of 8 pages
    pages = used._executor.num_pages
    used._executor.resize(4 * pages, used.scheduler.resize(4 * pages))  # as after one longer still
    used.submit(
        [
            request(prompts([3])[0], GREEDY),
        ]
    )
    assert used._executor.num_pages == pages  # nothing else waited
    used._executor.resize(4 * pages, used.scheduler.resize(4 * pages))
    used.submit([long])
    others = [request(prompt, GREEDY) for prompt in prompts()]
    for one in others:
        used.submit([one])
    assert used._executor.num_pages == 4 * pages
    used.run([long, *others])
    assert {one.finish_reason for one in (long, *others)} == {"length"}


def test_scores_are_as_many_as_were_asked_for() -> None:
    one = request([5, 6], SamplingParams(max_tokens=2, logprobs=3, ignore_eos=True))
    used = loop()
    used.submit([one])
    used.run([one])
    assert [len(each.top_ids) for each in one.scores] == [3, 3]
    assert one.scores[0].logprob == one.scores[0].top_logprobs[0]  # greedy


def test_a_cancelled_request_gives_its_pages_back() -> None:
    used = loop(max_rows=4)
    requests = [request(prompt, SamplingParams(max_tokens=100, ignore_eos=True)) for prompt in prompts()]
    for one in requests:
        used.submit([one])
    for _ in range(3):
        used.turn()
    for one in requests[:5]:  # running ones and waiting ones
        used.cancel(one)
    used.run(requests)
    assert [one.finish_reason for one in requests] == ["cancelled"] * 5 + ["length"]
    assert requests[5].token_ids[: len(greedy()[5])] == greedy()[5]
    assert used.scheduler.parts[0].pool.used == 0


def test_a_request_whose_deadline_passed_is_not_run() -> None:
    used = loop(max_rows=1)
    late = request([1, 2], GREEDY)
    used.submit([late], deadline=used.clock() - 1)
    used.run([late])
    assert (late.finish_reason, late.token_ids) == ("deadline", [])


def test_continuations_of_one_prompt_are_those_of_each_alone() -> None:
    params = SamplingParams(max_tokens=9, temperature=1.0, seed=3, n=4, ignore_eos=True)
    ids = prompts([30])[0] * 3
    group = [request(ids, own) for own in params.branches()]
    used = loop()
    used.submit(group)
    used.run(group)
    assert [one.token_ids for one in group] == [run(loop(), [ids], own)[0] for own in params.branches()]
    assert len({tuple(one.token_ids) for one in group}) > 1


def test_rows_end_one_by_one() -> None:
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (1, 12, 3, 7, 2, 5)]
    found = run(loop(), prompts(), params)
    assert found == [tokens[: each.max_tokens] for tokens, each in zip(greedy(), params, strict=True)]


def test_buckets_bound_the_number_of_programs() -> None:
    found = engine("mqa")
    used, compiled = GenerationLoop(found, found.config, {EOS}), []
    for _ in range(3):
        for rows in (1, 2, 5, 8):
            run(used, prompts([9] * rows), SamplingParams(max_tokens=4, ignore_eos=True))
        compiled.append(Counter(program.name for program in found.programs))
    # Rows run in batches of 1, 2 and 8, over a pool of 8 or 16 pages, with one length of prompts.
    assert compiled[-1]["decode"] <= 3 * 2
    assert 1 <= sum(count for name, count in compiled[-1].items() if name.startswith("prefill")) <= 3
    assert compiled[-1] == compiled[-2]


def test_the_device_is_one_step_ahead_and_stops_with_the_last_row() -> None:
    used, events = loop(max_rows=1), []
    executor = used._executor
    decode, read = executor.decode, used._read
    executor.decode = lambda *args: (events.append("step"), decode(*args))[1]  # type: ignore[method-assign,func-returns-value]
    used._read = lambda step: (events.append("read"), read(step))[1]  # type: ignore[method-assign,func-returns-value]
    run(used, [[5, 6]], SamplingParams(max_tokens=4, ignore_eos=True))
    # Each token is read while the next step runs. The host knows max_tokens: no step is run in vain.
    assert events == ["step", "read", "step", "read", "step", "read", "read"]


def test_the_loop_counts_its_steps_and_the_time_it_waits() -> None:
    used = loop()
    run(used, prompts(), GREEDY)
    used.times.clear()
    run(used, prompts(), GREEDY)
    times = used.times
    assert times.steps["decode"] == GREEDY.max_tokens - 1
    assert times.steps["prefill"] == 1  # one length, in one go
    assert times.turns == GREEDY.max_tokens + 1  # the last only reads
    assert 0 < times.waited < times.seconds
    assert times.host_seconds == pytest.approx(times.seconds - times.waited)
    assert times.host_share == pytest.approx(times.host_seconds / times.seconds)


def test_the_loop_sends_and_reads_explicitly_and_reads_only_what_is_there(
    monkeypatch: pytest.MonkeyPatch, mesh_text: str
) -> None:
    params = [GREEDY, SamplingParams(max_tokens=6, temperature=0.9, seed=2, repetition_penalty=1.2, logprobs=2)] * 3
    used, expected = loop(mesh_text), run(loop(mesh_text), prompts(), params)
    ready = []

    def fetched(tree: Any) -> Any:
        ready.append(all(x.is_ready() for x in jax.tree.leaves(tree)))
        return fetch(tree)

    monkeypatch.setattr("spmd_infer.generation.dispatched.fetch", fetched)
    with jax.transfer_guard("disallow"):  # all but explicit ones
        assert run(used, prompts(), params) == expected
    assert len(ready) > GREEDY.max_tokens
    assert all(ready)


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
    *good, bad = enumerate(ids)
    for index, prompt in good:
        check_prompt(index, prompt, SamplingParams(**params), 128, 256)
    with pytest.raises(TaskError, match=message):
        check_prompt(*bad, SamplingParams(**params), 128, 256)


def test_a_request_that_the_cache_can_never_hold() -> None:
    small = loop(cache_bytes=2 * page_bytes(engine().config, FLOATS))
    with pytest.raises(TaskError, match="may take 4 pages of 64 positions; the cache has room for 2"):
        small.submit([request([1] * 200, SamplingParams(max_tokens=50))])
    assert run(small, prompts([3]), GREEDY) == greedy()[:1]
