"""Ranks and ratios by the contract's definitions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plrd_train.lowrank.ranks import Shape, ratio_of, uniform


@pytest.mark.parametrize(("m", "n", "rank"), [(4096, 4096, 910), (1024, 4096, 364), (14336, 4096, 1415), (4096, 14336, 1415)])
def test_ranks_of_mistral_at_2_25(m, n, rank):
    assert uniform({"w": Shape(m, n)}, 2.25) == {"w": rank}


shapes = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.builds(Shape, st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=6)


@given(shapes, st.floats(1.0, 20.0), st.sampled_from([1, 8, 32]))
def test_factored_linears_reach_the_ratio_and_the_rest_stay_dense(shapes, ratio, multiple):
    ranks = uniform(shapes, ratio, multiple)
    for name, shape in shapes.items():
        if name in ranks:
            kept = ranks[name] * (shape.out_features + shape.in_features)
            assert ranks[name] % multiple == 0
            assert kept < shape.out_features * shape.in_features
            assert kept <= shape.out_features * shape.in_features / ratio * (1 + 1e-9)
    if len(ranks) == len(shapes):
        assert ratio_of(shapes, ranks) >= ratio * (1 - 1e-9)


def test_ratio_counts_dense_linears_too():
    shapes = {"a": Shape(10, 10), "b": Shape(10, 10)}
    assert ratio_of(shapes, {"a": 2}) == pytest.approx(200 / (40 + 100))
    assert ratio_of(shapes, {}) == 1.0


def test_a_linear_that_two_factors_would_not_shrink_stays_dense():
    assert uniform({"a": Shape(64, 64)}, 1.0) == {}  # rank 32 would hold 32 * 128 = 64 * 64 parameters
    assert uniform({"a": Shape(1, 50)}, 1.5) == {}


def test_ranks_never_grow():
    shapes = {"a": Shape(100, 100, rank=20)}
    assert uniform(shapes, 1.25) == {"a": 20}
    assert uniform(shapes, 5.0) == {"a": 10}
    assert uniform(shapes, 5.0, multiple=64) == {"a": 20}
