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
from spmd_infer.generation.decode_rows import MOST_AHEAD
from spmd_infer.generation.dispatched import DispatchedStep
from spmd_infer.generation.executor import Entry, Executor
from spmd_infer.generation.generation_options import GenerationOptions
from spmd_infer.generation.jumping import plan_jumps
from spmd_infer.generation.kv_pages import PAGE_SIZE
from spmd_infer.generation.limits import Limits
from spmd_infer.generation.loop_times import LoopTimes
from spmd_infer.generation.pool_room import PoolRoom
from spmd_infer.generation.requests import Request
from spmd_infer.generation.scheduler import Scheduler
from spmd_infer.generation.sequences import Sequence as Scheduled
from spmd_infer.generation.sequences import State
from spmd_infer.generation.speculation import Draft, tokens_for_free
from spmd_infer.generation.step_plan import PrefillChunk
from spmd_infer.generation.step_sizes import FEWEST_PAGES, Bounds, SizesAhead
from spmd_infer.generation.trace import Trace
from spmd_infer.generation.warm_up import WarmedUp, Warmer

if TYPE_CHECKING:
    from spmd_infer.engine import Engine


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
            num_pages=FEWEST_PAGES,
            cache_dtype=options.cache_dtype,
            speculation=options.speculation,
            adapters=adapters,
        )
        lookahead = options.speculation.k if options.speculation is not None else 0
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
        self._room = PoolRoom(engine, self._executor, self._scheduler, options.cache_bytes)
        self._requests: dict[str, Request] = {}
        self._raised: set[Request] = set()  # whose callers are to be told
        self._adapters = adapters
        self._draft_engines = [options.speculation.engine] if isinstance(options.speculation, Draft) else []
        self._constrained = 0
        self._free_tokens = tokens_for_free(engine.mesh.devices.flat[0].platform) if options.jump_ahead else 0.0
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
            self._resize(self._room.fitting(sequence, len(requests)))
            self._scheduler.add(sequence)
            for request in requests:
                if request is not first:
                    self._scheduler.fork(first.request_id, request.request_id)
                request.submitted = self.clock()
                self._requests[request.request_id] = request
                if request.adapter is not None:
                    request.adapter.users += 1
                self._constrained += request.constraint is not None
                self._room.taken(request.request_id, sequence)

    def warm_up(
        self, max_rows: int | None = None, max_len: int | None = None, *, rules: bool = True, quiet: bool = False
    ) -> WarmedUp:
        """Compile all programs ahead, several at a time. Within the bounds nothing is compiled afterwards.

        Those for rows with adapters are among them once an adapter has been loaded. Left out are those that score
        prompts (``prompt_logprobs``, ``score``), and what loading an adapter runs: they are compiled when first used.

        Args:
            max_rows: requests that will run at a time; by default as many as may.
            max_len: positions of the longest request, prompt and output; by default the model's context.
            rules: whether some will have rules about single tokens: penalties, biases, shapes, scores, bad words.
            quiet: show no progress.
        """
        with self.lock:
            limits = self._scheduler.limits
            rows = limits.slots if max_rows is None else max(1, min(-(-max_rows // limits.parts), limits.slots))
            positions = min(max_len or limits.context_len, limits.context_len)
            pages = rows * limits.pages_for(limits.reach(positions)) + 1
            bounds = Bounds(
                rows=rows,
                positions=positions,
                pages=max(min(pages, self._room.most_pages), self._executor.num_pages),
                max_chunk=limits.max_chunk if limits.chunked else positions,
                copies=limits.max_copies,
            )
            sizes = SizesAhead.within(bounds)
            warmer = Warmer(
                self._executor.dispatcher,
                sizes,
                max_pages=limits.max_pages,
                longest_pages=limits.pages_for(positions),
                rules=rules,
                jumps=0 if limits.lookahead else self._free_tokens,
                adapters=self._adapters,
            )
            done = warmer([self._engine, *self._draft_engines], quiet=quiet)
            self._executor.sizes.ahead = sizes
            self._resize(self._room.compiled())
            return done

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
            self._plan_jumps()
            plan = self._scheduler.plan(self.clock())
        for sequence in plan.expired:
            request = self._requests[str(sequence.id)]
            request.end("deadline")
            self._forget(request)
        for sequence in plan.rejected:
            request = self._requests[str(sequence.id)]
            request.fail(self._room.too_long(sequence, self._executor.num_pages))
            self._forget(request)
        self._executor.copy(plan.copies)
        dispatched: list[DispatchedStep] = [*self._prefill(plan.prefills)]
        finish: Callable[[], DispatchedStep] | None = None
        entries: list[Entry] = []
        known: list[list[int]] = []
        if plan.decodes:
            entries = [(self._requests[str(s.id)], s.part, s.slot or 0) for s in plan.decodes]
            known = [request.ahead[: s.ahead] for (request, _, _), s in zip(entries, plan.decodes, strict=True)]
            tables = [part.tables for part in self._scheduler.parts]
            with self._spanned("dispatch decode", rows=len(entries)):
                finish = self._executor.decode(entries, tables, known if any(known) else None).finish
        unread, self._unread = self._unread, dispatched
        for step in unread:
            self._read(step)
        for (request, _, _), tokens in zip(entries, known, strict=True):
            if tokens and self._scheduler.accept(request.request_id, tokens):
                # Before the choice, which needs to know what they lead to.
                request.jump(tokens, self.clock())
                self._forget_ended(request)
        if finish is not None:
            with self._spanned("choose"):
                self._unread.append(finish())

    def _plan_jumps(self) -> None:
        if not self._constrained or self._scheduler.limits.lookahead:
            return
        parts = self._scheduler.parts
        rows = max(sum(s.state is State.DECODE for s in part.running) for part in parts)
        shared = max(len(part.tables.shared) for part in parts)
        bucket, _ = self._executor.sizes.decode(max(1, rows), self._executor.num_pages, shared)
        running = [sequence for part in parts for sequence in part.running]
        plan_jumps(running, self._requests, MOST_AHEAD, bucket, self._free_tokens)

    def _resize(self, num_pages: int) -> None:
        """Give the pool so many pages, if it has others."""
        if num_pages == self._executor.num_pages:
            return
        moves = self._scheduler.resize(num_pages)
        try:
            self._executor.resize(num_pages, moves)
        except BaseException:
            self._restart()
            raise

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
        traced = nullcontext() if self.trace is None else self.trace.device_step(step.name, len(step.rows), step.since)
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
            self._forget_ended(request)

    def _forget_ended(self, request: Request) -> None:
        if request.raised is not None:
            request.end("cancelled")
        if request.finish_reason is not None:
            self._forget(request)

    def _forget(self, request: Request) -> None:
        self._scheduler.finish(request.request_id)
        del self._requests[request.request_id]
        if request.adapter is not None:
            request.adapter.users -= 1
        if request.raised is not None:
            self._raised.add(request)
        self._constrained -= request.constraint is not None
        self._room.left(request.request_id)
        if self.trace is not None:
            self.trace.request(request)
