"""What a job is, with everything that its results depend on; and how one run of it works."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class JobSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A job. A run that goes on with it must be given the same.

    Attributes:
        model: a checkpoint's path, or the name of a packaged demo.
        task: the task that answers for each row: ``embed``, ``classify``, ``generate``, ``score``, ``infer``, or one
            that another package offers.
        input: path of the input.
        format: of the input; one of ``sources.FORMATS``.
        output: path of the output, ``.jsonl`` or ``.parquet``.
        column: the field or column that holds a row's text; None for the usual names.
        options: the task's own.
        seed: from which every row that draws gets a seed of its own.
        dtype: as for ``Engine.load``.
        quantize: as for ``Engine.load``.
        unit_cost: most cost of a unit, in what the task counts; None lets the task choose.
    """

    model: str
    task: str
    input: str
    format: str
    output: str
    column: str | None = None
    options: dict[str, Any] = {}
    seed: int = 0
    dtype: str | None = None
    quantize: str | None = None
    unit_cost: int | None = None


Together = Literal["auto", "yes", "no"]


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a run works; another run of the same job may work otherwise.

    Attributes:
        mesh: as for ``Engine``; of each process's own devices unless it has more places than these.
        together: one mesh over all processes; ``"auto"`` where the model fits on no process alone.
        verify: as for ``Engine.load``.
        overwrite: replace an output, or a job with other options, that is there.
        unit_s: seconds that a unit may take.
        quiet: show no progress.
    """

    mesh: str = "auto"
    together: Together = "auto"
    verify: Literal["full", "fast", "off"] = "full"
    overwrite: bool = False
    unit_s: float = 3600.0
    quiet: bool = False


def differences(before: JobSpec, now: JobSpec) -> list[str]:
    """What is not the same, for a person."""
    found = []
    for name in JobSpec.__struct_fields__:
        old, new = getattr(before, name), getattr(now, name)
        if name == "options":
            names = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
            found += [f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in names]
        elif old != new:
            found.append(f"{name} was {old!r} and is {new!r}")
    return found
