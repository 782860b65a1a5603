"""Prefill and decode in different layouts over the same weights: the same tokens, and a costed hand-over."""

from dataclasses import replace
from pathlib import Path

import pytest

import spmd_infer as si
from spmd_infer.planning.audit import collectives
from spmd_infer.planning.mesh_plan import MeshPlan

pytestmark = [pytest.mark.slow, pytest.mark.demo]
PROMPTS = ["The capital of France is", "Water boils at", "One, two, three,"]


def with_phases(path: Path, prefill: str, decode: str) -> MeshPlan:
    plan = si.plan(path, devices=8, mesh="data=4,model=2", batch=4, length=16, rules=si.find_layout(decode))
    units = dict(plan.rules.units)
    rules = {"prefill": si.find_layout(prefill).with_units(units), "decode": plan.rules}
    return replace(plan, chosen=replace(plan.chosen, rules=rules))


@pytest.mark.parametrize(("prefill", "decode"), [("gathered", "2d"), ("1d", "kv-batch")])
def test_same_tokens_whatever_the_phases_layouts(smollm2: Path, prefill: str, decode: str) -> None:
    params = si.SamplingParams(max_tokens=6)
    expected = si.Engine.load(smollm2, mesh="data=1").generate(PROMPTS, params)
    engine = si.Engine.load(smollm2, mesh=with_phases(smollm2, prefill, decode))
    found = engine.generate(PROMPTS, params)
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert set(engine.plan.phase_rules) == {"prefill"}
    kinds = {
        program.name.split("_")[0]: {(each.kind, each.axes(engine.mesh)) for each in collectives(program.compiled)}
        for program in engine.programs
    }
    if decode == "2d":  # widths are summed over data only where the weights stay
        assert ("all-reduce", ("data",)) in kinds["decode"] - kinds["prefill"]
