"""Metrics made of what calibration text tells: what an error of a weight costs, by the moments of its inputs or by
weights of single channels."""

import math

import torch
from torch import Tensor

from plrd_train.compress.algebra.gram import largest
from plrd_train.compress.algebra.truncate import Metric, Moment, Size, peak_bytes

# What no text has shown counts this share of all, and rounding, of either sign, no more. Sums in float32 round to 1e-7
# of the largest eigenvalue of a moment; yet the floor stands lower, since a single token with massive activations
# raises that eigenvalue a millionfold above the rest, and a floor as high as the rounding would then blur what matters.
FLOOR = 1e-8


def whitening(moment: Tensor) -> Moment | Metric:
    """The metric in which an error E of a weight costs E[||E x||^2] = tr(E S E^T), S being the second moment E[x x^T]
    (n, n) of its input.

    `moment` is S in float32 and symmetric; it is kept, not copied. Raises ValueError where it holds NaN or Inf.
    """
    _check(moment)
    floor = FLOOR * moment.trace().item()
    # The moment of a Linear that is only given zeros is zero.
    return Moment(moment, floor) if floor > 0.0 else Metric(moment.new_ones(len(moment)))


def whitened_peak_bytes(size: Size) -> int:
    """What decomposing and cutting a weight of that size in the metric of its inputs' moment takes, the moment itself
    included."""
    return 4 * size.in_features**2 + peak_bytes(size, right="moment")


def by_channel(weights: Tensor) -> Metric:
    """The metric in which an error counts `weights` (n,) times in each channel; a channel of weight 0 still counts a
    little.

    Raises ValueError where `weights` hold NaN or Inf.
    """
    _check(weights)
    floor = FLOOR**0.5 * weights.max().item()
    return Metric(weights.double().clamp_min(floor) if floor > 0.0 else torch.ones_like(weights))


def _check(statistic: Tensor) -> None:
    if not math.isfinite(largest(statistic)):
        raise ValueError(
            "what it is given on the calibration text is, or has squares that are, no finite float32 numbers"
        )
