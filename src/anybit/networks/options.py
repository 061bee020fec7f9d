"""What observing a network needs to know: which layers, at which precisions."""

from collections.abc import Sequence

from torch import nn

from anybit.errors import InvalidSetting
from anybit.networks.layers import takes_groups
from anybit.networks.matmul import Matmul
from anybit.roads.settings import CalibrateSettings
from anybit.scheme import Precision


def group_sizes(model: nn.Module, names: Sequence[str], settings: CalibrateSettings) -> dict[str, int]:
    """layer -> group size, of the layers that take it; raises InvalidSetting where none does."""
    if settings.group is None:
        return {}
    groups = {name: settings.group for name in names if takes_groups(model.get_submodule(name), settings.group)}
    if not groups:
        raise InvalidSetting(f"group {settings.group} divides the inputs of no linear or embedding of this network. Choose another size.")
    return groups


def layer_choices(layer: nn.Module, kept: Precision | None, settings: CalibrateSettings) -> list[Precision]:
    weight_bits: Sequence[int | None] = sorted(settings.weight_bits) if kept is None else (kept.weight_bits,)
    activation_bits = sorted(settings.activation_bits, key=lambda bits: bits or 32) if kept is None else (kept.activation_bits,)
    if isinstance(layer, nn.Embedding):  # it reads numbers of words
        activation_bits = (None,)
    if isinstance(layer, Matmul):  # it reads activations alone
        weight_bits = (None,)
    return [Precision(w, a) for w in weight_bits for a in activation_bits]
