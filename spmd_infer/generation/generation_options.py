"""How an engine generates."""

from __future__ import annotations

from dataclasses import dataclass, field

from spmd_infer.generation.speculation import Speculation


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How an engine generates.

    Attributes:
        max_rows: requests that run at a time; rounded up to a multiple of the parts that rows are split into.
        cache_bytes: keys and values kept at most, on all devices together; None for 4 GiB on a CPU, and on
            accelerators for what the weights leave of 85 % of the memory.
        cache_dtype: what the cache holds: ``auto`` (what the model computes in; float32 on a CPU), ``float32``,
            ``bfloat16``, ``int8``, or ``fp8`` (float8, e4m3), the last two with a scale for each position and head.
        token_budget: positions that one step computes, at most: the longer, the sooner prompts are through, and the
            longer the others wait for their next token.
        max_chunk: tokens of a prompt run at once.
        chunked: cut prompts longer than that into chunks; without it each is run whole.
        prefix_cache: take over keys and values of earlier prompts that begin alike.
        speculation: where drafts of tokens come from that a step then tries at once: ``PromptLookup()`` for the text
            itself, ``Draft(engine=...)`` for a smaller model. Tokens stay the same. Requests with rules about single
            tokens, and those in one batch with them, go without.
        max_adapters: LoRA adapters that may be loaded at a time; their memory is taken with the first.
        max_adapter_rank: the largest rank of one; what each costs depends on this, not on its own.
        jump_ahead: run tokens that a request's shape leaves no choice about several at a time, where that pays: in
            small batches. The text stays the same.
        warm_up: compile every program when the task is made, within ``max_rows`` and the model's context, and again
            after ``reshard``; those for adapters when the first is loaded. The task's own ``warm_up`` takes narrower
            bounds.
        salt: secret that these are named with; by default drawn.
    """

    max_rows: int = 64
    cache_bytes: int | None = None
    cache_dtype: str = "auto"
    token_budget: int = 1024
    max_chunk: int = 512
    chunked: bool = True
    prefix_cache: bool = True
    speculation: Speculation | None = None
    max_adapters: int = 4
    max_adapter_rank: int = 16
    jump_ahead: bool = True
    warm_up: bool = False
    salt: bytes = field(default=b"", repr=False)
