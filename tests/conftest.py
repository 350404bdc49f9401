"""Fixtures that every test may use. The only place under tests/ that knows where the real parents and corpora lie."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_family import write_corpus, write_parent
from tiny_parents import VOCABULARY, config_of, save_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from plrd_train.cli import main
from plrd_train.tracking import console

# Which a shell lets its background jobs ignore, and nohup too: they are sent to runs here.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
# Tests run in two processes: more threads than cores wait for one another in every product, for ten times as long.
torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
SaveParent = Callable[..., tuple[Path, PreTrainedModel]]


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real parents, corpora and evaluation sets (`PLRD_ASSETS`, by default `../shared`); the test is
    skipped where it is absent."""
    folder = Path(os.environ.get("PLRD_ASSETS", ROOT.parent / "shared")).resolve()
    if not (folder / "parents").is_dir():
        pytest.skip(f"no test assets in {folder} (set PLRD_ASSETS)")
    return folder


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def save_parent(tmp_path: Path) -> SaveParent:
    """save_parent(architecture, **save_pretrained's arguments) -> (folder, the model that was saved, in float32)."""

    def save(architecture: str, **arguments) -> tuple[Path, PreTrainedModel]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_of(architecture)).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms start as constants, which would hide mix-ups
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        folder = tmp_path / architecture
        model.save_pretrained(folder, **arguments)
        save_tokenizer(folder)
        return folder, model

    return save


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


@pytest.fixture(autouse=True)
def _console(monkeypatch):
    """What a command says of the console is not meant for the tests after it."""
    monkeypatch.setattr(console, "_main", True)
    monkeypatch.setattr(console, "_to_stderr", False)


@pytest.fixture
def plrd(capfd):
    """plrd(*arguments) -> (exit status, standard output, standard error)."""

    def call(*arguments) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        return status, *capfd.readouterr()

    return call


@pytest.fixture
def plrd_json(plrd):
    """plrd_json(*arguments) -> the object that `--json` prints, alone on standard output and without NaN or
    infinity."""

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    def call(*arguments) -> dict:
        status, out, err = plrd(*arguments, "--json")
        assert status == 0, err
        return json.loads(out, parse_constant=refuse)

    return call
