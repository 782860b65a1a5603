"""SmolLM2 continues prompts: tokens as transformers has them on every mesh, perplexity, stop strings, streaming."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spmd_infer as si
from spmd_infer.engine import Engine
from spmd_infer.errors import TaskError
from spmd_infer.generation.trace import Trace
from spmd_infer.tasks.completions import Completion
from spmd_infer.tasks.generate import Generate

FIXTURE = Path(__file__).parents[1] / "fixtures" / "llama_smollm2.npz"
PROMPT = "The capital of France is"
# What transformers 5 with torch generates greedily in float32 from the same file: tests/references/llama_smollm2.py.
TOKENS = [504, 3575, 282, 4649, 314]
CONTINUATION = " Paris.\n\nThe answer is: 2018-01"

pytestmark = [pytest.mark.demo, pytest.mark.slow]


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Engine:
    return Engine.load(smollm2, mesh="data=1,model=1", dtype="float32")


def one(engine: Engine, prompt: Any = PROMPT, **params: Any) -> Completion:
    (completion,) = engine.generate(prompt, si.SamplingParams(**params))
    return completion


def test_greedy_equals_transformers_on_every_mesh(mesh_text: str, smollm2: Path) -> None:
    saved = np.load(FIXTURE)
    engine = Engine.load(smollm2, mesh=mesh_text, dtype="float32")
    completion = one(engine, max_tokens=len(saved["continuation_ids"]))
    assert list(completion.token_ids) == saved["continuation_ids"].tolist()
    assert completion.text == str(saved["continuation"]) == CONTINUATION
    assert completion.finish_reason == "length"
    assert completion.prompt_tokens == 5
    if "model=1" not in mesh_text:
        explained = engine.plan.explain()
        print(f"\n{explained}")
        assert "heads" in explained  # 9 query and 3 key heads are kept whole, and the plan says so


def test_perplexity(engine: Engine) -> None:
    saved = np.load(FIXTURE)
    scores = engine.task("generate").score(saved["windows"].tolist())
    assert sum(map(len, scores)) == 2040
    losses = np.array([-score.mean(dtype=np.float64) for score in scores])
    perplexity = float(np.exp(losses.mean()))
    print(f"\nperplexity {perplexity:.4f}")
    assert perplexity == pytest.approx(30.47, rel=0.005)
    # Against torch window by window: float32 sums in another order.
    np.testing.assert_allclose(losses, saved["window_loss"], atol=1e-4)


def test_prompts_of_different_lengths_equal_one_by_one(engine: Engine) -> None:
    prompts = [PROMPT, "Once upon a time", "def fibonacci(n):\n    ", "Water boils at"]
    params = si.SamplingParams(max_tokens=12)
    together = engine.generate(prompts, params)
    alone = [engine.generate(prompt, params)[0] for prompt in prompts]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]


def test_token_ids_are_prompts_too(engine: Engine) -> None:
    ids = engine.task("generate").tokenizer.encode(PROMPT)
    expected = one(engine, max_tokens=4).token_ids
    assert one(engine, ids, max_tokens=4).token_ids == expected
    assert one(engine, np.array(ids), max_tokens=4).token_ids == expected
    assert [c.token_ids for c in engine.generate([ids, ids], si.SamplingParams(max_tokens=4))] == [expected] * 2


def test_chat_ends_with_its_end_token(engine: Engine) -> None:
    question = "What is the capital of France?"
    completion = one(engine, [{"role": "user", "content": question}], max_tokens=30)
    assert completion.text == "The capital of France is Paris."
    assert completion.finish_reason == "stop"
    assert completion.token_ids[-1] in engine.task("generate").tokenizer.eos_ids
    (again,) = engine.generate(question, si.SamplingParams(max_tokens=30), chat=True)
    assert again.token_ids == completion.token_ids
    longer = one(engine, [{"role": "user", "content": question}], max_tokens=12, ignore_eos=True)
    assert longer.finish_reason == "length"
    assert len(longer.token_ids) == 12


@pytest.mark.parametrize("stop", ["The answer", "wer is: 2", "\n\nT"])
def test_stop_strings_across_tokens(engine: Engine, stop: str) -> None:
    shown: list[str] = []
    params = si.SamplingParams(max_tokens=16, stop=(stop, "never"))
    (completion,) = engine.generate(PROMPT, params, on_text=lambda _, text: shown.append(text))
    assert completion.text == CONTINUATION[: CONTINUATION.index(stop)]
    assert completion.finish_reason == "stop"
    assert "".join(shown) == completion.text
    assert len(completion.token_ids) < 16


def test_stop_token_and_min_tokens(engine: Engine) -> None:
    ids = one(engine, max_tokens=16).token_ids
    stopped = one(engine, max_tokens=16, stop_token_ids=(ids[3],))
    # Tokens 2 and 3 are the same line break: the first of them ends the text, and is not in it.
    assert stopped.token_ids == ids[:3]
    assert stopped.text == " Paris."
    later = one(engine, max_tokens=16, stop=("Paris",), min_tokens=3)
    assert later.token_ids == ids
    assert later.text == CONTINUATION


def test_streams_add_up(engine: Engine) -> None:
    shown: dict[int, list[str]] = {0: [], 1: []}
    completions = engine.generate(
        [PROMPT, "Write an emoji: 🙂🙂🙂"],
        si.SamplingParams(max_tokens=16),
        on_text=lambda index, text: shown[index].append(text),
    )
    assert ["".join(shown[index]) for index in (0, 1)] == [c.text for c in completions]
    assert len(shown[0]) > 10


def test_streams_of_one_prompt(engine: Engine, tmp_path: Path) -> None:
    params = si.SamplingParams(max_tokens=9)
    pieces = list(engine.stream(PROMPT, params))
    assert len(pieces) > 5
    assert CONTINUATION.startswith("".join(pieces))

    async def both() -> list[str]:
        async def read(prompt: str) -> str:
            return "".join([piece async for piece in engine.astream(prompt, params)])

        return await asyncio.gather(read(PROMPT), read("Once upon a time"))

    assert asyncio.run(both()) == ["".join(pieces), one(engine, "Once upon a time", max_tokens=9).text]

    loop = engine.task("generate").loop
    loop.trace = Trace()
    started = engine.stream(PROMPT, si.SamplingParams(max_tokens=500, ignore_eos=True))
    assert next(started) == " Paris"
    started.close()  # cancels it
    loop.turn()
    assert len(loop.scheduler) == loop.scheduler.parts[0].pool.used == 0
    loop.trace.write(tmp_path / "trace.json")
    loop.trace = None
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["name"] for event in events if event["ph"] == "X"}
    assert {"plan", "dispatch prefill", "dispatch decode", "wait", "prefill", "decode", "queue"} <= names
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")


def test_shapes_and_several_continuations(engine: Engine) -> None:
    age = {"type": "integer", "minimum": 0, "maximum": 150}
    schema = {"type": "object", "properties": {"age": age}, "required": ["age"], "additionalProperties": False}
    shaped = si.SamplingParams(
        max_tokens=40, temperature=1.0, seed=4, structured_outputs=si.StructuredOutputs(json=schema)
    )
    free = si.SamplingParams(max_tokens=12)
    found = engine.generate(["Her age as JSON: ", PROMPT, "His age as JSON: "], [shaped, free, shaped])
    for completion in (found[0], found[2]):
        assert completion.finish_reason == "stop"
        assert isinstance(json.loads(completion.text)["age"], int)
    assert found[1].token_ids == one(engine, max_tokens=12).token_ids  # whatever shares its batch
    with pytest.raises(TaskError, match="cannot be used"):
        one(engine, structured_outputs=si.StructuredOutputs(regex="("))

    several = one(engine, max_tokens=6, temperature=1.0, seed=3, n=2, best_of=4, logprobs=0)
    totals = [each.cumulative_logprob / len(each.token_ids) for each in (several, *several.others)]
    assert len(totals) == 2
    assert totals == sorted(totals, reverse=True)

    beams = one(engine, max_tokens=6, num_beams=3, n=2)
    assert len(beams.others) == 1
    likelihoods = [
        score.sum()
        for score in engine.score([[*TOKENS, *each.token_ids] for each in (beams, one(engine, max_tokens=6))])
    ]
    assert likelihoods[0] >= likelihoods[1] - 1e-3  # at least as likely as the greedy text


def test_generates_on_after_a_move(smollm2: Path) -> None:
    engine = Engine.load(smollm2, mesh="data=1,model=1", dtype="float32")
    before = one(engine, max_tokens=6)
    engine.reshard("data=2,model=1")
    assert one(engine, max_tokens=6).token_ids == before.token_ids


def test_seeds_reproduce_in_any_batch(engine: Engine) -> None:
    drawing = si.SamplingParams(max_tokens=12, temperature=0.8, top_p=0.9, seed=7)
    alone = engine.generate(PROMPT, drawing)[0]
    mixed = engine.generate(
        ["Once upon a time", PROMPT], [si.SamplingParams(max_tokens=12, temperature=1.5, seed=1), drawing]
    )[1]
    assert mixed.token_ids == alone.token_ids
    other = engine.generate(PROMPT, si.SamplingParams(max_tokens=12, temperature=0.8, top_p=0.9, seed=8))[0]
    assert other.token_ids != alone.token_ids


def test_timings(engine: Engine) -> None:
    one(engine, max_tokens=16)
    before = engine.compiles
    completion = one(engine, max_tokens=16)
    assert engine.compiles == before
    assert completion.compile_s == 0
    assert completion.ttft_s > 0
    assert completion.decode_tokens_per_s > 0
    assert completion.imbalance == 1


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([], None, "there are no prompts"),
        (["a", ""], None, "prompt 1 is empty"),
        ([[1, 2], []], None, "prompt 1 is empty"),
        ([[49152]], None, "prompt 0 has token id 49152; the vocabulary has ids 0 to 49151"),
        (["a", "b"], [si.SamplingParams()], "2 prompts but 1 sampling parameters"),
        ([[1] * 9000], None, "prompt 0 has 9000 tokens, but the model's context is 8192"),
        ("a", si.SamplingParams(max_tokens=8192), "use max_tokens of at most 8191"),
        (5, None, "prompts must be texts, token ids or messages, not int"),
        ([["a", 1]], None, "prompt 0 is a list that is neither"),
        ([[{"role": "wizard"}, 3]], None, "prompt 0 is a list that is neither"),
    ],
)
def test_bad_prompts_leave_the_engine_usable(engine: Engine, prompts: Any, params: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        engine.generate(prompts, params)
    assert one(engine, max_tokens=1).text == " Paris"


def test_only_decoders_generate(minilm: Path) -> None:
    encoder = Engine.load(minilm, mesh="data=1")
    with pytest.raises(TaskError, match="bert"):
        Generate(encoder)
    with pytest.raises(TaskError, match="cannot generate"):
        encoder.generate("a")
