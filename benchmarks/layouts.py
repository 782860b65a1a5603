"""Every layout on every model family that has it: error against one device, communication and memory against the plan.

    python benchmarks/layouts.py [--only TEXT] [--markdown]

Small models with random weights, float32, on eight simulated devices. The error is the largest difference from the
results of one device, relative to the largest result. Planned is what the planner foresees for the same program, found
is what XLA compiled. Bytes of collectives are those of their results on one device; memory is weights, inputs, results
and temporaries on one device.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np
from flax import nnx

from spmd_infer.axes import AxisRules
from spmd_infer.engine import Engine
from spmd_infer.functional import model_function
from spmd_infer.mesh import MeshSpec
from spmd_infer.models import bert, cnn, efficientnet, llama
from spmd_infer.models.phases import Phase
from spmd_infer.models.registry import family_named
from spmd_infer.planning.audit import collectives
from spmd_infer.planning.cost import Traffic, cost_of
from spmd_infer.planning.hardware import found_cluster, parse_cluster
from spmd_infer.planning.layout import weight_layouts
from spmd_infer.planning.layouts import LAYOUTS
from spmd_infer.planning.tracing import read_work
from spmd_infer.planning.verify import TrafficLine, compare, verify_phase
from spmd_infer.planning.workload import Workload

ROWS, LENGTH = 8, 64


def _llama(num_heads: int, num_kv_heads: int) -> llama.Config:
    return llama.Config(512, 128, 384, 2, num_heads, num_kv_heads, 16, context_len=256)


MODELS: Mapping[str, tuple[str, Any]] = {
    "llama 8/4 heads": ("llama", _llama(8, 4)),
    "llama 8/1 heads": ("llama", _llama(8, 1)),
    "llama 9/3 heads": ("llama", _llama(9, 3)),
    "bert 8 heads": ("bert", bert.Config(512, 128, 384, 2, 8, max_positions=256)),
    "bert 3 heads": ("bert", bert.Config(512, 96, 384, 2, 3, max_positions=256)),
    "efficientnet": ("efficientnet-lite", efficientnet.Config(depth=0.25, image_size=64, num_classes=16)),
    "cnn": ("cnn", cnn.Config()),
}
IMAGE_LAYOUTS: Mapping[str, AxisRules] = {
    "rows": AxisRules(name="rows").replace(height="seq", width=None),
    "columns": AxisRules(),
    "blocks": AxisRules().replace(height="data", batch=None),
}
"""How images are cut; columns are what the default rules do where the mesh has ``seq``."""

_SPLIT, _LONG = ("data=2,model=4", "model=8"), ("data=2,seq=4", "seq=2,model=4", "data=2,seq=2,model=2")
_TEXT = {
    "1d": (*_SPLIT, *_LONG),
    "2d": (*_SPLIT, "data=4,model=2", "data=2,seq=2,model=2"),
    "gathered": (*_SPLIT, "data=2,seq=2,model=2"),
    "kv-batch": (*_SPLIT, "data=2,seq=2,model=2"),
    "ring": _LONG,
}
_IMAGES = {
    "1d": _SPLIT,
    "2d": (*_SPLIT, "data=2,seq=2,model=2"),
    "gathered": (*_SPLIT, "data=2,seq=2,model=2"),
    "rows": ("seq=4", "data=2,seq=2,model=2"),
    "columns": ("seq=4", "data=2,seq=2,model=2"),
    "blocks": ("data=2,seq=2", "data=2,seq=2,model=2"),
}


@dataclass(frozen=True)
class Case:
    """One cell of the matrix."""

    model: str
    layout: str
    mesh: str

    def __str__(self) -> str:
        return f"{self.model}, {self.layout}, {self.mesh}"


@dataclass(frozen=True)
class Outcome:
    """What was measured: relative error, communication line by line, and bytes of memory planned and found."""

    error: float
    traffic: tuple[TrafficLine, ...]
    memory: tuple[int, int]


def cases() -> Iterator[Case]:
    """Every layout × every model that it makes sense for × its meshes."""
    for model, (family, _) in MODELS.items():
        for layout, meshes in (_TEXT if family in ("llama", "bert") else _IMAGES).items():
            yield from (Case(model, layout, mesh) for mesh in meshes)


def measure(case: Case) -> Outcome:
    """Run one case, and compare it with one device and with the plan."""
    config, (found, engine) = MODELS[case.model][1], run(case.model, case.layout, case.mesh)
    (program,) = engine.programs
    mesh = engine.mesh
    traffic: dict[tuple[str, tuple[str, ...]], Traffic] = {}
    for each in collectives(program.compiled):
        known = traffic.get((each.kind, each.axes(mesh)), Traffic())
        traffic[each.kind, each.axes(mesh)] = Traffic(known.count + 1, known.nbytes + each.nbytes)
    family = family_named(MODELS[case.model][0])
    spec, function = MeshSpec.parse(case.mesh), model_function(nnx.eval_shape(lambda: family.build(config)))
    batch, axes = Workload(rows=ROWS, sizes={"seq": LENGTH}).batch(family.input_spec(config), ROWS)
    layouts = weight_layouts(function, engine.rules, spec.shape)
    planned = cost_of(
        spec, engine.rules, layouts, read_work(function, batch, axes), found_cluster(list(mesh.devices.flat))
    )
    # Compiled once more: the kernels that really run keep some of their temporaries to themselves.
    phase, cluster = Phase("infer", None, family.input_spec(config)), parse_cluster(str(mesh.size))
    report = verify_phase(function, phase, spec, engine.rules, Workload(rows=ROWS, sizes={"seq": LENGTH}), cluster)
    whole = run(case.model, "1d", "data=1")[0]
    return Outcome(
        float(np.abs(found - whole).max() / np.abs(whole).max()),
        tuple(compare(planned.collectives, traffic)),
        report.memory,
    )


@cache
def run(model: str, layout: str, mesh: str) -> tuple[Any, Engine]:
    """The results of a model on a mesh, and the engine that computed them."""
    family, config = family_named(MODELS[model][0]), MODELS[model][1]
    rules = ({**LAYOUTS, **IMAGE_LAYOUTS}[layout]).with_units(config.axis_units())
    spec, rng = family.input_spec(config), np.random.default_rng(0)
    engine = Engine(family.build(config), mesh=mesh, rules=rules, inputs=spec, buckets=[ROWS])
    if "image" in spec:
        batch = {"image": rng.normal(size=(ROWS, *spec["image"].shape[1:])).astype(np.float32)}
    else:
        batch = {"input_ids": rng.integers(0, config.vocab_size, (ROWS, LENGTH)).astype(np.int32)}
    return jax.tree.leaves(engine.infer(batch))[0], engine


def said(lines: tuple[TrafficLine, ...], *, found: bool) -> str:
    """Communication in words."""
    parts = [
        (f"{line.found} {line.kind} {'+'.join(line.axes)} ({line.found_bytes / 1e3:.0f} kB)", line.found)
        if found
        else (f"{line.planned} {line.kind} {'+'.join(line.axes)} ({line.planned_bytes / 1e3:.0f} kB)", line.planned)
        for line in lines
    ]
    return ", ".join(words for words, count in parts if count) or "none"


def main() -> None:
    """Print the matrix."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--markdown", action="store_true", help="a table with one line for each model and layout")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    if options.markdown:
        print("| model | layout | mesh | error | collectives found | as planned | memory planned / found, kB |")
        print("|---|---|---|---|---|---|---|")
    for case in cases():
        if options.only not in str(case):
            continue
        outcome = measure(case)
        planned, found = outcome.memory
        odd = [line for line in outcome.traffic if not line.explained]
        if options.markdown:
            verdict = "; ".join(f"{line.kind} {'+'.join(line.axes)}: {line.verdict}" for line in odd) or "yes"
            print(
                f"| {case.model} | {case.layout} | {case.mesh} | {outcome.error:.0e} | "
                f"{said(outcome.traffic, found=True)} | {verdict} | {planned / 1e3:.0f} / {found / 1e3:.0f} |"
            )
        else:
            memory = f"memory {planned:,} planned, {found:,} found ({found / planned:.2f})"
            print(f"{case}: error {outcome.error:.1e}, {memory}")
            print(f"    planned {said(outcome.traffic, found=False)}\n    found   {said(outcome.traffic, found=True)}")
            for line in odd:
                print(f"    NOT EXPLAINED: {line.kind} over {'+'.join(line.axes)}: {line.verdict}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
