"""``spmd-infer convert``: a checkpoint in another format, dtype or precision, or with an adapter merged."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from spmd_infer.cli.checkpoint_options import DryRun, Overwrite, QkvOption, Source, Target, copy
from spmd_infer.cli.options import Debug, Json, Verify, VerifyLevel


class Format(StrEnum):
    """What can be written."""

    NATIVE = "native"
    HUGGINGFACE = "huggingface"


class Kind(StrEnum):
    """How weights can be quantised."""

    INT8 = "int8"
    FP8 = "fp8"
    INT4 = "int4"


class Head(StrEnum):
    """What can be done to the output projection."""

    TIE = "tie"
    UNTIE = "untie"


def convert(
    source: Source,
    target: Target,
    to: Annotated[Format, typer.Option(help="Format to write.")] = Format.NATIVE,
    dtype: Annotated[
        str | None, typer.Option(help="Store floats as float32, bfloat16 or float16.", show_default=False)
    ] = None,
    quantise: Annotated[
        Kind | None,
        typer.Option(
            help="Store weights as small numbers with scales: int8 and fp8 by channel, int4 in groups.",
            show_default=False,
        ),
    ] = None,
    group: Annotated[int, typer.Option(min=2, help="Numbers that share a scale, for int4.")] = 64,
    lora: Annotated[
        Path | None, typer.Option(help="Folder of a PEFT adapter to merge into the weights.", show_default=False)
    ] = None,
    qkv: QkvOption = None,
    head: Annotated[
        Head | None, typer.Option(help="Tie the output projection to the embedding, or untie it.", show_default=False)
    ] = None,
    verify: Verify = VerifyLevel.FULL,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a checkpoint in another format, dtype or precision.

    Reads Hugging Face folders, GGUF, PyTorch state dicts and native checkpoints; writes native ones and Hugging Face
    folders. Streams tensor by tensor, takes up a run that was killed, and reads again what it wrote.
    """
    from spmd_infer.checkpoints.copying import Quantisation
    from spmd_infer.conversion import Changes, prepare
    from spmd_infer.demo import open_source

    changes = Changes(
        dtype,
        Quantisation(quantise.value, group) if quantise else None,
        lora,
        qkv.value if qkv else None,
        head.value if head else None,
    )
    made = prepare(open_source(source, verify.value), changes, to=to.value)
    copy(
        made,
        target,
        "convert",
        untold="tensors keep their names",
        facts={"format": to.value},
        dry_run=dry_run,
        overwrite=overwrite,
        as_json=as_json,
    )
