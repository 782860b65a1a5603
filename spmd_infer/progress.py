"""Progress of whatever takes longer than two seconds: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SHOW_AFTER = 2.0


@contextmanager
def progress(label: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Count up to ``total``; nothing is shown before two seconds have passed.

    Args:
        label: what is being done.
        total: how many steps there are.
        quiet: show nothing at all.

    Yields:
        ``advance(steps)``.
    """
    if quiet:
        yield lambda steps: None
        return
    from rich.console import Console
    from rich.progress import Progress

    started = time.monotonic()
    if not sys.stderr.isatty():
        done = 0

        def line(steps: int) -> None:
            nonlocal done
            done += steps
            elapsed = time.monotonic() - started
            if elapsed > SHOW_AFTER:
                print(f"{label}: {done} of {total}, {elapsed:.0f} s", file=sys.stderr, flush=True)

        yield line
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, visible=False)

        def advance(steps: int) -> None:
            bar.update(task, advance=steps, visible=time.monotonic() - started > SHOW_AFTER)

        yield advance
