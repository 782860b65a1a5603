"""Memory of a device, planned and found, for models of the sizes that users run. Nothing is loaded or executed.

    python benchmarks/memory.py [--only TEXT] [--markdown]

Every layout on meshes of simulated devices; float32. Found is what XLA says of the compiled program's buffers:
arguments, results and temporaries, less what results share with arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import numpy as np
from flax import nnx

from spmd_infer.functional import model_function
from spmd_infer.mesh import MeshSpec
from spmd_infer.models import bert, cnn, efficientnet, llama
from spmd_infer.models.phases import Phase, decoder_phases
from spmd_infer.models.registry import family_named
from spmd_infer.planning.hardware import parse_cluster
from spmd_infer.planning.layouts import LAYOUTS, ONE_D
from spmd_infer.planning.verify import PhaseReport, verify_phase
from spmd_infer.planning.workload import Workload

SMOLLM2 = llama.Config(
    49152, 576, 1536, 30, 9, 3, 64, context_len=8192, norm_epsilon=1e-5, rope_theta=100000.0, tie_embeddings=True
)
MINILM = bert.Config(30522, 384, 1536, 6, 12)
LITE0 = efficientnet.Config()

IMAGE_LAYOUTS = {
    "rows": ONE_D.replace(height="seq", width=None),
    "columns": ONE_D,
    "blocks": ONE_D.replace(height="data", batch=None),
}
_PLAIN, _LONG = ("data=8", "data=2,model=4", "model=8"), ("data=2,seq=4", "data=2,seq=2,model=2")
_TEXT = {
    "1d": (*_PLAIN, *_LONG),
    "2d": ("data=2,model=4", "data=4,model=2"),
    "gathered": ("data=2,model=4", "data=4,model=2"),
    "kv-batch": ("data=2,model=4", "model=8"),
    "ring": _LONG,
}
_IMAGES = {
    "1d": _PLAIN,
    "2d": ("data=2,model=4", "data=4,model=2"),
    "gathered": ("data=2,model=4",),
    "rows": ("seq=4", "data=2,seq=2,model=2"),
    "columns": ("seq=4", "data=2,seq=2,model=2"),
    "blocks": ("data=2,seq=2", "data=2,seq=2,model=2"),
}


@dataclass(frozen=True)
class Model:
    """A model with its traffic."""

    family: str
    config: Any
    workload: Workload
    layouts: Mapping[str, tuple[str, ...]]

    def phase(self, name: str) -> Phase:
        """One kind of step."""
        if name == "infer":
            return Phase("infer", None, family_named(self.family).input_spec(self.config))
        length = self.workload.size("seq")
        return next(p for p in decoder_phases(self.config, length, 128, np.float32) if p.name == name)


_DECODER = {layout: _TEXT[layout] for layout in ("1d", "2d", "gathered", "kv-batch")}
MODELS: Mapping[str, Model] = {
    "SmolLM2-135M prefill": Model("llama", SMOLLM2, Workload(rows=8, sizes={"seq": 512}), _TEXT),
    "SmolLM2-135M decode": Model("llama", SMOLLM2, Workload(rows=32, sizes={"seq": 512}), _DECODER),
    "MiniLM infer": Model("bert", MINILM, Workload(rows=64, sizes={"seq": 128}), _TEXT),
    "EfficientNet-Lite0 infer": Model("efficientnet-lite", LITE0, Workload(rows=32), _IMAGES),
    "CNN infer": Model("cnn", cnn.Config(), Workload(rows=256), _IMAGES),
}


@dataclass(frozen=True)
class Case:
    """One model under one layout on one mesh."""

    model: str
    layout: str
    mesh: str

    def __str__(self) -> str:
        return f"{self.model}, {self.layout}, {self.mesh}"


def cases() -> Iterator[Case]:
    """Every layout x every model that it makes sense for x its meshes."""
    for name, model in MODELS.items():
        for layout, meshes in model.layouts.items():
            yield from (Case(name, layout, mesh) for mesh in meshes)


def measure(case: Case) -> PhaseReport:
    """Compile one case and hold it against the plan."""
    model = MODELS[case.model]
    rules = {**LAYOUTS, **IMAGE_LAYOUTS}[case.layout].with_units(model.config.axis_units())
    family, mesh = family_named(model.family), MeshSpec.parse(case.mesh)
    function = model_function(nnx.eval_shape(lambda: family.build(model.config)))
    phase = model.phase(case.model.rsplit(" ", 1)[1])
    return verify_phase(function, phase, mesh, rules, model.workload, parse_cluster(str(mesh.size)))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    within = count = 0
    if options.markdown:
        print("| model | layout | mesh | planned, MB | found, MB | found / planned |\n|---|---|---|---|---|---|")
    for case in cases():
        if options.only not in str(case):
            continue
        report = measure(case)
        planned, found = report.memory
        count += 1
        within += abs(report.memory_difference) <= 0.1
        if options.markdown:
            row = f"| {case.model} | {case.layout} | {case.mesh} | {planned / 1e6:.1f} | {found / 1e6:.1f} "
            print(f"{row}| {found / planned:.2f} |")
        else:
            held, own = report.held
            print(
                f"{case}: {found / planned:.2f}  planned {planned / 1e6:.1f} MB, found {found / 1e6:.1f}; without "
                f"temporaries {held / 1e6:.1f}, {own / 1e6:.1f}"
            )
            for line in report.traffic:
                if not line.explained:
                    print(f"    NOT EXPLAINED: {line.kind} over {'+'.join(line.axes)}: {line.verdict}")
        sys.stdout.flush()
    print(f"{within} of {count} within 10 %")


if __name__ == "__main__":
    main()
