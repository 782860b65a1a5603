"""``spmd-infer embed``: texts to vectors, or to a ranking."""

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
from spmd_infer.cli.reading import read_texts


def embed(
    model: Model,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; without any, lines of standard input.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="File with one text a line.",
            show_default=False,
        ),
    ] = None,
    query: Annotated[
        str | None, typer.Option(help="Rank the texts by their similarity to this one.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the vectors to this .npz file.", show_default=False),
    ] = None,
    mesh: Mesh = "auto",
    devices: Devices = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    verify: Verify = VerifyLevel.FULL,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Turn texts into vectors, or rank them.

    Vectors have length one. With --query, the texts are listed by their cosine similarity to it, best first.
    """
    if output is not None and output.suffix != ".npz":
        raise typer.BadParameter(f"{output} must end in .npz", param_hint="--output")
    found = read_texts(texts, file, "texts")
    engine = load(model, mesh, devices, dtype, verify=verify, quantize=quantize, quiet=as_json)
    begin = time.perf_counter()
    vectors = engine.embed(found if query is None else [query, *found])
    seconds = time.perf_counter() - begin
    scores = None
    if query is not None:
        scores, vectors = vectors[1:] @ vectors[0], vectors[1:]
    if output is not None:
        from spmd_infer.cli.infer import write_npz

        write_npz(output, {"embeddings": vectors})

    if as_json:
        rows = [
            {"index": index, "text": text}
            | ({"score": float(scores[index])} if scores is not None else {})
            | ({"embedding": vectors[index]} if output is None and scores is None else {})
            for index, text in enumerate(found)
        ]
        print_json(
            {**run_facts(engine, seconds), "width": int(vectors.shape[1]), "texts": rows}
            | ({"written": str(output)} if output else {})
        )
        return
    if scores is not None:
        for index in (-scores).argsort(kind="stable"):
            typer.echo(f"{scores[index]:7.4f}  {found[index]}")
    elif output is None:
        for text, vector in zip(found, vectors, strict=True):
            typer.echo(" ".join(f"{value:.6f}" for value in vector) + f"\t{text}")
    note(
        f"{len(found)} texts, {vectors.shape[1]} wide, {timing(engine, seconds)}"
        + (f"; written to {output}" if output else "")
    )
