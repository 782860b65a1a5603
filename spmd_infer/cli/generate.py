"""``spmd-infer generate``: continue prompts."""

from __future__ import annotations

import sys
import time
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
from spmd_infer.cli.reading import read_texts

if TYPE_CHECKING:
    from collections.abc import Callable

    from spmd_infer.generation.generation_options import GenerationOptions
    from spmd_infer.generation.speculation import PromptLookup


_NONE = "none"


def generate(
    model: Model,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; without any, lines of standard input.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="File with one prompt a line.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="At most so many new tokens for each prompt.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among so many likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample among tokens of this total probability.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.", show_default=False)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write a trace of where the time went, for Perfetto, to this file.", show_default=False),
    ] = None,
    speculate: Annotated[
        str | None,
        typer.Option(
            metavar="ngram[:K]",
            help="Try K drafts a step, 4 by default, from what followed in the text before; the tokens stay the same.",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="Load a LoRA adapter, as PEFT saves it; may be repeated."),
    ] = None,
    use: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|none",
            help="The adapter of all prompts, or given once for each; not needed with one --adapter for all.",
        ),
    ] = None,
    warm_up: Annotated[
        bool, typer.Option("--warm-up", help="Compile every program before the prompts are run, several at a time.")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")] = False,
    mesh: Mesh = "auto",
    devices: Devices = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    cache_dtype: CacheDtype = "auto",
    verify: Verify = VerifyLevel.FULL,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue prompts; one prompt streams as it is written."""
    found = read_texts(prompts, file, "prompts")
    drafts = None if speculate is None else _speculation(speculate)
    folders = _adapter_folders(adapter or [])
    uses = _uses(use or [], list(folders), len(found))
    engine = load(model, mesh, devices, dtype, verify=verify, quantize=quantize, quiet=as_json)
    from spmd_infer import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
    )
    if drafts is not None or cache_dtype != "auto" or folders:
        engine.task("generate", _options(drafts, cache_dtype, folders))
    for name, folder in folders.items():
        engine.load_adapter(name, folder)
    if warm_up:
        done = engine.task("generate").warm_up_for(found, params, chat=chat, adapter=uses, quiet=as_json)
        note(f"{done.programs} programs compiled in {done.seconds:.1f} s")
    if trace is not None:
        from spmd_infer.generation.trace import Trace

        engine.task("generate").loop.trace = Trace()
    begin = time.perf_counter()
    told = None if as_json else _printer(found, chat)
    completions = engine.generate(found, params, chat=chat, adapter=uses, on_text=told)
    seconds = time.perf_counter() - begin
    if trace is not None:
        engine.task("generate").loop.trace.write(trace)
    new = sum(len(completion.token_ids) for completion in completions)

    if as_json:
        print_json(
            {
                **run_facts(engine, seconds),
                "completions": [
                    {
                        "prompt": prompt,
                        "text": completion.text,
                        "token_ids": completion.token_ids,
                        "finish_reason": completion.finish_reason,
                        "adapter": name,
                        "prompt_tokens": completion.prompt_tokens,
                        "drafted_tokens": completion.drafted_tokens,
                        "accepted_tokens": completion.accepted_tokens,
                        "ttft_s": completion.ttft_s,
                        "decode_tokens_per_s": completion.decode_tokens_per_s,
                    }
                    for prompt, name, completion in zip(found, uses, completions, strict=True)
                ],
            }
        )
        return
    if len(found) == 1:
        typer.echo("")
    else:
        for prompt, completion in zip(found, completions, strict=True):
            typer.echo(f"{prompt}\n{completion.text}\n" if chat else f"{prompt}{completion.text}\n")
    drafted = sum(completion.drafted_tokens for completion in completions)
    accepted = sum(completion.accepted_tokens for completion in completions)
    right = f", {accepted} of {drafted} drafts right" if drafts is not None else ""
    note(f"{new} tokens: {timing(engine, seconds)}{right}")


def _adapter_folders(asked: list[str]) -> dict[str, Path]:
    """The folder of each adapter by its name."""
    from spmd_infer.errors import TaskError

    folders: dict[str, Path] = {}
    for each in asked:
        name, equals, folder = each.partition("=")
        if not (name and equals and folder) or name == _NONE or name in folders:
            raise TaskError(f"--adapter takes NAME=FOLDER, each name once and none of them {_NONE!r}; got {each!r}")
        folders[name] = Path(folder)
    return folders


def _uses(asked: list[str], names: list[str], prompts: int) -> list[str | None]:
    """Which adapter each prompt uses."""
    from spmd_infer.errors import TaskError

    if not asked:
        if len(names) > 1:
            raise TaskError(f"say with --use which of the adapters {', '.join(names)} the prompts use")
        asked = names or [_NONE]
    unknown = next((name for name in asked if name not in (*names, _NONE)), None)
    if unknown is not None:
        raise TaskError(f"--use {unknown}: there is no such adapter; given are {', '.join(names) or 'none'}")
    if len(asked) not in (1, prompts):
        raise TaskError(f"there are {prompts} prompts but {len(asked)} --use; give one for all, or one for each")
    each = asked * prompts if len(asked) == 1 else asked
    return [None if name == _NONE else name for name in each]


def _options(drafts: PromptLookup | None, cache_dtype: str, folders: dict[str, Path]) -> GenerationOptions:
    """With room for these adapters."""
    from spmd_infer import GenerationOptions
    from spmd_infer.checkpoints.lora import LoraAdapter

    adapters = [LoraAdapter.open(folder) for folder in folders.values()]
    ranks = [adapter.rank(part) for adapter in adapters for part in adapter.parts]
    return GenerationOptions(
        speculation=drafts,
        cache_dtype=cache_dtype,
        max_adapters=max(1, len(folders)),
        max_adapter_rank=max(ranks, default=1),
    )


def _speculation(asked: str) -> PromptLookup:
    from spmd_infer.errors import TaskError
    from spmd_infer.generation.speculation import PromptLookup

    kind, _, count = asked.partition(":")
    if kind != "ngram" or not (count or "4").isdecimal():
        raise TaskError(f"--speculate takes ngram or ngram:K, such as ngram:4, not {asked!r}")
    return PromptLookup(k=int(count or 4))


def _printer(prompts: list[str], chat: bool) -> Callable[[int, str], None] | None:
    """Writes text as it comes; several prompts would mix, so only for one."""
    if len(prompts) > 1:
        return None
    if not chat:
        sys.stdout.write(prompts[0])
        sys.stdout.flush()

    def write(_: int, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    return write
