"""A request while the scheduler has it: its tokens, how far they are computed, and the pages that hold them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from enum import Enum, auto

SequenceId = int | str


class State(Enum):
    """Where a sequence is on its way."""

    HELD = auto()
    """A fork whose parent's prompt is not computed yet."""
    WAITING = auto()
    """In the queue: has neither slot nor pages."""
    PREFILL = auto()
    """Has a slot and the pages of its prompt, which is being computed chunk by chunk."""
    DECODE = auto()
    """Its prompt is computed; each step adds tokens."""
    DRAINING = auto()
    """Preempted, with tokens on the way; waits for them before it queues again."""
    ENDED = auto()
    """Finished, cancelled, expired or rejected."""


class Sequence:
    """One sequence of tokens to continue.

    Args:
        id: its name among those that are not ended.
        prompt: token ids, at least one.
        max_tokens: tokens to add at most.
        priority: the lower runs first.
        deadline: the latest time to start it, on the clock of ``Scheduler.plan``; None for any time.
        namespace: it shares cached pages only with sequences of the same one: an adapter's name, an API key's salt.
        fresh: compute every position, since more is asked of them than keys and values; others may take its pages.

    Attributes:
        tokens: the prompt and the tokens accepted since.
        prompt_len: tokens of the prompt as it came.
        computed: positions whose keys and values are in the cache once all dispatched steps have run. With lookahead
            the most that may be; ``Scheduler.accept`` sets it back to the truth.
        ahead: tokens beyond the next one that are known and that its next decode step runs as well. Their step brings
            them as one flight and the token that it chooses as another.
        in_flight: tokens of dispatched steps that the host has not read; with lookahead the most that may come.
        target: positions to compute before it decodes: its length when it was admitted.
        part: data shard that it lives in; meaningless without a slot.
        slot: its row in that part, or None.
        pages: ids of its pages in that part, in the order of its positions.
        reused: positions that it took from other sequences' pages when it was last admitted.
        preemptions: how often it lost its pages.
        started: whether it, or the sequence that it is a fork of, has had a slot: no deadline holds then.
    """

    __slots__ = (
        "ahead",
        "arrival",
        "children",
        "common",
        "computed",
        "deadline",
        "digests",
        "flights",
        "fresh",
        "id",
        "in_flight",
        "max_tokens",
        "namespace",
        "pages",
        "parent",
        "part",
        "preemptions",
        "priority",
        "prompt_len",
        "rank",
        "reach",
        "registered",
        "reused",
        "room",
        "slot",
        "started",
        "state",
        "target",
        "tokens",
    )

    def __init__(
        self,
        id: SequenceId,  # noqa: A002  # the attribute's name
        prompt: Iterable[int],
        max_tokens: int,
        *,
        priority: int = 0,
        deadline: float | None = None,
        namespace: str = "",
        fresh: bool = False,
    ) -> None:
        self.id = id
        self.tokens = [int(token) for token in prompt]
        self.prompt_len = len(self.tokens)
        self.max_tokens = max_tokens
        self.priority = priority
        self.deadline = deadline
        self.namespace = namespace
        self.fresh = fresh
        self.state = State.ENDED
        self.computed = 0
        self.ahead = 0
        self.in_flight = 0
        self.target = 0
        self.part = 0
        self.slot: int | None = None
        self.pages: list[int] = []
        self.reused = 0
        self.preemptions = 0
        self.started = False
        # The scheduler's own notes. Order among sequences: see Scheduler.
        self.arrival = 0
        self.rank = (0, 0, 0)
        self.reach = 0  # most positions that it may come to hold, drafts included
        self.room = 0  # positions in its pages
        self.flights: deque[int] = deque()  # most tokens that each unread step may bring
        self.digests: list[bytes] = []  # of its full pages, as far as they were asked for
        self.registered = 0  # its first pages, which can be found or need not be
        self.parent: Sequence | None = None  # whose pages a fork may share
        self.common = 0  # positions that a fork has in common with its parent, computed before it was queued
        self.children: list[Sequence] = []  # held forks

    @property
    def outputs(self) -> int:
        """Tokens accepted so far."""
        return len(self.tokens) - self.prompt_len

    def __repr__(self) -> str:
        return (
            f"Sequence({self.id!r}, {self.state.name}, {self.prompt_len}+{self.outputs} tokens, "
            f"{self.computed} computed, {self.in_flight} in flight)"
        )
