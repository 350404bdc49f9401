"""A step that is refused, or whose gradient is not finite, leaves parameters and optimizer as they were, to the bit."""

import math

import pytest
import torch
from processes import run_ranks
from sharded import OPTIMIZER, batches, go_on, opened
from torch import Tensor
from torch.nn import functional as F


def with_bad_steps(world, engine_name, folder, bad):
    """Two good steps, a bad one before each; the norms, then the weights and state."""
    engine = opened(world, engine_name, folder)
    engine.start(OPTIMIZER)
    norms, spoiled = [], []
    for batch in batches(2, 4):
        if bad:
            own = batch[world.rank :: world.size]
            loss = F.cross_entropy(engine.model(input_ids=own).logits[:, :-1].flatten(0, 1), own[:, 1:].flatten())
            engine.backward(loss * (math.nan if bad == "nan" else 1e3))
            spoiled.append(engine.step(1e-2, 0.5, torch.tensor(bad == "refused")).item())
        norms += go_on(engine, [batch])
    return norms, spoiled, engine.snapshot(), engine.state()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_a_bad_step_leaves_no_trace(save_parent, engine, ranks):
    folder, _ = save_parent("llama_tied_scaled_rope")
    good = run_ranks(ranks, with_bad_steps, engine, folder, "")
    for bad in ("refused", "nan"):
        for (norms, spoiled, weights, state), (expected, _, sound, made) in zip(
            run_ranks(ranks, with_bad_steps, engine, folder, bad), good, strict=True
        ):
            assert (
                norms == expected
                and all(math.isfinite(norm) == (bad == "refused") for norm in spoiled)
                and len(spoiled) == 2
            )
            _same(weights, sound)
            for part, shards in state.items():
                _same(shards, made[part])


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
