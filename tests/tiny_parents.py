"""Tiny configs of several architectures, and a tokenizer to go with them."""

import copy
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
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


_GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MAMBA = {"state_size": 8, "expand": 2, "conv_kernel": 4, "pad_token_id": 0}
# Those that run otherwise than Llama does: blocks that return tuples, tables of positions, Linears whose weights other
# code reads, experts.
OTHERS: dict[str, PreTrainedConfig] = {
    "gptj": AutoConfig.for_model("gptj", **_GPT, rotary_dim=4),
    "codegen": AutoConfig.for_model("codegen", **_GPT, rotary_dim=4),
    "gpt2": AutoConfig.for_model("gpt2", **_GPT),
    "gpt_neo": AutoConfig.for_model(
        "gpt_neo",
        **{
            key: _SIZE[key]
            for key in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "max_position_embeddings",
                "bos_token_id",
                "eos_token_id",
            )
        },
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
    ),
    "opt": AutoConfig.for_model(
        "opt", **{key: size for key, size in _SIZE.items() if key != "intermediate_size"}, ffn_dim=48, pad_token_id=0
    ),
    "falcon": AutoConfig.for_model("falcon", **_SIZE),
    "bloom": AutoConfig.for_model(
        "bloom", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    ),
    "mamba": AutoConfig.for_model(
        "mamba", **_MAMBA, vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, bos_token_id=1, eos_token_id=2
    ),
    "bamba": AutoConfig.for_model(
        "bamba",
        **_GQA,
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_d_state=16,
        mamba_chunk_size=16,
    ),
    "rwkv": AutoConfig.for_model(
        "rwkv",
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=7,  # the sixth is followed by a division of the hidden states
        attention_hidden_size=32,
        intermediate_size=64,
        context_length=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "llama4": AutoConfig.for_model(
        "llama4_text",
        **_GQA,
        head_dim=8,
        num_local_experts=2,
        interleave_moe_layer_step=2,
        intermediate_size_mlp=48,
        attention_chunk_size=16,
        pad_token_id=0,
    ),
    "mixtral": AutoConfig.for_model("mixtral", **_GQA, num_local_experts=4, num_experts_per_tok=2),
}


def config_of(architecture: str) -> PreTrainedConfig:
    """A copy of its own: saving a model writes the dtype into its config."""
    return copy.deepcopy((CONFIGS | OTHERS)[architecture])


def save_tokenizer(folder: Path, size: int = VOCABULARY) -> None:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
