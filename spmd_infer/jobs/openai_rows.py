"""OpenAI's batch format: a request a line in, a response a line out, matched by ``custom_id``."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

from spmd_infer.errors import BatchError, TaskError
from spmd_infer.jobs.generate_rows import check_prompt, seed_of
from spmd_infer.jobs.openai_bodies import CHAT, COMPLETIONS, EMBEDDINGS, URLS, Asked, asked_of, texts_of
from spmd_infer.jobs.row_task import RowTask
from spmd_infer.jobs.rows import Answer, Failure, Row
from spmd_infer.jobs.spec import JobSpec

if TYPE_CHECKING:
    from spmd_infer.engine import Engine
    from spmd_infer.generation.tokenizer import Tokenizer
    from spmd_infer.tasks.completions import Completion

_IDS = {CHAT: "chatcmpl", COMPLETIONS: "cmpl"}


class OpenAIRows(RowTask):
    """Requests of OpenAI's batch format, answered by the model's one task.

    Args:
        spec: the job.
        created: when it began, in seconds since 1970: what all its responses say.
    """

    counts = "tokens"
    sizes = (1024, 4096)
    sizes_elsewhere = (1 << 15, 1 << 17)

    def __init__(self, spec: JobSpec, created: int = 0) -> None:
        super().__init__(spec)
        self._created = created
        if spec.options:
            raise TaskError(
                f"requests in OpenAI's batch format carry their own options; {', '.join(spec.options)} cannot be given"
            )

    def costs(self, rows: Sequence[Row]) -> list[int]:
        """Tokens of the prompts, and as many as may follow them."""
        return [self._cost(row) for row in rows]

    def _cost(self, row: Row) -> int:
        try:
            url, body = self._request(row)
            if url == EMBEDDINGS:
                return sum(len(ids) for ids in self._tokenizer.encode_batch(texts_of(body)))
            asked = asked_of(url, body, 0)
        except (TaskError, BatchError):
            return 0
        texts = [prompt if isinstance(prompt, str) else str(prompt) for prompt in asked.prompts]
        tokens = sum(len(ids) for ids in self._tokenizer.encode_batch(texts))
        return tokens + len(texts) * asked.params.samples * asked.params.max_tokens

    def run(self, engine: Engine, rows: Sequence[Row]) -> list[Answer]:
        """Answer rows that can be read."""
        answers: dict[int, Answer] = {}
        asked: list[tuple[Row, Asked]] = []
        texts: list[tuple[Row, list[str]]] = []
        for row in rows:
            try:
                url, body = self._request(row)
                if url == EMBEDDINGS:
                    texts.append((row, texts_of(body)))
                else:
                    one = asked_of(url, body, seed_of(self.spec, row.index))
                    for prompt in one.prompts:
                        check_prompt(engine, prompt, one.params)
                    asked.append((row, one))
            except (TaskError, BatchError) as error:
                answers[row.index] = Failure(type(error).__name__, str(error))
        if texts:
            answers |= self._embedded(engine, texts)
        if asked:
            answers |= self._continued(engine, asked)
        return [answers[row.index] for row in rows]

    def record(self, row: Row, result: dict[str, Any]) -> dict[str, Any]:
        """A response's line."""
        response = {"status_code": 200, "request_id": self._id("req", row), "body": result}
        return {"id": self._id("batch_req", row), "custom_id": row.id, "response": response, "error": None}

    def failure_record(self, row: Row, failure: Failure) -> dict[str, Any]:
        """A failed request's line: one that was refused has a response, one that could not be run has none."""
        line = {"id": self._id("batch_req", row), "custom_id": row.id}
        if failure.kind == "Quarantined":
            return {**line, "response": None, "error": {"code": "quarantined", "message": failure.message}}
        error = {"message": failure.message, "type": "invalid_request_error", "param": None, "code": None}
        response = {"status_code": 400, "request_id": self._id("req", row), "body": {"error": error}}
        return {**line, "response": response, "error": None}

    def _id(self, prefix: str, row: Row) -> str:
        """The same in every run."""
        return f"{prefix}_{blake3(f'{self.spec.input} {self.spec.seed} {row.index}'.encode()).hexdigest()[:24]}"

    def _request(self, row: Row) -> tuple[str, Mapping[str, Any]]:
        value = row.value
        if not isinstance(value, dict) or not isinstance(value.get("custom_id"), str):
            raise BatchError("a request is an object with a custom_id, a url and a body")
        url, body = value.get("url"), value.get("body")
        if url not in URLS:
            raise BatchError(f"url {url!r}: expected one of {', '.join(URLS)}")
        if value.get("method", "POST") != "POST" or not isinstance(body, dict):
            raise BatchError("a request has the method POST and an object for its body")
        return url, body

    def _embedded(self, engine: Engine, rows: Sequence[tuple[Row, list[str]]]) -> dict[int, Answer]:
        vectors = iter(engine.embed([text for _, texts in rows for text in texts]))
        self.cut += engine.task("embed").last_report.truncated
        answers: dict[int, Answer] = {}
        for row, texts in rows:
            own = [next(vectors) for _ in texts]
            used = sum(len(ids) for ids in self._tokenizer.encode_batch(texts))
            answers[row.index] = {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": index, "embedding": _embedding(vector, row)}
                    for index, vector in enumerate(own)
                ],
                "model": row.value["body"].get("model", self.spec.model),
                "usage": {"prompt_tokens": used, "total_tokens": used},
            }
        return answers

    def _continued(self, engine: Engine, rows: Sequence[tuple[Row, Asked]]) -> dict[int, Answer]:
        prompts = [prompt for _, asked in rows for prompt in asked.prompts]
        params = [asked.params for _, asked in rows for _ in asked.prompts]
        found = iter(engine.generate(prompts, params))
        tokenizer: Tokenizer = engine.task("generate").tokenizer
        answers: dict[int, Answer] = {}
        for row, asked in rows:
            own = [next(found) for _ in asked.prompts]
            problem = next((completion.error for completion in own if completion.error is not None), None)
            if problem is not None:
                answers[row.index] = Failure(type(problem).__name__, str(problem))
            else:
                answers[row.index] = self._response(row, asked, own, tokenizer)
        return answers

    def _response(
        self, row: Row, asked: Asked, completions: Sequence[Completion], tokenizer: Tokenizer
    ) -> dict[str, Any]:
        url = row.value["url"]
        choice: Callable[..., dict[str, Any]] = _chat_choice if url == CHAT else _text_choice
        every = [one for completion in completions for one in (completion, *completion.others)]
        prompt_tokens = sum(completion.prompt_tokens for completion in completions)
        new = sum(len(one.token_ids) for one in every)
        return {
            "id": self._id(_IDS[url], row).replace("_", "-"),
            "object": "chat.completion" if url == CHAT else "text_completion",
            "created": self._created,
            "model": row.value["body"].get("model", self.spec.model),
            "choices": [choice(index, one, asked.top_logprobs, tokenizer) for index, one in enumerate(every)],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": new,
                "total_tokens": prompt_tokens + new,
            },
        } | ({"ignored_fields": asked.ignored} if asked.ignored else {})


def _embedding(vector: Any, row: Row) -> Any:
    if row.value["body"].get("encoding_format") == "base64":
        return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
    return vector


def _chat_choice(index: int, one: Completion, top: int | None, tokenizer: Tokenizer) -> dict[str, Any]:
    logprobs = None
    if top is not None:
        content = [
            {
                **_token(token, score.logprob, tokenizer),
                "top_logprobs": [
                    _token(int(other), float(value), tokenizer)
                    for other, value in zip(score.top_ids[:top], score.top_logprobs[:top], strict=True)
                ],
            }
            for token, score in zip(one.token_ids, one.scores, strict=True)
        ]
        logprobs = {"content": content, "refusal": None}
    return {
        "index": index,
        "message": {"role": "assistant", "content": one.text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": one.finish_reason,
    }


def _text_choice(index: int, one: Completion, top: int | None, tokenizer: Tokenizer) -> dict[str, Any]:
    logprobs = None
    if top is not None:
        texts = [tokenizer.decode([token], skip_special=False) for token in one.token_ids]
        starts = [sum(map(len, texts[:number])) for number in range(len(texts))]
        logprobs = {
            "tokens": texts,
            "token_logprobs": [score.logprob for score in one.scores],
            "top_logprobs": [
                {
                    tokenizer.decode([int(token)], skip_special=False): float(value)
                    for token, value in zip(score.top_ids[:top], score.top_logprobs[:top], strict=True)
                }
                for score in one.scores
            ],
            "text_offset": starts,
        }
    return {"index": index, "text": one.text, "logprobs": logprobs, "finish_reason": one.finish_reason}


def _token(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    text = tokenizer.decode([token], skip_special=False)
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
