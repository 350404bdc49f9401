"""How fast a published model reads a prompt and writes after it, beside its parent in the same process."""

import inspect
import time
from dataclasses import dataclass
from itertools import chain, cycle, islice
from statistics import median
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from plrd_train.errors import UserError
from plrd_train.evaluate import Subject
from plrd_train.parents.published import Published

Positive = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Evaluator:
    """Prefill of `batch` prompts of `prompt` tokens each, and `tokens` steps of greedy decoding after it with the
    cache of keys and values. Of `repeats` the median counts. Model and parent take turns, so that what slows the
    machine down for a while slows both."""

    published: ClassVar[bool] = True

    prompt: Positive
    tokens: Positive
    batch: Positive
    repeats: Positive

    def __call__(self, subject: Subject) -> dict[str, Any]:
        """Seconds and tokens per second of both parts; `against_parent` says how many times as fast as the parent each
        is, None where there is no parent. Raises UserError where the model reads fewer tokens than are asked for."""
        model = subject.on
        assert isinstance(model, Published)
        ids = self._prompts(subject).to(model.device)
        models = [model] if subject.parent is None else [model, subject.parent()]
        for one in models:
            self._fits(one)
            self._timed(one, ids)  # the first time compiles kernels and fills caches
        runs = [[self._timed(one, ids) for one in models] for _ in range(self.repeats)]
        (prefill, decode), *parent = [
            [median(run[i][part] for run in runs) for part in (0, 1)] for i in range(len(models))
        ]
        return {
            "prefill": {"seconds": prefill, "tokens_per_s": ids.numel() / prefill},
            "decode": {"seconds_per_step": decode / self.tokens, "tokens_per_s": self.batch * self.tokens / decode},
            "against_parent": {"prefill": parent[0][0] / prefill, "decode": parent[0][1] / decode} if parent else None,
            "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
            "shape": {
                "batch": self.batch,
                "prompt": self.prompt,
                "tokens": self.tokens,
                "dtype": str(model.model.dtype).removeprefix("torch."),
            },
        }

    def _prompts(self, subject: Subject) -> Tensor:
        """(batch, prompt) ids of the held-out documents, over and over where they are too few."""
        text = cycle(chain.from_iterable(document.ids for document in subject.documents))
        return torch.tensor(list(islice(text, self.batch * self.prompt))).view(self.batch, self.prompt)

    def _fits(self, model: Published) -> None:
        needed, context = self.prompt + self.tokens, model.context
        if context is not None and needed > context:
            raise UserError(
                f"speed: prompt and tokens, {self.prompt} + {self.tokens}, exceed the {context} tokens that "
                f"{model.path} reads; give speed.prompt=… speed.tokens=…"
            )

    @torch.inference_mode()
    def _timed(self, published: Published, ids: Tensor) -> tuple[float, float]:
        """Seconds of prefill, which gives the first token, and of all decoding steps after it."""
        model: Any = published.model
        # As generate does: of the prompt only the last position needs logits.
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        start = _now(published.device)
        output = model(input_ids=ids, use_cache=True, **last)
        token = output.logits[:, -1:].argmax(-1)
        between = _now(published.device)
        for _ in range(self.tokens):
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
        return between - start, _now(published.device) - between


def _now(device: torch.device) -> float:
    """Seconds, once all that was asked of `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
