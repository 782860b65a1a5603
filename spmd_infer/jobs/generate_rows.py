"""Prompts of a job through ``engine.generate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from spmd_infer.errors import TaskError
from spmd_infer.jobs.row_task import RowTask
from spmd_infer.jobs.rows import Answer, Failure, Row
from spmd_infer.jobs.spec import JobSpec

if TYPE_CHECKING:
    from spmd_infer.engine import Engine
    from spmd_infer.generation.sampling_params import SamplingParams
    from spmd_infer.tasks.completions import Completion


def seed_of(spec: JobSpec, row: int, part: int = 0) -> int:
    """A row's own seed, the same in every run of the job."""
    return int.from_bytes(blake3(f"{spec.seed} {row} {part}".encode()).digest(4), "little")


class GenerateRows(RowTask):
    """A continuation of each prompt: a text, token ids, or the messages of a conversation.

    Options are those of ``SamplingParams``, and ``chat``.
    """

    counts = "tokens"
    sizes = (1024, 4096)
    sizes_elsewhere = (1 << 15, 1 << 17)

    def __init__(self, spec: JobSpec) -> None:
        from spmd_infer.generation.sampling_params import SamplingParams

        super().__init__(spec)
        options = dict(spec.options)
        self._chat = bool(options.pop("chat", False))
        try:
            self._params = SamplingParams(**options)
        except TypeError as error:
            raise TaskError(f"these are no options of generate: {error}") from error

    def costs(self, rows: Sequence[Row]) -> list[int]:
        """Tokens of the prompt, and as many as may follow it."""
        return [count + self._params.max_tokens if count else 0 for count in self._token_counts(rows)]

    def run(self, engine: Engine, rows: Sequence[Row]) -> list[Answer]:
        """Answer rows that can be read."""
        asked = []
        answers: dict[int, Answer] = {}
        for row in rows:
            params = replace(self._params, seed=seed_of(self.spec, row.index))
            try:
                prompt = self._prompt(row)
                check_prompt(engine, prompt, params)
            except TaskError as error:
                answers[row.index] = Failure(type(error).__name__, str(error))
            else:
                asked.append((row.index, prompt, params))
        if asked:
            indices, prompts, each = zip(*asked, strict=True)
            completions = engine.generate(list(prompts), list(each))
            answers |= {index: result_of(one) for index, one in zip(indices, completions, strict=True)}
        return [answers[row.index] for row in rows]

    def _prompt(self, row: Row) -> Any:
        found = self._field(row)
        if self._chat and isinstance(found, str):
            return [{"role": "user", "content": found}]
        return found


def check_prompt(engine: Engine, prompt: Any, params: SamplingParams) -> None:
    """Refuse what cannot be continued, before anything is.

    Raises:
        TaskError: the engine's model does not generate, or not from this.
    """
    task = engine.task("generate")
    if not isinstance(prompt, str | list) or not prompt:
        what = "an empty one" if isinstance(prompt, str | list) else type(prompt).__name__
        raise TaskError(
            f"a prompt is a text, a list of token ids or a list of messages, none of them empty; got {what}"
        )
    if isinstance(prompt, list) and any(
        isinstance(part, Mapping) and not {"role", "content"} <= part.keys() for part in prompt
    ):
        raise TaskError("each message has a role and a content")
    task.check(prompt, params)


def result_of(completion: Completion) -> Answer:
    """What is kept of a completion."""
    if completion.error is not None:
        return Failure(type(completion.error).__name__, str(completion.error))
    result: dict[str, Any] = {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "token_ids": list(completion.token_ids),
    }
    if completion.scores:
        result["logprobs"] = [score.logprob for score in completion.scores]
    if completion.others:
        result["others"] = [{"text": other.text, "token_ids": list(other.token_ids)} for other in completion.others]
    return result
