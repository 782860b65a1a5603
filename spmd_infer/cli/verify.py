"""``spmd-infer verify``: whether a checkpoint is whole."""

from __future__ import annotations

from typing import Annotated

import typer

from spmd_infer.cli.checkpoint_options import Source
from spmd_infer.cli.options import Debug, Json, note, print_json
from spmd_infer.errors import CheckpointError

PROBLEM_FOUND = 6


def verify(
    source: Source,
    dtype: Annotated[
        str | None, typer.Option(help="The dtype that all floats should have.", show_default=False)
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Look for damage: flipped bits, missing or cut files, wrong dtypes, values that are not finite.

    Native checkpoints carry digests, with which every byte is compared. Others have none: what shows there are damaged
    headers, cut files and values that no weight should have. Ends with exit code 6 where something is wrong.
    """
    from spmd_infer.checkpoints import verify as check
    from spmd_infer.demo import open_source
    from spmd_infer.progress import progress

    try:
        reader = open_source(source)
    except CheckpointError as error:
        if as_json:
            print_json({"ok": False, "problems": [{"kind": "damaged", "what": str(error)}]})
        else:
            typer.echo(str(error))
        raise typer.Exit(PROBLEM_FOUND) from error
    total = sum(info.nbytes for info in reader.tensors.values())
    with progress("verify", total, quiet=as_json, unit="B") as advance:
        problems = check(reader, dtype=dtype, advance=advance)
    if as_json:
        rows = [
            {"file": str(p.file), "tensor": p.tensor, "offset": p.offset, "kind": p.kind, "what": p.what}
            for p in problems
        ]
        print_json({"ok": not problems, "digests": reader.stored == "native", "problems": rows})
    else:
        for problem in problems:
            typer.echo(str(problem))
        digests = "digests match" if reader.stored == "native" else "this format has no digests, values are finite"
        count = len(reader.tensors)
        note(f"{len(problems)} problems" if problems else f"nothing is wrong with {count} tensors: {digests}")
    if problems:
        raise typer.Exit(PROBLEM_FOUND)
