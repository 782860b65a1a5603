"""What shape a request's text must have, as it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import msgspec

from spmd_infer.errors import TaskError

MAX_GRAMMAR_BYTES = 64 * 1024
MAX_CHOICES = 1024
MAX_DEPTH = 64


@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """The text's shape: exactly one of these.

    Attributes:
        json: a JSON schema, as an object or as text; the text is JSON that the schema accepts.
        json_object: True for any JSON object.
        regex: a regular expression (Rust syntax: no look-around, no back-references) that the whole text matches.
        choice: strings, of which the text is one.
        grammar: a context-free grammar in Lark's notation or GBNF.
        compact: JSON without line breaks, as Python's ``json.dumps`` lays it out, where otherwise the model may choose.
            More of the text is then certain before the model has seen it, and costs no step.

    Raises:
        TaskError: not exactly one is given, or it is larger than the limits.
    """

    json: Mapping[str, Any] | str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    compact: bool = False

    def __post_init__(self) -> None:
        shapes = [each.name for each in fields(self) if each.name != "compact"]
        given = [name for name in shapes if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise TaskError(
                "structured_outputs takes exactly one of json, json_object, regex, choice and grammar; "
                f"given: {', '.join(given) or 'none'}"
            )
        kind = given[0]
        if kind == "json":
            self._check_json()
        elif kind == "choice":
            self._check_choice()
        elif kind == "json_object":
            if self.json_object is not True:
                raise TaskError(f"structured_outputs.json_object must be True or False, not {self.json_object!r}")
        else:
            _check_text(kind, getattr(self, kind))

    @property
    def kind(self) -> str:
        """Which one is given; ``"json"`` for ``json_object`` too."""
        if self.regex is not None:
            return "regex"
        if self.choice is not None:
            return "choice"
        return "grammar" if self.grammar is not None else "json"

    @property
    def source(self) -> str:
        """What is given, as text: the schema's JSON, the pattern, the grammar, or the choices as a JSON list."""
        if self.choice is not None:
            return msgspec.json.encode(self.choice).decode()
        if self.json_object:
            return '{"type":"object"}'
        if self.json is not None:
            return self.json if isinstance(self.json, str) else msgspec.json.encode(self.json).decode()
        return self.regex or self.grammar or ""

    def _check_json(self) -> None:
        schema = self.json
        if isinstance(schema, str):
            _check_text("json", schema)
            try:
                schema = msgspec.json.decode(schema)
            except (msgspec.DecodeError, RecursionError) as error:
                raise TaskError(f"structured_outputs.json is not JSON: {error}") from error
        if not isinstance(schema, Mapping):
            raise TaskError(f"structured_outputs.json must be a JSON object, not {type(schema).__name__}")
        _check_depth(schema)
        try:
            _check_text("json", msgspec.json.encode(schema).decode())
        except (TypeError, RecursionError) as error:
            raise TaskError(f"structured_outputs.json is not JSON: {error}") from error

    def _check_choice(self) -> None:
        given: object = self.choice
        if isinstance(given, str) or not isinstance(given, list | tuple):
            raise TaskError(f"structured_outputs.choice must be a list of strings, not {type(given).__name__}")
        object.__setattr__(self, "choice", tuple(given))
        if not 1 <= len(given) <= MAX_CHOICES:
            raise TaskError(f"structured_outputs.choice must have 1 to {MAX_CHOICES} strings, not {len(given)}")
        for text in given:
            if not isinstance(text, str) or not text:
                raise TaskError(f"structured_outputs.choice must be non-empty strings, not {text!r}")
        _check_text("choice", "".join(given))


def _check_text(kind: str, text: object) -> None:
    if not isinstance(text, str) or not text:
        raise TaskError(f"structured_outputs.{kind} must be a non-empty string, not {text!r}")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise TaskError(f"structured_outputs.{kind} is not text that UTF-8 can hold: {error}") from error
    if size > MAX_GRAMMAR_BYTES:
        raise TaskError(f"structured_outputs.{kind} has {size:,} bytes; the most is {MAX_GRAMMAR_BYTES:,}")


def _check_depth(schema: Mapping[str, Any]) -> None:
    """Refuse deep nesting before anything that recurses sees it."""
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        level = [
            part
            for value in level
            for part in (value.values() if isinstance(value, Mapping) else value)
            if isinstance(part, Mapping | list | tuple)
        ]
        if not level:
            return
    raise TaskError(f"structured_outputs.json is nested more than {MAX_DEPTH} levels deep")


__all__ = ["MAX_CHOICES", "MAX_DEPTH", "MAX_GRAMMAR_BYTES", "StructuredOutputs"]
