"""Blocks of a walk that a crashed decomposition had finished, on real gloo processes: taken from there, where they are
what is asked for."""

from functools import partial
from typing import ClassVar

import pytest
import torch
from processes import run_ranks
from sharded import Dying, architecture, opened, shapes_of

from plrd_train.compress.blocks import gathered, walk
from plrd_train.compress.contracts import DecompositionError
from plrd_train.compress.factor_cache import FactorCache
from plrd_train.compress.methods import refined, rom
from plrd_train.compress.sequential import factor_in_order

TEXT = torch.randint(3, 64, (12, 16), generator=torch.Generator().manual_seed(1))
SETTINGS = {
    "rom": {"calibration_tokens": 1},
    "refined": {"calibration_tokens": 1, "epochs": 2, "batch_tokens": 48, "rate": 0.05},
}
BLOCK = 7  # Linears of one, of two blocks


class Noting:
    """A method that notes each Linear that it decomposes."""

    done: ClassVar[list[int]] = []

    def dense(self, weight, statistic):
        self.done.append(1)
        return super().dense(weight, statistic)


class Rom(Noting, rom.Method):
    pass


class Refined(Noting, refined.Method):
    pass


def factored(world, name, folder, method, kept_folder, store=FactorCache, rank=10, text=TEXT, changed=None):
    """This rank's shards and errors, and how many Linears it has decomposed."""
    engine = opened(world, name, folder)
    if changed is not None:
        weights = engine.snapshot()
        for path, tensor in weights.items():
            if changed in path:
                tensor += 1e-3
        engine.restore(weights)
    factorizer = {"rom": Rom, "refined": Refined}[method](**SETTINGS[method])
    factorizer.done.clear()
    own = list(text[world.rank :: world.size].split(4 // world.size))
    blocks = lambda: walk(architecture(folder, {}), gathered(engine), own, engine.device)  # noqa: E731
    kept = store(kept_folder, world.device) if kept_folder else None
    shapes = shapes_of(engine)
    made = list(factor_in_order(engine, blocks, shapes, dict.fromkeys(shapes, rank), factorizer, kept))
    return {one.name: (one.up, one.down, one.rel_error, one.metric_error) for one in made}, len(factorizer.done)


def same(one, other) -> bool:
    """To the bit, on every rank."""
    return all(
        left.keys() == right.keys()
        and all(
            torch.equal(left[name][0], right[name][0]) and torch.equal(left[name][1], right[name][1]) for name in left
        )
        and all(left[name][2:] == right[name][2:] for name in left)
        for (left, _), (right, _) in zip(one, other, strict=True)
    )


def counted(results) -> int:
    return sum(count for _, count in results)


@pytest.mark.parametrize(("engine", "method"), [("fsdp", "refined"), ("zero3", "rom")])
def test_finished_blocks_outlive_a_crash(save_parent, tmp_path, engine, method):
    folder, _ = save_parent("llama")
    kept = tmp_path / "kept"
    undisturbed = run_ranks(2, factored, engine, folder, method, None)
    assert counted(undisturbed) == 2 * BLOCK
    with pytest.raises((RuntimeError, EOFError)):
        run_ranks(2, factored, engine, folder, method, kept, partial(Dying, BLOCK + 2))
    assert BLOCK < len(list(kept.glob("*.safetensors"))) < 2 * BLOCK
    resumed = run_ranks(2, factored, engine, folder, method, kept)
    assert counted(resumed) == BLOCK and same(resumed, undisturbed)
    again = run_ranks(2, factored, engine, folder, method, kept)
    assert counted(again) == 0 and same(again, undisturbed)


def test_what_is_kept_serves_any_number_of_ranks_and_nothing_else(save_parent, tmp_path):
    folder, _ = save_parent("llama")
    kept = tmp_path / "kept"

    def made(size: int = 1, **otherwise) -> int:
        settings = {"store": FactorCache, "rank": 10, "text": TEXT, "changed": None} | otherwise
        return counted(run_ranks(size, factored, "fsdp", folder, "rom", kept, *settings.values()))

    assert made(2) == 2 * BLOCK
    assert (made(3), made(1), made(1, text=TEXT.flip(0))) == (0, 0, 0)  # the same sequences
    next(kept.glob("*layers.0.mlp.up_proj.*")).write_bytes(b"no safetensors")
    assert made() == BLOCK  # its own; what stands behind it is what it was
    assert made(rank=9) == 2 * BLOCK
    assert made() == 0  # in files of their own
    # Each of these takes the place of what was there.
    assert made(changed="layers.1.mlp") == BLOCK
    assert made(changed="layers.0.mlp") == 2 * BLOCK
    assert made() == 2 * BLOCK
    assert made(changed="embed_tokens") == 2 * BLOCK
    assert made(text=TEXT.flip(1)) == 2 * BLOCK
    assert made(text=TEXT.flip(1)) == 0


def unwritable(world, folder, kept_folder):
    with pytest.raises(DecompositionError, match=f"^{kept_folder}/model.layers.0.* cannot be written") as refused:
        factored(world, "fsdp", folder, "rom", kept_folder)
    assert "\n" not in str(refused.value)


def test_blocks_that_cannot_be_kept_are_a_mistake_of_one_line_on_every_rank(save_parent, tmp_path):
    folder, _ = save_parent("llama")
    (tmp_path / "kept").write_text("a file in the way")
    run_ranks(2, unwritable, folder, tmp_path / "kept")
