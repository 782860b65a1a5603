"""Sixty-four requests at once give the tokens of sixty-four one after the other, however they are run."""

from pathlib import Path
from typing import Any

import pytest

import spmd_infer as si
from spmd_infer.engine import Engine

pytestmark = [pytest.mark.demo, pytest.mark.slow]
PARAMS = si.SamplingParams(max_tokens=12, ignore_eos=True)
Tokens = list[tuple[int, ...]]


@pytest.fixture(scope="module")
def prompts(human_eval: list[str]) -> list[str]:
    return human_eval[:64]


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Engine:
    return Engine.load(smollm2, mesh="data=1,model=1", dtype="float32")


@pytest.fixture(scope="module")
def serial(engine: Engine, prompts: list[str]) -> Tokens:
    engine.task("generate", si.GenerationOptions(prefix_cache=False))
    return [engine.generate(prompt, PARAMS)[0].token_ids for prompt in prompts]


def together(engine: Engine, prompts: list[str], **options: Any) -> Tokens:
    task = engine.task("generate", si.GenerationOptions(**options))
    found = [completion.token_ids for completion in engine.generate(prompts, PARAMS)]
    for part in task.loop.scheduler.parts:
        part.pool.check()
        assert part.pool.used == 0
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefix_cache": False, "chunked": False},
        {"max_chunk": 64, "token_budget": 256},
        {"cache_bytes": 30 << 20, "max_rows": 8},  # ten pages: rows lose theirs
        {"speculation": si.PromptLookup(k=2, adaptive=False), "max_rows": 16},
    ],
    ids=["default", "whole prompts, nothing shared", "chunks of a page", "ten pages", "drafts"],
)
def test_on_one_device(engine: Engine, prompts: list[str], serial: Tokens, options: dict[str, Any]) -> None:
    assert together(engine, prompts, **options) == serial


@pytest.mark.parametrize(("mesh", "parts"), [("data=2,model=4", 2), ("data=8,model=1", 8)])
def test_on_eight_devices(smollm2: Path, prompts: list[str], serial: Tokens, mesh: str, parts: int) -> None:
    engine = Engine.load(smollm2, mesh=mesh, dtype="float32")
    assert together(engine, prompts) == serial
    # Everything else at once: drafts, chunks of a page, nothing shared, and ten pages in each part.
    drafts = si.PromptLookup(k=2, adaptive=False)
    hard = {"speculation": drafts, "max_chunk": 64, "prefix_cache": False, "cache_bytes": parts * (30 << 20)}
    assert together(engine, prompts, max_rows=4 * parts, token_budget=256, **hard) == serial
