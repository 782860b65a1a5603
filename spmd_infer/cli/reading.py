"""Texts for a verb: from the command line, a file, or standard input."""

from __future__ import annotations

import sys
from pathlib import Path

import typer


def read_texts(arguments: list[str] | None, file: Path | None, what: str) -> list[str]:
    """Texts given as arguments, else one a line from ``file``, else from a pipe.

    Raises:
        typer.BadParameter: there are none, or both arguments and a file.
    """
    if arguments and file is not None:
        raise typer.BadParameter(f"give {what} as arguments or with --file, not both")
    if arguments:
        return arguments
    text = ""
    if file is not None:
        text = file.read_text(encoding="utf-8")
    elif not sys.stdin.isatty():
        text = sys.stdin.read()
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise typer.BadParameter(f"no {what}: give them as arguments, with --file, or one a line on standard input")
    return lines
