"""Range estimators: from values to a scale and a zero point.

Weights: rows [channels, fan-in] -> scale [channels, 1], symmetric. Activations: a sample of values -> (scale, zero point), both 0-d.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from anybit.errors import InvalidSetting
from anybit.numerics.affine import quant_limits

ESTIMATORS = ("minmax", "percentile", "mse")

# A channel whose largest weight is 4096 times smaller than the tensor's is as good as zero. Its scale stays at this share
# of the largest, so that zero filters give no division by zero and their bias still fits an int32 accumulator.
SMALLEST_RELATIVE_SCALE = 2.0**-12

CACHED = 2**16
"""Numbers that a search processes together, chosen to fit the processor's cache."""

LARGEST = torch.finfo(torch.float32).max / 2**16
"""Largest value to quantize: a scale is a share of the largest value, and its multiples by 8-bit codes must be finite."""


@torch.no_grad()
def weight_scale(rows: Tensor, bits: int, estimator: str = "mse", candidates: int = 80, symmetric: bool = False) -> Tensor:
    """Return the symmetric scale of each row of `rows` [channels, fan-in], as [channels, 1].

    "minmax" maps the largest magnitude to quant_max; "mse" searches shrunken ranges for the least squared error of each row;
    "percentile" maps the 99.9th percentile of the magnitudes to quant_max. With `symmetric`, the lowest code is unused.
    """
    _check_estimator(estimator)
    quant_min, quant_max = quant_limits(bits, signed=True)
    quant_min = -quant_max if symmetric else quant_min
    if estimator == "percentile":
        largest = torch.quantile(rows.abs().float(), 0.999, dim=1, keepdim=True)
    else:
        largest = rows.abs().amax(dim=1, keepdim=True)
    # At two bits the codes are -2..1: scaling the largest magnitude to 1 wastes -2, which the search below can use.
    full = _positive(largest / quant_max)
    if estimator != "mse":
        return full
    # Squares of very large or small weights leave float32's range; a power of two changes nothing else.
    unit = 2.0 ** math.frexp(float(full.max()))[1]
    rows, full = rows / unit, full / unit
    together = max(1, CACHED // max(1, rows.shape[1]) if rows.device.type == "cpu" else len(rows))
    parts = zip(rows.split(together), full.split(together), strict=True)
    best = torch.cat([_least_error(part, ends, full.max(), (quant_min, quant_max), candidates) for part, ends in parts])
    return (unit * best).clamp_min(torch.finfo(best.dtype).tiny)


def _least_error(rows: Tensor, full: Tensor, largest: Tensor, limits: tuple[int, int], candidates: int) -> Tensor:
    """Return the scale of least squared error of each row, among shares of `full`, [channels, 1]."""
    shares = torch.tensor([step / candidates for step in range(1, candidates + 1)], dtype=rows.dtype, device=rows.device)
    best_scale, best_error = full.clone(), torch.full_like(full, torch.inf)
    for several in shares[:, None, None].split(max(1, CACHED // max(1, rows.numel()))):
        scales = _floored(full * several, largest)
        # `fake_quantize` at zero point 0: the time of a calibration's ranges is spent here.
        errors = (rows / scales).round_().clamp_(*limits).mul_(scales).sub_(rows).square_().sum(2, keepdim=True)
        error, index = errors.min(0)  # the first, where several are least
        best_scale = torch.where(error < best_error, scales.gather(0, index[None])[0], best_scale)
        best_error = torch.minimum(error, best_error)
    return best_scale


@torch.no_grad()
def activation_range(sample: Tensor, bits: int, estimator: str = "mse", candidates: int = 100) -> tuple[Tensor, Tensor]:
    """Return (scale, zero_point) for a flat `sample` of one tensor's values, as 0-d tensors; the zero point is an integer."""
    return affine_from_ends(*range_ends(sample, bits, estimator, candidates), bits)


@torch.no_grad()
def range_ends(sample: Tensor, bits: int, estimator: str = "mse", candidates: int = 100) -> tuple[Tensor, Tensor]:
    """Return (low, high), 0-d, of the range for a flat `sample` of one tensor's values.

    Zero is always exactly representable (padding is zero). "mse" shrinks the two ends in turn towards least squared error.
    """
    _check_estimator(estimator)
    low, high = torch.clamp(sample.min(), max=0.0), torch.clamp(sample.max(), min=0.0)
    if estimator == "percentile":
        ends = torch.quantile(sample.float(), torch.tensor([0.0005, 0.9995], device=sample.device))
        low, high = torch.clamp(ends[0], max=0.0), torch.clamp(ends[1], min=0.0)
    if estimator != "mse":
        return low, high

    errors = _squared_errors(sample, bits)

    def best_of(lows: list[float], highs: list[float]) -> int:
        return int(errors(low * torch.tensor(lows, device=low.device), high * torch.tensor(highs, device=high.device)).argmin())

    # Both ends shrink together first, then each alone around the best: the optimum is rarely symmetric.
    shares = [step / candidates for step in range(1, candidates + 1)]
    best_low = best_high = shares[best_of(shares, shares)]
    for _ in range(2):
        if low < 0:
            nearby = [best_low * factor / 20 for factor in range(10, 31) if best_low * factor / 20 <= 1]
            best_low = nearby[best_of(nearby, [best_high] * len(nearby))]
        if high > 0 and low < 0:
            nearby = [best_high * factor / 20 for factor in range(10, 31) if best_high * factor / 20 <= 1]
            best_high = nearby[best_of([best_low] * len(nearby), nearby)]
    return low * best_low, high * best_high


def _squared_errors(sample: Tensor, bits: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function from ends (low, high), [candidates] each, to the squared errors of `sample` in these ranges, [candidates].

    Sorted, the values that share a code are neighbours, and sums over neighbours are differences of running sums: a range costs
    2^bits look-ups, not a pass over the sample.
    """
    ordered = sample.sort().values
    # In float64, whose rounding is far below the error of any range.
    sums = torch.cat([torch.zeros(1, device=sample.device, dtype=torch.float64), ordered.double().cumsum(0)])
    total, codes = sample.double().square().sum(), torch.arange(2**bits, device=sample.device)

    def errors(lows: Tensor, highs: Tensor) -> Tensor:
        scale, zero = (end[:, None] for end in affine_from_ends(lows, highs, bits))
        inner = torch.searchsorted(ordered, (codes[1:] - 0.5 - zero) * scale)
        edges = torch.cat([torch.zeros_like(inner[:, :1]), inner, torch.full_like(inner[:, :1], len(ordered))], 1)
        values = (codes - zero).double() * scale.double()
        return total + (values.square() * edges.diff() - 2 * values * sums[edges].diff()).sum(1)

    return errors


def affine_from_ends(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return (scale, zero_point), 0-d, whose codes 0 .. 2^bits - 1 cover [low, high], with zero exactly."""
    quant_max = 2**bits - 1
    scale = (high - low) / quant_max
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero_point = torch.clamp(torch.round(-low / scale), 0, quant_max)
    return scale, zero_point


def _positive(scale: Tensor) -> Tensor:
    largest = scale.max()
    if not largest > 0:
        return torch.ones_like(scale)
    return _floored(scale, largest)


def _floored(scale: Tensor, largest: Tensor) -> Tensor:
    return scale.clamp_min(max(float(largest) * SMALLEST_RELATIVE_SCALE, torch.finfo(scale.dtype).tiny))


def _check_estimator(estimator: str) -> None:
    if estimator not in ESTIMATORS:
        raise InvalidSetting(f"Range estimator {estimator!r} is unknown. Choose from {', '.join(ESTIMATORS)}.")
