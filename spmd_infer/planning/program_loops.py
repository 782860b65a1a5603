"""How often a compiled program runs each of its instructions: loops and branches of conditionals, read off its HLO."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_BEGIN = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) (?:\(.*\) -> .*)?\{$")
_LOOP = re.compile(r" while\(.*\bbody=%?(?P<body>[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(?P<count>\d+)"')
_BRANCHES = re.compile(r"(?:branch_computations=\{(?P<several>[^}]*)\}|(?:true|false)_computation=%?(?P<one>[\w.\-]+))")
_CALLED = re.compile(r"\b(?:calls|to_apply)=%?(?P<name>[\w.\-]+)")


@dataclass(frozen=True)
class Run:
    """An instruction and how often it runs.

    Attributes:
        line: its HLO text.
        times: how often the loops around it are run through, as far as XLA knows.
        optional: whether it is in a branch of a conditional.
    """

    line: str
    times: int
    optional: bool


def runs(program: Any) -> list[Run]:
    """Every instruction of a compiled program that can run, in the order of its computations.

    Args:
        program: HLO text, or anything with ``as_text()`` (``jax.stages.Compiled``).
    """
    text = program if isinstance(program, str) else program.as_text()
    computations, entry = _computations(text)
    return list(_walk(computations, entry, 1, optional=False))


def permutes_in_branches(program: Any) -> bool:
    """Whether devices permute inside a conditional, which is wrong where not all of them take the same branch."""
    return any(run.optional and " collective-permute" in run.line for run in runs(program))


def _walk(computations: dict[str, list[str]], name: str, times: int, *, optional: bool) -> Iterator[Run]:
    for line in computations.get(name, ()):
        yield Run(line, times, optional)
        loop = _LOOP.search(line)
        if loop is not None:
            trips = _TRIPS.search(line)
            count = int(trips["count"]) if trips is not None else 1
            yield from _walk(computations, loop["body"], times * count, optional=optional)
        elif " conditional(" in line:
            for found in _BRANCHES.finditer(line):
                for branch in (found["several"] or found["one"]).split(","):
                    yield from _walk(computations, branch.strip().lstrip("%"), times, optional=True)
        elif " call(" in line:
            for found in _CALLED.finditer(line):
                yield from _walk(computations, found["name"], times, optional=optional)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by name, and the name of the one that the program begins with."""
    found: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        begin = _BEGIN.match(line)
        if begin is not None:
            current = begin["name"]
            found[current] = []
            entry = current if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            current = ""
        elif current:
            found[current].append(line)
    return found, entry
