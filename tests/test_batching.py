import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spmd_infer.batching import Buckets, pad_rows
from spmd_infer.errors import BatchError


def test_default_and_given_buckets() -> None:
    assert Buckets.default(4).sizes == (4, 8, 16, 32, 64)
    assert Buckets.default(3, largest=20).sizes == (3, 6, 12, 24)
    assert Buckets.of([1, 8, 30, 31], parts=4).sizes == (4, 8, 32)
    with pytest.raises(BatchError, match=r"\[0\]"):
        Buckets.of([0], 1)


@given(rows=st.integers(1, 500), sizes=st.lists(st.integers(1, 70), min_size=1, max_size=5), parts=st.integers(1, 8))
def test_cuts_cover_every_row_once(rows: int, sizes: list[int], parts: int) -> None:
    buckets = Buckets.of(sizes, parts)
    cuts = buckets.split(rows)
    assert [row for start, stop, _ in cuts for row in range(start, stop)] == list(range(rows))
    for start, stop, bucket in cuts:
        assert stop - start <= bucket
        assert bucket in buckets.sizes
        assert bucket % parts == 0
        assert not any(stop - start <= smaller < bucket for smaller in buckets.sizes)


def test_padding_repeats_the_last_row() -> None:
    rows = np.arange(6).reshape(3, 2)
    assert pad_rows(rows, 0, 3, 3) is rows
    np.testing.assert_array_equal(pad_rows(rows, 1, 3, 4), [[2, 3], [4, 5], [4, 5], [4, 5]])
