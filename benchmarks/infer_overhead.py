"""What ``Engine.infer`` adds to the bare jitted call, in microseconds a call.

Both take the same numpy batch, run the same program on the same mesh and return numpy arrays; they alternate within one
run. The bare call is ``jax.device_get(jax.jit(fn, in_shardings=...)(params, batch))``.

    python benchmarks/infer_overhead.py [--json FILE]
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
from jax.sharding import NamedSharding, PartitionSpec

import spmd_infer as si

ROUNDS, CALLS = 15, 200
STREAM_BATCHES = 64


def median_us(call: Callable[[], object]) -> float:
    times = []
    for _ in range(CALLS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def small(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x * params["scale"]


def tree(params: dict[str, jax.Array], batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {key: value * params["scale"] for key, value in batch.items()}


def measure(name: str, fn: Callable[..., object], batch: object, devices: int) -> dict[str, object]:
    engine = si.Engine(fn, {"scale": np.ones(16, np.float32)}, mesh=f"data={devices}", example=batch, buckets=[8])
    rows = NamedSharding(engine.mesh, PartitionSpec("data"))
    jitted = jax.jit(fn, in_shardings=(None, rows), out_shardings=rows)

    def bare() -> object:
        return jax.device_get(jitted(engine.params, batch))

    def ours() -> object:
        return engine.infer(batch)

    bare(), ours()
    pairs = [(median_us(bare), median_us(ours)) for _ in range(ROUNDS)]
    return {
        "case": name,
        "devices": devices,
        "bare_us": round(statistics.median(b for b, _ in pairs), 1),
        "infer_us": round(statistics.median(o for _, o in pairs), 1),
        "overhead_us": round(statistics.median(o - b for b, o in pairs), 1),
    }


def measure_stream() -> dict[str, object]:
    """A step of some milliseconds, so that there is work to hide the host's behind."""
    width = 1024
    weight = np.random.default_rng(0).normal(size=(width, width)).astype(np.float32) / 32

    def layers(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        for _ in range(8):
            x = jax.nn.relu(x @ params["w"])
        return x

    batch = np.ones((64, width), np.float32)
    engine = si.Engine(layers, {"w": weight}, mesh="data=1", example=batch, buckets=[64])
    jitted = jax.jit(layers)

    def bare() -> None:
        waiting = jitted(engine.params, batch)
        for _ in range(STREAM_BATCHES - 1):
            following = jitted(engine.params, batch)
            jax.device_get(waiting)
            waiting = following
        jax.device_get(waiting)

    def ours() -> None:
        for _ in engine.infer_stream(batch for _ in range(STREAM_BATCHES)):
            pass

    bare(), ours()
    ratios, bares = [], []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        bare()
        middle = time.perf_counter()
        ours()
        bares.append((middle - started) / STREAM_BATCHES)
        ratios.append((time.perf_counter() - middle) / (middle - started))
    return {
        "case": "infer_stream, 8 layers of 1024",
        "devices": 1,
        "bare_us": round(statistics.median(bares) * 1e6, 1),
        "overhead_percent": round((statistics.median(ratios) - 1) * 100, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    x = np.zeros((8, 16), np.float32)
    results = [
        measure(name, fn, batch, devices)
        for devices in (1, 4, 8)
        for name, fn, batch in (("one array", small, x), ("dict of six", tree, {f"k{n}": x for n in range(6)}))
    ]
    results.append(measure_stream())
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, jax {jax.__version__}"
    print(f"{machine}; {ROUNDS} rounds of {CALLS} calls, alternating; medians")
    for row in results:
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
