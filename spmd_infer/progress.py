"""Progress of whatever takes longer than two seconds: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SHOW_AFTER = 2.0


@contextmanager
def progress(label: str, total: int, *, quiet: bool = False, unit: str = "") -> Iterator[Callable[[int], None]]:
    """Count up to ``total``; nothing is shown before two seconds have passed.

    Args:
        label: what is being done.
        total: how many steps there are.
        quiet: show nothing at all.
        unit: what the steps are, such as ``"tokens"``, or ``"B"`` for bytes: rate and time left are shown then.

    Yields:
        ``advance(steps)``.
    """
    if quiet:
        yield lambda steps: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{unit}, {task.speed:,.0f} {unit}/s" if task.speed is not None else unit)

    started = time.monotonic()
    if not sys.stderr.isatty():
        done, said = 0, 0.0

        def line(steps: int) -> None:
            nonlocal done, said
            done += steps
            elapsed = time.monotonic() - started
            if elapsed <= SHOW_AFTER or (unit and elapsed < said + SHOW_AFTER and done < total):
                return
            said = elapsed
            text = f"{label}: {done} of {total}, {elapsed:.0f} s"
            if unit:
                rate = done / elapsed
                left = f"{(total - done) / rate:.0f} s left" if rate else "time left unknown"
                text = f"{label}: {done:,} of {total:,} {unit}, {rate:,.0f} {unit}/s, {left}"
                if unit == "B":
                    text = f"{label}: {done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s, {left}"
            print(text, file=sys.stderr, flush=True)

        yield line
        return
    counts = (DownloadColumn(), TransferSpeedColumn()) if unit == "B" else (MofNCompleteColumn(), Rate())
    columns = (TextColumn("{task.description}"), BarColumn(), *counts, TimeRemainingColumn())
    with Progress(*(columns if unit else ()), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, visible=False)

        def advance(steps: int) -> None:
            bar.update(task, advance=steps, visible=time.monotonic() - started > SHOW_AFTER)

        yield advance
