"""What was measured on this machine, kept for the user between runs in one JSON file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec

from spmd_infer.compile_cache import problem_of


class Answer(msgspec.Struct, frozen=True):
    """What was chosen, and why.

    Attributes:
        way: the chosen one.
        milliseconds: of each way that was timed.
        left_out: why others were not.
    """

    way: str
    milliseconds: dict[str, float]
    left_out: dict[str, str] = {}

    def encoded(self) -> bytes:
        """As JSON."""
        return msgspec.json.encode(self)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return msgspec.structs.asdict(self)

    @classmethod
    def decoded(cls, text: bytes) -> Answer:
        """From ``encoded``."""
        return msgspec.json.decode(text, type=cls)


class KeptAnswers:
    """Answers by what they are an answer to. A file that cannot be read or written is done without.

    Args:
        file: where; None for nowhere.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file

    def find(self, key: str, known: Collection[str]) -> Answer | None:
        """The answer to ``key``, if it is one of the ``known`` ways."""
        found = self._read().get(key)
        return found if found is not None and found.way in known else None

    def keep(self, key: str, answer: Answer) -> None:
        """Add an answer; others that another process has added meanwhile stay."""
        if self._file is None:
            return
        answers = self._read() | {key: answer}
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            number, name = tempfile.mkstemp(dir=self._file.parent, prefix=self._file.name)  # of mode 600
            with os.fdopen(number, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(answers)))
            Path(name).replace(self._file)
        except OSError:
            return

    def all(self) -> dict[str, Answer]:
        """Every answer that is kept, by what it is an answer to."""
        return self._read()

    def _read(self) -> dict[str, Answer]:
        if self._file is None or problem_of(self._file.parent) is not None:
            return {}
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=dict[str, Answer])
        except (OSError, msgspec.MsgspecError):
            return {}
