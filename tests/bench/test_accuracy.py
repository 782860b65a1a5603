"""Measures of accuracy: against scipy and by hand, and what cannot be measured."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from spmd_infer.bench import accuracy
from spmd_infer.engine import Engine
from spmd_infer.errors import TaskError


class Replies:
    """Stands in for an engine of any task, with answers given beforehand."""

    config: Any = type("Sizes", (), {"num_classes": 6})()

    def __init__(self, answers: Any) -> None:
        self.answers = answers
        self.tokenizer = self
        self.asked: Any = None

    def task(self, _: str) -> Any:
        return self

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        assert not add_special
        return [ord(character) for character in text]

    def score(self, windows: list[list[int]]) -> Any:
        self.asked = windows
        return [np.full(len(window) - 1, self.answers, np.float32) for window in windows]

    def embed(self, texts: list[str]) -> Any:
        return np.array([self.answers[text] for text in texts])

    def __call__(self, paths: list[Path], top: int) -> Any:
        return [[type("Label", (), {"index": i})() for i in self.answers[path.name][:top]] for path in paths]


def replies(answers: Any) -> Any:
    return Replies(answers)


def test_perplexity_of_even_odds() -> None:
    engine = replies(-np.log(8))
    found = accuracy.perplexity(engine, "abcdefghijk", window_len=4)
    assert found.perplexity == pytest.approx(8)
    assert (found.tokens, found.windows, found.window_len) == (6, 2, 4)
    assert engine.asked == [[97, 98, 99, 100], [101, 102, 103, 104]]  # what does not fill a window is left out
    assert accuracy.perplexity(engine, "abcdefghijk", windows=1, window_len=4).tokens == 3


@pytest.mark.parametrize(("windows", "length"), [(None, 12), (3, 4), (1, 1)])
def test_texts_that_are_too_short(windows: int | None, length: int) -> None:
    with pytest.raises(TaskError, match="11 tokens"):
        accuracy.perplexity(replies(0), "abcdefghijk", windows=windows, window_len=length)


def test_correlation_with_ties_equals_scipy() -> None:
    rng = np.random.default_rng(0)
    names = [f"s{i}" for i in range(40)]
    vectors = {name: rng.normal(size=8) for name in names}
    vectors["s3"], vectors["s2"] = vectors["s1"], vectors["s0"]  # two pairs of one cosine
    pairs = [(float(rng.integers(0, 4)), names[2 * i], names[2 * i + 1]) for i in range(20)]
    cosines = [vectors[a] @ vectors[b] / np.linalg.norm(vectors[a]) / np.linalg.norm(vectors[b]) for _, a, b in pairs]
    expected = spearmanr(np.round(cosines, 12), [score for score, _, _ in pairs]).statistic
    assert accuracy.correlation(replies(vectors), pairs).spearman == pytest.approx(expected, abs=1e-9)
    with pytest.raises(TaskError, match="at least 2"):
        accuracy.correlation(replies(vectors), pairs[:1])


def test_hits() -> None:
    answers = {"a.png": [1, 2, 3, 4, 5, 0], "b.png": [1, 2, 3, 4, 5, 0], "c.png": [0, 1, 2, 3, 4, 5]}
    pictures = [(Path("a.png"), 1), (Path("b.png"), 5), (Path("c.png"), 5)]
    found = accuracy.hits(replies(answers), pictures)
    assert found.pictures == 3
    assert found.top1 == pytest.approx(1 / 3)
    assert found.top5 == pytest.approx(2 / 3)
    with pytest.raises(TaskError, match="no labelled"):
        accuracy.hits(replies(answers), [])


def test_pairs_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "pairs.tsv"
    file.write_text("x\ty\tz\t1\t2.5\tone\ttwo\textra\n\n3\tfour\tfive\n", "utf-8")
    assert accuracy.read_pairs(file) == [(2.5, "one", "two"), (3.0, "four", "five")]
    file.write_text("3\tfour\tfive\nhigh\tsix\tseven\n", "utf-8")
    with pytest.raises(TaskError, match="line 2: expected score"):
        accuracy.read_pairs(file)


def test_pictures_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "12").mkdir()
    for name in ("12/dog_3.jpg", "cat_7.png", "readme.txt"):
        (tmp_path / name).touch()
    assert accuracy.labelled_pictures(tmp_path) == [(tmp_path / "12/dog_3.jpg", 12), (tmp_path / "cat_7.png", 7)]
    (tmp_path / "bird.png").touch()
    with pytest.raises(TaskError, match=r"bird\.png: neither"):
        accuracy.labelled_pictures(tmp_path)


@pytest.mark.demo
def test_what_the_demos_reach(
    minilm: Path,
    sts_b_test: list[tuple[float, str, str]],
    efficientnet: Path,
    imagenet_pictures: list[tuple[Path, int]],
) -> None:
    found = accuracy.correlation(Engine.load(minilm, mesh="data=2"), sts_b_test)
    assert 100 * found.spearman == pytest.approx(82.03, abs=0.2)
    hits = accuracy.hits(Engine.load(efficientnet, mesh="data=2"), imagenet_pictures)
    assert (hits.top1, hits.top5) == (18 / 20, 19 / 20)
