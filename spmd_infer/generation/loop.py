"""The decode loop: prompts in, tokens out, the device one step ahead of the host.

Sampled tokens stay on the device and feed the next step. The host reads each step's tokens while the next step runs,
and sees so one step late that a row has ended; that one token is dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import numpy.typing as npt

from spmd_infer.axes import BATCH, SEQ
from spmd_infer.generation.cache import bytes_per_token, cache_axes, cache_dtype
from spmd_infer.generation.groups import Group, Request, check_requests, make_groups
from spmd_infer.generation.sampling import SAMPLING_AXES, SamplingArrays, sampling_arrays
from spmd_infer.generation.steps import decode, prefill

if TYPE_CHECKING:
    from spmd_infer.engine import Engine

Accept = Callable[[Request, int, Group], bool]
"""Takes a request, its next token and its group; returns whether the request has ended."""

MOST_ROWS = 32
# More rows wait for the next group rather than let a cache outgrow this.
_CACHE_BYTES_A_SHARD = 4 << 30


class DecodeLoop:
    """Runs requests on one engine.

    Args:
        engine: holds a decoder.
        config: the decoder's sizes: ``vocab_size`` and ``context_len`` besides those of its cache.
        eos_ids: the model's end tokens.
    """

    def __init__(self, engine: Engine, config: Any, eos_ids: Collection[int]) -> None:
        self._engine = engine
        self._config = config
        self._eos_ids = frozenset(eos_ids)
        self._dtype = cache_dtype(engine.mesh.devices.flat[0].platform, engine.dtype)
        self._prefills: dict[int, Callable[..., Any]] = {}
        self._out_axes = ((BATCH,), cache_axes(config))
        self._decode = engine.jit("decode", decode, donate=(0,), out_axes=self._out_axes, phase="decode")

    def clock(self) -> float:
        """Seconds on a clock that stands still while the engine compiles."""
        return time.perf_counter() - self._engine.compile_seconds

    def run(self, requests: Sequence[Request], accept: Accept) -> list[Group]:
        """Continue all requests until each has ended.

        Args:
            requests: any number, of any lengths.
            accept: called with every token, in each request's order.

        Returns:
            The groups that they ran in.

        Raises:
            TaskError: a request cannot run; none has been started then.
        """
        check_requests(requests, self._config.vocab_size, self._config.context_len)
        parts = self._engine.data_parts
        groups = make_groups(
            requests,
            parts=parts,
            context_len=self._config.context_len,
            most_rows=MOST_ROWS,
            most_positions=parts * _CACHE_BYTES_A_SHARD // bytes_per_token(self._config, self._dtype),
        )
        for group in groups:
            self._run_group(group, accept)
        return groups

    def _run_group(self, group: Group, accept: Accept) -> None:
        place = partial(self._engine.place, phase="prefill")
        fields = sampling_arrays(group.params(), self._eos_ids)
        sampling = SamplingArrays(**{name: place(value, SAMPLING_AXES[name]) for name, value in fields.items()})
        lengths = place(group.lengths(), (BATCH,))
        running = {row: request for row, request in enumerate(group.rows) if request is not None}

        def read(tokens: jax.Array) -> None:
            values: npt.NDArray[np.int32] = np.asarray(tokens)
            for row, request in list(running.items()):
                if accept(request, int(values[row]), group):
                    del running[row]

        tokens, cache = self._prefill(group.capacity)(place(group.input_ids(), (BATCH, SEQ)), lengths, sampling)
        # The first tokens are read at once: they are awaited most, and the decode program may still be to compile.
        read(tokens)
        (tokens, cache), lengths, sampling = self._engine.hand_over(
            ((tokens, cache), lengths, sampling),
            (self._out_axes, (BATCH,), SamplingArrays(**SAMPLING_AXES)),  # type: ignore[arg-type]  # a tree of axes
            before="prefill",
            after="decode",
        )
        most = max(request.params.max_tokens for request in running.values()) if running else 0
        unread: jax.Array | None = None
        for _ in range(1, most):
            tokens, cache = self._decode(cache, tokens, lengths, sampling)
            if unread is not None:
                read(unread)
            unread = tokens
            if not running:
                return
        if unread is not None:
            read(unread)

    def _prefill(self, capacity: int) -> Callable[..., Any]:
        if capacity not in self._prefills:
            self._prefills[capacity] = self._engine.jit(
                f"prefill_{capacity}",
                partial(prefill, capacity=capacity, dtype=self._dtype),
                out_axes=self._out_axes,
                phase="prefill",
            )
        return self._prefills[capacity]
