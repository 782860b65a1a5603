"""LoRA adapters beside the weights: what they add to a decode step, to a prompt, and how long one takes to load.

    python benchmarks/adapters.py [--model demo:smollm2] [--quantize int8] [--rows 1,32] [--adapters 4] [--rank 16]

The adapters change all projections, with random numbers. Every round runs each contender once, one after the other:
"none" (no row has an adapter), "one" (all rows the same) and "mixed" (rows take turns). Of all steps of a contender the
tenth percentile counts, and of prompts the fastest: what other work on the machine adds is left out.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import spmd_infer as si
from spmd_infer.models.adapters import projections

_PROMPT_LEN = 512


def write_adapter(engine: si.Engine, folder: Path, rank: int, seed: int) -> Path:
    """A random adapter of all projections, as PEFT names them."""
    assert engine.family is not None
    assert engine.config is not None
    rng = np.random.default_rng(seed)
    table = engine.family.name_table(engine.config, "safetensors")
    tensors: dict[str, Any] = {}
    for path, part in projections(engine.family.abstract(engine.config)).items():
        module = table[f"{path}.weight"].name.removesuffix(".weight")
        name = f"base_model.model.{module}"
        tensors[f"{name}.lora_A.weight"] = rng.normal(0, 0.02, (rank, part.in_features)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = rng.normal(0, 0.02, (part.out_features, rank)).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
    return folder


def steps_ms(engine: si.Engine, prompts: list[list[int]], names: Sequence[str | None], new: int) -> list[float]:
    """Milliseconds between tokens, of each step."""
    params = si.SamplingParams(max_tokens=new, ignore_eos=True)
    found = engine.generate(prompts, params, adapter=list(names))
    return [1e3 * gap for gap in found[0].inter_token_s]


def prompt_ms(engine: si.Engine, name: str | None, seed: int) -> float:
    """Milliseconds until the first token of a prompt that nothing is cached of."""
    prompt = np.random.default_rng(seed).integers(10, 1000, _PROMPT_LEN).tolist()
    (found,) = engine.generate([prompt], si.SamplingParams(max_tokens=1), adapter=name)
    return 1e3 * float(found.ttft_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--mesh", default="data=1,model=1")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantize")
    parser.add_argument("--rows", default="1,32")
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    engine = si.Engine.load(options.model, mesh=options.mesh, dtype=options.dtype, quantize=options.quantize)
    most, rank = options.adapters, options.rank
    engine.task("generate", si.GenerationOptions(max_adapters=most, max_adapter_rank=rank))
    names = [f"adapter {index}" for index in range(most)]
    with tempfile.TemporaryDirectory() as kept:
        for index, name in enumerate(names):
            folder = write_adapter(engine, Path(kept, str(index)), rank, index)
            begin, compiling = time.perf_counter(), engine.compile_seconds
            engine.load_adapter(name, folder)
            seconds = time.perf_counter() - begin
            print(f"load {name}: {seconds:.2f} s, {engine.compile_seconds - compiling:.2f} s of it compiling")
    contenders: dict[str, list[str | None]] = {"none": [None], "one": [names[0]], "mixed": [*names]}
    for rows in map(int, options.rows.split(",")):
        prompts = np.random.default_rng(rows).integers(10, 1000, (rows, 32)).tolist()
        times: dict[str, list[float]] = {}
        for round_ in range(options.rounds + 1):
            for kind, cycle in contenders.items():
                used = [cycle[row % len(cycle)] for row in range(rows)]
                steps = steps_ms(engine, prompts, used, options.new)
                times.setdefault(kind, []).extend(steps if round_ else [])  # the first compiles
        found = {kind: statistics.quantiles(each, n=10)[0] for kind, each in times.items()}
        print(f"{rows} rows: " + ", ".join(f"{k} {ms:.2f} ms ({ms / found['none']:.2f}x)" for k, ms in found.items()))
    firsts: dict[str | None, list[float]] = {}
    for round_ in range(options.rounds + 1):
        for name in (None, names[0]):
            firsts.setdefault(name, []).append(prompt_ms(engine, name, seed=round_))
    without, with_one = (min(each[1:]) for each in firsts.values())
    print(f"prompt of {_PROMPT_LEN}: {without:.0f} ms, with an adapter {with_one:.0f} ms ({with_one / without:.2f}x)")


if __name__ == "__main__":
    main()
