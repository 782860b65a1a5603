"""Shapes of well-known models, so that they can be planned for without their files."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

_SAME_SHAPES = {
    "llama-3.3-70b": "llama-3.1-70b",
    "all-minilm-l6-v2": "all-minilm-l6",
    "bert-base-uncased": "bert-base",
    "bert-large-uncased": "bert-large",
    "palm": "palm-540b",
}
_SUFFIXES = re.compile(r"-(instruct|chat|it|hf|v0\.3|v1\.0)$")


def find(name: str) -> dict[str, Any] | None:
    """The configuration of a well-known model, in the terms of a Hugging Face ``config.json``.

    Args:
        name: such as ``"llama-3.1-405b"``; upper case, an owner (``"meta-llama/Llama-3.1-405B-Instruct"``) and endings
            such as ``-instruct`` make no difference.

    Returns:
        A new dict; None for a name that is not known. Where a model of another family stands in for one that the zoo
        does not have, ``approximation`` says in words what is different.
    """
    key = _key(name)
    found = _table().get(_SAME_SHAPES.get(key, key))
    return None if found is None else dict(found)


def names() -> tuple[str, ...]:
    """The names of all well-known models."""
    return tuple(_table())


def _key(name: str) -> str:
    key = name.strip().lower().rsplit("/", 1)[-1].replace("_", "-")
    key = re.sub(r"^meta-", "", key)
    key = re.sub(r"^llama(?=\d)", "llama-", key)
    while key not in _table() and key not in _SAME_SHAPES:
        shorter = _SUFFIXES.sub("", key)
        if shorter == key:
            break
        key = shorter
    return key


@cache
def _table() -> dict[str, dict[str, Any]]:
    return tomllib.loads(files("spmd_infer.planning").joinpath("known_models.toml").read_text("utf-8"))
