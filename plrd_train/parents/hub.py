"""Downloads from the Hugging Face hub, and the errors that its client raises."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from plrd_train.errors import UserError
from plrd_train.parents.messages import first_line
from plrd_train.parents.tokenization import TOKENIZER_CODE, TOKENIZER_FILES
from plrd_train.parents.weight_files import INDEX_FILES

ADAPTER = "adapter_config.json"


def download(path: str, revision: str, trust_remote_code: bool) -> tuple[Path, str]:
    """Download the config, tokenizer and safetensors of a hub id into the cache of huggingface_hub, with HF_TOKEN.

    Returns (snapshot folder, commit hash). Python code of the tokenizer is downloaded only with `trust_remote_code`.
    Raises UserError.
    """
    code = [TOKENIZER_CODE] if trust_remote_code else []
    patterns = [
        "config.json",
        "generation_config.json",
        ADAPTER,
        *TOKENIZER_FILES,
        *code,
        "model*.safetensors",
        *INDEX_FILES,
    ]
    with hub_errors(path, revision, "neither a folder nor a hub id that can be reached ({})"):
        validate_repo_id(path)
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    return folder, folder.name


@contextmanager
def hub_errors(path: str, revision: str, unreachable: str) -> Iterator[None]:
    """Turn the errors of the hub's client for the hub id `path` into UserError.

    `unreachable` is the message for a connection or server error; its `{}` receives the reason.
    """
    try:
        yield
    except HFValidationError:
        raise UserError(f"parent {path}: no such folder, and not a valid hub id (owner/name)") from None
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
        raise UserError(f"parent {path}: {unreachable.format(first_line(error))}") from error
