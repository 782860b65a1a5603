"""Reductions over the rows of a batch, against numpy, with padding and micro-batches in the way."""

import numpy as np
import pytest

import spmd_infer as si
from spmd_infer.errors import BatchError

# float32 sums of up to 20 terms in another order.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def engine() -> si.Engine:
    def scores(params: dict[str, np.ndarray], x: np.ndarray) -> dict[str, np.ndarray]:
        return {"scores": x @ params["w"], "count": x[:, :1].astype(int)}

    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(6, 5)).astype(np.float32)}
    return si.Engine(scores, params, mesh="data=4,model=2", example=np.zeros((1, 6), np.float32), buckets=[4, 8])


def rows(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(3, 2, size=(number, 6)).astype(np.float32)


@pytest.mark.parametrize("number", [1, 3, 8, 20])
def test_against_numpy(engine: si.Engine, number: int) -> None:
    x = rows(number)
    whole = engine.infer(x)
    scores, count = whole["scores"], whole["count"]
    weights = np.random.default_rng(1).uniform(0.1, 2, number).astype(np.float32)

    mean = engine.infer(x, aggregate=si.Mean())
    np.testing.assert_allclose(mean["scores"], scores.mean(0), rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(mean["count"], count.mean(0), rtol=TOLERANCE)
    weighted = engine.infer(x, aggregate=si.WeightedMean(weights))["scores"]
    np.testing.assert_allclose(weighted, np.average(scores, axis=0, weights=weights), rtol=1e-5, atol=TOLERANCE)
    np.testing.assert_array_equal(engine.infer(x, aggregate=si.Max())["scores"], scores.max(0))
    np.testing.assert_array_equal(engine.infer(x, aggregate=si.Min())["count"], count.min(0))
    votes = np.bincount(scores.argmax(1), minlength=5)
    assert engine.infer(x, aggregate=si.MajorityVote())["scores"] == votes.argmax()
    np.testing.assert_array_equal(engine.infer(x, aggregate=si.Concat())["scores"], scores)
    median = engine.infer(x, aggregate=lambda out: np.median(out["scores"], axis=0))
    np.testing.assert_array_equal(median, np.median(scores, axis=0))


def test_a_nan_counts_only_where_its_row_does(engine: si.Engine) -> None:
    x = rows(3)
    x[2] = np.nan  # the row that padding repeats
    first = engine.infer(x, aggregate=si.WeightedMean([1, 1, 0]))["scores"]
    np.testing.assert_allclose(first, engine.infer(x[:2])["scores"].mean(0), rtol=1e-5)
    assert np.isnan(engine.infer(x, aggregate=si.Mean())["scores"]).all()
    assert np.isnan(engine.infer(x, aggregate=si.Max())["scores"]).all()


def test_weights_that_make_no_sense(engine: si.Engine) -> None:
    with pytest.raises(BatchError, match="2 weights for 3 rows"):
        engine.infer(rows(3), aggregate=si.WeightedMean([1, 2]))
    for bad in ([-1.0, 2.0], [0.0, 0.0], [np.inf, 1.0], []):
        with pytest.raises(BatchError, match="finite numbers, none negative and not all 0"):
            si.WeightedMean(bad)


def test_votes_need_classes() -> None:
    engine = si.Engine(lambda p, x: x[:, 0], {}, mesh="data=2", example=np.zeros((1, 2), np.float32))
    with pytest.raises(BatchError, match="has 1 dimension"):
        engine.infer(np.ones((2, 2), np.float32), aggregate=si.MajorityVote())


def test_streams_aggregate_each_batch_on_its_own(engine: si.Engine) -> None:
    batches = [rows(n) for n in (5, 17, 2)]
    got = list(engine.infer_stream(batches, aggregate=si.Mean()))
    for batch, mean in zip(batches, got, strict=True):
        np.testing.assert_allclose(
            mean["scores"], engine.infer(batch)["scores"].mean(0), rtol=TOLERANCE, atol=TOLERANCE
        )
