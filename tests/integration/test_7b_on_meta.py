"""The 7B experiments on the meta device: what their last member comes to, in the paper's numbers."""

import pytest
import torch
from large_parents import LLAMA2_7B, MISTRAL_7B

from plrd_train.compress.ranks import Shape, ratio_of
from plrd_train.compress.surgery import eligible_linears
from plrd_train.config.compose import compose
from plrd_train.config.schema import from_mapping
from plrd_train.parents.models import build_model


def on_meta(config, ranks=None):
    with torch.device("meta"):
        return build_model(config, ranks)


@pytest.mark.parametrize(
    ("experiment", "config", "whole", "params", "kinds"),
    [
        (
            "mistral_7b",
            MISTRAL_7B,
            7.24e9,
            3.36e9,
            {"q": 910, "o": 910, "k": 364, "v": 364, "gate": 1415, "up": 1415, "down": 1415},
        ),
        (
            "llama2_7b",
            LLAMA2_7B,
            6.74e9,
            3.14e9,
            {"q": 910, "o": 910, "k": 910, "v": 910, "gate": 1326, "up": 1326, "down": 1326},
        ),
    ],
    ids=["mistral_7b", "llama2_7b"],
)
def test_the_last_member_of_the_papers_families(experiment, config, whole, params, kinds):
    (job,) = compose([f"experiment={experiment}"])
    settings = from_mapping(job)
    parent = on_meta(config)
    assert parent.num_parameters() == pytest.approx(whole, rel=0.001)
    linears = settings.linears
    shapes = {name: Shape.of(linear) for name, linear in eligible_linears(parent, linears.include, linears.exclude)}
    assert len(shapes) == 32 * 7 and not any("lm_head" in name or "embed" in name for name in shapes)
    ratio = settings.stages.ratios[-1]
    ranks = settings.ranks.settings.ranks(shapes, ratio)
    assert ranks == {name: kinds[name.rpartition(".")[2].removesuffix("_proj")] for name in shapes}
    member = on_meta(config, ranks)
    assert member.num_parameters() == pytest.approx(params, rel=0.005)
    left = member.num_parameters() - (parent.num_parameters() - sum(shape.dense_params for shape in shapes.values()))
    assert ratio_of(shapes, ranks) == pytest.approx(
        sum(shape.dense_params for shape in shapes.values()) / left, rel=1e-12
    )
    assert ratio_of(shapes, ranks) == pytest.approx(2.25, rel=2e-3)
