"""Shapes on the real SmolLM2: texts fit their schemas, and tokens that are certain are run several at a time."""

import json
from pathlib import Path

import pytest

import spmd_infer as si
from benchmarks.structured import faults, requests
from spmd_infer.engine import Engine

pytestmark = [pytest.mark.demo, pytest.mark.slow]

CERTAIN = {
    "type": "object",
    "properties": {
        "country_of_birth": {"const": "Liechtenstein"},
        "number_of_siblings": {"type": "integer", "minimum": 0, "maximum": 99},
        "preferred_language": {"enum": ["Alemannic German", "Standard High German"]},
    },
    "required": ["country_of_birth", "number_of_siblings", "preferred_language"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Engine:
    return Engine.load(smollm2, mesh="data=1,model=1", dtype="float32")


def test_texts_fit_their_schemas_at_temperature_1(engine: Engine) -> None:
    """Forty of ``python benchmarks/structured.py``, which runs five hundred."""
    engine.task("generate", si.GenerationOptions(max_rows=8))
    done = engine.generate(*requests(40))
    assert faults(done) == []
    assert len({each.text for each in done}) > 20


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_jumping_ahead_changes_no_token(engine: Engine, temperature: float) -> None:
    shaped = si.SamplingParams(
        max_tokens=80,
        temperature=temperature,
        seed=3,
        structured_outputs=si.StructuredOutputs(json=CERTAIN, compact=True),
        repetition_penalty=1.1,
        frequency_penalty=0.3,
    )
    scored = si.SamplingParams(max_tokens=80, logprobs=1, structured_outputs=shaped.structured_outputs)
    cut = si.SamplingParams(max_tokens=9, structured_outputs=shaped.structured_outputs)
    stopped = si.SamplingParams(max_tokens=80, stop=("siblings",), structured_outputs=shaped.structured_outputs)
    free = si.SamplingParams(max_tokens=30, ignore_eos=True)
    params = [shaped, free, cut, stopped]
    prompts = ["A person as JSON: "] * len(params)
    found = {}
    for jumps in (False, True):
        task = engine.task("generate", si.GenerationOptions(max_rows=4, jump_ahead=jumps))
        alone = engine.generate(prompts[0], shaped)[0]
        steps = task.loop.times.steps["decode"]
        found[jumps] = engine.generate(prompts, params), alone, steps, engine.generate(prompts[0], scored)[0]
        pool = task.loop.scheduler.parts[0].pool
        pool.check()
        assert pool.used == 0
    plain, jumping = found[False], found[True]
    assert [each.token_ids for each in jumping[0]] == [each.token_ids for each in plain[0]]
    assert [each.text for each in jumping[0]] == [each.text for each in plain[0]]
    assert [each.finish_reason for each in plain[0]] == ["stop", "length", "length", "stop"]
    assert json.loads(plain[1].text)["country_of_birth"] == "Liechtenstein"
    assert jumping[1].token_ids == plain[1].token_ids
    # Two thirds of these tokens are certain: fewer steps, and none fewer where every token is scored.
    assert jumping[2] < 0.6 * plain[2]
    assert len(jumping[3].scores) == len(plain[3].scores) == len(plain[3].token_ids)
    print(f"\n{len(plain[1].token_ids)} tokens in {plain[2]} steps, with jumps in {jumping[2]}")
