"""``spmd-infer inspect`` and ``spmd-infer diff``: what is in a checkpoint, and what two of them do not share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spmd_infer.cli.checkpoint_options import Source
from spmd_infer.cli.options import Debug, Json, note, print_json

if TYPE_CHECKING:
    from spmd_infer.checkpoints import Reader
    from spmd_infer.checkpoints.inspecting import Overview

DIFFERENT = 6


def inspect(
    source: Source,
    depth: Annotated[int, typer.Option(min=1, help="How deep the tree of names is shown.")] = 2,
    every: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    mesh: Annotated[
        str | None, typer.Option(help="Show how it would lie on this mesh, as in data=2,model=8.", show_default=False)
    ] = None,
    hosts: Annotated[int, typer.Option(min=1, help="How many hosts the mesh is spread over.")] = 1,
    picture: Annotated[
        Path | None, typer.Option(help="Draw where the bytes are, to this .svg or .png file.", show_default=False)
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what is in a checkpoint.

    Reads headers only: files may be larger than memory, and no accelerator is needed.
    """
    from spmd_infer.checkpoints.inspecting import inspect as look
    from spmd_infer.demo import open_source

    reader = open_source(source)
    axes, layout = _layout(reader, mesh, hosts)
    overview = look(reader, axes, layout)
    if picture is not None:
        from spmd_infer.checkpoints.treemap import draw

        draw(overview.tree, picture)
    if as_json:
        print_json(overview.to_dict())
    else:
        _print(overview, depth, every=every)


def diff(
    a: Annotated[str, typer.Argument(help="Checkpoint, or demo:NAME.", show_default=False)],
    b: Annotated[str, typer.Argument(help="The other one.", show_default=False)],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show which tensors of two checkpoints differ, and by how much.

    Tensors are compared by their names; where the formats call them differently and the model is known, as that model's
    parameters. Ends with exit code 6 where there is a difference.
    """
    from spmd_infer.checkpoints.comparing import compare
    from spmd_infer.demo import open_source
    from spmd_infer.progress import progress

    left, right = _comparable(open_source(a), open_source(b))
    total = sum(info.nbytes for info in left.tensors.values())
    with progress("compare", total, quiet=as_json, unit="B") as advance:
        found = compare(left, right, advance=advance)
    if as_json:
        print_json({"equal": not found, "differences": [difference.to_dict() for difference in found]})
    else:
        for each in found:
            line = f"{each.name}: {each.what}"
            if each.what == "values":
                line += (
                    f" differ in {each.differing} of {each.size} elements, first at {list(each.first)}, by at most "
                    f"{each.largest:.4g}, {each.relative:.3g} of their root mean square"
                )
                if each.a != each.b:
                    line += f"; {each.a} and {each.b}"
            elif each.a and each.b:
                line += f" differs: {each.a} and {each.b}"
            else:
                line += f": {each.a or each.b}"
            typer.echo(line)
        names = left.tensors.keys() | right.tensors.keys()
        note(f"{len(found)} of {len(names)} tensors differ" if found else f"all {len(names)} tensors are the same")
    if found:
        raise typer.Exit(DIFFERENT)


def _comparable(left: Reader, right: Reader) -> tuple[Reader, Reader]:
    """Two checkpoints as they are where their tensors have the same names, else as their models' parameters."""
    if left.tensors.keys() == right.tensors.keys():
        return left, right
    from spmd_infer.conversion import subject

    found = subject(left), subject(right)
    if any(each.opened is None for each in found):
        return left, right
    return found[0].reader, found[1].reader


def _layout(reader: Reader, mesh: str | None, hosts: int) -> tuple[dict[str, Any], Any]:
    """Logical axes, and the layout that was asked for; only then is the model's family looked up."""
    from spmd_infer.checkpoints.native_reader import NativeReader

    axes: dict[str, Any] = dict(reader.axes) if isinstance(reader, NativeReader) else {}
    if mesh is None:
        return axes, None
    from spmd_infer.axes import AxisRules
    from spmd_infer.checkpoints.mesh_boxes import MeshLayout, layers_of
    from spmd_infer.conversion import stored_subject, subject
    from spmd_infer.mesh import MeshSpec

    said = stored_subject(reader)
    found = said or subject(reader)
    if found.opened is not None:
        # The model's axes under the names that the tensors have here, where their dimensions are the same.
        for path, source in found.opened.table.items():
            named = found.axes.get(path)
            if named is not None and source.transpose is None and source.name in reader.tensors:
                axes[source.name] = named
    elif said is None:
        note(f"tensors are split by their shapes alone: {found.note}")
    rules = AxisRules().with_units(found.model.units)
    return axes, MeshLayout(MeshSpec.parse(mesh), hosts, rules, layers_of(reader.tensors))


def _print(overview: Overview, depth: int, *, every: bool) -> None:
    from spmd_infer.checkpoints.inspecting import dtype_bytes, lines_of
    from spmd_infer.checkpoints.treemap import size_text

    typer.echo(
        f"{overview.path}: {overview.stored}, {overview.architecture or 'no architecture named'}, "
        f"{len(overview.rows)} tensors, {overview.parameters / 1e6:,.1f} million parameters, "
        f"{size_text(overview.nbytes)}"
    )
    dtypes = dtype_bytes(overview.rows)
    typer.echo("stored as " + ", ".join(f"{name} {size_text(count)}" for name, count in dtypes.items()))
    if overview.host_bytes:
        each = ", ".join(f"host {host} {size_text(count)}" for host, count in enumerate(overview.host_bytes))
        typer.echo(f"on the mesh: {each}; {size_text(overview.device_bytes)} on the fullest device")
    typer.echo("")
    if every:
        _print_tensors(overview)
        return
    rows = [("  " * indent + node.name, node) for indent, node in lines_of(overview.tree, depth)]
    width = max((len(name) for name, _ in rows), default=0)
    for name, node in rows:
        share = node.nbytes / max(1, overview.nbytes)
        typer.echo(f"{name:<{width}}  {node.tensors:>6} tensors  {size_text(node.nbytes):>9}  {share:>6.1%}")


def _print_tensors(overview: Overview) -> None:
    from spmd_infer.checkpoints.treemap import size_text

    table = [("tensor", "shape", "dtype", "stored as", "bytes", "axes", "pieces")]
    for row in overview.rows:
        axes = "" if row.axes is None else ", ".join(axis or "-" for axis in row.axes)
        pieces = f"{row.split} × {list(row.piece)}" if row.split > 1 else "whole"
        shape, info = str(list(row.info.shape)), row.info
        table.append((info.name, shape, info.dtype.name, info.stored_as, size_text(info.nbytes), axes, pieces))
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for line in table:
        typer.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
