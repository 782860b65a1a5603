"""Options that the verbs for checkpoints share, and the way that convert and reshard go."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spmd_infer.cli.options import note, print_json

if TYPE_CHECKING:
    from spmd_infer.checkpoints.shares import Share
    from spmd_infer.conversion import Conversion

Source = Annotated[str, typer.Argument(help="Checkpoint, or demo:NAME.", show_default=False)]
Target = Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there, once the new one is whole.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Try a part of it, say what all of it would take, and stop.")]


class Qkv(StrEnum):
    """What can be done to query, key and value projections."""

    FUSE = "fuse"
    SPLIT = "split"


QkvOption = Annotated[
    Qkv | None, typer.Option("--qkv", help="Join or separate query, key and value projections.", show_default=False)
]

_TRIAL_BYTES = 256 << 20


def copy(
    made: Conversion,
    target: Path,
    what: str,
    *,
    untold: str,
    facts: dict[str, Any],
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    share: Share | None = None,
) -> None:
    """Say what a conversion takes and, unless that was all that was asked for, carry it out with progress.

    Args:
        made: the conversion.
        target: the new folder.
        what: what it is called in messages.
        untold: how it is done where the model's family is not known.
        facts: more for the JSON document.
        dry_run: only say what it takes.
        overwrite: replace what is there.
        as_json: print one JSON document instead of text.
        share: which of several processes this is.
    """
    if made.note and not as_json:
        note(f"{untold}: {made.note}")
    figures = prediction(made, target)
    if dry_run:
        figures["seconds"] = predicted_seconds(made, target)
    if not as_json:
        note(describe(figures))
    if dry_run:
        if as_json:
            print_json(figures)
        return
    done = carry_out(made, target, what, overwrite=overwrite, quiet=as_json, share=share)
    if as_json:
        print_json({**done, **facts, "predicted": figures})


def prediction(conversion: Conversion, target: Path) -> dict[str, Any]:
    """What a conversion will take of memory and disk."""
    from spmd_infer.checkpoints.target_folder import work_parent

    plan = conversion.plan
    return {
        "tensors": plan.tensors,
        "read_bytes": plan.read_bytes,
        "disk_bytes": plan.write_bytes,
        "free_bytes": shutil.disk_usage(work_parent(target)).free,
        "largest_tensor_bytes": plan.largest_bytes,
        "peak_memory_bytes": plan.peak_bytes,
    }


def predicted_seconds(conversion: Conversion, target: Path) -> float:
    """How long a conversion will take, from doing the same with a few of its tensors, now and in the same folders."""
    from spmd_infer.checkpoints.derived import DerivedReader, same
    from spmd_infer.checkpoints.target_folder import work_parent

    tensors = conversion.reader.tensors
    chosen, nbytes = [], 0
    # Large tensors show the rate, but not ones so large that the trial takes long.
    for name in sorted(tensors, key=lambda name: (tensors[name].nbytes > _TRIAL_BYTES, -tensors[name].nbytes)):
        if nbytes and nbytes + tensors[name].nbytes > _TRIAL_BYTES:
            continue
        chosen.append(name)
        nbytes += tensors[name].nbytes
    part = DerivedReader(conversion.reader, {name: same(conversion.reader, name) for name in tensors if name in chosen})
    with tempfile.TemporaryDirectory(prefix=".spmd-infer-trial-", dir=work_parent(target)) as folder:
        begin = time.perf_counter()
        replace(conversion, reader=part).run(Path(folder) / "trial", "trial")
        seconds = time.perf_counter() - begin
    return seconds * sum(info.nbytes for info in tensors.values()) / max(1, nbytes)


def describe(figures: dict[str, Any]) -> str:
    """A prediction in words."""
    from spmd_infer.checkpoints.treemap import size_text

    return (
        f"{figures['tensors']} tensors, {size_text(figures['read_bytes'])} to read; takes "
        f"{size_text(figures['disk_bytes'])} of disk ({size_text(figures['free_bytes'])} free), at most "
        f"{size_text(figures['peak_memory_bytes'])} of memory (largest tensor "
        f"{size_text(figures['largest_tensor_bytes'])})"
        + (f", about {figures['seconds']:.0f} s" if "seconds" in figures else "")
    )


def carry_out(
    conversion: Conversion, target: Path, what: str, *, overwrite: bool, quiet: bool, share: Share | None = None
) -> dict[str, Any]:
    """Run a conversion with progress; returns its figures."""
    from spmd_infer.progress import progress

    plan = conversion.plan
    parts = share.count if share else 1
    begin = time.perf_counter()
    with progress(what, plan.read_bytes // parts, quiet=quiet, unit="B") as advance:
        conversion.run(target, what, overwrite=overwrite, share=share, advance=advance)
    seconds = time.perf_counter() - begin
    if not quiet:
        whose = f"share {share.index} of {share.count} of " if share and share.index else ""
        note(
            f"{target}: {whose}{plan.tensors} tensors, {plan.write_bytes / 1e6:.1f} MB, written and checked in "
            f"{seconds:.1f} s"
        )
    return {"written": str(target), "tensors": plan.tensors, "bytes": plan.write_bytes, "seconds": seconds}
