"""The loop of a stage on real ranks, against plain PyTorch on the same sequences."""

from pathlib import Path

import pytest
import torch
from processes import run_ranks
from tiny_family import write_corpus
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from plrd_train.data.corpus import resolve_corpus
from plrd_train.data.loader import Loader
from plrd_train.engine.fsdp import Options, open_engine
from plrd_train.parents.models import HubArchitecture
from plrd_train.parents.parent import load_config, open_parent
from plrd_train.parents.weights import WeightReader
from plrd_train.recover.guard import Guard, Judged
from plrd_train.recover.loop import Recipe, Trainer
from plrd_train.recover.objectives.ce import Objective
from plrd_train.recover.optimizers.adamw import Optimizer
from plrd_train.recover.pauses import Pauses
from plrd_train.recover.progress import Counters
from plrd_train.recover.schedules.constant import Schedule
from plrd_train.recover.settings import Checkpoint, Recover
from plrd_train.runtime.exchange import Exchange
from plrd_train.runtime.stop import StopRequest

SEQ_LEN, STEPS = 16, 4
OPTIMIZER = Optimizer(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def settings(sequences: int, **changed) -> Recover:
    values = {
        "lr": 4e-3,
        "clip": 0.5,
        "spike": None,
        "patience": 3,
        "global_batch_tokens": sequences * SEQ_LEN,
        "micro_batch": 1,
    }
    return Recover(**(values | changed))


def loader(folder: Path, text: Path, streams: int, rank: int, size: int) -> Loader:
    corpus, tokenizer = resolve_corpus(str(text), "train"), AutoTokenizer.from_pretrained(folder)
    return Loader(
        corpus, tokenizer, seq_len=SEQ_LEN, streams=streams, seed=0, append_eos=False, rank=rank, world_size=size
    )


def trained(world, folder: Path, text: Path, streams: int, recover: Recover, budget: int, branch: float = 0.0):
    parent = open_parent(str(folder))
    engine = open_engine(Options(dtype="fp32", replicas=1, activation_checkpointing=False, compile=False), world)
    engine.load(HubArchitecture(load_config(parent)), WeightReader(parent))
    rows: list[dict] = []
    reader = loader(folder, text, streams, world.rank, world.size)
    exchange, guard = Exchange(world), Guard(recover, print, Judged())
    recipe = Recipe(Objective().open(None), Schedule(warmup=0.0, branch=branch), OPTIMIZER, recover, SEQ_LEN, seed=0)
    trainer = Trainer(engine, reader, recipe, Counters(), guard, exchange, lambda row, seconds: rows.append(row))
    never = Pauses(Checkpoint(tokens=None, minutes=None, keep=1), StopRequest(), None, None)
    recovered = trainer.recover(budget, recover.lr, never)
    exchange.close()
    trunk = {name: whole for name, whole in engine.tensors()}
    if recovered.member is not None:
        engine.restore(recovered.member)
    reader.close()
    return rows, (recovered.trunk_tokens, recovered.branch_tokens), trunk, dict(engine.tensors())


def plain(folder: Path, text: Path, streams: int, recover: Recover, rates: list[float]):
    """(losses, gradient norms, weights) of the same training in plain PyTorch on one process."""
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    vectors, matrices = ([p for p in model.parameters() if (p.ndim > 1) == wanted] for wanted in (False, True))
    groups = [{"params": matrices, "weight_decay": OPTIMIZER.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
    losses, norms = [], []
    reader = loader(folder, text, streams, 0, 1)
    for lr in rates:
        ids = reader.next(recover.global_batch_tokens // SEQ_LEN).input_ids
        loss = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), recover.clip).item())
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    reader.close()
    return losses, norms, dict(model.named_parameters())


@pytest.mark.parametrize(
    ("ranks", "sequences", "streams", "micro_batch"),
    [(1, 4, 3, 1), (3, 4, 3, 1), (3, 4, 8, 1), (3, 2, 3, 1), (2, 5, 2, 2)],
    ids=["one", "2-1-1", "changing-shares", "a-rank-without-work", "uneven-micro-batches"],
)
def test_unequal_shares_train_as_one_process_does(save_parent, tmp_path, ranks, sequences, streams, micro_batch):
    folder, _ = save_parent("llama_tied_scaled_rope")
    write_corpus(tmp_path / "text")
    recover = settings(sequences, micro_batch=micro_batch)
    losses, norms, weights = plain(folder, tmp_path / "text", streams, recover, [recover.lr] * STEPS)
    results = run_ranks(ranks, trained, folder, tmp_path / "text", streams, recover, STEPS * sequences * SEQ_LEN)
    for rows, spent, _, _ in results:
        assert [row["train/loss"] for row in rows] == pytest.approx(losses, abs=2e-5)
        assert [row["train/grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-3)
        assert spent == (STEPS * sequences * SEQ_LEN, 0)
    for name, tensor in results[0][2].items():
        torch.testing.assert_close(tensor, weights[name].detach(), rtol=0, atol=2e-4)


def test_a_branch_begins_where_the_trunk_ends_and_leaves_it_alone(save_parent, tmp_path):
    folder, _ = save_parent("llama")
    write_corpus(tmp_path / "text")
    recover = settings(4)
    budget = (STEPS + 1) * 4 * SEQ_LEN - 1  # all but a step
    rates = [recover.lr] * 2 + [recover.lr * share for share in (2 / 3, 1 / 3)]
    rows, spent, trunk, member = run_ranks(2, trained, folder, tmp_path / "text", 4, recover, budget, 0.5)[0]
    assert spent == (2 * 4 * SEQ_LEN, 2 * 4 * SEQ_LEN) and len(rows) == STEPS
    assert [row["train/lr"] for row in rows] == pytest.approx(rates)
    for found, of in ((trunk, rates[:2]), (member, rates)):
        _, _, weights = plain(folder, tmp_path / "text", 4, recover, of)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, weights[name].detach(), rtol=0, atol=2e-4)
