"""``spmd-infer reshard``: a checkpoint cut for another mesh, on one machine without that mesh's devices."""

from __future__ import annotations

from typing import Annotated

import typer

from spmd_infer.cli.checkpoint_options import (
    DryRun,
    Fast,
    Overwrite,
    Source,
    Target,
    carry_out,
    describe,
    open_source,
    prediction,
)
from spmd_infer.cli.options import Debug, Json, note, print_json


def reshard(
    source: Source,
    target: Target,
    mesh: Annotated[
        str,
        typer.Option(help="The mesh to cut for, as in data=2,model=8.", envvar="SPMD_INFER_MESH", show_default=False),
    ],
    hosts: Annotated[int, typer.Option(min=1, help="How many hosts the mesh is spread over.")] = 1,
    qkv: Annotated[
        str | None, typer.Option(help="fuse or split the query, key and value projections.", show_default=False)
    ] = None,
    verify: Fast = "full",
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Cut a checkpoint for a mesh, each host's pieces in files of their own.

    Streams tensor by tensor, in little memory. A run that was killed is taken up by the next one. At the end everything
    is read again and checked.
    """
    from spmd_infer.conversion import Changes, prepare
    from spmd_infer.mesh import MeshSpec

    if qkv not in (None, "fuse", "split"):
        raise typer.BadParameter(f"{qkv!r} is neither fuse nor split", param_hint="--qkv")
    spec = MeshSpec.parse(mesh)
    made = prepare(open_source(source, verify), Changes(qkv=qkv), mesh=spec, hosts=hosts)  # type: ignore[arg-type]  # checked above
    if made.note and not as_json:
        note(f"tensors are split by their shapes alone: {made.note}")
    figures = prediction(made, target)
    if not as_json:
        note(describe(figures))
    if dry_run:
        if as_json:
            print_json(figures)
        return
    done = carry_out(made, target, "reshard", overwrite=overwrite, quiet=as_json)
    if as_json:
        print_json({**done, "mesh": spec.shape, "hosts": hosts, "predicted": figures})
