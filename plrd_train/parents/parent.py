"""A parent model: a local folder or a hub id, checked before any work, with its config and tokenizer."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from plrd_train.data.documents import PROBE, encode, limit_ids
from plrd_train.errors import UserError
from plrd_train.parents.hub import ADAPTER, download
from plrd_train.parents.messages import first_line
from plrd_train.parents.models import check_architecture
from plrd_train.parents.names import Names, altering_tensors, left_out_notes, match, name_patterns
from plrd_train.parents.tokenization import VOCABULARY_FILES, examine, load
from plrd_train.parents.weight_files import equal_tensors, weight_map

_MERGE = "peft.AutoPeftModelForCausalLM.from_pretrained({!r}).merge_and_unload().save_pretrained(FOLDER)"
# If the adapter and the full model share a folder, peft would apply the adapter twice.
_MERGE_APART = (
    "move adapter_* to a folder ADAPTER, then peft.PeftModel.from_pretrained("
    "AutoModelForCausalLM.from_pretrained({!r}), ADAPTER).merge_and_unload().save_pretrained(FOLDER)"
)
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# Settings of config.json that say how to run the model. They are reset: the caller decides.
_SWITCHES = {
    "_attn_implementation": None,
    "_experts_implementation": None,
    "_output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "use_cache": True,
}


@dataclass(frozen=True)
class Parent:
    """A model on this machine: everything that a rank needs to read it.

    Fields hold plain values only, so that a parent can be saved as JSON and broadcast.

    path: as the user gave it.
    revision: the commit hash of a hub id; None for a folder.
    folder: where the files are.
    weights: {tensor name: file name} of the tensors that the model uses.
    own_head: config.json ties lm_head to the embeddings, but the files hold a different lm_head, which is used.
    tokenizer_as_stored: see `plrd_train.parents.tokenization.Tokenization`.
    notes: lines for the user about this parent.
    """

    path: str
    revision: str | None
    folder: str
    weights: dict[str, str]
    own_head: bool = False
    tokenizer_as_stored: bool = False
    notes: list[str] = field(default_factory=list)


def open_parent(path: str, revision: str = "main", trust_remote_code: bool = False) -> Parent:
    """Find a parent (download it if it is a hub id), and check its config, tokenizer files and safetensors headers.

    `revision` is a branch, tag or commit of a hub id; a folder ignores it. Remote code is downloaded for tokenizers
    only. Raises UserError if the parent is not a causal LM of transformers with a tokenizer and readable safetensors.
    """
    folder, commit = Path(path).absolute(), None
    if not folder.is_dir():
        folder, commit = download(path, revision, trust_remote_code)
    adapter = (folder / ADAPTER).is_file()
    if not (folder / "config.json").is_file():
        mend = (
            f"merge this adapter into its base model: {_MERGE.format(path)}"
            if adapter
            else "give the folder of a Hugging Face model"
        )
        raise UserError(f"parent {path}: has no config.json; {mend}")
    parent = Parent(path, commit, str(folder), weights={})
    config = load_config(parent)
    model = check_architecture(config, folder / "config.json")
    if not any(file for pattern in VOCABULARY_FILES for file in folder.glob(pattern)):
        raise UserError(
            f"parent {path}: has no tokenizer; copy its tokenizer.json or tokenizer.model, and "
            "tokenizer_config.json, beside config.json"
        )
    weights = weight_map(folder, path)
    if not weights:
        raise UserError(f"parent {path}: its safetensors hold no weights; fetch it again")
    names = match(model, weights)
    if altering := altering_tensors(model, names):
        found = (
            f"{folder / weights[altering[0]]}: holds {name_patterns(altering)} beside weights of the model, whose "
            "values depend on them"
        )
        raise UserError(f"{found}; give the unquantized, merged model, or a config.json that knows them")
    notes = left_out_notes(model, names)
    if own_head := _separate_head(model, names, folder, weights):
        notes.append(
            f"config.json ties the output head to the embeddings, and the weights hold {own_head} of other values: "
            "it is used, untied"
        )
    if adapter:
        notes.append(
            f"{ADAPTER} lies beside the weights: the adapter is left out; to include it, merge it once: "
            f"{_MERGE_APART.format(path)}"
        )
    tokenization = examine(folder, config)
    return dataclasses.replace(
        parent,
        weights={key: file for key, file in weights.items() if key not in names.left_out},
        own_head=own_head is not None,
        tokenizer_as_stored=tokenization.as_stored,
        notes=notes + tokenization.notes,
    )


def on_this_node(parent: Parent, trust_remote_code: bool = False) -> Parent:
    """The same parent at the same commit, with `folder` on this machine.

    A hub id is downloaded unless it is in the cache. Raises UserError.
    """
    if parent.revision is None:
        return parent
    return dataclasses.replace(parent, folder=str(download(parent.path, parent.revision, trust_remote_code)[0]))


def load_config(parent: Parent) -> PreTrainedConfig:
    """Read the config of a parent or of a published member.

    Raises UserError if it is not the config of an unquantized causal LM that transformers supports.
    """
    file = Path(parent.folder) / "config.json"
    try:
        config = AutoConfig.from_pretrained(parent.folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers has no common class for what a broken config raises
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{file}: asks for custom code, which is never run for a model; give one that transformers "
                "supports without it"
            ) from None
        raise UserError(f"{file}: {first_line(error)}") from error
    architecture = getattr(config, "parent_class", type(config))
    names = config.architectures or [_class_name(architecture)]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f'{file}: needs "architectures": [class name]; fetch it again')
    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING or not any(
        "CausalLM" in name or "LMHead" in name for name in names
    ):
        raise UserError(
            f"{file}: {', '.join(config.architectures or [architecture.__name__])} is not a causal LM; only those "
            "can be parents"
        )
    if config.is_encoder_decoder:
        raise UserError(f"{file}: an encoder-decoder model is not a causal LM; only those can be parents")
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{file}: these weights are quantized; give the unquantized model")
    for key in _SIZES:
        size = getattr(config.get_text_config(), key, 1)
        if type(size) is not int or size < 1:
            raise UserError(f"{file}: {key} is {size!r}, not a positive integer; fetch it again")
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for key, value in _SWITCHES.items():
            setattr(part, key, value)
        if parent.own_head:
            part.tie_word_embeddings = False
    return config


def load_tokenizer(parent: Parent, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the parent's own tokenizer.

    Raises UserError if it does not load or encode, or if a token of its vocabulary has no embedding. Added tokens may
    lack an embedding: `encode` refuses a text that holds one.
    """
    config, folder = load_config(parent), Path(parent.folder)
    try:
        tokenizer = load(folder, config, as_stored=parent.tokenizer_as_stored, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers and sentencepiece also raise bare Exception
        raise UserError(f"parent {parent.path}: its tokenizer does not load ({first_line(error)})") from error
    embeddings = config.get_text_config().vocab_size
    added = tokenizer.get_added_vocab()
    largest = max((number for token, number in tokenizer.get_vocab().items() if token not in added), default=0)
    if largest >= embeddings:
        raise UserError(
            f"parent {parent.path}: its tokenizer has the id {largest}, but config.json a vocab_size of "
            f"{embeddings}; they are not of one model, fetch both again"
        )
    limit_ids(tokenizer, embeddings)
    try:
        encode(tokenizer, PROBE)
    except UserError as error:
        raise UserError(f"parent {parent.path}: {error}") from None
    except Exception as error:
        raise UserError(
            f"parent {parent.path}: its tokenizer does not encode a text ({first_line(error)}); fetch it again"
        ) from error
    return tokenizer


def _class_name(architecture: type[PreTrainedConfig]) -> str:
    """The name of the class that AutoModelForCausalLM builds for such a config; "" if there is none."""
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(architecture, None)
    return model_class.__name__ if model_class else ""


def _separate_head(model: PreTrainedModel, names: Names, folder: Path, weights: Mapping[str, str]) -> str | None:
    """The name in the files of an output head that config.json ties to the embeddings although its values differ.

    None if there is none. transformers' from_pretrained makes the same comparison.
    """
    for target, source in model.all_tied_weights_keys.items():
        head, embeddings = names.taken.get(target), names.taken.get(source)
        if head is None or embeddings is None or head == embeddings:
            continue
        if not equal_tensors(folder / weights[head], head, folder / weights[embeddings], embeddings):
            return head
    return None
