"""What each row of a job goes through: the common part of all tasks, and the tasks that are simple."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec

from spmd_infer.errors import BatchError, TaskError
from spmd_infer.jobs.rows import Answer, Failure, Row
from spmd_infer.jobs.spec import JobSpec

if TYPE_CHECKING:
    from spmd_infer.engine import Engine
    from spmd_infer.generation.tokenizer import Tokenizer

TEXT_FIELDS = ("text", "prompt", "messages", "content", "input", "sentence")
REFUSED = (BatchError, TaskError)
"""What tasks raise where a row is at fault."""


class RowTask:
    """Runs rows through a task of the engine; subclasses say which one.

    Args:
        spec: the job.

    Attributes:
        counts: what ``costs`` counts.
        cut: how many texts have lost their ends in the latest call of ``answer``.
    """

    counts = "bytes"
    sizes = (1 << 16, 1 << 22)
    """The least and the most cost of a unit on CPUs."""
    sizes_elsewhere = (1 << 18, 1 << 24)

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.cut = 0

    def costs(self, rows: Sequence[Row]) -> list[int]:
        """What each row costs; 0 for one that cannot be run."""
        return [0 if row.problem else len(msgspec.json.encode(row.value, enc_hook=str)) for row in rows]

    def run(self, engine: Engine, rows: Sequence[Row]) -> list[Answer]:
        """Answer rows that can be read.

        Raises:
            TaskError: a row is at fault, or the options are.
            BatchError: likewise.
        """
        raise NotImplementedError

    def record(self, row: Row, result: dict[str, Any]) -> dict[str, Any]:
        """A result's line in the output."""
        return {"row": row.index, **({} if row.id is None else {"id": row.id}), **result}

    def failure_record(self, row: Row, failure: Failure) -> dict[str, Any]:
        """A failed row's line in the file of errors."""
        return self.record(row, {"error": {"kind": failure.kind, "message": failure.message}})

    def answer(self, engine: Engine, rows: Sequence[Row]) -> list[Answer]:
        """Answer any rows: those that are at fault fail, and the others are computed as if they were not there."""
        self.cut = 0
        answers: dict[int, Answer] = {row.index: Failure("Unreadable", row.problem) for row in rows if row.problem}
        good = [row for row in rows if not row.problem]
        try:
            found = self.run(engine, good) if good else []
        except REFUSED as error:
            answers |= dict(self._at_fault(engine, good, error))
            good = [row for row in good if row.index not in answers]
            found = self._run_rest(engine, good)
        for row, answer in zip(good, found, strict=True):
            answers[row.index] = answer
        return [answers[row.index] for row in rows]

    def _at_fault(self, engine: Engine, rows: Sequence[Row], error: Exception) -> Iterator[tuple[int, Failure]]:
        """The rows that are refused by themselves, found by halving."""
        if len(rows) == 1:
            yield rows[0].index, Failure(type(error).__name__, str(error))
            return
        middle = len(rows) // 2
        for half in (rows[:middle], rows[middle:]):
            try:
                self.run(engine, half)
            except REFUSED as problem:
                yield from self._at_fault(engine, half, problem)

    def _run_rest(self, engine: Engine, rows: Sequence[Row]) -> list[Answer]:
        self.cut = 0
        if not rows:
            return []
        try:
            return self.run(engine, rows)
        except REFUSED as error:  # only together are they refused
            return [Failure(type(error).__name__, str(error)) for _ in rows]

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from spmd_infer.demo import open_source
        from spmd_infer.generation.tokenizer import Tokenizer

        return Tokenizer.from_reader(open_source(self.spec.model, "off"))

    def _field(self, row: Row) -> Any:
        """What a row's text is taken from.

        Raises:
            TaskError: the row has no such field.
        """
        if not isinstance(row.value, Mapping):
            return row.value
        if self.spec.column is not None and self.spec.column in row.value:
            return row.value[self.spec.column]
        names = (self.spec.column,) if self.spec.column is not None else TEXT_FIELDS
        for name in names:
            if name in row.value:
                return row.value[name]
        raise TaskError(
            f"row {row.index} has no {' or '.join(repr(name) for name in names)}; it has "
            f"{', '.join(map(repr, row.value)) or 'no fields'}; --column says which one to take"
        )

    def _texts(self, rows: Sequence[Row]) -> list[Any]:
        return [self._field(row) for row in rows]

    def _token_counts(self, rows: Sequence[Row]) -> list[int]:
        """Tokens of each row's text; 0 where it has none."""
        texts = []
        for row in rows:
            try:
                text = "" if row.problem else self._field(row)
            except TaskError:
                text = ""
            texts.append(text if isinstance(text, str) else "" if text is None else str(text))
        return [len(ids) if text else 0 for ids, text in zip(self._tokenizer.encode_batch(texts), texts, strict=True)]


class EmbedRows(RowTask):
    """A vector for each text."""

    counts = "tokens"
    sizes = (2048, 8192)
    sizes_elsewhere = (1 << 15, 1 << 18)

    def costs(self, rows: Sequence[Row]) -> list[int]:
        """Tokens."""
        return self._token_counts(rows)

    def run(self, engine: Engine, rows: Sequence[Row]) -> list[Answer]:
        """Answer rows that can be read."""
        import warnings

        texts = self._texts(rows)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* lose their ends", category=UserWarning)  # counted below
            vectors = engine.embed(texts, **self.spec.options)
        self.cut += engine.task("embed").last_report.truncated
        return [{"embedding": vector} for vector in vectors]


class ClassifyRows(RowTask):
    """The likeliest labels of each picture."""

    counts = "pixels"
    sizes = (1 << 20, 1 << 24)
    sizes_elsewhere = (1 << 24, 1 << 28)

    def costs(self, rows: Sequence[Row]) -> list[int]:
        """Pixels, from the pictures' headers."""
        from PIL import Image

        found = []
        for row in rows:
            try:
                with Image.open(self._field(row)) as picture:
                    found.append(picture.width * picture.height)
            except (OSError, ValueError, TypeError, AttributeError, Image.DecompressionBombError, TaskError):
                found.append(0)
        return found

    def run(self, engine: Engine, rows: Sequence[Row]) -> list[Answer]:
        """Answer rows that can be read."""
        answers = engine.classify([self._field(row) for row in rows], **self.spec.options)
        return [
            {"labels": [{"index": label.index, "name": label.name, "score": label.score} for label in labels]}
            for labels in answers
        ]


class ScoreRows(RowTask):
    """The log-probability of each token of a text after its first."""

    counts = "tokens"
    sizes = (1024, 4096)
    sizes_elsewhere = (1 << 15, 1 << 18)

    def costs(self, rows: Sequence[Row]) -> list[int]:
        """Tokens."""
        return self._token_counts(rows)

    def run(self, engine: Engine, rows: Sequence[Row]) -> list[Answer]:
        """Answer rows that can be read."""
        return [{"logprobs": logprobs, "sum": float(logprobs.sum())} for logprobs in engine.score(self._texts(rows))]


class OtherRows(RowTask):
    """A task of another package: it is called with the rows' texts, or values, and must return as many results."""

    def run(self, engine: Engine, rows: Sequence[Row]) -> list[Answer]:
        """Answer rows that can be read."""
        values = [self._value(row) for row in rows]
        results = list(engine.task(self.spec.task)(values, **self.spec.options))
        if len(results) != len(rows):
            raise TaskError(f"task {self.spec.task!r} gave {len(results)} results for {len(rows)} rows")
        plain = [msgspec.to_builtins(result, enc_hook=_plain) for result in results]
        return [result if isinstance(result, dict) else {"result": result} for result in plain]

    def _value(self, row: Row) -> Any:
        """The field that is asked for or has a usual name; else all of it."""
        usual = isinstance(row.value, Mapping) and any(name in row.value for name in TEXT_FIELDS)
        return self._field(row) if usual or self.spec.column is not None else row.value


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
