"""Hugging Face parents: a local folder or a hub id, checked before any work, with its config, tokenizer and the list of
its weights."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from plrd_train.data.documents import PROBE, encode, limit_ids
from plrd_train.errors import UserError
from plrd_train.parents.modeling_plrd import VARIANT
from plrd_train.parents.models import published_model
from plrd_train.parents.names import Names, changing_values, grouped, match, told
from plrd_train.parents.tokenization import TOKENIZER_CODE, TOKENIZER_FILES, VOCABULARY_FILES, examine, load

# Single file before index, as transformers looks for them.
_WEIGHT_FILES = ("model.safetensors", f"model.{VARIANT}.safetensors")
ADAPTER = "adapter_config.json"
# Where both lie in one folder, peft would put the adapter on twice.
_MERGE = "peft.AutoPeftModelForCausalLM.from_pretrained({!r}).merge_and_unload().save_pretrained(FOLDER)"
_MERGE_APART = (
    "move adapter_* to a folder ADAPTER, then peft.PeftModel.from_pretrained("
    "AutoModelForCausalLM.from_pretrained({!r}), ADAPTER).merge_and_unload().save_pretrained(FOLDER)"
)
# Rows of two tensors that are compared at a time.
_ROWS = 4096
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# What config.json may say of how to run the model, and is for the caller to say.
_SWITCHES = {
    "_attn_implementation": None,
    "_experts_implementation": None,
    "_output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "use_cache": True,
}
_INDEX_FILES = ("model.safetensors.index.json", f"model.safetensors.index.{VARIANT}.json")


@dataclass(frozen=True)
class Parent:
    """A model on this machine: everything a rank needs to read it. Plain values only, so it travels as JSON or in a
    broadcast.

    path: as the user gave it; revision: commit hash of a hub id, None for a folder; folder: where its files lie;
    weights: {tensor name: file name} of the tensors that the model has a place for. own_head: config.json ties lm_head
    to the embeddings, and the weights hold another one, which counts. tokenizer_as_stored: as
    `plrd_train.parents.tokenization.Tokenization` has it. notes: lines for the user on what was found.
    """

    path: str
    revision: str | None
    folder: str
    weights: dict[str, str]
    own_head: bool = False
    tokenizer_as_stored: bool = False
    notes: list[str] = field(default_factory=list)


def open_parent(path: str, revision: str = "main", trust_remote_code: bool = False) -> Parent:
    """Find (and for a hub id download) a parent and check that it is a causal LM with tokenizer and readable
    safetensors; only headers are read.

    `revision` is a branch, tag or commit of a hub id, and means nothing for a folder. Remote code is fetched for
    tokenizers only. Raises UserError.
    """
    folder, commit = Path(path).absolute(), None
    if not folder.is_dir():
        folder, commit = _download(path, revision, trust_remote_code)
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
    model = check_architecture(config, folder)
    if not any(file for pattern in VOCABULARY_FILES for file in folder.glob(pattern)):
        raise UserError(
            f"parent {path}: has no tokenizer; copy its tokenizer.json or tokenizer.model, and "
            "tokenizer_config.json, beside config.json"
        )
    weights = _weight_map(folder, path)
    if not weights:
        raise UserError(f"parent {path}: its safetensors hold no weights; fetch it again")
    names = match(model, weights)
    if changing := changing_values(model, names):
        held = (
            f"{folder / weights[changing[0]]}: holds {grouped(changing)} beside weights of the model, whose "
            "values depend on them"
        )
        raise UserError(f"{held}; give the unquantized, merged model, or a config.json that knows them")
    notes = told(model, names)
    if own_head := _has_own_head(model, names, folder, weights):
        notes.append(
            f"config.json ties the output head to the embeddings, and the weights hold {own_head} of other values: "
            "it is taken, untied"
        )
    if adapter:
        notes.append(
            f"{ADAPTER} lies beside the weights: the adapter is left out; to have it in, merge it once: "
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
    """The same parent, of the same commit, with its `folder` on this machine: a hub id is downloaded unless the cache
    has it. Raises UserError."""
    if parent.revision is None:
        return parent
    return dataclasses.replace(parent, folder=str(_download(parent.path, parent.revision, trust_remote_code)[0]))


def load_config(parent: Parent) -> PreTrainedConfig:
    """The config of a parent, dense or a published member. Raises UserError where it is not that of an unquantized
    causal LM of transformers."""
    file = Path(parent.folder) / "config.json"
    try:
        config = AutoConfig.from_pretrained(parent.folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers has no common class for what a broken config raises
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{file}: asks for custom code, which is never run for a model; give one that transformers knows by "
                "itself"
            ) from None
        raise UserError(f"{file}: {_first_line(error)}") from error
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
            raise UserError(f"{file}: {key} is {size!r}, which is no size; fetch it again")
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for key, value in _SWITCHES.items():
            setattr(part, key, value)
        if parent.own_head:
            part.tie_word_embeddings = False
    return config


def check_architecture(config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    """The model of this config, which lies in `folder`, on the meta device. Raises UserError where transformers cannot
    make one."""
    try:
        with torch.device("meta"):
            return published_model(config)
    # Whatever an architecture stumbles over: a name that it does not know, sizes that do not go together.
    except Exception as error:
        raise UserError(
            f"{folder / 'config.json'}: no model can be made of it ({type(error).__name__}: {_first_line(error)}); "
            "fetch it again"
        ) from error


def load_tokenizer(parent: Parent, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The parent's own tokenizer. Raises UserError where it does not load, and where it knows more tokens than the
    model has embeddings, those apart that were added: `encode` refuses them."""
    config, folder = load_config(parent), Path(parent.folder)
    try:
        tokenizer = load(folder, config, as_stored=parent.tokenizer_as_stored, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers and sentencepiece raise what they like, bare Exception included
        raise UserError(f"parent {parent.path}: its tokenizer does not load ({_first_line(error)})") from error
    embeddings = config.get_text_config().vocab_size
    added = tokenizer.get_added_vocab()
    largest = max((number for token, number in tokenizer.get_vocab().items() if token not in added), default=0)
    if largest >= embeddings:
        raise UserError(
            f"parent {parent.path}: its tokenizer knows an id of {largest}, config.json a vocab_size of "
            f"{embeddings}: not of one model"
        )
    limit_ids(tokenizer, embeddings)
    try:
        encode(tokenizer, PROBE)
    except UserError as error:
        raise UserError(f"parent {parent.path}: {error}") from None
    except Exception as error:
        raise UserError(
            f"parent {parent.path}: its tokenizer does not encode a text ({_first_line(error)}); fetch it again"
        ) from error
    return tokenizer


def _download(path: str, revision: str, trust_remote_code: bool) -> tuple[Path, str]:
    """(snapshot folder, commit) of a hub id; the library's own cache and HF_TOKEN are used."""
    code = [TOKENIZER_CODE] if trust_remote_code else []
    patterns = [
        "config.json",
        "generation_config.json",
        ADAPTER,
        *TOKENIZER_FILES,
        *code,
        "model*.safetensors",
        *_INDEX_FILES,
    ]
    with hub_errors(path, revision, "neither a folder nor a hub id that can be reached ({})"):
        validate_repo_id(path)
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    return folder, folder.name


@contextmanager
def hub_errors(path: str, revision: str, unreachable: str) -> Iterator[None]:
    """Inside, what the hub's client raises for the hub id `path` becomes a UserError; `unreachable`, with the reason in
    it, says what is neither a wrong id nor a matter of access."""
    try:
        yield
    except HFValidationError:
        raise UserError(f"parent {path}: no such folder, and not the form of a hub id (owner/name)") from None
    except GatedRepoError:
        raise UserError(
            f"parent {path}: gated on the hub; accept its terms on its page there and set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"parent {path}: the hub has no revision {revision} of it (parent.revision)") from None
    except (RepositoryNotFoundError, RemoteEntryNotFoundError):
        raise UserError(
            f"parent {path}: no such folder, and no such model on the hub (for a private one set HF_TOKEN)"
        ) from None
    except Exception as error:  # connection, proxy, server and cache errors come from several libraries
        raise UserError(f"parent {path}: {unreachable.format(_first_line(error))}") from error


def _class_name(architecture: type[PreTrainedConfig]) -> str:
    """The class that AutoModelForCausalLM makes of such a config, "" where it makes none."""
    made: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(architecture, None)
    return made.__name__ if made else ""


def _has_own_head(model: PreTrainedModel, names: Names, folder: Path, weights: Mapping[str, str]) -> str | None:
    """The stored tensor that the model ties to another one, of other values, as transformers' from_pretrained finds
    it."""
    for target, source in model.all_tied_weights_keys.items():
        head, embeddings = names.taken.get(target), names.taken.get(source)
        if head is None or embeddings is None or head == embeddings:
            continue
        if not _equal(folder / weights[head], head, folder / weights[embeddings], embeddings):
            return head
    return None


def _equal(file: Path, name: str, other_file: Path, other: str) -> bool:
    with safe_open(file, framework="pt") as one, safe_open(other_file, framework="pt") as two:
        a, b = one.get_slice(name), two.get_slice(other)
        if a.get_shape() != b.get_shape():
            return False
        return all(torch.equal(a[i : i + _ROWS], b[i : i + _ROWS]) for i in range(0, a.get_shape()[0], _ROWS))


def _weight_map(folder: Path, path: str) -> dict[str, str]:
    """{tensor name: file name} from the headers of a folder's safetensors files."""
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return dict.fromkeys(_tensor_names(folder / name), name)
    for name in _INDEX_FILES:
        if (folder / name).is_file():
            return _read_index(folder / name)
    if any(folder.glob("*.bin")):
        convert = f"AutoModelForCausalLM.from_pretrained({path!r}).save_pretrained(FOLDER)"
        raise UserError(
            f"parent {path}: has only .bin weights; convert them once with transformers: {convert}, and copy the "
            "tokenizer's files"
        )
    raise UserError(f"parent {path}: has no model.safetensors and no {_INDEX_FILES[0]}")


def _read_index(index: Path) -> dict[str, str]:
    try:
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weights.values()))
        outside = [name for name in shards if not _lies_inside(index.parent, name)]
        missing = [name for name in shards if not (index.parent / name).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        raise UserError(f'{index}: needs "weight_map": {{tensor name: file name}}; fetch it again') from None
    if outside:
        raise UserError(f"{index}: names {outside[0]}, a file outside its folder")
    if missing:
        raise UserError(f"{index}: names {missing[0]}, which is missing; fetch it again")
    held = {name: set(_tensor_names(index.parent / name)) for name in shards}
    for tensor, name in weights.items():
        if tensor not in held[name]:
            raise UserError(f"{index}: says that {name} holds {tensor}, which it does not; fetch both again")
    return weights


def _lies_inside(folder: Path, name: str) -> bool:
    """Whether the file `name` lies in `folder` itself, links followed; those of the hub's cache, whose files lie in
    `blobs` beside its snapshots, stay in it as well."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return False
    folder = folder.resolve()
    blobs = [folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else []
    return any((folder / name).resolve().is_relative_to(place) for place in (folder, *blobs))


def _tensor_names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        raise UserError(f"{file}: truncated or not safetensors ({_first_line(error)}); fetch it again") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
