"""Metrics made of what calibration text tells: what an error of a weight costs, by the moments of its inputs or by weights of single channels."""

import torch
from torch import Tensor

from plrd_train.lowrank.ranks import Shape
from plrd_train.lowrank.spectral import Metric, peak_bytes

# What no text has shown counts this share of all, and rounding, of either sign, no more. Sums in float32 round to 1e-7 of the largest eigenvalue of
# a moment; yet the floor stands lower, since a single token with massive activations raises that eigenvalue a millionfold above the rest, and a floor
# as high as the rounding would then blur what matters.
FLOOR = 1e-8


def whitening(moment: Tensor) -> Metric:
    """The metric in which an error E of a weight costs E[||E x||^2] = ||E R||_F^2, R R^T being the second moment E[x x^T] (n, n) of its input.

    R is Cholesky's factor where there is one, as it costs a twentieth; else, since rounding may have made a singular moment indefinite, that of the
    eigendecomposition with clipped eigenvalues, which always exists. Float64: an eigenvalue found in float32 is off by more than the floor. Raises
    ValueError where `moment` holds NaN or Inf.
    """
    _check(moment)
    moment = moment.to(torch.float64, copy=True)
    floor = FLOOR * moment.trace().item()
    if floor == 0.0:  # of a Linear that is only given zeros
        return Metric(moment.new_ones(len(moment)))
    moment.diagonal().add_(floor)
    lower, failed = torch.linalg.cholesky_ex(moment)
    if not failed:
        return Metric(lower)
    values, vectors = torch.linalg.eigh(moment)
    return Metric(vectors.mul_(values.clamp_min_(floor).sqrt_()))


def whitened_peak_bytes(shape: Shape) -> int:
    """What `whitening` of that Linear's moment, and decomposing and cutting it in that metric, take, the moment itself included."""
    of_moment = shape.in_features**2
    return max((4 + 8 + 8 + 16) * of_moment, (4 + 8 + 4) * of_moment + peak_bytes(shape))  # the eigendecomposition works in twice its own size


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
