"""Read the config of a parent, which is all that a plan needs: neither weights nor tokenizer."""

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.utils import logging
from transformers import PreTrainedConfig

from plrd_train.errors import UserError
from plrd_train.parents import parent as parents
from plrd_train.parents.hub import hub_errors
from plrd_train.parents.models import check_architecture, scratch_config
from plrd_train.parents.settings import Parent


def parent_config(parent: Parent) -> PreTrainedConfig:
    """Read config.json from a local folder, the hub's cache or the hub.

    For a parent that is still to be trained from scratch, the config is built from `parent.scratch`. Raises UserError.
    """
    folder = Path(parent.path).absolute()
    if parent.scratch is not None and not folder.exists():
        return scratch_config({**parent.scratch.architecture, "vocab_size": parent.scratch.vocab_size})
    if not folder.is_dir():
        folder = _config_folder(parent.path, parent.revision or "main")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"parent {parent.path}: has no config.json; give the folder of a Hugging Face model, or of its "
            "config.json alone"
        )
    config = parents.load_config(parents.Parent(parent.path, None, str(folder), weights={}))
    check_architecture(config, folder / "config.json")
    return config


def _config_folder(path: str, revision: str) -> Path:
    """Download the config.json of a hub id, and return its folder."""
    logging.set_verbosity_error()  # otherwise each attempt prints a line
    with hub_errors(
        path, revision, "its config.json cannot be reached ({}); give parent.path=FOLDER of a copy of that file"
    ):
        return Path(hf_hub_download(path, "config.json", revision=revision)).parent
