"""How Linears are dealt to ranks."""

import pytest

from plrd_train.compress.allocations.uniform import Allocation
from plrd_train.compress.ranks import Shape
from plrd_train.compress.rounds import cost, owners, rounds

BLOCK = {
    "q": (4096, 4096),
    "k": (1024, 4096),
    "v": (1024, 4096),
    "o": (4096, 4096),
    "gate": (14336, 4096),
    "up": (14336, 4096),
    "down": (4096, 14336),
}
MISTRAL = {f"layers.{i}.{name}": Shape(*shape) for i in range(32) for name, shape in BLOCK.items()}


def stages() -> list[dict[str, Shape]]:
    """The Linears of Mistral-7B before each stage of 1.25, 1.5, 1.85 and 2.25x."""
    made = [MISTRAL]
    for ratio in (1.25, 1.5, 1.85):
        ranks = Allocation(1).ranks(MISTRAL, ratio)
        made.append(
            {name: Shape(shape.out_features, shape.in_features, ranks[name]) for name, shape in MISTRAL.items()}
        )
    return made


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("size", [2, 4, 8, 32])
def test_ranks_are_busy_alike_on_mistral_7b(stage, size):
    """By the model of what factoring costs: with a barrier after each round, and without."""
    shapes = stages()[stage]
    longest = sum(max(cost(shapes[name]) for name in dealt) for dealt in rounds(shapes, shapes, size))
    mean = sum(cost(shape) for shape in shapes.values()) / size
    assert longest / mean < 1.15
    dealt = owners(shapes, shapes, size)
    busiest = max(sum(cost(shapes[name]) for name, owner in dealt.items() if owner == rank) for rank in range(size))
    assert busiest <= longest * (1 + 1e-12)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_each_linear_has_one_owner_and_each_rank_one_linear_a_round(size):
    dealt = list(rounds(MISTRAL, MISTRAL, size))
    assert sorted(name for names in dealt for name in names) == sorted(MISTRAL)
    assert all(len(names) == size for names in dealt[:-1])
    assert owners(MISTRAL, MISTRAL, size) == {name: owner for names in dealt for owner, name in enumerate(names)}
