"""Sound folders, each made once, and the one check that every malformed one has to pass."""

import shutil
from pathlib import Path

import pytest
from malformed import contents
from tiny_family import write_corpus, write_parent
from transformers import AutoModelForCausalLM

from plrd_train.cli import main


@pytest.fixture(scope="session")
def sound(tmp_path_factory) -> Path:
    """A folder with parent, sharded (the same in several files), corpus and family (two members, made by `plrd
    factor`)."""
    folder = tmp_path_factory.mktemp("sound")
    write_parent(folder / "parent")
    write_corpus(folder / "corpus")
    shutil.copytree(folder / "parent", folder / "sharded")
    (folder / "sharded" / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(folder / "parent").save_pretrained(folder / "sharded", max_shard_size=12_000)
    assert main(["factor", str(folder / "parent"), str(folder / "family"), "--method", "svd", "--ratio", "1.5,2"]) == 0
    return folder


@pytest.fixture
def refused(plrd):
    """refused(named, *arguments): the command says so in one line that names all of `named`, with status 2."""

    def check(named: tuple[str, ...], *arguments) -> None:
        status, out, err = plrd(*arguments)
        assert (status, err.count("\n"), err[:7]) == (2, 1, "error: "), (status, out[-500:], err[-2000:])
        assert "Traceback" not in out
        for part in named:
            assert part in err, (part, err)

    return check


@pytest.fixture
def spoiled(sound, tmp_path):
    """spoiled(kind, bad) -> a copy of the sound folder `kind`, spoiled; at the end of the test it must be as it was
    then."""
    made: list[tuple[Path, dict]] = []

    def make(kind: str, case) -> Path:
        folder = Path(shutil.copytree(sound / kind, tmp_path / kind))
        case.spoil(folder)
        made.append((folder, contents(folder)))
        return folder

    yield make
    for folder, before in made:
        assert contents(folder) == before
    assert not (tmp_path / "ran").exists()  # what a pickle or remote code would leave
