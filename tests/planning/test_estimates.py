"""How the parts of a step's time add up on devices of their own and on simulated ones."""

import spmd_infer as si
from spmd_infer.planning.estimates import StepTime
from spmd_infer.planning.hardware import Cluster, parse_cluster


def step(devices: str | Cluster, mesh: str) -> StepTime:
    time = si.plan("smollm2-360m", devices=devices, mesh=mesh, batch=8, length=16, output=1).chosen.phases[0].time
    assert time is not None
    return time


def test_accelerators_read_while_they_compute() -> None:
    time = step("8xH100", "data=8,model=1")
    assert time.overlaps
    assert time.total == max(time.compute, time.memory) + time.collectives


def test_simulated_devices_do_one_after_the_other() -> None:
    time = step(parse_cluster("8"), "data=8,model=1")
    assert time.total == time.compute + time.memory + time.collectives


def test_copies_of_the_weights_cost_simulated_devices_time() -> None:
    copies, parts = (step(parse_cluster("8"), mesh) for mesh in ("data=8,model=1", "data=2,model=4"))
    assert copies.memory > 1.5 * parts.memory
    plan = si.plan("smollm2-360m", devices=8, batch=8, length=16, output=1)
    assert " + memory " in plan.explain()
