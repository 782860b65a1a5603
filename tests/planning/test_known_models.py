"""Every built-in shape is a model of the zoo with the number of weights that its makers state."""

import time

import jax
import pytest

from spmd_infer.functional import ModelFunction, model_function
from spmd_infer.models import find_family
from spmd_infer.planning import known_models

# Billions of weights as the makers state them in papers and model cards, with the digits given there.
STATED = {
    "llama-3.1-8b": 8.03,
    "llama-3.1-70b": 70.6,
    "llama-3.1-405b": 405.9,
    "llama-3.2-1b": 1.24,
    "llama-3.2-3b": 3.21,
    "llama-3-8b": 8.03,
    "llama-3-70b": 70.6,
    "llama-2-7b": 6.74,
    "llama-2-13b": 13.0,
    "llama-2-70b": 69.0,
    "mistral-7b": 7.25,
    "smollm2-135m": 0.1345,
    "smollm2-360m": 0.3618,
    "smollm2-1.7b": 1.711,
    "tinyllama-1.1b": 1.10,
    "palm-540b": 540.35,
    "bert-base": 0.109,
    "bert-large": 0.335,
    "all-minilm-l6": 0.0227,
}


def abstract(name: str) -> ModelFunction:
    config = known_models.find(name)
    assert config is not None
    family, _ = find_family(config["architectures"][0], {})
    return model_function(family.abstract(family.config_from_hf(config)))


def test_all_are_covered() -> None:
    assert set(STATED) == set(known_models.names())


@pytest.mark.parametrize("name", known_models.names())
def test_number_of_weights(name: str) -> None:
    params = abstract(name).params
    count = sum(value.size for value in params.values())
    assert all(isinstance(value, jax.ShapeDtypeStruct) for value in params.values())
    # 0.7 % is the rounding of the stated numbers (and BERT's pooler, which the zoo leaves out: 0.5 %).
    assert count / 1e9 == pytest.approx(STATED[name], rel=0.007)


def test_a_deep_model_is_built_in_time_linear_in_its_depth() -> None:
    begin = time.perf_counter()
    assert len(abstract("llama-3.1-405b").params) == 126 * 9 + 3
    assert time.perf_counter() - begin < 3.0  # 0.7 s on a quiet machine; with a new key for every weight 25 s


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("meta-llama/Llama-3.1-405B-Instruct", "llama-3.1-405b"),
        ("Meta-Llama-3.1-8B", "llama-3.1-8b"),
        ("Llama-3.3-70B-Instruct", "llama-3.1-70b"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "tinyllama-1.1b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("sentence-transformers/all-MiniLM-L6-v2", "all-minilm-l6"),
        ("SmolLM2-1.7B-Instruct", "smollm2-1.7b"),
    ],
)
def test_names_as_people_write_them(said: str, meant: str) -> None:
    assert known_models.find(said) == known_models.find(meant) is not None


def test_other_names_are_not_guessed() -> None:
    for name in ("gpt-9", "llama", "llama-3.1", "", "config.json", "llama-3.1-405b-turbo"):
        assert known_models.find(name) is None


def test_what_is_approximated_is_said() -> None:
    palm = known_models.find("palm-540b")
    assert palm is not None
    assert "one after the other" in palm["approximation"]
    palm.clear()
    assert known_models.find("palm-540b") != {}
