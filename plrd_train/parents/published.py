"""A published model, whole on this one process, as anyone would load it: a member, or a parent."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from plrd_train.errors import UserError
from plrd_train.parents.parent import Parent, load_config, load_tokenizer, open_parent
from plrd_train.parents.reach import most_tokens
from plrd_train.parents.weights import WeightReader


@dataclass(frozen=True)
class Published:
    """`model` in evaluation mode on `device`, and its own tokenizer; `perplexity` takes it for an engine of a single
    rank. Its files lie in `folder`. The model has no settings of generation, neither those of generation_config.json
    nor old ones in config.json."""

    path: str
    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    positions: int | None = None
    rank: int = 0
    world_size: int = 1

    @property
    def context(self) -> int | None:
        """The most tokens that the model reads at once, None where its config does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def share(self, value: object) -> list:
        return [value]


def find_published(path: str, revision: str = "main", *, trust_remote_code: bool = False) -> Parent:
    """The files of the member or parent at `path`, a folder or a hub id at `revision`, checked as `open_parent` does
    it. Raises UserError."""
    try:
        return open_parent(path, revision, trust_remote_code)
    except UserError as error:  # a member was not given as a parent
        raise UserError(str(error).removeprefix("parent ")) from None


def open_published(
    files: Parent, dtype: torch.dtype | Literal["auto"] = "auto", *, trust_remote_code: bool = False
) -> Published:
    """Load a model with transformers, on the GPU where there is one.

    `dtype` is what it computes in; "auto" is the dtype of its weights. Remote code is run for a tokenizer alone. Raises
    UserError where the weights are not whole, not finite or do not fit, and where the tokenizer does not load.
    """
    try:
        tokenizer = load_tokenizer(files, trust_remote_code)
    except UserError as error:
        raise UserError(str(error).removeprefix("parent ")) from None
    WeightReader(files)  # transformers converts what is stored in another type without a word
    config = load_config(files)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            files.folder,
            config=config,
            dtype=dtype,
            generation_config=GenerationConfig(),  # else generate() mixes the folder's own into what it is given
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        model, info = loaded
        # peft, where installed, adds an adapter that lies beside the weights.
        if getattr(model, "_hf_peft_config_loaded", False):
            model.disable_adapters()
        model.to(device)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{files.path}: does not load ({' '.join(str(error).split())})") from error
    if info["missing_keys"]:  # transformers has made them up
        raise UserError(
            f"{files.path}: its weights lack {', '.join(sorted(info['missing_keys'])[:3])}; fetch or publish it again"
        )
    for name, parameter in model.named_parameters():
        if not all(bound.isfinite() for bound in parameter.aminmax()):
            raise UserError(f"{files.path}: {name} holds NaN or infinity; fetch it again, or choose another model")
    return Published(files.path, Path(files.folder), model, tokenizer, device, most_tokens(config))
