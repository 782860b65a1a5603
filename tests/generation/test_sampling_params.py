"""The parameters of a request: bounds, what excludes what, and the values in force."""

import subprocess
import sys
from typing import Any

import pytest

from spmd_infer.errors import TaskError
from spmd_infer.generation.sampling_params import SamplingParams, StructuredOutputs, check_vocabulary, stop_tokens
from spmd_infer.generation.structured_outputs import MAX_CHOICES, MAX_DEPTH, MAX_GRAMMAR_BYTES


def test_stop_tokens() -> None:
    assert stop_tokens(SamplingParams(stop_token_ids=(3,)), {1, 2}) == {1, 2, 3}
    assert stop_tokens(SamplingParams(stop_token_ids=(3,), ignore_eos=True), {1, 2}) == {3}


def test_one_string_need_not_be_a_tuple() -> None:
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]  # what users write
    assert SamplingParams(bad_words="no").bad_words == ("no",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be a whole number from 1 to 1048576, not 0"),
        ({"max_tokens": 2.5}, "max_tokens must be a whole number from 1 to 1048576, not 2.5"),
        ({"max_tokens": 1 << 40}, "max_tokens must be a whole number from 1 to 1048576"),
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens must be a whole number from 0 to 4, not 5"),
        ({"temperature": -1}, "temperature must be a number from 0 to 100, not -1"),
        ({"temperature": float("nan")}, "temperature must be a number from 0 to 100, not nan"),
        ({"temperature": float("inf")}, "temperature must be a number from 0 to 100, not inf"),
        ({"temperature": "hot"}, "temperature must be a number from 0 to 100, not 'hot'"),
        ({"top_k": -2}, "top_k must be a whole number of 0 or more, not -2"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, not 0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, not 1.1"),
        ({"min_p": 1.5}, "min_p must be a number from 0 to 1, not 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0 and at most 10, not 0"),
        ({"frequency_penalty": 2.1}, "frequency_penalty must be a number from -2 to 2, not 2.1"),
        ({"presence_penalty": -3}, "presence_penalty must be a number from -2 to 2, not -3"),
        ({"logit_bias": [1]}, "logit_bias must map token ids to numbers, not list"),
        ({"logit_bias": {5: 101}}, r"logit_bias\[5\] must be a number from -100 to 100, not 101"),
        ({"logit_bias": {-5: 1}}, "logit_bias must be a whole number from 0 to 2147483647, not -5"),
        ({"logit_bias": {"5": 1}}, "logit_bias must be a whole number from 0 to 2147483647, not '5'"),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, "logit_bias must have 0 to 1024 entries, not 1025"),
        ({"allowed_token_ids": ()}, "allowed_token_ids must have 1 to 65536 entries, not 0"),
        ({"allowed_token_ids": (1.5,)}, "allowed_token_ids must be a whole number"),
        ({"bad_words": ("x",) * 65}, "bad_words must have 0 to 64 entries, not 65"),
        ({"bad_words": ("x" * 65,)}, "bad_words has a string of 65 characters; the most is 64"),
        ({"seed": True}, "seed must be a whole number"),
        ({"seed": 2**63}, "seed must be a whole number from -9223372036854775808 to 9223372036854775807"),
        ({"n": 0}, "n must be a whole number from 1 to 64, not 0"),
        ({"n": 65}, "n must be a whole number from 1 to 64, not 65"),
        ({"n": 3, "best_of": 2}, "best_of must be a whole number from 3 to 64, not 2"),
        ({"num_beams": 11}, "num_beams must be a whole number from 1 to 10, not 11"),
        ({"length_penalty": 11}, "length_penalty must be a number from -10 to 10, not 11"),
        ({"early_stopping": "soon"}, "early_stopping must be True, False or 'never', not 'soon'"),
        ({"logprobs": 21}, "logprobs must be a whole number from 0 to 20, not 21"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be a whole number from 0 to 20, not -1"),
        ({"stop": ("",)}, "stop must be non-empty strings, not ''"),
        ({"stop": ("x",) * 17}, "stop must have 0 to 16 entries, not 17"),
        ({"stop": ("x" * 257,)}, "stop has a string of 257 characters; the most is 256"),
        ({"stop": 5}, "stop must be a list, not 5"),
        ({"stop_token_ids": (-3,)}, "stop_token_ids must be a whole number from 0 to 2147483647, not -3"),
        ({"stop_token_ids": range(65)}, "stop_token_ids must have 0 to 64 entries, not 65"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, not 1"),
        ({"structured_outputs": "json"}, "structured_outputs must be StructuredOutputs, not str"),
        ({"num_beams": 2, "temperature": 1.0}, "num_beams cannot be combined with temperature"),
        ({"num_beams": 2, "n": 3}, "n is 3, but a beam search of num_beams=2"),
        (
            {"structured_outputs": StructuredOutputs(regex="a"), "allowed_token_ids": (1,), "min_tokens": 2},
            "structured_outputs cannot be combined with allowed_token_ids, min_tokens",
        ),
    ],
)
def test_values_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        SamplingParams(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "exactly one of .*; given: none"),
        ({"regex": "a", "choice": ("b",)}, "exactly one of .*; given: regex, choice"),
        ({"json": "{"}, "is not JSON"),
        ({"json": "[1]"}, "must be a JSON object, not list"),
        ({"json": {"const": object()}}, "is not JSON"),
        ({"json": '{"a":' * 2000 + "1" + "}" * 2000}, "is not JSON|levels deep"),
        ({"json_object": 1}, "json_object must be True or False"),
        ({"regex": "a" * (MAX_GRAMMAR_BYTES + 1)}, "regex has 65,537 bytes; the most is 65,536"),
        ({"regex": ""}, "regex must be a non-empty string"),
        ({"regex": "\ud800"}, "not text that UTF-8 can hold"),
        ({"json": {"enum": ["x" * MAX_GRAMMAR_BYTES]}}, "json has 65,.* bytes"),
        ({"choice": ()}, "1 to 1024 strings, not 0"),
        ({"choice": ("a",) * (MAX_CHOICES + 1)}, "1 to 1024 strings, not 1025"),
        ({"choice": "ab"}, "must be a list of strings, not str"),
        ({"choice": ("a", "")}, "non-empty strings"),
        ({"grammar": 5}, "grammar must be a non-empty string, not 5"),
    ],
)
def test_shapes_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        StructuredOutputs(**values)


def test_deep_schema() -> None:
    schema: dict[str, Any] = {}
    for _ in range(MAX_DEPTH):
        schema = {"not": schema}
    with pytest.raises(TaskError, match="more than 64 levels"):
        StructuredOutputs(json=schema)
    assert StructuredOutputs(json=schema["not"]).kind == "json"


def test_ids_outside_the_vocabulary() -> None:
    check_vocabulary(SamplingParams(stop_token_ids=(9,), logit_bias={9: 1.0}), 10)
    for values in ({"stop_token_ids": (10,)}, {"allowed_token_ids": (3, 10)}, {"logit_bias": {10: 0.0}}):
        name = next(iter(values))
        with pytest.raises(TaskError, match=f"{name} has 10; the vocabulary has ids 0 to 9"):
            check_vocabulary(SamplingParams(**values), 10)  # type: ignore[arg-type]


def test_effective_values() -> None:
    greedy = SamplingParams(temperature=0.0005, top_k=5, top_p=0.5, seed=3).effective()
    assert (greedy["temperature"], greedy["top_k"], greedy["top_p"], greedy["seed"]) == (0.0, 0, 1.0, None)
    drawn = SamplingParams(temperature=1.0, top_k=-1, structured_outputs=StructuredOutputs(choice=["a", "b"]))  # type: ignore[arg-type]
    values = drawn.seeded().effective()
    assert values["top_k"] == 0
    assert values["best_of"] == 1
    assert 0 <= values["seed"] < 2**32
    assert values["structured_outputs"] == {"choice": '["a","b"]'}


def test_branches_have_seeds_of_their_own() -> None:
    branches = SamplingParams(temperature=1.0, n=2, best_of=4, seed=2**32 - 2).branches()
    assert [branch.seed for branch in branches] == [2**32 - 2, 2**32 - 1, 0, 1]
    assert all(branch.n == branch.samples == 1 for branch in branches)
    assert len({branch.seed for branch in SamplingParams(temperature=1.0, n=3).branches()}) == 3


def test_what_needs_rules() -> None:
    assert not SamplingParams(temperature=1.0, top_p=0.5, min_p=0.1, min_tokens=2, seed=1, n=2).needs_rules
    for values in (
        {"repetition_penalty": 1.1},
        {"presence_penalty": 1.0},
        {"logit_bias": {1: 1.0}},
        {"allowed_token_ids": (1,)},
        {"bad_words": ("no",)},
        {"logprobs": 0},
        {"n": 1, "best_of": 2},
        {"num_beams": 2},
        {"structured_outputs": StructuredOutputs(json_object=True)},
    ):
        assert SamplingParams(**values).needs_rules, values  # type: ignore[arg-type]


def test_imports_no_jax() -> None:
    code = "import sys, spmd_infer.generation.sampling_params; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
