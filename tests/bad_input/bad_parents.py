"""Parents and tokenizers that no family can be made from. The sound one is a Llama in one file, and `sharded` the same
in several with an index."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from malformed import (
    Bad,
    Spoil,
    bad,
    cut,
    edited,
    folder_instead,
    gone,
    holding,
    unreadable_json,
    with_key,
    without_key,
)
from safetensors.torch import load_file, save_file
from tiny_parents import save_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
NORM, EMBEDDINGS = "model.norm.weight", "model.embed_tokens.weight"
UP = "model.layers.1.mlp.up_proj.weight"


class Payload:
    """What a pickle of it does when it is loaded: a file `ran` beside the folder of the test."""

    def __init__(self, folder: Path):
        self._command = f"touch {folder.parent / 'ran'}"

    def __reduce__(self) -> Any:
        return os.system, (self._command,)


def weights(change: Callable[[dict[str, torch.Tensor]], None], metadata: bool = True) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"} if metadata else None)

    return spoil


def entry(value: float, name: str = UP) -> Spoil:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3:4] = value

    return weights(change)


def instead(name: str, tensor: torch.Tensor) -> Spoil:
    return weights(lambda tensors: tensors.update({name: tensor}))


def without(name: str) -> Spoil:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    return weights(change)


def header(change: Callable[[bytes], bytes]) -> Spoil:
    """The JSON header of the safetensors file changed, its length told anew."""

    def spoil(folder: Path) -> None:
        whole = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(whole[:8], "little")
        changed = change(whole[8 : 8 + length])
        (folder / WEIGHTS).write_bytes(len(changed).to_bytes(8, "little") + changed + whole[8 + length :])

    return spoil


def pickled(name: str, protocol: int) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(pickle.dumps(Payload(folder), protocol))

    return spoil


def torch_saved(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        torch.save({"model.norm.weight": Payload(folder)}, folder / name)

    return spoil


def remote_code(file: str, content: str, **changes: Any) -> Spoil:
    """`changes` to the JSON file that names the code, whose running leaves a trace."""

    def spoil(folder: Path) -> None:
        (folder / "theirs.py").write_text(f"import os\nos.system('touch {folder.parent / 'ran'}')\n{content}\n")
        edited(file, lambda settings: {**settings, **changes})(folder)

    return spoil


def linked_outside(folder: Path) -> None:
    """A shard that the index names is a link that leaves the folder."""
    shard = min(folder.glob("model-*.safetensors"))
    shard.rename(folder.parent / "elsewhere.safetensors")
    shard.symlink_to("../elsewhere.safetensors")


def shard_named(name: Callable[[Path], str]) -> Spoil:
    """The index names a file outside, which is there."""

    def spoil(folder: Path) -> None:
        shard = min(folder.glob("model-*.safetensors"))
        (folder.parent / "outside.safetensors").write_bytes(shard.read_bytes())
        with_key(INDEX, "weight_map", "model.embed_tokens.weight", value=name(folder))(folder)

    return spoil


def first_shard(change: Spoil) -> Spoil:
    """`change` applied to the first shard under the name of a single file."""

    def spoil(folder: Path) -> None:
        shard = min(folder.glob("model-*.safetensors"))
        shard.rename(folder / WEIGHTS)
        change(folder)
        (folder / WEIGHTS).rename(shard)

    return spoil


def larger_tokenizer(folder: Path) -> None:
    save_tokenizer(folder, size=80)


CONFIGS: dict[str, Bad] = {
    **unreadable_json("config.json", "config.json"),
    "no config.json": bad(gone("config.json"), "config.json"),
    "no model_type": bad(without_key("config.json", "model_type"), "config.json"),
    "model_type of next year": bad(
        with_key("config.json", "model_type", value="llama9000"), "config.json", "llama9000"
    ),
    "model_type a number": bad(with_key("config.json", "model_type", value=3), "config.json"),
    "model_type a list": bad(with_key("config.json", "model_type", value=["llama"]), "config.json"),
    "an encoder": bad(
        edited("config.json", lambda c: {**c, "model_type": "bert", "architectures": ["BertModel"]}),
        "config.json",
        "causal LM",
    ),
    "an encoder-decoder": bad(
        edited("config.json", lambda c: {**c, "model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}),
        "config.json",
        "causal LM",
    ),
    "said to be an encoder-decoder": bad(
        with_key("config.json", "is_encoder_decoder", value=True), "config.json", "encoder-decoder"
    ),
    "a classifier": bad(
        with_key("config.json", "architectures", value=["LlamaForSequenceClassification"]), "config.json", "causal LM"
    ),
    "architectures a number": bad(with_key("config.json", "architectures", value=[7]), "config.json"),
    "architectures a string": bad(with_key("config.json", "architectures", value="Llama"), "config.json"),
    "quantized by gptq": bad(
        with_key("config.json", "quantization_config", value={"quant_method": "gptq", "bits": 4}),
        "config.json",
        "quantized",
    ),
    "quantized by bitsandbytes": bad(
        with_key("config.json", "quantization_config", value={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "config.json",
        "quantized",
    ),
    "quantized by nobody": bad(with_key("config.json", "quantization_config", value=3), "config.json"),
    "hidden_size a string": bad(with_key("config.json", "hidden_size", value="wide"), "config.json", "hidden_size"),
    "hidden_size null": bad(with_key("config.json", "hidden_size", value=None), "config.json"),
    "hidden_size negative": bad(with_key("config.json", "hidden_size", value=-32), "config.json"),
    "hidden_size zero": bad(with_key("config.json", "hidden_size", value=0), "config.json"),
    "hidden_size of another model": bad(with_key("config.json", "hidden_size", value=64), "config.json"),
    "more layers than weights": bad(with_key("config.json", "num_hidden_layers", value=5), "layers.2"),
    "no layers": bad(with_key("config.json", "num_hidden_layers", value=0), "config.json", "num_hidden_layers"),
    "layers negative": bad(with_key("config.json", "num_hidden_layers", value=-1), "config.json", "num_hidden_layers"),
    "layers a float": bad(with_key("config.json", "num_hidden_layers", value=2.5), "config.json"),
    "heads that do not divide": bad(with_key("config.json", "num_attention_heads", value=5), "config.json"),
    "no heads": bad(with_key("config.json", "num_attention_heads", value=0), "config.json"),
    "more key heads than heads": bad(with_key("config.json", "num_key_value_heads", value=3), "config.json"),
    "an activation that is none": bad(with_key("config.json", "hidden_act", value="gelu9"), "config.json", "gelu9"),
    "rope of no kind": bad(
        with_key("config.json", "rope_parameters", value={"rope_type": "spiral", "rope_theta": 1e4}),
        "config.json",
        "spiral",
    ),
    "rope a string": bad(with_key("config.json", "rope_parameters", value="long"), "config.json"),
    "vocabulary of another model": bad(with_key("config.json", "vocab_size", value=128), "config.json"),
    "vocabulary negative": bad(with_key("config.json", "vocab_size", value=-1), "vocab_size"),
    "vocabulary a string": bad(with_key("config.json", "vocab_size", value="64"), "config.json", "vocab_size"),
    "remote code for the config": bad(
        remote_code("config.json", "class Config: pass", model_type="theirs", auto_map={"AutoConfig": "theirs.Config"}),
        "config.json",
        "custom code",
    ),
    "remote code from elsewhere": bad(
        remote_code("config.json", "", model_type="theirs", auto_map={"AutoConfig": "someone/repo--theirs.Config"}),
        "config.json",
        "custom code",
    ),
    "auto_map a number": bad(remote_code("config.json", "", model_type="theirs", auto_map=3), "config.json"),
}

WEIGHT_FILES: dict[str, Bad] = {
    "no weights": bad(gone(WEIGHTS), "parent", "has no model.safetensors"),
    "weights: a folder": bad(folder_instead(WEIGHTS), "parent", "has no model.safetensors"),
    "weights: empty": bad(holding(WEIGHTS, b""), WEIGHTS),
    "weights: four bytes": bad(cut(WEIGHTS, 4), WEIGHTS),
    "weights: half a header": bad(cut(WEIGHTS, 200), WEIGHTS),
    "weights: cut by a byte": bad(cut(WEIGHTS, -1), WEIGHTS),
    "weights: cut by half": bad(cut(WEIGHTS, 40_000), WEIGHTS),
    "weights: bytes at the end": bad(lambda folder: (folder / WEIGHTS).open("ab").write(b"more"), WEIGHTS),
    "weights: NUL bytes": bad(holding(WEIGHTS, bytes(4096)), WEIGHTS),
    "weights: a header of exabytes": bad(holding(WEIGHTS, b"\xff" * 8 + b"{}"), WEIGHTS),
    "weights: text": bad(
        holding(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"), WEIGHTS
    ),
    "weights: header is a list": bad(header(lambda _: b"[]"), WEIGHTS),
    "weights: header is no JSON": bad(header(lambda whole: whole[:-30]), WEIGHTS),
    "weights: header nested": bad(header(lambda _: b"[" * 50_000), WEIGHTS),
    "weights: offsets beyond the end": bad(header(lambda whole: whole.replace(b"[0,", b"[9999999,")), WEIGHTS),
    "weights: shape of other bytes": bad(header(lambda whole: whole.replace(b"[64,32]", b"[64,33]")), WEIGHTS),
    "weights: type of no name": bad(header(lambda whole: whole.replace(b'"F32"', b'"F99"')), WEIGHTS),
    "weights: no tensors": bad(header(lambda _: b'{"__metadata__":{"format":"pt"}}'), WEIGHTS),
    "weights: an empty file of tensors": bad(weights(lambda tensors: tensors.clear()), "weights"),
    "a pickle under the name of safetensors": bad(pickled(WEIGHTS, 4), WEIGHTS),
    "an old pickle under the name of safetensors": bad(pickled(WEIGHTS, 0), WEIGHTS),
    "torch.save under the name of safetensors": bad(torch_saved(WEIGHTS), WEIGHTS),
    "pytorch_model.bin alone": bad(pickled("pytorch_model.bin", 2), "parent", ".bin"),
    "torch.save as pytorch_model.bin": bad(torch_saved("pytorch_model.bin"), "parent", ".bin"),
    "consolidated.pth alone": bad(torch_saved("consolidated.00.pth"), "parent", "has no model.safetensors"),
    "scales beside a weight": bad(
        instead(f"{UP}_scale_inv", torch.ones(1, 1)), f"{UP}_scale_inv".replace(".1.", ".*."), "unquantized"
    ),
    "packed weights beside a weight": bad(
        instead(UP.replace("weight", "qweight"), torch.ones(4, 4).int()), "up_proj.qweight", "unquantized"
    ),
    "a bias that the config does not know": bad(instead(UP.replace("weight", "bias"), torch.ones(48)), "up_proj.bias"),
    "float8": bad(instead(UP, torch.ones(48, 32).to(torch.float8_e4m3fn)), UP, "float8_e4m3fn"),
    "float8 of the other kind": bad(instead(UP, torch.ones(48, 32).to(torch.float8_e5m2)), UP, "float8_e5m2"),
    "NaN": bad(entry(float("nan")), UP, "NaN"),
    "infinity": bad(entry(float("inf")), UP, "infinity"),
    "negative infinity": bad(entry(float("-inf")), UP),
    "NaN in a norm": bad(entry(float("nan"), NORM), "model.norm.weight"),
    "NaN in the embeddings": bad(entry(float("nan"), EMBEDDINGS), "embed_tokens"),
    "a Linear is missing": bad(without(UP), "parent", UP),
    "the embeddings are missing": bad(without("model.embed_tokens.weight"), "parent", "embed_tokens"),
    "lm_head is missing": bad(without("lm_head.weight"), "parent", "lm_head"),
    "a norm is missing": bad(without("model.norm.weight"), "parent", "model.norm.weight"),
    "a Linear is transposed": bad(instead(UP, torch.zeros(32, 48)), UP),
    "a Linear is flat": bad(instead(UP, torch.zeros(48 * 32)), UP),
    "a Linear is a scalar": bad(instead(UP, torch.tensor(1.0)), UP),
    "a Linear is empty": bad(instead(UP, torch.zeros(0, 32)), UP),
    "a Linear is cut": bad(instead(UP, torch.zeros(47, 32)), UP),
    "a norm is too long": bad(instead("model.norm.weight", torch.ones(33)), "model.norm.weight"),
    "the embeddings are too few": bad(instead("model.embed_tokens.weight", torch.zeros(63, 32)), "embed_tokens"),
    "a Linear of integers": bad(instead(UP, torch.zeros(48, 32, dtype=torch.int8)), UP),
    "a Linear of truth values": bad(instead(UP, torch.zeros(48, 32, dtype=torch.bool)), UP),
    "a Linear of complex numbers": bad(instead(UP, torch.zeros(48, 32, dtype=torch.complex64)), UP),
}

INDICES: dict[str, Bad] = {
    **unreadable_json(INDEX, INDEX),
    "index: no weight_map": bad(without_key(INDEX, "weight_map"), INDEX),
    "index: weight_map a list": bad(with_key(INDEX, "weight_map", value=[]), INDEX),
    "index: weight_map empty": bad(with_key(INDEX, "weight_map", value={}), "sharded", "no weights"),
    "index: a file name is a number": bad(with_key(INDEX, "weight_map", "lm_head.weight", value=3), INDEX),
    "index: a file name is null": bad(with_key(INDEX, "weight_map", "lm_head.weight", value=None), INDEX),
    "index: a file name is empty": bad(with_key(INDEX, "weight_map", "lm_head.weight", value=""), INDEX),
    "index: a file name holds NUL": bad(with_key(INDEX, "weight_map", "lm_head.weight", value="a\0b"), INDEX),
    "index: a file name of 5000 letters": bad(with_key(INDEX, "weight_map", "lm_head.weight", value="a" * 5000), INDEX),
    "index: a file that is missing": bad(
        with_key(INDEX, "weight_map", "lm_head.weight", value="model-9.safetensors"), INDEX, "model-9"
    ),
    "index: a tensor that is not there": bad(
        with_key(INDEX, "weight_map", "model.more", value="model-00001-of-00008.safetensors"), INDEX
    ),
    "index: ../outside": bad(shard_named(lambda folder: "../outside.safetensors"), INDEX, "outside its folder"),
    "index: in/../../outside": bad(
        shard_named(lambda folder: "in/../../outside.safetensors"), INDEX, "outside its folder"
    ),
    "index: an absolute path": bad(
        shard_named(lambda folder: str(folder.parent / "outside.safetensors")), INDEX, "outside its folder"
    ),
    "index: a link that leaves the folder": bad(linked_outside, INDEX, "outside its folder"),
    "index: a shard is a folder": bad(
        lambda folder: folder_instead(min(p.name for p in folder.glob("model-*")))(folder), INDEX
    ),
    "index: a shard is truncated": bad(first_shard(cut(WEIGHTS, -5)), "model-0"),
    "index: a shard is a pickle": bad(first_shard(pickled(WEIGHTS, 4)), "model-0"),
    "index: a shard is empty": bad(first_shard(holding(WEIGHTS, b"")), "model-0"),
}

TOKENIZERS: dict[str, Bad] = {
    **unreadable_json("tokenizer.json", "parent"),
    "no tokenizer": bad(gone("tokenizer.json"), "parent", "no tokenizer"),
    "nor its settings": bad(gone("tokenizer.json", "tokenizer_config.json"), "parent", "no tokenizer"),
    "tokenizer of another model": bad(larger_tokenizer, "parent", "the id 79", "vocab_size of 64"),
    "tokenizer: an id beyond the vocabulary": bad(
        with_key("tokenizer.json", "model", "vocab", "w9", value=900), "parent", "900"
    ),
    "tokenizer: an added token beyond the vocabulary in the prompt": bad(
        edited(
            "tokenizer.json",
            lambda t: t["added_tokens"].append({**t["added_tokens"][0], "id": 5000, "content": "w3 w9"}),
        ),
        "'w3 w9'",
        "64 embeddings",
    ),
    "tokenizer: no model": bad(without_key("tokenizer.json", "model"), "parent"),
    "tokenizer: no vocabulary": bad(without_key("tokenizer.json", "model", "vocab"), "parent"),
    "tokenizer: vocabulary a list": bad(with_key("tokenizer.json", "model", "vocab", value=["w3"]), "parent"),
    "tokenizer: an id is a string": bad(with_key("tokenizer.json", "model", "vocab", "w9", value="9"), "parent"),
    "tokenizer: an id is negative": bad(with_key("tokenizer.json", "model", "vocab", "w9", value=-9), "parent"),
    "tokenizer: a model of no kind": bad(with_key("tokenizer.json", "model", "type", value="Oracle"), "parent"),
    "tokenizer: a pre-tokenizer of no kind": bad(
        with_key("tokenizer.json", "pre_tokenizer", value={"type": "Nothing"}), "parent"
    ),
    "tokenizer: a regular expression that is none": bad(
        with_key(
            "tokenizer.json",
            "pre_tokenizer",
            value={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
        ),
        "parent",
    ),
    "tokenizer: no unknown token": bad(with_key("tokenizer.json", "model", "unk_token", value="<nothing>"), "parent"),
    **{
        name: bad(case.spoil, "parent")
        for name, case in unreadable_json("tokenizer_config.json").items()
        if not name.endswith(("a folder",))
    },
    "tokenizer: remote code": bad(
        remote_code(
            "tokenizer_config.json",
            "class Own: pass",
            tokenizer_class="Own",
            auto_map={"AutoTokenizer": ["theirs.Own", None]},
        ),
        "parent",
        "custom code",
    ),
    "tokenizer: a sentencepiece model of nothing": bad(
        lambda folder: [spoil(folder) for spoil in (gone("tokenizer.json"), holding("tokenizer.model", b"nothing"))],
        "parent",
    ),
}

END_IDS = {"a token": "</s>", "a float": 2.5, "a truth value": True, "a list of lists": [[2]], "an object": {"id": 2}}
# Of which `plrd generate` alone reads anything.
GENERATION_CONFIGS: dict[str, Bad] = {
    **{name: case for name, case in unreadable_json(GENERATION, GENERATION).items() if not name.endswith("a folder")},
    **{
        f"the end of text is {what}": bad(with_key(GENERATION, "eos_token_id", value=value), GENERATION, "eos_token_id")
        for what, value in END_IDS.items()
    },
}

READ = {name for name in WEIGHT_FILES if not name.startswith(("weights:", "no weights"))}
