"""One stage of fine-tuning on a token budget. A parent trained from scratch goes through the same loop."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from plrd_train.config import Recover
from plrd_train.data.loader import Loader
from plrd_train.engine import AdamW, Engine
from plrd_train.recover.objectives import Objective
from plrd_train.recover.perf import Perf
from plrd_train.recover.schedule import anneal, rate


@dataclass
class Counters:
    """Counted over the whole run: optimizer steps, tokens trained on, and these by domain."""

    steps: int = 0
    tokens_total: int = 0
    tokens_stage: int = 0
    domain_tokens: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Recovered:
    """What a stage leaves behind: the trunk is in the engine, and `member` holds the annealed branch's shards, or None where the two are one.
    `trunk_tokens` and `branch_tokens` were spent on each."""

    member: dict[str, Tensor] | None
    trunk_tokens: int
    branch_tokens: int


@dataclass(frozen=True)
class Trainer:
    """What stays the same over the steps of a run."""

    engine: Engine
    loader: Loader
    objective: Objective
    settings: Recover
    seq_len: int
    perf: Perf
    counters: Counters
    on_step: Callable[[dict[str, float]], None]

    @property
    def sequences(self) -> int:
        """Packed sequences of one optimizer step, over all ranks."""
        return self.settings.global_batch_tokens // self.seq_len

    @property
    def step_tokens(self) -> int:
        return self.sequences * self.seq_len

    def recover(self, budget: int, peak: float) -> Recovered:
        """Train the engine's model on at most `budget` tokens, to less than one step below it, at the peak learning rate `peak`."""
        settings = self.settings
        self.counters.tokens_stage = 0
        self.engine.start(AdamW(settings.betas, settings.eps, settings.weight_decay))
        steps = budget // self.step_tokens
        branch_steps = int(settings.branch * steps)
        trunk_steps = steps - branch_steps
        last = peak
        for step in range(trunk_steps):
            last = rate(step, trunk_steps, peak, settings)
            self._step(last)
        if not branch_steps:
            return Recovered(None, trunk_steps * self.step_tokens, 0)
        trunk = self.engine.snapshot()
        for step in range(branch_steps):
            self._step(anneal(step, branch_steps, last))
        member = self.engine.snapshot()
        self.engine.restore(trunk)
        return Recovered(member, trunk_steps * self.step_tokens, branch_steps * self.step_tokens)

    def _step(self, lr: float) -> None:
        start = time.perf_counter()
        engine, counters = self.engine, self.counters
        batch = self.loader.next(self.sequences)
        engine.model.train()
        # Ranks may hold unequal shares; all of them take part in as many micro-batches as the largest share needs.
        largest = max(self.loader.share(batch.first, self.sequences, rank) for rank in range(engine.world_size))
        nll = torch.zeros((), device=engine.device)
        for micro in range(0, largest, self.settings.micro_batch):
            nll += self._micro_batch(batch.input_ids[micro : micro + self.settings.micro_batch])
        norm = engine.step(lr, self.settings.clip)
        counters.steps += 1
        counters.tokens_stage += self.step_tokens
        counters.tokens_total += self.step_tokens
        loss = 0.0
        epoch = 0
        for share, domains, begun in engine.share((nll.item(), batch.domain_tokens, self.loader.epoch)):
            loss += share / (self.sequences * (self.seq_len - 1))
            epoch = max(epoch, begun)
            for domain, tokens in domains.items():
                counters.domain_tokens[domain] = counters.domain_tokens.get(domain, 0) + tokens
        self.on_step(
            {
                "train/loss": loss,
                "train/lr": lr,
                "train/grad_norm": norm.item(),
                "tokens/stage": counters.tokens_stage,
                "tokens/total": counters.tokens_total,
                "data/epoch": epoch,
                **self.perf.of(self.step_tokens, time.perf_counter() - start),
                **{f"data/{domain}_tokens": tokens for domain, tokens in sorted(counters.domain_tokens.items())},
            }
        )

    def _micro_batch(self, input_ids: Tensor) -> Tensor:
        """Forward and backward of this rank's `input_ids` (n, seq_len), n maybe 0; returns the summed loss."""
        engine = self.engine
        weight = 1.0
        if not len(input_ids):
            # Nothing left for this rank, but sharded layers are gathered together: it runs one sequence without weight.
            input_ids, weight = torch.zeros(1, self.seq_len, dtype=torch.long), 0.0
        nll = self.objective(engine.model, input_ids.to(engine.device)) * weight
        # An engine averages over its ranks; the loss is a token sum over the global token count.
        engine.backward(nll * (engine.world_size / (self.sequences * (self.seq_len - 1))))
        return nll.detach()
