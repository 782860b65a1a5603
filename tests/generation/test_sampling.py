"""Sampling: the right distribution, and streams that depend on nothing but seed and step."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import stats

from spmd_infer.axes import AxisRules, axis_scope
from spmd_infer.generation.sampling import SamplingArrays, SamplingParams, sample, sampling_arrays

VOCAB = 40
DRAWS = 4000


def choose(
    logits: np.ndarray, params: list[SamplingParams], steps: np.ndarray, eos: tuple[int, ...] = ()
) -> np.ndarray:
    arrays = SamplingArrays(**sampling_arrays(params, eos))
    return np.asarray(jax.jit(sample)(logits.astype(np.float32), arrays, steps.astype(np.int32)))


def numpy_distribution(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float = 0.0
) -> np.ndarray:
    """The same definitions by sorting, in float64; the logits have no ties."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled)
    order = order[np.exp(scaled[order] - scaled[order[0]]) >= min_p]
    kept = order[: top_k or VOCAB]
    weights = np.exp(scaled[kept] - scaled[kept[0]])
    weights /= weights.sum()
    before = np.cumsum(weights) - weights
    kept = kept[before < top_p]
    probabilities = np.zeros(VOCAB)
    probabilities[kept] = np.exp(scaled[kept] - scaled[kept[0]])
    return probabilities / probabilities.sum()


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    return np.random.default_rng(3).normal(0, 2, VOCAB).astype(np.float32)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.5, 0, 1.0, 0.0),
        (2.0, 0, 1.0, 0.0),
        (1.0, 7, 1.0, 0.0),
        (1.3, 1, 1.0, 0.0),
        (1.0, 0, 0.8, 0.0),
        (1.5, 0, 0.3, 0.0),
        (2.0, 9, 0.7, 0.0),
        (1.0, 0, 1.0, 0.05),
        (2.0, 0, 1.0, 0.3),
        (1.5, 5, 1.0, 0.1),
        (1.5, 0, 0.7, 0.1),
        (1.8, 11, 0.9, 0.08),
    ],
)
def test_distribution_equals_numpy(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    # Half the draws differ in seed, half in step: both must make independent draws.
    params = [
        SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=index // 2)
        for index in range(DRAWS)
    ]
    tokens = choose(np.tile(logits, (DRAWS, 1)), params, np.arange(DRAWS) % 2)
    expected = numpy_distribution(logits, temperature, top_k, top_p, min_p)
    fits(tokens, expected)


def fits(tokens: np.ndarray, expected: np.ndarray) -> None:
    """Fail where tokens drawn are not distributed as expected."""
    draws = len(tokens)
    counts = np.bincount(tokens, minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    # Chi-square over the tokens expected at least five times, the rarer ones together; the seeds are fixed, so this
    # cannot fail by chance, and a wrong filter or temperature gives a p of 1e-10 or less.
    often = expected * draws >= 5
    seen = np.append(counts[often], counts[~often].sum())
    wanted = np.append(expected[often], expected[~often].sum()) * draws
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    if len(seen) > 1:
        assert stats.chisquare(seen, wanted).pvalue > 1e-3
    else:
        assert seen[0] == draws


def test_a_wrong_distribution_is_noticed(logits: np.ndarray) -> None:
    params = [SamplingParams(temperature=1.0, seed=index) for index in range(DRAWS)]
    counts = np.bincount(choose(np.tile(logits, (DRAWS, 1)), params, np.zeros(DRAWS)), minlength=VOCAB)
    wanted = numpy_distribution(logits, 1.15, 0, 1.0) * DRAWS
    assert stats.chisquare(counts, wanted * counts.sum() / wanted.sum()).pvalue < 1e-3


def test_streams_depend_on_seed_and_step_alone(logits: np.ndarray) -> None:
    drawing = SamplingParams(temperature=1.0, seed=11)
    steps = np.arange(12)
    alone = [choose(logits[None], [drawing], np.array([step]))[0] for step in steps]
    assert len(set(alone)) > 1
    others = [SamplingParams(temperature=0.7, top_p=0.9, seed=5), SamplingParams(), SamplingParams(temperature=3.0)]
    rng = np.random.default_rng(0)
    for step in steps:
        rows = np.stack([rng.normal(size=VOCAB), rng.normal(size=VOCAB), logits, rng.normal(size=VOCAB)])
        mixed = choose(rows, [others[0], others[1], drawing, others[2]], np.array([7, 1, step, 0]))
        assert mixed[2] == alone[step]
        assert mixed[1] == rows[1].argmax()  # greedy beside sampling


@pytest.mark.parametrize(("data", "model"), [(8, 1), (1, 8), (2, 4)])
def test_streams_do_not_depend_on_the_mesh(logits: np.ndarray, data: int, model: int) -> None:
    params = [SamplingParams(temperature=1.0, top_k=20, top_p=0.9, seed=index) for index in range(8)]
    rows, steps = np.tile(logits, (8, 1)), np.arange(8, dtype=np.int32)
    mesh = jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    arrays = SamplingArrays(**sampling_arrays(params, ()))

    def step(rows: jax.Array, steps: jax.Array) -> jax.Array:
        with axis_scope(AxisRules(), mesh):
            return sample(rows, arrays, steps)

    placed = jax.device_put(rows, NamedSharding(mesh, PartitionSpec("data", "model")))
    assert (np.asarray(jax.jit(step)(placed, steps)) == choose(rows, params, steps)).all()


def test_greedy_takes_the_likeliest(logits: np.ndarray) -> None:
    assert choose(logits[None], [SamplingParams(top_k=3, top_p=0.1, seed=1)], np.zeros(1))[0] == logits.argmax()


def test_seedless_requests_differ(logits: np.ndarray) -> None:
    flat = np.zeros((2, VOCAB), np.float32)
    draws = np.stack(
        [choose(flat, [SamplingParams(temperature=1.0)] * 2, np.array([step, step])) for step in range(20)]
    )
    assert (draws[:, 0] != draws[:, 1]).any()


def test_ties_at_the_threshold_are_kept() -> None:
    tied = np.array([[1.0, 1.0, 1.0, -5.0]], np.float32)
    params = [SamplingParams(temperature=1.0, top_k=1, seed=seed) for seed in range(200)]
    assert set(choose(np.repeat(tied, 200, 0), params, np.zeros(200)).tolist()) == {0, 1, 2}


def test_extreme_logits() -> None:
    rows = np.array([[-np.inf, 3e38, -3e38, 0.0], [0.0, -np.inf, -np.inf, -np.inf]], np.float32)
    params = [SamplingParams(temperature=1.0, top_k=2, top_p=0.5, seed=seed) for seed in range(2)]
    assert choose(rows, params, np.zeros(2)).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_tokens_wait_for_min_tokens(temperature: float) -> None:
    logits = np.zeros((3, VOCAB), np.float32)
    logits[:, 4], logits[:, 6] = 60, 50
    params = [
        SamplingParams(min_tokens=2, temperature=temperature, seed=0, stop_token_ids=(6,)),
        SamplingParams(min_tokens=2, temperature=temperature, seed=0, ignore_eos=True),
        SamplingParams(temperature=temperature, seed=0),
    ]
    early = choose(logits, params, np.array([1, 1, 1]), eos=(4,))
    assert early[0] not in (4, 6)
    assert early[1:].tolist() == [4, 4]
    assert choose(logits, params, np.array([2, 2, 2]), eos=(4,)).tolist() == [4, 4, 4]
