"""Texts for a verb: from the command line, a file, or standard input."""

from __future__ import annotations

import sys
from pathlib import Path

import typer


def read_texts(arguments: list[str] | None, file: Path | None, what: str) -> list[str]:
    """Texts given as arguments, else one a line from ``file`` (``-`` for standard input), else from a pipe.

    Raises:
        typer.BadParameter: there are none, or both arguments and a file.
    """
    if arguments and file is not None:
        raise typer.BadParameter(f"give {what} as arguments or with --file, not both")
    if arguments:
        return arguments
    if file is not None and str(file) != "-":
        text = file.read_text(encoding="utf-8")
    elif file is not None or not sys.stdin.isatty():
        text = sys.stdin.read()
    else:
        text = ""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise typer.BadParameter(f"no {what}: give them as arguments, with --file, or one a line on standard input")
    return lines
