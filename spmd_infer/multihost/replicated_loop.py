"""The generation loop in a job of several processes: one on every rank, all of them taking the same turns.

Every rank runs the same scheduler on the same requests, so it plans the same steps by itself. What only one rank knows
is when to go on and what to cancel: rank 0 says that before each turn, in a message whose size does not depend on how
many requests run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from spmd_infer.errors import ClusterError, TaskError
from spmd_infer.generation.loop import GenerationLoop
from spmd_infer.generation.requests import Request
from spmd_infer.multihost.job import this_job
from spmd_infer.multihost.messages import Step


class ReplicatedLoop(GenerationLoop):
    """A ``GenerationLoop`` whose turns rank 0 leads.

    All ranks submit the same requests in the same order. Rank 0 takes turns and cancels as it likes; a turn of another
    rank does what rank 0 does next. A rank other than 0 that wants to cancel, because its caller has left a stream or
    an ``on_text`` of its own has failed, takes part until rank 0 has ended the request.

    Attributes:
        said: how many messages rank 0 has sent, one for each turn and each request that it cancelled.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._job = this_job()
        self.said = 0
        self._failed: list[Exception] = []
        self._broken = False

    def submit(
        self, requests: Sequence[Request], *, priority: int = 0, deadline: float | None = None, namespace: str = ""
    ) -> None:
        """Queue requests; see ``GenerationLoop.submit``.

        Raises:
            TaskError: there is a deadline, which clocks of several hosts would not agree on; or as there.
        """
        if deadline is not None:
            raise TaskError("over several processes a request has no deadline of its own; cancel it on rank 0 instead")
        for request in requests:
            request.guard_text(self._guarded)
        super().submit(requests, priority=priority, namespace=namespace)

    def cancel(self, request: Request) -> None:
        """End a request on all ranks; on another rank than 0, go on until rank 0 has."""
        if self._broken:
            super().cancel(request)
        elif self._job.rank == 0:
            with self.lock:
                if request.finish_reason is None:
                    super().cancel(request)
                    self._say(Step(self.said, (request.request_id,), turn=False))
        else:
            while request.finish_reason is None:
                self.turn()

    def run(self, requests: Iterable[Request]) -> None:
        """Take turns until these requests have ended; then raise what this rank's own ``on_text`` has raised."""
        super().run(requests)
        self._raise_failed()

    def turn(self) -> bool:
        """Take the next turn together with all ranks; returns whether there is more to do."""
        with self.lock:
            if self._broken:
                raise ClusterError(f"a step has failed on rank {self._job.rank}, which so lost touch with the others")
            if self._job.rank == 0:
                self._say(Step(self.said))
            else:
                step = self._hear()
                for name in step.cancelled:
                    if name in self._requests:
                        super().cancel(self._requests[name])
                if not step.turn:
                    return bool(self._requests)
            more = super().turn()
            if self._job.rank == 0:
                self._raise_failed()
            return more

    def _restart(self) -> None:
        """There is nothing to go on from: the others have done the step that failed here."""
        self._broken = True

    def _say(self, step: Step) -> None:
        self._job.channel.send(step)
        self.said += 1

    def _hear(self) -> Step:
        step: Step
        step, _ = self._job.channel.receive(Step)
        if step.number != self.said:
            raise ClusterError(
                f"rank 0 is at message {step.number} of its loop, rank {self._job.rank} at {self.said}: the ranks "
                "do not run the same program"
            )
        self.said += 1
        return step

    def _guarded(self, on_text: Callable[[str], None]) -> Callable[[str], None]:
        """A caller's function that fails must not leave a turn half done: the others have done all of it."""

        def call(text: str) -> None:
            try:
                on_text(text)
            except Exception as error:
                self._failed.append(error)

        return call

    def _raise_failed(self) -> None:
        failed, self._failed = self._failed, []
        if failed:
            raise failed[0]
