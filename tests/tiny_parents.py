"""Tiny configs of several architectures, and a tokenizer to go with them."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

VOCABULARY = 64
_SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = _SIZE | {"num_key_value_heads": 2}
_GEMMA = _GQA | {"head_dim": 8}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SIZE, tie_word_embeddings=False),
    "llama_tied_scaled_rope": LlamaConfig(**_GQA, tie_word_embeddings=True, rope_parameters=_LLAMA3_ROPE),
    "mistral": MistralConfig(**_GQA, sliding_window=4),
    "qwen2": Qwen2Config(**_GQA, tie_word_embeddings=False),
    "gemma": GemmaConfig(**_GEMMA),
    "gemma2": Gemma2Config(**_GEMMA, sliding_window=4),
    "gemma3": Gemma3TextConfig(**_GEMMA, sliding_window=4, tie_word_embeddings=False),
    "gpt_neox": GPTNeoXConfig(**_SIZE),
}


def save_tokenizer(folder: Path, size: int = VOCABULARY) -> None:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
