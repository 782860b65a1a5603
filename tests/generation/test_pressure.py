"""The loop under load, as ``python -m benchmarks.pressure`` runs it for longer: nothing lost, nothing different."""

from pathlib import Path

import pytest

from benchmarks.pressure import chat_lengths, few_pages, run_churn, run_queue
from spmd_infer.engine import Engine
from spmd_infer.generation.generation_options import GenerationOptions
from spmd_infer.generation.loop import GenerationLoop
from tests.references.llama_variants import write_checkpoint


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder: Path = tmp_path_factory.mktemp("pressure")
    write_checkpoint(folder, "gqa", max_position_embeddings=1024)
    return Engine.load(folder, mesh="data=1,model=1")


def test_requests_that_come_and_go_while_pages_run_out(engine: Engine) -> None:
    loop = GenerationLoop(engine, engine.config, (), few_pages(engine, 8, 12))
    roomy = GenerationLoop(engine, engine.config, (), GenerationOptions(max_rows=8))
    report = run_churn(loop, roomy, 128, seconds=8.0, seed=3)
    print(f"\n{report}")
    assert report.wrong == 0
    assert report.ended > 20
    assert report.cancelled > 0
    assert report.preempted > 0


def test_a_long_queue_is_run_in_order_and_leaves_nothing_behind(engine: Engine) -> None:
    loop = GenerationLoop(engine, engine.config, (), GenerationOptions(max_rows=16))
    lengths = chat_lengths(400, 1024, scale=0.1)
    report = run_queue(loop, 128, lengths)
    print(f"\n{report}")
    assert report.tokens == sum(new for _, new in lengths)
    assert report.overtaken == 0  # none waits while later ones run
    assert len(report.tenths) == 10
    memory = [tenth.memory for tenth in report.tenths]
    assert memory[-1] - memory[2] < 64  # MiB: programs are compiled in the first tenths
