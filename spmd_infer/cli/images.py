"""``spmd-infer classify``: what is in a picture."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from spmd_infer.cli.options import (
    Debug,
    Devices,
    Dtype,
    Json,
    Mesh,
    Model,
    Quantize,
    Verify,
    VerifyLevel,
    load,
    note,
    print_json,
    run_facts,
    timing,
)


def classify(
    model: Model,
    images: Annotated[
        list[Path], typer.Argument(exists=True, dir_okay=False, help="Picture files, such as JPEG and PNG.")
    ],
    top: Annotated[int, typer.Option(min=1, help="How many labels to show for each picture.")] = 5,
    mesh: Mesh = "auto",
    devices: Devices = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    verify: Verify = VerifyLevel.FULL,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Name what pictures show, best guess first."""
    engine = load(model, mesh, devices, dtype, verify=verify, quantize=quantize, quiet=as_json)
    begin = time.perf_counter()
    answers = engine.classify(images, top=top)
    seconds = time.perf_counter() - begin

    if as_json:
        print_json(
            {
                **run_facts(engine, seconds),
                "images": [
                    {
                        "path": str(image),
                        "labels": [
                            {"index": label.index, "name": label.name, "score": label.score} for label in labels
                        ],
                    }
                    for image, labels in zip(images, answers, strict=True)
                ],
            }
        )
        return
    for image, labels in zip(images, answers, strict=True):
        typer.echo(str(image))
        for label in labels:
            typer.echo(f"  {label.score:7.2%}  {label.index:5d}  {label.name or ''}".rstrip())
    note(f"{len(images)} pictures, {timing(engine, seconds)}")
