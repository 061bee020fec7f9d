"""Options of observing a network: which layers get which precisions, and what is reconstructed as one unit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from anybit.errors import InvalidSetting
from anybit.networks.layer_types import type_of
from anybit.networks.layers import takes_groups
from anybit.scheme import Precision, match_patterns


@dataclass(frozen=True)
class LayerOptions:
    """weight_bits, activation_bits  candidates of every layer (None among the activation bits: float activations)
    keep       shell pattern on layer names -> precision, overriding the above
    group      number of inputs that share a weight scale, in linears and embeddings; None: one scale per channel
    unit       what is reconstructed as a whole, "block" or "layer"; `blocks` names the blocks instead of detecting them
    gradients  whether the network must be differentiable, which is checked before the work; `curvature`: twice, in every layer
    """

    weight_bits: Sequence[int]
    activation_bits: Sequence[int | None]
    keep: Mapping[str, Precision] = field(default_factory=dict)
    group: int | None = None
    unit: str = "block"
    blocks: Sequence[str] | None = None
    gradients: bool = False
    curvature: bool = False

    def float_layers(self, names: Sequence[str]) -> list[str]:
        """Return the names of layers whose weights stay float."""
        return [name for name, precision in match_patterns(self.keep, names).items() if precision.weight_bits is None]


def group_sizes(model: nn.Module, names: Sequence[str], group: int | None) -> dict[str, int]:
    """Return layer -> group size, for layers with a multiple of so many inputs. Raises InvalidSetting if there is none."""
    if group is None:
        return {}
    groups = {name: group for name in names if takes_groups(model.get_submodule(name), group)}
    if not groups:
        raise InvalidSetting(f"group {group} divides the inputs of no linear or embedding in this network. Choose another size.")
    return groups


def layer_choices(layer: nn.Module, pinned: Precision | None, options: LayerOptions, constant: bool = False) -> list[Precision]:
    """Return the precisions that a layer may get: all pairs of its operands' bit-widths, or only `pinned`.

    A `constant` layer, which does not depend on the inputs, is computed once: its input is not rounded.
    """
    weight_bits: Sequence[int | None] = sorted(options.weight_bits) if pinned is None else (pinned.weight_bits,)
    activation_bits = sorted(options.activation_bits, key=lambda bits: bits or 32) if pinned is None else (pinned.activation_bits,)
    if constant or not type_of(layer).reads_numbers:
        activation_bits = (None,)
    if not type_of(layer).has_weights:
        weight_bits = (None,)
    return [Precision(w, a) for w in weight_bits for a in activation_bits]
