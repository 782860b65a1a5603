"""How the generation loop spends its time: steps by kind, seconds of the host's work and of its waiting."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class LoopTimes:
    """Counts since the loop began, or since ``clear``.

    Attributes:
        turns: rounds of planning, dispatching and reading.
        steps: device steps that the host has read, by what they ran.
        seconds: spent in turns, without compiling.
        waited: of these, seconds until the devices were done.
    """

    turns: int = 0
    steps: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    waited: float = 0.0

    @property
    def host_seconds(self) -> float:
        """Spent planning, dispatching and reading tokens. On a CPU the devices' own threads compete with that."""
        return self.seconds - self.waited

    @property
    def host_share(self) -> float:
        """Part of the turns in which the host worked: little of it is left where the devices set the pace."""
        return self.host_seconds / self.seconds if self.seconds else 0.0

    def clear(self) -> None:
        """Begin again."""
        self.turns, self.seconds, self.waited = 0, 0.0, 0.0
        self.steps.clear()

    @contextmanager
    def turn(self, clock: Callable[[], float]) -> Iterator[None]:
        """Count a turn, by a clock that stands still while programs are compiled."""
        begin = clock()
        try:
            yield
        finally:
            self.turns += 1
            self.seconds += clock() - begin

    @contextmanager
    def wait(self, name: str) -> Iterator[None]:
        """Count a step that is waited for."""
        begin = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begin
        self.steps[name] = self.steps.get(name, 0) + 1
