"""``spmd-infer batch``: an offline job, which goes on where it was stopped."""

from __future__ import annotations

import os
import traceback
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from spmd_infer.cli.exit_codes import ROWS_FAILED, exit_code
from spmd_infer.cli.options import (
    DEBUG_VARIABLE,
    Debug,
    Devices,
    Dtype,
    Json,
    Mesh,
    Model,
    Quantize,
    Verify,
    VerifyLevel,
    ask_for_devices,
    note,
    print_json,
)
from spmd_infer.errors import SpmdInferError, TaskError

if TYPE_CHECKING:
    from spmd_infer.jobs.folder import Figures
    from spmd_infer.jobs.spec import JobSpec
    from spmd_infer.multihost.job import Job


class Format(StrEnum):
    """How the input is read."""

    AUTO = "auto"
    JSONL = "jsonl"
    OPENAI = "openai"
    PARQUET = "parquet"
    ARRAYS = "arrays"
    IMAGES = "images"


class Together(StrEnum):
    """Whether all processes hold one model."""

    AUTO = "auto"
    YES = "yes"
    NO = "no"


def batch(
    model: Model,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help="A .jsonl or .parquet file, a folder of pictures, or a folder of .npy or .npz files.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Argument(help="A .jsonl or .parquet file.", show_default=False)],
    task: Annotated[
        str | None,
        typer.Option(
            help="embed, classify, generate, score or infer; the model's own if not given.", show_default=False
        ),
    ] = None,
    kind: Annotated[Format, typer.Option("--format", help="What the input is; auto goes by its name.")] = Format.AUTO,
    column: Annotated[
        str | None, typer.Option(help="The field or column that holds the text.", show_default=False)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="generate: most new tokens for each row.", show_default=False)
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="generate: 0 takes the most likely token.", show_default=False)
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="generate: put texts into the model's chat template.")] = False,
    top: Annotated[int | None, typer.Option(min=1, help="classify: how many labels.", show_default=False)] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Another option of the task, its value in JSON: min_p=0.1; may be repeated.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Each row that is sampled draws from this and its number.")] = 0,
    unit_cost: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens, or pixels, of the rows that are computed at once.", show_default=False),
    ] = None,
    unit_timeout: Annotated[float, typer.Option(min=1.0, help="Seconds after which these are stuck.")] = 3600.0,
    together: Annotated[
        Together, typer.Option(help="Lay one mesh over all processes; auto where the model needs it.")
    ] = Together.AUTO,
    mesh: Mesh = "auto",
    devices: Devices = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    verify: Verify = VerifyLevel.FULL,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what there is to do, by rank.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output of another job; this one still goes on.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 9 where a row has failed.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run all rows of a file or folder through a task, and write a row for each.

    Rows that fail go to OUTPUT's name with .errors.jsonl. A job that was killed goes on when the same command is given
    again, also on another number of processes: no row is lost or doubled. Run it under spmd-infer launch, srun or
    mpirun for several processes. SIGTERM stops it after the rows at hand. See docs/jobs.md.

    Exit codes: 0 all rows are done; 7 the job cannot begin or go on; 8 the same job is under way in another process,
    which is named; 9 rows have failed, with --strict; 75 stopped by SIGTERM, the same command goes on; the others as of
    spmd-infer.
    """
    from spmd_infer.multihost.start import initialize

    if devices is not None:
        ask_for_devices(devices)
    given = {"max_tokens": max_tokens, "temperature": temperature, "chat": chat or None, "top": top}
    options = {name: value for name, value in given.items() if value is not None} | _settings(settings or [])
    with initialize(quiet=as_json) as job:
        try:
            from spmd_infer.compile_cache import use_compile_cache
            from spmd_infer.jobs.run import plan_job, run_job
            from spmd_infer.jobs.spec import RunOptions

            if job.size == 1:
                use_compile_cache()
            spec = _spec(model, source, output, task, kind, column, options, seed, dtype, quantize, unit_cost)
            if dry_run:
                plan = plan_job(spec, job)
                if plan is not None:
                    _show_plan(spec, plan, job.size, as_json)
                return
            run = RunOptions(
                mesh=mesh,
                together=together.value,
                verify=verify.value,
                overwrite=overwrite,
                unit_s=unit_timeout,
                quiet=as_json,
            )
            outcome = run_job(spec, job, run)
        except (SpmdInferError, OSError) as error:
            _fail(job, error)
        if not outcome.finished:
            if job.rank == 0:
                note("stopped; the same command goes on")
            job.requeue()
    if outcome.figures is not None:
        _show(spec, outcome.figures, as_json)
        if strict and outcome.figures.failed:
            raise typer.Exit(ROWS_FAILED)


def _spec(
    model: str,
    source: Path,
    output: Path,
    task: str | None,
    kind: Format,
    column: str | None,
    options: dict[str, Any],
    seed: int,
    dtype: str | None,
    quantize: str | None,
    unit_cost: int | None,
) -> JobSpec:
    from spmd_infer.jobs.sources import format_of
    from spmd_infer.jobs.spec import JobSpec
    from spmd_infer.opening import family_of

    return JobSpec(
        model=model,
        task=task or family_of(model).task,
        input=str(source.absolute()),
        format=format_of(source) if kind == Format.AUTO else kind.value,
        output=str(output.absolute()),
        column=column,
        options=options,
        seed=seed,
        dtype=dtype,
        quantize=quantize,
        unit_cost=unit_cost,
    )


def _settings(pairs: list[str]) -> dict[str, Any]:
    """Options given as NAME=VALUE.

    Raises:
        TaskError: one is not.
    """
    import msgspec

    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise TaskError(f"--set {pair!r}: expected NAME=VALUE, such as min_p=0.1")
        try:
            found[name] = msgspec.json.decode(value)
        except msgspec.DecodeError:
            found[name] = value
    return found


def _fail(job: Job, error: SpmdInferError | OSError) -> NoReturn:
    """End all ranks with this one's error."""
    if job.size == 1:
        raise error
    shown = traceback.format_exc() if os.environ.get(DEBUG_VARIABLE) else f"error: {error}\n"
    job.fail(error, shown, exit_code(error) if isinstance(error, SpmdInferError) else 1)


def _show_plan(spec: JobSpec, plan: Any, ranks: int, as_json: bool) -> None:
    from spmd_infer.jobs.run import shares

    found = shares(plan, ranks)
    if as_json:
        print_json(
            {
                "task": spec.task,
                "format": spec.format,
                "rows": plan.rows,
                plan.counts: plan.cost,
                "units": len(plan.units),
                "ranks": found,
            }
        )
        return
    typer.echo(
        f"{spec.task} of {spec.input} ({spec.format}): {plan.rows:,} rows, {plan.cost:,} {plan.counts}, "
        f"{len(plan.units)} units"
    )
    for share in found:
        typer.echo(
            f"  rank {share['rank']}: {share['rows']:,} rows, {share[plan.counts]:,} {plan.counts}, "
            f"{share['units']} units"
        )


def _show(spec: JobSpec, figures: Figures, as_json: bool) -> None:
    from spmd_infer.jobs.folder import JobFolder

    folder = JobFolder(Path(spec.output))
    errors = str(folder.errors) if figures.failed else None
    if as_json:
        print_json({"task": spec.task, "written": spec.output, "errors": errors, **_fields(figures)})
        return
    cut = f", {figures.cut:,} texts lost their ends" if figures.cut else ""
    runs = f" in {figures.runs} runs" if figures.runs > 1 else ""
    note(
        f"{spec.output}: {figures.rows - figures.failed:,} of {figures.rows:,} rows{cut}, {figures.seconds:.1f} s{runs}"
    )
    if errors:
        crashed = f", {figures.quarantined:,} of them crashed the process" if figures.quarantined else ""
        note(f"{errors}: {figures.failed:,} rows failed{crashed}")


def _fields(figures: Figures) -> dict[str, Any]:
    import msgspec

    found: dict[str, Any] = msgspec.to_builtins(figures)
    return found
