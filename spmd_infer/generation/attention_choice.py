"""Which way of attention is the fastest here: each that may fit is timed once for each size, and the answer kept.

A way that gives another result than plain XLA is not taken, nor one that refuses or fails, nor one that is hardly
faster. In a job of several processes all run the candidates together, and take what rank 0 has measured or known.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from spmd_infer.axes import ATTN_BATCH, ATTN_HEADS, ATTN_KV_HEADS, HEAD_DIM, KEY_SEQ, SEQ
from spmd_infer.compile_cache import kept_file
from spmd_infer.generation.kept_answers import Answer, KeptAnswers
from spmd_infer.generation.kv_pages import PAGE_SIZE
from spmd_infer.models.cache_formats import CacheFormat, Packed
from spmd_infer.models.page_attention import GATHERED, IN_PLACE, MOSAIC, WAYS
from spmd_infer.models.page_view import PageView
from spmd_infer.models.paged_attention import PAGE_KEY_AXES, PAGE_SCALE_AXES, PAGE_VALUE_AXES
from spmd_infer.models.prompt_attention import PROMPT_WAYS, XLA
from spmd_infer.transfer import fetch

if TYPE_CHECKING:
    from spmd_infer.engine import Engine

FILE = "attention.json"
_ROUNDS = 7
_FASTER = 0.9  # of the plain way's time, at most
_TOLERANCE = 0.02  # of the largest result: ways may round weights to bfloat16 at different places
_LARGE_POOL = 128  # pages; in smaller ones it makes no difference
_NARROWEST, _WIDER = 4, 4  # pages of a row that programs are compiled for
_FEWER = 4  # gathering may pay where the pool holds so many times the pages that rows use


class AttentionChoice:
    """Chooses for one engine.

    Args:
        engine: holds a decoder.
        config: the decoder's sizes.
        fmt: what the cache holds.
        file: where answers are kept; by default the user's own beside the compile cache.
    """

    def __init__(self, engine: Engine, config: Any, fmt: CacheFormat, file: Path | None = None) -> None:
        self._engine, self._config, self._format = engine, config, fmt
        self._kept = KeptAnswers(file or kept_file(FILE))
        self._chosen: dict[tuple[Any, ...], str] = {}
        device = engine.mesh.devices.flat[0]
        self._on_cpu = device.platform == "cpu"
        mesh = ",".join(f"{name}={size}" for name, size in engine.mesh.shape.items())
        heads = f"{config.num_heads}/{config.num_kv_heads} heads of {config.head_dim}"
        dtype = jnp.result_type(engine.dtype, jnp.bfloat16)
        self._facts = f"{device.device_kind}; jax {jax.__version__}; {mesh}; {heads}; {dtype}; cache {fmt.name}"
        self._dtype = dtype

    def for_step(self, view: PageView, longest: int) -> PageView:
        """A decode step's view with the way to attend, and tables no wider than that needs.

        Args:
            view: who uses which page.
            longest: tokens of the longest row, as far as the host has read them.
        """
        # The host has not read the token of the step that runs, and this one adds another.
        width = _NARROWEST
        while width * PAGE_SIZE < longest + 2:
            width *= _WIDER
        width = min(width, view.tables.shape[-1])
        way = self.of_pages(view.tables.shape[1], view.owners.shape[1], width)
        return replace(view, way=way, tables=view.tables[..., :width] if way == GATHERED else view.tables)

    def of_pages(self, rows: int, pages: int, width: int, *, among_all: bool = False) -> str:
        """The way to attend over pages, one of ``page_attention.WAYS``, for a token of each row.

        Args:
            rows: rows of each part.
            pages: pages of each part's pool.
            width: pages of a row, at most.
            among_all: measure even where one is known to be best.
        """
        few = among_all or (pages >= _LARGE_POOL and _FEWER * rows * width <= pages)
        if not few:
            width = max(1, pages // rows)  # one answer for all widths: what is read does not depend on it
        tried = (IN_PLACE, *((GATHERED,) if few else ()), *(() if self._on_cpu else (MOSAIC,)))
        ways = {way: WAYS[way] for way in tried}
        return self._fastest(ways, ("pages", rows, pages, width), lambda: self._pages(rows, pages, width))

    def of_prompts(self, rows: int, length: int) -> str:
        """The way to attend over chunks that begin their prompts, one of ``prompt_attention.PROMPT_WAYS``.

        Args:
            rows: rows of each part.
            length: positions of each.
        """
        ways = {XLA: PROMPT_WAYS[XLA]} if self._on_cpu else PROMPT_WAYS
        return self._fastest(ways, ("prompts", rows, length), lambda: self._prompts(rows, length))

    def _fastest(
        self,
        ways: Mapping[str, Callable[..., jax.Array]],
        sizes: tuple[Any, ...],
        arrays: Callable[[], tuple[Any, ...]],
    ) -> str:
        """The fastest of several ways, the first of which is the plain one; measured where nobody knows."""
        if len(ways) == 1:
            return next(iter(ways))
        if sizes not in self._chosen:
            key = f"{self._facts}; {' '.join(map(str, sizes))}"
            answer = _of_rank_0(self._kept.find(key, ways))
            if answer is None:
                answer = _of_rank_0(self._measured(ways, sizes, arrays()))
                assert answer is not None
                self._kept.keep(key, answer)
            self._chosen[sizes] = answer.way
        return self._chosen[sizes]

    def _measured(
        self, ways: Mapping[str, Callable[..., jax.Array]], sizes: tuple[Any, ...], arrays: tuple[Any, ...]
    ) -> Answer:
        name = "_".join(map(str, sizes))
        programs: dict[str, Callable[[], jax.Array]] = {}
        left_out: dict[str, str] = {}
        expected: np.ndarray[Any, Any] | None = None
        for way, attend in ways.items():
            run = self._engine.jit(f"attend_{way}_{name}", _without_model(attend), phase=_PHASES[sizes[0]])
            try:
                found = np.asarray(fetch(run(*arrays)), np.float32)
            except Exception as error:  # a library that is not there, sizes that it refuses, a kernel that fails
                if expected is None:
                    raise
                left_out[way] = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                continue
            expected = found if expected is None else expected
            apart = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))
            if not apart <= _TOLERANCE:
                left_out[way] = f"results differ by {apart:.2g} of the largest"
                continue
            programs[way] = lambda run=run: run(*arrays)  # type: ignore[misc]  # bound now
        times: dict[str, list[float]] = {way: [] for way in programs}
        for _ in range(_ROUNDS):
            for way, program in programs.items():
                begin = time.perf_counter()
                jax.block_until_ready(program())
                times[way].append(1e3 * (time.perf_counter() - begin))
        medians = {way: statistics.median(found) for way, found in times.items()}
        plain, best = next(iter(ways)), min(medians, key=lambda way: medians[way])
        return Answer(best if medians[best] <= _FASTER * medians[plain] else plain, medians, left_out)

    def _pages(self, rows: int, pages: int, width: int) -> tuple[Any, ...]:
        """Random arrays of a decode step, as ``page_attention`` takes them."""
        parts, sizes = self._engine.data_parts, self._config
        used = max(1, min(width, pages // rows))
        held = min(rows, pages // used)  # rows that have pages
        tables = np.zeros((parts, rows, width), np.int32)
        tables[:, :held, :used] = np.arange(held * used).reshape(held, used)
        limits = np.where(np.arange(rows) < held, used * PAGE_SIZE, 0)
        owners = np.full(pages, rows, np.int32)
        owners[: held * used] = np.repeat(np.arange(held), used)
        every = (parts, 1)
        arrays = {
            "tables": tables,
            "limits": np.tile(limits.astype(np.int32), every),
            "owners": np.tile(owners, every),
            "places": np.tile(np.arange(pages, dtype=np.int32) % used, every),
            "shared": np.zeros((parts, 0), np.int32),
            "shared_places": np.zeros((parts, 0), np.int32),
            "members": np.zeros((parts, 0, rows), np.bool_),
        }
        view = PageView(**arrays)  # type: ignore[arg-type]  # numpy
        pool, heads, wide = (parts, pages, sizes.num_kv_heads), sizes.num_kv_heads, sizes.head_dim
        folded = sizes.num_heads // heads

        def made(_: Any) -> tuple[jax.Array, Packed, Packed]:
            queries, keys, values = jax.random.split(jax.random.key(0), 3)
            packed = (self._format.pack(jax.random.normal(key, (*pool, PAGE_SIZE, wide))) for key in (keys, values))
            first, second = packed
            turned = Packed(first.numbers.swapaxes(3, 4), first.scales)
            return jax.random.normal(queries, (parts, rows, 1, heads, folded, wide), self._dtype), turned, second

        scales = PAGE_SCALE_AXES if self._format.scaled else None
        axes = (
            (ATTN_BATCH, None, None, ATTN_KV_HEADS, None, HEAD_DIM),
            Packed(PAGE_KEY_AXES, scales),  # type: ignore[arg-type]  # trees of axes, not of arrays
            Packed(PAGE_VALUE_AXES, scales),  # type: ignore[arg-type]
        )
        made_now = self._engine.jit("attention_pages", made, out_axes=axes, phase="decode")()
        positions = np.tile((limits - 1).astype(np.int32), every)[..., None]
        return (*made_now, positions, view)

    def _prompts(self, rows: int, length: int) -> tuple[Any, ...]:
        """Random queries, keys and values of prompts."""
        batch, sizes = self._engine.data_parts * rows, self._config

        def made(_: Any) -> tuple[jax.Array, ...]:
            heads = (sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads)
            keys = jax.random.split(jax.random.key(0), 3)
            return tuple(
                jax.random.normal(key, (batch, length, count, sizes.head_dim), self._dtype)
                for key, count in zip(keys, heads, strict=True)
            )

        queries = (ATTN_BATCH, SEQ, ATTN_HEADS, HEAD_DIM)
        keys = (ATTN_BATCH, KEY_SEQ, ATTN_KV_HEADS, HEAD_DIM)
        found: tuple[Any, ...] = self._engine.jit(
            "attention_prompts", made, out_axes=(queries, keys, keys), phase="prefill"
        )()
        return found


_PHASES = {"pages": "decode", "prompts": "prefill"}


def _without_model(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda _, *args: attend(*args)


def _of_rank_0(answer: Answer | None) -> Answer | None:
    """What rank 0 says; in a job every rank must call it."""
    from spmd_infer.multihost.job import current_job

    job = current_job()
    if job is None or job.channel is None:
        return answer
    own = b"" if answer is None else answer.encoded()
    said = job.channel.gather("attention", own)[0]
    return Answer.decoded(said) if said else None
