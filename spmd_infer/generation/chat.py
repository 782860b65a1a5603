"""Chat templates: the Jinja program inside a checkpoint that turns a conversation into a prompt.

The program comes with the weights, so it runs in Jinja's sandbox, and within bounds: so many loop steps and calls, so
much time, so much text. The names that it may use are those that Hugging Face templates expect.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from spmd_infer.errors import TaskError

MAX_STEPS = 1_000_000
MAX_SECONDS = 5.0
MAX_CHARS = 16 << 20
_MAX_NUMBER_BITS = 256

_GROWING_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "format_map"})


class _OverBounds(Exception):
    """A template that ran too long or wrote too much."""


class _Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self.steps = MAX_STEPS
        self.deadline = time.monotonic() + MAX_SECONDS

    def spend(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise _OverBounds(f"took more than {MAX_STEPS:,} steps")
        if self.steps % 256 == 0 and time.monotonic() > self.deadline:
            raise _OverBounds(f"took more than {MAX_SECONDS:g} seconds")


_budget: ContextVar[_Budget] = ContextVar("spmd_infer_chat_budget")


def _stepwise(items: Iterable[Any]) -> Iterator[Any]:
    """``items``, each paid for: wrapped around what every ``for`` of a template runs over."""
    budget = _budget.get()
    for item in items:
        budget.spend()
        yield item


def _bounded(value: Any) -> Any:
    """``value``, refused when it is text or a list beyond bounds: wrapped around what may grow."""
    if isinstance(value, str | list | tuple) and len(value) > MAX_CHARS:
        raise _OverBounds(f"made a value of more than {MAX_CHARS:,} characters")
    return value


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with calls and arithmetic counted and bounded."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _budget.get().spend()
        return _bounded(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _budget.get().spend()
        if operator == "**" and not (isinstance(right, int | float) and abs(right) <= _MAX_NUMBER_BITS):
            raise _OverBounds(f"raised a number to the power {right!r}")
        if operator == "*":
            for text, count in ((left, right), (right, left)):
                if isinstance(text, str | list | tuple) and isinstance(count, int) and len(text) * count > MAX_CHARS:
                    raise _OverBounds(f"repeated a value {count:,} times")
        if operator == "%" and isinstance(left, str):
            raise _OverBounds("formatted text with %, which is not offered here; join the parts with ~")
        return _bounded(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _GROWING_METHODS:
            return False
        return bool(super().is_safe_attribute(obj, attr, value))


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, sort_keys: bool = False) -> str:
    """JSON without HTML escapes, which Jinja's own filter makes."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, sort_keys=sort_keys)


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    for growing in ("center", "format", "wordwrap", "indent"):
        del environment.filters[growing]
    environment.filters |= {"tojson": _to_json, "_stepwise": _stepwise, "_bounded": _bounded}
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
    for unneeded in ("lipsum", "cycler", "joiner"):
        environment.globals.pop(unneeded, None)
    return environment


def _wrap(inner: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(
        cast("nodes.Expr", inner), name, [], [], None, None, lineno=inner.lineno, environment=inner.environment
    )


def _count_work(tree: nodes.Template) -> nodes.Template:
    """Pass every loop through ``_stepwise`` and every concatenation and filter through ``_bounded``."""
    for loop in list(tree.find_all(nodes.For)):
        loop.iter = _wrap(loop.iter, "_stepwise")
    for node in list(tree.find_all((nodes.Assign, nodes.Output, nodes.Keyword))):
        for field in ("node", "nodes", "value"):
            held = getattr(node, field, None)
            if isinstance(held, nodes.Concat):
                setattr(node, field, _wrap(held, "_bounded"))
            elif isinstance(held, list):
                setattr(node, field, [_wrap(e, "_bounded") if isinstance(e, nodes.Concat) else e for e in held])
    return tree


class ChatTemplate:
    """A model's chat template, parsed once.

    Args:
        source: the Jinja program.

    Raises:
        TaskError: it is not a Jinja program.
    """

    def __init__(self, source: str) -> None:
        environment = _environment()
        try:
            self._template = environment.from_string(_count_work(environment.parse(source)))
        except jinja2.TemplateError as error:
            raise TaskError(f"the model's chat template cannot be read: {error}") from error
        except RecursionError as error:
            raise TaskError("the model's chat template is nested too deeply to be read") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> str:
        """The prompt for a conversation.

        Args:
            messages: mappings with at least ``role`` and ``content``.
            add_generation_prompt: open the assistant's turn at the end.
            variables: further variables, such as ``bos_token``.

        Raises:
            TaskError: the messages are malformed, the template refuses them, or it exceeds its bounds.
        """
        _check(messages)
        token = _budget.set(_Budget())
        try:
            return self._collect(
                self._template.generate,
                {**variables, "messages": list(messages), "add_generation_prompt": add_generation_prompt},
            )
        except _OverBounds as error:
            raise TaskError(f"the model's chat template was stopped: it {error}") from error
        except jinja2.TemplateError as error:
            raise TaskError(f"the model's chat template refused the conversation: {error}") from error
        except RecursionError as error:
            raise TaskError("the model's chat template was stopped: it called itself too deeply") from error
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, LookupError) as error:
            raise TaskError(f"the model's chat template failed: {type(error).__name__}: {error}") from error
        finally:
            _budget.reset(token)

    @staticmethod
    def _collect(generate: Callable[..., Iterator[str]], variables: Mapping[str, Any]) -> str:
        parts, size = [], 0
        for part in generate(**variables):
            _budget.get().spend()
            size += len(part)
            if size > MAX_CHARS:
                raise _OverBounds(f"wrote more than {MAX_CHARS:,} characters")
            parts.append(part)
        return "".join(parts)


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, str | Mapping) or not messages:
        raise TaskError(
            f"expected a list of messages like {{'role': 'user', 'content': 'Hello'}}, got {type(messages).__name__}"
            + ("" if messages else " that is empty")
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TaskError(f"message {index} must be a mapping with a 'role', got {message!r}"[:300])
        if "content" not in message and "tool_calls" not in message:
            raise TaskError(f"message {index} (role {message['role']!r}) has no 'content'")
