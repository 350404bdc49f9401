"""The distributed decomposition over live sharded models, on real gloo processes."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from processes import run_ranks
from sharded import Dying, opened, shapes_of
from torch import Tensor

from plrd_train.compress.contracts import Decomposed, DecompositionError
from plrd_train.compress.factor_cache import FactorCache
from plrd_train.compress.methods.svd import Method
from plrd_train.compress.rounds import Spectra, decompose, rounds

both = pytest.mark.parametrize("engine", ["fsdp", "zero3"])


def ranks_of(shapes: dict, ratio: int) -> dict[str, int]:
    return {name: min(shape.out_features, shape.in_features) // ratio for name, shape in shapes.items()}


def shards(made: Iterable[Decomposed]) -> dict[str, tuple]:
    return {one.name: (one.rank, one.up, one.down, one.rel_error) for one in made}


def same(one: dict[str, tuple], other: dict[str, tuple]) -> bool:
    return one.keys() == other.keys() and all(
        (a[0], a[3]) == (b[0], b[3]) and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])
        for a, b in ((one[name], other[name]) for name in one)
    )


def in_two_phases(world, name, folder):
    engine = opened(world, name, folder)
    shapes = shapes_of(engine)
    spectra, said = Spectra(engine, shapes, Method()), []
    half = list(shapes)[: len(shapes) // 2]
    spectra.add(half, on_done=said.append)
    spectra.add([name for name in shapes if name not in half], on_done=said.append)
    assert sorted(said) == sorted(shapes)
    for ratio in (2, 5):
        # Which stays dense.
        ranks = {name: rank for name, rank in ranks_of(shapes, ratio).items() if "k_proj" not in name}
        assert same(shards(spectra.cut(ranks)), shards(decompose(engine, shapes, ranks, Method())))
    return spectra.values


@both
@pytest.mark.parametrize("size", [1, 3])
def test_spectra_are_known_to_all_and_serve_every_ratio(save_parent, engine, size):
    folder, model = save_parent("mistral")
    for values in run_ranks(size, in_two_phases, engine, folder):
        for name, found in values.items():
            expected = torch.linalg.svdvals(model.get_submodule(name).weight.detach().double())
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected[0].item())


class Recorder:
    """An engine that notes when gathers begin and end."""

    def __init__(self, engine: Any, events: list[str]):
        self._engine, self._events = engine, events

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def gather(self, name: str, owner: int) -> Callable[[], Tensor | None]:
        self._events.append(f"begin {name}")
        end = self._engine.gather(name, owner)

        def ended() -> Tensor | None:
            whole = end()
            self._events.append(f"end {name}")
            return whole

        return ended


@dataclasses.dataclass(frozen=True)
class Noting(Method):
    """svd that notes when it works."""

    events: ClassVar[list[str]] = []

    def dense(self, weight, statistic=None):
        self.events.append("work")
        return super().dense(weight)


def overlapping(world, name, folder):
    engine = opened(world, name, folder)
    shapes = shapes_of(engine)
    Noting.events.clear()
    list(decompose(Recorder(engine, Noting.events), shapes, ranks_of(shapes, 2), Noting()))
    return list(rounds(shapes, shapes, world.size)), Noting.events


@both
def test_the_next_round_is_gathered_while_this_one_is_factored(save_parent, engine):
    folder, _ = save_parent("llama")
    for dealt, events in run_ranks(2, overlapping, engine, folder):
        works = [i for i, event in enumerate(events) if event == "work"]
        assert len(works) == len(dealt) > 2
        for now, (names, following) in zip(works, itertools.pairwise(dealt), strict=False):
            assert all(f"end {name}.weight" in events[:now] for name in names)
            assert all(
                f"begin {name}.weight" in events[:now] and f"end {name}.weight" not in events[:now]
                for name in following
            )


def factored(world, folder, kept_folder, store=FactorCache, ratios=(2,), change=False):
    """For each of `ratios`: this rank's shards, and how many weights it has factored."""
    engine = opened(world, "fsdp", folder)
    if change:
        weights = engine.snapshot()
        for tensor in weights.values():
            tensor.view(-1)[:1] += 1e-3
        engine.restore(weights)
    shapes, kept = shapes_of(engine), store(kept_folder, world.device) if kept_folder else None
    made = []
    for ratio in ratios:
        Noting.events.clear()
        made.append(
            (shards(decompose(engine, shapes, ranks_of(shapes, ratio), Noting(), cache=kept)), len(Noting.events))
        )
    return made


def counted(results: list) -> list[int]:
    """Weights factored on all ranks, for each of the ratios."""
    return [sum(count for _, count in ratio) for ratio in zip(*results, strict=True)]


def test_what_a_crashed_decomposition_had_finished_is_not_done_again(save_parent, tmp_path):
    folder, _ = save_parent("llama")
    kept = tmp_path / "kept"
    undisturbed = run_ranks(2, factored, folder, None)
    (everything,) = counted(undisturbed)
    with pytest.raises((RuntimeError, EOFError)):
        run_ranks(2, factored, folder, kept, partial(Dying, 3))
    finished = len(list(kept.glob("*.safetensors")))
    assert 3 <= finished < everything
    (kept / "model.layers.0.mlp.up_proj.rank-16.part").write_bytes(b"cut short")
    resumed = run_ranks(2, factored, folder, kept)
    assert counted(resumed) == [everything - finished]
    assert all(same(one, other) for ((one, _),), ((other, _),) in zip(resumed, undisturbed, strict=True))

    # All is there now, for any number of ranks; but it is not what is asked for at other ranks, where a file is
    # damaged, or of other weights.
    next(kept.glob("model.layers.1.mlp.up_proj.rank-*")).write_bytes(b"no safetensors")
    assert counted(run_ranks(3, factored, folder, kept, FactorCache, (2, 2, 3))) == [1, 0, everything]
    changed = run_ranks(2, factored, folder, kept, FactorCache, (2,), True)
    assert counted(changed) == [everything]
    assert not any(same(one, other) for ((one, _),), ((other, _),) in zip(changed, undisturbed, strict=True))


def unwritable(world, folder, kept_folder):
    try:
        factored(world, folder, kept_folder)
    except DecompositionError as error:
        return str(error)


def test_factors_that_cannot_be_kept_are_a_mistake_of_one_line_on_every_rank(save_parent, tmp_path):
    folder, _ = save_parent("llama")
    (tmp_path / "kept").write_text("a file in the way")
    for message in run_ranks(2, unwritable, folder, tmp_path / "kept"):
        assert str(tmp_path / "kept") in message and "\n" not in message


def kept_in_two_phases(world, folder, kept_folder: Path):
    engine = opened(world, "fsdp", folder)
    shapes = shapes_of(engine)
    Noting.events.clear()
    spectra = Spectra(engine, shapes, Noting(), FactorCache(kept_folder, world.device))
    spectra.add(list(shapes))
    return shards(spectra.cut(ranks_of(shapes, 2))), spectra.values, len(Noting.events)


def test_both_phases_go_on_from_what_was_kept(save_parent, tmp_path):
    folder, _ = save_parent("llama")
    first = run_ranks(2, kept_in_two_phases, folder, tmp_path / "kept")
    lost = sorted((tmp_path / "kept").glob("*.rank-*"))[:2]
    for path in lost:
        path.unlink()
    again = run_ranks(2, kept_in_two_phases, folder, tmp_path / "kept")
    assert sum(count for *_, count in first) > 2 and sum(count for *_, count in again) == 2
    for (one, values, _), (other, values_again, _) in zip(first, again, strict=True):
        assert same(one, other) and all(torch.equal(values[name], values_again[name]) for name in values)
