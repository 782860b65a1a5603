"""Whether and where a waiting sequence can run, and what it can take from pages that are already computed."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

from spmd_infer.generation.limits import Limits
from spmd_infer.generation.parts import Part
from spmd_infer.generation.sequences import Sequence, State


@dataclass(frozen=True)
class Offer:
    """What a part can do for a sequence.

    Attributes:
        part: the part.
        found: pages of other sequences with the same tokens, found by their digests.
        forked: positions taken over from the parent's pages; 0 unless they are more than those found.
    """

    part: Part
    found: int
    forked: int


def best_offer(sequence: Sequence, parts: Many[Part], budgets: Many[int], limits: Limits) -> Offer | None:
    """The part to run a sequence in: the most positions reused, then the most spare pages, then the fewest sequences.

    A part can take it when it has a slot, tokens left in this step, and pages for the whole prompt; and then a page
    more for it and for every second sequence that will grow, so that hardly any has to be preempted soon. A sequence
    that was preempted keeps more distance each time.

    Args:
        sequence: one that waits.
        parts: all of them.
        budgets: tokens left in this step, of each part.
        limits: the scheduler's.
    """
    size = limits.page_size
    best: Offer | None = None
    best_value = (0, 0, 0)
    for part, budget in zip(parts, budgets, strict=True):
        if budget <= 0 or not part.has_slot:
            continue
        found = unused = 0
        if limits.prefix_cache and not sequence.fresh:
            # The last token is computed even when all are known: its logits are asked for.
            most = (len(sequence.tokens) - 1) // size
            found, unused = part.pool.find(part.digests(sequence, most))
        forked = _in_common(sequence, part)
        if forked > found * size:
            found = unused = 0
        else:
            forked = 0
        reused = found * size + forked
        needed = limits.pages_for(len(sequence.tokens)) - reused // size
        if part.running:
            growth = limits.pages_for(sequence.reach) - limits.pages_for(len(sequence.tokens))
            left = part.spare() - unused - needed - min(growth, 1 + sequence.preemptions)
        else:
            left = part.pool.available - unused - needed
        if left < 0 or (limits.chunked and budget < min(size, len(sequence.tokens) - reused)):
            continue
        value = (reused, left, -len(part.running))
        if best is None or value > best_value:
            best, best_value = Offer(part, found, forked), value
    return best


def admit(sequence: Sequence, offer: Offer, limits: Limits) -> None:
    """Give a sequence its slot and the pages of its whole prompt. ``computed`` says where its first chunk starts."""
    part, size = offer.part, limits.page_size
    if offer.forked:
        assert sequence.parent is not None
        whole, rest = divmod(offer.forked, size)
        pages = sequence.parent.pages[:whole]
        for page in pages:
            part.pool.use(page)
        sequence.computed = whole * size
        if rest and (copied := part.pool.copy(sequence.parent.pages[whole])) is not None:
            pages.append(copied)
            sequence.computed += rest
    else:
        pages = part.pool.share(sequence.digests[: offer.found])
        sequence.computed = offer.found * size
    sequence.registered = sequence.computed // size
    sequence.reused = sequence.computed
    sequence.target = len(sequence.tokens)
    for _ in range(limits.pages_for(sequence.target) - len(pages)):
        fresh = part.pool.allocate()
        assert fresh is not None, "an offer counts the pages that it needs"
        pages.append(fresh)
    sequence.state = State.PREFILL
    sequence.started = True
    sequence.parent = None
    part.place(sequence, pages)


def _in_common(sequence: Sequence, part: Part) -> int:
    parent = sequence.parent
    if parent is None or parent.state is not State.DECODE or parent.part != part.index:
        return 0
    return min(sequence.common, len(sequence.tokens) - 1)
