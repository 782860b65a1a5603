"""SLURM's short forms: ``node[001-003,7],login1`` for hosts and ``2(x3),1`` for tasks on each of them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from spmd_infer.errors import ClusterError

MOST_HOSTS = 65536
_PART = re.compile(r"[^,\[\]]+(?:\[[0-9,\-]+\][^,\[\]]*)*|(?:\[[0-9,\-]+\][^,\[\]]*)+")
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")
_COUNT = re.compile(r"([0-9]+)(?:\(x([0-9]+)\))?")


def expand_hosts(text: str) -> list[str]:
    """The hosts of a SLURM node list, in order.

    Raises:
        ClusterError: it is no such list, or names more hosts than any cluster has.
    """
    hosts: list[str] = []
    position = 0
    while position < len(text):
        part = _PART.match(text, position)
        if part is None or (part.end() < len(text) and text[part.end()] != ","):
            raise ClusterError(f"cannot read the node list {text!r} from character {position + 1} on")
        hosts.extend(_expand(part[0], text))
        if len(hosts) > MOST_HOSTS:
            raise ClusterError(f"the node list {text!r} names more than {MOST_HOSTS} hosts")
        position = part.end() + 1
    if not hosts or text.endswith(","):
        raise ClusterError(f"cannot read the node list {text!r}: a host name is missing")
    return hosts


def _expand(part: str, whole: str) -> Iterator[str]:
    head, bracket, rest = part.partition("[")
    if not bracket:
        yield head
        return
    ranges, _, tail = rest.partition("]")
    for piece in ranges.split(","):
        bounds = _RANGE.fullmatch(piece)
        if bounds is None:
            raise ClusterError(f"cannot read the range {piece!r} in the node list {whole!r}")
        first, last = int(bounds[1]), int(bounds[2] or bounds[1])
        if last < first or last - first >= MOST_HOSTS:
            raise ClusterError(f"the range {piece!r} in the node list {whole!r} is empty or too long")
        for number in range(first, last + 1):
            for ending in _expand(tail, whole):
                yield f"{head}{number:0{len(bounds[1])}d}{ending}"


def expand_counts(text: str) -> list[int]:
    """Tasks on each host, from ``2(x3),1``.

    Raises:
        ClusterError: it is no such list.
    """
    counts: list[int] = []
    for piece in text.split(","):
        count = _COUNT.fullmatch(piece)
        if count is None or int(count[2] or 1) > MOST_HOSTS:
            raise ClusterError(f"cannot read {piece!r} in the list {text!r} of tasks on each host")
        counts.extend([int(count[1])] * int(count[2] or 1))
    return counts
