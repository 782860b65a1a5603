"""How good a model's answers are: perplexity of a text, order of sentence pairs, hits on labelled pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from spmd_infer.errors import TaskError

if TYPE_CHECKING:
    from spmd_infer.engine import Engine

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_NUMBERED = re.compile(r".*_(\d+)")


@dataclass(frozen=True)
class Perplexity:
    """How well a decoder foresees a text.

    Attributes:
        perplexity: ``exp`` of the mean negative log-probability of the scored tokens.
        tokens: how many were scored.
        windows: in how many windows.
        window_len: tokens in each, of which the first is given.
    """

    perplexity: float
    tokens: int
    windows: int
    window_len: int


@dataclass(frozen=True)
class Correlation:
    """How well an encoder orders sentence pairs.

    Attributes:
        spearman: rank correlation of the cosines with the human scores, from -1 to 1.
        pairs: how many pairs there were.
    """

    spearman: float
    pairs: int


@dataclass(frozen=True)
class Hits:
    """How often a classifier names what is on a picture.

    Attributes:
        top1: part of the pictures whose likeliest class is the right one.
        top5: part of those with the right one among the five likeliest.
        pictures: how many there were.
    """

    top1: float
    top5: float
    pictures: int


def perplexity(engine: Engine, text: str, *, windows: int | None = None, window_len: int = 511) -> Perplexity:
    """Perplexity of the beginning of a text, cut into windows that are scored by themselves, from their second token.

    No special tokens are added.

    Args:
        engine: holds a decoder.
        text: any text.
        windows: how many windows from its beginning; default as many as it fills.
        window_len: tokens in a window.

    Raises:
        TaskError: the text is too short, or the model is no decoder.
    """
    task: Any = engine.task("generate")
    ids = task.tokenizer.encode(text, add_special=False)
    wanted = len(ids) // window_len if windows is None else windows
    if wanted < 1 or window_len < 2 or len(ids) < wanted * window_len:
        raise TaskError(
            f"the text has {len(ids):,} tokens; {max(1, wanted):,} windows of {window_len:,} need "
            f"{max(1, wanted) * window_len:,}, and a window at least 2"
        )
    scores = task.score([ids[start * window_len : (start + 1) * window_len] for start in range(wanted)])
    losses = np.concatenate(scores).astype(np.float64)
    return Perplexity(float(np.exp(-losses.mean())), len(losses), wanted, window_len)


def correlation(engine: Engine, pairs: Sequence[tuple[float, str, str]]) -> Correlation:
    """Rank correlation of embeddings' cosines with human scores.

    Args:
        engine: holds an encoder.
        pairs: a score and two sentences each.

    Raises:
        TaskError: there are fewer than two pairs, or the model is no encoder.
    """
    if len(pairs) < 2:
        raise TaskError(f"a correlation needs at least 2 sentence pairs, not {len(pairs)}")
    vectors = engine.embed([sentence for _, first, second in pairs for sentence in (first, second)])
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = (vectors[0::2] * vectors[1::2]).sum(axis=1)
    scores = np.array([score for score, _, _ in pairs], np.float64)
    together = np.corrcoef(_ranks(cosines.astype(np.float64)), _ranks(scores))
    return Correlation(float(together[0, 1]), len(pairs))


def hits(engine: Engine, pictures: Sequence[tuple[Path, int]]) -> Hits:
    """How often the right class is the likeliest one, and among the five likeliest.

    Args:
        engine: holds a classifier.
        pictures: files with the number of their class.

    Raises:
        TaskError: there are no pictures, or the model is no classifier.
    """
    if not pictures:
        raise TaskError("there are no labelled pictures")
    task = engine.task("classify")
    config: Any = engine.config
    labels = task([path for path, _ in pictures], top=min(5, config.num_classes))
    found = [[label.index for label in each] for each in labels]
    first = [best[0] == index for best, (_, index) in zip(found, pictures, strict=True)]
    among = [index in best for best, (_, index) in zip(found, pictures, strict=True)]
    return Hits(float(np.mean(first)), float(np.mean(among)), len(pictures))


def read_pairs(path: Path) -> list[tuple[float, str, str]]:
    """Sentence pairs of a file with columns split by tabs.

    The score is in the fifth column and the sentences are in the two after it, as in STS-B; a line of three columns has
    the score first.

    Raises:
        TaskError: a line has fewer columns, or no number where the score should be.
    """
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        columns = line.split("\t")
        at = 0 if len(columns) == 3 else 4
        try:
            pairs.append((float(columns[at]), columns[at + 1], columns[at + 2]))
        except (ValueError, IndexError) as error:
            raise TaskError(
                f"{path}, line {number}: expected score and two sentences in columns 5 to 7 (or 1 to 3 of three), "
                f"split by tabs; found {len(columns)} columns: {line[:60]!r}"
            ) from error
    return pairs


def labelled_pictures(folder: Path) -> list[tuple[Path, int]]:
    """Pictures of a folder with the numbers of their classes.

    A number is the name of the picture's folder (``12/dog.jpg``) or the end of its own name (``dog_12.jpg``).

    Raises:
        TaskError: a picture has neither.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in PICTURES:
            continue
        named = _NUMBERED.fullmatch(path.stem)
        if path.parent != folder and path.parent.name.isdecimal():
            found.append((path, int(path.parent.name)))
        elif named is not None:
            found.append((path, int(named[1])))
        else:
            raise TaskError(f"{path}: neither its folder nor the end of its name (as in dog_12.jpg) is a class number")
    return found


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The rank of each value; equal values share the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    shared: npt.NDArray[np.float64] = (last - (counts - 1) / 2)[which]
    return shared
