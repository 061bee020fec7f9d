"""Range estimators: positive finite scales, zero exact, and the guarantee of each estimator."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from anybit.errors import InvalidSetting
from anybit.numerics.affine import fake_quantize, quant_limits
from anybit.numerics.ranges import ESTIMATORS, activation_range, affine_from_ends, range_ends, weight_scale

few = settings(max_examples=40, deadline=None)
bit_widths = st.integers(2, 8)
estimators = st.sampled_from(ESTIMATORS)
ordinary = st.floats(-100, 100, width=32).filter(lambda x: x == 0 or abs(x) > 0.1)


def tensors(shape, elements=st.floats(-100, 100, width=32)):
    return arrays(np.float32, shape, elements=elements).map(torch.from_numpy)


def squared_error(x, scale, zero_point, limits):
    return (fake_quantize(x, scale, zero_point, *limits) - x).square()


def row_errors(rows, bits, estimator):
    return squared_error(rows, weight_scale(rows, bits, estimator), torch.zeros(()), quant_limits(bits, signed=True)).sum(1)


@few
@given(tensors((3, 6)), bit_widths, estimators)
@example(torch.zeros(2, 3), 4, "mse")
@example(torch.tensor([[0.0], [1e-43]]), 4, "minmax")
def test_every_row_has_a_positive_finite_scale(rows, bits, estimator):
    scale = weight_scale(rows, bits, estimator)
    assert scale.shape == (len(rows), 1)
    assert (scale > 0).all() and torch.isfinite(scale).all()


@few
@given(tensors((2, 6), ordinary), bit_widths)
def test_mse_is_never_worse_than_minmax_in_any_row(rows, bits):
    assert (row_errors(rows, bits, "mse") <= row_errors(rows, bits, "minmax") * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_mse_is_never_worse_than_minmax_in_rows_that_are_nearly_zero(bits):
    sizes = 2.0 ** -torch.linspace(0, 20, 101)[:, None]
    rows = torch.randn(101, 16, generator=torch.Generator().manual_seed(bits)) * sizes
    assert (row_errors(rows, bits, "mse") <= row_errors(rows, bits, "minmax") * (1 + 1e-5)).all()


@few
@given(tensors((2, 6), ordinary), bit_widths)
def test_minmax_clips_no_positive_weight(rows, bits):
    scale = weight_scale(rows, bits, "minmax")
    values = fake_quantize(rows, scale, torch.zeros(()), *quant_limits(bits, signed=True))
    assert ((values - rows).abs() <= scale * (0.5 + 1e-4)).all()


@few
@given(tensors((2, 6), ordinary), bit_widths, estimators, st.integers(-6, 6))
def test_weight_scales_are_equivariant_to_powers_of_two(rows, bits, estimator, exponent):
    factor = 2.0**exponent
    assert torch.equal(weight_scale(rows * factor, bits, estimator), weight_scale(rows, bits, estimator) * factor)


@few
@given(tensors((3, 6), ordinary.filter(bool)), bit_widths, estimators)
def test_scale_of_a_row_depends_only_on_that_row(rows, bits, estimator):
    together = weight_scale(rows, bits, estimator)
    alone = torch.cat([weight_scale(row[None], bits, estimator) for row in rows])
    if estimator != "mse":
        assert torch.equal(together, alone)
    # Sums over one and several rows may round differently, and either of two equally good scales may be chosen.
    errors = (squared_error(rows, scale, torch.zeros(()), quant_limits(bits, signed=True)).sum(1) for scale in (together, alone))
    torch.testing.assert_close(*errors)


@few
@given(tensors((2, 6), ordinary), bit_widths, st.sampled_from(["minmax", "mse"]))
def test_weights_on_the_grid_are_unchanged(rows, bits, estimator):
    low, high = quant_limits(bits, signed=True)
    codes = rows.round().clamp(-high, high)
    codes[:, 0] = high
    values = fake_quantize(codes, weight_scale(codes, bits, estimator), torch.zeros(()), low, high)
    assert torch.equal(values, codes)


@few
@given(tensors(12), bit_widths, estimators)
@example(torch.zeros(5), 4, "mse")
@example(torch.full((5,), -3.0), 4, "mse")
@example(torch.full((5,), 3.0), 4, "percentile")
def test_activations_have_a_positive_scale_and_an_exact_integer_zero_point(sample, bits, estimator):
    scale, zero_point = activation_range(sample, bits, estimator)
    limits = quant_limits(bits, signed=False)
    assert scale.shape == zero_point.shape == ()
    assert scale > 0 and torch.isfinite(scale)
    assert zero_point == zero_point.round() and limits[0] <= zero_point <= limits[1]
    assert fake_quantize(torch.zeros(1), scale, zero_point, *limits) == 0


@few
@given(tensors(12, ordinary), bit_widths)
def test_mse_is_never_worse_than_minmax_on_activations(sample, bits):
    limits = quant_limits(bits, signed=False)
    errors = {name: squared_error(sample, *activation_range(sample, bits, name), limits).sum() for name in ("mse", "minmax")}
    assert errors["mse"] <= errors["minmax"] * (1 + 1e-5)


@few
@given(tensors(12, ordinary), bit_widths)
def test_minmax_clips_at_most_half_a_step(sample, bits):
    scale, zero_point = activation_range(sample, bits, "minmax")
    error = (fake_quantize(sample, scale, zero_point, *quant_limits(bits, signed=False)) - sample).abs()
    assert (error <= scale * (0.5 + 1e-3)).all()


def test_mse_clips_an_outlier_that_minmax_covers():
    sample = torch.cat([torch.linspace(0, 1, 1000), torch.tensor([20.0])])
    assert activation_range(sample, 4, "mse")[0] < activation_range(sample, 4, "minmax")[0]
    assert weight_scale(sample[None], 4, "mse") < weight_scale(sample[None], 4, "minmax")


@few
@given(tensors((30,)), st.integers(2, 8), st.sampled_from([1.0, 2.0**-100, 2.0**100]))
def test_mse_ranges_are_those_of_an_exhaustive_search(sample, bits, size):
    def error(low, high):
        """Computed in float64, whose range holds the square of any float32."""
        scale, zero_point = affine_from_ends(low, high, bits)
        return float(squared_error(sample.double() * size, scale.double(), zero_point.double(), quant_limits(bits, signed=False)).sum())

    low, high = (sample * size).min().clamp(max=0), (sample * size).max().clamp(min=0)
    least = min(error(low * (step / 100), high * (step / 100)) for step in range(1, 101))
    assert error(*range_ends(sample * size, bits)) <= least * (1 + 1e-5)


@pytest.mark.parametrize("exponent", [-110, -70, 90, 108])
def test_mse_weight_scales_are_equivariant_where_squares_leave_the_range_of_float32(exponent):
    rows = torch.linspace(-3, 2, 24).reshape(2, 12)
    assert torch.equal(weight_scale(rows * 2.0**exponent, 4), weight_scale(rows, 4) * 2.0**exponent)


def test_percentile_ignores_one_outlier_in_ten_thousand():
    sample = torch.linspace(-1, 1, 10_000)
    spoiled = torch.cat([sample, torch.tensor([1e6])])
    assert activation_range(spoiled, 8, "percentile")[0] < 2.1 / 255
    assert weight_scale(spoiled[None], 8, "percentile") < 1.1 / 127


@pytest.mark.parametrize(
    "function", [lambda name: weight_scale(torch.ones(1, 2), 4, name), lambda name: activation_range(torch.ones(2), 4, name)]
)
def test_rejects_unknown_estimator_listing_the_known_ones(function):
    with pytest.raises(InvalidSetting, match=r"'mean' is unknown\. Choose from minmax, percentile, mse"):
        function("mean")
