"""Tiny random parents, saved by plain transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub.tiny_parents import CONFIGS, VOCABULARY, save_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

SaveParent = Callable[..., tuple[Path, PreTrainedModel]]


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def save_parent(tmp_path: Path) -> SaveParent:
    """save_parent(architecture, **save_pretrained's arguments) -> (folder, the model that was saved, in float32)."""

    def save(architecture: str, **arguments) -> tuple[Path, PreTrainedModel]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[architecture]).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms start as constants, which would hide mix-ups
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        folder = tmp_path / architecture
        model.save_pretrained(folder, **arguments)
        save_tokenizer(folder)
        return folder, model

    return save
