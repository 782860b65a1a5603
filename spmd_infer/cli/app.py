"""The command line: its verbs, its options common to all, its exit codes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from spmd_infer import __version__
from spmd_infer.cli import (
    batch,
    bench,
    convert,
    doctor,
    generate,
    images,
    infer,
    inspect,
    launch,
    plan,
    reshard,
    sentences,
    verify,
)
from spmd_infer.cli import eval as evaluation
from spmd_infer.cli.configuration import read_configuration
from spmd_infer.cli.exit_codes import REFUSED_INPUT, exit_code
from spmd_infer.cli.options import DEBUG_VARIABLE
from spmd_infer.errors import SpmdInferError

HELP = """Run JAX and Flax models sharded over a mesh of devices.

MODEL is a checkpoint (a Hugging Face folder, a .gguf, .safetensors or .pth file) or one of demo:smollm2, demo:minilm
and demo:efficientnet-lite0.

An option on the command line wins over its environment variable, that over the configuration file, that over the
default.

Exit codes: 0 done; 1 an error of this program, with its traceback; 2 wrong command line or configuration; 3 the
checkpoint or model cannot be used; 4 the input is refused, or a file cannot be
read or written; 5 no mesh or plan works, the model does not fit, or plan --verify
found a difference; 6 doctor or verify found a problem, or diff a difference; 7, 8 and
9 see batch --help; 130 interrupted. Ranks of a job have 70, 75 and 143 besides: see
launch --help.
"""

app = typer.Typer(
    name="spmd-infer", help=HELP, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)
app.command("infer")(infer.infer)
app.command("generate")(generate.generate)
app.command("embed")(sentences.embed)
app.command("classify")(images.classify)
app.command("batch")(batch.batch)
app.command("plan")(plan.plan)
app.command("convert")(convert.convert)
app.command("reshard")(reshard.reshard)
app.command("inspect")(inspect.inspect)
app.command("diff")(inspect.diff)
app.command("verify")(verify.verify)
app.command("bench")(bench.bench)
app.command("eval")(evaluation.evaluate)
app.command("launch")(launch.launch)
app.command("doctor")(doctor.doctor)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"spmd-infer {__version__}")
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file with values for options.", envvar="SPMD_INFER_CONFIG", show_default=False),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and stop.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options that stand before the verb."""
    if config is not None:
        ctx.default_map = read_configuration(config, ctx)


def main() -> None:
    """Run the command line; an expected error becomes one message and an exit code."""
    try:
        app()
    except (SpmdInferError, OSError) as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        if isinstance(error, SpmdInferError):
            print(f"error: {error}", file=sys.stderr)
            sys.exit(exit_code(error))
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(REFUSED_INPUT)
