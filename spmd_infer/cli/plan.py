"""``spmd-infer plan``: how a model would lie on devices, and why."""

from __future__ import annotations

from typing import Annotated

import typer

from spmd_infer.cli.options import Debug, Dtype, Json, Mesh, Model, print_json


def plan(
    model: Model,
    devices: Annotated[
        str | None,
        typer.Option(
            help="Devices to plan for: a number of simulated ones, or as in 16xH100; by default those there are.",
            envvar="SPMD_INFER_DEVICES",
            show_default=False,
        ),
    ] = None,
    hosts: Annotated[int, typer.Option(min=1, help="How many hosts the devices are spread over.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Rows that one step handles.")] = 8,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a row, for models of text.", show_default=False)
    ] = None,
    mesh: Mesh = "auto",
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show which layout suits a model, and why.

    Lists what each mesh costs and why it was rejected. Needs none of the devices that it plans for.
    """
    from spmd_infer import plan as make_plan

    made = make_plan(model, devices=devices, hosts=hosts, batch=batch, length=length, mesh=mesh, dtype=dtype)
    if as_json:
        print_json(made.to_dict())
    else:
        typer.echo(made.explain())
