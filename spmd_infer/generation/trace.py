"""Where the time goes: a trace of host, devices and requests that Perfetto and chrome://tracing show.

The format is Chrome's trace events (one JSON object, times in microseconds).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from spmd_infer.generation.requests import Request

_HOST, _DEVICES, _REQUESTS = 1, 2, 3


class Trace:
    """Collects events; ``write`` puts them into a file.

    Lanes: the host (plan, dispatch, wait), the devices (each step from when the one before was done, or from its
    dispatch where that was later, to its own end, as the host sees it), and requests (queue, prefill, decode), as many
    lanes as overlap.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._events: list[dict[str, Any]] = []
        self._device_free = self._start
        self._lanes: list[float] = []  # when the last request of each ended
        for process, name in ((_HOST, "host"), (_DEVICES, "devices"), (_REQUESTS, "requests")):
            self._events.append(_named("process_name", process, 0, name))

    @contextmanager
    def span(self, name: str, **facts: int) -> Iterator[None]:
        """Note how long the host takes for something."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._add(_HOST, 0, name, begin, time.perf_counter(), **facts)

    @contextmanager
    def device_step(self, name: str, rows: int, since: float) -> Iterator[None]:
        """Note a step of the devices, around the wait for it; ``since`` is when its dispatch began."""
        begin = time.perf_counter()
        yield
        end = time.perf_counter()
        self._add(_HOST, 0, "wait", begin, end)
        self._add(_DEVICES, 0, name, max(self._device_free, since), end, rows=rows)
        self._device_free = end

    def request(self, request: Request) -> None:
        """Note a request that has ended, back from now: its own clock stands still while programs compile."""
        times = request.token_times
        last = times[-1] if times else request.started or request.submitted
        shift = time.perf_counter() - last
        begin = request.submitted + shift
        lane = self._lane(begin, last + shift)
        for name, end in (("queue", request.started), ("prefill", times[0] if times else None), ("decode", last)):
            if end is not None:
                self._add(_REQUESTS, lane, name, begin, end + shift, request=request.request_id)
                begin = end + shift

    def _lane(self, begin: float, end: float) -> int:
        """The first lane that is free for a request."""
        lane = next((lane for lane, taken in enumerate(self._lanes) if taken <= begin), len(self._lanes))
        self._lanes[lane : lane + 1] = [end]
        return lane

    def write(self, path: str | Path) -> None:
        """Write the trace."""
        Path(path).write_bytes(msgspec.json.encode({"traceEvents": self._events, "displayTimeUnit": "ms"}))

    def _add(self, process: int, thread: int, name: str, begin: float, end: float, **facts: Any) -> None:
        event = {
            "ph": "X",
            "pid": process,
            "tid": thread,
            "name": name,
            "ts": round((begin - self._start) * 1e6, 1),
            "dur": round(max(0.0, end - begin) * 1e6, 1),
            "args": facts,
        }
        self._events.append(event)


def _named(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": process, "tid": thread, "name": kind, "args": {"name": name}}
