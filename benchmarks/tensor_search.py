"""What the search over un-annotated weights is worth: the default rule against it, estimated and measured.

Calibrate the machine first, so that the plan counts with what its cores reach:

    spmd-infer bench device --save && spmd-infer bench collectives --save
    python benchmarks/tensor_search.py [--rounds 21] [--json FILE]

Eight simulated devices. Both engines of a case run in turns; medians, of the steps and of their ratio.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import spmd_infer as si
from spmd_infer.planning.audit import collectives, summary

MESHES = ("data=1,model=8", "data=2,model=4")
RNG = np.random.default_rng(0)


class MLP(nnx.Module):
    """Products of one shape in a row: nothing in the shapes says which are the inner ones."""

    def __init__(self, width: int = 1024, depth: int = 6) -> None:
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(depth)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x


class Block(nnx.Module):
    """Attention and a feed-forward block, as anybody would write them."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.norm, self.norm_mlp = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.query, self.key, self.value, self.out = (nnx.Linear(width, width, rngs=rngs) for _ in range(4))
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm(x)
        split = [layer(y).reshape(*y.shape[:2], self.heads, -1) for layer in (self.query, self.key, self.value)]
        x = x + self.out(jax.nn.dot_product_attention(*split).reshape(y.shape))
        return x + self.down(nnx.gelu(self.up(self.norm_mlp(x))))


class Transformer(nnx.Module):
    def __init__(self, width: int = 512, heads: int = 8, depth: int = 4, vocab: int = 4096) -> None:
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(vocab, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(depth)])
        self.head = nnx.Linear(width, vocab, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class CNN(nnx.Module):
    def __init__(self) -> None:
        rngs, sizes = nnx.Rngs(0), (3, 32, 64, 128, 256)
        self.convolutions = nnx.List([nnx.Conv(a, b, (3, 3), rngs=rngs) for a, b in pairwise(sizes)])
        self.hidden, self.out = nnx.Linear(256 * 16, 512, rngs=rngs), nnx.Linear(512, 100, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for number, convolution in enumerate(self.convolutions):
            x = nnx.relu(convolution(x))
            if number:
                x = nnx.max_pool(x, (2, 2), (2, 2))
        return self.out(nnx.relu(self.hidden(x.reshape(x.shape[0], -1))))


CASES: dict[str, tuple[Callable[[], nnx.Module], Any]] = {
    "MLP, 6 x 1024": (MLP, RNG.normal(size=(64, 1024)).astype(np.float32)),
    "transformer, 4 x 512": (Transformer, RNG.integers(0, 4096, (8, 64)).astype(np.int32)),
    "CNN": (CNN, RNG.normal(size=(16, 32, 32, 3)).astype(np.float32)),
}


def step(engine: si.Engine, batch: Any) -> Callable[[], Any]:
    """The engine's program on inputs that lie where it wants them, without the way there and back."""
    engine.infer(jnp.asarray(batch))  # the caller's own array: nothing is donated
    (program,) = engine.programs
    placed = jax.device_put(batch, program.compiled.input_shardings[0][1])
    return lambda: jax.block_until_ready(program.compiled(engine.params, placed))


def measure(name: str, mesh: str, rounds: int) -> dict[str, Any]:
    make, batch = CASES[name]
    whole = si.Engine(make(), mesh="data=1", buckets=[len(batch)]).infer(batch)
    options = {"example": batch, "workload": si.Workload(rows=len(batch))}
    engines = {
        "default": si.Engine(make(), mesh=mesh, buckets=[len(batch)]),  # knows no batch when the weights are laid out
        "searched": si.Engine(make(), mesh=mesh, buckets=[len(batch)], **options),
    }
    steps = {kind: step(engine, batch) for kind, engine in engines.items()}
    times: dict[str, list[float]] = {kind: [] for kind in engines}
    for number in range(rounds):
        for kind in list(steps) if number % 2 == 0 else reversed(list(steps)):
            begin = time.perf_counter()
            steps[kind]()
            times[kind].append(time.perf_counter() - begin)
    search = engines["searched"].plan.tensors
    ratios = [d / s for d, s in zip(times["default"], times["searched"], strict=True)]
    error = np.abs(engines["searched"].infer(batch) - whole).max() / np.abs(whole).max()
    return {
        "case": name,
        "mesh": mesh,
        "estimated_ms": [seconds * 1e3 for seconds in search.seconds] if search else None,
        "measured_ms": [statistics.median(times[kind]) * 1e3 for kind in engines],
        "gain": statistics.median(ratios),
        "device_bytes": list(search.memory) if search else None,
        "planned_collectives": list(search.collectives) if search else None,
        "collectives": [summary(collectives(e.programs[0].compiled), e.mesh) for e in engines.values()],
        "evaluations": search.evaluations if search else 0,
        "error": float(error),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for name in CASES:
        for mesh in MESHES:
            row = measure(name, mesh, options.rounds)
            rows.append(row)
            (slow, fast), (before, after) = row["estimated_ms"], row["measured_ms"]
            print(
                f"{name}, {mesh}: estimated {slow:.2f} -> {fast:.2f} ms, measured {before:.2f} -> {after:.2f} ms "
                f"({row['gain']:.2f}x), error {row['error']:.1e}\n"
                f"  {row['collectives'][0]}\n  -> {row['collectives'][1]}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
