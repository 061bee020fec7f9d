"""GPTQ with a corrected target: the codes of a layer's weight in closed form, from second moments of its inputs alone.

X are the float network's inputs of the layer and Xq those that the network quantized so far gives it, as rows [samples, fan-in]:

    H = cov(Xq, Xq)     C = cov(X, Xq)
    W* = W + share W (C - H) (H + damping)^-1               share 1: the weight that repairs most of the error, were weights free
    argmin over codes Q, scales s      tr (W* - s Q) H (W* - s Q)^T
    b* = b + W mean(X) - s Q mean(Xq)

The argmin is searched in three steps, the first for several scales of a channel at once, of which the best is taken:

    error feedback          round one input's weights after the other; the others take up the error of those that are rounded   (GPTQ)
    coordinate descent      put each code to its best value while all others are fixed, sweep after sweep                        (COMQ, OBC)
    least squares           the best scale of a channel for its codes, then descent again

Sources: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR
2023, algorithm 1; Frantar, Singh, Alistarh, "Optimal Brain Compression", NeurIPS 2022; Li et al., "GPTAQ: Efficient Finetuning-Free
Quantization for Asymmetric Calibration", ICML 2025, for targets of the float network's inputs; Zhang et al., "COMQ: A Backpropagation-Free
Algorithm for Post-Training Quantization", 2024. Deviations:

  * Inputs are rounded in the order of their falling variance, in all groups of a convolution at once.
  * The target goes half of the way (`CORRECTED`), and is corrected as a whole before the first rounding, instead of column by column.
  * A channel whose rounding to nearest is better after all gets that.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.loops.moments import Moments
from anybit.numerics.affine import quant_limits
from anybit.numerics.ranges import SMALLEST_RELATIVE_SCALE

COLUMNS = 32
"""Inputs whose changes are worked off among themselves before the rest of the matrix takes them up, in one product."""
CORRECTED = 0.5
"""Share of the way to W* that the target goes. All of it fits the patches better and the network worse: W* shrinks a layer's outputs where
its inputs are noisy, and layer after layer adds to it."""
SHRUNK = (1.0, 0.9, 0.8, 0.7)
"""Shares of the scale of least squared weight error that are tried: under H, a finer grid that clips more is often better."""

LARGEST_MOMENT = 1e30
"""Above it, or where a moment is NaN, products with errors would leave the range of float32."""
SMALLEST_VARIANCE = 1e-35
"""Below it, on average, inputs count as ones that never move: the inverse would leave the range of float32."""


def gptq(weight: Tensor, moments: Moments, scale: Tensor, bits: int, rounded: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes, [groups, channels, fan-in], and scales, [groups, channels, k], of a layer: a `Solver` (see `loops.moments`).

    A layer whose inputs are too large for their squares to be numbers keeps its rounding to nearest.
    """
    if not all(part.abs().amax() < LARGEST_MOMENT for part in (moments.hessian, moments.cross)):
        return rounded, scale
    target = weight if moments.cross is moments.hessian else corrected_target(weight, moments.hessian, moments.cross)
    solution = solve(target, moments.hessian, scale, bits, rounded)
    return solution.codes, solution.scale


@dataclass(frozen=True)
class Solution:
    """Hold codes [groups, channels, fan-in], as floats, and scales [groups, channels, scales a channel]."""

    codes: Tensor
    scale: Tensor


def corrected_target(weight: Tensor, hessian: Tensor, cross: Tensor, damping: float = 0.01) -> Tensor:
    """Return the target [groups, channels, fan-in] of weights W; `hessian` and `cross` are H and C, [groups, fan-in, fan-in].

    `damping` is a share of the mean variance.
    """
    shift = weight @ (cross - hessian)
    return weight + CORRECTED * torch.linalg.solve(_damped(hessian, damping), shift, left=False)


def solve(
    target: Tensor, hessian: Tensor, scale: Tensor, bits: int, rounded: Tensor | None = None, damping: float = 0.01, sweeps: int = 4
) -> Solution:
    """Return codes and scales of small error under H, in no channel above that of `rounded` at `scale`.

    target    W*, [groups, channels, fan-in]
    hessian   H, [groups, fan-in, fan-in], symmetric and positive semidefinite; it may be singular
    scale     [groups, channels, k], positive: scales of least squared weight error, of k equal parts of the fan-in
    rounded   codes that must not be better; left out, those of the target rounded to nearest
    """
    limits = quant_limits(bits, signed=True)
    rounded = _nearest(target, _spread(scale, target), limits) if rounded is None else rounded
    floor, tries = scale.max() * SMALLEST_RELATIVE_SCALE, len(SHRUNK)
    many, scales = target.repeat(1, tries, 1), torch.cat([share * scale for share in SHRUNK], 1)
    codes = _error_feedback(many, hessian, _spread(scales, many), limits, damping)
    scales = _least_squares(many, hessian, codes, scales, floor)
    best = quadratic_error(many, hessian, codes, scales).unflatten(1, (tries, -1)).argmin(1)
    codes, scales = _pick(codes, best, tries), _pick(scales, best, tries)
    for _ in range(2):
        codes = _descend(target, hessian, codes, _spread(scales, target), limits, sweeps)
        scales = _least_squares(target, hessian, codes, scales, floor)
    behind = quadratic_error(target, hessian, rounded, scale) < quadratic_error(target, hessian, codes, scales)
    return Solution(torch.where(behind[..., None], rounded, codes), torch.where(behind[..., None], scale, scales))


def quadratic_error(target: Tensor, hessian: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Return the error of each channel under H, [groups, channels]."""
    residual = target - codes * _spread(scale, target)
    return ((residual @ hessian) * residual).sum(-1)


def _pick(tried: Tensor, best: Tensor, tries: int) -> Tensor:
    """Return [groups, channels, ...] of [groups, tries * channels, ...]: of each channel the try `best`."""
    apart = tried.unflatten(1, (tries, -1))
    return apart.gather(1, best[:, None, :, None].expand(-1, 1, -1, apart.shape[-1])).squeeze(1)


def _spread(scale: Tensor, weight: Tensor) -> Tensor:
    """Return scales [groups, channels, k] so that they broadcast over weights of the same channels."""
    return scale if scale.shape[-1] == 1 else scale.repeat_interleave(weight.shape[-1] // scale.shape[-1], -1)


def _nearest(weight: Tensor, scale: Tensor, limits: tuple[int, int]) -> Tensor:
    return torch.round(weight / scale).clamp_(*limits)


def _damped(hessian: Tensor, damping: float) -> Tensor:
    """Return H with `damping` times the mean variance on its diagonal, 1 where that is next to nothing."""
    variance = torch.diagonal(hessian, dim1=1, dim2=2).mean(1)
    ridge = torch.where(variance > SMALLEST_VARIANCE, damping * variance, torch.ones_like(variance))
    return hessian + torch.diag_embed(ridge[:, None].expand(-1, hessian.shape[1]))


def _error_feedback(weight: Tensor, hessian: Tensor, scale: Tensor, limits: tuple[int, int], damping: float) -> Tensor:
    """Return codes [groups, channels, fan-in]: input after input is rounded, and those to come make up for its error."""
    order = torch.diagonal(hessian, dim1=1, dim2=2).argsort(stable=True, dim=1, descending=True)
    columns = order[:, :, None].expand(-1, -1, weight.shape[1])
    free = weight.transpose(1, 2).gather(1, columns)  # [groups, fan-in, channels], since an input's weights are worked on together
    spread = scale.expand_as(weight).transpose(1, 2).gather(1, columns)
    sorted_hessian = hessian.gather(1, order[:, :, None].expand_as(hessian)).gather(2, order[:, None, :].expand_as(hessian))
    lower = torch.linalg.cholesky(_damped(sorted_hessian, damping))
    feedback = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)  # row j: what rounding input j passes on
    passed = (feedback / torch.diagonal(feedback, dim1=1, dim2=2)[:, :, None]).transpose(1, 2)  # column j: the same for an error of 1

    codes = torch.empty_like(free)
    for start in range(0, free.shape[1], COLUMNS):
        block, rest = slice(start, start + COLUMNS), slice(start + COLUMNS, None)
        local, wide, inner = free[:, block], spread[:, block], passed[:, block, block]
        errors = torch.empty_like(local)
        for j in range(local.shape[1]):
            code = _nearest(local[:, j], wide[:, j], limits)
            codes[:, start + j] = code
            errors[:, j] = torch.addcmul(local[:, j], code, wide[:, j], value=-1)
            local[:, j + 1 :].baddbmm_(inner[:, j + 1 :, j, None], errors[:, j, None], alpha=-1)
        free[:, rest].baddbmm_(passed[:, rest, block], errors, alpha=-1)
    return torch.empty_like(codes).scatter_(1, columns, codes).transpose(1, 2)


def _descend(target: Tensor, hessian: Tensor, codes: Tensor, scale: Tensor, limits: tuple[int, int], sweeps: int) -> Tensor:
    """Return codes of which a sweep of single changes, each the best of its code, has lowered the error; `sweeps` at most.

    A sweep visits the inputs of which some channel's code has a better value as the sweep comes to their block. Channels that a sweep
    has left alone are done.
    """
    spread = scale.expand_as(target).transpose(1, 2).contiguous()  # [groups, fan-in, channels], as in error feedback
    target, codes = target.transpose(1, 2), codes.transpose(1, 2).contiguous()
    variance = torch.diagonal(hessian, dim1=1, dim2=2)[:, :, None]
    alive = variance > 1e-12 * variance.amax(1, keepdim=True).clamp_min(1e-30)  # an input that never moves leaves its code open
    step = torch.where(alive, 1 / (variance * spread), 0.0)  # of a code, by the slope of its weight

    result, left = codes.clone(), torch.arange(codes.shape[2], device=codes.device)
    for _ in range(sweeps):
        moved = _sweep(torch.addcmul(target, codes, spread, value=-1), hessian, codes, spread, step, limits)
        result[:, :, left] = codes
        if not moved.any():
            break
        left, target, codes, spread, step = left[moved], *(part[:, :, moved] for part in (target, codes, spread, step))
    return result.transpose(1, 2)


def _sweep(residual: Tensor, hessian: Tensor, codes: Tensor, spread: Tensor, step: Tensor, limits: tuple[int, int]) -> Tensor:
    """Put code after code to its best value, in place; returns which channels have changed. All but H are [groups, fan-in, channels]."""
    slope = hessian @ residual  # half the negative gradient by the weight
    changed = torch.zeros(codes.shape[2], dtype=torch.bool, device=codes.device)
    for start in range(0, codes.shape[1], COLUMNS):
        block, rest = slice(start, start + COLUMNS), slice(start + COLUMNS, None)
        local, here, inner = slope[:, block], codes[:, block], hessian[:, block, block]
        differs = _best(here, local, step[:, block], limits) != here
        visited = differs.any(2).any(0).nonzero().flatten().tolist()
        if not visited:
            continue
        local, moves = local.clone(), torch.zeros_like(local)
        for j in visited:
            best = _best(here[:, j], local[:, j], step[:, start + j], limits)
            torch.mul(best - here[:, j], spread[:, start + j], out=moves[:, j])
            here[:, j] = best
            local.baddbmm_(inner[:, :, j, None], moves[:, j, None], alpha=-1)
        changed |= moves.any(1).any(0)
        slope[:, rest].baddbmm_(hessian[:, rest, block], moves, alpha=-1)
    return changed


def _best(codes: Tensor, slope: Tensor, step: Tensor, limits: tuple[int, int]) -> Tensor:
    """Return the best value of each code while all others stay."""
    return torch.addcmul(codes, slope, step).round_().clamp_(*limits)


def _least_squares(target: Tensor, hessian: Tensor, codes: Tensor, scale: Tensor, floor: Tensor) -> Tensor:
    """Return the best scale of each part of a channel for its codes, one part after the other; one that would be no scale stays."""
    scale, parts = scale.clone(), scale.shape[-1]
    width = target.shape[-1] // parts
    for part in range(parts):
        block = slice(part * width, (part + 1) * width)
        slope = ((target - codes * _spread(scale, target)) @ hessian[:, :, block] * codes[:, :, block]).sum(-1)
        power = ((codes[:, :, block] @ hessian[:, block, block]) * codes[:, :, block]).sum(-1)
        better = scale[:, :, part] + slope / power.clamp_min(1e-30)
        usable = (power > 0) & torch.isfinite(better) & (better > floor)
        scale[:, :, part] = torch.where(usable, better, scale[:, :, part])
    return scale
