"""Layer types: the properties of each covered class. Everything that depends on a layer's class is looked up here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from anybit.errors import UnsupportedModel
from anybit.networks.matmul import Matmul
from anybit.networks.recurrent import RecurrentWeight


@dataclass(frozen=True)
class LayerType:
    """A layer with weight [channels, fan-in, ...] whose output has its channels second: a convolution, unless a subclass overrides it.

    classes        of the layers, and of all layers that inherit from them
    operands       number of activations that it reads; an input quantizer has a range for each
    has_weights    else it computes with activations alone
    reads_numbers  whether its input is an activation rather than an index
    sums           whether an output is a weighted sum of inputs, so that rounding one weight can compensate for another, and a batch norm
                   can fold into the weights
    integer        whether runtimes have an integer kernel for it
    gives_codes    whether that kernel only returns codes, so that a quantizer must follow; others return floats if none does
    grouped        whether groups of inputs can have a weight scale each
    channels_last  whether the channels of its output are the last dimension, not the second
    refusal        error message for a precision with an operand that it lacks
    """

    classes: tuple[type[nn.Module], ...]
    operands: int = 1
    has_weights: bool = True
    reads_numbers: bool = True
    sums: bool = True
    integer: bool = True
    gives_codes: bool = False
    grouped: bool = False
    channels_last: bool = False
    refusal: str = ""

    def rows(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """Lay out `weight` as rows [channels, fan-in]."""
        return weight.flatten(1)

    def weight(self, layer: nn.Module, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """Lay out rows as a weight of this shape, the inverse of `rows`."""
        return rows.view(shape)

    def macs(self, weights: int, input_shape: Sequence[int], output_shape: Sequence[int], batch_size: int) -> int:
        """Count multiply-accumulates of one sample, for a layer with this many weights and tensors of these shapes."""
        return weights * math.prod(output_shape[2:])

    def per_channel(self, values: Tensor, output: Tensor) -> Tensor:
        """Shape values [channels] so that they broadcast over an output."""
        return values if self.channels_last else values.view(1, -1, *[1] * (output.dim() - 2))

    def pairs_tokens(self, layer: nn.Module) -> bool:
        """Return whether the layer's output has a number for each pair of tokens."""
        return False


class TransposedConvolution(LayerType):
    """A convolution whose weight is [in, out / groups, ...]."""

    def rows(self, layer: nn.Module, weight: Tensor) -> Tensor:
        # [in, out / groups, ...] -> [groups, in / groups, out / groups, ...] -> [groups, out / groups, in / groups, ...]
        grouped = weight.unflatten(0, (_groups(layer), -1)).transpose(1, 2)
        return grouped.flatten(0, 1).flatten(1)

    def weight(self, layer: nn.Module, rows: Tensor, shape: Sequence[int]) -> Tensor:
        groups = _groups(layer)
        grouped = rows.view(groups, shape[1], shape[0] // groups, *shape[2:])
        return grouped.transpose(1, 2).flatten(0, 1)

    def macs(self, weights: int, input_shape: Sequence[int], output_shape: Sequence[int], batch_size: int) -> int:
        return weights * math.prod(input_shape[2:])


def _groups(layer: nn.Module) -> int:
    assert isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    return layer.groups


class LinearLayer(LayerType):
    """A weight [channels, fan-in], applied along the last dimension at every other place."""

    def macs(self, weights: int, input_shape: Sequence[int], output_shape: Sequence[int], batch_size: int) -> int:
        return weights * math.prod(output_shape[:-1]) // batch_size


class Lookup(LayerType):
    """A weight whose rows are looked up by index and never summed."""

    def macs(self, weights: int, input_shape: Sequence[int], output_shape: Sequence[int], batch_size: int) -> int:
        return 0


class RecurrentMatrix(LayerType):
    """A matrix of a recurrent layer, applied at every step of its input."""

    def macs(self, weights: int, input_shape: Sequence[int], output_shape: Sequence[int], batch_size: int) -> int:
        return weights * math.prod(input_shape[:-1]) // batch_size


class Product(LayerType):
    """A product of two activations, without a weight."""

    def macs(self, weights: int, input_shape: Sequence[int], output_shape: Sequence[int], batch_size: int) -> int:
        return math.prod(output_shape) * input_shape[-1] // batch_size

    def pairs_tokens(self, layer: nn.Module) -> bool:
        assert isinstance(layer, Matmul)
        return layer.transposed  # of queries and keys


LAYER_TYPES: tuple[LayerType, ...] = (
    LayerType((nn.Conv1d, nn.Conv2d, nn.Conv3d), gives_codes=True),
    TransposedConvolution((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), integer=False),
    LinearLayer((nn.Linear,), grouped=True, channels_last=True),
    Lookup(
        (nn.Embedding,),
        reads_numbers=False,
        sums=False,
        integer=False,
        grouped=True,
        channels_last=True,
        refusal="is an embedding, whose input is not an activation",
    ),
    RecurrentMatrix(
        (RecurrentWeight,),
        reads_numbers=False,
        sums=False,
        integer=False,
        grouped=True,
        channels_last=True,
        refusal="is a matrix of a recurrent layer, whose products are float",
    ),
    Product(
        (Matmul,),
        operands=2,
        has_weights=False,
        sums=False,
        channels_last=True,
        refusal="is a product of activations, without weights",
    ),
)
COVERED = tuple(cls for layer_type in LAYER_TYPES for cls in layer_type.classes)
_TYPES = {cls: layer_type for layer_type in LAYER_TYPES for cls in layer_type.classes}


def type_of(layer: nn.Module | type[nn.Module]) -> LayerType:
    """Return the type of a layer, or of a class of layers, by its nearest supported base class."""
    cls = layer if isinstance(layer, type) else type(layer)
    covered = next((one for one in cls.__mro__ if one in _TYPES), None)
    if covered is None:
        raise UnsupportedModel(f"{cls.__name__} is not a layer that anybit covers: {', '.join(one.__name__ for one in COVERED)}.")
    return _TYPES[covered]
