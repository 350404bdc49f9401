"""The one decision how a model is compressed: what is looked at, and that it is the same for one model or several."""

import pytest
import torch

from plrd_train.compress.allocations import ALLOCATIONS
from plrd_train.compress.blocks import Alone
from plrd_train.compress.compressor import Allocated, Compressor, Needs, Source
from plrd_train.compress.contracts import AllocationError
from plrd_train.compress.methods import METHODS
from plrd_train.compress.ranks import Shape, ratio_of
from plrd_train.compress.surgery import eligible_linears
from plrd_train.parents.models import HubArchitecture
from plrd_train.parents.parent import load_config, open_parent
from plrd_train.parents.weights import WeightReader

TEXT = torch.randint(3, 64, (6, 12), generator=torch.Generator().manual_seed(1))
SETTINGS = {
    "svd": {},
    "asvd": {"calibration_tokens": 72, "alpha": 0.5},
    "fisher": {"calibration_tokens": 72},
    "whitened": {"calibration_tokens": 72},
    "rom": {"calibration_tokens": 72},
    "refined": {"calibration_tokens": 72, "epochs": 0, "batch_tokens": 36, "rate": 0.1},
}


def compressor(name, allocation="uniform", multiple=1):
    tokens = {"tokens": 36} if allocation == "sensitivity" else {}
    return Compressor(
        METHODS.settings_of(name)(**SETTINGS[name]), ALLOCATIONS.settings_of(allocation)(multiple, **tokens)
    )


# What PLRD, the papers of docs/methods.md and the two allocations look at, written down once more.
NEEDS = [
    ("svd", "uniform", Needs(False, None, False, False), False, False),
    ("svd", "energy", Needs(True, None, False, False), False, False),
    ("svd", "sensitivity", Needs(True, None, True, False), True, True),
    ("whitened", "uniform", Needs(False, "inputs", False, False), True, False),
    ("asvd", "energy", Needs(True, "magnitudes", False, False), True, False),
    ("fisher", "uniform", Needs(False, "gradients", False, False), True, True),
    ("rom", "uniform", Needs(False, None, False, True), True, False),
    ("refined", "energy", Needs(True, "inputs", False, True), True, False),
]


@pytest.mark.parametrize(("name", "allocation", "needs", "text", "whole"), NEEDS)
def test_what_is_looked_at(name, allocation, needs, text, whole):
    found = compressor(name, allocation).needs()
    assert found == needs and (found.text, found.whole_model) == (text, whole)
    given = compressor(name, allocation).needs(by_ratio=False)  # ranks that are given need no spectra and no losses
    assert not given.spectra and not given.losses and given.in_order == needs.in_order


@pytest.fixture
def source(save_parent):
    """(a Source over a checkpoint of which one block is in memory at a time, the shapes of its Linears)."""
    folder, model = save_parent("llama")
    parent = open_parent(str(folder))
    alone = Alone(WeightReader(parent).read, torch.device("cpu"))
    shapes = {name: Shape.of(linear) for name, linear in eligible_linears(model)}
    return Source(alone, HubArchitecture(load_config(parent)), lambda tokens: list(TEXT.split(2))), shapes


@pytest.mark.parametrize(
    ("name", "allocation"), [("svd", "uniform"), ("whitened", "uniform"), ("whitened", "energy"), ("rom", "energy")]
)
def test_several_models_are_those_that_come_one_by_one(source, name, allocation):
    source, shapes = source
    chosen, wanted = compressor(name, allocation), [1.25, 2.0, dict.fromkeys(list(shapes)[:3], 5)]
    together = chosen.allocate(source, shapes, wanted)
    assert together.ranks[2] == wanted[2]
    assert all(ratio <= ratio_of(shapes, ranks) for ratio, ranks in zip(wanted, together.ranks[:2], strict=False))
    made = {(i, one.name): one for i, one in chosen.factors(source, shapes, together)}
    assert together.spectra is None
    for i, one in enumerate(wanted):
        alone = chosen.allocate(source, shapes, [one])
        assert alone.ranks == [together.ranks[i]]
        found = [made_alone for _, made_alone in chosen.factors(source, shapes, alone)]
        assert {made_alone.name for made_alone in found} == {key for key in together.ranks[i]}
        for made_alone in found:
            other = made[i, made_alone.name]
            assert other.rank == made_alone.rank == together.ranks[i][other.name]
            torch.testing.assert_close(other.up @ other.down, made_alone.up @ made_alone.down, rtol=0, atol=1e-5)


def test_a_linear_that_keeps_its_rank_is_not_factored_again(source):
    source, shapes = source
    first = next(iter(shapes))
    pairs = {first: Shape(shapes[first].out_features, shapes[first].in_features, 4)}
    assert list(compressor("svd").factors(source, pairs, Allocated([{first: 4}]))) == []


def test_ranks_that_nothing_comes_of_are_named(source):
    source, shapes = source
    coarse = compressor("svd", multiple=64)
    for ask in (lambda: coarse.allocate(source, shapes, [2.0]), lambda: coarse.even(shapes, 2.0)):
        with pytest.raises(
            AllocationError, match=r"^ranks\.multiple: at 2x every rank is below 64; choose a smaller multiple$"
        ):
            ask()
    assert coarse.even(shapes, 1.0) == {}
