"""Malformed arguments, given to `plrd plan`, which composes and checks them as the main job does, and flags, which that job's sweep reads."""

import bad_configs
import pytest

from plrd_train import sweep
from plrd_train.errors import UserError


@pytest.mark.parametrize("name", bad_configs.CASES)
def test_a_config_that_cannot_be_is_refused(name, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, named = bad_configs.CASES[name]
    refused((named,), "plan", *arguments) if arguments else refused((named,), "plan", "seed=1")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", bad_configs.FLAGS)
def test_a_flag_that_is_none_is_refused(name, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        sweep.points(bad_configs.FLAGS[name])
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""
    assert not [*tmp_path.iterdir()]
