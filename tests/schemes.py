"""Random schemes and candidates of the toy networks."""

import random

import torch
from networks import network_and_inputs
from torch import nn

from anybit.networks.candidates import Candidates, activation_candidate, weight_candidate
from anybit.networks.layers import coverage, prepare, quantized_layers
from anybit.networks.wiring import observe
from anybit.scheme import Precision, Scheme

WEIGHT_BITS, ACTIVATION_BITS = (2, 3, 5, 8), (2, 4, 8)


def prepared_with_candidates(name: str) -> tuple[nn.Module, Candidates]:
    model, batch = network_and_inputs(name)
    names = coverage(model, observe(model, batch))[0]
    prepared = prepare(model, names)
    sample = torch.linspace(-1, 3, 200)
    weights = {(n, bits): weight_candidate(prepared.get_submodule(n), bits, "minmax") for n in names for bits in WEIGHT_BITS}
    return prepared, Candidates(
        weights, {(n, bits): activation_candidate([sample], bits, "minmax") for n in names for bits in ACTIVATION_BITS}
    )


def random_scheme(prepared: nn.Module, seed: int) -> Scheme:
    """Random precisions, including W0 and float, in the model's order."""
    rng = random.Random(seed)
    scheme = {}
    for name, layer in quantized_layers(prepared).items():
        activation_bits = None if isinstance(layer, nn.Embedding) else rng.choice((None, *ACTIVATION_BITS))
        scheme[name] = Precision(rng.choice((None, 0, *WEIGHT_BITS)), activation_bits)
    return Scheme(scheme)
