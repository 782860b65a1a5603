"""Requests from the leader to all ranks: rank 0's prompts, its parameters with the seeds that it drew, and adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from spmd_infer.errors import TaskError
from spmd_infer.generation.sampling_params import SamplingParams
from spmd_infer.multihost.job import Job

Params = SamplingParams | list[SamplingParams] | None
AdapterNames = str | list[str | None] | None


class _Request(msgspec.Struct, frozen=True):
    prompts: Any
    params: Params
    adapter: AdapterNames = None
    problem: str = ""


def shared_request(
    job: Job,
    prompts: Any,
    params: SamplingParams | Sequence[SamplingParams] | None,
    adapter: str | Sequence[str | None] | None = None,
) -> tuple[Any, SamplingParams | list[SamplingParams], AdapterNames]:
    """Rank 0's prompts, parameters and names of adapters, on every rank, which must all call it.

    What the others give is not looked at.

    Raises:
        TaskError: the prompts are not texts, token ids or messages. All ranks raise it.
    """
    own = b""
    if job.rank == 0:
        seeded = _seeded(params)
        names = adapter if adapter is None or isinstance(adapter, str) else list(adapter)
        try:
            own = msgspec.msgpack.encode(_Request(prompts, seeded, names))
        except TypeError as error:
            problem = f"over several processes prompts are texts, lists of token ids or messages: {error}"
            own = msgspec.msgpack.encode(_Request(None, None, problem=problem))
    request = msgspec.msgpack.decode(job.channel.gather("request", own)[0], type=_Request)
    if request.problem:
        raise TaskError(request.problem)
    assert request.params is not None
    return request.prompts, request.params, request.adapter


def _seeded(params: SamplingParams | Sequence[SamplingParams] | None) -> SamplingParams | list[SamplingParams]:
    if isinstance(params, Sequence):
        return [each.seeded() for each in params]
    return (params or SamplingParams()).seeded()
