"""What callers see of adapters, echoes and drafts, on small random models."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

import spmd_infer as si
from spmd_infer.engine import Engine
from spmd_infer.errors import TaskError
from spmd_infer.tasks.completions import Completion
from tests.references.letters import write_tokenizer
from tests.references.llama_variants import BASE, token_ids, write_checkpoint
from tests.references.lora_adapters import ALL, adapter_tensors, random_adapter, write_adapter, write_merged

GREEDY = si.SamplingParams(max_tokens=10, ignore_eos=True)
PROMPTS = [row[:length].tolist() for row, length in zip(token_ids(4, 40), (30, 7, 22, 3), strict=True)]


@cache
def checkpoint(variant: str = "gqa", layers: int = 2) -> Path:
    kept = TemporaryDirectory()
    _kept.append(kept)
    folder = Path(kept.name)
    write_checkpoint(folder, variant, num_hidden_layers=layers)
    write_tokenizer(folder)
    return folder


_kept: list[TemporaryDirectory[str]] = []


def loaded(mesh: str = "data=1,model=1", **options: Any) -> Engine:
    return Engine.load(checkpoint(**options), mesh=mesh, buckets=[8])


def ids(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in completions]


def test_an_adapter_from_load_to_drop(tmp_path: Path) -> None:
    path = random_adapter(tmp_path / "poet")
    write_tokenizer(write_merged(tmp_path / "merged", path))
    merged, engine = Engine.load(tmp_path / "merged", mesh="data=1,model=1", buckets=[8]), loaded()
    with pytest.raises(TaskError, match="no adapter 'poet'; loaded: none is loaded"):
        engine.generate(PROMPTS, GREEDY, adapter="poet")
    engine.load_adapter("poet", path)
    assert engine.task("generate").adapters == ("poet",)
    with pytest.raises(TaskError, match="there are 4 prompts but 2 adapters"):
        engine.generate(PROMPTS, GREEDY, adapter=["poet", None])

    plain, wanted = ids(loaded().generate(PROMPTS, GREEDY)), ids(merged.generate(PROMPTS, GREEDY))
    assert ids(engine.generate(PROMPTS, GREEDY, adapter="poet")) == wanted
    mixed = engine.generate(PROMPTS, GREEDY, adapter=["poet", None, None, "poet"])
    assert ids(mixed) == [wanted[0], plain[1], plain[2], wanted[3]]
    assert [completion.adapter for completion in mixed] == ["poet", None, None, "poet"]

    beams = si.SamplingParams(max_tokens=5, num_beams=3)
    assert ids(engine.generate(PROMPTS[0], beams, adapter="poet")) == ids(merged.generate(PROMPTS[0], beams))
    several = si.SamplingParams(max_tokens=5, n=2, best_of=3, temperature=1.0, seed=2)
    assert ids(engine.generate(PROMPTS[0], several, adapter="poet")) == ids(merged.generate(PROMPTS[0], several))
    pieces = "".join(engine.stream(PROMPTS[0], GREEDY, adapter="poet"))
    assert pieces == merged.generate(PROMPTS[0], GREEDY)[0].text
    for found, expected in zip(engine.score(PROMPTS, adapter="poet"), merged.score(PROMPTS), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())

    engine.reshard("data=2,model=4")
    assert ids(engine.generate(PROMPTS, GREEDY, adapter=["poet", None, None, "poet"])) == ids(mixed)
    engine.drop_adapter("poet")
    with pytest.raises(TaskError, match="no adapter 'poet'"):
        engine.generate(PROMPTS, GREEDY, adapter="poet")
    assert ids(engine.generate(PROMPTS, GREEDY)) == plain


def test_a_warm_up_when_the_task_is_made_and_again_with_the_first_adapter(tmp_path: Path) -> None:
    engine = loaded(layers=1)
    task = engine.task("generate", si.GenerationOptions(max_rows=1, max_chunk=64, warm_up=True))
    compiled = engine.compiles
    plain = engine.generate(PROMPTS, GREEDY)
    assert engine.compiles == compiled

    tensors = adapter_tensors(BASE | {"num_hidden_layers": 1}, rank=2, seed=1)
    path = write_adapter(tmp_path, tensors, r=2, lora_alpha=2, target_modules=list(ALL))
    engine.load_adapter("poet", path)
    compiled = engine.compiles
    changed = engine.generate(PROMPTS, GREEDY, adapter="poet")
    engine.load_adapter("another", path)
    assert ids(engine.generate(PROMPTS, GREEDY, adapter="another")) == ids(changed) != ids(plain)
    assert task.warm_up_for(PROMPTS[0], GREEDY, adapter="poet", quiet=True).programs == 0  # all are there
    assert engine.compiles == compiled


def test_an_echo_shows_every_token() -> None:
    engine = loaded()
    params = si.SamplingParams(
        max_tokens=4, ignore_eos=True, prompt_logprobs=3, logprobs=2, n=2, temperature=1.0, seed=1
    )
    first = engine.generate(PROMPTS[0], params)[0]
    (second,) = first.others
    scores = engine.score([[*PROMPTS[0], *each.token_ids] for each in (first, second)])
    tokenizer = engine.task("generate").tokenizer
    for completion, expected in zip((first, second), scores, strict=True):
        echo = completion.echo
        assert [token.id for token in echo] == [*PROMPTS[0], *completion.token_ids]
        assert [token.text for token in echo] == [tokenizer.text_of(token.id) for token in echo]
        assert echo[0].logprob is None
        assert echo[0].top == ()
        found = [token.logprob for token in echo[1:]]
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
        assert {len(token.top) for token in echo[1 : len(PROMPTS[0])]} == {3}
        assert {len(token.top) for token in echo[len(PROMPTS[0]) :]} == {2}
        for token in echo[1:]:
            falling = [logprob for _, _, logprob in token.top]
            assert falling == sorted(falling, reverse=True)
            assert all(text == tokenizer.text_of(id_) for id_, text, _ in token.top)
    bare = engine.generate(PROMPTS[0], si.SamplingParams(max_tokens=4, prompt_logprobs=0))[0]
    assert [token.logprob is None for token in bare.echo] == [True] + [False] * 29 + [True] * len(bare.token_ids)
    assert engine.generate(PROMPTS[0], GREEDY)[0].echo == ()
    with pytest.raises(TaskError, match="num_beams cannot be combined with prompt_logprobs"):
        si.SamplingParams(num_beams=2, prompt_logprobs=1)


def test_a_draft_model_moves_along() -> None:
    engine, smaller = loaded(), loaded(layers=1)
    plain = ids(engine.generate(PROMPTS, GREEDY))
    engine.task("generate", si.GenerationOptions(speculation=si.Draft(engine=smaller, k=2, adaptive=False)))
    assert ids(engine.generate(PROMPTS, GREEDY)) == plain
    for mesh in ("data=2,model=4", "data=8,model=1", "data=1,model=1"):
        engine.reshard(mesh)
        assert dict(smaller.mesh.shape) == dict(engine.mesh.shape)
        found = engine.generate(PROMPTS, GREEDY)
        assert ids(found) == plain
        assert all(completion.drafted_tokens > 0 for completion in found)


def test_a_draft_model_that_cannot_move_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, smaller = loaded(), loaded(layers=1)
    plain = ids(engine.generate(PROMPTS, GREEDY))
    engine.task("generate", si.GenerationOptions(speculation=si.Draft(engine=smaller)))
    monkeypatch.setattr(smaller, "reshard", lambda mesh: smaller)  # it stays where it is
    with pytest.raises(TaskError, match=r"cannot follow to data=2,model=1.*1 data parts.*goes on without drafts"):
        engine.reshard("data=2,model=1")
    assert ids(engine.generate(PROMPTS, GREEDY)) == plain
