"""Sixty-four requests at once give the tokens of sixty-four one after the other, however they are run.

The whole SmolLM2 runs as it does by default, on one device and on eight. Everything else runs on its first and last
three layers, which answer no less variously and take a third of the time.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

import spmd_infer as si
from spmd_infer.checkpoints import open_checkpoint
from spmd_infer.checkpoints.derived import DerivedReader, same
from spmd_infer.checkpoints.native_store import store
from spmd_infer.conversion import subject
from spmd_infer.engine import Engine

pytestmark = [pytest.mark.demo, pytest.mark.slow]
PARAMS = si.SamplingParams(max_tokens=12, ignore_eos=True)
KEPT = (0, 1, 2, 27, 28, 29)
Tokens = list[tuple[int, ...]]


@pytest.fixture(scope="module")
def prompts(human_eval: list[str]) -> list[str]:
    return human_eval[:64]


@pytest.fixture(scope="module")
def few_layers(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    whole = subject(open_checkpoint(smollm2))
    kept = {}
    for name, info in whole.reader.tensors.items():
        layer = re.match(r"layers\.(\d+)(\..*)", name)
        if layer is None:
            kept[name] = same(whole.reader, name)
        elif int(layer[1]) in KEPT:
            new = f"layers.{KEPT.index(int(layer[1]))}{layer[2]}"
            kept[new] = same(whole.reader, name, replace(info, name=new))
    model = msgspec.structs.replace(whole.model, config=whole.model.config | {"num_hidden_layers": len(KEPT)})
    path = tmp_path_factory.mktemp("few") / "layers"
    store(DerivedReader(whole.reader, kept, config=model.config), path, model=model)
    return path


@pytest.fixture(scope="module")
def few(few_layers: Path) -> Engine:
    return Engine.load(few_layers, mesh="data=1,model=1", dtype="float32")


@pytest.fixture(scope="module")
def few_serial(few: Engine, prompts: list[str]) -> Tokens:
    answers = one_by_one(few, prompts)
    assert len(set(answers)) > 60  # or mixing rows up would not show
    return answers


@pytest.fixture(scope="module")
def serial(smollm2: Path, prompts: list[str]) -> Tokens:
    return one_by_one(Engine.load(smollm2, mesh="data=1,model=1", dtype="float32"), prompts)


def one_by_one(engine: Engine, prompts: list[str]) -> Tokens:
    engine.task("generate", si.GenerationOptions(prefix_cache=False))
    return [engine.generate(prompt, PARAMS)[0].token_ids for prompt in prompts]


def together(engine: Engine, prompts: list[str], **options: Any) -> Tokens:
    task = engine.task("generate", si.GenerationOptions(**options))
    found = [completion.token_ids for completion in engine.generate(prompts, PARAMS)]
    for part in task.loop.scheduler.parts:
        part.pool.check()
        assert part.pool.used == 0
    return found


@pytest.mark.parametrize("mesh", ["data=1,model=1", "data=2,model=4", "data=8,model=1"])
def test_the_whole_model(smollm2: Path, prompts: list[str], serial: Tokens, mesh: str) -> None:
    assert together(Engine.load(smollm2, mesh=mesh, dtype="float32"), prompts) == serial


@pytest.mark.parametrize(
    "options",
    [
        {"prefix_cache": False, "chunked": False},
        {"max_chunk": 64, "token_budget": 256},
        {"cache_bytes": 6 << 20, "max_rows": 8},  # ten pages: rows lose theirs
        {"speculation": si.PromptLookup(k=2, adaptive=False), "max_rows": 16},
    ],
    ids=["whole prompts, nothing shared", "chunks of a page", "ten pages", "drafts"],
)
def test_on_one_device(few: Engine, prompts: list[str], few_serial: Tokens, options: dict[str, Any]) -> None:
    assert together(few, prompts, **options) == few_serial


@pytest.mark.parametrize(("mesh", "parts"), [("data=2,model=4", 2), ("data=8,model=1", 8)])
def test_on_eight_devices(few_layers: Path, prompts: list[str], few_serial: Tokens, mesh: str, parts: int) -> None:
    engine = Engine.load(few_layers, mesh=mesh, dtype="float32")
    assert together(engine, prompts) == few_serial
    # Everything else at once: drafts, chunks of a page, nothing shared, and ten pages in each part.
    drafts = si.PromptLookup(k=2, adaptive=False)
    hard = {"speculation": drafts, "max_chunk": 64, "prefix_cache": False, "cache_bytes": parts * (6 << 20)}
    assert together(engine, prompts, max_rows=4 * parts, token_budget=256, **hard) == few_serial
