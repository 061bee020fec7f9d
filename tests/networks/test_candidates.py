import re
from dataclasses import replace

import pytest
import torch
from networks import NETWORKS, assert_untouched, make, network_and_inputs, run, snapshot
from schemes import WEIGHT_BITS, prepared_with_candidates, random_scheme
from torch import nn

from anybit.errors import AnybitError, InvalidInput, SchemeMismatch, UnsupportedModel
from anybit.networks.candidates import (
    Candidates,
    apply_scheme,
    check_finite_samples,
    frozen_candidate,
    swapped,
    weight_candidate,
)
from anybit.networks.layers import Pruned, codes_of, float_weight, prepare, quantized_layers, scheme_of, weight_rows
from anybit.networks.states import check_finite_weights
from anybit.numerics.quantizers import UniformQuantizer
from anybit.scheme import Precision, Scheme


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(3))
def test_scheme_read_from_the_slots_is_the_applied_one(name, seed):
    prepared, candidates = prepared_with_candidates(name)
    before = snapshot(prepared)
    scheme = random_scheme(prepared, seed)
    model = apply_scheme(prepared, scheme, candidates)
    assert scheme_of(model) == scheme
    assert_untouched(prepared, before)


@pytest.mark.parametrize("name", NETWORKS)
def test_canonical_weights_are_code_times_scale(name):
    prepared, candidates = prepared_with_candidates(name)
    scheme = Scheme.uniform(quantized_layers(prepared), "W3A4" if name != "tokens" else "W3")
    model = apply_scheme(prepared, scheme, candidates)
    assert set(quantized_layers(model)) == set(scheme)
    for layer_name, layer in quantized_layers(model).items():
        codes = codes_of(layer)
        assert torch.equal(codes, candidates.weights[layer_name, 3].codes)
        assert torch.equal(weight_rows(layer, layer.weight), codes.float() * layer.weight_quantizer.scale)
        assert torch.equal(layer.weight, float_weight(layer))


def test_float_scheme_keeps_outputs():
    prepared, candidates = prepared_with_candidates("residual")
    _, batch = network_and_inputs("residual")
    model = apply_scheme(prepared, Scheme.uniform(quantized_layers(prepared), "float"), candidates)
    assert torch.equal(run(model, batch), run(prepared, batch))


def test_pruned_layer_outputs_its_bias():
    prepared, candidates = prepared_with_candidates("no batch norm")
    model = apply_scheme(prepared, Scheme({"conv": Precision(), "fc": Precision(0)}), candidates)
    assert isinstance(model.fc.weight_quantizer, Pruned)
    _, batch = network_and_inputs("no batch norm")
    assert torch.equal(run(model, batch), prepared.fc.bias.detach().expand(4, 5))


def test_more_bits_are_closer_to_the_float_network():
    prepared, candidates = prepared_with_candidates("chain")
    _, batch = network_and_inputs("chain")
    names = quantized_layers(prepared)
    models = [apply_scheme(prepared, Scheme.uniform(names, f"W{bits}"), candidates) for bits in WEIGHT_BITS]
    errors = [float((run(model, batch) - run(prepared, batch)).abs().mean()) for model in models]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1 * errors[0]


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_freezing_a_filled_layer_returns_its_candidate(bits):
    prepared, candidates = prepared_with_candidates("upsampling")
    model = apply_scheme(prepared, Scheme.uniform(quantized_layers(prepared), f"W{bits}"), candidates)
    for name, layer in quantized_layers(model).items():
        frozen, stored = frozen_candidate(layer), candidates.weights[name, bits]
        assert torch.equal(frozen.codes, stored.codes) and torch.equal(frozen.scale, stored.scale) and torch.equal(frozen.bias, stored.bias)


def test_a_candidate_is_a_copy():
    layer = prepare(make(lambda: nn.Sequential(nn.Linear(3, 2))), ["0"])[0]
    candidate = weight_candidate(layer, 4, "mse")
    bias = candidate.bias.clone()
    with torch.no_grad():
        layer.bias.add_(1)
    assert torch.equal(candidate.bias, bias)


def test_models_from_the_same_candidates_are_independent():
    prepared, candidates = prepared_with_candidates("chain")
    scheme = Scheme.uniform(quantized_layers(prepared), "W5A4")
    one, other = apply_scheme(prepared, scheme, candidates), apply_scheme(prepared, scheme, candidates)
    with torch.no_grad():
        for tensor in one.state_dict().values():
            tensor.zero_()
    assert all(torch.equal(codes_of(layer), candidates.weights[name, 5].codes) for name, layer in quantized_layers(other).items())
    assert all((candidate.scale > 0).all() for candidate in candidates.weights.values())


def test_rejects_scheme_of_another_model_with_the_nearest_name():
    prepared, candidates = prepared_with_candidates("chain")
    with pytest.raises(SchemeMismatch, match=r"'conv11' \(did you mean 'conv1'\?\)"):
        apply_scheme(prepared, Scheme.uniform(["conv11"], "W4"), candidates)


def test_rejects_precision_without_candidate_by_layer():
    prepared, candidates = prepared_with_candidates("chain")
    with pytest.raises(AnybitError, match="conv1"):
        apply_scheme(prepared, Scheme.parse({"conv1": "W4", "conv2": "W3", "fc": "float"}), candidates)


def test_canonical_slots_hold_uniform_quantizers():
    prepared, candidates = prepared_with_candidates("depthwise")
    model = apply_scheme(prepared, Scheme.uniform(quantized_layers(prepared), "W5A8"), candidates)
    for layer in quantized_layers(model).values():
        assert type(layer.weight_quantizer) is UniformQuantizer and layer.weight_quantizer.signed
        assert type(layer.input_quantizer) is UniformQuantizer and not layer.input_quantizer.signed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weight_error_names_the_layer(value):
    model, _ = network_and_inputs("residual")
    check_finite_weights(model)
    with torch.no_grad():
        model.block2.conv1.weight[0, 0, 0, 0] = value
    with pytest.raises(UnsupportedModel, match=r"block2\.conv1\.weight holds 1 value"):
        check_finite_weights(model)


def test_non_finite_activation_error_names_the_layer():
    samples = {"conv1": [torch.ones(3)], "fc": [torch.ones(2), torch.tensor([1.0, float("inf")])]}
    with pytest.raises(InvalidInput, match="fc"):
        check_finite_samples(samples)


@pytest.mark.parametrize(("huge", "kept"), [("01", r"h.*.m"), ("0", "h.0.m")])
def test_error_of_huge_activations_keeps_all_their_layers_float(huge, kept):
    samples = {f"h.{layer}.m": [torch.tensor([3e38 if layer in huge else 1.0])] for layer in "01"} | {"fc": [torch.ones(2)]}
    with pytest.raises(InvalidInput, match=rf"h\.0\.m.* reaches 3e\+38 .*--keep='{re.escape(kept)}=float'"):
        check_finite_samples(samples)


def tuned(candidates: Candidates) -> Candidates:
    """The same candidates with other biases at every bit-width, as after a method."""
    weights = {
        (name, bits): one if one.bias is None else replace(one, bias=one.bias + bits) for (name, bits), one in candidates.weights.items()
    }
    return Candidates(weights, candidates.activations)


@pytest.mark.parametrize("base", ["float", "W2", "W5A8"])
@pytest.mark.parametrize("name", NETWORKS)
def test_swapping_a_layer_equals_a_new_copy_and_is_undone_exactly(name, base):
    prepared, candidates = prepared_with_candidates(name)
    candidates = tuned(candidates)
    _, batch = network_and_inputs(name)
    layers = quantized_layers(prepared)
    base_scheme = Scheme.uniform(layers, base if name != "tokens" else base.partition("A")[0])
    model = apply_scheme(prepared, base_scheme, candidates)
    before, untouched, outputs = snapshot(model), snapshot(prepared), run(model, batch)
    for layer, bits in zip(layers, [0, 2, 5, None] * len(layers), strict=False):
        precision = Precision(bits, None if isinstance(layers[layer], nn.Embedding) else 4)
        fresh = apply_scheme(prepared, base_scheme.replace({layer: precision}), candidates)
        with swapped(model, prepared, layer, precision, candidates):
            assert scheme_of(model)[layer] == precision
            assert all(map(torch.equal, model.state_dict().values(), fresh.state_dict().values()))
            assert torch.equal(run(model, batch), run(fresh, batch))
        assert_untouched(model, before)
    assert torch.equal(run(model, batch), outputs)
    assert_untouched(prepared, untouched)


def test_swap_is_undone_after_an_error():
    prepared, candidates = prepared_with_candidates("residual")
    candidates = tuned(candidates)
    model = apply_scheme(prepared, Scheme.uniform(quantized_layers(prepared), "W5A8"), candidates)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt), swapped(model, prepared, "fc", Precision(2, 4), candidates):
        raise KeyboardInterrupt
    assert_untouched(model, before)
    with pytest.raises(SchemeMismatch, match="no candidate for fc at W4"), swapped(model, prepared, "fc", Precision(4), candidates):
        pass
    assert_untouched(model, before)
