"""Low-rank models for transformers: any causal LM of the library, with some of its Linears in another form.

This file, linear.py, surgery.py and the file of the form are copied into every member. A member therefore loads without
plrd_train (`trust_remote_code=True`).
"""

import functools
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from plrd_train.compress.forms import linear_of
from plrd_train.compress.linear import LowRankLinear
from plrd_train.compress.surgery import replace_linears

MODEL_TYPE = "plrd"
# The weights are in model.plrd.safetensors, so that a class without ranks finds no weights and raises. Under the usual
# name, LlamaForCausalLM.from_pretrained(member) would only warn and return random Linears.
VARIANT = "plrd"
_CODE = {"AutoConfig": "modeling_plrd.PlrdConfig"}
# Keys that a low-rank config.json has in addition to the parent's.
_OWN_KEYS = ("model_type", "parent_model_type", "auto_map", "plrd")


def code_files(form: str) -> dict[str, str]:
    """{file name: source} of the modules that a folder needs to load without plrd_train.

    They import each other relatively. A forms.py with `form` alone replaces the registry of forms.
    """
    of_form = linear_of(form).__module__
    files = [
        Path(str(sys.modules[name].__file__))
        for name in (__name__, LowRankLinear.__module__, replace_linears.__module__, of_form)
    ]
    sources = {file.name: file.read_text(encoding="utf-8") for file in files}
    neighbours = re.compile(r"^from plrd_train(?:\.\w+)*\.(\w+) import", re.MULTILINE)
    taken = {name: neighbours.sub(r"from .\1 import", source) for name, source in sources.items()}
    name = linear_of(form).__name__
    return taken | {
        "forms.py": f"from .{of_form.rpartition('.')[2]} import {name}\n\n\ndef linear_of(form):\n    return {name}\n"
    }


@functools.cache
def _config_class(parent: Any) -> Any:
    """The subclass of an architecture's config class that carries ranks.

    Its model class is registered with AutoModelForCausalLM.
    """

    class Config(parent):
        # model_type stays the parent's: transformers looks up tokenizers and weight conversions by it. Only config.json
        # says "plrd".
        parent_class = parent
        base_model_tp_plan = None  # the parent's plan would split Linears that are now pairs
        plrd: dict[str, Any] | None = None

        def __post_init__(self, **kwargs):
            super().__post_init__(**{key: value for key, value in kwargs.items() if key not in _OWN_KEYS})

        def to_dict(self) -> dict[str, Any]:
            return super().to_dict() | {
                "model_type": MODEL_TYPE,
                "parent_model_type": parent.model_type,
                "auto_map": dict(_CODE),
            }

        def save_pretrained(self, save_directory, *args, **kwargs):
            super().save_pretrained(save_directory, *args, **kwargs)
            for name, source in code_files(model_form(self)).items():
                (Path(save_directory) / name).write_text(source, encoding="utf-8")

    Config.__name__ = Config.__qualname__ = f"Plrd{parent.__name__}"
    AutoModelForCausalLM.register(Config, _model_class(Config, MODEL_FOR_CAUSAL_LM_MAPPING[parent]))
    return Config


def _model_class(config: Any, parent: Any) -> Any:
    """The subclass of an architecture's causal LM that has the low-rank Linears of its config."""

    class Model(parent):
        config_class = config

        def __init__(self, config, *args, **kwargs):
            super().__init__(config, *args, **kwargs)
            try:
                linear = linear_of(model_form(config))
            except KeyError:
                raise ValueError(
                    f"config.json: no form {model_form(config)!r} is known here; a newer plrd_train may have it"
                ) from None
            try:
                replace_linears(self, _checked_ranks(config), linear)
            except KeyError as error:
                raise ValueError(f"config.json, plrd.ranks: {error.args[0]}") from None

        @classmethod
        def from_pretrained(
            cls,
            pretrained_model_name_or_path,
            *args,
            variant: str = VARIANT,
            output_loading_info: bool = False,
            **kwargs,
        ):
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, variant=variant, output_loading_info=True, **kwargs
            )
            if info["missing_keys"]:  # transformers would initialise them at random
                raise ValueError(
                    f"{pretrained_model_name_or_path}: the weights lack "
                    f"{', '.join(sorted(info['missing_keys'])[:3])}; publish this member again"
                )
            return (model, info) if output_loading_info else model

        def save_pretrained(self, save_directory, *args, variant: str = VARIANT, **kwargs):
            return super().save_pretrained(save_directory, *args, variant=variant, **kwargs)

    Model.__name__ = Model.__qualname__ = f"Plrd{parent.__name__}"
    return Model


def _checked_ranks(config: PreTrainedConfig) -> dict[str, int]:
    ranks = (config.plrd or {}).get("ranks")
    if not isinstance(ranks, dict) or not all(type(rank) is int and rank > 0 for rank in ranks.values()):
        raise ValueError('config.json of a low-rank model needs "plrd": {"ranks": {module name: positive rank}}')
    return ranks


class PlrdConfig(PreTrainedConfig):
    """The config class of `"model_type": "plrd"`.

    `from_dict` returns the subclass of the parent architecture's config.
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        architecture = str(config_dict.get("parent_model_type"))
        if architecture not in CONFIG_MAPPING:
            raise ValueError(
                f'config.json: this version of transformers knows no "parent_model_type": "{architecture}"'
            )
        parent: Any = CONFIG_MAPPING[architecture]
        return _config_class(parent).from_dict(config_dict, **kwargs)


def model_ranks(config: PreTrainedConfig) -> dict[str, int]:
    """{module name: rank} of the low-rank Linears of this config; empty for a dense model."""
    return _checked_ranks(config) if hasattr(config, "parent_class") else {}


def model_form(config: PreTrainedConfig) -> str:
    """The form of the low-rank Linears of this config."""
    form = (getattr(config, "plrd", None) or {}).get("form", "lowrank")
    if not isinstance(form, str):
        raise ValueError('config.json of a low-rank model needs "plrd": {"form": a name}')
    return form


def with_ranks(config: PreTrainedConfig, ranks: Mapping[str, int], form: str = "lowrank") -> PreTrainedConfig:
    """A copy of `config`, dense or low-rank, for a model with exactly these `ranks` in this `form`.

    Without ranks it is the plain config of the architecture.
    """
    parent: Any = getattr(config, "parent_class", type(config))
    own = _config_class(parent) if ranks else parent
    values = {key: value for key, value in config.to_dict().items() if key not in _OWN_KEYS}
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[own]
    values["architectures"] = [model_class.__name__]
    return own.from_dict(values | {"plrd": {"ranks": dict(ranks), "form": form}} if ranks else values)
