"""``spmd-infer doctor``: what this machine offers, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spmd_infer.cli.options import Debug, Json, print_json

if TYPE_CHECKING:
    from spmd_infer.cli.accelerators import Finding

PROBLEM_FOUND = 6
MARKS = {"ok": "  ", "hint": "? ", "problem": "! "}


def doctor(
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that JAX may take to start.")] = 120.0,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Compare the ranks of a job; run it as your program, on every rank.")
    ] = False,
    path: Annotated[
        list[Path] | None,
        typer.Option(help="With --cluster: a file or folder that all hosts must see alike.", show_default=False),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what this machine offers and what is wrong.

    Versions, cores, memory, devices, caches and settings; for each problem, what to do about it. With --cluster, what
    differs between the ranks of a job, and how fast they talk.
    """
    if cluster:
        from spmd_infer.cli.cluster_checks import check_cluster
        from spmd_infer.multihost.start import initialize

        with initialize() as job:
            findings = check_cluster(job, path or [])
        if job.rank != 0:
            return
    else:
        from spmd_infer.cli.checks import check_all

        findings = check_all(timeout)
    problems = [finding for finding in findings if finding.level == "problem"]
    if as_json:
        print_json({"ok": not problems, "findings": findings})
    else:
        _print(findings)
        typer.echo("")
        count = len(problems)
        typer.echo("nothing is wrong" if not count else f"{count} problem{'s' if count > 1 else ''} found")
    if problems:
        raise typer.Exit(PROBLEM_FOUND)


def _print(findings: list[Finding]) -> None:
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        typer.echo(f"{MARKS[finding.level]}{finding.what:<{width}}  {finding.found}")
        if finding.advice:
            typer.echo(f"  {'':<{width}}  -> {finding.advice}")
