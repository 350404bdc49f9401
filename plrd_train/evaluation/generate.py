"""What a model writes after a prompt: transformers' own generate, timed."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from plrd_train.data.documents import encode
from plrd_train.errors import UserError
from plrd_train.evaluation.published import Published


@dataclass(frozen=True)
class Completion:
    """`text` is what follows the prompt, without special tokens; `tokens` counts what was generated, an end-of-text token included; `seconds` is the
    time of generating alone."""

    text: str
    tokens: int
    seconds: float

    def to_dict(self) -> dict:
        return {"text": self.text, "tokens": self.tokens, "seconds": self.seconds, "tokens_per_s": self.tokens / self.seconds}


def generate(published: Published, prompt: str, max_tokens: int, temperature: float = 0.0, seed: int = 0) -> Completion:
    """Continue `prompt` by at most `max_tokens` tokens, fewer where the text or the model's context ends.

    Greedy at temperature 0; else sampled from softmax(logits / `temperature`), the same for the same `seed`. Raises UserError for a prompt without
    any token, and for one longer than the model's context.
    """
    ids = encode(published.tokenizer, prompt)
    if not ids:
        raise UserError("prompt: no token in it, and this tokenizer puts none before a text; give at least one word")
    if published.context is not None:
        if len(ids) > published.context:
            raise UserError(f"prompt: {len(ids)} tokens, but {published.path} reads at most {published.context}; shorten it")
        max_tokens = min(max_tokens, published.context - len(ids) + 1)  # the last token is written, but no more read
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {"do_sample": False}
    pad = published.tokenizer.pad_token_id  # nothing is padded; transformers only wants to know
    model: Any = published.model
    inputs = torch.tensor([ids], device=published.device)
    with torch.random.fork_rng([published.device] if published.device.type == "cuda" else []):
        torch.manual_seed(seed)
        start = time.perf_counter()
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_tokens,
            num_beams=1,
            pad_token_id=0 if pad is None else pad,
            **sampling,
        )
        written = output[0, len(ids) :].tolist()
        seconds = time.perf_counter() - start
    return Completion(str(published.tokenizer.decode(written, skip_special_tokens=True)), len(written), seconds)
