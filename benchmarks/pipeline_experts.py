"""Does a step's time grow with devices as the cost model says? Pipelines, ring attention and experts, on 1, 2, 4 and 8
simulated devices, the same batch on all of them.

Simulated devices share one machine: more of them make nothing faster, and what grows is what the layout costs (bubble,
messages, gathered tokens). All cases are compiled first and then run in turns. The prediction uses the machine's entry
in the hardware table; measure it first:

    spmd-infer bench device --save && spmd-infer bench collectives --save
    python benchmarks/pipeline_experts.py [--json FILE] [--plot FILE]
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spmd_infer.axes import AxisRules
from spmd_infer.engine import Engine
from spmd_infer.functional import ModelFunction, model_function
from spmd_infer.mesh import MeshSpec
from spmd_infer.models.experts import Experts, ExpertSizes
from spmd_infer.models.llama import Config, Llama, input_spec
from spmd_infer.models.pipeline import microbatch_count
from spmd_infer.planning.cost import MeshCost, cost_of
from spmd_infer.planning.hardware import Cluster, found_cluster
from spmd_infer.planning.layout import weight_layouts
from spmd_infer.planning.layouts import find_layout
from spmd_infer.planning.parallel_costs import (
    ExpertWork,
    Message,
    expert_cost,
    message_time,
    pipeline_cost,
)
from spmd_infer.planning.tracing import read_work
from spmd_infer.planning.workload import Workload
from spmd_infer.staging import for_stages

ROUNDS = 15
DEVICES = (1, 2, 4, 8)
LLAMA = Config(
    vocab_size=512, embed_dim=256, mlp_dim=768, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=32, context_len=2048
)
EXPERTS = ExpertSizes(embed_dim=256, mlp_dim=512, num_experts=8, experts_per_token=2)


@dataclass
class Case:
    """One layout on one number of devices."""

    layout: str
    devices: int
    predicted: float
    run: Callable[[], Any]
    note: str = ""
    seconds: list[float] = field(default_factory=list)

    @property
    def measured(self) -> float:
        """The lower quartile: other work on the machine only ever adds."""
        return statistics.quantiles(self.seconds, n=4)[0]


def cost(config: Config, mesh: MeshSpec, rules: AxisRules, rows: int, length: int, cluster: Cluster) -> MeshCost:
    """What the planner says of a Llama on a mesh, its layers not stacked."""
    model = model_function(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    batch, axes = Workload(rows=rows, sizes={"seq": length}).batch(input_spec(config), rows)
    layouts = weight_layouts(model, rules.replace(layers=None), mesh.shape)
    return cost_of(mesh, rules, layouts, read_work(model, batch, axes), cluster)


def compiled(engine: Engine, batch: Any) -> Callable[[], Any]:
    """The engine's program on inputs that lie where it wants them, without the way there and back."""
    engine.infer(jax.tree.map(jnp.asarray, batch))  # the caller's own arrays: nothing is donated
    (program,) = engine.programs
    wanted = program.compiled.input_shardings[0][1:]
    placed = [jax.device_put(leaf, to) for leaf, to in zip(jax.tree.leaves(batch), wanted, strict=True)]
    return lambda: jax.block_until_ready(program.compiled(engine.params, *placed))


def pipeline(devices: int, rows: int = 32, length: int = 64) -> Case:
    mesh, cluster = MeshSpec.of(stage=devices), found_cluster(jax.devices()[:devices])
    module = Llama(LLAMA, rngs=nnx.Rngs(0))
    function: ModelFunction = model_function(module)
    _, rules = for_stages(function, AxisRules().with_units(LLAMA.axis_units()), mesh.shape)
    whole = cost(LLAMA, mesh, rules, rows, length, cluster)
    outside = cost(replace(LLAMA, num_layers=0), mesh, rules, rows, length, cluster)
    assert whole.time is not None
    predicted, note = whole.time.total, "no pipeline"
    if devices > 1:
        layers = sum(p.nbytes for path, p in function.params.items() if path.startswith("layers."))
        parts = microbatch_count(rows, devices)
        row_bytes = (length * LLAMA.embed_dim * 4, length * 4)
        step = pipeline_cost(whole, outside, layers, row_bytes, rows, parts, mesh, rules, cluster)
        predicted, note = step.time.total, f"{parts} micro-batches, bubble {step.bubble:.0%}"
    ids = np.random.default_rng(0).integers(0, LLAMA.vocab_size, (rows, length)).astype(np.int32)
    engine = Engine(module, mesh=mesh, example=ids, buckets=[rows])
    return Case("pipeline", devices, predicted, compiled(engine, ids), note)


def ring(devices: int, rows: int = 2, length: int = 512) -> Case:
    mesh, cluster = MeshSpec.of(data=1, seq=devices), found_cluster(jax.devices()[:devices])
    rules = find_layout("ring").with_units(LLAMA.axis_units())
    step = cost(LLAMA, mesh, rules, rows, length, cluster).time
    assert step is not None
    part = 2 * rows * length // devices * LLAMA.num_kv_heads * LLAMA.head_dim * 4  # keys and values travel together
    sent = Message("collective-permute", ("seq",), part, LLAMA.num_layers * (devices - 1))
    predicted = max(step.compute, step.memory) + message_time([sent] if devices > 1 else [], mesh, cluster)
    ids = np.random.default_rng(0).integers(0, LLAMA.vocab_size, (rows, length)).astype(np.int32)
    engine = Engine(
        Llama(LLAMA, rngs=nnx.Rngs(0)), mesh=mesh, rules=rules, inputs=input_spec(LLAMA)["input_ids"], buckets=[rows]
    )
    return Case("ring attention", devices, predicted, compiled(engine, ids), f"{sent.times} permutes")


def experts(devices: int, rows: int = 16, length: int = 256) -> Case:
    mesh, cluster = MeshSpec.of(data=1, expert=devices), found_cluster(jax.devices()[:devices])
    rules = AxisRules().replace(batch=("data", "expert"))
    work = ExpertWork(
        rows * length,
        rows,
        EXPERTS.embed_dim,
        EXPERTS.mlp_dim,
        EXPERTS.num_experts,
        EXPERTS.experts_per_token,
    )
    predicted = expert_cost(mesh, rules, work, cluster, "float32").total
    x = np.random.default_rng(0).normal(size=(rows, length, EXPERTS.embed_dim)).astype(np.float32)
    engine = Engine(Experts(EXPERTS, rngs=nnx.Rngs(0)), mesh=mesh, rules=rules, example=x, buckets=[rows])
    return Case("experts", devices, predicted, compiled(engine, x), f"{rows * length} tokens")


def plot(cases: list[Case], file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    for layout in dict.fromkeys(case.layout for case in cases):
        ours = [case for case in cases if case.layout == layout]
        counts = [case.devices for case in ours]
        (line,) = axis.plot(counts, [c.measured / ours[0].measured for c in ours], "o-", label=f"{layout}, measured")
        axis.plot(
            counts, [c.predicted / ours[0].predicted for c in ours], "--", color=line.get_color(), label="predicted"
        )
    axis.set(xlabel="simulated devices", ylabel="step time over one device's", xscale="log", xticks=DEVICES)
    axis.set_xticklabels(map(str, DEVICES))
    axis.legend()
    figure.savefig(file, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    cases = [make(count) for make in (pipeline, ring, experts) for count in DEVICES]
    for _ in range(ROUNDS):
        for case in cases:
            begin = time.perf_counter()
            case.run()
            case.seconds.append(time.perf_counter() - begin)
    device = found_cluster(jax.devices()).device
    print(f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}")
    print(f"figures of {device.name}: {device.source}")
    titles = ("devices", "predicted ms", "measured ms", "growth pred.", "meas.", "ratio")
    print(f"{'layout':<16}" + "".join(f"{t:>{w}}" for t, w in zip(titles, (8, 14, 13, 14, 8, 8), strict=True)))
    rows = []
    first: dict[str, Case] = {}
    for case in cases:
        base = first.setdefault(case.layout, case)
        growth = case.predicted / base.predicted, case.measured / base.measured
        row = {
            "layout": case.layout,
            "devices": case.devices,
            "predicted_ms": case.predicted * 1e3,
            "measured_ms": case.measured * 1e3,
            "predicted_growth": growth[0],
            "measured_growth": growth[1],
            "ratio": growth[1] / growth[0],
            "note": case.note,
        }
        rows.append(row)
        print(
            f"{case.layout:<16}{case.devices:>8}{row['predicted_ms']:>14.1f}{row['measured_ms']:>13.1f}"
            f"{growth[0]:>14.2f}{growth[1]:>8.2f}{growth[1] / growth[0]:>8.2f}  {case.note}"
        )
    if options.json:
        options.json.write_text(json.dumps({"device": device.name, "source": device.source, "rows": rows}, indent=1))
    if options.plot:
        plot(cases, options.plot)


if __name__ == "__main__":
    main()
