"""Prefill and decode rates of a decoder, beside what else runs it and the limit that memory sets.

    python benchmarks/generation.py [--model demo:smollm2] [--variants float32,int8] [--peers] [--json FILE]
    python benchmarks/generation.py --shape llama-3.1-8b --variants bfloat16 --rows 1,32,128 --prompt 2048 --new 128

``--model`` is a checkpoint; ``--shape`` the shape of a well-known model, with random weights made on the devices.
``--peers`` adds transformers (torch), on the same weights, dequantised, where they are installed. Every round runs each
contender once, one after the other; the figures are medians.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

import spmd_infer as si
from spmd_infer.bench.device import measure_device
from spmd_infer.cli.app import app
from spmd_infer.functional import model_function
from spmd_infer.generation.detokenizer import ByteTable, Detokenizer
from spmd_infer.generation.generation_options import GenerationOptions
from spmd_infer.generation.loop import GenerationLoop
from spmd_infer.generation.requests import Request
from spmd_infer.models.registry import find_family
from spmd_infer.planning import known_models


@dataclass(frozen=True)
class Rates:
    """Tokens per second: of prompts, and of tokens after the first; and the host's share of a decode step."""

    prefill: float
    decode: float
    host: float = 0.0


Contender = Callable[[np.ndarray, int], Rates]
"""Takes prompts ``[rows, tokens]`` and how many tokens to add."""


def ours(engine: si.Engine, config: Any, most_rows: int) -> Contender:
    options = GenerationOptions(max_rows=most_rows, prefix_cache=False, token_budget=8192, max_chunk=2048)
    loop = GenerationLoop(engine, config, (), options)
    table = ByteTable([b""] * config.vocab_size, frozenset())

    def run(prompts: np.ndarray, new: int) -> Rates:
        params = si.SamplingParams(max_tokens=new, ignore_eos=True, seed=0)
        requests = [
            Request(
                str(row),
                prompt,
                params,
                ends=frozenset(),
                detokenizer=Detokenizer(table),
                vocab_size=config.vocab_size,
            )
            for row, prompt in enumerate(prompts.tolist())
        ]
        compiled = engine.compiles
        loop.times.clear()
        for request in requests:
            loop.submit([request])
        loop.run(requests)
        if engine.compiles > compiled:
            return run(prompts, new)  # that was the warm-up
        first = max(request.token_times[0] for request in requests) - requests[0].submitted
        last = max(request.token_times[-1] for request in requests) - requests[0].submitted
        return Rates(prompts.size / first, len(requests) * (new - 1) / (last - first), loop.times.host_share)

    return run


def transformers_peer(folder: Path, dtype: str) -> Contender:
    import torch  # noqa: TID251  # a peer
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()

    def run(prompts: np.ndarray, new: int) -> Rates:
        ids = torch.from_numpy(prompts.astype(np.int64)).to(device)

        def seconds(count: int) -> float:
            begin = time.perf_counter()
            with torch.inference_mode():
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    min_new_tokens=count,
                    max_new_tokens=count,
                )
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - begin

        first, whole = seconds(1), seconds(new)
        return Rates(prompts.size / first, len(prompts) * (new - 1) / (whole - first))

    return run


def checkpoint_contenders(model: str, variants: Sequence[str], peers: bool, most_rows: int) -> dict[str, Contender]:
    found: dict[str, Contender] = {}
    for variant in variants:
        quantised = variant in ("int8", "fp8", "int4")
        engine = si.Engine.load(model, **({"quantize": variant} if quantised else {"dtype": variant}))
        found[f"ours {variant}"] = ours(engine, engine.config, most_rows)
    if peers:
        folder = Path(tempfile.mkdtemp(prefix="spmd-infer-bench-")) / "model"
        app(["convert", model, str(folder), "--to", "huggingface", "--dtype", "float32"], standalone_mode=False)
        for dtype in ("float32", "bfloat16"):
            found[f"transformers {dtype}"] = transformers_peer(folder, dtype)
    return found


def shape_contenders(name: str, variants: Sequence[str], most_rows: int) -> dict[str, Contender]:
    described = known_models.find(name)
    if described is None:
        raise SystemExit(f"no model is called {name}; known are {', '.join(known_models.names())}")
    family, _ = find_family(described["architectures"][0], {})
    config: Any = family.config_from_hf(described)
    found: dict[str, Contender] = {}
    for dtype in variants:
        function = model_function(family.abstract(config))
        keys = iter(jax.random.split(jax.random.key(0), len(function.params)))
        params = {
            path: jax.jit(partial(_random, shape=p.shape, dtype=dtype))(next(keys))
            for path, p in function.params.items()
        }
        engine = si.Engine(function.with_params(params), inputs=family.input_spec(config))
        del params
        found[f"ours {dtype}"] = ours(engine, config, most_rows)
    return found


def _random(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return (jax.random.normal(key, shape) * 0.02).astype(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--shape")
    parser.add_argument("--variants", default="float32,int8")
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, variants = [int(text) for text in options.rows.split(",")], options.variants.split(",")
    if options.shape:
        contenders = shape_contenders(options.shape, variants, max(rows))
    else:
        contenders = checkpoint_contenders(options.model, variants, options.peers, max(rows))
    figures = measure_device()
    versions = [f"{name} {_version(name)}" for name in ("jax", "torch", "transformers") if _version(name)]
    machine = f"{figures.kind} x {figures.count}, {platform.machine()}, {os.cpu_count()} cores; {', '.join(versions)}"
    print(f"{machine}; reads {figures.read / 1e9:.1f} GB/s; load {os.getloadavg()[0]:.1f}\n")
    print(f"| rows x prompt + new | contender | prefill tok/s | decode tok/s | host share |\n|{'---|' * 5}")
    results = []
    for count in rows:
        prompts = np.random.default_rng(count).integers(100, 40_000, (count, options.prompt)).astype(np.int32)
        readings: dict[str, list[Rates]] = {name: [] for name in contenders}
        for _ in range(options.rounds):
            for name, run in contenders.items():
                readings[name].append(run(prompts, options.new))
        for name, found in readings.items():
            prefill, decode, host = (
                statistics.median(getattr(r, f) for r in found) for f in ("prefill", "decode", "host")
            )
            case = f"{count} x {options.prompt} + {options.new}"
            print(f"| {case} | {name} | {prefill:,.0f} | {decode:,.1f} | {host:.1%} |", flush=True)
            results.append({"case": case, "contender": name, "prefill": prefill, "decode": decode, "host": host})
    if options.json:
        said = {"machine": machine, "device": figures.as_dict(), "results": results}
        options.json.write_text(json.dumps(said, indent=1) + "\n")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()
