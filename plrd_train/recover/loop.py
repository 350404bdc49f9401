"""One stage of fine-tuning on a token budget. A parent trained from scratch goes through the same loop."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from plrd_train.data.loader import Batch, Loader
from plrd_train.engine import Engine, Optimizer
from plrd_train.recover.checkpoint import Snapshot
from plrd_train.recover.deadline import Deadline
from plrd_train.recover.guard import Guard
from plrd_train.recover.objectives import Terms
from plrd_train.recover.pauses import Pauses, Wish
from plrd_train.recover.perf import Perf
from plrd_train.recover.progress import Counters
from plrd_train.recover.schedules import Schedule
from plrd_train.recover.settings import Recover
from plrd_train.runtime.exchange import Exchange


@dataclass(frozen=True)
class Recovered:
    """What a stage leaves behind: the trunk is in the engine, and `member` holds the annealed branch's shards, or None
    where the two are one. `trunk_tokens` and `branch_tokens` were spent on each."""

    member: Snapshot | None
    trunk_tokens: int
    branch_tokens: int


@dataclass(frozen=True)
class Trainer:
    """What stays the same over the steps of a run."""

    engine: Engine
    loader: Loader
    objective: Terms
    schedule: Schedule
    optimizer: Optimizer
    settings: Recover
    seq_len: int
    seed: int
    perf: Perf
    counters: Counters
    guard: Guard
    exchange: Exchange
    on_step: Callable[[dict[str, float]], None]

    @property
    def sequences(self) -> int:
        """Packed sequences of one optimizer step, over all ranks."""
        return self.settings.global_batch_tokens // self.seq_len

    @property
    def step_tokens(self) -> int:
        return self.sequences * self.seq_len

    def recover(
        self, budget: int, peak: float, pauses: Pauses, done: int = 0, trunk: Snapshot | None = None
    ) -> Recovered:
        """Train the engine's model on at most `budget` tokens, to less than one step below it, at the peak learning
        rate `peak`.

        A stage that goes on after `done` steps has its optimizer in the engine, and the `trunk` where these have
        reached its branch. `pauses` are taken between steps; what they raise ends the stage.
        """
        self.counters.tokens_stage = done * self.step_tokens
        if not done:
            self.engine.start(self.optimizer)
        rates = self.schedule.rates(budget // self.step_tokens, peak)
        lrs, trunk_steps = [*rates.trunk, *rates.branch], len(rates.trunk)
        reports, deadline = Reports(self, pauses), Deadline(self.engine.world.heartbeat)
        for step in range(done, len(lrs)):
            deadline.step()
            if step == trunk_steps:
                trunk = self.engine.snapshot()
            wish = self._step(step, lrs[step], reports)
            if wish and step + 1 < len(lrs):
                deadline.rest()
                reports.finish()
                pauses.take(wish, step + 1, trunk)
        deadline.rest()
        reports.finish()
        if not rates.branch:
            return Recovered(None, trunk_steps * self.step_tokens, 0)
        assert trunk is not None
        member = self.engine.snapshot()
        self.engine.restore(trunk)
        return Recovered(member, trunk_steps * self.step_tokens, len(rates.branch) * self.step_tokens)

    def _step(self, step: int, lr: float, reports: "Reports") -> Wish:
        """Step `step` of the stage; returns what the ranks wished after the one before."""
        engine = self.engine
        # Dropout, where a parent has any, is the same after a restart.
        torch.manual_seed(hash((self.seed, self.counters.steps, engine.rank)))
        batch = self.loader.next(self.sequences)
        engine.model.train()
        # Ranks may hold unequal shares; all of them take part in as many micro-batches as the largest share needs.
        largest = max(self.loader.share(batch.first, self.sequences, rank) for rank in range(engine.world_size))
        losses: dict[str, Tensor] = {}
        for micro in range(0, largest, self.settings.micro_batch):
            terms = self._micro_batch(batch.input_ids[micro : micro + self.settings.micro_batch])
            losses = {name: losses.get(name, 0.0) + term for name, term in terms.items()}
        # On the device, as all of the step: it waits for no loss and no verdict, which are read while the next one
        # runs.
        refuse = ~(
            engine.world.total(_sum(losses)) / self.predicted_tokens <= self.guard.bound(step)
        )  # NaN is refused, too
        norm = engine.step(lr, self.settings.clip, refuse)
        self.counters.steps += 1
        return reports.add(step, lr, losses, norm, refuse | ~norm.isfinite(), batch)

    @property
    def predicted_tokens(self) -> int:
        """Predicted tokens of one optimizer step, over all ranks."""
        return self.sequences * (self.seq_len - 1)

    def _micro_batch(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Forward and backward of this rank's `input_ids` (n, seq_len), n maybe 0; returns the terms of the loss, each
        summed over the predicted tokens."""
        engine = self.engine
        weight = 1.0
        if not len(input_ids):
            # Nothing left for this rank, but sharded layers are gathered together: it runs one sequence without weight.
            input_ids, weight = torch.zeros(1, self.seq_len, dtype=torch.long), 0.0
        terms = {
            name: term * weight for name, term in self.objective(engine.model, input_ids.to(engine.device)).items()
        }
        # An engine averages over its ranks; the loss is a token sum over the global token count.
        engine.backward(_sum(terms) * (engine.world_size / self.predicted_tokens))
        return {name: term.detach() for name, term in terms.items()}


def _sum(terms: Mapping[str, Tensor]) -> Tensor:
    first, *others = terms.values()
    return sum(others, start=first)


class Reports:
    """The record of each step, made of what the ranks tell one another about it while the next one is computed."""

    def __init__(self, trainer: Trainer, pauses: Pauses):
        self._trainer, self._pauses = trainer, pauses
        self._pending: tuple[int, float, Tensor, Tensor, Future] | None = None
        self._since = time.perf_counter()

    def add(
        self, step: int, lr: float, losses: Mapping[str, Tensor], norm: Tensor, skipped: Tensor, batch: Batch
    ) -> Wish:
        """Send this rank's part of the step that has just been made. Finishes the step before, and returns what the
        ranks wished after that."""
        wish, epoch, tokens = (
            self._pauses.wish(self._trainer.step_tokens),
            self._trainer.loader.epoch,
            batch.domain_tokens,
        )
        # The losses are fetched from the device by the thread that sends them: the step loop waits for neither.
        shared = self._trainer.exchange.share(
            lambda: ({name: loss.item() for name, loss in losses.items()}, tokens, epoch, wish)
        )
        agreed = self.finish()
        self._pending = step, lr, norm, skipped, shared
        return agreed

    def finish(self) -> Wish:
        """Record the step that is pending, if there is one."""
        if self._pending is None:
            return Wish.NOTHING
        (step, lr, norm, skipped, shared), self._pending = self._pending, None
        trainer, counters = self._trainer, self._trainer.counters
        parts = shared.result()
        terms = {
            name: sum(losses[name] / trainer.predicted_tokens for losses, _, _, _ in parts) for name in parts[0][0]
        }
        loss = sum(terms.values())
        counters.skipped += bool(skipped)
        counters.tokens_stage += trainer.step_tokens
        counters.tokens_total += trainer.step_tokens
        for _, domains, _, _ in parts:
            for domain, tokens in domains.items():
                counters.domain_tokens[domain] = counters.domain_tokens.get(domain, 0) + tokens
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        trainer.on_step(
            {
                "train/loss": loss,
                **({f"train/loss/{name}": term for name, term in terms.items()} if len(terms) > 1 else {}),
                "train/lr": lr,
                "train/grad_norm": norm.item(),
                "train/skipped": counters.skipped,
                "tokens/stage": counters.tokens_stage,
                "tokens/total": counters.tokens_total,
                "data/epoch": max(epoch for _, _, epoch, _ in parts),
                **trainer.perf.of(trainer.step_tokens, seconds),
                **{f"data/{domain}_tokens": tokens for domain, tokens in sorted(counters.domain_tokens.items())},
            }
        )
        trainer.guard.add(step, loss, norm.item(), bool(skipped))
        return max(wish for _, _, _, wish in parts)
