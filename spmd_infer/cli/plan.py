"""``spmd-infer plan``: how a model would lie on devices, and why."""

from __future__ import annotations

import gc
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from spmd_infer.cli.exit_codes import NO_LAYOUT
from spmd_infer.cli.options import CacheDtype, Debug, Dtype, Json, Mesh, note, print_json


class Aim(StrEnum):
    """What a plan is to be best at."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"
    COST = "cost"


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="Checkpoint, config.json, demo:NAME, or a well-known model such as llama-3.1-405b.",
            show_default=False,
        ),
    ],
    devices: Annotated[
        str | None,
        typer.Option(
            help="Devices to plan for: a number of simulated ones, or as in 16xH100; by default those there are.",
            envvar="SPMD_INFER_DEVICES",
            show_default=False,
        ),
    ] = None,
    hosts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many hosts the devices are spread over; by default as few as usual hosts of them allow.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows that one step handles, or concurrent requests.")] = 8,
    length: Annotated[
        int | None,
        typer.Option("--length", "--input", min=1, help="Tokens in a row or prompt.", show_default=False),
    ] = None,
    output: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that each request asks for, of models that generate.", show_default=False),
    ] = None,
    objective: Annotated[Aim, typer.Option(help="What to be best at.")] = Aim.LATENCY,
    ttft: Annotated[
        float | None, typer.Option(help="Seconds to the first token that no plan may exceed.", show_default=False)
    ] = None,
    itl: Annotated[
        float | None, typer.Option(help="Seconds between tokens that no plan may exceed.", show_default=False)
    ] = None,
    mesh: Mesh = "auto",
    dtype: Dtype = None,
    cache_dtype: CacheDtype = "auto",
    html: Annotated[
        Path | None,
        typer.Option(help="Also write the plan as a self-contained page.", dir_okay=False, show_default=False),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Compile the plan on simulated devices and compare collectives and memory; exit code 5 on a "
            "difference that nothing explains.",
        ),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show which layout suits a model, and why.

    Lists what each mesh costs and why it was rejected. Needs none of the devices that it plans for.
    """
    gc.disable()  # JAX's modules and traces are hundreds of thousands of objects that stay: a seventh of the time
    from spmd_infer import plan as make_plan
    from spmd_infer.planning.hardware import parse_cluster

    made = make_plan(
        model,
        devices=None if devices is None else parse_cluster(devices, hosts),
        batch=batch,
        length=length,
        output=output,
        objective=objective.value,
        ttft_limit=ttft,
        itl_limit=itl,
        mesh=mesh,
        dtype=dtype,
        cache_dtype=cache_dtype,
    )
    gc.enable()
    if html is not None:
        from spmd_infer.planning.page import page

        html.write_text(page(made), "utf-8")
        note(f"written to {html}")
    found = None
    if verify:
        from spmd_infer.plan_verification import verify_plan

        note(f"compiling for {made.mesh.size} simulated devices")
        found = verify_plan(
            made, model, dtype=dtype, batch=batch, length=length, output=output, cache_dtype=cache_dtype
        )
    if as_json:
        verified = {} if found is None else {"verification": found.as_dict()}
        print_json({**made.to_dict(), **verified})
    else:
        typer.echo(made.explain())
        if found is not None:
            typer.echo("")
            typer.echo(found.explain())
    if found is not None and not found.agrees:
        raise typer.Exit(NO_LAYOUT)
