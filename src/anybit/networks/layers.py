"""Layers with a slot for each operand, and the surgery that puts them into a copy of a model.

A slot is None (empty: the layer computes exactly as its float class does) or a module that maps the operand to its fake-quantized value. A
layer is swapped by subclassing *its own* class, so that a custom forward keeps running, every state-dict key stays, and control flow is
untouched: the subclass passes a quantized input to its forward, and its `weight` attribute returns the quantized weight.

All weight quantizers see the weight as rows [output channels, fan-in], or [groups, group size] if each group of inputs has its own
scale; `weight_rows` and `from_rows` convert. A matmul has no weight, which is 0 x 0 here, and one input slot for both operands.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from anybit.errors import UnsupportedModel
from anybit.networks.copies import copied
from anybit.networks.layer_types import COVERED, type_of
from anybit.networks.matmul import Matmul
from anybit.networks.rounding import round_edges
from anybit.networks.wiring import Wiring
from anybit.numerics.quantizers import UniformQuantizer, frozen
from anybit.scheme import Precision, Scheme


class QuantizedLayer(nn.Module):
    """Mixin of every swapped class: the two slots and the weight that reads through one of them."""

    weight_quantizer: nn.Module | None
    input_quantizer: nn.Module | None
    bias: nn.Parameter | None
    weight_group: int | None = None
    own_forward: Callable[..., Tensor] | None = None
    """The `forward` that this object had in place of its class's."""

    @property
    def weight(self) -> Tensor:
        """Return the weight that the layer computes with: quantized if its slot is filled."""
        weight = self._parameters["weight"]
        assert weight is not None  # `prepare` refuses a computed one
        if self.weight_quantizer is None:
            return weight
        return from_rows(self, self.weight_quantizer(weight_rows(self, weight)))

    def forward(self, *args, **kwargs) -> Tensor:
        if self.input_quantizer is not None and args:
            args = (self.input_quantizer(args[0]), *args[1:])
        elif self.input_quantizer is not None:  # a caller may pass the input by keyword
            first = next(iter(kwargs))
            kwargs = {**kwargs, first: self.input_quantizer(kwargs[first])}
        return super().forward(*args, **kwargs) if self.own_forward is None else self.own_forward(*args, **kwargs)


class QuantizedMatmul(QuantizedLayer, Matmul):
    weight = None  # type: ignore[assignment]  # the only layer without a weight

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        if self.input_quantizer is not None:
            left, right = self.input_quantizer(left, 0), self.input_quantizer(right, 1)
        return Matmul.forward(self, left, right)


_SWAPPED: dict[type[nn.Module], type[QuantizedLayer]] = {Matmul: QuantizedMatmul}  # nn.Conv2d -> QuantizedConv2d, ...


def _swapped_class(cls: type[nn.Module]) -> type[QuantizedLayer]:
    """Return the quantized subclass of `cls`, created on first use."""
    if cls not in _SWAPPED:
        pickled = {"__reduce__": lambda self: (_new_swapped, (cls,), self.__dict__)}  # its class is found through the float one
        # A subclass of torch's classes must not claim to be torch's: torch makes assumptions about its own modules.
        module = __name__ if cls in COVERED else cls.__module__
        _SWAPPED[cls] = type(f"Quantized{cls.__name__}", (QuantizedLayer, cls), {"__module__": module, **pickled})
    return _SWAPPED[cls]


def _new_swapped(cls: type[nn.Module]) -> QuantizedLayer:
    swapped = _swapped_class(cls)
    return swapped.__new__(swapped)


def coverage(model: nn.Module, wiring: Wiring | None = None) -> tuple[list[str], dict[str, str]]:
    """Return (names of the layers that take quantizers, in call order; other layers and parameters -> why they are not covered).

    Without a wiring, every layer of a supported class counts, in order of definition.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, COVERED)]
    covered = layers if wiring is None else wiring.layer_names()
    total = sum(parameter.numel() for parameter in model.parameters())
    uncovered, owners = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, COVERED):
            if name not in covered:
                uncovered[name] = (
                    f"{type(module).__name__} whose forward did not run on the first inputs (unused, chosen by the inputs, or read "
                    "directly by its parent); it stays float"
                )
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                owner = type(module).__name__ if name else "the network itself"
                share = f"{100 * parameter.numel() / total:.2g} % of all parameters"
                uncovered[f"{name}.{key}".lstrip(".")] = (
                    f"a parameter of {owner} and of no layer that anybit covers, {share}; it stays float"
                )
                owners.add(name)
    for function in wiring.functions() if wiring else ():
        if function.owner not in owners:  # reported for the module itself
            uncovered[function.name] = f"{function.kind} called as a function, on weights that are no layer's; it stays float"
    for product in wiring.products() if wiring else ():
        uncovered[product.name] = "a product of two activations that is no layer; it stays float (anybit.Matmul in its place is covered)"
    return covered, uncovered


def check_plain_use(wiring: Wiring, names: Iterable[str]) -> None:
    """Raise UnsupportedModel naming the first of `names` that runs in a context that is lost when it runs alone, or that returns
    several tensors."""
    for name in names:
        if name in wiring.surroundings:
            raise UnsupportedModel(
                f"Layer {name} runs {wiring.surroundings[name]}. Let the forward call it plainly, or keep it float: --keep='{name}=float'."
            )
        several = [len(operation.outputs) for operation in wiring.runs(name) if len(operation.outputs) != 1]
        if several:
            raise UnsupportedModel(
                f"Layer {name} returns {several[0]} tensors; a quantized layer must return one. Let it return "
                f"one, or keep it float: --keep='{name}=float'."
            )


def prepare(model: nn.Module, names: Iterable[str], float_layers: Collection[str] = (), groups: Mapping[str, int] = {}) -> nn.Module:
    """Return a copy of `model` whose layers `names` have empty slots; its outputs are bitwise those of `model`.

    `groups`   layer -> number of inputs that share a weight scale; other layers have one scale per channel
    Raises UnsupportedModel if a name is not a layer that anybit covers.
    """
    names = list(names)
    check_float32(model, [name for name in names if name not in float_layers])
    prepared = copied(model)
    for module in prepared.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # its fused path would bypass the layers' own forward
    for name in names:
        layer = prepared.get_submodule(name)
        if not isinstance(layer, COVERED):
            raise UnsupportedModel(f"{name} is a {type(layer).__name__}; anybit covers {', '.join(cls.__name__ for cls in COVERED)}.")
        parameter = layer._parameters.get("weight") if type_of(layer).has_weights else float_weight(layer)
        if parameter is None:
            raise UnsupportedModel(f"{name}: the weight is computed (a parametrization or weight norm). Remove the parametrization first.")
        if isinstance(layer, nn.Embedding):
            layer.sparse = False  # a quantizer does not propagate sparse gradients
        layer.__class__ = _swapped_class(type(layer))
        assert isinstance(layer, QuantizedLayer)
        layer.register_module("weight_quantizer", None)
        layer.register_module("input_quantizer", None)
        if "forward" in vars(layer):
            layer.__dict__["own_forward"] = layer.__dict__.pop("forward")
        if name in groups:
            layer.weight_group = _checked_group(name, layer, groups[name])
    return prepared


def check_float32(model: nn.Module, names: Iterable[str]) -> None:
    """Raise UnsupportedModel naming the first of the layers `names` whose weight is not float32."""
    for name in names:
        parameter = model.get_submodule(name)._parameters.get("weight")
        if parameter is not None and parameter.dtype != torch.float32:
            raise UnsupportedModel(f"{name}: the weight is {parameter.dtype}. Convert the network first: model.float().")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network itself or, if it or a part of it is wrapped (DataParallel, torch.compile), a copy without the wrappers.

    Layers then have the names that the network's author gave them, and their forward is Python code that can be observed.
    """
    instead: dict[int, nn.Module] = {}  # what replaces each wrapper in a copy
    for module in reversed(list(model.modules())):
        if (inner := _wrapped(module)) is not None:
            instead[id(module)] = copied(inner, instead)
    return copied(model, instead) if instead else model


def _wrapped(module: nn.Module) -> nn.Module | None:
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return module.module
    return dict(module.named_children()).get("_orig_mod")  # torch.compile's name for it; importing its module takes seconds


def takes_groups(layer: nn.Module, group: int) -> bool:
    """Return whether each `group` inputs of a channel can share a weight scale: in a linear or embedding whose fan-in is a multiple."""
    return type_of(layer).grouped and float_weight(layer).shape[1] % group == 0


def _checked_group(name: str, layer: nn.Module, group: int) -> int:
    if group < 1 or not takes_groups(layer, group):
        shape = " x ".join(map(str, float_weight(layer).shape))
        raise UnsupportedModel(f"{name}: groups of {group} weights do not divide a {type(layer).__name__} of {shape}. Choose another size.")
    return group


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return name -> layer with slots, in order of definition."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def float_weight(layer: nn.Module) -> nn.Parameter:
    """Return the stored weight, whatever is in the slot; an empty one for a matmul."""
    weight = layer._parameters["weight"] if type_of(layer).has_weights else nn.Parameter(torch.empty(0, 0))
    assert weight is not None  # computed weights were refused earlier
    return weight


def float_bias(layer: nn.Module) -> Tensor | None:
    """Return the bias, or None."""
    return getattr(layer, "bias", None)


def weight_rows(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return `weight` as rows [output channels, fan-in]; a row of an embedding is a word. With groups, each group of a channel is a row."""
    group = getattr(layer, "weight_group", None)
    return type_of(layer).rows(layer, weight) if group is None else weight.reshape(-1, group)


def rows_shape(layer: nn.Module) -> tuple[int, int]:
    """Return (rows, columns) of the layer's weight as laid out by `weight_rows`."""
    rows = weight_rows(layer, float_weight(layer))
    return rows.shape[0], rows.shape[1]


def from_rows(layer: nn.Module, rows: Tensor) -> Tensor:
    """Lay out rows as the layer's weight: the inverse of `weight_rows`."""
    shape = float_weight(layer).shape
    return type_of(layer).weight(layer, rows, shape) if getattr(layer, "weight_group", None) is None else rows.view(shape)


@torch.no_grad()
def fill(layer: nn.Module, weights: nn.Module | None, inputs: nn.Module | None) -> None:
    """Put quantizers into the slots and round the stored weight to the grid, so that weight and codes agree."""
    assert isinstance(layer, QuantizedLayer)
    if weights is not None:
        parameter = float_weight(layer)
        parameter.copy_(from_rows(layer, weights(weight_rows(layer, parameter))))
    layer.weight_quantizer, layer.input_quantizer = weights, inputs


@runtime_checkable
class TrainedWeight(Protocol):
    """A weight quantizer in training."""

    def freeze(self, rows: Tensor) -> tuple[Tensor, UniformQuantizer | None]:
        """Return the stored rows rounded to the grid, and their uniform quantizer; None for a pruned layer."""


@runtime_checkable
class TrainedInput(Protocol):
    """An input quantizer in training."""

    def freeze(self) -> UniformQuantizer:
        """Return the uniform quantizer of the trained range."""


@torch.no_grad()
def freeze_slots(layer: nn.Module) -> None:
    """Replace trained quantizers in the slots by uniform ones, and round the stored weight to their grid."""
    assert isinstance(layer, QuantizedLayer)
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    if isinstance(weights, TrainedWeight):
        values, quantizer = weights.freeze(weight_rows(layer, float_weight(layer)))
        float_weight(layer).copy_(from_rows(layer, values))
        weights = Pruned() if quantizer is None else quantizer
    fill(layer, weights, inputs.freeze() if isinstance(inputs, TrainedInput) else inputs)


@torch.no_grad()
def emptied(model: nn.Module) -> nn.Module:
    """Return a float copy: the original classes, with the weights that the slots return. A road can start where another ended."""
    plain = round_edges(copy.deepcopy(model), {})
    for layer in quantized_layers(plain).values():
        if layer.weight is not None:
            float_weight(layer).copy_(layer.weight)
        layer.__dict__.pop("weight_group", None)
        if "own_forward" in vars(layer):
            layer.__dict__["forward"] = layer.__dict__.pop("own_forward")
        del layer._modules["weight_quantizer"], layer._modules["input_quantizer"]
        layer.__class__ = type(layer).__mro__[2]
    return plain


def scheme_of(model: nn.Module) -> Scheme:
    """Return the scheme that the model's filled slots represent."""
    return Scheme({name: _precision_of(layer) for name, layer in quantized_layers(model).items()})


def _precision_of(layer: QuantizedLayer) -> Precision:
    return Precision(_bits_of(layer.weight_quantizer), _bits_of(layer.input_quantizer))


def _bits_of(quantizer: nn.Module | None) -> int | None:
    if quantizer is None or isinstance(quantizer, Pruned):
        return None if quantizer is None else 0
    return frozen(quantizer).bits


class Pruned(nn.Module):
    """Weight quantizer of a W0 layer: every weight is zero and no code is stored."""

    def forward(self, rows: Tensor) -> Tensor:
        return torch.zeros_like(rows)


def weight_quantizer_of(layer: nn.Module) -> UniformQuantizer:
    """Return the uniform quantizer in the layer's weight slot."""
    assert isinstance(layer, QuantizedLayer)
    return frozen(layer.weight_quantizer)


def codes_of(layer: nn.Module) -> Tensor:
    """Return the int8 codes [channels, fan-in] of a layer whose weight slot is filled."""
    return weight_quantizer_of(layer).codes(weight_rows(layer, float_weight(layer))).to(torch.int8)
