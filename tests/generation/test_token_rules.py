"""Rules about single tokens, and scores: against numpy, on split vocabularies, with small messages only."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from spmd_infer.axes import BATCH, VOCAB, AxisRules, axis_scope
from spmd_infer.errors import TaskError
from spmd_infer.generation.logprobs import score_tokens
from spmd_infer.generation.sampling import (
    SAMPLING_AXES,
    Sampled,
    SamplingArrays,
    SamplingParams,
    sample,
    sample_by_rules,
    sampling_arrays,
)
from spmd_infer.generation.token_rules import RuleWidths, TokenIds, TokenRules, apply_rules, rule_arrays
from spmd_infer.generation.token_state import TokenState, token_bits, token_state
from spmd_infer.mesh import MeshSpec
from spmd_infer.planning.audit import collectives
from spmd_infer.tensors import Axes
from tests.generation.test_sampling import fits, numpy_distribution

WORDS = 328  # eight parts of 41: the bits of a mask are not cut between devices
TOP = 20
# XLA divides by a penalty as a product with its reciprocal, and fuses a product and a difference: last bits differ.
ROUNDING = 5e-7


@dataclass
class Row:
    """One request as the tests describe it."""

    params: SamplingParams
    prompt: tuple[int, ...] = (0,)
    output: tuple[int, ...] = ()
    bad: tuple[TokenIds, ...] = ()
    allowed: tuple[int, ...] | None = None


ROWS = [
    Row(SamplingParams()),
    Row(SamplingParams(repetition_penalty=1.3), prompt=(3, 3, 300, 41), output=(7, 3)),
    Row(SamplingParams(repetition_penalty=0.7, frequency_penalty=0.5), prompt=(327,), output=(9, 9, 9, 40, 82)),
    Row(SamplingParams(presence_penalty=-1.5), output=(5, 5, 326)),
    Row(SamplingParams(logit_bias={0: 3.5, 327: -100.0, 160: 0.25}, frequency_penalty=1.0), output=(160,)),
    Row(
        SamplingParams(bad_words=("a", "bc", "def")), output=(20, 21, 22), bad=((50,), (22, 60), (21, 22, 70), (5, 80))
    ),
    Row(SamplingParams(allowed_token_ids=(1, 100, 200)), allowed=(1, 100, 200)),
    Row(
        SamplingParams(
            temperature=1.0,
            repetition_penalty=1.1,
            logit_bias={100: 2.0},
            allowed_token_ids=(1, 100, 200, 327),
            bad_words=("x",),
            logprobs=5,
        ),
        prompt=(100,),
        output=(100, 200),
        bad=((100, 200, 327),),
        allowed=(1, 100, 200, 327),
    ),
]


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    return np.random.default_rng(5).normal(0, 3, (len(ROWS), WORDS)).astype(np.float32)


def take_rows(slots: Any, rows: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[rows] if leaf.ndim else leaf, slots)


def put_rows(slots: Any, rows: Any, entering: Any) -> Any:
    return jax.tree.map(lambda leaf, new: leaf.at[rows].set(new), slots, entering)


def axes_of(name: str, value: np.ndarray) -> Axes:
    """Rows over the batch; counts over the vocabulary too."""
    return (BATCH, VOCAB) if name == "output_counts" else (BATCH, *(None,) * (value.ndim - 1)) if value.ndim else ()


def numpy_rules(logits: np.ndarray, row: Row) -> np.ndarray:
    """One row by the definitions, in float32 as on the device."""
    changed = logits.copy()
    for word in row.bad:
        if word[:-1] == row.output[len(row.output) - len(word) + 1 :]:
            changed[word[-1]] = -np.inf
    for token, bias in row.params.logit_bias.items():
        changed[token] += np.float32(bias)
    repetition, frequency, presence = (
        np.float32(value)
        for value in (row.params.repetition_penalty, row.params.frequency_penalty, row.params.presence_penalty)
    )
    for token in {*row.prompt, *row.output}:
        changed[token] = changed[token] / repetition if changed[token] > 0 else changed[token] * repetition
    for token in set(row.output):
        changed[token] -= frequency * np.float32(row.output.count(token))
        changed[token] -= presence
    if row.allowed is not None:
        changed[[token for token in range(WORDS) if token not in row.allowed]] = -np.inf
    return changed


def inputs(rows: list[Row], vocab: int = WORDS) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], np.ndarray]:
    params = [row.params for row in rows]
    bad = [row.bad for row in rows]
    mask = np.stack([token_bits(range(vocab) if row.allowed is None else row.allowed, vocab) for row in rows])
    state = token_state([row.prompt for row in rows], [row.output for row in rows], vocab)
    return sampling_arrays(params, ()), rule_arrays(params, bad, RuleWidths.fitting(params, bad)), state, mask


def choose(logits: np.ndarray, rows: list[Row], where: str = "", num_top: int = TOP) -> Sampled:
    """Sample on a mesh, everything placed as an engine places it."""
    sampling, rules, state, mask = inputs(rows, logits.shape[1])
    steps = np.array([len(row.output) for row in rows], np.int32)
    mesh = MeshSpec.parse(where).build() if where else None
    axes = AxisRules()

    def place(x: np.ndarray, names: Axes) -> Any:
        if mesh is None:
            return x
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, axes.resolve(names, x.shape, dict(mesh.shape)).spec))

    def run(*args: Any) -> Sampled:
        if mesh is None:
            return sample_by_rules(*args, num_top=num_top)
        with axis_scope(axes, mesh):
            return sample_by_rules(*args, num_top=num_top)

    return jax.tree.map(  # type: ignore[no-any-return]
        np.asarray,
        jax.jit(run)(
            place(logits, (BATCH, VOCAB)),
            SamplingArrays(**{name: place(value, SAMPLING_AXES[name]) for name, value in sampling.items()}),
            place(steps, (BATCH,)),
            TokenRules(**{name: place(value, axes_of(name, value)) for name, value in rules.items()}),
            TokenState(**{name: place(value, axes_of(name, value)) for name, value in state.items()}),
            place(mask, (BATCH, None)),
        ),
    )


@pytest.mark.parametrize("where", ["", "model=8", "data=2,model=4", "data=8"])
def test_rules_equal_numpy(logits: np.ndarray, where: str) -> None:
    _, rules, state, mask = inputs(ROWS)
    mesh = MeshSpec.parse(where).build() if where else None

    def run(logits: jax.Array, rules: TokenRules, state: TokenState, mask: jax.Array) -> jax.Array:
        if mesh is None:
            return apply_rules(logits, rules, state, mask)
        with axis_scope(AxisRules(), mesh):
            return apply_rules(logits, rules, state, mask)

    changed = np.asarray(jax.jit(run)(logits, TokenRules(**rules), TokenState(**state), mask))
    for index, row in enumerate(ROWS):
        expected = numpy_rules(logits[index], row)
        np.testing.assert_allclose(changed[index], expected, rtol=ROUNDING, atol=ROUNDING, err_msg=str(index))


def test_each_rule_alone(logits: np.ndarray) -> None:
    """A batch in which only one rule is in force skips the others."""
    for row in ROWS:
        _, rules, state, mask = inputs([row])
        changed = jax.jit(apply_rules)(logits[:1], TokenRules(**rules), TokenState(**state), mask)
        expected = numpy_rules(logits[0], row)
        np.testing.assert_allclose(np.asarray(changed)[0], expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("where", ["", "model=8", "data=2,model=4", "data=8"])
def test_scores_equal_numpy(logits: np.ndarray, where: str) -> None:
    sampled = choose(logits, ROWS, where)
    expected = log_softmax(logits.astype(np.float64), axis=1)
    rows = np.arange(len(ROWS))
    np.testing.assert_allclose(sampled.logprobs, expected[rows, sampled.tokens], atol=1e-5, rtol=0)
    np.testing.assert_array_equal(sampled.top_ids, np.argsort(-logits, axis=1, kind="stable")[:, :TOP])
    wanted = np.take_along_axis(expected, sampled.top_ids, axis=1)
    np.testing.assert_allclose(sampled.top_logprobs, wanted, atol=1e-5, rtol=0)
    # Greedy rows take the likeliest by the rules, scored by the model.
    for index, row in enumerate(ROWS[:-1]):
        assert sampled.tokens[index] == numpy_rules(logits[index], row).argmax()


@pytest.mark.parametrize("where", ["model=8", "data=2,model=4"])
def test_scores_of_equal_logits_name_the_lower_id(where: str) -> None:
    flat = np.zeros((2, WORDS), np.float32)
    mesh = MeshSpec.parse(where).build()

    def run(logits: jax.Array, tokens: jax.Array) -> Any:
        with axis_scope(AxisRules(), mesh):
            return score_tokens(logits, tokens, TOP)

    tokens = np.array([327, -1], np.int32)
    chosen, ids, top = jax.jit(run)(flat, tokens)
    np.testing.assert_array_equal(ids, np.tile(np.arange(TOP), (2, 1)))
    np.testing.assert_allclose(top, -np.log(WORDS), rtol=1e-6)
    np.testing.assert_allclose(chosen, [-np.log(WORDS), -np.inf], rtol=1e-6)


def test_nothing_is_scored_unasked(logits: np.ndarray) -> None:
    sampled = choose(logits[:7], ROWS[:7])
    assert not sampled.logprobs.any()
    assert not sampled.top_logprobs.any()
    assert sampled.top_ids.shape == (7, TOP)


def test_rows_that_need_nothing_choose_as_in_the_plain_variant(logits: np.ndarray) -> None:
    params = [SamplingParams(temperature=1.0, top_p=0.9, min_p=0.01, seed=seed) for seed in range(4)]
    rows = np.tile(logits[:1], (4, 1))
    plain = jax.jit(sample)(rows, SamplingArrays(**sampling_arrays(params, ())), np.zeros(4, np.int32))
    mixed = choose(np.concatenate([rows, logits[1:]]), [*map(Row, params), *ROWS[1:]])
    np.testing.assert_array_equal(mixed.tokens[:4], plain)


@pytest.mark.parametrize("where", ["", "model=8", "data=2,model=4"])
def test_streams_depend_on_nothing_else(logits: np.ndarray, where: str) -> None:
    """The same request alone, at another place of another batch, and on meshes."""
    drawn = Row(
        SamplingParams(temperature=1.5, seed=9, top_k=200, repetition_penalty=1.2, logit_bias={4: 1.0}, logprobs=3),
        prompt=(1, 2),
        output=(4, 4, 8),
    )
    alone = choose(logits[:1], [drawn])
    batch = np.concatenate([logits[1:6], logits[:1], logits[6:]])
    mixed = choose(batch, [*ROWS[1:6], drawn, *ROWS[6:]], where)
    assert mixed.tokens[5] == alone.tokens[0]
    np.testing.assert_allclose(mixed.logprobs[5], alone.logprobs[0], atol=1e-6)


def test_distribution_under_rules() -> None:
    """Rules, then filters, then a draw: chi-square against the same steps in numpy."""
    draws = 4000
    logits = np.random.default_rng(3).normal(0, 2, 40).astype(np.float32)
    rows = [
        Row(
            SamplingParams(
                temperature=1.5,
                top_k=20,
                top_p=0.95,
                min_p=0.01,
                seed=seed,
                repetition_penalty=1.4,
                presence_penalty=0.5,
                logit_bias={3: 4.0, 4: -2.0},
                allowed_token_ids=tuple(range(1, 40)),
            ),
            prompt=(11, 12),
            output=(3, 13),
            allowed=tuple(range(1, 40)),
        )
        for seed in range(draws)
    ]
    tokens = choose(np.tile(logits, (draws, 1)), rows).tokens
    row = rows[0]
    changed = logits.copy()
    changed[3] += 4
    changed[4] -= 2
    for token in (3, 11, 12, 13):
        changed[token] = changed[token] / 1.4 if changed[token] > 0 else changed[token] * 1.4
    changed[[3, 13]] -= 0.5
    changed[0] = -np.inf
    expected = numpy_distribution(changed, row.params.temperature, 20, 0.95, 0.01)
    assert 5 < (expected > 0).sum() < 20
    fits(tokens, expected)


def test_no_token_allowed(logits: np.ndarray) -> None:
    limits: dict[str, Any] = {"allowed_token_ids": (5,), "temperature": 1.0, "top_p": 0.5}
    other = Row(SamplingParams(temperature=1.0, top_p=0.5, seed=1))
    free = choose(logits[:2], [Row(SamplingParams(**limits), allowed=(5,)), other])
    blocked = choose(logits[:2], [Row(SamplingParams(**limits, bad_words=("x",)), bad=((5,),), allowed=(5,)), other])
    assert free.tokens[0] == 5
    assert blocked.tokens[0] == -1
    assert blocked.tokens[1] == free.tokens[1]


def test_state_follows_the_tokens() -> None:
    """Slots that requests enter and leave, tokens counted as they come, equal to a fresh state of the same texts."""
    rng = np.random.default_rng(0)
    slots, vocab = 4, 70
    state = TokenState(**token_state([()] * (slots + 1), [()] * (slots + 1), vocab))
    texts: dict[int, tuple[list[int], list[int]]] = {}
    put = jax.jit(put_rows, donate_argnums=0)
    count = jax.jit(TokenState.count, donate_argnums=0)
    state = jax.tree.map(jax.numpy.asarray, state)
    for step in range(30):
        if step % 5 == 0:  # two requests enter, one of them again with some output
            rows = rng.permutation(slots)[:2].astype(np.int32)
            for row, output_len in zip(rows, (0, 9), strict=True):
                texts[int(row)] = rng.integers(0, vocab, 6).tolist(), rng.integers(0, vocab, output_len).tolist()
            entering = [texts[int(row)] for row in rows]
            fields = token_state([prompt for prompt, _ in entering], [output for _, output in entering], vocab)
            state = put(state, rows, TokenState(**fields))
        running = sorted(texts)
        rows = np.array([*running, *[slots] * (slots - len(running))], np.int32)  # the last slot fills the batch up
        tokens = rng.integers(0, vocab, slots).astype(np.int32)
        state = count(state, rows, tokens)
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            if row != slots:
                texts[row][1].append(token)
    running = sorted(texts)
    expected = token_state([texts[row][0] for row in running], [texts[row][1] for row in running], vocab)
    taken = jax.jit(take_rows)(state, np.array(running, np.int32))
    for name, value in expected.items():
        np.testing.assert_array_equal(getattr(taken, name), value)


def test_too_many_for_the_program() -> None:
    params = SamplingParams(logit_bias={1: 1.0, 2: 1.0}, stop_token_ids=(1, 2, 3), min_tokens=1)
    with pytest.raises(TaskError, match="2 logit biases and 0 bad words as tokens; the program has room for 1 and 4"):
        rule_arrays([params], [()], RuleWidths(1, 4))
    with pytest.raises(TaskError, match="3 end and stop tokens; the program has room for 2"):
        sampling_arrays([params], (), most_stops=2)


@pytest.mark.parametrize("where", ["model=8", "data=2,model=4"])
def test_messages_are_small(where: str) -> None:
    """One step on slots of state, as a decode program has it: nothing of the vocabulary's size crosses devices."""
    vocab, batch, slots = 16_384, 4, 5
    mesh, axes = MeshSpec.parse(where).build(), AxisRules()
    rows = [Row(SamplingParams(temperature=1.0, top_p=0.9, min_p=0.1, logprobs=2, logit_bias={1: 1.0}))] * batch
    sampling, rules, _, mask = inputs(rows, vocab)
    state = token_state([()] * slots, [()] * slots, vocab)

    def placed(x: np.ndarray, names: Axes) -> jax.ShapeDtypeStruct:
        spec = axes.resolve(names, x.shape, dict(mesh.shape)).spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    def step(logits: Any, sampling: Any, rules: Any, state: TokenState, rows: Any, mask: Any) -> Any:
        with axis_scope(axes, mesh):
            sampled = sample_by_rules(logits, sampling, rows, rules, take_rows(state, rows), mask, num_top=TOP)
            return sampled, state.count(rows, sampled.tokens)

    arguments = (
        placed(np.zeros((batch, vocab), np.float32), (BATCH, VOCAB)),
        SamplingArrays(**{name: placed(value, SAMPLING_AXES[name]) for name, value in sampling.items()}),  # type: ignore[arg-type]
        TokenRules(**{name: placed(value, axes_of(name, value)) for name, value in rules.items()}),  # type: ignore[arg-type]
        TokenState(**{name: placed(value, (None, *axes_of(name, value)[1:])) for name, value in state.items()}),  # type: ignore[arg-type]
        placed(np.zeros(batch, np.int32), (BATCH,)),
        placed(mask, (BATCH, None)),
    )
    lowered = jax.jit(step, donate_argnums=3).lower(*arguments)
    found = collectives(lowered.compile())
    candidates = batch * mesh.shape["model"] * 128 * 4
    assert max(each.nbytes for each in found) <= candidates < 0.1 * batch * vocab * 4
