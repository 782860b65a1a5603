"""``spmd-infer infer``: arrays in, arrays out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spmd_infer.cli.options import (
    Debug,
    Devices,
    Dtype,
    Json,
    Mesh,
    Model,
    Verify,
    VerifyLevel,
    load,
    note,
    print_json,
    run_facts,
    timing,
)
from spmd_infer.errors import BatchError

if TYPE_CHECKING:
    import numpy.typing as npt

    from spmd_infer.engine import Engine

    Array = npt.NDArray[Any]


def infer(
    model: Model,
    batch: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help="A .npz file with one array for each input, or a .npy file where the model has one input.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the results to this .npz file.", show_default=False)
    ] = None,
    mesh: Mesh = "auto",
    devices: Devices = None,
    dtype: Dtype = None,
    verify: Verify = VerifyLevel.FULL,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a model on a file of arrays.

    Prints shape, dtype and range of each result, or writes the results to a file.
    """
    if output is not None and output.suffix != ".npz":
        raise typer.BadParameter(f"{output} must end in .npz", param_hint="--output")
    engine = load(model, mesh, devices, dtype, verify=verify, quiet=as_json)
    from spmd_infer.jobs.infer_rows import flatten

    inputs = read_batch(batch, engine)
    begin = time.perf_counter()
    results = flatten(engine.infer(inputs))
    seconds = time.perf_counter() - begin

    if output is not None:
        write_npz(output, results)
    rows = {name: summary(array) for name, array in results.items()}
    if as_json:
        print_json({**run_facts(engine, seconds), "outputs": rows} | ({"written": str(output)} if output else {}))
        return
    for name, row in rows.items():
        typer.echo("  ".join([name, row["dtype"], str(row["shape"]), *_range(row)]))
    note(f"{timing(engine, seconds)}" + (f"; written to {output}" if output else ""))


def read_batch(path: Path, engine: Engine) -> dict[str, Array]:
    """The inputs in a file, by name.

    Raises:
        BatchError: the file does not hold plain arrays, or does not say which input its one array is.
    """
    import numpy as np

    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.ndarray):
            with loaded:
                return {name: loaded[name] for name in loaded.files}
    except (ValueError, EOFError) as error:
        raise BatchError(f"{path} does not hold plain arrays in NumPy's .npz or .npy format: {error}") from error
    from spmd_infer.jobs.infer_rows import only_input

    return {only_input(engine, str(path)): loaded}


def write_npz(path: Path, arrays: dict[str, Array]) -> None:
    """Write arrays to a file that appears only when it is whole; bfloat16, which NumPy cannot store, as float32."""
    import numpy as np

    plain = {name: a.astype(np.float32) if a.dtype.name == "bfloat16" else a for name, a in arrays.items()}
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            np.savez(file, allow_pickle=False, **plain)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def summary(array: Array) -> dict[str, Any]:
    """Shape, dtype and range of a result."""
    import numpy as np

    row: dict[str, Any] = {"dtype": array.dtype.name, "shape": list(array.shape)}
    if array.size and array.dtype.kind in "fiuV":
        values = array.astype(np.float64)
        finite = values[np.isfinite(values)]
        row["not_finite"] = int(values.size - finite.size)
        if finite.size:
            row |= {"min": float(finite.min()), "mean": float(finite.mean()), "max": float(finite.max())}
    return row


def _range(row: dict[str, Any]) -> list[str]:
    parts = [f"{name} {row[name]:.4g}" for name in ("min", "mean", "max") if name in row]
    return parts + ([f"{row['not_finite']} not finite"] if row.get("not_finite") else [])
