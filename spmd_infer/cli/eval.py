"""``spmd-infer eval``: how good a model's answers are, in the format and on the mesh that it runs with."""

from __future__ import annotations

import time
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spmd_infer.cli.options import (
    CacheDtype,
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

if TYPE_CHECKING:
    from spmd_infer.bench.accuracy import Correlation, Hits, Perplexity
    from spmd_infer.engine import Engine


class Measure(StrEnum):
    """What is measured."""

    PERPLEXITY = "perplexity"
    SIMILARITY = "similarity"
    CLASSIFICATION = "classification"


_OF_TASK = {"generate": Measure.PERPLEXITY, "embed": Measure.SIMILARITY, "classify": Measure.CLASSIFICATION}


def evaluate(
    model: Model,
    task: Annotated[
        Measure | None,
        typer.Option(help="What to measure; by default what the model is for.", show_default=False),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Text for perplexity.", show_default=False),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(
            min=1, help="Score so many windows from the text's beginning; by default all.", show_default=False
        ),
    ] = None,
    window_len: Annotated[
        int, typer.Option(min=2, help="Tokens in a window; each is scored by itself, from its second token.")
    ] = 511,
    pairs: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Sentence pairs for similarity, columns split by tabs as in STS-B: score in the fifth, sentences "
            "after it. By default demo:sts-b.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder of pictures for classification, each in a folder named by its class number or with the number "
            "at the end of its name, as in dog_12.jpg. By default demo:imagenet.",
            show_default=False,
        ),
    ] = None,
    mesh: Mesh = "auto",
    devices: Devices = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    cache_dtype: CacheDtype = "auto",
    verify: Verify = VerifyLevel.FULL,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure accuracy: perplexity, similarity or classification."""
    engine = load(model, mesh, devices, dtype, verify=verify, quantize=quantize, quiet=as_json)
    from spmd_infer.errors import TaskError

    own = _OF_TASK.get(engine.family.task) if engine.family is not None else None
    wanted = task or own
    if wanted is None or wanted is not own:
        raise TaskError(f"{model} is measured by {own}, not by {task}" if own else f"{model} cannot be measured")
    if cache_dtype != "auto":
        if wanted is not Measure.PERPLEXITY:
            raise TaskError(f"--cache-dtype is of models that generate; {model} keeps no keys and values")
        from spmd_infer.generation.generation_options import GenerationOptions

        engine.task("generate", GenerationOptions(cache_dtype=cache_dtype))
    begin = time.perf_counter()
    found = _measured(engine, wanted, text, windows, window_len, pairs, images)
    seconds = time.perf_counter() - begin
    if as_json:
        weights = sum(weight.nbytes for weight in engine.params.values())
        facts = {"quantize": quantize, "cache_dtype": cache_dtype, "dtype": str(engine.dtype), "weight_bytes": weights}
        print_json({**run_facts(engine, seconds), **facts, "task": wanted.value, **asdict(found)})
        return
    typer.echo(_words(found))
    note(timing(engine, seconds))


def _measured(
    engine: Engine,
    task: Measure,
    text: Path | None,
    windows: int | None,
    window_len: int,
    pairs: Path | None,
    images: Path | None,
) -> Perplexity | Correlation | Hits:
    from spmd_infer.bench import accuracy
    from spmd_infer.demo import demo_path

    if task is Measure.PERPLEXITY:
        if text is None:
            raise typer.BadParameter("perplexity is measured on a text: give one with --text", param_hint="--text")
        content = text.read_text(encoding="utf-8")
        return accuracy.perplexity(engine, content, windows=windows, window_len=window_len)
    if task is Measure.SIMILARITY:
        return accuracy.correlation(engine, accuracy.read_pairs(pairs or demo_path("demo:sts-b")))
    if images is None:
        from spmd_infer.demo import imagenet_pictures

        return accuracy.hits(engine, imagenet_pictures())
    return accuracy.hits(engine, accuracy.labelled_pictures(images))


def _words(found: Perplexity | Correlation | Hits) -> str:
    from spmd_infer.bench import accuracy

    if isinstance(found, accuracy.Perplexity):
        return (
            f"perplexity {found.perplexity:.3f} ({found.tokens:,} tokens in {found.windows:,} windows of "
            f"{found.window_len:,})"
        )
    if isinstance(found, accuracy.Correlation):
        return f"Spearman {100 * found.spearman:.2f} ({found.pairs:,} pairs)"
    return f"top-1 {found.top1:.1%}, top-5 {found.top5:.1%} ({found.pictures:,} pictures)"
