"""What a model writes after a prompt: transformers' own generate, timed."""

import json
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from plrd_train.data.documents import encode
from plrd_train.errors import UserError
from plrd_train.parents.published import Published


@dataclass(frozen=True)
class Completion:
    """`text` is what follows the prompt, without special tokens; `tokens` counts what was generated, an end-of-text
    token included; `seconds` is the time of generating alone."""

    text: str
    tokens: int
    seconds: float

    def to_dict(self) -> dict:
        return {
            "text": self.text,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_s": self.tokens / self.seconds,
        }


def generate(published: Published, prompt: str, max_tokens: int, temperature: float = 0.0, seed: int = 0) -> Completion:
    """Continue `prompt` by at most `max_tokens` tokens, fewer where the text or the model's context ends.

    Greedy at temperature 0; else sampled from softmax(logits / `temperature`), the same for the same `seed`. Of
    generation_config.json the ids that end a text count, and nothing else. Raises UserError for a prompt without any
    token, for one longer than the model's context, and where those ids cannot be read.
    """
    ids = encode(published.tokenizer, prompt)
    if not ids:
        raise UserError("prompt: no token in it, and this tokenizer puts none before a text; give at least one word")
    if published.context is not None:
        if len(ids) > published.context:
            raise UserError(
                f"prompt: {len(ids)} tokens, but {published.path} reads at most {published.context}; shorten it"
            )
        max_tokens = min(max_tokens, published.context - len(ids) + 1)  # the last token is written, but no more read
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature > 0
        else {"do_sample": False}
    )
    settings = GenerationConfig(max_new_tokens=max_tokens, eos_token_id=_end_of_text(published) or None, **sampling)
    model: Any = published.model
    inputs = torch.tensor([ids], device=published.device)
    with torch.random.fork_rng([published.device] if published.device.type == "cuda" else []):
        torch.manual_seed(seed)
        start = time.perf_counter()
        output = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=settings)
        written = output[0, len(ids) :].tolist()
        seconds = time.perf_counter() - start
    return Completion(str(published.tokenizer.decode(written, skip_special_tokens=True)), len(written), seconds)


def _end_of_text(published: Published) -> list[int]:
    """The ids that end a text: those of generation_config.json, or of config.json where that has no such key. An id
    that is none of the vocabulary, as -1, ends no text and is left out. Raises UserError where generation_config.json
    is no JSON object, or gives something else than ids."""
    config = published.model.config.get_text_config()
    file = published.folder / "generation_config.json"
    mend = "mend it, or remove it, and config.json says which ids end a text"
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: no JSON ({' '.join(str(error).split())}); {mend}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: no JSON object; {mend}")
    ids = found.get("eos_token_id", getattr(config, "eos_token_id", None))
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(token) is int for token in ids):
        raise UserError(f"{file}: eos_token_id, {json.dumps(ids)[:100]}, is neither an id nor a list of ids; {mend}")
    return [token for token in ids if 0 <= token < config.vocab_size]
