"""What the hub decides from reports and time alone; no process is started here."""

from typing import Any

import pytest

from spmd_infer.multihost.hub import Hub
from spmd_infer.multihost.verdict import Report, blame_report, blame_status


class Job:
    """A hub with the messages that it sent, by rank."""

    def __init__(self, size: int = 3, *, joined: bool = True, hosts: tuple[str, ...] = ()) -> None:
        self.sent: list[tuple[int, dict[str, Any]]] = []
        self.told: list[str] = []
        self.now = 0.0
        self.hub = Hub(
            size=size, send=lambda rank, message: self.sent.append((rank, message)), tell=self.told.append, hosts=hosts,
            init_s=60, silence_s=10, drain_s=30, exit_s=300, started=0.0, welcome={"port": 5},
        )  # fmt: skip
        if joined:
            for rank in range(size):
                assert self.join(rank) is None

    def join(self, rank: int, **changes: Any) -> str | None:
        hello = {"rank": rank, "size": self.hub.size, "host": f"n{rank}", "pid": 100 + rank}
        return self.hub.join(hello | changes, self.now)

    def says(self, rank: int, kind: str, /, **more: Any) -> None:
        self.hub.message(rank, {"t": kind, **more}, self.now)

    def fails(self, rank: int, kind: str, text: str = "failed", code: int = 1) -> None:
        self.says(rank, "failed", kind=kind, text=text, code=code)

    def passes(self, seconds: float, quiet: tuple[int, ...] = ()) -> None:
        """Time, in which all ranks but the quiet ones are heard of."""
        until = self.now + seconds
        while self.now < until:
            self.now += 0.25
            for rank, member in self.hub.members.items():
                if rank not in quiet:
                    member.heard = self.now
            self.hub.tick(self.now)

    def last(self, kind: str) -> dict[int, dict[str, Any]]:
        return {rank: message for rank, message in self.sent if message["t"] == kind}


def test_all_are_welcomed_once_all_are_there() -> None:
    job = Job(joined=False)
    assert job.join(2) is None
    assert job.join(0) is None
    assert job.sent == []
    job.join(1)
    roster = [["n0", 100], ["n1", 101], ["n2", 102]]
    assert job.last("welcome") == {rank: {"t": "welcome", "roster": roster, "port": 5} for rank in range(3)}


def test_who_is_awaited_is_said_by_name_and_in_the_end_refused() -> None:
    job = Job(4, joined=False, hosts=("node07", "node07", "node08", "node09"))
    job.join(0)
    job.join(1)
    job.passes(6)
    assert job.told == ["waiting for 2 of 4 processes: rank 2 (node08), 3 (node09); 55 s left"]
    job.passes(60)
    why = "2 of 4 processes came within 60 s; missing: rank 2 (node08), 3 (node09)"
    assert job.last("refused") == {0: {"t": "refused", "why": why}, 1: {"t": "refused", "why": why}}


def test_a_process_with_another_count_ends_the_start() -> None:
    job = Job(joined=False)
    job.join(0)
    assert "rank 1 (n1, pid 101) was told that the job has 5 processes, rank 0 that it has 3" in str(
        job.join(1, size=5)
    )
    assert "5 processes" in job.last("refused")[0]["why"]


def test_a_second_process_of_a_rank_disturbs_no_running_job() -> None:
    job = Job()
    assert "two processes say they are rank 1" in str(job.join(1, pid=999))
    assert job.hub.phase == "running"


def test_an_exception_is_named_and_its_rank_shows_it_after_the_others_have_ended() -> None:
    job = Job()
    job.fails(1, "exception", "raised ValueError: x", 9)
    assert job.last("cause") == {}
    job.passes(0.5)
    cause = job.last("cause")[2]
    assert (cause["ranks"], cause["title"]) == ([1], "rank 1 (n1, pid 101) raised ValueError: x")
    job.says(0, "said")
    assert job.last("show") == {}
    job.says(2, "said")
    assert set(job.last("show")) == {1}
    assert job.last("exit") == {}
    job.says(1, "shown")
    assert set(job.last("exit")) == {0, 1, 2}


def test_nobody_holds_up_the_end() -> None:
    job = Job()
    job.fails(1, "exception")
    job.passes(8)  # nobody says anything
    assert set(job.last("exit")) == {0, 1, 2}


def test_the_death_that_explains_the_others_is_named() -> None:
    job = Job()
    job.fails(2, "peer", "raised ValueError: gloo")
    job.fails(1, "died", "died")
    job.now += 0.1
    job.fails(0, "died", "died")
    job.passes(1.5)
    assert job.last("cause")[2]["title"] == "coordinator rank 0 (n0, pid 100) died"
    assert job.last("show") == {}


def test_silence_of_a_host() -> None:
    job = Job()
    job.passes(12, quiet=(2,))
    assert job.last("cause")[0]["title"].startswith("rank 2 (n2, pid 102) is lost: no word for 10 s")


def test_all_ranks_stop_at_the_furthest_point() -> None:
    job = Job()
    job.says(1, "drain")
    job.says(2, "drain")
    assert sum(message["t"] == "freeze" for _, message in job.sent) == 3
    job.says(0, "at", point=7)
    job.says(2, "at", point=8)
    assert job.last("stop at") == {}
    job.says(1, "at", point=7)
    assert job.last("stop at") == {rank: {"t": "stop at", "point": 8} for rank in range(3)}
    for rank in range(3):
        job.says(rank, "stopped")
    job.passes(40)
    assert job.last("cause") == {}


def test_a_rank_that_cannot_stop_in_time_is_named() -> None:
    job = Job()
    job.says(1, "drain")
    for rank in range(3):
        job.says(rank, "at", point=7)
    job.says(0, "stopped")
    job.says(1, "done")
    job.passes(32)
    assert "rank 2 (n2, pid 102) came to no point where it can stop within 30 s" in job.last("cause")[0]["title"]


def test_the_end_waits_for_all_but_not_for_ever() -> None:
    job = Job()
    job.says(0, "done")
    job.says(1, "done")
    assert job.last("all done") == {}
    job.passes(302)
    assert job.last("cause")[0]["title"] == (
        "coordinator rank 0 (n0, pid 100) ended 300 s ago, while rank 2 still runs"
    )  # fmt: skip
    job = Job()
    for rank in range(3):
        job.says(rank, "done")
    assert set(job.last("all done")) == {0, 1, 2}
    job.hub.lost(1, job.now)  # connections end after that
    job.passes(20, quiet=(0, 1, 2))
    assert job.last("cause") == {}


def status(**changes: Any) -> dict[str, Any]:
    return {"state": "S", "runs": True, "step": 5, "waits": True, "where": "w", **changes}


@pytest.mark.parametrize(
    ("odd", "text"),
    [
        ({"state": "T", "runs": False, "waits": False}, "is stopped by a signal (SIGSTOP); late"),
        ({"runs": False}, "does not run: stuck in a call that holds its interpreter; late"),
        ({"step": 4}, "is stuck at w, in step 4 while others are in 5; late"),
        ({"waits": False, "where": "sleep.py:3"}, "is stuck at sleep.py:3 while the others wait for it; late"),
        ({"state": "D"}, "is held up in the kernel by a device or a file system, at w; late"),
    ],
)
def test_the_rank_that_the_others_wait_for(odd: dict[str, Any], text: str) -> None:
    late = [Report(0, "stuck", "late", 0.0)]
    assert blame_status({0: status(), 1: status(**odd), 2: status()}, late) == ([1], text)
    assert blame_status({0: status(), 1: None}, late)[0] == [1]
    assert blame_status({0: status(), 1: status()}, late) == (
        [0], "overstayed a step: late; no rank stands out, see the stacks",
    )  # fmt: skip


def test_statuses_are_asked_for_once() -> None:
    job = Job()
    for rank in range(3):
        job.fails(rank, "stuck", "late")
    assert sum(message["t"] == "status?" for _, message in job.sent) == 3
    for rank in range(3):
        job.says(rank, "status", **status(waits=rank != 1))
    job.passes(2)
    assert job.last("cause")[0]["ranks"] == [1]


def test_causes_before_consequences() -> None:
    peer, raised = Report(0, "peer", "", 1.0), Report(2, "exception", "", 2.0)
    died, zero = Report(1, "died", "", 3.0), Report(0, "lost", "", 4.0)
    stuck = Report(2, "stuck", "", 0.0)
    assert blame_report([peer, raised]) is raised
    assert blame_report([peer, stuck]) is peer
    assert blame_report([raised, died]) is raised
    assert blame_report([raised, died, zero]) is zero
