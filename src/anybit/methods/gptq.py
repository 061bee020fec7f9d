"""GPTQ with a corrected target: a layer's codes in closed form, from second moments of its inputs alone.

X are the float network's inputs of the layer, and Xq its inputs in the network quantized so far, as rows [samples, fan-in]:

    H = cov(Xq, Xq)     C = cov(X, Xq)
    W* = W + share W (C - H) (H + damping)^-1               with share 1, the free weight that repairs most of the error
    argmin over codes Q, scales s      tr (W* - s Q) H (W* - s Q)^T
    b* = b + W mean(X) - s Q mean(Xq)

The argmin is searched in three steps, the first of them for several scales of a channel, of which the best is kept:

    error feedback          round one input's weights after the other; later inputs compensate for the errors so far            (GPTQ)
    coordinate descent      set each code to its best value while all others are fixed, sweep after sweep                        (COMQ, OBC)
    least squares           find the best scale of a channel for its codes, then descend again

Sources: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR
2023, algorithm 1; Frantar, Singh, Alistarh, "Optimal Brain Compression", NeurIPS 2022; Li et al., "GPTAQ: Efficient Finetuning-Free
Quantization for Asymmetric Calibration", ICML 2025, for targets of the float network's inputs; Zhang et al., "COMQ: A Backpropagation-Free
Algorithm for Post-Training Quantization", 2024. Deviations:

  * Inputs are rounded in order of falling variance, in all groups of a convolution at once.
  * The target goes half of the way (`CORRECTED`), and is corrected as a whole before the first rounding, instead of column by column.
  * A channel for which rounding to nearest is better keeps that.
  * Errors are compensated by back substitution in the Cholesky factor of H, which gives the same codes without an inverse; and with few
    rows, H is never computed (numerics/quadratic.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.loops.moments import Moments
from anybit.numerics.affine import quant_limits
from anybit.numerics.quadratic import Quadratic, Step, blocks
from anybit.numerics.ranges import SMALLEST_RELATIVE_SCALE

CORRECTED = 0.5
"""Share of the way to W* that the target goes. The whole way fits the patches better and the network worse: W* shrinks a layer's outputs if
its inputs are noisy, and this adds up over layers."""
SHRUNK = (1.0, 0.9, 0.8, 0.7)
"""Shares of the scale of least squared weight error to try: under H, a finer grid that clips more is often better."""
TOGETHER = 2**22
"""Weights of a group that are solved at once, in whole channels: several tensors of this size, times the tries, are in memory."""

LARGEST_MOMENT = 1e30
"""Above it, or if a moment is NaN, products with errors would overflow float32."""


def gptq(weight: Tensor, moments: Moments, scale: Tensor, bits: int, rounded: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes, [groups, channels, fan-in], and scales, [groups, channels, k], of a layer: a `Solver` (see `loops.moments`).

    A layer whose inputs are so large that their squares overflow keeps its rounding to nearest.
    """
    form, cross = moments.form, moments.cross
    if not (form.largest() < LARGEST_MOMENT and (cross is None or cross.abs().amax() < LARGEST_MOMENT)):
        return rounded, scale
    target = weight if cross is None else corrected_target(weight, form, cross)
    solution = solve(target, form, scale, bits, rounded)
    return solution.codes, solution.scale


@dataclass(frozen=True)
class Solution:
    """Codes [groups, channels, fan-in], as floats, and scales [groups, channels, scales per channel]."""

    codes: Tensor
    scale: Tensor


def corrected_target(weight: Tensor, form: Quadratic, cross: Tensor, damping: float = 0.01) -> Tensor:
    """Return the target [groups, channels, fan-in] for weights W; `form` is H, and `cross` C or, with a thin H, X's factor.

    `damping` is a share of the mean variance.
    """
    return weight + CORRECTED * form.towards(weight, cross, damping)


def solve(
    target: Tensor, form: Quadratic, scale: Tensor, bits: int, rounded: Tensor | None = None, damping: float = 0.01, sweeps: int = 4
) -> Solution:
    """Return codes and scales of small error under H; no channel's error exceeds that of `rounded` at `scale`.

    target    W*, [groups, channels, fan-in]
    form      H
    scale     [groups, channels, k], positive: scales of least squared weight error, for k equal parts of the fan-in
    rounded   codes to compare with; by default those of the target rounded to nearest
    """
    limits = quant_limits(bits, signed=True)
    rounded = _nearest(target, _spread(scale, target), limits) if rounded is None else rounded
    order = form.variance().argsort(stable=True, dim=1)  # rounding begins at the end
    ordered = form.ordered(order)
    elimination = _Elimination(order, ordered, list(ordered.elimination(damping)))
    search = _Search(form, elimination, limits, scale.max() * SMALLEST_RELATIVE_SCALE, sweeps)
    together = max(1, TOGETHER // target.shape[2])
    parts = zip(*(one.split(together, 1) for one in (target, scale, rounded)), strict=True)
    solutions = [search.solved(*(one.transpose(1, 2).contiguous() for one in part)) for part in parts]
    codes, scales = (torch.cat(one, 2).transpose(1, 2) for one in zip(*solutions, strict=True))
    return Solution(codes, scales)


def quadratic_error(target: Tensor, form: Quadratic, codes: Tensor, scale: Tensor) -> Tensor:
    """Return the error of each channel under H, [groups, channels]."""
    residual = (target - codes * _spread(scale, target)).transpose(1, 2)
    images = form.images(residual)
    return form.products(residual, images, images)


def _spread(scale: Tensor, weight: Tensor, dim: int = 2) -> Tensor:
    """Return scales of equal parts of dimension `dim`, shaped to broadcast over `weight`."""
    return scale if scale.shape[dim] == 1 else scale.repeat_interleave(weight.shape[dim] // scale.shape[dim], dim)


def _nearest(weight: Tensor, scale: Tensor, limits: tuple[int, int]) -> Tensor:
    return torch.round(weight / scale).clamp_(*limits)


@dataclass(frozen=True)
class _Elimination:
    """The steps of rounding, the form of the inputs in their order, and that order, [groups, fan-in]."""

    order: Tensor
    form: Quadratic
    steps: list[Step]


@dataclass(frozen=True)
class _Search:
    """The search in some channels of a layer. Tensors are [groups, fan-in, channels], since an input's weights are processed together, and
    scales [groups, k, channels]."""

    form: Quadratic
    elimination: _Elimination
    limits: tuple[int, int]
    floor: Tensor
    sweeps: int

    def solved(self, target: Tensor, scale: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor]:
        """Return (codes, scales)."""
        codes, scales = self._fed_back(target, scale)
        images = self.form.images(target - codes * _spread(scales, target, 1))
        for _ in range(2):
            scales = self._least_squares(codes, scales, images)
            codes = self._descended(codes, scales, images)
        scales = self._least_squares(codes, scales, images)
        codes = torch.where(self._alive(), codes, _nearest(target, _spread(scales, target, 1), self.limits))
        errors = []
        for one, its_scale in ((rounded, scale), (codes, scales)):
            residual = target - one * _spread(its_scale, target, 1)
            errors.append(self.form.products(residual, *2 * [self.form.images(residual)]))
        behind = errors[0] < errors[1]
        return torch.where(behind[:, None], rounded, codes), torch.where(behind[:, None], scale, scales)

    def _fed_back(self, target: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes and scales of the best try: one input after the other is rounded, and later ones compensate for its error."""
        tries, form, order = len(SHRUNK), self.elimination.form, self.elimination.order[:, :, None]
        many, scales = target.gather(1, order.expand_as(target)).repeat(1, 1, tries), torch.cat([share * scale for share in SHRUNK], 2)
        spread = scales
        if scale.shape[1] > 1:
            spread = _spread(scales, many, 1).gather(1, order.expand_as(many))
        codes, errors = torch.empty_like(many), torch.empty_like(many)
        state = None
        for block, triangle, pull in self.elimination.steps:
            local, wide = many[:, block], _part(spread, block).expand(-1, block.stop - block.start, -1)
            best = local.clone() if state is None else torch.baddbmm(local, pull, state)
            for j in range(best.shape[1] - 1, -1, -1):
                code = codes[:, block.start + j] = _nearest(best[:, j], wide[:, j], self.limits)
                error = torch.addcmul(local[:, j], code, wide[:, j], value=-1, out=errors[:, block.start + j])
                best[:, :j].baddbmm_(triangle[:, :j, j, None], error[:, None])
            state = form.state(errors, block, state)
        factor, error = self._rescaled(errors, many.sub_(errors), form)
        best = error.unflatten(1, (tries, -1)).argmin(1)
        picked = _pick(codes, best, tries)
        return torch.empty_like(picked).scatter_(1, order.expand_as(picked), picked), _pick(scales * factor[:, None], best, tries)

    def _rescaled(self, errors: Tensor, values: Tensor, form: Quadratic) -> tuple[Tensor, Tensor]:
        """Return the factor on a channel's values of least error, [groups, channels], and that error."""
        images, own = form.images(errors), form.images(values)
        slope, power = (form.products(values, own, other) for other in (images, own))
        factor = 1 + slope / power.clamp_min(1e-30)
        usable = (power > 0) & torch.isfinite(factor) & (factor > 0.5)
        before = form.products(errors, images, images)
        return torch.where(usable, factor, 1.0), torch.where(usable, before - slope * (factor - 1), before)

    def _descended(self, codes: Tensor, scale: Tensor, images: Tensor) -> Tensor:
        """Return the codes after at most `sweeps` sweeps, in each of which single codes move to their best value.

        `images`, those of the residual, are updated in place.

        A sweep visits the inputs for which some channel's code has a better value when the sweep reaches their block. Channels that a sweep
        did not change are done.
        """
        spread = _spread(scale, codes, 1)

        result, all_images, left = codes.clone(), images, torch.arange(codes.shape[2], device=codes.device)
        codes, images = codes.clone(), images.clone()
        for _ in range(self.sweeps):
            moved = self._sweep(codes, spread, images)
            result[:, :, left], all_images[:, :, left] = codes, images
            if not moved.any():
                break
            left, codes, spread, images = left[moved], *(part[:, :, moved] for part in (codes, spread, images))
        return result

    def _sweep(self, codes: Tensor, spread: Tensor, images: Tensor) -> Tensor:
        """Set one code after the other to its best value, codes and images in place; returns which channels changed."""
        changed = torch.zeros(codes.shape[2], dtype=torch.bool, device=codes.device)
        inverse = torch.where(self._alive(), 1 / self.form.variance()[:, :, None], 0.0)
        for block in blocks(codes.shape[1]):
            slope, here = self.form.slopes(images, block), codes[:, block]
            wide = _part(spread, block).expand_as(here)
            steps = inverse[:, block] / wide  # of a code, per slope of its weight
            visited = (_best(here, slope, steps, self.limits) != here).any(2).any(0).nonzero().flatten().tolist()
            if not visited:
                continue
            slope, inner, moves = slope.clone(), self.form.inner(block), torch.zeros_like(here)
            for j in visited:
                best = _best(here[:, j], slope[:, j], steps[:, j], self.limits)
                torch.mul(best - here[:, j], wide[:, j], out=moves[:, j])
                here[:, j] = best
                slope.baddbmm_(inner[:, :, j, None], moves[:, j, None], alpha=-1)
            changed |= moves.any(1).any(0)
            images -= self.form.images(moves, block)
        return changed

    def _alive(self) -> Tensor:
        """Return the inputs that vary, [groups, fan-in, 1]. The codes of others do not matter, and are then rounded to nearest."""
        variance = self.form.variance()[:, :, None]
        return variance > 1e-12 * variance.amax(1, keepdim=True).clamp_min(1e-30)

    def _least_squares(self, codes: Tensor, scale: Tensor, images: Tensor) -> Tensor:
        """Return the best scale of each part of a channel for its codes, one part after the other; an invalid scale is not taken.

        `images`, those of the residual, are updated in place.
        """
        scale, parts = scale.clone(), scale.shape[1]
        width = codes.shape[1] // parts
        for part in range(parts):
            block = slice(part * width, (part + 1) * width)
            local, own = codes[:, block], self.form.images(codes[:, block], block)
            slope, power = ((self.form.slopes(one, block) * local).sum(1) for one in (images, own))
            better = scale[:, part] + slope / power.clamp_min(1e-30)
            usable = (power > 0) & torch.isfinite(better) & (better > self.floor)
            better = torch.where(usable, better, scale[:, part])
            images -= own * (better - scale[:, part])[:, None]
            scale[:, part] = better
        return scale


def _part(spread: Tensor, block: slice) -> Tensor:
    """Return a block of scales that are shared by all inputs or given for each."""
    return spread if spread.shape[1] == 1 else spread[:, block]


def _pick(tried: Tensor, best: Tensor, tries: int) -> Tensor:
    """Select from [groups, ..., tries * channels] each channel's try `best`, [groups, channels], as [groups, ..., channels]."""
    apart = tried.unflatten(2, (tries, -1))
    return apart.gather(2, best[:, None, None].expand(-1, apart.shape[1], 1, -1)).squeeze(2)


def _best(codes: Tensor, slope: Tensor, step: Tensor, limits: tuple[int, int]) -> Tensor:
    """Return the best value of each code with all others fixed."""
    return torch.addcmul(codes, slope, step).round_().clamp_(*limits)
