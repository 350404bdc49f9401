"""Each method against the optimum of its own objective, by float64 SVD."""

import pytest
import torch

from plrd_train.compress.methods.asvd import Method as Asvd
from plrd_train.compress.methods.fisher import Method as Fisher
from plrd_train.compress.methods.rom import Method as Rom
from plrd_train.compress.methods.svd import Method as Svd
from plrd_train.compress.methods.whitened import Method as Whitened
from plrd_train.compress.statistics import inputs as second_moment

WHITENED, ASVD, FISHER = (
    Whitened(calibration_tokens=1),
    Asvd(calibration_tokens=1, alpha=0.5),
    Fisher(calibration_tokens=1),
)
SHAPES = [(96, 64), (64, 96), (80, 80)]


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens, n, massive=0.0):
    """Correlated float32 inputs whose scale falls over three decades, where every 2048th token has `massive`
    activations in two channels."""
    mixed = torch.linalg.qr(normal(n, n, seed=1)).Q
    x = (normal(tokens, n, seed=2) * torch.logspace(0, -3, n)) @ mixed
    x[::2048, 3] += massive
    x[::2048, n // 2] -= massive / 2
    return x


def moment(x, batch=100):
    """The second moment, added up in float32 as in a run."""
    total = torch.zeros(x.shape[1], x.shape[1])
    return second_moment.mean(total, sum(second_moment.add(total, part, part[:0]) for part in x.split(batch)))


def error(x, weight, factors):
    """The relative error of the outputs, in float64."""
    lost = weight.double() - factors.up.double() @ factors.down.double()
    return ((x.double() @ lost.T).norm() / (x.double() @ weight.double().T).norm()).item()


def optimum(x, weight, rank):
    singular = torch.linalg.svdvals(x.double() @ weight.double().T)
    return (singular[rank:].norm() / singular.norm()).item()


@pytest.mark.parametrize("massive", [0.0, 300.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_whitened_outputs_are_the_nearest_of_their_rank(shape, massive):
    x, weight = inputs(8192, shape[1], massive), normal(*shape, seed=3)
    statistic = moment(x)
    up, down = normal(shape[0], 48, seed=4), normal(48, shape[1], seed=5)
    for spectral, whole in (
        (WHITENED.dense(weight, statistic), weight),
        (WHITENED.product(up, down, statistic), up @ down),
    ):
        for rank in (2, 12, 40):
            best = optimum(x, whole, rank)
            assert best > 1e-3
            assert error(x, whole, spectral.cut(rank)) <= 1.0005 * best


@pytest.mark.parametrize("shape", SHAPES)
def test_whitened_on_less_text_than_channels(shape):
    x, weight = inputs(30, shape[1]), normal(*shape, seed=3)
    spectral = WHITENED.dense(weight, moment(x))
    assert error(x, weight, spectral.cut(10)) <= 1.0005 * optimum(x, weight, 10)
    assert error(x, weight, spectral.cut(32)) <= 1e-4
    full = spectral.cut(min(shape))  # what the text has not shown is kept too
    torch.testing.assert_close(full.up @ full.down, weight, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_whitened_by_a_moment_that_rounding_has_made_indefinite(shape):
    x, weight = inputs(30, shape[1]), normal(*shape, seed=3)
    rounded = moment(x) - 3e-7 * moment(x).trace() * torch.eye(shape[1])
    assert torch.linalg.eigvalsh(rounded.double())[0] < 0
    spectral = WHITENED.dense(weight, rounded)
    for rank in (2, 10):
        assert error(x, weight, spectral.cut(rank)) <= 1.0005 * optimum(x, weight, rank)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", [ASVD, FISHER])
def test_asvd_and_fisher_are_the_svd_of_scaled_channels(shape, method):
    statistic, weight = inputs(500, shape[1], 50.0).abs().mean(0), normal(*shape, seed=3)
    root = statistic.double().sqrt()
    for spectral, whole in (
        (method.dense(weight, statistic), weight),
        (method.product(weight[:, :30], weight[:30], statistic), weight[:, :30] @ weight[:30]),
    ):
        u, s, vh = torch.linalg.svd(whole.double() * root, full_matrices=False)
        found = spectral.cut(20)
        expected = (u[:, :20] * s[:20]) @ vh[:20] / root
        assert (found.up.double() @ found.down.double() - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_without_any_signal_the_methods_are_the_plain_svd(shape):
    weight = normal(*shape, seed=3)
    plain = Svd().dense(weight, None).cut(20)
    for spectral in (
        Asvd(calibration_tokens=1, alpha=0.0).dense(weight, normal(shape[1], seed=6).abs()),
        ASVD.dense(weight, torch.zeros(shape[1])),
        FISHER.dense(weight, torch.full((shape[1],), 3.0)),
        WHITENED.dense(weight, torch.zeros(shape[1], shape[1])),
    ):
        found = spectral.cut(20)
        torch.testing.assert_close(found.up @ found.down, plain.up @ plain.down, rtol=0, atol=1e-3)


def test_statistics_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="no finite float32 numbers"):
        WHITENED.dense(torch.eye(4), torch.full((4, 4), torch.inf))
    with pytest.raises(ValueError, match="no finite float32 numbers"):
        ASVD.dense(torch.eye(4), torch.tensor([1.0, torch.nan, 1.0, 1.0]))


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (256, 256), (256, 128)])
@pytest.mark.parametrize("was", [None, 0.6], ids=["dense", "low-rank"])
def test_rom_of_a_layer_is_that_of_its_equations(shape, was):
    """W1 = V_r^T and W2 = V_r W, V the eigenvectors of the covariance of y = W x, in float64 (LLM-ROM, section 2)."""
    (m, n), rank = shape, min(shape) // 4
    generator = torch.Generator().manual_seed(m)
    mix = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q
    x = torch.randn(4 * n, n, generator=generator) @ (torch.exp(-2 * torch.arange(n) / n)[:, None] * mix)
    moment = x.T @ x / len(x)
    if was is None:
        weight = torch.randn(m, n, generator=generator) / n**0.5
        made = Rom(calibration_tokens=1).dense(weight, moment).cut(rank)
    else:
        k = int(was * min(m, n))
        up, down = torch.randn(m, k, generator=generator) / k**0.5, torch.randn(k, n, generator=generator) / n**0.5
        weight, made = up.double() @ down.double(), Rom(calibration_tokens=1).product(up, down, moment).cut(rank)
    x, weight = x.double(), weight.double()
    outputs = x @ weight.T
    main = torch.linalg.eigh(outputs.T @ outputs / len(x)).eigenvectors[:, -rank:]
    expected, found = main @ (main.T @ weight), made.up.double() @ made.down.double()
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert (x @ (found - expected).T).norm() <= 1e-5 * (x @ expected.T).norm()
    lost = ((outputs - x @ expected.T).norm() / outputs.norm()).item()
    assert made.metric_error == pytest.approx(lost, rel=1e-5)
