"""Caches of small numbers on small random models: nothing but the rounding changes what is generated."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spmd_infer.axes import BATCH
from spmd_infer.generation.generation_options import GenerationOptions
from spmd_infer.generation.kv_pages import PAGE_SIZE, KVPages, page_bytes, pages_axes
from spmd_infer.generation.loop import GenerationLoop
from spmd_infer.generation.sampling_params import SamplingParams
from spmd_infer.generation.scoring import score_texts
from spmd_infer.generation.speculation import PromptLookup
from spmd_infer.models.cache_formats import CacheFormat
from spmd_infer.models.page_view import PageView
from tests.generation.test_loop import EOS, engine, prompts, request, run
from tests.generation.test_prompt_scores import text
from tests.generation.test_speculation_loop import drafts
from tests.references.llama_variants import token_ids

SMALL = pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8", "fp8"])
VARIANT = "tied"  # engines of their own: other tests count the programs of theirs


def loop(mesh: str = "data=1,model=1", **options: Any) -> GenerationLoop:
    found = engine(VARIANT, mesh)
    return GenerationLoop(found, found.config, {EOS}, GenerationOptions(**options))


GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)
# Longer than two pages, so that chunks have pages before them and prompts pages in common.
LONG = [[*prompts([30])[0] * 5][:length] for length in (140, 70, 133, 5)]
PARAMS = [
    SamplingParams(max_tokens=20, ignore_eos=True),
    SamplingParams(max_tokens=20, temperature=1.0, top_k=5, seed=3, ignore_eos=True),
    SamplingParams(max_tokens=20, ignore_eos=True),
    SamplingParams(max_tokens=20, temperature=1.0, top_k=5, seed=4, ignore_eos=True),
]


@pytest.mark.parametrize(
    ("cache_dtype", "options"),
    [
        ("int8", {}),
        ("int8", {"max_chunk": PAGE_SIZE, "token_budget": 2 * PAGE_SIZE, "max_rows": 8}),
        ("int8", {"speculation": PromptLookup(adaptive=False)}),
        ("fp8", {"max_chunk": PAGE_SIZE, "token_budget": 2 * PAGE_SIZE, "max_rows": 8}),
        ("bfloat16", {}),
    ],
    ids=str,
)
def test_one_by_one_equals_together_however_it_is_run(cache_dtype: str, options: dict[str, Any]) -> None:
    used = loop(cache_dtype=cache_dtype, **options)
    expected = alone(cache_dtype)
    assert run(used, LONG, PARAMS) == expected
    assert run(used, LONG, PARAMS) == expected, "prompts found in the cache"


@cache
def alone(cache_dtype: str) -> list[list[int]]:
    used = loop(cache_dtype=cache_dtype, prefix_cache=False, chunked=False)
    return [run(used, [ids], [params])[0] for ids, params in zip(LONG, PARAMS, strict=True)]


def test_a_draft_model_has_such_a_cache_too() -> None:
    used = loop(cache_dtype="int8", speculation=drafts("mha", "data=1,model=1"))
    assert run(used, prompts(), GREEDY) == run(loop(cache_dtype="int8"), prompts(), GREEDY)


@pytest.mark.parametrize("mesh", ["data=2,model=4", "data=8,model=1"])
@pytest.mark.parametrize("cache_dtype", ["int8", "fp8"])
def test_meshes(cache_dtype: str, mesh: str) -> None:
    assert run(loop(mesh, cache_dtype=cache_dtype), LONG, PARAMS) == alone(cache_dtype)


def test_a_pool_holds_more_pages_of_small_numbers_and_preempts_when_they_run_out() -> None:
    small = CacheFormat.of("int8", "cpu", np.float32)
    most = 5 * page_bytes(engine(VARIANT).config, small)
    used = loop(cache_dtype="int8", cache_bytes=most)
    params = SamplingParams(max_tokens=150, ignore_eos=True, temperature=0.7, seed=5)
    requests = [request(ids, params) for ids in prompts([30, 17, 9, 25, 30, 11, 28, 19])]
    scheduled = []
    for one in requests:
        used.submit([one])
        scheduled.append(used.scheduler[one.request_id])
    used.run(requests)
    assert sum(each.preemptions for each in scheduled) > 0
    expected = run(loop(cache_dtype="int8"), [one.prompt_ids for one in requests], params)
    assert [one.token_ids for one in requests] == expected


@pytest.mark.parametrize("mesh", ["data=1,model=1", "data=2,model=4"])
@SMALL
def test_scores_are_those_of_steps_over_pages(cache_dtype: str, mesh: str) -> None:
    """One token at a time over the paged cache, against ``score`` in one pass."""
    found = engine(VARIANT, mesh)
    ids, config = token_ids(4, 24), found.config
    parts, rows = found.data_parts, 4 // found.data_parts
    fmt = CacheFormat.of(cache_dtype, "cpu", np.float32)
    made = found.jit(
        f"pages {cache_dtype}", lambda _: KVPages.zeros(config, parts, rows, fmt), out_axes=pages_axes(config, fmt)
    )
    of_rows = np.broadcast_to(np.arange(rows, dtype=np.int32), (parts, rows))
    nothing = np.zeros((parts, 0), np.int32)
    view = PageView(
        of_rows[..., None], np.full((parts, rows), 24, np.int32), of_rows, np.zeros((parts, rows), np.int32),
        nothing, nothing, np.zeros((parts, 0, rows), bool),
    )  # fmt: skip

    def step(model: Any, pages: KVPages, tokens: jax.Array, targets: jax.Array, position: jax.Array) -> Any:
        at = jnp.broadcast_to(position, (4, 1))
        x, done = model.hidden(tokens[:, None], at, pages.layers(jax.tree.map(jnp.asarray, view)))
        scores = jax.nn.log_softmax(model.logits(x[:, 0]))
        return jnp.take_along_axis(scores, targets[:, None], axis=1)[:, 0], pages.updated(done)

    one = found.jit(f"step {cache_dtype}", step, donate=(0,), out_axes=((BATCH,), pages_axes(config, fmt)))
    pages, by_steps = made(), []
    for at in range(23):
        scores, pages = one(pages, *(found.place(ids[:, i], (BATCH,)) for i in (at, at + 1)), np.int32(at))
        by_steps.append(np.asarray(scores))
    whole = score_texts(loop(mesh, cache_dtype=cache_dtype), text, ids.tolist())
    np.testing.assert_allclose(whole, np.stack(by_steps, axis=1), atol=2e-3)  # a rounding that falls the other way
    plain = score_texts(loop(mesh), text, ids.tolist())
    assert np.abs(np.array(whole) - plain).max() > 1e-5
