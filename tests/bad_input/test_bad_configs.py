"""Malformed arguments, given to `plrd plan`, which composes and checks them as the main job does, and flags, which that
job's sweep reads."""

import bad_configs
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from plrd_train.config import sweep
from plrd_train.config.compose import compose
from plrd_train.config.schema import from_mapping
from plrd_train.errors import UserError

# Composing takes a quarter of a second: by default every fourth does so, and each that Hydra itself has to refuse; `-m
# slow` runs them all.
HYDRA = [name for name in bad_configs.CASES if name not in bad_configs.VALUES]
OFTEN = {*HYDRA, *list(bad_configs.VALUES)[::4]}


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in bad_configs.CASES]
)
def test_a_config_that_cannot_be_is_refused(name, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, named = bad_configs.CASES[name]
    refused((named,), "plan", *arguments)
    assert not [*tmp_path.iterdir()]


@pytest.fixture(scope="module")
def composed() -> dict:
    (source,) = compose(bad_configs.TINY)
    return source


@pytest.mark.parametrize("name", bad_configs.VALUES)
def test_a_value_that_cannot_be_is_refused_by_the_schema(name, composed):
    override = OverridesParser.create().parse_override(name)
    source = OmegaConf.create(composed)
    OmegaConf.update(source, override.key_or_group, override.value(), force_add=True)
    with pytest.raises(UserError) as error:
        from_mapping(OmegaConf.to_container(source))
    assert bad_configs.VALUES[name] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", bad_configs.FLAGS)
def test_a_flag_that_is_none_is_refused(name, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        sweep.points(bad_configs.FLAGS[name])
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""
    assert not [*tmp_path.iterdir()]
