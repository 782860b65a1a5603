"""``plan --verify``: a plan's programs compiled in a process with as many simulated devices as the plan has."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spmd_infer.axes import SEQ, AxisRules
from spmd_infer.errors import PlanError, SpmdInferError
from spmd_infer.mesh import MeshSpec
from spmd_infer.planning.estimates import gigabytes
from spmd_infer.planning.explain import mesh_words
from spmd_infer.planning.mesh_plan import MeshPlan
from spmd_infer.planning.verify import MEMORY_TOLERANCE, PhaseReport

MOST_DEVICES = 512
TIMEOUT = 600.0


@dataclass(frozen=True)
class Verification:
    """What came out.

    Attributes:
        mesh: the mesh that was compiled for.
        phases: a report for each kind of step.
        seconds: how long it took.
        peak_bytes: the most memory that the compiling process held.
    """

    mesh: Mapping[str, int]
    phases: tuple[PhaseReport, ...]
    seconds: float
    peak_bytes: int

    @property
    def agrees(self) -> bool:
        """Whether XLA does what the plan says, but for explained differences."""
        return all(phase.agrees for phase in self.phases)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "agrees": self.agrees,
            "mesh": dict(self.mesh),
            "phases": [phase.as_dict() for phase in self.phases],
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
        }

    def explain(self) -> str:
        """The report for a terminal."""
        took = f"{self.seconds:.0f} s and {gigabytes(self.peak_bytes)} of memory"
        lines = [f"Verified on {mesh_words(self.mesh)}: compiled for simulated devices, in float32, in {took}"]
        for phase in self.phases:
            lines += ["", f"  {phase.phase} ({phase.layout}): {'agrees' if phase.agrees else 'DIFFERS'}"]
            rows: list[tuple[str, ...]] = [("collectives", "planned", "", "found", "", "")]
            rows += [
                (
                    f"{line.kind} over {','.join(line.axes) or 'one device'}",
                    str(line.planned),
                    gigabytes(line.planned_bytes),
                    str(line.found),
                    gigabytes(line.found_bytes),
                    ("  " if line.explained else "! ") + line.verdict,
                )
                for line in phase.traffic
            ]
            rows += [_bytes("held on a device", *phase.held, None), _bytes("memory in all", *phase.memory, phase)]
            widths = [max(len(row[column]) for row in rows) for column in range(6)]
            for row in rows:
                cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:5], widths[1:5], strict=True))]
                lines.append(f"    {'  '.join([*cells, row[5]])}".rstrip())
        return "\n".join(lines)


def _bytes(name: str, planned: int, found: int, phase: PhaseReport | None) -> tuple[str, ...]:
    verdict = ""
    if phase is not None:
        within = abs(phase.memory_difference) <= MEMORY_TOLERANCE
        verdict = f"{'  ' if within else '! '}{phase.memory_difference:+.1%}"
    return (name, "", gigabytes(planned), "", gigabytes(found), verdict)


def verify_plan(
    plan: MeshPlan,
    model: str,
    *,
    dtype: Any = None,
    batch: int = 8,
    length: int | None = None,
    output: int | None = None,
    cache_dtype: str = "auto",
) -> Verification:
    """Compile a plan's programs with abstract weights and compare communication and memory.

    Args:
        plan: the plan.
        model: what it was made for, as ``plan`` takes it: a checkpoint, a configuration or a well-known name.
        dtype: as for ``plan``.
        batch: as for ``plan``; a plan for throughput is compiled with the rows that it chose.
        length: as for ``plan``.
        output: as for ``plan``.
        cache_dtype: as for ``plan``.

    Raises:
        PlanError: the plan has too many devices.
        SpmdInferError: compiling failed.
    """
    if plan.mesh.size > MOST_DEVICES:
        raise PlanError(f"mesh {plan.mesh} has {plan.mesh.size} devices; at most {MOST_DEVICES} can be simulated")
    pipeline = plan.chosen.pipeline
    job = {
        "model": model,
        "dtype": None if dtype is None else str(dtype),
        "rows": plan.chosen.rows or batch,
        "length": length,
        "output": output,
        "cache_dtype": cache_dtype,
        "mesh": str(plan.mesh),
        "kind": plan.cluster.device.name,
        "hosts": plan.cluster.hosts if plan.mesh.size == plan.cluster.count else 1,
        "rules": _rules_to_json(plan.rules),
        "most_parts": pipeline.microbatches // pipeline.stages if pipeline is not None else 1,
        "phase_rules": {name: _rules_to_json(rules) for name, rules in plan.chosen.rules.items()},
    }
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
    flags += [f"--xla_force_host_platform_device_count={plan.mesh.size}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    begin = time.perf_counter()
    try:
        answer = subprocess.run(
            [sys.executable, "-m", "spmd_infer.plan_verification"],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            env=environment,
        )
    except subprocess.TimeoutExpired as error:
        raise SpmdInferError(f"compiling for {plan.mesh.size} devices took longer than {TIMEOUT:g} s") from error
    if answer.returncode != 0:
        last = [line for line in answer.stderr.splitlines() if line.strip()][-1:]
        raise SpmdInferError(f"compiling for {plan.mesh.size} devices failed: {' '.join(last) or answer.returncode}")
    result = json.loads(answer.stdout.splitlines()[-1])
    phases = tuple(PhaseReport.from_dict(phase) for phase in result["phases"])
    return Verification(plan.mesh.shape, phases, time.perf_counter() - begin, result["peak_bytes"])


def _rules_to_json(rules: AxisRules) -> dict[str, Any]:
    return {
        "rules": dict(rules.rules),
        "units": dict(rules.units),
        "activations": dict(rules.activations),
        "name": rules.name,
    }


def _rules_from_json(data: Mapping[str, Any]) -> AxisRules:
    def table(rows: Mapping[str, Any]) -> dict[str, Any]:
        return {logical: tuple(axes) if isinstance(axes, list) else axes for logical, axes in rows.items()}

    return AxisRules(table(data["rules"]), dict(data["units"]), table(data["activations"]), data["name"])


def _run(job: Mapping[str, Any]) -> dict[str, Any]:
    """The work of the child process."""
    from spmd_infer.models.phases import Phase
    from spmd_infer.planning.hardware import parse_cluster
    from spmd_infer.planning.verify import verify_phase
    from spmd_infer.planning.workload import DEFAULT_OUTPUT, DEFAULT_SIZE, Workload
    from spmd_infer.plans import describe

    mesh = MeshSpec.parse(job["mesh"])
    cluster = parse_cluster(f"{mesh.size}x{job['kind']}", job["hosts"])
    described = describe(job["model"], job["dtype"], cluster)
    asked = Workload(
        job["rows"],
        {SEQ: job["length"] or DEFAULT_SIZE},
        job["output"] or DEFAULT_OUTPUT,
        cache_dtype=job["cache_dtype"],
    )
    workload = described.workload(asked)
    phases = described.phases(workload) or (Phase("infer", None, described.inputs),)
    reports = []
    for phase in phases:
        rules = _rules_from_json(job["phase_rules"].get(phase.name, job["rules"]))
        report = verify_phase(described.model, phase, mesh, rules, workload, cluster, most_parts=job["most_parts"])
        reports.append(report.as_dict())
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"phases": reports, "peak_bytes": kilobytes * (1 if sys.platform == "darwin" else 1024)}


if __name__ == "__main__":
    print(json.dumps(_run(json.loads(sys.stdin.read()))))
