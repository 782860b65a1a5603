"""Which weights without axes are the same weight of different layers, and a model's work with one standing for all."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from spmd_infer.planning.values import Relabel, Value, of_bare_weight, weight_label
from spmd_infer.planning.work import Work, merged

Grouping = Callable[[Sequence[str]], dict[str, str]]
"""By path, the name of the group that it moves with."""

_NUMBER = re.compile(r"\d+")
_MOST_RANK = 8


def by_layer(paths: Sequence[str]) -> dict[str, str]:
    """By the path without the number of the layer: of several numbers in a path that which varies most."""
    numbers = {path: _NUMBER.findall(path) for path in paths}
    alike: dict[str, list[str]] = {}
    for path in paths:
        alike.setdefault(_NUMBER.sub("*", path), []).append(path)
    found = {}
    for pattern, same in alike.items():
        seen = [{numbers[path][place] for path in same} for place in range(pattern.count("*"))]
        layer = max(range(len(seen)), key=lambda place: len(seen[place]), default=-1)
        for path in same:
            found[path] = _without_number(path, layer)
    return found


def by_parity(paths: Sequence[str]) -> dict[str, str]:
    """Likewise, odd and even layers apart."""
    found = {}
    for path, pattern in by_layer(paths).items():
        place = pattern.find("*")
        number = _NUMBER.match(path, place) if place >= 0 else None
        found[path] = f"{pattern} {'odd' if int(number[0]) % 2 else 'even'}" if number else pattern
    return found


def by_path(paths: Sequence[str]) -> dict[str, str]:
    """Each by itself."""
    return {path: path for path in paths}


def _without_number(path: str, place: int) -> str:
    numbers = list(_NUMBER.finditer(path))
    if place < 0:
        return path
    return path[: numbers[place].start()] + "*" + path[numbers[place].end() :]


def renamed(work: Work, names: Mapping[str, str]) -> Work:
    """The work with one label for all weights of a group, equal products as one; not what it takes of memory."""
    labels = {weight_label(path, d): weight_label(key, d) for path, key in names.items() for d in range(_MOST_RANK)}
    known: dict[Value, Value] = {}

    def value(old: Value) -> Value:
        new = known.get(old)
        if new is None:
            new = old
            if any(of_bare_weight(label) for label in old.labels):
                new = replace(old, labels=tuple(labels.get(label or "", label) for label in old.labels))
            known[old] = new
        return new

    return Work(
        products=merged(
            [replace(p, left=value(p.left), right=value(p.right), out=value(p.out)) for p in work.products]
        ),
        reductions=merged([replace(r, value=value(r.value), out=value(r.out)) for r in work.reductions]),
        relabels=merged([Relabel(value(r.before), value(r.after), r.times) for r in work.relabels]),
        windows=merged([replace(w, value=value(w.value)) for w in work.windows]),
        inputs=[value(v) for v in work.inputs],
        outputs=[value(v) for v in work.outputs],
    )
