"""Codes in closed form: never worse than rounding to nearest, near-optimal, robust to singular H."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybit.loops.moments import Moments
from anybit.methods.gptq import CORRECTED, corrected_target, gptq, quadratic_error, solve
from anybit.numerics.affine import quant_limits
from anybit.numerics.quadratic import Full, Thin
from anybit.numerics.ranges import weight_scale


def problem(seed: int, groups: int, channels: int, fan_in: int, rank: int, parts: int = 1):
    """Return (weight, Hessian of this rank, scales of `parts` of each channel), with a dead input if the fan-in allows it."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(groups, rank, fan_in, generator=generator) @ torch.randn(groups, fan_in, fan_in, generator=generator)
    if fan_in > 2:
        rows[..., -1] = 0.0
    weight = torch.randn(groups, channels, fan_in, generator=generator)
    return (
        weight,
        rows.transpose(1, 2) @ rows / rank,
        lambda bits: weight_scale(weight.reshape(-1, fan_in // parts), bits).view(groups, channels, parts),
    )


def scales(weight, parts, bits):
    return weight_scale(weight.view(-1, weight.shape[-1] // parts), bits).view(*weight.shape[:2], parts)


def nearest(weight, scale, bits):
    spread = scale.repeat_interleave(weight.shape[-1] // scale.shape[-1], -1)
    return torch.round(weight / spread).clamp(*quant_limits(bits, signed=True))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    groups=st.integers(1, 3),
    channels=st.integers(1, 4),
    fan_in=st.sampled_from([1, 2, 6, 12]),
    rank=st.sampled_from([1, 3, 40]),
    bits=st.integers(2, 8),
    parts=st.sampled_from([1, 2]),
)
def test_error_is_at_most_that_of_rounding_to_nearest(seed, groups, channels, fan_in, rank, bits, parts):
    parts = parts if fan_in % parts == 0 else 1
    weight, hessian, scale_of = problem(seed, groups, channels, fan_in, rank, parts)
    scale = scale_of(bits)
    solution = solve(weight, Full(hessian), scale, bits)
    low, high = quant_limits(bits, signed=True)
    assert torch.equal(solution.codes, solution.codes.round()) and solution.codes.min() >= low and solution.codes.max() <= high
    assert torch.isfinite(solution.scale).all() and (solution.scale > 0).all() and solution.scale.shape == scale.shape
    before = quadratic_error(weight, Full(hessian), nearest(weight, scale, bits), scale)
    after = quadratic_error(weight, Full(hessian), solution.codes, solution.scale)
    assert (after <= before * (1 + 1e-4) + 1e-6 * hessian.abs().max()).all()


def test_small_layers_are_near_optimal():
    weight, hessian, scale_of = problem(0, 1, 60, 4, 40)
    solution = solve(weight, Full(hessian), scale_of(2), 2)
    every = torch.tensor(list(itertools.product(range(-2, 2), repeat=4)), dtype=torch.float32)
    residual = weight[0, :, None] - every * solution.scale[0, :, None]  # [channels, all codes, fan-in]
    best = ((residual @ hessian[0]) * residual).sum(-1).amin(1)
    error = quadratic_error(weight, Full(hessian), solution.codes, solution.scale)[0]
    rounded = quadratic_error(weight, Full(hessian), nearest(weight, scale_of(2), 2), scale_of(2))[0]
    assert error.sum() <= 1.1 * best.sum() < 0.7 * rounded.sum()


@pytest.mark.parametrize("seed", range(20))
def test_weight_on_the_grid_is_unchanged(seed):
    torch.manual_seed(seed)
    codes = torch.randint(-8, 8, (2, 3, 6)).float()  # some of them of an input that never varies
    codes[..., 0] = -8  # so that least squares recovers this grid
    _, hessian, _ = problem(0, 2, 3, 6, 40)
    scale = torch.rand(2, 3, 1) + 0.5
    solution = solve(codes * scale, Full(hessian), scale, 4)
    torch.testing.assert_close(solution.codes * solution.scale, codes * scale, rtol=1e-4, atol=1e-4)


def test_target_is_unchanged_by_equal_inputs_and_compensates_scaled_ones():
    weight, hessian, _ = problem(0, 2, 3, 6, 40)
    hessian = hessian + torch.eye(6)
    assert torch.equal(corrected_target(weight, Full(hessian), hessian), weight)
    halved = corrected_target(weight, Full(hessian / 4), hessian / 2, damping=0.0)  # Xq = X / 2: W* = 2 W
    torch.testing.assert_close(halved, (1 + CORRECTED) * weight, rtol=1e-3, atol=1e-3)


def test_dead_inputs_and_zero_weights_give_finite_codes():
    dead = Moments(Full(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4), (torch.zeros(1, 4), torch.zeros(1, 4)))
    weight, scale = torch.tensor([[[1.0, -0.5, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0]]]), torch.tensor([[[0.5], [1.0]]])
    rounded = nearest(weight, scale, 4)
    codes, scales = gptq(weight, dead, scale, 4, rounded)
    assert torch.isfinite(codes).all() and torch.isfinite(scales).all() and (scales > 0).all()
    assert torch.equal(codes[0, 1], torch.zeros(4))


def few_rows(rank, fan_in, groups=2):
    """Return (factors of Xq and of X), [groups, rank, fan_in], as from few inputs."""
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(groups, rank, fan_in, generator=generator) + torch.randn(groups, rank, 1, generator=generator)
    return seen / rank**0.5, (seen + 0.1 * torch.randn(groups, rank, fan_in, generator=generator)) / rank**0.5


def test_factors_give_the_targets_and_codes_of_their_matrix():
    seen, other = few_rows(9, 70)
    thin, full = Thin(seen), Full(seen.transpose(1, 2) @ seen)
    weight = torch.randn(2, 40, 70, generator=torch.Generator().manual_seed(1))
    targets = corrected_target(weight, thin, other), corrected_target(weight, full, other.transpose(1, 2) @ seen)
    torch.testing.assert_close(*targets, rtol=1e-3, atol=1e-3)
    by_rows, by_matrix = (solve(weight, form, scales(weight, 1, 4), 4) for form in (thin, full))
    assert (by_rows.codes == by_matrix.codes).float().mean() > 0.95  # except for ties and float rounding
    errors = [float(quadratic_error(weight, full, one.codes, one.scale).sum()) for one in (by_rows, by_matrix)]
    assert abs(errors[0] / errors[1] - 1) < 0.03


def test_wide_layer_with_few_rows_needs_no_full_matrix():
    seen, _ = few_rows(8, 6000, groups=1)  # a matrix of 6000 x 6000 would take seconds and 144 MB
    weight = torch.randn(1, 4, 6000, generator=torch.Generator().manual_seed(1))
    scale = scales(weight, 1, 4)
    solution = solve(weight, Thin(seen), scale, 4)
    before = quadratic_error(weight, Thin(seen), nearest(weight, scale, 4), scale)
    assert (quadratic_error(weight, Thin(seen), solution.codes, solution.scale) < 0.1 * before).all()


def test_channels_solved_in_chunks_equal_those_solved_together(monkeypatch):
    weight, hessian, scale_of = problem(0, 2, 7, 12, 40)
    together = solve(weight, Full(hessian), scale_of(3), 3)
    monkeypatch.setattr("anybit.methods.gptq.TOGETHER", 24)
    apart = solve(weight, Full(hessian), scale_of(3), 3)
    assert torch.equal(together.codes, apart.codes)
    torch.testing.assert_close(together.scale, apart.scale)
