"""`peak_bytes` against what the allocator hands out, LAPACK's workspace included, as torch's profiler sees it."""

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from plrd_train.compress.algebra.truncate import Metric, Moment, of_dense, of_product, peak_bytes
from plrd_train.compress.methods.refined import Method as Refined
from plrd_train.compress.ranks import Shape


def measured(work: Callable[[], object]) -> int:
    """The most bytes that tensors made by `work` take at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def metric(form: str | None, n: int) -> Metric | None:
    generator = torch.Generator().manual_seed(n)
    if form == "diagonal":
        return Metric(torch.rand(n, generator=generator, dtype=torch.float64) + 0.5)
    return (
        Metric(
            torch.eye(n, dtype=torch.float64)
            + 0.3 * torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5
        )
        if form
        else None
    )


@pytest.mark.parametrize("shape", [(1400, 500), (500, 1400), (800, 800)])
@pytest.mark.parametrize("ratio", [1.25, 2.25])
@pytest.mark.parametrize(("left", "right"), [(None, None), (None, "full"), (None, "diagonal"), ("diagonal", None)])
def test_dense(shape, ratio, left, right):
    m, n = shape
    rank = int(m * n / (m + n) / ratio)
    weight, metrics = (
        torch.randn(m, n, generator=torch.Generator().manual_seed(0)),
        {"left": metric(left, m), "right": metric(right, n)},
    )
    found = measured(lambda: of_dense(weight, **metrics).cut(rank))
    assert found == pytest.approx(peak_bytes(Shape(m, n), rank, left=left, right=right), rel=0.15)


@pytest.mark.parametrize("shape", [(1400, 500), (500, 1400), (800, 800)])
@pytest.mark.parametrize("ratio", [1.5, 2.25])
@pytest.mark.parametrize(("left", "right"), [(None, None), (None, "full"), (None, "diagonal"), ("diagonal", None)])
def test_product(shape, ratio, left, right):
    m, n = shape
    k, rank = int(m * n / (m + n) / 1.25), int(m * n / (m + n) / ratio)
    generator = torch.Generator().manual_seed(0)
    up, down = (
        torch.linalg.qr(torch.randn(m, k, generator=generator)).Q,
        torch.linalg.qr(torch.randn(n, k, generator=generator)).Q.T.contiguous(),
    )
    metrics = {"left": metric(left, m), "right": metric(right, n)}
    found = measured(lambda: of_product(up, down, **metrics).cut(rank))
    assert found == pytest.approx(peak_bytes(Shape(m, n, k), rank, left=left, right=right), rel=0.15)


@pytest.mark.parametrize("shape", [(1400, 500), (500, 1400), (800, 800), (600, 800)])
@pytest.mark.parametrize("ratio", [1.25, 2.25])
def test_dense_by_a_moment(shape, ratio):
    """Where its root is needed, of a moment that is indefinite, of which an eigendecomposition gives the root."""
    m, n = shape
    rank = int(m * n / (m + n) / ratio)
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2 * n, n, generator=torch.Generator().manual_seed(1))
    moment = x.T @ x / len(x) - (0.5 if m >= n else 0.0) * torch.eye(n)
    found = measured(lambda: of_dense(weight, right=Moment(moment, 1e-8 * n)).cut(rank))
    assert found == pytest.approx(peak_bytes(Shape(m, n), rank, right="moment"), rel=0.15)


@pytest.mark.parametrize("shape", [(1400, 500), (500, 1400), (800, 800)])
def test_anchored(shape):
    m, n = shape
    method = Refined(calibration_tokens=1, epochs=0, batch_tokens=1, rate=0.0)
    linear = torch.nn.Linear(n, m, bias=False).requires_grad_(False)
    x = torch.randn(2 * n, n, generator=torch.Generator().manual_seed(1))
    cross = x.T @ x / len(x)
    moment = cross - (0.5 if m >= n else 0.0) * torch.eye(n)
    found = measured(lambda: method._anchored(linear, moment, cross).cut((m * n - 1) // (m + n)))
    assert 2 * 4 * n**2 + found == pytest.approx(method.peak_bytes(Shape(m, n)), rel=0.15)


def test_where_rows_are_of_a_page():
    weight = torch.randn(1400, 1024, generator=torch.Generator().manual_seed(0))
    assert measured(lambda: of_dense(weight).cut(260)) == pytest.approx(peak_bytes(Shape(1400, 1024), 260), rel=0.15)


def test_where_float32_would_not_do():
    weight = torch.randn(1000, 600, generator=torch.Generator().manual_seed(0)) * torch.exp(
        -14 * torch.arange(600) / 600
    )
    found = measured(lambda: of_dense(weight).cut(300))
    assert found == pytest.approx(peak_bytes(Shape(1000, 600), 300, dtype=torch.float64), rel=0.15)
