"""Parents as large as those that this is for, by their configs alone."""

from transformers import LlamaConfig, MistralConfig

MISTRAL_7B = MistralConfig(  # mistralai/Mistral-7B-v0.1
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=32000,
    sliding_window=4096,
    tie_word_embeddings=False,
    dtype="bfloat16",
)
LLAMA2_7B = LlamaConfig(  # meta-llama/Llama-2-7b-hf
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    vocab_size=32000,
    tie_word_embeddings=False,
    dtype="float16",
)
LLAMA2_70B = LlamaConfig(  # meta-llama/Llama-2-70b-hf
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=32000,
    tie_word_embeddings=False,
    dtype="float16",
)
