"""LoRA adapters beside the weights: each row's tokens are those of weights with its adapter merged in."""

from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from spmd_infer.axes import BATCH, SEQ, VOCAB
from spmd_infer.checkpoints.lora import LoraAdapter
from spmd_infer.engine import Engine
from spmd_infer.errors import CheckpointError, TaskError
from spmd_infer.generation.adapters import Adapter, Adapters
from spmd_infer.generation.batches import Layout
from spmd_infer.generation.generation_options import GenerationOptions
from spmd_infer.generation.kv_pages import PAGE_SIZE
from spmd_infer.generation.loop import GenerationLoop
from spmd_infer.generation.requests import Request
from spmd_infer.generation.sampling_params import SamplingParams
from spmd_infer.generation.speculation import PromptLookup
from spmd_infer.models.adapters import RowAdapters
from spmd_infer.planning.audit import collectives
from tests.generation.test_loop import EOS, engine, prompts, request, run
from tests.generation.test_loop import loop as plain_loop
from tests.references.llama_variants import BASE, token_ids, write_checkpoint
from tests.references.lora_adapters import adapter_tensors, random_adapter, write_adapter, write_merged

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
# Ranks differ, one is rsLoRA, one changes two projections only.
KINDS: dict[str, dict[str, Any]] = {
    "first": {"rank": 4, "alpha": 8.0, "seed": 1},
    "second": {"rank": 7, "alpha": 3.0, "seed": 2, "rslora": True},
    "third": {"rank": 2, "alpha": 4.0, "seed": 3, "targets": ("q_proj", "v_proj")},
}
MESHES = pytest.mark.parametrize("mesh", ["data=1,model=1", "data=2,model=4", "data=8,model=1"])


@cache
def folder(name: str) -> Path:
    kept = TemporaryDirectory()
    _kept.append(kept)
    return random_adapter(Path(kept.name), **KINDS[name])


_kept: list[TemporaryDirectory[str]] = []


@cache
def merged(name: str) -> Engine:
    with TemporaryDirectory() as path:
        return Engine.load(write_merged(Path(path), folder(name)), mesh="data=1,model=1", buckets=[8])


def loaded(mesh: str, *names: str, rank: int = 8, most: int = 4) -> Adapters:
    found = Adapters(engine(mesh=mesh), most, rank)
    for name in names:
        found.load(name, LoraAdapter.open(folder(name)))
    return found


def loop(mesh: str, adapters: Adapters, **options: Any) -> GenerationLoop:
    found = engine(mesh=mesh)
    return GenerationLoop(found, found.config, {EOS}, GenerationOptions(**options), adapters)


def adapted(prompt: list[int], adapter: Adapter | None, params: SamplingParams = GREEDY) -> Request:
    one = request(prompt, params)
    one.adapter = adapter
    return one


def tokens(used: GenerationLoop, requests: list[Request]) -> list[list[int]]:
    for one in requests:
        used.submit([one])
    used.run(requests)
    for part in used.scheduler.parts:
        part.pool.check()
        assert part.pool.used == 0
    return [one.token_ids for one in requests]


@cache
def expected(name: str | None, prompt: tuple[int, ...], params: SamplingParams = GREEDY) -> list[int]:
    """From weights with the adapter merged in."""
    found = engine() if name is None else merged(name)
    return run(GenerationLoop(found, found.config, {EOS}), [list(prompt)], params)[0]


def logits(model: Any, rows: RowAdapters | None, ids: Any) -> Any:
    if rows is not None:
        rows.onto(model)
    return model(ids)


MIXED = ("first", None, "second", "third", "second", "first")


@MESHES
def test_logits_equal_those_of_merged_weights(mesh: str) -> None:
    found, adapters = engine(mesh=mesh), loaded(mesh, "first", "second", "third")
    ids = token_ids(8, 24)
    names = [*MIXED, None, "third"]
    used = [None if name is None else adapters.find(name) for name in names]
    wanted = np.stack(
        [(engine() if n is None else merged(n)).infer({"input_ids": ids[i : i + 1]})[0] for i, n in enumerate(names)]
    )

    program = found.jit("test_adapted_logits", logits, out_axes=(BATCH, SEQ, VOCAB))
    layouts = {"each its own": (8, range(8)), "all at once": (1, [0] * 8)}
    for what, (parts, places) in layouts.items():
        layout = Layout.of(list(places), parts, lambda rows: rows)
        got = np.asarray(program(adapters.rows(layout, used), found.place(ids, (BATCH, SEQ))))
        print(f"\n{mesh}, {what}: {np.abs(got - wanted).max():.1e} of {np.abs(wanted).max():.1f}")
        # float32 sums in another order, relative to the largest logit.
        assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()
    assert np.abs(wanted[0] - engine().infer({"input_ids": ids[:1]})[0]).max() > 1


def test_adapters_add_no_message_and_lengthen_those_of_split_inputs() -> None:
    mesh = "data=2,model=4"
    found, adapters = engine(mesh=mesh), loaded(mesh, "first")
    program = found.jit("test_collectives", logits, out_axes=(BATCH, SEQ, VOCAB))
    ids, rows = found.place(token_ids(8, 24), (BATCH, SEQ)), Layout.of([0] * 8, 1, lambda rows: rows)
    program(None, ids)
    program(adapters.rows(rows, [adapters.find("first")] * 8), ids)
    plain, adapted = (
        Counter((each.kind, each.nbytes) for each in collectives(one.compiled))
        for one in found.programs
        if one.name == "test_collectives"
    )
    # The outputs of attention and feed-forward are summed over devices in each layer. What A makes of their inputs, 8
    # numbers for each of 4 adapters, is summed along with them: XLA puts both in one message.
    positions, layers = 4 * 24, BASE["num_hidden_layers"]  # of the rows on one device
    outputs, lowered = positions * BASE["hidden_size"] * 4, positions * 4 * 8 * 4
    assert plain - adapted == {("all-reduce", outputs): 2 * layers}
    assert adapted - plain == {("all-reduce", outputs + lowered): 2 * layers}


@MESHES
def test_rows_with_several_adapters_and_none_equal_merged_weights(mesh: str) -> None:
    adapters = loaded(mesh, "first", "second", "third")
    used = loop(mesh, adapters)
    each = list(zip(prompts(), MIXED, strict=True))
    requests = [adapted(prompt, None if name is None else adapters.find(name)) for prompt, name in each]
    assert tokens(used, requests) == [expected(name, tuple(prompt)) for prompt, name in each]
    assert len({tuple(expected(name, tuple(prompts()[0]))) for name in (*KINDS, None)}) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"max_chunk": PAGE_SIZE, "token_budget": 2 * PAGE_SIZE},
        {"max_rows": 2},
        {"speculation": PromptLookup(adaptive=False)},
    ],
    ids=str,
)
def test_long_prompts_that_begin_alike_share_pages_by_adapter(options: dict[str, Any]) -> None:
    adapters = loaded("data=1,model=1", "first", "second")
    used = loop("data=1,model=1", adapters, **options)
    ids = prompts([30])[0] * 5
    for name in ("first", None, "second", "first", None):
        adapter = None if name is None else adapters.find(name)
        one, other = adapted(ids, adapter), adapted([*ids, 3], adapter)
        assert tokens(used, [one]) == [expected(name, tuple(ids))]
        assert tokens(used, [other]) == [expected(name, (*ids, 3))]
        assert other.cached_tokens == 2 * PAGE_SIZE


def test_nothing_is_compiled_when_adapters_come_and_go() -> None:
    mesh = "data=2,model=4"
    adapters = loaded(mesh, "first")
    used, found = loop(mesh, adapters), engine(mesh=mesh)

    def mixed(names: tuple[str | None, ...]) -> None:
        chosen = [None if name is None else adapters.find(name) for name in names]
        requests = [adapted(prompt, adapter) for prompt, adapter in zip(prompts(), chosen, strict=True)]
        wanted = [expected(name, tuple(prompt)) for prompt, name in zip(prompts(), names, strict=True)]
        assert tokens(used, requests) == wanted

    mixed(("first", None, "first", "first", None, "first"))
    mixed((None,) * 6)
    before = found.compiles
    adapters.load("second", LoraAdapter.open(folder("second")))
    adapters.load("third", LoraAdapter.open(folder("third")))
    mixed(MIXED)
    mixed(("third",) * 6)
    adapters.drop("second")
    mixed(("third", None, "first", "first", None, "third"))
    adapters.load("second", LoraAdapter.open(folder("second")))
    mixed(MIXED)
    assert found.compiles == before


def test_a_place_is_used_again_with_nothing_left_of_the_adapter_before() -> None:
    adapters = loaded("data=1,model=1", "first", most=1)
    used = loop("data=1,model=1", adapters)
    ids = prompts([30])[0] * 3
    assert tokens(used, [adapted(ids, adapters.find("first"))]) == [expected("first", tuple(ids))]
    adapters.drop("first")
    # It changes fewer projections, and has the name of the one before: no page of that is taken.
    adapters.load("first", LoraAdapter.open(folder("third")))
    one = adapted(ids, adapters.find("first"))
    assert tokens(used, [one]) == [expected("third", tuple(ids))]
    assert one.cached_tokens == 0


def test_requests_of_a_dropped_adapter_run_to_their_end() -> None:
    adapters = loaded("data=1,model=1", "first", most=1)
    used = loop("data=1,model=1", adapters)
    adapter = adapters.find("first")
    one, waiting = adapted(prompts()[0], adapter), adapted(prompts()[1], adapter)
    used.submit([one])
    used.turn()
    used.submit([waiting])
    adapters.drop("first")
    assert adapters.names == ()
    with pytest.raises(TaskError, match="no adapter 'first'; loaded: none is loaded"):
        adapters.find("first")
    with pytest.raises(TaskError, match="max_adapters=1 are loaded, 1 of them dropped and still used by requests"):
        adapters.load("second", LoraAdapter.open(folder("second")))
    used.run([one, waiting])
    assert [one.token_ids, waiting.token_ids] == [expected("first", tuple(ids)) for ids in prompts()[:2]]
    adapters.load("second", LoraAdapter.open(folder("second")))
    with pytest.raises(TaskError, match="adapter 'first' has been dropped"):
        used.submit([adapted(prompts()[0], adapter)])
    cancelled = adapted(prompts()[0], adapters.find("second"))
    used.submit([cancelled])
    used.cancel(cancelled)
    assert adapters.find("second").users == 0


def test_steps_without_adapters_are_the_programs_of_before() -> None:
    mesh = "data=1,model=1"
    adapters = loaded(mesh, "first")
    used = loop(mesh, adapters)
    run(plain_loop(mesh), prompts(), GREEDY)
    before = Counter(program.name for program in engine(mesh=mesh).programs)
    run(used, prompts(), GREEDY)
    after = Counter(program.name for program in engine(mesh=mesh).programs)
    prompts_and_steps = {name for name in after if name.startswith(("prefill", "decode"))}
    assert {name: after[name] for name in prompts_and_steps} == {name: before[name] for name in prompts_and_steps}
    assert len(prompts_and_steps) >= 2


@pytest.mark.parametrize("mesh", ["data=2,model=4"])
def test_adapters_move_with_the_weights(mesh: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "gqa")
    moving = Engine.load(tmp_path, mesh="data=1,model=1", buckets=[8])
    adapters = Adapters(moving, 2, 8)
    adapters.load("first", LoraAdapter.open(folder("first")))
    moving.reshard(mesh)
    adapters.mesh_changed()
    used = GenerationLoop(moving, moving.config, {EOS}, None, adapters)
    found = tokens(used, [adapted(prompt, adapters.find("first")) for prompt in prompts()])
    assert found == [expected("first", tuple(prompt)) for prompt in prompts()]


@pytest.mark.parametrize("quantize", ["int8", "int4:16"])
def test_beside_quantised_weights(quantize: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "gqa")
    small = Engine.load(tmp_path, mesh="data=2,model=4", buckets=[8], quantize=quantize)
    adapters = Adapters(small, 2, 8)
    adapters.load("first", LoraAdapter.open(folder("first")))
    ids = token_ids(8, 24)

    program = small.jit("test_logits", logits, out_axes=(BATCH, SEQ, VOCAB))
    layout = Layout.of([0] * 8, 1, lambda rows: rows)
    got, without = (
        np.asarray(program(rows, small.place(ids, (BATCH, SEQ))))
        for rows in (adapters.rows(layout, [adapters.find("first")] * 8), None)
    )
    wanted, base = (each.infer({"input_ids": ids}) for each in (merged("first"), engine()))
    # Rounding the weights costs about as much with the adapter as without: far less than the adapter changes.
    rounding, change = np.abs(without - base).mean(), np.abs(wanted - base).mean()
    assert np.abs(got - wanted).mean() < 2 * rounding < change


def config(**changes: Any) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 8} | changes


def test_adapters_that_are_refused(tmp_path: Path) -> None:
    adapters = loaded("data=1,model=1", "first", most=2)
    good = adapter_tensors(BASE, rank=4, seed=5)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"

    def load(tensors: dict[str, np.ndarray], **said: Any) -> None:
        path = write_adapter(tmp_path / str(len(list(tmp_path.iterdir()))), tensors, **config(**said))
        adapters.load("new", LoraAdapter.open(path))

    with pytest.raises(CheckpointError, match="use_dora is set; adapters with DoRA are not implemented"):
        load(good, use_dora=True)
    with pytest.raises(TaskError, match="rank 9, more than max_adapter_rank=8"):
        load(adapter_tensors(BASE, rank=9, seed=5), r=9)
    with pytest.raises(CheckpointError, match=r"do not make a change of layers.0.self_attn.q_proj.weight \[48, 48\]"):
        load({name.format("A"): np.ones((4, 40), np.float32), name.format("B"): np.ones((48, 4), np.float32)})
    with pytest.raises(CheckpointError, match=r"this model has no module 'model\.layers\.7\."):
        load({key.replace("layers.0", "layers.7"): value for key, value in good.items()})
    head = {"base_model.model.lm_head.lora_A.weight": np.ones((4, 48), np.float32)}
    head["base_model.model.lm_head.lora_B.weight"] = np.ones((128, 4), np.float32)
    with pytest.raises(CheckpointError, match="'lm_head', a table; adapters of tables are not implemented, merge it"):
        load(head)
    with pytest.raises(CheckpointError, match="not a lora_A or lora_B weight; embeddings"):
        load({"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 128), np.float32)})
    with pytest.raises(CheckpointError, match="not finite"):
        load(good | {name.format("A"): np.full((4, 48), np.nan, np.float32)})
    with pytest.raises(CheckpointError, match=r"has rank 4, but adapter_config\.json says 8"):
        load(good, r=8)
    with pytest.raises(CheckpointError, match=r"pattern '\.\*q_proj'; only names"):
        load(good, alpha_pattern={".*q_proj": 3})
    assert adapters.names == ("first",)
    load(good)
    with pytest.raises(TaskError, match="adapter 'new' is loaded already"):
        load(good)
    adapters.drop("first")
    adapters.load("first", LoraAdapter.open(folder("first")))
    with pytest.raises(TaskError, match="max_adapters=2 are loaded; drop one"):
        adapters.load("third", LoraAdapter.open(folder("third")))
    with pytest.raises(TaskError, match="no adapter 'third'; loaded: first, new"):
        adapters.find("third")
