"""Truncation against the optimum that float64 SVD gives (Eckart and Young)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plrd_train.lowrank.spectral import ABSOLUTE, of_dense, of_product


def matrix(m: int, n: int, decay: float, seed: int = 0) -> torch.Tensor:
    """A float64 matrix with singular values exp(-decay * i / min(m, n))."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    u, _ = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))
    return u * torch.exp(-decay * torch.arange(k, dtype=torch.float64) / k) @ v.T


def check(weight: torch.Tensor, up: torch.Tensor, down: torch.Tensor, rank: int, reported: float) -> None:
    exact = weight.double()
    singular = torch.linalg.svdvals(exact)
    optimum = singular[rank:].norm() / singular.norm()
    error = ((exact - up.double() @ down.double()).norm() / exact.norm()).item()
    assert error <= max(1.0005 * optimum.item(), ABSOLUTE)
    assert math.isclose(reported, error, rel_tol=1e-3, abs_tol=ABSOLUTE)


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (80, 80), (1, 40), (40, 1)])
@pytest.mark.parametrize("decay", [0.0, 3.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dense_is_optimal_at_every_rank(shape, decay, dtype):
    weight = matrix(*shape, decay).to(dtype)
    for rank in {1, min(shape) // 3 or 1, min(shape)}:
        factors = of_dense(weight).cut(rank)
        assert factors.up.shape == (shape[0], rank) and factors.down.shape == (rank, shape[1])
        assert factors.up.dtype == factors.down.dtype == torch.float32
        check(weight, factors.up, factors.down, rank, factors.rel_error)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    decay=st.floats(0, 60),
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e30]),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_dense_is_optimal_whatever_the_matrix(m, n, decay, scale, seed, data):
    rank = data.draw(st.integers(1, min(m, n)))
    weight = (matrix(m, n, decay, seed) * scale).float()
    factors = of_dense(weight).cut(rank)
    check(weight, factors.up, factors.down, rank, factors.rel_error)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(m=st.integers(2, 40), n=st.integers(2, 40), k=st.integers(1, 30), decay=st.floats(0, 20), seed=st.integers(0, 9), data=st.data())
def test_product_is_optimal_without_being_formed(m, n, k, decay, seed, data):
    rank = data.draw(st.integers(1, min(m, n, k)))
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(m, k, generator=generator) * torch.exp(-decay * torch.arange(k) / k)
    down = torch.randn(k, n, generator=generator)
    factors = of_product(up, down).cut(rank)
    check(up.double() @ down.double(), factors.up, factors.down, rank, factors.rel_error)


def test_rank_deficient_and_repeated_columns():
    weight = matrix(30, 20, 1.0)[:, :5].repeat(1, 4).float()
    for rank in (3, 5, 12):
        factors = of_dense(weight).cut(rank)
        assert torch.isfinite(factors.up).all() and torch.isfinite(factors.down).all()
        check(weight, factors.up, factors.down, rank, factors.rel_error)


def test_factors_are_balanced():
    factors = of_dense(matrix(50, 30, 2.0)).cut(10)
    expected = torch.linalg.svdvals(matrix(50, 30, 2.0))[:10].diag()
    for gram in (factors.up.T @ factors.up, factors.down @ factors.down.T):
        torch.testing.assert_close(gram.double(), expected, rtol=1e-4, atol=1e-5)


def test_zero_matrix_has_no_error():
    factors = of_dense(torch.zeros(6, 4)).cut(2)
    assert factors.rel_error == 0.0 and not (factors.up @ factors.down).any()


def test_lost_singular_values_leave_columns_that_can_train():
    weight = torch.zeros(8, 8)
    weight[0, 0] = 1.0
    factors = of_dense(weight).cut(3)
    assert all((factors.up[:, i].norm() + factors.down[i].norm()) > 0 for i in range(3))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_is_refused(bad):
    weight = torch.ones(4, 4)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        of_dense(weight).cut(2)
    with pytest.raises(ValueError, match="NaN or Inf"):
        of_product(torch.ones(4, 4), weight)


@pytest.mark.parametrize("rank", [0, 5])
def test_impossible_ranks_are_refused(rank):
    with pytest.raises(ValueError, match=r"1\.\.4"):
        of_dense(torch.ones(4, 6)).cut(rank)
