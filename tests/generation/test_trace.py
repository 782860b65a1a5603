"""A trace shows what waited, what the host did, and what the devices did, on lanes that fit together."""

import json
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from spmd_infer.generation.sampling_params import SamplingParams
from spmd_infer.generation.trace import Trace
from tests.generation.test_loop import loop, prompts, request

HOST, DEVICES, REQUESTS = 1, 2, 3
SLACK = 1.0  # microseconds of rounding


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    used = loop(max_rows=2)
    used.trace = Trace()
    for _ in range(2):
        requests = [request(prompt, SamplingParams(max_tokens=5, ignore_eos=True)) for prompt in prompts()]
        for each in requests:
            used.submit([each])
        used.run(requests)
        time.sleep(0.2)
    path: Path = tmp_path_factory.mktemp("trace") / "trace.json"
    used.trace.write(path)
    found: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return found


def spans(events: list[dict[str, Any]], lane: int) -> dict[int, list[dict[str, Any]]]:
    by_thread = defaultdict(list)
    for event in sorted((e for e in events if e["ph"] == "X" and e["pid"] == lane), key=lambda e: e["ts"]):
        by_thread[event["tid"]].append(event)
    return by_thread


def test_lanes_are_named_and_hold_what_they_should(events: list[dict[str, Any]]) -> None:
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {HOST: "host", DEVICES: "devices", REQUESTS: "requests"}
    kinds = {lane: {e["name"] for all_ in spans(events, lane).values() for e in all_} for lane in names}
    assert kinds[HOST] == {"plan", "dispatch prefill", "dispatch decode", "choose", "wait"}
    assert kinds[DEVICES] == {"prefill", "decode"}
    assert kinds[REQUESTS] == {"queue", "prefill", "decode"}


@pytest.mark.parametrize("lane", [HOST, DEVICES, REQUESTS])
def test_nothing_overlaps_on_a_lane(events: list[dict[str, Any]], lane: int) -> None:
    for thread in spans(events, lane).values():
        assert all(a["ts"] + a["dur"] <= b["ts"] + SLACK for a, b in pairwise(thread))


def test_requests_wait_then_run_their_prompts_then_decode(events: list[dict[str, Any]]) -> None:
    by_request = defaultdict(list)
    for thread in spans(events, REQUESTS).values():
        for event in thread:
            by_request[event["args"]["request"]].append(event)
    assert len(by_request) == 2 * len(prompts())
    for own in by_request.values():
        assert [event["name"] for event in own] == ["queue", "prefill", "decode"]
        assert all(abs(a["ts"] + a["dur"] - b["ts"]) <= SLACK for a, b in pairwise(own))
    waited = sorted(own[0]["dur"] for own in by_request.values())
    assert waited[-1] > 10 * waited[0]  # two run at a time


def test_devices_that_have_nothing_to_do_show_it(events: list[dict[str, Any]]) -> None:
    (thread,) = spans(events, DEVICES).values()
    gaps = [b["ts"] - a["ts"] - a["dur"] for a, b in pairwise(thread)]
    assert max(gaps) > 100_000  # between the two loads
    assert thread[0]["args"] == {"rows": 2}
