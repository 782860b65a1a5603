"""``spmd-infer reshard``: a checkpoint cut for another mesh, on one machine without that mesh's devices."""

from __future__ import annotations

from typing import Annotated

import typer

from spmd_infer.cli.checkpoint_options import DryRun, Overwrite, QkvOption, Source, Target, copy
from spmd_infer.cli.options import Debug, Json, Verify, VerifyLevel


def reshard(
    source: Source,
    target: Target,
    mesh: Annotated[
        str,
        typer.Option(help="The mesh to cut for, as in data=2,model=8.", envvar="SPMD_INFER_MESH", show_default=False),
    ],
    hosts: Annotated[int, typer.Option(min=1, help="How many hosts the mesh is spread over.")] = 1,
    qkv: QkvOption = None,
    process_id: Annotated[
        int,
        typer.Option(
            min=0,
            help="Which of --num-processes this is; they share the target's folder, and process 0 finishes it.",
            envvar=["SPMD_INFER_PROCESS_ID", "JAX_PROCESS_ID"],
        ),
    ] = 0,
    num_processes: Annotated[
        int,
        typer.Option(
            min=1,
            help="How many processes, on any hosts, run this command together.",
            envvar=["SPMD_INFER_NUM_PROCESSES", "JAX_NUM_PROCESSES"],
        ),
    ] = 1,
    verify: Verify = VerifyLevel.FULL,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Cut a checkpoint for a mesh, each host's pieces in files of their own.

    Streams tensor by tensor, in little memory. A run that was killed is taken up by the next one. What is written is
    read again and compared. With --num-processes, each process writes its share of the tensors; one that was killed is
    started again with the same command.
    """
    from spmd_infer.checkpoints.shares import Share
    from spmd_infer.conversion import Changes, prepare
    from spmd_infer.demo import open_source
    from spmd_infer.mesh import MeshSpec

    spec = MeshSpec.parse(mesh)
    changes = Changes(qkv=qkv.value if qkv else None)
    copy(
        prepare(open_source(source, verify.value), changes, mesh=spec, hosts=hosts),
        target,
        "reshard",
        untold="tensors are split by their shapes alone",
        facts={"mesh": spec.shape, "hosts": hosts},
        dry_run=dry_run,
        overwrite=overwrite,
        as_json=as_json,
        share=Share(process_id, num_processes),
    )
