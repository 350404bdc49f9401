"""Muon by owner-computes on sharded matrices, against plain PyTorch on one process."""

import math

import pytest
import torch
from processes import run_ranks
from sharded import architecture, batches, go_on, load_saved, opened, save
from torch.nn import functional as F

from plrd_train.recover import saved
from plrd_train.recover.optimizers.muon import Optimizer, orthogonalized

MUON = Optimizer(momentum=0.9, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
ARCHITECTURE = "llama_tied_scaled_rope"
LR, CLIP = 1e-2, 0.5


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_the_direction_keeps_singular_vectors_and_makes_singular_values_alike(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ orthogonalized(matrix) @ v.T
    assert inside.diagonal().min() > 0.3 and inside.diagonal().max() < 1.3
    torch.testing.assert_close(inside - inside.diagonal().diag(), torch.zeros_like(inside), rtol=0, atol=1e-3)
    assert torch.equal(orthogonalized(torch.zeros(shape)), torch.zeros(shape))


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """In float64, by its singular values: each goes through the polynomial five times."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


def plain(model, data):
    """The gradients' norms of the same training in plain PyTorch; changes `model`."""
    hidden = {n: p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2}
    rest = {n: p for n, p in model.named_parameters() if n not in hidden}
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest.values() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in rest.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=LR,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    kept = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in hidden.items()}
    norms = []
    for batch in data:
        F.cross_entropy(model(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        adamw.step()
        for name, parameter in hidden.items():
            gradient = parameter.grad.double()
            kept[name] = 0.9 * kept[name] + 0.1 * gradient
            update = newton_schulz(0.1 * gradient + 0.9 * kept[name])
            scaled = 0.2 * math.sqrt(max(parameter.shape)) * update
            with torch.no_grad():
                parameter.copy_(parameter.double() * (1 - LR * 0.1) - LR * scaled)
        model.zero_grad()
    return norms


def trained(world, folder, data, bad=False, target=None):
    """The norms of six steps, refusing another one before each if `bad`; a checkpoint in the middle in `target`."""
    engine = opened(world, "fsdp", folder)
    engine.start(MUON)
    norms = []
    for i, batch in enumerate(data):
        if i == 3 and target is not None:
            save(engine, target / "model")
            for part, shards in engine.state().items():
                saved.write(engine.sharded(shards), target / part, world)
        if bad:
            own = data[-1][world.rank :: world.size]
            loss = F.cross_entropy(engine.model(input_ids=own).logits[:, :-1].flatten(0, 1), own[:, 1:].flatten())
            engine.backward(loss * (math.nan if i % 2 else 1e3))
            engine.step(LR, CLIP, torch.tensor(i % 2 == 0))
        norms += go_on(engine, [batch])
    return norms, dict(engine.tensors()), engine.state()


def gone_on(world, folder, data, target):
    engine = opened(world, "fsdp", folder)
    load_saved(engine, architecture(folder, {}), target / "model")
    engine.start(MUON)
    state = engine.state()
    for part, shards in state.items():
        saved.read(engine.sharded(shards), target / part)
    engine.start(MUON, 3, state)
    return go_on(engine, data[3:]), dict(engine.tensors()), engine.state()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_train_as_plain_pytorch_does(save_parent, ranks):
    folder, model = save_parent(ARCHITECTURE)
    data = batches(6, 6)
    found, tensors, state = run_ranks(ranks, trained, folder, data)[0]
    assert found == pytest.approx(plain(model.train(), data), rel=1e-3)
    weights = dict(model.named_parameters())
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, weights[name].detach(), rtol=0, atol=3e-4)
    # Nothing is kept twice: a parameter has the state of one of the two.
    assert not state["momentum_buffer"].keys() & state["exp_avg"].keys()
    assert state["momentum_buffer"].keys() | state["exp_avg"].keys() == tensors.keys()
    assert state["exp_avg"].keys() == state["exp_avg_sq"].keys()


def test_refused_steps_leave_no_trace(save_parent):
    folder, _ = save_parent(ARCHITECTURE)
    data = batches(4, 4)
    for good, bad in zip(run_ranks(2, trained, folder, data), run_ranks(2, trained, folder, data, True), strict=True):
        assert good[0] == bad[0]
        _same(good[2], bad[2])
        _same({"weights": good[1]}, {"weights": bad[1]})


@pytest.mark.parametrize("after", [2, 3])
def test_a_checkpoint_goes_on_to_the_bit_and_on_any_number_of_ranks(save_parent, tmp_path, after):
    folder, _ = save_parent(ARCHITECTURE)
    data = batches(6, 6)
    norms, expected, state = run_ranks(2, trained, folder, data, False, tmp_path)[0]
    found, tensors, again = run_ranks(after, gone_on, folder, data, tmp_path)[0]
    if after == 2:
        assert found == norms[3:]
        _same({"weights": expected}, {"weights": tensors})
        _same(state, again)
    assert found == pytest.approx(norms[3:], rel=1e-3)
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=3e-4)


def _same(one, other):
    assert one.keys() == other.keys()
    for part, tensors in one.items():
        assert tensors.keys() == other[part].keys()
        assert all(tensor is None or torch.equal(tensor, other[part][name]) for name, tensor in tensors.items())
