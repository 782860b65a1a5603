"""How long each way of attention takes, as the engine itself measures and chooses: over pages, and of prompts.

    python benchmarks/attention.py [--tiny] [--json FILE]

One layer with the heads of Llama 3.1 8B (``--tiny``: of SmolLM2). A step over pages reads all keys and values of its
rows
at least once: "GB/s" is that over the time, and "of limit" that over what the devices read in the same run.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import spmd_infer as si
from spmd_infer.bench.device import measure_device
from spmd_infer.functional import model_function
from spmd_infer.generation.attention_choice import AttentionChoice
from spmd_infer.generation.kept_answers import KeptAnswers
from spmd_infer.generation.kv_pages import PAGE_SIZE, page_bytes
from spmd_infer.models.cache_formats import CacheFormat
from spmd_infer.models.llama import Config
from spmd_infer.models.registry import find_family

# Rows, pages of the pool, pages of a row at most.
PAGES = ((1, 16, 16), (1, 512, 16), (32, 512, 16), (32, 1024, 32), (128, 2048, 16), (128, 4096, 32))
TINY_PAGES = ((1, 16, 4), (1, 256, 4), (8, 128, 16))
PROMPTS, TINY_PROMPTS = ((1, 2048), (4, 2048), (8, 512)), ((1, 128),)


def engine_of(config: Config, dtype: str) -> si.Engine:
    family, _ = find_family("LlamaForCausalLM", {})
    function = model_function(family.abstract(config))
    params = {path: jnp.zeros(p.shape, dtype) for path, p in function.params.items()}
    return si.Engine(function.with_params(params), mesh="data=1", inputs=family.input_spec(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--cache", default="auto,int8,fp8", help="what the cache holds, one or several")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = Config(512, 64, 64, 1, 9, 3, 64, 8192) if options.tiny else Config(512, 64, 64, 1, 32, 8, 128, 8192)
    platform = jax.default_backend()
    engine = engine_of(config, "float32" if platform == "cpu" else "bfloat16")
    figures = measure_device()
    print(f"{figures.kind}, jax {jax.__version__}, reads {figures.read / 1e9:.1f} GB/s\n")
    columns = ("sizes", "cache", "way", "ms", "GB/s", "of limit", "")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.cache.split(","):
            fmt = CacheFormat.of(name, platform, jnp.result_type(engine.dtype, jnp.bfloat16))
            file = Path(folder) / f"{name}.json"
            choice = AttentionChoice(engine, config, fmt, file)
            for rows, pages, width in TINY_PAGES if options.tiny else PAGES:
                choice.of_pages(rows, pages, width, among_all=True)
            for rows, length in (TINY_PROMPTS if options.tiny else PROMPTS) if name == "auto" else ():
                choice.of_prompts(rows, length)
            for key, answer in KeptAnswers(file).all().items():
                sizes = key.rpartition("; ")[2]
                kind, rows, *more = sizes.split()
                used = min(int(rows) * int(more[1]), int(more[0])) if kind == "pages" else 0
                moved = used * page_bytes(config, fmt)
                for way, ms in answer.milliseconds.items():
                    rate = moved / ms * 1e3
                    shown = f"{rate / 1e9:.0f} | {rate / figures.read:.0%}" if moved else " | "
                    mark = "chosen" if way == answer.way else ""
                    print(f"| {sizes} | {fmt.name} | {way} | {ms:.3f} | {shown} | {mark} |", flush=True)
                for way, reason in answer.left_out.items():
                    print(f"| {sizes} | {fmt.name} | {way} | | | | {reason} |", flush=True)
                results.append({"sizes": sizes, "cache": fmt.name, "page_size": PAGE_SIZE, **answer.as_dict()})
    if options.json:
        options.json.write_text(json.dumps({"device": figures.as_dict(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
