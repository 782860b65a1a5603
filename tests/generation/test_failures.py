"""A step that fails: whoever took the turn is told, and all requests go on with the tokens of an undisturbed run."""

from collections.abc import Callable
from typing import Any

import pytest

from spmd_infer.generation.dispatched import Dispatched, DispatchedDrafts
from spmd_infer.generation.executor import Executor
from spmd_infer.generation.loop import GenerationLoop
from spmd_infer.generation.requests import Request
from spmd_infer.generation.sampling_params import SamplingParams
from spmd_infer.generation.scheduler import Scheduler
from spmd_infer.generation.speculation import PromptLookup
from tests.generation.test_loop import loop, prompts, request, run

PARAMS = [
    SamplingParams(max_tokens=12, ignore_eos=True),
    SamplingParams(max_tokens=9, ignore_eos=True, temperature=1.0, seed=3, repetition_penalty=1.2, logprobs=2),
    SamplingParams(max_tokens=14, ignore_eos=True, temperature=0.8, seed=4, top_k=20),
    SamplingParams(max_tokens=12, ignore_eos=True, prompt_logprobs=3),
    SamplingParams(max_tokens=5, ignore_eos=True),
    SamplingParams(max_tokens=12, ignore_eos=True),
]


class DeviceFailure(Exception):
    """Stands for what a device or an interrupt raises."""


def submitted(used: GenerationLoop) -> list[Request]:
    requests = [request(prompt, own) for prompt, own in zip(prompts(), PARAMS, strict=True)]
    requests[3].score(requests[3].prompt_ids)
    for one in requests:
        used.submit([one])
    return requests


def failing_once(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int, *, after: bool) -> None:
    """Let a method's call of that number raise, before or after it has done its work."""
    real: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def method(self: Any, *args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            raise DeviceFailure(name)
        found = real(self, *args, **named)
        if calls == call:
            raise DeviceFailure(name)
        return found

    monkeypatch.setattr(owner, name, method)


@pytest.mark.parametrize(
    ("owner", "name", "call", "after"),
    [
        (Executor, "prefill", 1, False),
        (Executor, "prefill", 2, True),
        (Executor, "decode", 1, False),
        (Executor, "decode", 4, True),
        (Executor, "copy", 5, False),
        (Dispatched, "read", 5, False),
        (Dispatched, "wait", 3, False),
        (Scheduler, "plan", 6, True),
        (Scheduler, "accept", 7, True),
        (Request, "take", 9, False),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_all_requests_go_on(owner: type, name: str, call: int, after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = submitted(plain := loop())
    plain.run(expected)
    used = loop(max_rows=4, max_chunk=64, token_budget=128)
    requests = submitted(used)
    failing_once(monkeypatch, owner, name, call, after=after)
    with pytest.raises(DeviceFailure):
        used.run(requests)
    assert used.scheduler.parts[0].pool.used == 0
    used.run(requests)
    assert [one.token_ids for one in requests] == [one.token_ids for one in expected]
    assert [one.finish_reason for one in requests] == ["length"] * len(requests)
    assert [len(one.scores) for one in requests] == [0, 9, 0, 0, 0, 0]
    found, wanted = requests[3].prompt_scores.logprobs, expected[3].prompt_scores.logprobs
    assert found == pytest.approx(wanted, abs=1e-4)
    assert len(used.scheduler) == used.scheduler.parts[0].pool.used == 0
    used.scheduler.parts[0].pool.check()


def test_speculation_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    used = loop(speculation=PromptLookup(adaptive=False))
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    requests = [request(prompt, params) for prompt in prompts()]
    for one in requests:
        used.submit([one])
    failing_once(monkeypatch, DispatchedDrafts, "read", 2, after=False)
    with pytest.raises(DeviceFailure):
        used.run(requests)
    used.run(requests)
    assert [one.token_ids for one in requests] == run(loop(), prompts(), params)


def test_forks_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=9, temperature=1.0, seed=3, n=4, ignore_eos=True)
    for call in (1, 2, 4):
        used, ids = loop(max_rows=2), prompts([30])[0] * 3
        group = [request(ids, own) for own in params.branches()]
        used.submit(group)
        with monkeypatch.context() as once:
            failing_once(once, Executor, "decode", call, after=True)
            with pytest.raises(DeviceFailure):
                used.run(group)
        used.run(group)
        assert [one.token_ids for one in group] == [run(loop(), [ids], own)[0] for own in params.branches()]
        assert used.scheduler.parts[0].pool.used == 0


def test_what_a_callback_raises_reaches_its_own_caller_and_no_other() -> None:
    used = loop()
    told: list[str] = []

    def refuse(text: str) -> None:
        told.append(text)
        raise DeviceFailure(text)

    params = SamplingParams(max_tokens=12, ignore_eos=True)
    bad, good = request(prompts()[0], params), request(prompts()[1], params)
    bad._on_text = refuse
    for one in (bad, good):
        used.submit([one])
    used.run([good])  # another caller's turns
    assert good.token_ids == run(loop(), prompts()[1:2], params)[0]
    assert (bad.finish_reason, len(told)) == ("cancelled", 1)
    with pytest.raises(DeviceFailure):
        used.run([bad])
    assert len(used.scheduler) == used.scheduler.parts[0].pool.used == 0


def test_a_pool_that_cannot_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    used = loop(max_rows=8)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    first = request(prompts()[0], params)
    used.submit([first])
    for _ in range(3):
        used.turn()
    long = [request(prompts([30])[0] * 6, params) for _ in range(8)]  # 4 pages each; there are 8
    failing_once(monkeypatch, Executor, "resize", 1, after=False)

    def submit_all() -> None:
        for one in long:
            used.submit([one])

    with pytest.raises(DeviceFailure):
        submit_all()
    used.run([first])
    assert first.token_ids == run(loop(), prompts()[:1], params)[0]
    assert run(used, [long[-1].prompt_ids], params) == run(loop(), [long[-1].prompt_ids], params)


def test_devices_that_cannot_start_again_end_all_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    used = loop()
    requests = submitted(used)
    failing_once(monkeypatch, Executor, "decode", 2, after=False)
    failing_once(monkeypatch, Executor, "restart", 1, after=False)
    with pytest.raises(DeviceFailure, match="restart"):
        used.run(requests)
    assert {one.finish_reason for one in requests} == {"cancelled"}
    assert len(used.scheduler) == used.scheduler.parts[0].pool.used == 0
