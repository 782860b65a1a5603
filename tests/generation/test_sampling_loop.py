"""Every sampling parameter through the loop, all in one batch, against whole passes and the same rules in numpy."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest

from spmd_infer.generation.requests import Request
from spmd_infer.generation.sampling_params import SamplingParams
from tests.generation.test_loop import EOS, engine, loop, prompts, request

PROMPT = tuple(prompts([9])[0])
WORD = (17, 90)  # two tokens that may not follow each other


@cache
def logits(ids: tuple[int, ...]) -> np.ndarray:
    """Of the token after these, in float64."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(ids)] = ids
    found: np.ndarray = engine().infer({"input_ids": padded})[0, len(ids) - 1].astype(np.float64)
    return found


def reference(prompt: Sequence[int], params: SamplingParams, words: Sequence[tuple[int, ...]] = ()) -> list[int]:
    """Greedy tokens under rules, in the order that docs/sampling.md states."""
    tokens: list[int] = []
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
    while len(tokens) < params.max_tokens:
        scores = logits((*prompt, *tokens)).copy()
        if params.allowed_token_ids is not None:
            scores[[token for token in range(128) if token not in params.allowed_token_ids]] = -np.inf
        for word in words:
            if tuple(tokens[len(tokens) - len(word) + 1 :]) == word[:-1] and len(tokens) >= len(word) - 1:
                scores[word[-1]] = -np.inf
        if len(tokens) < params.min_tokens:
            scores[list(ends)] = -np.inf
        for token, bias in params.logit_bias.items():
            scores[token] += bias
        seen = sorted({*prompt, *tokens})
        scores[seen] = np.where(
            scores[seen] > 0, scores[seen] / params.repetition_penalty, scores[seen] * params.repetition_penalty
        )
        counts = np.bincount(tokens, minlength=128)
        scores -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        tokens.append(int(scores.argmax()))
        if tokens[-1] in ends:
            break
    return tokens


def plain(count: int) -> list[int]:
    return reference(PROMPT, SamplingParams(max_tokens=count, ignore_eos=True))


def params() -> dict[str, SamplingParams]:
    usual = plain(12)
    often = max(usual, key=usual.count)
    return {
        "nothing": SamplingParams(max_tokens=12, ignore_eos=True),
        "max_tokens": SamplingParams(max_tokens=1, ignore_eos=True),
        "end token": SamplingParams(max_tokens=12, logit_bias={EOS: 100}),
        "ignore_eos": SamplingParams(max_tokens=6, logit_bias={EOS: 100}, ignore_eos=True),
        "min_tokens": SamplingParams(max_tokens=12, min_tokens=5, logit_bias={EOS: 100}),
        "stop_token_ids": SamplingParams(max_tokens=12, stop_token_ids=(usual[4], usual[7]), ignore_eos=True),
        "stop ids wait": SamplingParams(max_tokens=12, min_tokens=9, stop_token_ids=(usual[4],), ignore_eos=True),
        "logit_bias": SamplingParams(max_tokens=12, logit_bias={often: -100, 3: 2.5}, ignore_eos=True),
        "allowed": SamplingParams(max_tokens=12, allowed_token_ids=tuple(range(0, 128, 3)), ignore_eos=True),
        "repetition": SamplingParams(max_tokens=12, repetition_penalty=1.7, ignore_eos=True),
        "frequency": SamplingParams(max_tokens=12, frequency_penalty=-2.0, ignore_eos=True),
        "presence": SamplingParams(max_tokens=12, presence_penalty=-2.0, ignore_eos=True),
        "all": SamplingParams(
            max_tokens=12,
            min_tokens=6,
            stop_token_ids=(usual[2],),
            logit_bias={often: -3},
            allowed_token_ids=tuple(range(1, 128, 2)),
            repetition_penalty=1.3,
            frequency_penalty=0.4,
            presence_penalty=0.6,
        ),
    }


def words(name: str) -> list[tuple[int, ...]]:
    usual = plain(12)
    return [(usual[3],), (usual[0], usual[1]), WORD] if name == "bad_words" else []


@pytest.mark.parametrize("mesh", ["data=1,model=1", "data=2,model=4"])
def test_each_rule_in_one_batch_equals_numpy(mesh: str) -> None:
    asked = {**params(), "bad_words": SamplingParams(max_tokens=12, bad_words=("never",), ignore_eos=True)}
    used, requests = loop(mesh), dict[str, Request]()
    for name, own in asked.items():
        requests[name] = request(list(PROMPT), own)
        requests[name].bad_words = words(name)
        used.submit([requests[name]])
    used.run(requests.values())
    usual, expected = plain(12), {name: reference(PROMPT, own, words(name)) for name, own in asked.items()}
    assert {name: one.token_ids for name, one in requests.items()} == expected
    for name in ("logit_bias", "allowed", "repetition", "frequency", "presence", "all", "bad_words"):
        assert expected[name] != usual, f"{name} changes nothing: the test says nothing of it"
    assert [len(expected[name]) for name in ("max_tokens", "end token", "ignore_eos", "min_tokens")] == [1, 1, 6, 6]
    reasons = {name: (one.finish_reason, one.stop_reason) for name, one in requests.items()}
    assert reasons["end token"] == ("stop", None)
    assert reasons["stop_token_ids"][0] == "stop"
    assert reasons["stop_token_ids"][1] in asked["stop_token_ids"].stop_token_ids
    assert reasons["max_tokens"] == reasons["ignore_eos"] == ("length", None)


def test_seeds_reproduce_whatever_shares_the_batch() -> None:
    base = {"max_tokens": 12, "ignore_eos": True}
    own = [
        SamplingParams(**base, temperature=1.0, seed=1),
        SamplingParams(**base, temperature=0.7, seed=2, top_k=9),
        SamplingParams(**base, temperature=1.4, seed=3, top_p=0.7),
        SamplingParams(**base, temperature=1.0, seed=4, min_p=0.1),
        SamplingParams(**base, temperature=1.2, seed=5, top_k=30, top_p=0.9, min_p=0.02),
        SamplingParams(**base, temperature=1.0, seed=6, repetition_penalty=1.4, logprobs=3),
        SamplingParams(**base, temperature=0.9, seed=7, logit_bias={5: 4.0}, presence_penalty=0.5),
        SamplingParams(**base, temperature=1.0, seed=8, allowed_token_ids=tuple(range(2, 90))),
    ]
    ids = prompts([3, 17, 1, 9, 30, 5, 12, 8])

    def drawn(indices: Sequence[int], **options: int) -> dict[int, list[int]]:
        used = loop(**options)
        requests = {index: request(ids[index], own[index]) for index in indices}
        for one in requests.values():
            used.submit([one])
        used.run(requests.values())
        return {index: one.token_ids for index, one in requests.items()}

    alone = {index: drawn([index])[index] for index in range(len(own))}
    assert len({tuple(tokens) for tokens in alone.values()}) == len(own)
    assert drawn(range(8)) == alone
    assert drawn(range(7, -1, -1), max_rows=3) == alone
    for some in ((0, 5), (6, 2, 1), (7, 3, 4, 0)):
        assert drawn(some) == {index: alone[index] for index in some}
