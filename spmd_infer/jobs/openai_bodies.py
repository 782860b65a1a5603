"""From the body of an OpenAI request to prompts and parameters, each value checked; what is not offered is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spmd_infer.errors import TaskError
from spmd_infer.generation.sampling_params import SamplingParams
from spmd_infer.generation.structured_outputs import StructuredOutputs

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
URLS = (CHAT, COMPLETIONS, EMBEDDINGS)

DEFAULT_TOKENS = 256
"""Where a request says nothing; of completions 16, as with OpenAI."""

_SAME = (
    "temperature", "top_p", "presence_penalty", "frequency_penalty", "n", "stop",
    # Not OpenAI's, and offered by other engines under these names:
    "top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos", "skip_special_tokens",
    "include_stop_str_in_output", "bad_words", "allowed_token_ids",
)  # fmt: skip
_REFUSED = ("tools", "functions", "audio", "modalities", "suffix", "echo", "best_of", "web_search_options")
_NO_MEANING = frozenset(
    ("model", "user", "stream", "stream_options", "store", "metadata", "service_tier", "tool_choice", "function_call",
     "parallel_tool_calls", "safety_identifier", "prompt_cache_key")
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """What one request asks to be continued.

    Attributes:
        prompts: its prompts; several only for completions.
        params: for all of them.
        top_logprobs: how many likeliest tokens to name for each token; None for no log-probabilities.
        ignored: fields that nothing here reads.
    """

    prompts: list[Any]
    params: SamplingParams
    top_logprobs: int | None = None
    ignored: list[str] = field(default_factory=list)


def asked_of(url: str, body: Mapping[str, Any], seed: int) -> Asked:
    """Read the body of a chat or completions request.

    Args:
        url: ``CHAT`` or ``COMPLETIONS``.
        body: the request's body.
        seed: for a request that names none.

    Raises:
        TaskError: a value is wrong, or asks for what is not offered.
    """
    given = {name: value for name, value in body.items() if value is not None}
    for name in _REFUSED:
        if given.get(name) not in (None, False, [], 1 if name == "best_of" else False):
            raise TaskError(f"{name} is not offered here")
    params = {name: given.pop(name) for name in _SAME if name in given}
    params.setdefault("temperature", 1.0)
    params["seed"] = given.pop("seed", seed)
    if "logit_bias" in given:
        params["logit_bias"] = _bias(given.pop("logit_bias"))
    if url == CHAT:
        prompts, top = [_messages(given.pop("messages", None))], _chat_logprobs(given)
        most = given.pop("max_completion_tokens", given.pop("max_tokens", DEFAULT_TOKENS))
        given.pop("max_tokens", None)
    else:
        prompts, top, most = (
            _prompts(given.pop("prompt", None)),
            given.pop("logprobs", None),
            given.pop("max_tokens", 16),
        )
    if top is not None:
        params["logprobs"] = top
    shape = _shape(given.pop("response_format", None))
    if shape is not None:
        params["structured_outputs"] = shape
    ignored = sorted(given.keys() - _NO_MEANING - set(_REFUSED))
    return Asked(prompts, SamplingParams(max_tokens=most, **params), top, ignored)


def texts_of(body: Mapping[str, Any]) -> list[str]:
    """The texts of an embeddings request.

    Raises:
        TaskError: a value is wrong, or asks for what is not offered.
    """
    found = body.get("input")
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise TaskError("input must be a text or a list of texts, none of them empty (token ids are not offered)")
    if body.get("dimensions") is not None:
        raise TaskError("dimensions is not offered: vectors have the model's own width")
    if body.get("encoding_format", "float") not in ("float", "base64"):
        raise TaskError(f"encoding_format must be 'float' or 'base64', not {body['encoding_format']!r}")
    return texts


def _messages(found: Any) -> list[dict[str, Any]]:
    if not isinstance(found, list) or not found or not all(isinstance(message, dict) for message in found):
        raise TaskError("messages must be a list of objects, at least one")
    return [{**message, "content": _content(message, index)} for index, message in enumerate(found)]


def _content(message: Mapping[str, Any], index: int) -> str:
    """A message's text, also where it comes in parts."""
    if not isinstance(message.get("role"), str):
        raise TaskError(f"messages[{index}] has no role")
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise TaskError(f"messages[{index}].content must be a text or a list of parts of type 'text'")
    return "".join(text for text in texts if text is not None)


def _prompts(found: Any) -> list[Any]:
    if isinstance(found, str) or (isinstance(found, list) and found and isinstance(found[0], int)):
        return [found]
    if isinstance(found, list) and found and all(isinstance(prompt, str | list) for prompt in found):
        return found
    raise TaskError("prompt must be a text, a list of texts, a list of token ids or a list of such lists")


def _chat_logprobs(given: dict[str, Any]) -> int | None:
    wanted, top = given.pop("logprobs", False), given.pop("top_logprobs", None)
    if not isinstance(wanted, bool):
        raise TaskError(f"logprobs must be true or false in a chat, not {wanted!r}")
    if top is not None and not wanted:
        raise TaskError("top_logprobs needs logprobs: true")
    return (top or 0) if wanted else None


def _bias(found: Any) -> dict[int, float]:
    try:
        return {int(token): float(value) for token, value in found.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise TaskError(f"logit_bias must map token ids to numbers: {error}") from error


def _shape(found: Any) -> StructuredOutputs | None:
    kind = found.get("type") if isinstance(found, dict) else found
    if kind in (None, "text"):
        return None
    if kind == "json_object":
        return StructuredOutputs(json_object=True)
    schema = found.get("json_schema") if isinstance(found, dict) else None
    if kind == "json_schema" and isinstance(schema, dict) and isinstance(schema.get("schema"), dict):
        return StructuredOutputs(json=schema["schema"])
    raise TaskError("response_format must be of type text, json_object or json_schema with a json_schema.schema")
