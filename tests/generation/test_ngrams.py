"""Prompt lookup against a search in plain Python."""

import jax
import numpy as np
import pytest

from spmd_infer.generation.ngrams import lookup


def expected(text: list[int], count: int, longest: int, shortest: int) -> list[int]:
    for size in range(longest, shortest - 1, -1):
        for end in range(len(text) - 1, size - 1, -1):  # the latest first
            if text[end - size : end] == text[-size:]:
                going_on = list(text)
                for _ in range(count):
                    going_on.append(going_on[end + len(going_on) - len(text)])
                return going_on[len(text) :]
    return [-1] * count


@pytest.mark.parametrize(("longest", "shortest"), [(3, 2), (1, 1), (4, 1)])
def test_equals_a_search_from_the_end(longest: int, shortest: int) -> None:
    rng = np.random.default_rng(3)
    texts = [rng.integers(0, 3, size).tolist() for size in (1, 2, 3, 4, 5, 8, 13, 20, 30, 40)]
    texts += [rng.integers(0, 12, 40).tolist() for _ in range(20)] + [[7] * 40, list(range(40)), [1, 2] * 10]
    history = np.full((len(texts), 44), 7, np.int32)  # what does not count yet looks like tokens, too
    for row, text in zip(history, texts, strict=True):
        row[: len(text)] = text
    known = np.array([len(text) for text in texts], np.int32)
    found = jax.jit(lookup, static_argnames=("count", "longest", "shortest"))(
        history, known, count=4, longest=longest, shortest=shortest
    )
    assert np.asarray(found).tolist() == [expected(text, 4, longest, shortest) for text in texts]
    assert {line[0] == -1 for line in np.asarray(found).tolist()} == {True, False}
