"""Rates of the three tasks on the demo models in float32, for several meshes of simulated devices.

    python benchmarks/tasks.py [--json FILE] [MESH ...]

No peers yet: these are our own figures, for comparing one version with the next.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import numpy as np

import spmd_infer as si
from spmd_infer.demo import imagenet_pictures, sts_b_rows

ROUNDS = 3


def median_seconds(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def generation(mesh: str) -> dict[str, float]:
    engine = si.Engine.load("demo:smollm2", mesh=mesh)
    rng = np.random.default_rng(0)
    rates = {}
    for rows in (1, 8):
        prompts = rng.integers(100, 40_000, (rows, 512)).tolist()
        params = si.SamplingParams(max_tokens=33, ignore_eos=True)
        engine.generate(prompts, params)  # compiles
        runs = [engine.generate(prompts, params) for _ in range(ROUNDS)]
        first = statistics.median(max(each.ttft_s for each in run) for run in runs)
        rates[f"prefill tok/s, {rows} x 512"] = rows * 512 / first
        rates[f"decode tok/s, {rows} rows"] = rows * statistics.median(run[0].decode_tokens_per_s for run in runs)
    return rates


def encoding(mesh: str) -> dict[str, float]:
    engine = si.Engine.load("demo:minilm", mesh=mesh)
    sentences = [sentence for _, *pair in sts_b_rows() for sentence in pair]
    return {"sentences/s": len(sentences) / median_seconds(lambda: engine.embed(sentences))}


def classification(mesh: str) -> dict[str, float]:
    engine = si.Engine.load("demo:efficientnet-lite0", mesh=mesh)
    images = np.zeros((32, 224, 224, 3), np.float32)
    files = [path for path, _ in imagenet_pictures()]
    return {
        "images/s, batch 32": 32 / median_seconds(lambda: engine.infer({"image": images})),
        "image files/s": len(files) / median_seconds(lambda: engine.classify(files)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("meshes", nargs="*", default=["data=1", "data=2", "data=2,model=4"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, jax {jax.__version__}"
    print(machine)
    results = {}
    for mesh in options.meshes:
        results[mesh] = {**generation(mesh), **encoding(mesh), **classification(mesh)}
        print(mesh + ": " + ", ".join(f"{name} {rate:.1f}" for name, rate in results[mesh].items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
