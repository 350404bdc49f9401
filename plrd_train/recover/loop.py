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
from plrd_train.recover.progress import Counters
from plrd_train.recover.schedules import Schedule
from plrd_train.recover.settings import Recover
from plrd_train.runtime.exchange import Exchange


@dataclass(frozen=True)
class Recovered:
    """The result of a stage: the trunk is in the engine, and `member` holds the shards of the annealed branch, or is
    None if there is no branch. `trunk_tokens` and `branch_tokens` were spent on each."""

    member: Snapshot | None
    trunk_tokens: int
    branch_tokens: int


@dataclass(frozen=True)
class Recipe:
    """What a step computes: the terms of its loss, its optimizer and learning rate, and the size of its batch."""

    objective: Terms
    schedule: Schedule
    optimizer: Optimizer
    settings: Recover
    seq_len: int
    seed: int

    @property
    def sequences(self) -> int:
        """Packed sequences of one optimizer step, over all ranks."""
        return self.settings.global_batch_tokens // self.seq_len

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step, over all ranks."""
        return self.sequences * self.seq_len

    @property
    def predicted_tokens(self) -> int:
        """Predicted tokens of one optimizer step, over all ranks."""
        return self.sequences * (self.seq_len - 1)


@dataclass(frozen=True)
class Trainer:
    """The training loop. `on_step(metrics, seconds)` receives the record of each step, and how long it took."""

    engine: Engine
    loader: Loader
    recipe: Recipe
    counters: Counters
    guard: Guard
    exchange: Exchange
    on_step: Callable[[dict[str, float], float], None]

    def recover(
        self, budget: int, peak: float, pauses: Pauses, done: int = 0, trunk: Snapshot | None = None
    ) -> Recovered:
        """Train the engine's model in as many whole steps as `budget` tokens allow, at the peak learning rate `peak`.

        A stage that is resumed after `done` steps has its optimizer in the engine. `trunk` is given if these steps have
        reached its branch. `pauses` run between steps; an exception of theirs ends the stage.
        """
        step_tokens = self.recipe.step_tokens
        self.counters.tokens_stage = done * step_tokens
        if not done:
            self.engine.start(self.recipe.optimizer)
        rates = self.recipe.schedule.rates(budget // step_tokens, peak)
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
            return Recovered(None, trunk_steps * step_tokens, 0)
        assert trunk is not None
        member = self.engine.snapshot()
        self.engine.restore(trunk)
        return Recovered(member, trunk_steps * step_tokens, len(rates.branch) * step_tokens)

    def _step(self, step: int, lr: float, reports: "Reports") -> Wish:
        """Run step `step` of the stage. Returns the wish that the ranks agreed on after the step before."""
        engine, recipe, settings = self.engine, self.recipe, self.recipe.settings
        # The seed depends on the step, so that dropout is the same after a restart.
        torch.manual_seed(hash((recipe.seed, self.counters.steps, engine.rank)))
        batch = self.loader.next(recipe.sequences)
        engine.model.train()
        # Ranks may hold unequal shares. All of them run as many micro-batches as the largest share needs.
        largest = max(self.loader.share(batch.first, recipe.sequences, rank) for rank in range(engine.world_size))
        losses: dict[str, Tensor] = {}
        for micro in range(0, largest, settings.micro_batch):
            terms = self._micro_batch(batch.input_ids[micro : micro + settings.micro_batch])
            losses = {name: losses.get(name, 0.0) + term for name, term in terms.items()}
        # The verdict stays on the device. The host reads loss and verdict while the next step runs.
        loss = engine.world.total(_sum(losses)) / recipe.predicted_tokens
        refuse = ~(loss <= self.guard.bound(step))  # true for NaN
        norm = engine.step(lr, settings.clip, refuse)
        self.counters.steps += 1
        return reports.add(step, lr, losses, norm, refuse | ~norm.isfinite(), batch)

    def _micro_batch(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Forward and backward of this rank's `input_ids` (n, seq_len); n may be 0. Returns the terms of the loss, each
        summed over the predicted tokens."""
        engine, recipe, weight = self.engine, self.recipe, 1.0
        if not len(input_ids):
            # All ranks must gather the sharded layers together: a rank without text runs one sequence of weight 0.
            input_ids, weight = torch.zeros(1, recipe.seq_len, dtype=torch.long), 0.0
        found = recipe.objective(engine.model, input_ids.to(engine.device))
        terms = {name: term * weight for name, term in found.items()}
        # An engine averages over its ranks, and the loss is a sum over tokens divided by their global number.
        engine.backward(_sum(terms) * (engine.world_size / recipe.predicted_tokens))
        return {name: term.detach() for name, term in terms.items()}


def _sum(terms: Mapping[str, Tensor]) -> Tensor:
    first, *others = terms.values()
    return sum(others, start=first)


class Reports:
    """The records of the steps. The ranks exchange the figures of a step while the next one runs."""

    def __init__(self, trainer: Trainer, pauses: Pauses):
        self._trainer, self._pauses = trainer, pauses
        self._pending: tuple[int, float, Tensor, Tensor, Future] | None = None
        self._since = time.perf_counter()

    def add(
        self, step: int, lr: float, losses: Mapping[str, Tensor], norm: Tensor, skipped: Tensor, batch: Batch
    ) -> Wish:
        """Send this rank's figures of the step that has just run. Record the step before it, and return the wish that
        the ranks agreed on after that."""
        wish, epoch = self._pauses.wish(self._trainer.recipe.step_tokens), self._trainer.loader.epoch
        tokens = batch.domain_tokens
        # The thread of the exchange copies the losses from the device and sends them: the step loop waits for neither.
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
        trainer, recipe, counters = self._trainer, self._trainer.recipe, self._trainer.counters
        parts = shared.result()
        terms = {name: sum(losses[name] / recipe.predicted_tokens for losses, *_ in parts) for name in parts[0][0]}
        loss = sum(terms.values())
        counters.skipped += bool(skipped)
        counters.tokens_stage += recipe.step_tokens
        counters.tokens_total += recipe.step_tokens
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
                **{f"data/{domain}_tokens": tokens for domain, tokens in sorted(counters.domain_tokens.items())},
            },
            seconds,
        )
        trainer.guard.add(step, loss, norm.item(), bool(skipped))
        return max(wish for _, _, _, wish in parts)
