"""Does a step's time grow with devices as plans say? Pipelines, ring attention and experts, on 1, 2, 4 and 8
simulated devices, the same batch on all of them.

Simulated devices share one machine: more of them make nothing faster, and what grows is what the layout costs
(messages, gathered tokens, weights read again). All cases are compiled first and then run in turns, forwards and
backwards; medians, of processor time too, which other work on the machine disturbs less. The prediction is that of the
engine's own plan, from the machine's entry in the hardware table; measure it first:

    spmd-infer bench device --save && spmd-infer bench collectives --save
    python benchmarks/pipeline_experts.py [--rounds 15] [--json FILE] [--plot FILE]
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spmd_infer.axes import AxisRules
from spmd_infer.engine import Engine
from spmd_infer.mesh import MeshSpec
from spmd_infer.models.experts import Experts, ExpertSizes
from spmd_infer.models.llama import Config, Llama, input_spec
from spmd_infer.planning.experts import ROWS_OVER_EXPERTS
from spmd_infer.planning.hardware import found_cluster
from spmd_infer.planning.layouts import find_layout
from spmd_infer.planning.workload import Workload

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
    worked: list[float] = field(default_factory=list)

    @property
    def measured(self) -> float:
        return statistics.median(self.seconds)

    @property
    def processor(self) -> float:
        return statistics.median(self.worked)


def compiled(engine: Engine, batch: Any) -> Callable[[], Any]:
    """The engine's program on inputs that lie where it wants them, without the way there and back."""
    engine.infer(jax.tree.map(jnp.asarray, batch))  # the caller's own arrays: nothing is donated
    (program,) = engine.programs
    wanted = program.compiled.input_shardings[0][1:]
    placed = [jax.device_put(leaf, to) for leaf, to in zip(jax.tree.leaves(batch), wanted, strict=True)]
    return lambda: jax.block_until_ready(program.compiled(engine.params, *placed))


def case(layout: str, devices: int, engine: Engine, batch: Any, note: str) -> Case:
    """What the engine's plan says of a step, and the step."""
    time = engine.plan.chosen.time
    if time is None:
        raise SystemExit(f"{layout}: {'; '.join(engine.plan.notes)}")
    pipeline = engine.plan.chosen.pipeline
    if pipeline is not None:
        note = f"{pipeline.microbatches} micro-batches, bubble {pipeline.bubble:.0%}"
    return Case(layout, devices, time.total, compiled(engine, batch), note)


def llama(layout: str, mesh: MeshSpec, rules: AxisRules, rows: int, length: int) -> Case:
    ids = np.random.default_rng(0).integers(0, LLAMA.vocab_size, (rows, length)).astype(np.int32)
    engine = Engine(
        Llama(LLAMA, rngs=nnx.Rngs(0)),
        mesh=mesh,
        rules=rules.with_units(LLAMA.axis_units()),
        inputs=input_spec(LLAMA)["input_ids"],
        buckets=[rows],
        workload=Workload(rows=rows, sizes={"seq": length}),
    )
    return case(layout, mesh.size, engine, ids, f"{rows} rows of {length}")


def pipeline(devices: int) -> Case:
    return llama("pipeline", MeshSpec.of(stage=devices), AxisRules(), rows=32, length=64)


def ring(devices: int) -> Case:
    return llama("ring attention", MeshSpec.of(data=1, seq=devices), find_layout("ring"), rows=2, length=512)


def experts(devices: int, rows: int = 16, length: int = 256) -> Case:
    x = np.random.default_rng(0).normal(size=(rows, length, EXPERTS.embed_dim)).astype(np.float32)
    engine = Engine(
        Experts(EXPERTS, rngs=nnx.Rngs(0)),
        mesh=MeshSpec.of(data=1, expert=devices),
        rules=ROWS_OVER_EXPERTS,
        example=x,
        buckets=[rows],
        workload=Workload(rows=rows),
    )
    return case("experts", devices, engine, x, f"{rows * length} tokens")


def plot(cases: list[Case], file: Path) -> None:
    """Growth over one device, and measured over predicted growth; the ending of ``file`` says in which format."""
    import matplotlib as mpl

    mpl.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt

    figure, (growth, ratio) = plt.subplots(1, 2, figsize=(11, 4))
    for layout in dict.fromkeys(case.layout for case in cases):
        ours = [case for case in cases if case.layout == layout]
        counts = [case.devices for case in ours]
        measured = [case.measured / ours[0].measured for case in ours]
        predicted = [case.predicted / ours[0].predicted for case in ours]
        (line,) = growth.plot(counts, measured, "o-", label=f"{layout}, measured")
        growth.plot(counts, predicted, "--", color=line.get_color(), label="predicted")
        ratio.plot(counts, [m / p for m, p in zip(measured, predicted, strict=True)], "o-", label=layout)
    ratio.axhspan(0.85, 1.15, alpha=0.15, label="within 15 %")
    for axis, what in ((growth, "step time over one device's"), (ratio, "measured growth over predicted")):
        axis.set_xscale("log", base=2)
        axis.set_xticks(DEVICES, labels=[str(count) for count in DEVICES])
        axis.minorticks_off()
        axis.set(xlabel="simulated devices", ylabel=what)
        axis.legend()
    figure.savefig(file, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    cases = [make(count) for make in (pipeline, ring, experts) for count in DEVICES]
    for number in range(options.rounds):
        for each in cases if number % 2 == 0 else reversed(cases):
            begin, before = time.perf_counter(), time.process_time()
            each.run()
            each.seconds.append(time.perf_counter() - begin)
            each.worked.append(time.process_time() - before)
    device = found_cluster(jax.devices()).device
    print(f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}")
    print(f"figures of {device.name}: {device.source}")
    titles = ("devices", "predicted ms", "measured ms", "growth pred.", "meas.", "ratio", "processor")
    print(f"{'layout':<16}" + "".join(f"{t:>{w}}" for t, w in zip(titles, (8, 14, 13, 14, 8, 8, 11), strict=True)))
    rows = []
    first: dict[str, Case] = {}
    for each in cases:
        base = first.setdefault(each.layout, each)
        growth = each.predicted / base.predicted, each.measured / base.measured
        row = {
            "layout": each.layout,
            "devices": each.devices,
            "predicted_ms": each.predicted * 1e3,
            "measured_ms": each.measured * 1e3,
            "predicted_growth": growth[0],
            "measured_growth": growth[1],
            "ratio": growth[1] / growth[0],
            "processor_ms": each.processor * 1e3,
            "processor_growth": each.processor / base.processor,
            "note": each.note,
        }
        rows.append(row)
        print(
            f"{each.layout:<16}{each.devices:>8}{row['predicted_ms']:>14.1f}{row['measured_ms']:>13.1f}"
            f"{growth[0]:>14.2f}{growth[1]:>8.2f}{growth[1] / growth[0]:>8.2f}{row['processor_growth']:>11.2f}"
            f"  {each.note}"
        )
    if options.json:
        options.json.write_text(json.dumps({"device": device.name, "source": device.source, "rows": rows}, indent=1))
    if options.plot:
        plot(cases, options.plot)


if __name__ == "__main__":
    main()
