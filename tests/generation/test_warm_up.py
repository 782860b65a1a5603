"""A warm-up compiles all that generation within its bounds will run: whatever comes then, XLA compiles nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest

from spmd_infer.checkpoints.lora import LoraAdapter
from spmd_infer.engine import Engine
from spmd_infer.generation.adapters import Adapter, Adapters
from spmd_infer.generation.attention_choice import AttentionChoice
from spmd_infer.generation.generation_options import GenerationOptions
from spmd_infer.generation.kv_pages import PAGE_SIZE
from spmd_infer.generation.loop import GenerationLoop
from spmd_infer.generation.sampling_params import SamplingParams
from spmd_infer.generation.speculation import Draft, PromptLookup
from spmd_infer.generation.step_sizes import Bounds, SizesAhead, StepSizes
from spmd_infer.models.page_attention import GATHERED, IN_PLACE
from tests.generation.test_loop import EOS, request
from tests.references.llama_variants import BASE, token_ids, write_checkpoint
from tests.references.lora_adapters import ALL, adapter_tensors, write_adapter

COMPILED = "/jax/core/compile/backend_compile_duration"


@contextmanager
def compilations() -> Iterator[list[float]]:
    """Seconds of everything that XLA compiles meanwhile, in any thread and by whomever."""
    found: list[float] = []

    def note(event: str, seconds: float, **_: object) -> None:
        if event == COMPILED:
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def load(loop: GenerationLoop, longest: int, adapter: Adapter | None, seed: int, *, rules: bool) -> None:
    """Requests of every kind, lengths and parameters drawn, some that begin alike, some cancelled, in several waves."""
    random = np.random.default_rng(seed)
    texts = token_ids(40, longest)
    kinds = (
        SamplingParams(max_tokens=9, ignore_eos=True),
        SamplingParams(max_tokens=40, ignore_eos=True),
        SamplingParams(max_tokens=12, temperature=1.0, top_p=0.9, seed=1, ignore_eos=True),
        SamplingParams(max_tokens=8, repetition_penalty=1.3, logprobs=5, ignore_eos=True),
        SamplingParams(max_tokens=8, logit_bias=dict.fromkeys(range(40), 2.0), temperature=0.5, ignore_eos=True),
        SamplingParams(max_tokens=8, allowed_token_ids=(3, 4, 5), ignore_eos=True),
    )
    kinds = kinds if rules else kinds[:3]
    for wave in (1, 2, 7, 5):
        requests = []
        for index in range(wave):
            params = kinds[int(random.integers(len(kinds)))]
            length = int(random.integers(1, longest - params.max_tokens + 1))
            text = texts[int(random.integers(3)) if index % 2 else index]
            requests.append(request(text[:length].tolist(), params))
            requests[-1].adapter = adapter if index % 3 else None
        for each in requests:
            loop.submit([each])
        for _ in range(4):
            loop.turn()
        loop.cancel(requests[0])
        loop.run(requests)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Engine]:
    folder: Path = tmp_path_factory.mktemp("warm")
    write_checkpoint(folder, "gqa", num_hidden_layers=1)
    return lambda mesh: Engine.load(folder, mesh=mesh)


def check_nothing_is_compiled(
    loop: GenerationLoop, engine: Engine, longest: int, adapter: Adapter | None = None, *, rules: bool = True
) -> None:
    """Warm a loop up for requests of at most so many positions, and run some."""
    before = engine.compiles
    done = loop.warm_up(max_len=longest, rules=rules, quiet=True)
    compiled = engine.compiles
    assert done.programs >= compiled - before > 10
    with compilations() as found:
        load(loop, longest, adapter, seed=7, rules=rules)
    assert engine.compiles == compiled
    assert found == []
    assert {program.name for program in engine.programs} >= {"insert", "enter", "decode", "choose", "copy", "gather"}


def test_nothing_is_compiled_after_a_warm_up(engines: Callable[[str], Engine]) -> None:
    engine = engines("data=2,model=2")
    options = GenerationOptions(max_rows=2, max_chunk=PAGE_SIZE, speculation=PromptLookup(k=2))
    loop = GenerationLoop(engine, engine.config, {EOS}, options)
    check_nothing_is_compiled(loop, engine, 2 * PAGE_SIZE)


def test_nothing_is_compiled_where_some_rows_have_adapters_and_a_model_drafts(
    engines: Callable[[str], Engine], tmp_path: Path
) -> None:
    engine = engines("data=1,model=1")
    adapters = Adapters(engine, 2, 4)
    tensors = adapter_tensors(BASE | {"num_hidden_layers": 1}, rank=2, seed=1)
    folder = write_adapter(tmp_path, tensors, r=2, lora_alpha=2, target_modules=list(ALL))
    adapter = adapters.load("any", LoraAdapter.open(folder))
    speculation = Draft(engine=engines("data=1,model=1"), k=2, adaptive=False)
    options = GenerationOptions(max_rows=1, max_chunk=PAGE_SIZE, speculation=speculation)
    loop = GenerationLoop(engine, engine.config, {EOS}, options, adapters)
    check_nothing_is_compiled(loop, engine, 2 * PAGE_SIZE, adapter)


def test_nothing_is_compiled_where_pools_grow_and_few_pages_are_gathered(
    engines: Callable[[str], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = set()

    def way(_: AttentionChoice, rows: int, pages: int, width: int) -> str:
        ways.add(found := GATHERED if 2 * rows * width <= pages else IN_PLACE)
        return found

    monkeypatch.setattr(AttentionChoice, "of_pages", way)  # as if it had been measured
    engine = engines("data=1,model=1")
    loop = GenerationLoop(engine, engine.config, {EOS}, GenerationOptions(max_rows=2, max_chunk=PAGE_SIZE))
    check_nothing_is_compiled(loop, engine, 4 * PAGE_SIZE, rules=False)
    assert ways == {GATHERED, IN_PLACE}
    assert loop.scheduler.num_pages > 8


def test_a_request_beyond_the_bounds_runs_and_is_compiled_for(engines: Callable[[str], Engine]) -> None:
    engine = engines("data=1,model=1")
    loop = GenerationLoop(engine, engine.config, {EOS}, GenerationOptions(max_rows=1, max_chunk=PAGE_SIZE))
    loop.warm_up(max_len=PAGE_SIZE, rules=False, quiet=True)
    compiled = engine.compiles
    longer = request(token_ids(1, 200)[0].tolist(), SamplingParams(max_tokens=3, ignore_eos=True))
    loop.submit([longer])
    loop.run([longer])
    assert len(longer.token_ids) == 3
    assert engine.compiles > compiled


@pytest.mark.parametrize("rows", [1, 3, 64, 256])
@pytest.mark.parametrize("positions", [40, 512, 8192])
def test_sizes_ahead_cover_all_that_the_bounds_allow(rows: int, positions: int) -> None:
    pages = min(4096, rows * -(-positions // PAGE_SIZE) + 1)
    bounds = Bounds(rows=rows, positions=positions, pages=max(8, pages), max_chunk=512, copies=64)
    sizes = StepSizes()
    sizes.ahead = ahead = SizesAhead.within(bounds)
    for pool in ahead.pools:
        for running in range(1, min(rows, pool) + 1):
            for shared in {0, 1, 32, 33, pool} if rows > 1 else {0}:
                found_rows, found_shared = sizes.decode(running, pool, min(shared, pool))
                assert (found_rows, pool, found_shared) in ahead.decodes
                assert found_rows >= running
    edges = {edge + more for edge in (1, 32, 64, 128, 256, 512) for more in (-1, 0, 1)}
    for tokens in edges & set(range(1, min(512, positions) + 1)):
        for before in range((positions - tokens) // PAGE_SIZE + 1):
            kind = sizes.chunk(tokens, before)
            assert kind[0] >= tokens
            assert kind[1] >= before
            most = sizes.most_chunk_rows(*kind)
            assert most is not None
            assert all((sizes.chunk_rows(count, *kind), *kind) in ahead.chunks for count in (1, most))
    for wanted in range(1, max(8, pages) + 1):
        assert sizes.pool(wanted, max(8, pages)) in ahead.pools
    assert len(ahead.decodes) + len(ahead.chunks) <= 80  # each takes seconds to compile
