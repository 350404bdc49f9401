"""The tiny parent and corpus that the tests here share, and the command that makes a family of them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_family import write_corpus, write_parent


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `parent` and `corpus`, for reading only."""
    folder = tmp_path_factory.mktemp("tiny")
    write_parent(folder / "parent")
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="session")
def command(tiny: Path) -> Callable[..., list[str]]:
    """command(run_dir, *overrides): the arguments of a main job of two stages of 20 steps on the tiny parent."""

    def arguments(run_dir: Path, *overrides: str) -> list[str]:
        return [
            "experiment=tinystories",
            f"parent.path={tiny / 'parent'}",
            f"data.train={tiny / 'corpus'}",
            f"data.validation={tiny / 'corpus'}",
            f"run_dir={run_dir}",
            "data.seq_len=16",
            "data.streams=6",
            "stages.ratios=[1.25,1.6]",
            "stages.tokens=2560",
            "recover.global_batch_tokens=128",
            "recover.micro_batch=4",
            "recover.lr=4e-3",
            "tracking.wandb.mode=disabled",
            *overrides,
        ]

    return arguments
