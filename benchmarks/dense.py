"""What products cost by the weights' numbers, what fusing projections brings, and SmolLM2 in float32 and int8.

    python benchmarks/dense.py [products] [fusion] [model] [--rounds N] [--json FILE]

Everything is timed in turns, one call of each per round; figures are median milliseconds, the least in brackets.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import spmd_infer as si
from spmd_infer.models.dense import dense, quantise_weight, rotate

WIDTH, OUT = 2048, 8192
ROWS = (1, 4, 8, 16, 64, 512)
# SmolLM2-135M: residual, queries, keys (and values), hidden, layers.
EMBED, QUERIES, KEYS, HIDDEN, LAYERS = 576, 576, 192, 1536, 30

Timed = dict[str, tuple[float, float]]


def in_turns(calls: Mapping[str, Callable[[], Any]], rounds: int) -> Timed:
    """Median and least milliseconds of each call."""
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - began)
    return {name: (statistics.median(found) * 1e3, min(found) * 1e3) for name, found in seconds.items()}


def weights(rng: np.random.Generator, out: int, width: int, kind: str) -> tuple[jax.Array, ...]:
    values = jnp.asarray(rng.standard_normal((out, width), np.float32) * 0.02)
    if kind in ("float32", "bfloat16"):
        return (values.astype(kind),)
    return quantise_weight(values, kind, 64)


def products(rounds: int) -> dict[str, Timed]:
    """One product of M rows with a weight of 2048 x 8192."""
    rng = np.random.default_rng(0)
    kinds = {kind: weights(rng, OUT, WIDTH, kind) for kind in ("float32", "bfloat16", "int8", "int4", "fp8")}
    found = {}
    for rows in ROWS:
        x = jnp.asarray(rng.standard_normal((rows, WIDTH), np.float32))
        calls: dict[str, Callable[[], Any]] = {}
        for kind, arguments in kinds.items():
            compiled = jax.jit(dense).lower(x, *arguments).compile()
            calls[kind] = partial(compiled, x, *arguments)
        calls |= torch_products(np.array(x), np.array(kinds["float32"][0]))
        found[f"M={rows}"] = in_turns(calls, rounds)
    return found


def torch_products(x: Any, weight: Any) -> dict[str, Callable[[], Any]]:
    """The same with torch, if it is installed."""
    try:
        import torch  # noqa: TID251 - a peer, where it is installed
    except ImportError:
        return {}
    calls: dict[str, Callable[[], Any]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.from_numpy(x).to(dtype), torch.from_numpy(weight).to(dtype)
        calls[f"torch {str(dtype).removeprefix('torch.')}"] = partial(torch.nn.functional.linear, left, right)
    return calls


def fusion(rounds: int) -> dict[str, Timed]:
    """The projections of SmolLM2's layers, queries, keys and values (and gate and up) one by one or as one product.

    Fused rows of queries, keys and values lie by key head, as a split over heads would need them.
    """
    rng = np.random.default_rng(0)
    found = {}
    for kind in ("float32", "int8"):
        sizes = [(QUERIES, EMBED), (KEYS, EMBED), (KEYS, EMBED), (EMBED, QUERIES)]
        sizes += [(HIDDEN, EMBED), (HIDDEN, EMBED), (EMBED, HIDDEN)]
        layers = [[weights(rng, *size, kind) for size in sizes] for _ in range(LAYERS)]
        fused = [
            [
                tuple(map(jnp.concatenate, zip(*parts, strict=True)))
                for parts in (layer[:3], layer[3:4], layer[4:6], layer[6:])
            ]
            for layer in layers
        ]
        for rows in (1, 8, 32, 512):
            x = jnp.asarray(rng.standard_normal((rows, EMBED), np.float32))
            calls: dict[str, Callable[[], Any]] = {}
            for name, whole in (("separate", layers), ("fused", fused)):
                compiled = jax.jit(partial(through, rotated=kind == "int8")).lower(whole, x).compile()
                calls[name] = partial(compiled, whole, x)
            found[f"{kind}, {rows} rows"] = in_turns(calls, rounds)
    return found


def through(layers: list[list[tuple[jax.Array, ...]]], x: jax.Array, *, rotated: bool) -> jax.Array:
    """Pass rows through layers whose attention is a product of each head with its own key."""
    block = 64 if rotated else 0

    def project(y: jax.Array, parts: list[tuple[jax.Array, ...]]) -> list[jax.Array]:
        return [dense(rotate(y, block), *part) for part in parts]

    for layer in layers:
        y = normed(x)
        if len(layer) == 4:
            (both,) = project(y, layer[:1])
            heads = both.reshape(len(x), 3, 5, 64)
            query, key, value = heads[:, :, :3], heads[:, :, 3:4], heads[:, :, 4:5]
        else:
            q, k, v = project(y, layer[:3])
            query, key, value = q.reshape(-1, 3, 3, 64), k.reshape(-1, 3, 1, 64), v.reshape(-1, 3, 1, 64)
        mixed = jax.nn.sigmoid((query * key).sum(-1, keepdims=True)) * value
        x = x + project(mixed.reshape(len(x), -1), layer[-3:-2] if len(layer) == 4 else layer[3:4])[0]
        y = normed(x)
        if len(layer) == 4:
            gate, up = jnp.split(project(y, layer[2:3])[0], 2, axis=-1)
        else:
            gate, up = project(y, layer[4:6])
        x = x + project(jax.nn.silu(gate) * up, layer[-1:])[0]
    return x


def normed(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)


def model(rounds: int) -> dict[str, dict[str, float]]:
    """Tokens per second of the whole model, prompts of 512 tokens."""
    formats = {"float32": None, "int8": "int8"}
    engines = {
        name: si.Engine.load("demo:smollm2", mesh="data=1", dtype="float32", quantize=quantize)
        for name, quantize in formats.items()
    }
    rng = np.random.default_rng(0)
    found: dict[str, dict[str, float]] = {}
    for rows in (1, 8, 32):
        prompts = rng.integers(100, 40_000, (rows, 512)).tolist()
        params = si.SamplingParams(max_tokens=17, ignore_eos=True)
        runs: dict[str, list[list[Any]]] = {name: [] for name in engines}
        for turn in range(rounds + 1):
            for name, engine in engines.items():
                completions = engine.generate(prompts, params)
                if turn:  # the first compiles
                    runs[name].append(completions)
        for name, each in runs.items():
            first = statistics.median(max(c.ttft_s for c in run) for run in each)
            after = statistics.median(min(c.decode_tokens_per_s for c in run) for run in each)
            rates = found.setdefault(name, {})
            rates |= {f"prefill {rows} x 512": rows * 512 / first, f"decode {rows} rows": rows * after}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["products", "fusion", "model"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = jax.devices()[0]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {device.device_kind}, jax {jax.__version__}"
    print(f"{machine}; load {os.getloadavg()[0]:.1f}")
    results: dict[str, Any] = {}
    for name, part in (("products", products), ("fusion", fusion)):
        if name not in options.parts:
            continue
        results[name] = part(options.rounds)
        for case, timed in results[name].items():
            said = "  ".join(f"{kind} {median:.2f} ({least:.2f})" for kind, (median, least) in timed.items())
            print(f"{case}: {said}", flush=True)
    if "model" in options.parts:
        results["model"] = model(max(2, options.rounds // 5))
        for case, rates in results["model"].items():
            print(f"{case}, tokens/s: " + ", ".join(f"{what} {rate:.1f}" for what, rate in rates.items()))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
