"""allocation: which ranks save parameters."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_geo.allocation import Matrix, allocate, factored_size, largest_saving_rank


@given(st.integers(0, 60), st.integers(0, 60))
def test_largest_saving_rank_is_the_last_with_fewer_parameters(m, n):
    r = largest_saving_rank(m, n)
    assert r == 0 or factored_size(m, n, r) < m * n
    assert factored_size(m, n, r + 1) >= m * n


def test_allocate_refuses_a_limit_below_the_lowest_ranks():
    with pytest.raises(ValueError, match="at least 17 parameters, got 16"):
        allocate([Matrix.of(8, 8)], 16)
