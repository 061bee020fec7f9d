"""A network rounded to nearest, and the start of its reconstruction."""

from dataclasses import dataclass

from networks import calibration_of
from torch import Tensor, nn

from anybit.data.samples import Calibration
from anybit.networks.candidates import apply_scheme
from anybit.networks.observed import ObservedNetwork, observe_network
from anybit.roads.settings import CalibrateSettings
from anybit.roads.steps import free_weights, range_candidates
from anybit.scheme import Precision, Scheme


@dataclass(frozen=True)
class Rounded:
    """The observed network, its inputs, the rounded canonical model and the free weights of its layers."""

    network: ObservedNetwork
    calibration: Calibration
    model: nn.Module
    starts: dict[str, Tensor]


def rounded(
    model: nn.Module, precision: str, name: str = "residual", unit: str = "block", calibration: Calibration | None = None, **settings
) -> Rounded:
    """Round all layers except those that `settings` keep to one precision; the inputs are those of the network `name`."""
    bits = Precision.parse(precision)
    calibrate = CalibrateSettings(weight_bits=(bits.weight_bits,), activation_bits=(bits.activation_bits,), unit=unit, **settings)
    calibration = calibration or calibration_of(name, fitting=32, held_out=16)
    network = observe_network(model, calibration.fitting[0], calibrate.options)
    candidates = range_candidates(network, calibration, calibrate)
    scheme = Scheme({name: choices[0] for name, choices in network.choices.items()})
    return Rounded(network, calibration, apply_scheme(network.prepared, scheme, candidates), free_weights(network, candidates, scheme))
