"""Metrics made of what calibration text tells: what an error of a weight costs, by the moments of its inputs or by weights of single channels."""

import torch
from torch import Tensor

from plrd_train.lowrank.spectral import Metric

# What no text has shown counts this share of all, and rounding, of either sign, no more. Sums in float32 round to 1e-7 of the largest eigenvalue of
# a moment; yet the floor stands lower, since a single token with massive activations raises that eigenvalue a millionfold above the rest, and a floor
# as high as the rounding would then blur what matters.
FLOOR = 1e-8


def whitening(moment: Tensor) -> Metric:
    """The metric in which an error E of a weight costs E[||E x||^2] = ||E R||_F^2, R R^T being the second moment E[x x^T] (n, n) of its input.

    Cholesky's R where there is one, as it costs a twentieth; else, since rounding may have made a singular moment indefinite, that of the
    eigendecomposition with clipped eigenvalues, which always exists. Float64: an eigenvalue found in float32 is off by more than the floor. Raises
    ValueError where `moment` holds NaN or Inf.
    """
    _check(moment)
    moment = moment.double()
    floor = FLOOR * moment.trace().item()
    if floor == 0.0:  # a Linear that is only given zeros
        return Metric(moment.new_ones(len(moment)))
    lower, failed = torch.linalg.cholesky_ex(moment + floor * torch.eye(len(moment), dtype=moment.dtype, device=moment.device))
    if not failed:
        return Metric(lower)
    values, vectors = torch.linalg.eigh(moment)
    return Metric(vectors * values.clamp_min(floor).sqrt())


def by_channel(weights: Tensor) -> Metric:
    """The metric in which an error counts `weights` (n,) times in each channel; a channel of weight 0 still counts a little.

    Raises ValueError where `weights` hold NaN or Inf.
    """
    _check(weights)
    floor = FLOOR**0.5 * weights.max().item()
    return Metric(weights.double().clamp_min(floor) if floor > 0.0 else torch.ones_like(weights))


def _check(statistic: Tensor) -> None:
    if not torch.isfinite(statistic).all():
        raise ValueError("what it is given on the calibration text is, or has squares that are, no finite float32 numbers")
