"""Generation with layers spread over stages: tokens as on one device, pages with their layers, small messages only."""

from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
import pytest

import spmd_infer as si
from spmd_infer.engine import Engine
from spmd_infer.errors import TaskError
from spmd_infer.generation.generation_options import GenerationOptions
from spmd_infer.generation.loop import GenerationLoop
from spmd_infer.generation.sampling_params import SamplingParams
from spmd_infer.generation.scoring import score_texts
from spmd_infer.generation.speculation import Draft, PromptLookup
from spmd_infer.planning.audit import collectives
from tests.generation.test_loop import EOS, prompts, request, run
from tests.generation.test_prompt_scores import text
from tests.references.llama_variants import write_checkpoint

LAYERS = 5  # which neither 2 nor 4 stages divide
MESHES = pytest.mark.parametrize("mesh", ["stage=2", "stage=2,data=2", "stage=2,model=2", "stage=4"])
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)
PARAMS = [
    GREEDY,
    SamplingParams(max_tokens=6, temperature=1.0, top_k=9, top_p=0.9, seed=1, ignore_eos=True),
    SamplingParams(max_tokens=8, frequency_penalty=0.5, logprobs=3, ignore_eos=True),
    GREEDY,
    GREEDY,
]


@cache
def engine(mesh: str) -> Engine:
    with TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), "gqa", num_hidden_layers=LAYERS, max_position_embeddings=256)
        return Engine.load(folder, mesh=mesh, buckets=[8])


def loop(mesh: str, **options: Any) -> GenerationLoop:
    return GenerationLoop(engine(mesh), engine(mesh).config, {EOS}, GenerationOptions(max_chunk=64, **options))


def texts() -> list[list[int]]:
    """Short prompts, one that is run in chunks, and one that begins as it does."""
    short, other, third, _ = prompts((3, 17, 1, 30))
    long = (other * 10)[:150]
    return [short, long, third, other, [*long[:130], *short]]


@cache
def expected() -> list[list[int]]:
    return run(loop("data=1"), texts(), PARAMS)


@MESHES
def test_tokens_are_those_of_one_device(mesh: str) -> None:
    used = loop(mesh)
    assert run(used, texts(), PARAMS) == expected()
    assert run(used, texts(), PARAMS) == expected()  # with pages of the first time


@MESHES
def test_pages_lie_with_their_layers(mesh: str) -> None:
    used = loop(mesh)
    shape, own = dict(engine(mesh).mesh.shape), engine(mesh)
    pools = jax.tree.leaves(used._executor.dispatcher._pages)
    depth = -(-LAYERS // shape["stage"])
    assert len(pools) == 2 * depth
    config: Any = own.config
    for pool in pools:
        assert pool.shape[:2] == (shape["stage"], own.data_parts)
        for shard in pool.addressable_shards:
            at = np.argwhere(own.mesh.devices == shard.device)[0]
            stage = int(at[list(own.mesh.axis_names).index("stage")])
            assert shard.index[0] == slice(stage, stage + 1)
            heads = config.num_kv_heads // shape.get("model", 1)
            assert shard.data.size * shape.get("data", 1) == pool.size // shape["stage"] // config.num_kv_heads * heads
    assert sum(pool.nbytes for pool in pools) == used._executor.page_bytes * used._executor.num_pages * own.data_parts


@MESHES
def test_between_stages_travel_activations_and_tokens(mesh: str) -> None:
    used = loop(mesh)
    run(used, prompts(), GREEDY)
    own = engine(mesh)
    shape, width = dict(own.mesh.shape), own.config.embed_dim  # type: ignore[union-attr]
    program = next(program for program in reversed(own.programs) if program.name == "decode")
    found = Counter((each.kind, ",".join(each.axes(own.mesh))) for each in collectives(program.compiled))
    # Once in the loop over ticks: activations go on, and others make room behind them.
    assert found["collective-permute", "stage"] == 2
    # All parts of the rows decide together which micro-batches have a row that runs.
    votes = [each.nbytes for each in collectives(program.compiled) if "data" in each.axes(own.mesh)]
    assert votes == ([shape["stage"]] if shape.get("data", 1) > 1 else [])
    depth = -(-LAYERS // shape["stage"])
    assert found["all-reduce", "model"] == (1 + 2 * depth if shape.get("model", 1) > 1 else 0)
    rows = 4  # of each part at most: six prompts over two parts or more
    for each in collectives(program.compiled):
        if "stage" in each.axes(own.mesh):
            assert each.nbytes <= rows * width * 4


@MESHES
def test_scores_are_those_of_one_device(mesh: str) -> None:
    ids = prompts((9, 30, 5))
    found, whole = (score_texts(loop(name), text, ids) for name in (mesh, "data=1"))
    for ours, theirs in zip(found, whole, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)  # float32 logits of about 1


@pytest.mark.parametrize("kind", ["lookup", "draft"])
def test_drafts_pass_through_the_stages(kind: str) -> None:
    mesh = "stage=2,data=2"
    drafts = PromptLookup(adaptive=False) if kind == "lookup" else Draft(engine=engine(mesh), adaptive=False)
    assert run(loop(mesh, speculation=drafts), prompts(), GREEDY) == run(loop("data=1"), prompts(), GREEDY)


def test_a_draft_model_on_other_stages_is_refused() -> None:
    with pytest.raises(TaskError, match=r"draft model has 1 stages, the model that it drafts for 2"):
        loop("stage=2", speculation=Draft(engine=engine("data=2")))


def test_branches_of_one_prompt_share_its_pages() -> None:
    ids = texts()[3]
    params = [SamplingParams(max_tokens=8, temperature=1.0, seed=seed, ignore_eos=True) for seed in range(3)]
    found = []
    for mesh in ("data=1", "stage=2,data=2"):
        used, requests = loop(mesh), [request(ids, each) for each in params]
        used.submit(requests)
        used.run(requests)
        found.append([one.token_ids for one in requests])
    assert found[0] == found[1]


def test_resharding_to_stages_and_back() -> None:
    with TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), "gqa", num_hidden_layers=LAYERS, max_position_embeddings=256)
        moved = Engine.load(folder, mesh="data=2,model=2", buckets=[8])
    wanted = run(loop("data=1"), prompts(), GREEDY)
    start = {path: np.asarray(value).copy() for path, value in moved.params.items()}
    for mesh in ("stage=2,data=2", "data=2,model=2"):
        moved.reshard(mesh)
        assert run(GenerationLoop(moved, moved.config, {EOS}), prompts(), GREEDY) == wanted
    assert all(np.array_equal(value, start[path]) for path, value in moved.params.items())


@pytest.mark.slow
@pytest.mark.demo
def test_smollm2_through_the_task(smollm2: Path) -> None:
    texts = ["The capital of France is", "Water boils at"]
    number = SamplingParams(max_tokens=8, structured_outputs=si.StructuredOutputs(regex=r" [0-9]{3} degrees"))
    params = [SamplingParams(max_tokens=6), number]
    whole = Engine.load(smollm2, mesh="data=1", dtype="float32")
    wanted = [each.token_ids for each in whole.generate(texts, params)]
    engine = Engine.load(smollm2, mesh="stage=4", dtype="float32")  # 30 layers: two stages of 8, two of 7
    assert [each.token_ids for each in engine.generate(texts, params)] == wanted
    assert "".join(engine.stream(texts[0], params[0])) == whole.generate(texts[0], params[0])[0].text
    engine.reshard("stage=2,model=2")
    assert [each.token_ids for each in engine.generate(texts, params)] == wanted
