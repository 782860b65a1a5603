"""The planner's choice against measuring every mesh: predicted and measured time of a batch on simulated devices.

Calibrate the machine first, so that the plan counts with what its cores reach:

    spmd-infer bench device --save && spmd-infer bench collectives --save
    python benchmarks/planner.py [--json FILE] [--rounds 5] [--only TEXT]

Each case is measured on every data x model mesh of the devices, meshes in turn, round after round; medians. Simulated
devices share the cores, so the processor time of a batch says much the same as the clock; other work disturbs it less.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import numpy as np
from flax import nnx
from scipy.stats import spearmanr

import spmd_infer as si
from spmd_infer.models import llama
from spmd_infer.models.cnn import Config as CnnConfig
from spmd_infer.models.cnn import SmallCNN
from spmd_infer.models.cnn import input_spec as cnn_inputs

Case = tuple[Callable[[str], si.Engine], Any]


def decoder(mesh: str, rows: int, length: int) -> si.Engine:
    config = llama.Config(
        vocab_size=8192,
        embed_dim=1024,
        mlp_dim=4096,
        num_layers=4,
        num_heads=16,
        num_kv_heads=8,
        head_dim=64,
        context_len=2048,
    )
    return si.Engine(
        llama.Llama(config, rngs=nnx.Rngs(0)),
        mesh=mesh,
        inputs=llama.input_spec(config),
        workload=si.Workload(rows=rows, sizes={"seq": length}),
        buckets=[rows],
    )


def cnn(mesh: str) -> si.Engine:
    config = CnnConfig()
    return si.Engine(
        SmallCNN(config, rngs=nnx.Rngs(0)),
        mesh=mesh,
        inputs=cnn_inputs(config),
        workload=si.Workload(rows=256),
        buckets=[256],
    )


def demo(name: str, rows: int, length: int = 128) -> Callable[[str], si.Engine]:
    traffic = si.Workload(rows=rows, sizes={"seq": length})
    return lambda mesh: si.Engine.load(name, mesh=mesh, workload=traffic, buckets=[rows])


def ids(rows: int, length: int) -> dict[str, np.ndarray]:
    return {"input_ids": np.random.default_rng(0).integers(1, 8000, (rows, length)).astype(np.int32)}


CASES: dict[str, Case] = {
    "MiniLM, 64 x 32": (demo("demo:minilm", 64, 32), ids(64, 32)),
    "EfficientNet-Lite0, 32": (demo("demo:efficientnet-lite0", 32), {"image": np.zeros((32, 224, 224, 3), np.float32)}),
    "CNN, 256": (cnn, {"image": np.zeros((256, 32, 32, 1), np.float32)}),
    "decoder, 8 x 1": (lambda mesh: decoder(mesh, 8, 1), ids(8, 1)),
    "decoder, 8 x 128": (lambda mesh: decoder(mesh, 8, 128), ids(8, 128)),
}


def measure(case: Case, rounds: int) -> dict[str, tuple[float, float, float]]:
    """Seconds predicted, measured, and of processor time of one batch, by mesh; the planner's choice first."""
    make, batch = case
    chosen = make("auto")
    count = len(jax.devices())
    meshes = [f"data={count // parts},model={parts}" for parts in range(1, count + 1) if count % parts == 0]
    engines = {mesh: make(mesh) for mesh in sorted(meshes, key=lambda mesh: mesh != str(chosen.plan.mesh))}
    times: dict[str, list[float]] = {mesh: [] for mesh in engines}
    worked: dict[str, list[float]] = {mesh: [] for mesh in engines}
    for engine in engines.values():
        engine.infer(batch)
    for _ in range(rounds):
        for mesh, engine in engines.items():
            started, before = time.perf_counter(), time.process_time()
            engine.infer(batch)
            times[mesh].append(time.perf_counter() - started)
            worked[mesh].append(time.process_time() - before)
    return {
        mesh: (
            engine.plan.chosen.phases[0].time.total,
            statistics.median(times[mesh]),
            statistics.median(worked[mesh]),
        )
        for mesh, engine in engines.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    results = {}
    for name, case in CASES.items():
        if options.only not in name:
            continue
        found = results[name] = measure(case, options.rounds)
        predicted, measured, worked = zip(*found.values(), strict=True)
        row = "; ".join(f"{mesh} {p * 1e3:.1f} / {m * 1e3:.1f} ms ({w * 1e3:.1f})" for mesh, (p, m, w) in found.items())
        print(f"{name}: predicted / measured (processor time): {row}")
        by_clock, by_work = (
            f"{each[0] / min(each):.2f}x the best, rank correlation {spearmanr(predicted, each).statistic:.2f}"
            for each in (measured, worked)
        )
        print(f"  choice {next(iter(found))}: {by_clock}; in processor time {by_work}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
