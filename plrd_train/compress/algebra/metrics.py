"""Metrics from statistics of calibration text: the cost of an error of a weight, by the second moment of its inputs or
by a weight for each channel."""

import math

import torch
from torch import Tensor

from plrd_train.compress.algebra.gram import largest
from plrd_train.compress.algebra.truncate import Metric, Moment, Size, peak_bytes

# Lower clamp on the cost of a direction, relative to the trace of the moment: for directions that the text does not
# show, and against rounding. Float32 sums round to 1e-7 of the largest eigenvalue. The clamp is lower, as one token
# with massive activations raises that eigenvalue a millionfold above the others; a clamp at 1e-7 would then hide what
# matters.
FLOOR = 1e-8


def whitening(moment: Tensor) -> Moment | Metric:
    """The metric in which an error E of a weight costs E[||E x||^2] = tr(E S E^T), S being the second moment E[x x^T]
    (n, n) of its input.

    `moment` is S, float32 and symmetric; it is not copied. Raises ValueError where it holds NaN or Inf.
    """
    _check(moment)
    floor = FLOOR * moment.trace().item()
    # The moment is zero where all inputs are.
    return Moment(moment, floor) if floor > 0.0 else Metric(moment.new_ones(len(moment)))


def whitened_peak_bytes(size: Size) -> int:
    """The most bytes that decomposing and cutting a weight of that size in the metric of its inputs' moment takes, the
    moment included."""
    return 4 * size.in_features**2 + peak_bytes(size, right="moment")


def by_channel(weights: Tensor) -> Metric:
    """The metric in which the error of each channel is multiplied by its entry of `weights` (n,), clamped from below.

    Raises ValueError where `weights` hold NaN or Inf.
    """
    _check(weights)
    floor = FLOOR**0.5 * weights.max().item()
    return Metric(weights.double().clamp_min(floor) if floor > 0.0 else torch.ones_like(weights))


def _check(statistic: Tensor) -> None:
    if not math.isfinite(largest(statistic)):
        raise ValueError("its inputs on the calibration text, or their squares, are no finite float32 numbers")
