"""What the ranks tell each other, on real processes."""

import torch
from processes import run_ranks

from plrd_train.errors import UserError
from plrd_train.runtime.world import SharedError


def told(world):
    asked = []

    def on_main() -> dict:
        asked.append(world.rank)
        return {"from": world.rank, "tensor": torch.arange(3)}

    answer = world.on_main(on_main)
    return (
        asked,
        answer["from"],
        answer["tensor"].tolist(),
        world.is_main,
        world.share({"rank": world.rank}),
        world.on_all(lambda: world.rank * 10),
    )


def test_rank_0_works_and_all_know():
    for rank, found in enumerate(run_ranks(3, told)):
        asked, source, tensor, is_main, shared, own = found
        assert asked == ([0] if rank == 0 else []) and (source, tensor) == (0, [0, 1, 2]) and is_main == (rank == 0)
        assert shared == [{"rank": 0}, {"rank": 1}, {"rank": 2}] and own == rank * 10


def refused(world):
    def fail(rank: int) -> None:
        if world.rank >= rank:
            raise UserError(f"mend the file of rank {world.rank}")

    found = []
    for attempt in (
        lambda: world.on_main(lambda: fail(0)),
        lambda: world.on_all(lambda: fail(1)),
        lambda: world.on_all(lambda: fail(3)),
    ):
        try:
            attempt()
            found.append(None)
        except SharedError as error:
            found.append(str(error))
    return [*found, world.share(world.rank)]  # the ranks are still in step


def test_a_users_mistake_on_one_rank_is_raised_on_all():
    for found in run_ranks(3, refused):
        assert found == ["mend the file of rank 0", "mend the file of rank 1", None, [0, 1, 2]]
