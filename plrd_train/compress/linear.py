"""The low-rank Linear: two thin matrices in place of one."""

import torch
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """y = up(down(x)): a Linear whose weight is the product `up.weight @ down.weight` of rank `rank` (PLRD, arXiv
    2406.19995, section 3).

    `down.weight` is (rank, in_features), `up.weight` is (out_features, rank); the bias of the Linear that it replaces,
    where there was one, is `up.bias`. The product is never formed: forward costs rank * (in_features + out_features)
    multiplications a token.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False):
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    @property
    def in_features(self) -> int:
        return self.down.in_features

    @property
    def out_features(self) -> int:
        return self.up.out_features

    @property
    def rank(self) -> int:
        return self.down.out_features

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.down(x))
        return y

    @torch.no_grad()
    def set_factors(self, up: Tensor, down: Tensor) -> None:
        """Copy in the factors `up` (out_features, rank) and `down` (rank, in_features), of any dtype; the bias
        stays."""
        self.up.weight.copy_(up)
        self.down.weight.copy_(down)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
