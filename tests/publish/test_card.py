"""The card of a member: readable by the hub's own parser, and honest about what it was made from."""

import pytest
import yaml
from huggingface_hub import ModelCard

from plrd_train.family import Member, ParentRecord
from plrd_train.publish.card import member_card

MEMBER = {
    "name": "r1.50",
    "path": "members/r1.50",
    "ratio_requested": 1.5,
    "ratio": 1.5031,
    "params": 2345678,
    "linear_params": 1234567,
    "form": "pifa",
    "ranks": {
        "model.layers.0.mlp.up_proj": 40,
        "model.layers.1.mlp.up_proj": 44,
        "model.layers.0.self_attn.q_proj": 31,
    },
    "tokens_stage": 100000,
    "tokens_total": 300000,
    "tokens_lineage": 250000,
    "eval_factored": {"ppl": 61.25},
    "eval": {"ppl": 7.125, "nll_tokens": 9999},
    "made_from": "r1.25",
}
PARENT = {"path": "/home/someone/parents/stories3m", "params": 3148224, "eval": {"ppl": 5.0625}}


def test_card_of_a_local_parent_tells_no_path():
    settings = {
        "factorizer": {"name": "svd"},
        "data": {"train": "/home/someone/corpora/tales/train"},
        "stages": {"ratios": (1.25, 1.5)},
    }
    text = member_card(Member(**MEMBER), ParentRecord(**PARENT), settings)
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == {
        "factorizer": {"name": "svd"},
        "data": {"train": "…/tales/train"},
        "stages": {"ratios": [1.25, 1.5]},
    }
    data = ModelCard(text).data
    assert data.library_name == "transformers" and "plrd" in data.tags and data.base_model is None
    assert "/home/someone" not in text and "stories3m" in text
    numbers = ("2,345,678", "3,148,224", "100,000", "300,000", "250,000", "61.25", "7.125", "1.503")
    for said in (*numbers, "`pifa`", "`r1.25`", "| up_proj | 2 | 40 to 44 |", "| q_proj | 1 | 31 |"):
        assert said in text


def test_card_of_a_hub_parent_names_its_base_model():
    text = member_card(
        Member(**MEMBER), ParentRecord(**PARENT | {"path": "someone/tiny: 'odd'", "revision": "0123456789abcdef"}), {}
    )
    assert ModelCard(text).data.base_model == "someone/tiny: 'odd'"
    assert "@0123456789ab`" in text


@pytest.mark.parametrize("key", ["eval", "eval_factored"])
def test_card_says_what_was_not_measured(key):
    assert "not measured" in member_card(Member(**MEMBER | {key: None}), ParentRecord(**PARENT), {})
