"""Log-probabilities of prompts' tokens, found beside their keys and values, against whole passes and numpy."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from spmd_infer.errors import TaskError
from spmd_infer.generation.kv_pages import PAGE_SIZE, page_bytes
from spmd_infer.generation.loop import GenerationLoop
from spmd_infer.generation.requests import Request
from spmd_infer.generation.sampling_params import SamplingParams
from spmd_infer.generation.scoring import SCORING, check_text, score_texts
from spmd_infer.planning.audit import collectives
from tests.generation.test_loop import FLOATS, engine, loop, prompts, request, run
from tests.references.llama_variants import BASE, token_ids

Floats = npt.NDArray[np.float64]
MOST = 20


@cache
def logprobs(length: int) -> Floats:
    """Of every token after each position of some texts, in float64 from the logits of whole passes, ``[6, T, V]``."""
    logits = np.asarray(engine().infer({"input_ids": texts(length)}), np.float64)
    found: Floats = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return found


def texts(length: int) -> npt.NDArray[np.int32]:
    return token_ids(6, length)


def asking(ids: Sequence[int], most: int = MOST, **params: Any) -> Request:
    one = request(list(ids), SamplingParams(prompt_logprobs=most, ignore_eos=True, **{"max_tokens": 3, **params}))
    one.score(ids)
    return one


def finished(used: GenerationLoop, requests: list[Request]) -> list[Request]:
    for one in requests:
        used.submit([one])
    used.run(requests)
    for part in used.scheduler.parts:
        part.pool.check()
        assert part.pool.used == 0
    return requests


def check(one: Request, expected: Floats) -> None:
    """Against log-probabilities ``[T, V]``; float32 sums in another order, relative to the largest."""
    ids, scores, most = np.array(one.prompt_ids), one.prompt_scores, one.params.prompt_logprobs or 0
    expected = expected[: len(ids) - 1]
    near = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(scores.logprobs, expected[np.arange(len(ids) - 1), ids[1:]], atol=near)
    falling = -np.sort(-expected, axis=-1)[:, :most]
    assert scores.top_ids.shape == falling.shape
    np.testing.assert_allclose(scores.top_logprobs, falling, atol=near)
    np.testing.assert_allclose(np.take_along_axis(expected, scores.top_ids, axis=-1), falling, atol=near)


def test_scores_of_prompts_equal_whole_passes(mesh_text: str) -> None:
    lengths = (40, 2, 33, 7, 32, 12)
    requests = [
        asking(ids[:length].tolist(), most)
        for ids, length, most in zip(texts(40), lengths, (20, 3, 0, 1, 20, 5), strict=True)
    ]
    plain = request(texts(40)[0].tolist(), SamplingParams(max_tokens=3, ignore_eos=True))
    finished(loop(mesh_text), [*requests, plain])
    for one, expected in zip(requests, logprobs(40), strict=True):
        check(one, expected)
    assert requests[0].token_ids == plain.token_ids


@pytest.mark.parametrize("mesh", ["data=1,model=1", "data=2,model=4"])
@pytest.mark.parametrize(
    "options", [{}, {"max_chunk": PAGE_SIZE, "token_budget": 2 * PAGE_SIZE}, {"chunked": False}], ids=str
)
def test_long_prompts_are_computed_whole_whatever_is_cached(mesh: str, options: dict[str, Any]) -> None:
    used = loop(mesh, prefix_cache=True, **options)
    ids = texts(200)[:2]  # so few that the pool does not shrink between them
    run(used, ids.tolist(), SamplingParams(max_tokens=1))
    requests = finished(used, [asking(row.tolist()) for row in ids])
    for one, expected in zip(requests, logprobs(200)[:2], strict=True):
        assert one.cached_tokens == 0
        check(one, expected)
    (after,) = finished(used, [request([*ids[0].tolist(), 3], SamplingParams(max_tokens=1))])
    assert after.cached_tokens == 3 * PAGE_SIZE


def test_prompts_that_lose_their_pages_are_scored_once() -> None:
    small = loop(cache_bytes=7 * page_bytes(engine().config, FLOATS), max_chunk=PAGE_SIZE)  # type: ignore[arg-type]
    requests = [asking(row.tolist(), max_tokens=100) for row in texts(100)]
    scheduled = []
    for one in requests:
        small.submit([one])
        scheduled.append(small.scheduler[one.request_id])
    small.run(requests)
    assert sum(each.preemptions for each in scheduled) > 0
    for one, expected in zip(requests, logprobs(100), strict=True):
        check(one, expected)


def test_the_vocabulary_stays_split() -> None:
    mesh = "data=1,model=8"
    finished(loop(mesh), [asking(texts(40)[0].tolist())])
    found = next(program for program in engine(mesh=mesh).programs if program.name.startswith("prefill_scored"))
    here, positions = BASE["vocab_size"] // 8, 256  # at a time
    # Candidates of every position, in float32 or as ids: each device's largest, never its logits beyond them.
    gathered = [each for each in collectives(found.compiled) if each.kind == "all-gather"]
    assert max(each.nbytes for each in gathered) <= positions * 8 * min(MOST, here) * 4


def text(index: int, ids: Sequence[int]) -> Request:
    one = request(list(ids[:-1]), SCORING)
    one.score(ids)
    return one


def test_scores_of_texts_equal_whole_passes_and_those_of_prompts(mesh_text: str) -> None:
    lengths = (40, 2, 33, 7, 32, 12)
    given = [ids[:length].tolist() for ids, length in zip(texts(40), lengths, strict=True)]
    found = score_texts(loop(mesh_text), text, given)
    for ids, scores, expected in zip(given, found, logprobs(40), strict=True):
        wanted = expected[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(scores, wanted, atol=1e-4 * np.abs(expected).max())
    asked = finished(loop(mesh_text), [asking(ids) for ids in given])
    for scores, one in zip(found, asked, strict=True):
        np.testing.assert_allclose(scores, one.prompt_scores.logprobs, atol=1e-5 * np.abs(scores).max())


def test_a_text_as_long_as_the_context() -> None:
    ids = token_ids(1, 256)[0]
    (scores,) = score_texts(loop(), text, [ids.tolist()])
    logits = np.asarray(engine().infer({"input_ids": ids[None]}), np.float64)[0]
    wanted = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(255), ids[1:]]
    np.testing.assert_allclose(scores, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(("ids", "message"), [([5], "has 1 tokens"), ([1] * 257, "257 tokens"), ([1, 999], "id 999")])
def test_texts_that_cannot_be_scored(ids: list[int], message: str) -> None:
    check_text(0, [1, 2], 128, 256)
    with pytest.raises(TaskError, match=message):
        check_text(1, ids, 128, 256)


def test_a_text_that_the_cache_cannot_hold() -> None:
    small = loop(cache_bytes=2 * page_bytes(engine().config, FLOATS))  # type: ignore[arg-type]
    with pytest.raises(TaskError, match="the cache has room for 2"):
        score_texts(small, text, [[1] * 200, prompts()[0]])
    assert len(small.scheduler) == small.scheduler.parts[0].pool.used == 0
