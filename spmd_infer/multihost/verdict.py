"""Who is at fault: the failure that the others follow from, and the rank that the others wait for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Report:
    """A failure as a guard reports it.

    Attributes:
        rank: of whom.
        kind: ``died``, ``lost``, ``exception``, ``peer`` (an exception that another's failure may have caused),
            ``exit``, ``signal``, ``left`` or ``stuck``.
        text: what happened.
        when: when the hub heard of it.
        code: the exit code that the rank itself ends with.
    """

    rank: int
    kind: str
    text: str
    when: float
    code: int = 1


def blame_report(reports: Sequence[Report]) -> Report:
    """The report that the others follow from.

    Rank 0's death makes JAX's clients abort everywhere, so it explains every other death. Exceptions that speak of
    peers, and what a watchdog saw, are consequences of whatever else there is. Otherwise the first one counts.
    """

    def order(report: Report) -> tuple[int, float]:
        if report.kind in ("died", "lost") and report.rank == 0:
            return 0, report.when
        return {"peer": 2, "stuck": 3}.get(report.kind, 1), report.when

    return min(reports, key=order)


def blame_status(status: Mapping[int, Mapping[str, Any] | None], late: Sequence[Report]) -> tuple[list[int], str]:
    """Which ranks the others wait for, from what every rank was doing when a step ran past its time.

    Args:
        status: for each rank what its guard saw: ``state`` (``T`` is stopped, ``D`` held up in the kernel), ``runs``
            (whether its interpreter answers), ``step``, ``waits`` (whether its main thread waits for devices) and
            ``where``; None if silent.
        late: reports of the steps that ran past their time.

    Returns:
        The ranks at fault and what is said of them. Where none stands out, the ranks whose steps were late.
    """
    why = late[0].text
    known = {rank: seen for rank, seen in status.items() if seen is not None}
    silent = [rank for rank in status if rank not in known]
    stopped = [rank for rank, seen in known.items() if seen["state"] == "T"]
    mute = [rank for rank, seen in known.items() if not seen["runs"]]
    if stopped:
        return stopped, f"is stopped by a signal (SIGSTOP); {why}"
    if mute or silent:
        return mute or silent, f"does not run: stuck in a call that holds its interpreter; {why}"
    steps = {rank: seen["step"] for rank, seen in known.items()}
    behind = [rank for rank, step in steps.items() if step == min(steps.values())]
    if len(behind) < len(steps):
        first, last = min(steps.values()), max(steps.values())
        return behind, f"is stuck at {known[behind[0]]['where']}, in step {first} while others are in {last}; {why}"
    busy = [rank for rank, seen in known.items() if not seen["waits"]]
    if busy and len(busy) < len(known):
        return busy, f"is stuck at {known[busy[0]]['where']} while the others wait for it; {why}"
    held = [rank for rank, seen in known.items() if seen["state"] == "D"]
    if held and len(held) < len(known):
        return held, f"is held up in the kernel by a device or a file system, at {known[held[0]]['where']}; {why}"
    return sorted({report.rank for report in late}), f"overstayed a step: {why}; no rank stands out, see the stacks"
