"""Properties of every method. A new method adds its line to METHODS."""

import copy
from functools import partial

import pytest
import torch
from language import covered, inputs
from networks import Residual, assert_untouched, images, make, snapshot

import anybit
from anybit.data.batches import Batch
from anybit.data.samples import draw, split
from anybit.data.tasks import distance, outputs_of
from anybit.networks.batchnorm import reestimate
from anybit.networks.layers import codes_of, quantized_layers, scheme_of, weight_rows
from anybit.networks.matmul import Matmul
from anybit.networks.observed import observe_network
from anybit.numerics.quantizers import UniformQuantizer
from anybit.roads.settings import CalibrateSettings
from anybit.roads.steps import range_candidates
from anybit.scheme import Precision, Scheme
from anybit.sources.inputs import as_samples

CALIBRATE = partial(anybit.calibrate, budget=None, steps=10, candidate_steps=5, batch_size=16)


def grown(model, x, weight_bits, activation_bits):
    """Train CSQ with planes for the requested bits, towards the float network's outputs."""
    settings = {"planes": weight_bits[0] - 1, "activation_bits": activation_bits[0], "per_channel": True, "gate_rate": 3e-2, "rate": 3e-3}
    return anybit.grow(model, x, None, distill=1.0, epochs=20, batch_size=16, **settings)


def shrunk(model, x, weight_bits, activation_bits):
    """Train MSQ down to two bits from four, or at the requested bits, towards the float network's outputs."""
    start, budget = (4, "2bit") if weight_bits == (2,) else (weight_bits[0], None)
    settings = {"start_bits": start, "activation_bits": activation_bits[0], "rate": 3e-3, "drops": 5}
    return anybit.grow(model, x, budget, method="msq", distill=1.0, epochs=15, batch_size=16, **settings)


def trained(model, x, weight_bits, activation_bits):
    """Train LSQ at the requested bits, towards the float network's outputs."""
    precision = Precision(weight_bits[0], activation_bits[0])
    scheme = Scheme({name: of_kind(model.get_submodule(name), precision) for name in quantizable(model, x)})
    return anybit.grow(model, x, scheme=scheme, distill=1.0, epochs=15, batch_size=16)


def subnet(model, x, weight_bits, activation_bits):
    """Train MultiQuant at the requested bits and at 8 (6 if those are 8), taught by the float network; return the subnet."""
    bits = {weight_bits[0], activation_bits[0], 8} | ({6} if weight_bits == activation_bits == (8,) else set())
    settings = {"bits": tuple(sorted(bits)), "label": "teacher", "distill": 1.0, "epochs": 15, "batch_size": 16, "held_out": 0.05}
    supernet = anybit.train(model, x, **settings)
    precision = Precision(weight_bits[0], activation_bits[0])
    scheme = Scheme({name: of_kind(model.get_submodule(name), precision) for name in supernet.choices})
    return anybit.extract(supernet, scheme=scheme, data=x)


# name -> function of (network, inputs, weight_bits=(one,), activation_bits=(one,)) that returns a Result
METHODS = {
    "ranges only": partial(CALIBRATE, pipeline="light", bn_tuning=False, solver="none"),
    "matching only": partial(CALIBRATE, pipeline="light", solver="none"),
    "gptq": partial(CALIBRATE, pipeline="light"),
    "adaquant layer": partial(CALIBRATE, unit="layer", solver="none"),
    "adaquant block": partial(CALIBRATE, unit="block"),
    "adaround": partial(CALIBRATE, rounding="adaround"),
    "flexround": partial(CALIBRATE, rounding="flexround"),
    "csq": grown,
    "msq": shrunk,
    "lsq": trained,
    "multiquant": subnet,
}


def quantizable(model, x):
    """Return the layers that a scheme names."""
    return list(anybit.inspect(model, x, export=False)["layers"])


def rounded_start(model, calibration, precision: Precision):
    """Return (the network with all tensors and edges rounded to nearest, the folded float network)."""
    settings = CalibrateSettings(weight_bits=(precision.weight_bits,), activation_bits=(precision.activation_bits,))
    network = observe_network(model, calibration.fitting[0], settings.options)
    scheme = network.uniform(precision.weight_bits, precision.activation_bits)
    return network.apply(scheme, range_candidates(network, calibration, settings)), network.folded


@pytest.mark.parametrize("text", ["W2A8", "W4A4", "W8A8"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_in_the_canonical_form(method, text, tmp_path):
    model, x, precision = make(Residual), images(48), Precision.parse(text)
    reestimate(model, [Batch(x)])  # as in a trained network, because training uses batch statistics
    before = snapshot(model)
    result = METHODS[method](model, x, weight_bits=(precision.weight_bits,), activation_bits=(precision.activation_bits,))
    assert_untouched(model, before)

    layers = quantized_layers(result.model)
    assert result.scheme == scheme_of(result.model) == Scheme.uniform(layers, precision)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in result.model.modules())
    for layer in layers.values():
        assert type(layer.weight_quantizer) is UniformQuantizer and type(layer.input_quantizer) is UniformQuantizer
        assert torch.equal(weight_rows(layer, layer.weight), codes_of(layer).float() * layer.weight_quantizer.scale)
        assert all((slot.scale > 0).all() and torch.isfinite(slot.scale).all() for slot in (layer.weight_quantizer, layer.input_quantizer))

    settings = CalibrateSettings()
    calibration = split(draw(as_samples(x), settings.samples, settings.seed), settings.seed, settings.held_out, 16)
    start, float_model = rounded_start(model, calibration, precision)
    reference = outputs_of(float_model, calibration.held_out)
    errors = [distance(outputs_of(one, calibration.held_out), reference, "classification") for one in (start, result.model)]
    # Training leaves its start, which at 8 bits is as close to float as measurable; calibration never gets worse.
    assert errors[1] <= (max(errors[0], 1e-4) if method in ("csq", "msq", "lsq", "multiquant") else errors[0])

    folder = result.save(tmp_path / "run")
    loaded = anybit.load(folder, model=make(Residual, seed=3))
    assert torch.equal(loaded(x), result.model(x)) and loaded.scheme == result.scheme
    assert (folder / "model.safetensors").stat().st_size == result.report["result"]["bytes"]


def of_kind(layer, precision: Precision) -> Precision:
    """Return the part of a precision that a layer can have: an embedding reads no activation, a product has no weight."""
    if isinstance(layer, torch.nn.Embedding):
        return Precision(precision.weight_bits, None)
    return Precision(None, precision.activation_bits) if isinstance(layer, Matmul) else precision


@pytest.mark.parametrize("method", METHODS)
def test_every_method_supports_transformers(method, tmp_path):
    batch, precision = inputs("bert", 48), Precision(4, 8)
    model = covered("bert", layers=1)
    sentences = [{name: tensor[index] for name, tensor in batch.inputs.items()} for index in range(len(batch))]
    result = METHODS[method](model, sentences, weight_bits=(4,), activation_bits=(8,))

    layers = quantized_layers(result.model)
    assert result.scheme == Scheme({name: of_kind(layer, precision) for name, layer in layers.items()})
    for layer in layers.values():
        if isinstance(layer, Matmul):
            assert type(layer.input_quantizer) is UniformQuantizer and layer.input_quantizer.scale.shape == (2,)
        else:
            assert torch.equal(weight_rows(layer, layer.weight), codes_of(layer).float() * layer.weight_quantizer.scale)
    reference, outputs = (outputs_of(one, [batch]) for one in (model, result.model))
    scrambled = outputs_of(with_two_bit_weights(model), [batch])
    assert distance(outputs, reference, "classification") < distance(scrambled, reference, "classification")
    loaded = anybit.load(result.save(tmp_path / "run"), model=covered("bert", layers=1))
    assert torch.equal(outputs_of(loaded, [batch]), outputs)


def with_two_bit_weights(model):
    """Return the network with weights rounded to two bits and nothing fitted, which a method must beat."""
    noisy = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in noisy.parameters():
            if parameter.dim() > 1:
                step = parameter.abs().max()
                parameter.copy_((parameter / step).round() * step)
    return noisy
