"""``spmd-infer bench``: measure the devices at hand, and plan with the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from spmd_infer.cli.options import Debug, Json, note, print_json

if TYPE_CHECKING:
    from spmd_infer.bench.collectives import Links, Reading
    from spmd_infer.bench.device import DeviceFigures


class What(StrEnum):
    """What can be measured."""

    DEVICE = "device"
    COLLECTIVES = "collectives"


def bench(
    what: Annotated[
        What,
        typer.Argument(
            help="device: arithmetic and memory; collectives: communication.",
            metavar="device|collectives",
            show_default=False,
        ),
    ],
    devices: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Simulate only this many devices on the CPU.", show_default=False),
    ] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Write the result to the hardware table that plans are made with.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure what the devices of this machine reach.

    On a CPU each figure is that of 1, 2, 4 and 8 simulated devices running at once.
    """
    import jax

    from spmd_infer.bench.calibration import SIMULATED

    if devices is None and jax.default_backend() != "cpu":
        counts: tuple[int, ...] = ()  # the devices of this process
    else:
        counts = SIMULATED if devices is None else (devices,)
    if what is What.DEVICE:
        _device(counts, save, as_json)
    else:
        _collectives(counts, save, as_json)


def _device(counts: Sequence[int], save: bool, as_json: bool) -> None:
    from spmd_infer.bench.calibration import save_device, simulated_device
    from spmd_infer.bench.device import measure_device
    from spmd_infer.progress import progress

    found: list[DeviceFigures] = []
    with progress("measuring", len(counts) or 1, quiet=as_json) as advance:
        for count in counts or (0,):
            found.append(simulated_device(count) if count else measure_device())
            advance(1)
    saved = save_device(found) if save else None
    if as_json:
        print_json({"devices": [f.as_dict() for f in found], "saved": saved and {"entry": saved[0], "file": saved[1]}})
        return
    rows = [
        ("devices", *(f"{name} T/s" for name in found[0].flops), "experts T/s", "read GB/s", "copy GB/s", "a call us")
    ]
    rows += [
        (
            f"{f.count} {f.kind}",
            *(f"{rate / 1e12:.3g}" for rate in f.flops.values()),
            f"{f.experts / 1e12:.3g}" if f.experts else "-",
            f"{f.read / 1e9:.3g}",
            f"{f.copy / 1e9:.3g}",
            f"{f.call * 1e6:.3g}",
        )
        for f in found
    ]
    _table(rows)
    typer.echo("all devices of a row run at once; rates are those of all of them together")
    _say_saved(saved)


def _collectives(counts: Sequence[int], save: bool, as_json: bool) -> None:
    import jax

    from spmd_infer.bench.calibration import save_links, simulated_collectives
    from spmd_infer.bench.collectives import fit, measure_collectives
    from spmd_infer.errors import MeshError
    from spmd_infer.progress import progress

    several = [count for count in counts if count > 1]
    if (counts and not several) or (not counts and jax.device_count() < 2):
        raise MeshError("collectives need at least 2 devices to be measured")
    found: dict[int, list[Reading]] = {}
    with progress("measuring", len(several) or 1, quiet=as_json) as advance:
        for count in several or (0,):
            found[count or jax.device_count()] = simulated_collectives(count) if count else measure_collectives()
            advance(1)
    first = jax.devices()[0]
    platform, kind = ("cpu", "cpu") if several else (first.platform, first.device_kind)
    saved = save_links(platform, kind, found) if save else None
    links = {count: fit(readings) for count, readings in found.items()}
    if as_json:
        rows = [{"devices": count, **r.as_dict()} for count, readings in found.items() for r in readings]
        constants = [{"devices": count, **_constants(made)} for count, made in links.items()]
        print_json({"readings": rows, "links": constants, "saved": saved and {"entry": saved[0], "file": saved[1]}})
        return
    _table(_reading_rows(found))
    typer.echo("")
    for count, made in links.items():
        typer.echo(
            f"{count} {kind} devices: {made.latency * 1e6:.3g} us + {made.hop * 1e6:.3g} us a device, then "
            f"{made.link / 1e9:.3g} GB/s each, half of it at {made.half_size / 1e6:.3g} MB "
            f"(half of the readings are within {made.error:.0%})"
        )
    _say_saved(saved)


def _constants(made: Links) -> dict[str, float]:
    return {
        "link_bytes_s": made.link,
        "latency_s": made.latency,
        "hop_s": made.hop,
        "half_size_bytes": made.half_size,
        "median_error": made.error,
    }


def _reading_rows(found: Mapping[int, Sequence[Reading]]) -> Iterable[Sequence[str]]:
    yield ("devices", "collective", "group", "size", "time us", "GB/s each")
    for count, readings in found.items():
        for r in readings:
            size = f"{r.size >> 10} kB" if r.size < 1 << 20 else f"{r.size >> 20} MB"
            rate = f"{r.moved / r.seconds / 1e9:.3g}"
            yield (str(count), r.kind, str(r.group), size, f"{r.seconds * 1e6:.4g}", rate)


def _table(rows: Iterable[Sequence[str]]) -> None:
    cells = list(rows)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        typer.echo("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _say_saved(saved: tuple[str, object] | None) -> None:
    if saved is not None:
        note(f"saved as [{saved[0]}] in {saved[1]}; plans for these devices use it from now on")
