"""The parent's config alone: what a plan needs of a parent. No weights and no tokenizer are read."""

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.utils import logging
from transformers import PreTrainedConfig

from plrd_train.errors import UserError
from plrd_train.parents import parent as parents
from plrd_train.parents.models import described
from plrd_train.parents.settings import Parent


def parent_config(parent: Parent) -> PreTrainedConfig:
    """From a local folder, the cache of the hub or the hub itself; of a parent that is still to be trained from
    scratch, from its description, with `vocab_size` as its vocabulary. Raises UserError."""
    folder = Path(parent.path).absolute()
    if parent.scratch is not None and not folder.exists():
        return described({**parent.scratch.architecture, "vocab_size": parent.scratch.vocab_size})
    if not folder.is_dir():
        folder = _fetched(parent.path, parent.revision or "main")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"parent {parent.path}: has no config.json; give the folder of a Hugging Face model, or of its "
            "config.json alone"
        )
    config = parents.load_config(parents.Parent(parent.path, None, str(folder), weights={}))
    parents.check_architecture(config, folder)
    return config


def _fetched(path: str, revision: str) -> Path:
    """The folder of the config.json of a hub id."""
    logging.set_verbosity_error()  # else a line for each of its attempts
    with parents.hub_errors(
        path, revision, "its config.json cannot be reached ({}); give parent.path=FOLDER of a copy of that file"
    ):
        return Path(hf_hub_download(path, "config.json", revision=revision)).parent
