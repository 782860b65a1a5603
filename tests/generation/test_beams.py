"""Beam search against searching every sequence, and against the same search written out over whole vocabularies."""

import itertools
from typing import Any

import numpy as np
import pytest

from spmd_infer.errors import TaskError
from spmd_infer.generation.beams import BeamSearch, likeliest_first

WORDS, END = 6, 5


def model(seed: int, words: int = WORDS) -> Any:
    """Log-probabilities that depend on all tokens before, drawn anew for each prefix."""

    def logprobs(tokens: tuple[int, ...]) -> np.ndarray:
        logits = np.random.default_rng([seed, *tokens]).normal(0, 2, words)
        return logits - np.log(np.exp(logits).sum())

    return logprobs


def search(logprobs: Any, beams: BeamSearch, num_top: int | None = None) -> BeamSearch:
    while not beams.is_done:
        before = list(beams.beams)
        rows = np.stack([logprobs(tokens) for tokens in beams.beams])
        ids = np.argsort(-rows, axis=1, kind="stable")[:, : num_top or beams.num_candidates]
        going = beams.step(ids, np.take_along_axis(rows, ids, axis=1))
        assert beams.beams == [(*before[beam.parent], beam.token) for beam in going]
    return beams


def every_sequence(logprobs: Any, most: int, penalty: float) -> list[tuple[float, tuple[int, ...]]]:
    """All texts of at most ``most`` tokens, best first."""
    found = []
    for length in range(1, most + 1):
        for body in itertools.product(range(END), repeat=length - 1):
            lasts = range(WORDS) if length == most else (END,)
            total = sum(logprobs(body[:place])[token] for place, token in enumerate(body))
            found += [((total + logprobs(body)[last]) / length**penalty, (*body, last)) for last in lasts]
    return sorted(found, reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("seed", range(5))
def test_wide_enough_it_finds_the_best_of_all(seed: int, penalty: float) -> None:
    """With as many beams as there are prefixes nothing is lost, and the search is exhaustive."""
    logprobs, most = model(seed), 3
    width = WORDS**most
    beams = BeamSearch(width, most, {END}, length_penalty=penalty, early_stopping="never")
    found = search(logprobs, beams, num_top=WORDS).best(20)
    expected = every_sequence(logprobs, most, penalty)
    assert [each.tokens for each in found] == [tokens for _, tokens in expected[:20]]
    np.testing.assert_allclose([each.score for each in found], [score for score, _ in expected[:20]], rtol=1e-12)
    for each in found:
        assert each.length_limited == (each.tokens[-1] != END)


def written_out(
    logprobs: Any, width: int, most: int, penalty: float, early: bool | str
) -> list[tuple[float, tuple[int, ...]]]:
    """The search step by step over whole vocabularies, with nothing left out beforehand."""
    running, finished = [(0.0, ())], []
    for length in range(1, most + 1):
        everything = sorted(
            (
                (total + value, (*tokens, token))
                for total, tokens in running
                for token, value in enumerate(logprobs(tokens))
            ),
            key=lambda each: -each[0],
        )
        over = [length == most or tokens[-1] == END for _, tokens in everything]
        finished += [
            (total / length**penalty, tokens)
            for (total, tokens), done in zip(everything[:width], over[:width], strict=True)
            if done
        ]
        finished = sorted(finished, key=lambda each: -each[0])[:width]
        running = [each for each, done in zip(everything, over, strict=True) if not done][:width]
        if len(finished) == width:
            reach = most if early == "never" and penalty > 0 else length
            if early is True or not running or running[0][0] / reach**penalty <= finished[-1][0]:
                break
    return finished


@pytest.mark.parametrize("early", [True, False, "never"])
@pytest.mark.parametrize("width", [2, 3, 5])
@pytest.mark.parametrize("penalty", [0.0, 0.7, 2.0, -0.5])
def test_few_candidates_suffice(width: int, penalty: float, early: bool | str) -> None:
    """Twice as many candidates as beams give what whole vocabularies give."""
    for seed in range(6):
        logprobs = model(seed, 40)
        beams = BeamSearch(width, 8, {END}, length_penalty=penalty, early_stopping=early)  # type: ignore[arg-type]
        found = search(logprobs, beams).best(width)
        expected = written_out(logprobs, width, 8, penalty, early)
        assert [each.tokens for each in found] == [tokens for _, tokens in expected]
        np.testing.assert_allclose([each.score for each in found], [score for score, _ in expected])


def test_one_beam_is_greedy() -> None:
    logprobs = model(1, 40)
    found = search(logprobs, BeamSearch(1, 12, {END})).best(1)[0].tokens
    greedy: tuple[int, ...] = ()
    while len(greedy) < 12 and END not in greedy:
        greedy += (int(logprobs(greedy).argmax()),)
    assert found == greedy


def test_early_stopping_looks_less_far() -> None:
    """Each rule ends no later than the next stricter one, and they differ somewhere."""
    lengths: dict[Any, int] = {}
    for early in (True, False, "never"):
        steps = 0
        for seed in range(20):
            beams = BeamSearch(3, 20, {END}, length_penalty=1.5, early_stopping=early)  # type: ignore[arg-type]
            logprobs = model(seed, 12)
            while not beams.is_done:
                rows = np.stack([logprobs(tokens) for tokens in beams.beams])
                ids = np.argsort(-rows, axis=1)[:, :6]
                beams.step(ids, np.take_along_axis(rows, ids, axis=1))
                steps += 1
        lengths[early] = steps
    assert lengths[True] < lengths[False] < lengths["never"]


def test_min_tokens_and_ends_by_text() -> None:
    found = search(model(2), BeamSearch(3, 6, {END}, min_tokens=4)).best(3)
    assert all(len(each.tokens) >= 4 for each in found)
    by_pair = BeamSearch(2, 30, lambda tokens: tokens[-2:] == (1, 2))
    for each in search(model(3), by_pair).best(2):
        assert each.length_limited or each.tokens[-2:] == (1, 2)


def test_forbidden_candidates_are_left_out() -> None:
    beams = BeamSearch(2, 5, {END})
    going = beams.step(np.array([[1, 2, 3]]), np.array([[-1.0, -np.inf, -np.inf]]))
    assert [(beam.parent, beam.token) for beam in going] == [(0, 1)]
    going = beams.step(np.array([[4, END]]), np.array([[-0.5, -0.1]]))
    assert beams.beams == [(1, 4)]
    assert beams.best(2)[0].tokens == (1, END)


def test_steps_that_do_not_fit() -> None:
    beams = BeamSearch(2, 1, {END})
    with pytest.raises(TaskError, match=r"a step of 1 beams got tokens \(2, 4\)"):
        beams.step(np.zeros((2, 4), np.int32), np.zeros((2, 4)))
    beams.step(np.arange(4)[None], -np.arange(4.0)[None])
    assert beams.is_done
    with pytest.raises(TaskError, match="a step of 0 beams"):
        beams.step(np.arange(4)[None], -np.arange(4.0)[None])


def test_best_of_goes_by_log_probability_per_token() -> None:
    assert likeliest_first([-4.0, -3.0, -9.0, 0.0], [4, 2, 9, 0]) == [3, 0, 2, 1]
