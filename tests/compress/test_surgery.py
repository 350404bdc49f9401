"""Which Linears are factored, and their replacement."""

import pytest
import torch
from torch import nn

from plrd_train.compress.linear import LowRankLinear
from plrd_train.compress.surgery import eligible_linears, replace_linears


class Toy(nn.Module):
    """Two blocks between an embedding and a head, as a causal LM has them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"q": nn.Linear(6, 4), "mlp": nn.Linear(6, 6, bias=False)}) for _ in range(2)]
        )
        self.lm_head = nn.Linear(6, 7, bias=False)

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head


def names(model, **which):
    return [name for name, _ in eligible_linears(model, **which)]


def test_all_but_the_head_by_default_and_regular_expressions_choose():
    assert names(Toy()) == ["blocks.0.q", "blocks.0.mlp", "blocks.1.q", "blocks.1.mlp"]
    assert names(Toy(), include=[r".*\.mlp"]) == ["blocks.0.mlp", "blocks.1.mlp"]
    assert names(Toy(), exclude=[r"blocks\.0\..*", r".*\.q"]) == ["blocks.1.mlp"]
    assert names(Toy(), include=["lm_head", "q"]) == []


def test_replaced_linears_stay_eligible_as_one():
    model = Toy()
    replace_linears(model, {"blocks.0.q": 2, "blocks.1.mlp": 3})
    assert names(model) == names(Toy())
    assert isinstance(model.blocks[0]["q"], LowRankLinear) and model.blocks[0]["q"].rank == 2
    assert model.blocks[0]["q"].up.bias is not None and model.blocks[1]["mlp"].up.bias is None


def test_replacement_keeps_device_and_dtype_and_can_be_replaced_again():
    model = Toy().to(torch.bfloat16).to("meta")
    replace_linears(model, {"blocks.0.q": 3})
    replace_linears(model, {"blocks.0.q": 1})
    weight = model.blocks[0]["q"].down.weight
    assert weight.device.type == "meta" and weight.dtype == torch.bfloat16 and weight.shape == (1, 6)


@pytest.mark.parametrize("name", ["blocks.9.q", "nothing", "embed"])
def test_what_is_no_linear_is_refused(name):
    with pytest.raises(KeyError, match=name):
        replace_linears(Toy(), {name: 2})


def test_low_rank_forward_is_the_product():
    linear = LowRankLinear(5, 4, 3, bias=True).double()
    x = torch.randn(2, 5, dtype=torch.float64)
    torch.testing.assert_close(linear(x), x @ (linear.up.weight @ linear.down.weight).T + linear.up.bias)
