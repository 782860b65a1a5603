"""Prefill and decode rates of a decoder, beside what else runs it and the limit that memory sets.

    python benchmarks/generation.py [--model demo:smollm2] [--variants float32,int8] [--peers] [--json FILE]
    python benchmarks/generation.py --shape llama-3.1-8b --variants bfloat16,fp8 --rows 1,32,128 --peers

``--model`` is a checkpoint; ``--shape`` the shape of a well-known model, with random weights made on the devices;
``--tiny`` a shape small enough to try everything on a CPU in a minute. ``--peers`` adds transformers (torch) where
they are installed: on the same weights, dequantised, or on random ones of the same shape in bfloat16, with its static
cache, compiled, on a GPU; and for a GGUF file CTranslate2 and llama.cpp (``generation_peers.py``; then run this as
``python -m benchmarks.generation``). Every round runs each contender once, one after the other; figures are medians.

"of limit" is the part of what the devices' measured rates allow: for prompts the arithmetic of all projections, for
tokens after the first reading the weights and what the cache holds once for each step of all rows.
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
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np

import spmd_infer as si
from spmd_infer import demo
from spmd_infer.bench.device import DeviceFigures, measure_device
from spmd_infer.cli.app import app
from spmd_infer.functional import model_function
from spmd_infer.generation.detokenizer import ByteTable, Detokenizer
from spmd_infer.generation.generation_options import GenerationOptions
from spmd_infer.generation.kv_pages import PAGE_SIZE, page_bytes
from spmd_infer.generation.loop import GenerationLoop
from spmd_infer.generation.requests import Request
from spmd_infer.models.cache_formats import CacheFormat
from spmd_infer.models.quantised import FORMATS, WeightFormat, quantised
from spmd_infer.models.registry import Family, find_family
from spmd_infer.planning import known_models

TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 256,
    "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
}  # fmt: skip


PACKAGES = ("jax", "torch", "transformers", "ctranslate2", "llama-cpp-python")


@dataclass(frozen=True)
class Rates:
    """Tokens per second: of prompts, and of tokens after the first; and the host's share of a decode step."""

    prefill: float
    decode: float
    host: float = 0.0


@dataclass(frozen=True)
class Contender:
    """Something that generates.

    Attributes:
        run: takes prompts ``[rows, tokens]`` and how many tokens to add.
        weights: bytes that a step reads of them.
        products: numbers in them that each token is multiplied by.
        multiplied: dtype of the products, as ``DeviceFigures.flops`` names it.
        position: bytes of one position in the cache.
    """

    run: Callable[[np.ndarray, int], Rates]
    weights: int
    products: int
    multiplied: str
    position: int

    def limits(self, figures: DeviceFigures, rows: int, prompt: int, new: int) -> tuple[float, float]:
        """Tokens per second that the devices' rates allow: of prompts, and after the first token."""
        flops = figures.flops[self.multiplied]
        held = rows * (prompt + new / 2) * self.position
        step = max((self.weights + held) / figures.read, 2 * self.products * rows / flops)
        return flops / (2 * self.products), rows / step


def ours(engine: si.Engine, config: Any, most_rows: int, cache_dtype: str = "auto") -> Contender:
    options = GenerationOptions(
        max_rows=most_rows, prefix_cache=False, token_budget=8192, max_chunk=2048, cache_dtype=cache_dtype
    )
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

    tied = bool(getattr(config, "tie_embeddings", False))
    read = [w for path, w in engine.params.items() if w.ndim == 2 and (tied or not path.startswith("embed_tokens"))]
    widest = max(read, key=lambda weight: weight.nbytes).dtype
    multiplied = "int8" if widest == np.int8 else "float32" if widest == np.float32 else "bfloat16"
    fmt = CacheFormat.of(cache_dtype, jax.devices()[0].platform, np.result_type(engine.dtype))
    position = page_bytes(config, fmt) // PAGE_SIZE
    return Contender(run, sum(w.nbytes for w in read), sum(w.size for w in read), multiplied, position)


def transformers_peer(dtype: str, folder: Path | None = None, described: dict[str, Any] | None = None) -> Contender:
    """From a folder, or of a described shape with random weights."""
    import torch  # noqa: TID251  # a peer
    from transformers import AutoConfig, AutoModelForCausalLM

    on_gpu = torch.cuda.is_available()
    device, kind = "cuda" if on_gpu else "cpu", getattr(torch, dtype)
    if folder is not None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    else:
        given = {key: value for key, value in (described or {}).items() if key != "model_type"}
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **given), dtype=kind)
    model = model.to(device).eval()
    # A static cache makes transformers compile its step: on a GPU that is what it is fastest with.
    static = {"cache_implementation": "static"} if on_gpu else {}
    seen: set[tuple[int, ...]] = set()

    def run(prompts: np.ndarray, new: int) -> Rates:
        ids = torch.from_numpy(prompts.astype(np.int64)).to(device)
        if (*prompts.shape, new) not in seen:
            seen.add((*prompts.shape, new))
            run(prompts, new)  # the warm-up

        def seconds(count: int) -> float:
            begin = time.perf_counter()
            with torch.inference_mode():
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    min_new_tokens=count,
                    max_new_tokens=count,
                    **static,
                )
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - begin

        first, whole = seconds(1), seconds(new)
        return Rates(prompts.size / first, len(prompts) * (new - 1) / (whole - first))

    config, sizes = model.config, [w.numel() for name, w in model.named_parameters() if w.ndim == 2]
    if not config.tie_word_embeddings:
        sizes.remove(model.get_input_embeddings().weight.numel())
    width = torch.empty(0, dtype=kind).element_size()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    position = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * width
    return Contender(run, sum(sizes) * width, sum(sizes), dtype, position)


def checkpoint_contenders(
    model: str, variants: Sequence[tuple[str, str]], peers: bool, most_rows: int
) -> dict[str, Contender]:
    found: dict[str, Contender] = {}
    engines: dict[str, si.Engine] = {}
    for weights, cache in variants:
        how = {"quantize": weights} if weights in FORMATS else {"dtype": weights}
        engine = engines.get(weights) or si.Engine.load(model, **how)
        engines[weights] = engine
        found[_named(weights, cache)] = ours(engine, engine.config, most_rows, cache)
    if peers:
        folder = Path(tempfile.mkdtemp(prefix="spmd-infer-bench-")) / "model"
        app(["convert", model, str(folder), "--to", "huggingface", "--dtype", "float32"], standalone_mode=False)
        for dtype in ("float32", "bfloat16"):
            found[f"transformers {dtype}"] = transformers_peer(dtype, folder)
        found |= cpp_contenders(model, folder, next(iter(found.values())), next(iter(engines.values())))
    return found


def cpp_contenders(model: str, folder: Path, like: Contender, engine: si.Engine) -> dict[str, Contender]:
    """CTranslate2 and llama.cpp, as far as they are installed, on the weights of a contender of ours."""
    from benchmarks.generation_peers import ctranslate2_peer, llama_cpp_file, llama_cpp_peer

    config: Any = engine.config
    cached = 2 * config.num_layers * config.num_kv_heads * config.head_dim  # numbers of a position

    def contender(run: Callable[[np.ndarray, int], tuple[float, float]], weights: int, position: int) -> Contender:
        def rates(prompts: np.ndarray, new: int) -> Rates:
            first, whole = run(prompts, new)
            return Rates(prompts.size / first, len(prompts) * (new - 1) / (whole - first))

        return Contender(rates, weights, like.products, "int8", position)

    found: dict[str, Contender] = {}
    if _version("ctranslate2"):
        tokenizer = engine.task("generate").tokenizer.serialized()
        found["CTranslate2 int8"] = contender(ctranslate2_peer(folder, tokenizer, "int8"), like.products, 4 * cached)
    path = demo.demo_path(model) if model.startswith(demo.PREFIX) else Path(model)
    if _version("llama-cpp-python") and path.suffix == ".gguf":
        for kind in ("Q8_0", "Q4_1"):
            file = llama_cpp_file(path, kind, folder.parent)
            found[f"llama.cpp {kind}"] = contender(llama_cpp_peer(file), file.stat().st_size, 2 * cached)
    return found


def shape_contenders(
    described: dict[str, Any], variants: Sequence[tuple[str, str]], peers: bool, most_rows: int
) -> dict[str, Contender]:
    family, _ = find_family(described["architectures"][0], {})
    config: Any = family.config_from_hf(described)
    found: dict[str, Contender] = {}
    engines: dict[str, si.Engine] = {}
    for weights, cache in variants:
        engine = engines.get(weights) or _random_engine(family, config, weights)
        engines[weights] = engine
        found[_named(weights, cache)] = ours(engine, config, most_rows, cache)
    if peers and _version("transformers") and _version("torch"):
        found["transformers bfloat16"] = transformers_peer("bfloat16", described=described)
    elif peers:
        print("transformers and torch are not installed: no peer")
    return found


def _random_engine(family: Family, config: Any, weights: str) -> si.Engine:
    module, dtype = family.abstract(config), "bfloat16" if weights in FORMATS else weights
    if weights in FORMATS:
        quantised(module, WeightFormat.parse(weights), np.dtype(dtype))
    function = model_function(module)
    keys = iter(jax.random.split(jax.random.key(0), len(function.params)))
    params = {}
    for path, p in function.params.items():
        kept = p.dtype if path.endswith("_scale") or p.dtype.itemsize == 1 else dtype
        params[path] = jax.jit(partial(_random, shape=p.shape, dtype=kept))(next(keys))
    return si.Engine(function.with_params(params), inputs=family.input_spec(config))


def _random(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Weights of about 0.02, or small numbers whose scales make them so."""
    numbers = jax.random.normal(key, shape)
    if jax.numpy.dtype(dtype).itemsize == 1:
        return (numbers * 30).astype(dtype)
    if len(shape) == 1:
        return jax.numpy.full(shape, 0.02 / 30, dtype) if dtype == np.float32 else jax.numpy.ones(shape, dtype)
    return (numbers * 0.02).astype(dtype)


def _named(weights: str, cache: str) -> str:
    return f"ours {weights}" + (f", cache {cache}" if cache != "auto" else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--shape")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--cache", default="auto", help="what the cache holds, one or several: auto,int8")
    parser.add_argument("--variants", default="float32,int8")
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [int(text) for text in options.rows.split(",")]
    variants = list(product(options.variants.split(","), options.cache.split(",")))
    described = TINY if options.tiny else known_models.find(options.shape) if options.shape else None
    if options.shape and described is None:
        raise SystemExit(f"no model is called {options.shape}; known are {', '.join(known_models.names())}")
    if described is not None:
        contenders = shape_contenders(described, variants, options.peers, max(rows))
    else:
        contenders = checkpoint_contenders(options.model, variants, options.peers, max(rows))
    figures = measure_device()
    versions = [f"{name} {_version(name)}" for name in PACKAGES if _version(name)]
    machine = f"{figures.kind} x {figures.count}, {platform.machine()}, {os.cpu_count()} cores; {', '.join(versions)}"
    print(f"{machine}; reads {figures.read / 1e9:.1f} GB/s; load {os.getloadavg()[0]:.1f}\n")
    columns = (
        "rows x prompt + new",
        "contender",
        "prefill tok/s",
        "of limit",
        "decode tok/s",
        "of limit",
        "host share",
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    results = []
    vocabulary = described["vocab_size"] if described is not None else 40_000
    for count in rows:
        prompts = np.random.default_rng(count).integers(100, vocabulary, (count, options.prompt)).astype(np.int32)
        readings: dict[str, list[Rates]] = {name: [] for name in contenders}
        for _ in range(options.rounds):
            for name, contender in contenders.items():
                readings[name].append(contender.run(prompts, options.new))
        for name, found in readings.items():
            prefill, decode, host = (
                statistics.median(getattr(r, f) for r in found) for f in ("prefill", "decode", "host")
            )
            case = f"{count} x {options.prompt} + {options.new}"
            limits = contenders[name].limits(figures, count, options.prompt, options.new)
            shares = f"{prefill:,.0f} | {prefill / limits[0]:.0%} | {decode:,.1f} | {decode / limits[1]:.0%}"
            print(f"| {case} | {name} | {shares} | {host:.1%} |", flush=True)
            results.append(
                {"case": case, "contender": name, "prefill": prefill, "decode": decode, "host": host, "limits": limits}
            )
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
