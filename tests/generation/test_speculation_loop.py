"""Speculation on small random models: the tokens are those of steps of one token, whatever is drafted."""

from collections.abc import Sequence
from typing import Any, cast

import pytest

from spmd_infer.errors import TaskError
from spmd_infer.generation.kv_pages import PAGE_SIZE, page_bytes
from spmd_infer.generation.loop import GenerationLoop
from spmd_infer.generation.requests import Request
from spmd_infer.generation.sampling_params import SamplingParams
from spmd_infer.generation.speculation import Draft, Pace, PromptLookup, Speculation
from spmd_infer.planning.audit import collectives
from tests.generation.test_loop import FLOATS, engine, loop, prompts, request, run

GREEDY = SamplingParams(max_tokens=40, ignore_eos=True)
DRAWN = [SamplingParams(max_tokens=40, temperature=1.0, top_k=4, seed=seed, ignore_eos=True) for seed in range(6)]
LOOKUP = PromptLookup(adaptive=False)
TWO_MESHES = pytest.mark.parametrize("mesh", ["data=1,model=1", "data=2,model=4"])


def drafts(variant: str, mesh: str, **options: Any) -> Draft:
    return Draft(engine=engine(variant, mesh), adaptive=False, **options)


def finished(used: GenerationLoop, ids: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[Request]:
    requests = [request(prompt, own) for prompt, own in zip(ids, params, strict=True)]
    for one in requests:
        used.submit([one])
    used.run(requests)
    assert all(part.pool.used == 0 for part in used.scheduler.parts)
    return requests


@pytest.mark.parametrize("kind", ["lookup", "draft"])
@TWO_MESHES
def test_tokens_are_the_same_with_drafts_and_without(mesh: str, kind: str) -> None:
    # 'mha' has other weights than 'gqa': few of its drafts are right.
    used = loop(mesh, speculation=LOOKUP if kind == "lookup" else drafts("mha", mesh))
    assert run(used, prompts(), GREEDY) == run(loop(), prompts(), GREEDY)
    assert run(used, prompts(), DRAWN) == run(loop(), prompts(), DRAWN)


@TWO_MESHES
def test_all_drafts_of_the_model_itself_are_right(mesh: str) -> None:
    used = loop(mesh, speculation=drafts("gqa", mesh))
    for params in ([GREEDY] * 6, DRAWN):
        for one in finished(used, prompts(), params):
            # The last step may bring more than is asked for: one token from the prompt, five a step, 40 wanted.
            assert one.drafted_tokens == 8 * 4
            assert one.accepted_tokens == 8 * 4
            assert len(one.token_ids) == 40


def test_a_repetitive_text_is_found_in_itself() -> None:
    used = loop(speculation=LOOKUP)
    ids = [prompts([30])[0] * 4]
    turns = 0
    one = request(ids[0], SamplingParams(max_tokens=100, ignore_eos=True))
    used.submit([one])
    while one.finish_reason is None:
        used.turn()
        turns += 1
    assert one.token_ids == run(loop(), ids, one.params)[0]
    assert 0 < one.accepted_tokens <= one.drafted_tokens
    assert turns <= 100 - one.accepted_tokens + 3


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("lookup", {"max_rows": 2}),
        ("draft", {"max_chunk": PAGE_SIZE, "token_budget": 2 * PAGE_SIZE, "max_rows": 8}),
        ("draft", {"chunked": False}),
        ("lookup", {"prefix_cache": False}),
    ],
    ids=str,
)
def test_whatever_the_options_the_tokens_are_the_same(kind: str, options: dict[str, Any]) -> None:
    ids = prompts([3, 17, 30, 5, 9, 1])
    ids += [ids[2] * 5, ids[2] * 5 + [7], ids[2] * 5]  # 150 tokens: two full pages alike
    speculation: Speculation = LOOKUP if kind == "lookup" else drafts("gqa", "data=1,model=1")
    used = loop(speculation=speculation, **options)
    assert run(used, ids, GREEDY) == run(loop(), ids, GREEDY)


@TWO_MESHES
def test_requests_that_lose_their_pages_end_with_the_same_tokens(mesh: str) -> None:
    ids = prompts([30, 17, 9, 25, 30, 11, 28, 19])
    params = SamplingParams(max_tokens=150, ignore_eos=True, temperature=0.7, seed=5)
    parts = engine(mesh=mesh).data_parts
    small = loop(mesh, speculation=LOOKUP, cache_bytes=5 * parts * page_bytes(cast("Any", engine().config), FLOATS))
    requests = [request(prompt, params) for prompt in ids]
    scheduled = []
    for one in requests:
        small.submit([one])
        scheduled.append(small.scheduler[one.request_id])
    small.run(requests)
    assert sum(each.preemptions for each in scheduled) > 0
    assert all(part.pool.used == 0 for part in small.scheduler.parts)
    assert [one.token_ids for one in requests] == run(loop(), ids, params)


def test_a_cancelled_request_gives_its_pages_back() -> None:
    used = loop(speculation=LOOKUP, max_rows=4)
    requests = [request(prompt, SamplingParams(max_tokens=100, ignore_eos=True)) for prompt in prompts()]
    for one in requests:
        used.submit([one])
    for _ in range(3):
        used.turn()
    for one in requests[:5]:
        used.cancel(one)
    used.run(requests)
    assert [one.finish_reason for one in requests] == ["cancelled"] * 5 + ["length"]
    assert used.scheduler.parts[0].pool.used == 0


def test_requests_end_in_the_middle_of_a_step() -> None:
    used = loop(speculation=drafts("gqa", "data=1,model=1"))
    whole = run(loop(), prompts([30]), GREEDY)[0]
    for at in (3, 4, 5, 6):
        found = run(used, prompts([30]), SamplingParams(max_tokens=at, ignore_eos=True))
        assert found == [whole[:at]]
    (stopped,) = finished(used, prompts([30]), [SamplingParams(max_tokens=40, stop_token_ids=(whole[7],))])
    assert stopped.token_ids == whole[: whole.index(whole[7]) + 1]
    late = SamplingParams(max_tokens=40, stop_token_ids=(whole[7],), min_tokens=20)
    assert run(used, prompts([30]), late) == run(loop(), prompts([30]), late)


def test_up_to_the_end_of_the_context() -> None:
    used = loop(speculation=drafts("gqa", "data=1,model=1"))
    params = SamplingParams(max_tokens=256 - 200, ignore_eos=True)
    ids = [(prompts([30])[0] * 7)[:200]]
    assert run(used, ids, params) == run(loop(), ids, params)


def test_steps_with_rules_go_without_drafts() -> None:
    used = loop(speculation=drafts("gqa", "data=1,model=1"))
    penalised = SamplingParams(max_tokens=20, repetition_penalty=1.3, logprobs=2, ignore_eos=True)
    params = [penalised, *[GREEDY] * 5]
    found = finished(used, prompts(), params)
    assert [one.token_ids for one in found] == run(loop(), prompts(), params)
    assert found[0].drafted_tokens == 0
    assert len(found[0].scores) == 20
    assert all(one.drafted_tokens > 0 for one in found[1:])  # after the other had ended


def test_continuations_of_one_prompt_are_those_of_each_alone() -> None:
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=3, n=4, ignore_eos=True)
    ids = prompts([30])[0] * 3
    group = [request(ids, own) for own in params.branches()]
    used = loop(speculation=drafts("gqa", "data=1,model=1"))
    used.submit(group)
    used.run(group)
    assert [one.token_ids for one in group] == [run(loop(), [ids], own)[0] for own in params.branches()]
    assert all(one.accepted_tokens >= one.drafted_tokens - 3 for one in group)


def test_drafts_that_are_never_right_are_soon_no_longer_tried() -> None:
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    used = loop(speculation=drafts("mha", "data=1,model=1"))
    speculator = used._executor.dispatcher.speculator
    assert speculator is not None
    speculator.pace = Pace(4, free_rows=8)  # as if drafts cost nothing: this one is as large as the model
    found = finished(used, prompts(), [params] * 6)
    assert [one.token_ids for one in found] == run(loop(), prompts(), params)
    # A few trials of some steps each, not 4 drafts in each of 200 steps.
    assert 0 < sum(one.drafted_tokens for one in found) < 6 * 200


def test_draft_models_that_do_not_fit() -> None:
    with pytest.raises(TaskError, match="has 1 data parts, the model that it drafts for 2"):
        loop("data=2,model=4", speculation=drafts("gqa", "data=1,model=1"))


def test_parts_of_the_rows_do_not_talk_to_each_other() -> None:
    found = engine(mesh="data=2,model=4")
    run(loop("data=2,model=4", speculation=LOOKUP), prompts(), GREEDY)
    programs = {program.name: program for program in found.programs}
    looked_up = next(program for name, program in programs.items() if name.startswith("find_"))
    for program in (looked_up, programs["remember"]):
        assert collectives(program.compiled) == []
    assert {each.axes(found.mesh) for each in collectives(programs["verify"].compiled)} == {("model",)}
