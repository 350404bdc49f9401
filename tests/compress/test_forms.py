"""What stands in a Linear's place: each form against dense algebra in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plrd_train.compress import forms
from plrd_train.compress.allocations import energy, uniform
from plrd_train.compress.ranks import Shape

FORMS = pytest.mark.parametrize("form", forms.FORMS.names())
SIDES = st.integers(1, 48)
# The largest error of a product, as a share of its largest entry: rounding of float32, or to 8 bits.
TOLERANCE = {"lowrank": 3e-6, "pifa": 3e-6, "int8": 2e-2}


def pair_of(out_features, in_features, rank, spread=1.0):
    """A pair whose columns differ in size by `spread` from the first to the last."""
    generator = torch.Generator().manual_seed(out_features * 1000 + in_features)
    sizes = torch.logspace(0, -torch.log10(torch.tensor(spread)).item(), rank)
    return torch.randn(out_features, rank, generator=generator) * sizes, torch.randn(
        rank, in_features, generator=generator
    )


def linear_of(form, up, down, bias=None):
    """A Linear of the form, loaded with what the form stores of that pair."""
    one = forms.get(form)
    up, down = one.pack(up, down)
    state = (
        one.stored("up.weight", up)
        | one.stored("down.weight", down)
        | ({} if bias is None else one.stored("up.bias", bias))
    )
    linear = one.Linear(down.shape[1], len(up), len(down), bias is not None)
    linear.load_state_dict(state)
    return linear


@FORMS
@settings(max_examples=200, deadline=None)
@given(SIDES, SIDES, st.floats(0, 1.2))
def test_the_largest_rank_is_that_of_a_search(form, out_features, in_features, share):
    one, budget = forms.get(form), share * out_features * in_features
    ranks = range(min(out_features, in_features) + 1)
    most = one.most_rank(out_features, in_features, budget)
    assert min(most, ranks[-1]) == max(rank for rank in ranks if one.params(out_features, in_features, rank) <= budget)


@FORMS
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("out_features", "in_features", "rank", "spread"),
    [(40, 24, 15, 1), (24, 40, 23, 1e4), (33, 33, 1, 1), (64, 8, 7, 1e6)],
)
def test_a_linear_of_the_form_is_the_product_and_costs_what_it_says(
    form, out_features, in_features, rank, spread, bias
):
    up, down = pair_of(out_features, in_features, rank, spread)
    shift = torch.randn(out_features) if bias else None
    linear = linear_of(form, up, down, shift)
    x = torch.randn(3, 5, in_features)
    expected = x.double() @ (up.double() @ down.double()).T + (shift.double() if bias else 0.0)
    torch.testing.assert_close(linear(x).double(), expected, rtol=0, atol=TOLERANCE[form] * expected.abs().max().item())
    held = sum(tensor.numel() for tensor in linear.state_dict().values() if tensor.ndim == 2)
    assert held == forms.get(form).params(out_features, in_features, rank)
    assert (linear.in_features, linear.out_features) == (in_features, out_features)
    linear(x.requires_grad_()).sum().backward()
    assert x.grad is not None and all(parameter.grad is not None for parameter in linear.parameters())


@FORMS
def test_what_is_stored_is_the_packed_pair_again(form):
    one = forms.get(form)
    up, down = one.pack(*pair_of(40, 24, 15))
    state = one.stored("up.weight", up) | one.stored("down.weight", down)
    assert torch.equal(one.loaded("up.weight", state.__getitem__), up)
    assert torch.equal(one.loaded("down.weight", state.__getitem__), down)
    again = one.pack(up, down)  # what is packed already stays
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(again, (up, down), strict=True))


def test_the_kept_rows_of_pifa_are_those_of_the_matrix_and_the_others_small_combinations():
    up, down = pair_of(96, 64, 40, 1e3)
    linear = linear_of("pifa", up, down)
    whole, place = up.double() @ down.double(), linear.order.long()
    for row in range(96):
        if place[row] < 40:
            torch.testing.assert_close(linear.basis.weight[place[row]].double(), whole[row], rtol=0, atol=1e-5)
    assert sorted(place.tolist()) == list(range(96))
    assert linear.combine.weight.abs().max() <= 1.1 + 1e-6


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_pifa_in_bf16_loses_little_more_than_the_pair(shape):
    up, down = pair_of(*shape, 40)
    x, whole = torch.randn(200, shape[1]).double(), up.double() @ down.double()

    def error(weight):
        return ((weight - whole) @ x.T).norm() / (whole @ x.T).norm()

    def rounded(tensor):
        return tensor.bfloat16().double()

    packed, kept = forms.get("pifa").pack(up, down)
    assert error(rounded(packed) @ rounded(kept)) <= 3 * error(rounded(up) @ rounded(down)) <= 0.02


@pytest.mark.parametrize("zeros", [slice(None), slice(3, None)])
def test_a_pair_of_lower_rank_than_it_says_is_packed(zeros):
    up, down = pair_of(20, 16, 8)
    up[:, zeros] = 0
    packed, kept = forms.get("pifa").pack(up, down)
    torch.testing.assert_close(packed.double() @ kept.double(), up.double() @ down.double(), rtol=0, atol=1e-5)
    linear_of("pifa", up, down)


def test_what_is_not_packed_is_not_stored():
    with pytest.raises(ValueError, match="not packed"):
        forms.get("pifa").stored("up.weight", torch.ones(4, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_stores_what_was_rounded_to_it_in_any_dtype(dtype):
    one, (up, down) = forms.get("int8"), pair_of(40, 24, 15, 1e4)
    up[3], down[5], up[7, 0] = 0, down[5] * 1e-30, 1e4
    packed = one.pack(up, down)
    for part, factor, before in zip(("up", "down"), packed, (up, down), strict=True):
        state = one.stored(f"{part}.weight", factor.to(dtype))
        codes, scale = state[f"{part}.codes"], state[f"{part}.scale"]
        assert codes.dtype == torch.int8 and scale.dtype == dtype and codes.abs().max() <= 127
        assert torch.equal(codes.double() * scale.double()[:, None], factor.double())  # no bit is lost
        assert ((factor - before).abs() <= scale.float()[:, None] / 2).all()  # the nearest code
        largest = codes.abs().amax(1)
        assert (largest[before.abs().amax(1) > 0] >= 64).all()  # no scale is larger than it must be
        assert torch.equal(one.loaded(f"{part}.weight", state.__getitem__), factor.to(dtype))


# Allocations


@FORMS
@pytest.mark.parametrize("ratio", [1.25, 2.25])
def test_allocations_spend_what_the_form_counts(form, ratio):
    shapes = {
        f"{i}": Shape(out, inside, None, form)
        for i, (out, inside) in enumerate([(64, 64), (96, 48), (40, 128), (24, 24)])
    }
    budget = sum(shape.dense_params for shape in shapes.values()) / ratio
    values = {
        name: torch.logspace(0, -2 - int(name), min(shape.out_features, shape.in_features))
        for name, shape in shapes.items()
    }
    spent = {}
    for name, ranks in {
        "uniform": uniform.Allocation(1).ranks(shapes, ratio),
        "energy": energy.Allocation(1).ranks(shapes, ratio, values),
    }.items():
        spent[name] = sum(shape.params(ranks.get(key)) for key, shape in shapes.items())
        assert spent[name] <= budget
    assert spent["energy"] >= budget - max(shape.out_features + shape.in_features for shape in shapes.values())


def test_pifa_keeps_more_rank_of_the_same_parameters():
    pair, pivots = (
        uniform.Allocation(1).ranks({"w": Shape(4096, 4096, None, form)}, 1.25)["w"] for form in ("lowrank", "pifa")
    )
    assert pivots / pair == pytest.approx(1.38, abs=0.01)  # design of the form: 38% more for a square Linear at 1.25x
