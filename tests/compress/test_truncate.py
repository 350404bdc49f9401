"""Decomposition and cut against the optimum that float64 SVD gives (Eckart and Young), in the plain norm and in
metrics."""

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plrd_train.compress.algebra.gram import bordered, rounding
from plrd_train.compress.algebra.truncate import ABSOLUTE, Factors, Metric, Moment, of_dense, of_product


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


def root(
    kind: str | None, n: int, decay: float, scale: float, seed: int
) -> tuple[Metric | Moment | None, torch.Tensor]:
    """A metric of that kind, and its root as a float64 matrix. Its singular values are scale * exp(-decay * i / n),
    some 0 if it is `singular`."""
    if kind is None:
        return None, torch.eye(n, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    values = (
        scale * torch.exp(-decay * torch.arange(n, dtype=torch.float64) / n)[torch.randperm(n, generator=generator)]
    )
    if kind.startswith("singular"):
        values[torch.rand(n, generator=generator) < 0.4] = 0
    if kind.endswith("diagonal"):
        return Metric(values), values.diag()
    q, p = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    exact = q * values @ p.T
    return (Moment(exact @ exact.T, 0.0) if kind.endswith("moment") else Metric(exact)), exact


def check_in_metrics(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, values: torch.Tensor, factors: Factors, rank: int
) -> None:
    """Against L^T weight R by SVD in float64; what rounding may cost is ABSOLUTE of ||L|| ||weight|| ||R||."""
    product = factors.up.double() @ factors.down.double()
    singular = torch.linalg.svdvals(left.T @ weight @ right)
    size = torch.linalg.matrix_norm(left, 2) * max(weight.norm(), product.norm()) * torch.linalg.matrix_norm(right, 2)
    error = (left.T @ (weight - product) @ right).norm()
    assert error <= 1.0005 * singular[rank:].norm() + ABSOLUTE * size
    assert ((values - singular[: len(values)]).abs() <= 1e-3 * size).all()
    if singular.norm() > 0 and weight.norm() > 0:
        relative = ((weight - product).norm() / weight.norm()).item()
        assert math.isclose(factors.rel_error, relative, rel_tol=2e-3, abs_tol=2 * ABSOLUTE)
        if factors.metric_error is not None:
            measured = (error / singular.norm()).item()
            assert (
                abs(factors.metric_error - measured) <= 2e-3 * measured + 2 * ABSOLUTE * (size / singular.norm()).item()
            )
        gram = factors.up.double().T @ factors.up.double()
        for other in (gram.diag().diag(), factors.down.double() @ factors.down.double().T):
            assert (gram - other).norm() <= 5e-3 * product.norm()


METRIC = st.tuples(
    st.sampled_from([None, "diagonal", "full", "moment", "singular diagonal", "singular full", "singular moment"]),
    st.sampled_from([0, 2, 6, 12]),
    st.sampled_from([1, 1e-12, 1e9]),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    decay=st.sampled_from([0, 2, 6, 12]),
    scale=st.sampled_from([1, 1e-12, 1e9]),
    seed=st.integers(0, 99),
    left=METRIC,
    right=METRIC,
    half=st.booleans(),
    data=st.data(),
)
def test_dense_is_optimal_in_any_metrics(m, n, decay, scale, seed, left, right, half, data):
    rank = data.draw(st.integers(1, min(m, n)))
    weight = (matrix(m, n, decay, seed) * scale).float()
    if half:
        weight[:, n // 2 :] = 0
    (left_metric, left_root), (right_metric, right_root) = (
        root(left[0], m, *left[1:], seed),
        root(right[0], n, *right[1:], seed + 1),
    )
    spectral = of_dense(weight, left=left_metric, right=right_metric)
    check_in_metrics(weight.double(), left_root, right_root, spectral.values, spectral.cut(rank), rank)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    k=st.integers(1, 30),
    decay=st.sampled_from([0, 2, 6, 12]),
    scale=st.sampled_from([1, 1e-12, 1e9]),
    seed=st.integers(0, 99),
    left=METRIC,
    right=METRIC,
    dead=st.booleans(),
    data=st.data(),
)
def test_product_is_optimal_in_any_metrics(m, n, k, decay, scale, seed, left, right, dead, data):
    rank = data.draw(st.integers(1, min(m, n, k)))
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(m, k, generator=generator) * torch.exp(-decay * torch.arange(k) / k) * scale
    down = torch.randn(k, n, generator=generator)
    if dead:
        up[:, 0], down[k // 2] = up[:, -1], 0
    (left_metric, left_root), (right_metric, right_root) = (
        root(left[0], m, *left[1:], seed),
        root(right[0], n, *right[1:], seed + 1),
    )
    spectral = of_product(up, down, left=left_metric, right=right_metric)
    check_in_metrics(up.double() @ down.double(), left_root, right_root, spectral.values, spectral.cut(rank), rank)


@pytest.mark.parametrize("spectrum", ["spikes", "steep", "power law"])
def test_float32_is_left_where_it_would_not_do(spectrum):
    """Spectra of which a Gram matrix in float32 loses the tail, in sizes where its rounding adds up."""
    i = torch.arange(400, dtype=torch.float64)
    values = {"spikes": torch.exp(-i / 200), "steep": torch.exp(-i / 30), "power law": (i + 1) ** -1.5}[spectrum]
    if spectrum == "spikes":
        values[:2] *= 300
    u, v = (
        torch.linalg.qr(torch.randn(n, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(n)))[0]
        for n in (900, 400)
    )
    weight = (u * values @ v.T).float()
    spectral = of_dense(weight)
    for rank in (20, 130, 300):
        factors = spectral.cut(rank)
        check(weight, factors.up, factors.down, rank, factors.rel_error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0.0, 8.0, 30.0])
@pytest.mark.parametrize("seen", [1.0, 1e-2, 1e-5, 0.0])
def test_a_gram_matrix_by_a_moment_is_off_by_its_bound_at_most(dtype, decay, seen):
    """Also where the weight has only a share `seen` in what the moment is large in, so that the sums cancel; against
    80-bit numbers."""
    n, m = 600, 60
    generator = torch.Generator().manual_seed(1)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    moment = (q * torch.exp(-decay * torch.arange(n) / n) @ q.T).to(dtype).tril()
    moment += moment.tril(-1).T
    weight, large = torch.randn(m, n, generator=generator, dtype=torch.float64), q[:, : n // 2]
    weight = (weight - (1 - seen) * (weight @ large) @ large.T).to(dtype)
    metric = Moment(moment, 1e-7)
    whole, wide = (matrix.numpy().astype(numpy.longdouble) for matrix in (moment, weight))
    exact = wide @ (whole + 1e-7 * numpy.eye(n, dtype=numpy.longdouble)) @ wide.T
    off = numpy.linalg.norm((metric.gram(weight.T, dtype).numpy() - exact).astype(float))
    assert off <= rounding(dtype) * max(numpy.linalg.norm(exact.astype(float)), metric.terms(weight.T))
    assert abs(metric.cost(weight.T) - exact.trace()) <= rounding(torch.float64) * metric.terms(weight.T) * m**0.5


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
@pytest.mark.parametrize("below", [1e-2, 1e-4])
def test_what_a_moment_costs_below_nothing_counts_as_its_floor(shape, below):
    """Of an indefinite moment the metric is that of clipped eigenvalues, whether a root is needed or not."""
    weight, n = matrix(*shape, 1.0).float(), shape[1]
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    values = torch.exp(-3 * torch.arange(n, dtype=torch.float64) / n)
    values[n // 3 :] = -below
    clipped = q * values.clamp_min(1e-6).sqrt()
    spectral = of_dense(weight, right=Moment((q * values @ q.T).float(), 1e-6))
    for rank in (5, 25, 50):
        check_in_metrics(
            weight.double(),
            torch.eye(shape[0], dtype=torch.float64),
            clipped,
            spectral.values,
            spectral.cut(rank),
            rank,
        )


@pytest.mark.parametrize(
    ("right", "failing"),
    [
        (None, [torch.float32]),
        ("diagonal", [torch.float32]),
        ("moment", [torch.float32]),
        (None, [torch.float32, torch.float64]),
    ],
)
def test_an_eigensolver_that_does_not_converge_is_passed_over(monkeypatch, right, failing):
    weight, (metric, exact) = matrix(60, 40, 6).float(), root(right, 40, 2, 1, 0)
    solve, refused = torch.linalg.eigh, []

    def eigh(square):
        if square.dtype in failing:
            refused.append(square.dtype)
            raise torch.linalg.LinAlgError("it failed to converge")
        return solve(square)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    made = of_dense(weight, right=metric)
    factors, values = made.cut(15), made.values
    monkeypatch.undo()
    assert set(refused) == set(failing)
    check_in_metrics(weight.double(), torch.eye(60, dtype=torch.float64), exact, values, factors, 15)


@pytest.mark.parametrize("kind", ["definite", "indefinite", "low-rank", "zero", "tiny"])
@pytest.mark.parametrize(("n", "dtype"), [(1024, torch.float32), (512, torch.float64)])
def test_a_border_changes_no_eigenvalue_and_no_eigenvector(n, dtype, kind):
    factor = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if kind == "low-rank":
        factor[:, 5:] = 0
    scale = {"zero": 0.0, "tiny": 1e-20}.get(kind, 1.0) / n
    square = scale * (factor + factor.T if kind == "indefinite" else factor @ factor.T).to(dtype)
    wide = bordered(square.tril() + torch.triu(torch.ones(n, n), 1).to(dtype))  # above the diagonal anything may stand
    assert len(wide) > n
    values, vectors = torch.linalg.eigh(wide)
    values, vectors = values[-n:], vectors[:n, -n:].double()
    expected = torch.linalg.eigvalsh(square.double())
    exact = 100 * torch.finfo(dtype).eps  # LAPACK promises a multiple of n
    assert (values.double() - expected).abs().max() <= exact * expected.abs().max()
    assert (vectors.T @ vectors - torch.eye(n)).abs().max() <= exact
    assert (square.double() @ vectors - vectors * expected).norm() <= n**0.5 * exact * expected.abs().max()


@pytest.mark.parametrize("n", [1000, 2])
def test_other_matrices_get_no_border(n):
    square = torch.eye(n)
    assert bordered(square) is square


@pytest.mark.parametrize("rank", [100, 700])
def test_dense_is_optimal_where_rows_are_of_a_page(rank):
    weight = matrix(1100, 1024, 3).float()
    factors = of_dense(weight).cut(rank)
    check(weight, factors.up, factors.down, rank, factors.rel_error)


def test_one_decomposition_serves_all_ranks():
    weight = matrix(60, 40, 12.0).float()
    spectral = of_dense(weight)
    for rank in (5, 35, 12, 40):
        factors = spectral.cut(rank)
        check(weight, factors.up, factors.down, rank, factors.rel_error)
    product = of_product(matrix(60, 30, 3.0).float(), matrix(30, 50, 9.0).float())
    whole = matrix(60, 30, 3.0).float().double() @ matrix(30, 50, 9.0).float().double()
    for rank in (3, 28, 10, 30):
        factors = product.cut(rank)
        check(whole, factors.up, factors.down, rank, factors.rel_error)
    torch.testing.assert_close(product.values, torch.linalg.svdvals(whole)[:30], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(50, 30), (30, 50)])
def test_what_a_metric_does_not_see_stays_as_it_is(shape):
    """At full rank the pair is the weight itself, though an inverse of the metric would have wiped out what it does not
    see."""
    weight = matrix(*shape, 1.0).float()
    blind = torch.ones(shape[1])
    blind[::3] = 0
    factors = of_dense(weight, right=Metric(blind)).cut(30)
    assert factors.metric_error < ABSOLUTE
    seen = int(blind.sum())
    if shape[0] < seen:  # the outputs are all told apart by what is seen
        torch.testing.assert_close(factors.up @ factors.down, weight, rtol=0, atol=1e-5)


def test_moved_to_host_memory_and_back_it_cuts_alike():
    metric = Metric(torch.rand(40) + 0.1)
    for spectral in (
        of_dense(matrix(60, 40, 2.0).float(), right=metric),
        of_product(matrix(60, 30, 3.0), matrix(30, 40, 9.0), right=metric),
    ):
        one, other = spectral.cut(12), spectral.to(torch.device("cpu")).cut(12)
        assert torch.equal(one.up, other.up) and torch.equal(one.down, other.down)


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
@given(
    m=st.integers(2, 40),
    n=st.integers(2, 40),
    k=st.integers(1, 30),
    decay=st.floats(0, 20),
    seed=st.integers(0, 9),
    data=st.data(),
)
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
    metric = Metric(torch.eye(8) + 0.1)
    for spectral in (
        of_dense(weight),
        of_dense(weight, left=metric, right=metric),
        of_product(weight, weight),
        of_product(weight, weight, right=metric),
    ):
        factors = spectral.cut(3)
        assert all((factors.up[:, i].norm() + factors.down[i].norm()) > 0 for i in range(3))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_is_refused(bad):
    weight = torch.ones(4, 4)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        of_dense(weight).cut(2)
    with pytest.raises(ValueError, match="NaN or Inf"):
        of_product(torch.ones(4, 4), weight)
    with pytest.raises(ValueError, match="metric holds NaN or Inf"):
        of_dense(torch.ones(4, 4), right=Metric(weight))


@pytest.mark.parametrize("rank", [0, 5])
def test_impossible_ranks_are_refused(rank):
    with pytest.raises(ValueError, match=r"1\.\.4"):
        of_dense(torch.ones(4, 6)).cut(rank)
