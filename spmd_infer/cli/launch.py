"""``spmd-infer launch``: one command as several processes of one job."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from spmd_infer.cli.options import Debug


def launch(
    command: Annotated[list[str], typer.Argument(help="What to run, after --.", show_default=False)],
    nprocs: Annotated[int, typer.Option("--nprocs", "-n", min=1, max=1024, help="Processes on this host.")] = 1,
    devices_per_process: Annotated[
        int | None,
        typer.Option(
            min=1, max=1024, help="Simulate this many devices on the CPU in each process.", show_default=False
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Run a command as several processes that form one job.

    Output carries the rank in front. Started by a scheduler once on each host, it starts --nprocs on each, all of one
    job. SIGTERM and SIGINT go to all processes. When one fails all end within seconds, its traceback last.

    Exit codes: that of the rank that failed first, 128 and the signal's number where a signal ended it; 75 where the
    job stopped on SIGTERM and wants to be started again; ranks that end because of another one have 70.
    """
    from spmd_infer.multihost.launcher import Launcher

    if command[0].endswith(".py"):
        command = [sys.executable, *command]
    raise typer.Exit(Launcher(command, nprocs, devices_per_process, os.environ).run())
