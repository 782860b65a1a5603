"""What bounds a scheduler: slots, pages, tokens a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from spmd_infer.errors import TaskError
from spmd_infer.generation.prefixes import MOST_SALT_BYTES


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Sizes and rules of a scheduler. All counts are those of one part.

    Attributes:
        parts: data shards that the rows are split over.
        slots: sequences that run at a time.
        num_pages: pages of the pool.
        page_size: positions of a page.
        context_len: positions that a sequence may come to, prompt and outputs.
        token_budget: positions computed in one step, decoded ones included. Parts compute side by side.
        max_chunk: tokens of one prefill chunk, at most; a multiple of ``page_size``.
        chunked: cut prompts into chunks. Without it a prompt is computed in one step, whatever the budget.
        lookahead: tokens that a decode step may add beyond one: drafts, or further steps of one dispatch.
        prefix_cache: share full pages between sequences that begin alike.
        overtaking: how many earlier requests a request may overtake for each level of priority that it is ahead.
        max_copies: pages copied before one step.
        salt: the secret that page digests are made with.

    Raises:
        TaskError: they contradict each other.
    """

    parts: int = 1
    slots: int
    num_pages: int
    page_size: int
    context_len: int
    token_budget: int
    max_chunk: int
    chunked: bool = True
    lookahead: int = 0
    prefix_cache: bool = True
    overtaking: int = 1024
    max_copies: int = 64
    salt: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        for name in ("parts", "slots", "num_pages", "page_size", "context_len", "max_chunk"):
            if getattr(self, name) < 1:
                raise TaskError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lookahead", "overtaking", "max_copies"):
            if getattr(self, name) < 0:
                raise TaskError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.max_chunk % self.page_size:
            raise TaskError(f"max_chunk {self.max_chunk} is not a multiple of page_size {self.page_size}")
        least = self.slots * self.width + self.page_size
        if self.token_budget < least:
            raise TaskError(
                f"token_budget {self.token_budget} is too small: {self.slots} slots decoding {self.width} tokens each "
                f"and one page of a prompt, {self.page_size} positions, take {least}"
            )
        if len(self.salt) > MOST_SALT_BYTES:
            raise TaskError(f"a salt has at most {MOST_SALT_BYTES} bytes, got {len(self.salt)}")

    @property
    def width(self) -> int:
        """Positions that a decode step computes for a sequence, at most."""
        return 1 + self.lookahead

    @property
    def max_pages(self) -> int:
        """Pages of the longest sequence, with the drafts of a step that runs and one that was dispatched after it."""
        return self.pages_for(self.reach(self.context_len))

    def pages_for(self, positions: int) -> int:
        """Pages that hold so many positions."""
        return -(-positions // self.page_size)

    def reach(self, positions: int) -> int:
        """Positions computed for a sequence that may come to so many: its last token's never, but drafts beyond."""
        return positions - 1 + 2 * self.lookahead
