"""A warm-up in a job of two processes: both compile everything, and nothing afterwards."""

import re
from pathlib import Path

import pytest

from tests.multihost.processes import Ranks
from tests.references.letters import write_tokenizer
from tests.references.llama_variants import write_checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

PROGRAM = """
import sys
import spmd_infer as si

with si.initialize(quiet=True) as job:
    engine = si.Engine.load(sys.argv[1], mesh="data=1,model=2", dtype="float32")
    task = engine.task("generate", si.GenerationOptions(max_rows=2, max_chunk=64))
    done = task.warm_up(max_len=64, quiet=True)
    before = engine.compiles
    shape = si.StructuredOutputs(choice=["abba", "baab"])
    params = [
        si.SamplingParams(max_tokens=6, min_tokens=6),
        si.SamplingParams(max_tokens=6, min_tokens=6, temperature=1.0, seed=2),
        si.SamplingParams(max_tokens=12, structured_outputs=shape),
    ]
    found = engine.generate([[5, 6, 7], [8, 9], [4]] if job.rank == 0 else None, params if job.rank == 0 else None)
    texts = [list(completion.token_ids) for completion in found]
    print(f"programs {done.programs}, afterwards {engine.compiles - before}, tokens {texts}, {found[2].text}")
"""


def test_two_processes_compile_nothing_after_a_warm_up(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    write_checkpoint(model, "gqa", num_hidden_layers=1, eos_token_id=0)
    write_tokenizer(model)
    with Ranks(PROGRAM, 2, tmp_path, str(model), devices=1) as ranks:
        assert set(ranks.wait(240).values()) == {0}, ranks.err(0) + ranks.err(1)
        said = [re.search(r"programs (\d+), afterwards (\d+), tokens (.+), (\w+)", ranks.out(rank)) for rank in (0, 1)]
    first, second = said
    assert first is not None
    assert second is not None
    print(f"\n{first[0]}")
    assert int(first[1]) > 10
    assert first.groups() == second.groups()
    assert first[2] == "0"
    assert first[4] in ("abba", "baab")
