"""What a launcher says in the environment: the place that it describes, and the one line that half of it gives."""

import datetime
import os
import socket

import pytest
import torch
from processes import run_job

from plrd_train.errors import UserError
from plrd_train.runtime import network, world
from plrd_train.runtime.place import Place
from plrd_train.runtime.world import choose_device

WHOLE = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "host0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place(0, 1, 0, None, None)),
        ({"PATH": "/bin", "SLURM_PROCID": "3", "LOCAL_WORLD_SIZE": "8"}, Place(0, 1, 0, None, None)),
        (WHOLE, Place(3, 4, 1, "host0", 29500)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Place(0, 1, 0, None, None)),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "::1", "MASTER_PORT": "1"}, Place(0, 1, 0, "::1", 1)),
    ],
)
def test_what_is_whole_is_a_place(environment, place):
    assert Place.read(environment) == place and place.launched == ("MASTER_ADDR" in environment)


def without(*names: str) -> dict:
    return {name: value for name, value in WHOLE.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0"}, "RANK=0 without WORLD_SIZE"),
        ({"WORLD_SIZE": "1"}, "WORLD_SIZE=1 without RANK"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8 without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 without RANK, WORLD_SIZE"),
        ({"MASTER_ADDR": "h"}, "MASTER_ADDR=h without RANK, WORLD_SIZE, MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "29500"}, "without MASTER_ADDR"),
        (without("MASTER_ADDR"), "without MASTER_ADDR"),
        (without("LOCAL_RANK", "MASTER_PORT"), "without LOCAL_RANK, MASTER_PORT"),
        (WHOLE | {"RANK": "4"}, "RANK=4 is not below WORLD_SIZE=4"),
        (
            WHOLE | {"LOCAL_RANK": "7", "RANK": "9"},
            "RANK=9 is not below WORLD_SIZE=4; LOCAL_RANK=7 is not below WORLD_SIZE=4",
        ),
        (WHOLE | {"RANK": "-1"}, "RANK='-1' is no whole number"),
        (
            WHOLE | {"WORLD_SIZE": "four", "RANK": ""},
            "RANK='' is no whole number from 0 on; WORLD_SIZE='four' is no whole number",
        ),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        (WHOLE | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
        (WHOLE | {"MASTER_PORT": "0"}, "MASTER_PORT=0 is no port"),
        (WHOLE | {"MASTER_PORT": "http"}, "MASTER_PORT='http' is no whole number"),
        (WHOLE | {"MASTER_ADDR": ""}, "MASTER_ADDR='' is no host"),
    ],
)
def test_half_a_place_gives_one_line(environment, said):
    with pytest.raises(UserError) as error:
        Place.read(environment)
    line = str(error.value)
    assert said in line and line.endswith(
        f"start with torchrun, or unset {' '.join(name for name in WHOLE if name in environment)}"
    )


def test_a_rank_past_the_gpus_is_refused():
    assert [choose_device(Place(6, 8, 2), gpus) for gpus in (0, 4)] == [torch.device("cpu"), torch.device("cuda", 2)]
    with pytest.raises(UserError, match=r"^LOCAL_RANK=4: [^\n]*start at most 4 on this machine"):
        choose_device(Place(4, 8, 4), 4)


def spoil(rank: int, changes: dict) -> None:
    world.TIMEOUT, network.NAME_S = datetime.timedelta(seconds=1), 0.0
    for name, value in changes.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value


@pytest.fixture
def refused():
    """refused(arguments, changes) -> what the main job says of a launcher's environment, for one rank of one, that is
    so changed (None: unset)."""

    def said(arguments, **changes) -> str:
        ended = run_job(1, arguments, spoil, changes)
        assert (ended.status, ended.out, ended.err.count("\n")) == (2, "", 1), (ended.out, ended.err)
        return ended.err

    return said


def test_the_main_job_ends_before_anything_is_opened(refused, command, tmp_path):
    arguments = command(tmp_path / "run")
    assert refused(arguments, WORLD_SIZE=None).startswith(
        "error: RANK=0 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT="
    )
    assert "without RANK:" in refused(arguments, RANK=None)
    assert "without MASTER_ADDR:" in refused(arguments, WORLD_SIZE="2", MASTER_ADDR=None)
    assert not [*tmp_path.iterdir()]


def test_ranks_that_cannot_meet_end_with_one_line(refused, command, tmp_path):
    arguments = command(tmp_path / "run")
    assert "MASTER_ADDR=nowhere.invalid: no host of that name" in refused(
        arguments, WORLD_SIZE="2", MASTER_ADDR="nowhere.invalid"
    )
    assert "rank 0 of 2 does not meet the others" in refused(arguments, WORLD_SIZE="2")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert f"MASTER_PORT={port} (" in refused(arguments, MASTER_PORT=port)


LEFT_OVER = (
    {"RANK": "0"},
    {"WORLD_SIZE": "2"},
    {"RANK": "x", "LOCAL_RANK": ""},
    {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere.invalid"},
)


@pytest.mark.parametrize("environment", LEFT_OVER, ids=str)
def test_commands_that_are_no_ranks_do_not_look(environment, tiny, plrd_json, monkeypatch, tmp_path):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    made = plrd_json(
        "factor", tiny / "parent", tmp_path / "family", "--method", "svd", "--ratio", "2", "--data", tiny / "corpus"
    )
    shown = plrd_json("show", tmp_path / "family")
    assert [member["name"] for member in shown["members"]] == ["2x"] and shown["members"][0]["eval"] == made["members"][
        0
    ]["eval"]
    assert (
        plrd_json("generate", tmp_path / "family" / "members" / "2x", "--prompt", "w3", "--max-tokens", 2)["text"]
        is not None
    )
