"""Options and figures that the verbs for checkpoints share."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spmd_infer.cli.options import note

if TYPE_CHECKING:
    from spmd_infer.checkpoints import Reader
    from spmd_infer.conversion import Conversion

Source = Annotated[str, typer.Argument(help="Checkpoint, or demo:NAME.", show_default=False)]
Target = Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there, once the new one is whole.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and stop.")]
Fast = Annotated[
    str,
    typer.Option(
        "--verify",
        help="How native checkpoints are checked while they are read: full, or fast (sizes and a sample).",
        envvar="SPMD_INFER_VERIFY",
    ),
]

_PROBE_BYTES = 64 << 20


def open_source(source: str, verify: str = "full") -> Reader:
    """Open a checkpoint or demo.

    Raises:
        CheckpointError: it is damaged, or is no checkpoint.
    """
    from spmd_infer.checkpoints import open_checkpoint
    from spmd_infer.demo import PREFIX, demo_path

    if verify not in ("full", "fast"):
        raise typer.BadParameter(f"{verify!r} is neither full nor fast", param_hint="--verify")
    return open_checkpoint(demo_path(source) if source.startswith(PREFIX) else source, verify=verify)  # type: ignore[arg-type]  # checked above


def measured_rates(folder: Path) -> dict[str, float]:
    """Bytes per second that the disk writes and that one core digests, from a short trial in the target's folder."""
    import hashlib
    import tempfile

    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    block = os.urandom(1 << 20) * 4
    begin = time.perf_counter()
    digest = hashlib.sha256()
    for _ in range(_PROBE_BYTES // len(block)):
        digest.update(block)
    digests = _PROBE_BYTES / (time.perf_counter() - begin)
    begin = time.perf_counter()
    with tempfile.TemporaryFile(dir=existing) as file:
        for _ in range(_PROBE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return {"write": _PROBE_BYTES / (time.perf_counter() - begin), "digest": digests}


def prediction(conversion: Conversion, target: Path) -> dict[str, Any]:
    """What a conversion will take: memory, time and disk."""
    plan, rates = conversion.plan, measured_rates(target)
    existing = next(place for place in (target, *target.absolute().parents) if place.exists())
    return {
        "tensors": plan.tensors,
        "read_bytes": plan.read_bytes,
        "disk_bytes": plan.write_bytes,
        "free_bytes": shutil.disk_usage(existing).free,
        "largest_tensor_bytes": plan.largest_bytes,
        "peak_memory_bytes": plan.peak_bytes,
        # The source's pages may be cached or not: its disk is taken to be as fast as the target's.
        "seconds": plan.seconds(rates["digest"], min(rates["write"], rates["digest"]), rates["digest"]),
    }


def describe(figures: dict[str, Any]) -> str:
    """A prediction in words."""
    from spmd_infer.checkpoints.treemap import size_text

    return (
        f"{figures['tensors']} tensors, {size_text(figures['read_bytes'])} to read; takes "
        f"{size_text(figures['disk_bytes'])} of disk ({size_text(figures['free_bytes'])} free), at most "
        f"{size_text(figures['peak_memory_bytes'])} of memory (largest tensor "
        f"{size_text(figures['largest_tensor_bytes'])}), about {figures['seconds']:.0f} s"
    )


def carry_out(conversion: Conversion, target: Path, what: str, *, overwrite: bool, quiet: bool) -> dict[str, Any]:
    """Run a conversion with progress; returns its figures."""
    from spmd_infer.progress import progress

    plan = conversion.plan
    begin = time.perf_counter()
    with progress(what, plan.read_bytes + plan.write_bytes, quiet=quiet, unit="B") as advance:
        conversion.run(target, what, overwrite=overwrite, advance=advance)
    seconds = time.perf_counter() - begin
    if not quiet:
        note(
            f"{target}: {plan.tensors} tensors, {plan.write_bytes / 1e6:.1f} MB, written and checked in {seconds:.1f} s"
        )
    return {"written": str(target), "tensors": plan.tensors, "bytes": plan.write_bytes, "seconds": seconds}
