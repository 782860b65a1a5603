"""The generation loop: requests in, tokens out, whatever number of them, the devices one step ahead of the host.

Each turn plans a step, dispatches it, and then reads what the step *before* chose while the new one runs. The host so
sees one step late that a request has ended; the token too many is dropped.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from spmd_infer.errors import TaskError
from spmd_infer.generation.adapters import Adapters
from spmd_infer.generation.dispatched import DispatchedStep
from spmd_infer.generation.executor import Executor
from spmd_infer.generation.generation_options import GenerationOptions
from spmd_infer.generation.kv_pages import PAGE_SIZE
from spmd_infer.generation.limits import Limits
from spmd_infer.generation.loop_times import LoopTimes
from spmd_infer.generation.requests import Request
from spmd_infer.generation.scheduler import Scheduler
from spmd_infer.generation.sequences import Sequence as Scheduled
from spmd_infer.generation.step_plan import PrefillChunk
from spmd_infer.generation.trace import Trace

if TYPE_CHECKING:
    from spmd_infer.engine import Engine

_FEWEST_PAGES = 8
_HOST_CACHE_BYTES = 4 << 30
_DEVICE_MEMORY_SHARE = 0.85


class GenerationLoop:
    """Runs requests on one engine. May be driven from several threads: each turn is taken by one.

    Args:
        engine: holds a decoder.
        config: the decoder's sizes.
        eos_ids: the model's end tokens.
        options: how to generate.
        adapters: those that requests may have; None for none.

    Attributes:
        lock: held while a turn is taken, and by whoever changes what turns use.
        times: steps taken, and how long the host worked and waited.
        trace: where the times of everything are written down; None for nowhere.
    """

    def __init__(
        self,
        engine: Engine,
        config: Any,
        eos_ids: Collection[int],
        options: GenerationOptions | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        options = options or GenerationOptions()
        self._engine, self._config = engine, config
        parts = engine.data_parts
        slots = -(-options.max_rows // parts)
        self._executor = Executor(
            engine,
            config,
            eos_ids,
            slots=slots,
            num_pages=_FEWEST_PAGES,
            cache_dtype=options.cache_dtype,
            speculation=options.speculation,
            adapters=adapters,
        )
        lookahead = options.speculation.k if options.speculation is not None else 0
        self._most_pages = max(1, self._cache_bytes(options) // self._executor.page_bytes // parts)
        self._scheduler = Scheduler(
            Limits(
                parts=parts,
                slots=slots,
                num_pages=self._executor.num_pages,
                page_size=PAGE_SIZE,
                context_len=config.context_len,
                token_budget=max(options.token_budget, slots * (1 + lookahead) + PAGE_SIZE),
                max_chunk=-(-options.max_chunk // PAGE_SIZE) * PAGE_SIZE,
                chunked=options.chunked,
                lookahead=lookahead,
                prefix_cache=options.prefix_cache,
                salt=options.salt or secrets.token_bytes(16),
            )
        )
        self._requests: dict[str, Request] = {}
        self._raised: set[Request] = set()  # whose callers are to be told
        self._wanted_pages = 0
        self._unread: list[DispatchedStep] = []
        self.lock = threading.RLock()
        self.times = LoopTimes()
        self.trace: Trace | None = None

    @property
    def scheduler(self) -> Scheduler:
        """What runs and waits, and the pages."""
        return self._scheduler

    def clock(self) -> float:
        """Seconds on a clock that stands still while the engine compiles."""
        return time.perf_counter() - self._engine.compile_seconds

    def submit(
        self,
        requests: Sequence[Request],
        *,
        priority: int = 0,
        deadline: float | None = None,
        namespace: str = "",
    ) -> None:
        """Queue the continuations of one prompt; the first one computes it, and the others share its pages.

        Args:
            requests: one, or several with the same prompt.
            priority: the lower runs first.
            deadline: the latest time to start, on ``clock``.
            namespace: cached prompts are shared within it, and with the same adapter, only.

        Raises:
            TaskError: the prompt with the tokens asked for can never run, or its adapter has been dropped.
        """
        with self.lock:
            first = requests[0]
            if first.adapter is not None and first.adapter.gone:
                raise TaskError(f"adapter {first.adapter.name!r} has been dropped")
            sequence = Scheduled(
                first.request_id,
                first.prompt_ids,
                first.params.max_tokens,
                priority=priority,
                deadline=deadline,
                fresh=bool(first.scored_ids),
                namespace=namespace if first.adapter is None else f"{first.adapter.namespace}\0{namespace}",
            )
            self._make_room(sequence, len(requests))
            self._scheduler.add(sequence)
            for request in requests:
                if request is not first:
                    self._scheduler.fork(first.request_id, request.request_id)
                request.submitted = self.clock()
                self._requests[request.request_id] = request
                if request.adapter is not None:
                    request.adapter.users += 1
                self._wanted_pages += self._pages_of(sequence)

    def cancel(self, request: Request) -> None:
        """End a request wherever it is; its pages are free for the next step."""
        with self.lock:
            if request.finish_reason is None:
                request.end("cancelled")
                self._forget(request)

    def close(self) -> None:
        """Cancel all that runs or waits."""
        with self.lock:
            for request in list(self._requests.values()):
                self.cancel(request)

    def run(self, requests: Iterable[Request]) -> None:
        """Take turns until these requests have ended.

        Raises:
            BaseException: what a request's ``on_text`` raised, as soon as it is seen.
        """
        own = list(requests)
        for request in own:
            while request.finish_reason is None:
                self.turn()
                self._raise_for(own)
        self._raise_for(own)

    def _raise_for(self, requests: Sequence[Request]) -> None:
        for request in requests if self._raised else ():
            if request in self._raised and request.raised is not None:
                self._raised.remove(request)
                raise request.raised

    def turn(self) -> bool:
        """Plan and dispatch a step, and read the one before; returns whether there is more to do.

        Where that raises, for want of memory or at an interrupt, all requests go on from the tokens that they have
        with the next turn, as if no step were on its way.
        """
        with self.lock, self.times.turn(self.clock):
            try:
                self._turn()
            except BaseException:
                self._restart()
                raise
            return bool(self._requests)

    def _turn(self) -> None:
        with self._spanned("plan"):
            plan = self._scheduler.plan(self.clock())
        for sequence in plan.expired:
            request = self._requests[str(sequence.id)]
            request.end("deadline")
            self._forget(request)
        for sequence in plan.rejected:
            request = self._requests[str(sequence.id)]
            request.fail(self._too_long(sequence, self._executor.num_pages))
            self._forget(request)
        self._executor.copy(plan.copies)
        dispatched: list[DispatchedStep] = [*self._prefill(plan.prefills)]
        finish: Callable[[], DispatchedStep] | None = None
        if plan.decodes:
            entries = [(self._requests[str(s.id)], s.part, s.slot or 0) for s in plan.decodes]
            with self._spanned("dispatch decode", rows=len(entries)):
                finish = self._executor.decode(entries, [part.tables for part in self._scheduler.parts]).finish
        unread, self._unread = self._unread, dispatched
        for step in unread:
            self._read(step)
        if finish is not None:
            with self._spanned("choose"):
                self._unread.append(finish())

    def _restart(self) -> None:
        """Forget the steps on their way and what the devices hold."""
        self._unread = []
        for request in list(self._requests.values()):
            if request.finish_reason is not None or request.request_id not in self._scheduler:  # it ended meanwhile
                request.end("cancelled")
                self._forget(request)
                continue
            request.num_scored = 0
            sequence = self._scheduler[request.request_id]
            del sequence.tokens[sequence.prompt_len + len(request.token_ids) :]
        self._scheduler.restart()
        if self._scheduler.num_pages != self._executor.num_pages:  # the pool could not grow
            self._scheduler.resize(self._executor.num_pages)
        try:
            self._executor.restart()
        except BaseException:
            self.close()  # the devices are of no more use
            raise

    def _prefill(self, chunks: Sequence[PrefillChunk]) -> list[DispatchedStep]:
        if not chunks:
            return []
        requests = [self._requests[str(chunk.sequence.id)] for chunk in chunks]
        for chunk, request in zip(chunks, requests, strict=True):
            if request.started is None:
                request.started, request.part = self.clock(), chunk.sequence.part
                request.cached_tokens = chunk.sequence.reused
        with self._spanned("dispatch prefill", rows=len(chunks), tokens=sum(chunk.length for chunk in chunks)):
            return self._executor.prefill(chunks, requests)

    def _spanned(self, name: str, **facts: int) -> AbstractContextManager[None]:
        return nullcontext() if self.trace is None else self.trace.span(name, **facts)

    def _read(self, step: DispatchedStep) -> None:
        traced = nullcontext() if self.trace is None else self.trace.device_step(step.name, len(step.rows))
        with traced, self.times.wait(step.name):
            step.wait()
        brought = step.read()
        now = None
        for request, tokens, scores, drafted in brought:
            if request.request_id not in self._requests:
                continue  # it ended a step before
            now = now or self.clock()
            self._scheduler.accept(request.request_id, tokens)
            if request.finish_reason is None:
                request.take(tokens, scores, now, drafted=drafted)
            if request.raised is not None:
                request.end("cancelled")
            if request.finish_reason is not None:
                self._forget(request)

    def _forget(self, request: Request) -> None:
        sequence = self._scheduler.finish(request.request_id)
        del self._requests[request.request_id]
        if request.adapter is not None:
            request.adapter.users -= 1
        if request.raised is not None:
            self._raised.add(request)
        if sequence is not None:
            self._wanted_pages -= self._pages_of(sequence)
        if self.trace is not None:
            self.trace.request(request)
        if not self._requests:
            self._wanted_pages = 0

    def _pages_of(self, sequence: Scheduled) -> int:
        """Pages that a sequence may come to hold."""
        return -(-self._scheduler.limits.reach(sequence.prompt_len + sequence.max_tokens) // PAGE_SIZE)

    def _too_long(self, sequence: Scheduled, pages: int) -> TaskError:
        return TaskError(
            f"prompt of {sequence.prompt_len} tokens + max_tokens {sequence.max_tokens} may take "
            f"{self._pages_of(sequence)} pages of {PAGE_SIZE} positions; the cache has room for {pages} "
            f"({pages * self._executor.page_bytes / 1e9:.2f} GB); raise cache_bytes or shorten it"
        )

    def _make_room(self, sequence: Scheduled, copies: int) -> None:
        """Let the pool grow with what is asked for, and shrink when little is: attention reads all of it.

        Raises:
            TaskError: the largest pool is too small for this sequence alone.
        """
        own = self._pages_of(sequence)
        if own > self._most_pages:
            raise self._too_long(sequence, self._most_pages)
        parts, waiting = self._scheduler.limits.parts, len(self._requests) + copies
        running = min(waiting, parts * self._scheduler.limits.slots)
        # The mean of all, for as many as run at a time, and one page to spare for each part.
        wanted = (self._wanted_pages + own * copies) * running // waiting // parts + 1
        pages = _FEWEST_PAGES
        while pages < max(own, wanted):
            pages *= 2
        pages = min(pages, self._most_pages)
        current = self._executor.num_pages
        # Not while others wait: the largest of them may need what the mean does not.
        if pages > current or (4 * pages <= current and not self._requests):
            moves = self._scheduler.resize(pages)
            try:
                self._executor.resize(pages, moves)
            except BaseException:
                self._restart()
                raise

    def _cache_bytes(self, options: GenerationOptions) -> int:
        if options.cache_bytes is not None:
            return options.cache_bytes
        free = []
        for device in self._engine.mesh.local_devices:
            stats = device.memory_stats() if device.platform != "cpu" else None
            if stats and "bytes_limit" in stats:
                free.append(int(stats["bytes_limit"] * _DEVICE_MEMORY_SHARE) - int(stats.get("bytes_in_use", 0)))
        return max(0, min(free)) * len(free) if free else _HOST_CACHE_BYTES
