"""Rewrite a network so that layers compute its functions: those on weights outside of layers, and products of two activations.

One observed pass shows which functions each module calls itself, on activations and on values computed from parameters alone. A copy then
gets a layer for each: a Linear or convolution that holds the weight, a Matmul, or the layer whose weight the function read. The changes
are recorded as a `Rewrite` in the run's file, so that a network loaded without inputs can be rewritten in the same way.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from anybit.data.batches import Batch, call, evaluating, tensors_in
from anybit.networks.calls import Calls, CallSite, observed_calls
from anybit.networks.contractions import contraction, is_transposed, weight_rows_of
from anybit.networks.copies import copied
from anybit.networks.functions import ARGUMENTS, ATTENTION, PRODUCTS, SEEN_THROUGH, FunctionCall, call_layers
from anybit.networks.layer_types import COVERED
from anybit.networks.layers import float_bias, float_weight
from anybit.networks.matmul import Matmul
from anybit.networks.wiring import Wiring
from anybit.scheme import check_names

ADDED: dict[str, type[nn.Module]] = {
    cls.__name__: cls
    for cls in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, Matmul)
}


class AddedLayer(BaseModel):
    """A layer that a rewrite adds: its class name and constructor arguments."""

    model_config = ConfigDict(extra="forbid", strict=True)
    kind: str
    settings: dict[str, bool | int | str | list[int]] = {}

    @model_validator(mode="after")
    def _checked_kind(self) -> "AddedLayer":
        try:
            _ = self.weights
        except Exception as error:
            raise ValueError(f"no layer {self.kind} of {self.settings}: {error}") from error
        return self

    @property
    def weights(self) -> int:
        """Return the number of weights."""
        return float_weight(self.make("meta")).numel()

    def make(self, device: torch.device | str | None) -> nn.Module:
        """Create the layer; its weight is loaded later."""
        settings: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in self.settings.items()}
        with torch.device("meta"):
            return ADDED[self.kind](**settings).to_empty(device=device)


class PlannedCall(BaseModel):
    """A `FunctionCall` as stored in a file."""

    model_config = ConfigDict(extra="forbid", strict=True)
    function: str
    layers: list[str] = []
    weight: int | None = None
    batch_second: bool = False


class Rewrite(BaseModel):
    """Describe how a network is turned into one whose layers compute its functions.

    calls    module -> the functions that it calls itself, in order
    layers   added layer -> how it is created
    dropped  parameters that nothing reads any more
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    calls: dict[str, list[PlannedCall]] = {}
    layers: dict[str, AddedLayer] = {}
    dropped: list[str] = []


def calls_functions(model: nn.Module, wiring: Wiring) -> bool:
    """Return whether a network may need a rewrite: `wiring` contains functions that layers could compute, or a layer with a custom forward
    may hide one."""
    functions = {*ARGUMENTS, *SEEN_THROUGH}
    called = any(operation.kind in functions for operation in wiring.operations)
    return called or any(isinstance(module, COVERED) and type(module).forward is not _float_forward(module) for module in model.modules())


def _float_forward(module: nn.Module) -> Any:
    """Return the forward of the supported class from which the module's own class inherits."""
    return next(cls for cls in type(module).__mro__ if cls in COVERED).__dict__.get("forward")


def rewritten(model: nn.Module, example: Batch) -> nn.Module:
    """Return a copy of `model` whose layers compute its functions; the model itself if there is nothing to rewrite, if the copy's outputs
    would differ, or if the model rejects the inputs."""
    if rewrite_of(model) is not None:
        return model
    batches = (example, example.head(1))
    try:
        passes = [observed_calls(copied(model), batch) for batch in batches]
        plan = _Plan(*passes)
        if not plan.rewrite.calls:
            return model
        result = rewritten_as(model, plan.rewrite)
        _load(result, plan.values)
        outputs = [_run(copied(result), batch) for batch in batches]
    except Exception:  # a forward may raise any error; the observing pass reports it
        return model
    return result if all(_alike(new, one.outputs) for new, one in zip(outputs, passes, strict=True)) else model


def rewrite_of(model: nn.Module) -> Rewrite | None:
    """Return the rewrite that created this network; None if nothing was rewritten."""
    return getattr(model, "_rewrite", None)


def rewritten_as(model: nn.Module, rewrite: Rewrite) -> nn.Module:
    """Return a copy of `model` with the layers of `rewrite`, whose weights are loaded later; the model itself if it is already rewritten.

    Raises SchemeMismatch if the model lacks one of its modules or parameters.
    """
    if rewrite_of(model) is not None:
        return model
    model = copied(model)
    _leave_fused_paths(model)
    check_names([*rewrite.calls, *map(owner_of, rewrite.layers)], [name for name, _ in model.named_modules()], "The model")
    check_names(rewrite.dropped, [name for name, _ in model.named_parameters(remove_duplicate=False)], "The model")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    for name, layer in rewrite.layers.items():
        model.get_submodule(owner_of(name)).add_module(name.rpartition(".")[2], layer.make(device).train(model.training))
    for name in rewrite.dropped:
        owner, key = model.get_submodule(owner_of(name)), name.rpartition(".")[2]
        parameter = owner._parameters.pop(key)
        assert parameter is not None  # its name was looked up above
        # If anything still reads it, the outputs show it.
        owner.register_buffer(key, torch.full((), torch.nan, device=device).expand(parameter.shape), persistent=False)
    for name, calls in rewrite.calls.items():
        call_layers(model.get_submodule(name), [FunctionCall(**{**dict(call), "layers": tuple(call.layers)}) for call in calls])
    vars(model)["_rewrite"] = rewrite
    return model


def _leave_fused_paths(model: nn.Module) -> None:
    """Disable the fused paths of PyTorch's transformers, which bypass the layers in evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.enable_nested_tensor = module.use_nested_tensor = False


def owner_of(name: str) -> str:
    """Return the parent module of a parameter or a module."""
    return name.rpartition(".")[0]


@torch.no_grad()
def _load(model: nn.Module, values: Mapping[str, tuple[Tensor, Tensor | None]]) -> None:
    """Put weights and biases into the layers."""
    for name, (weight, bias) in values.items():
        layer = model.get_submodule(name)
        float_weight(layer).copy_(weight)
        own = float_bias(layer)
        if bias is not None and own is not None:
            own.copy_(bias)


def _run(model: nn.Module, batch: Batch) -> list[Tensor]:
    with torch.no_grad(), evaluating(model):
        return tensors_in(call(model, batch.inputs))


def _alike(outputs: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Return whether outputs agree up to the order of float sums."""
    return len(outputs) == len(others) and all(
        one.shape == other.shape
        and torch.allclose(one.float(), other.float(), 1e-3, 1e-3 * float(other.float().abs().nan_to_num().amax()), True)
        if one.numel()
        else one.shape == other.shape
        for one, other in zip(outputs, others, strict=True)
    )


# The plan of each call


class _Plan:
    """Plan a rewrite from two passes of a network, on batches of two sizes; a call that differs between them stays unchanged.

    values   layer -> its weight and bias
    read     parameters that something still reads
    """

    def __init__(self, first: Calls, second: Calls):
        self.first, self.second = first, second
        self.rewrite = Rewrite()
        self.values: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.taken = {*dict(first.model.named_modules()), *dict(first.model.named_parameters()), *dict(first.model.named_buffers())}
        self.read, absorbed = set(first.read), set()
        for owner, sites in first.sites.items():
            others = second.sites.get(owner, [])
            alike = [site.function for site in sites] == [site.function for site in others] and first.count[owner] == 1
            calls = []
            for site, other in zip(sites, others if alike else sites, strict=True):
                planned, weights = self._call(owner, site, other) if alike else (None, [])
                calls.append(planned or PlannedCall(function=site.function))
                absorbed |= first.weights_behind(weights)
                self.read |= first.weights_behind(
                    tensor for tensor in tensors_in(site.arguments) if all(tensor is not one for one in weights)
                )
            if any(planned.layers for planned in calls):
                self.rewrite.calls[owner] = calls
        self.rewrite.dropped = [name for names in first.tied() if self._is_unread(names, absorbed) for name in names]

    def _is_unread(self, names: Sequence[str], absorbed: set[str]) -> bool:
        """Return whether a parameter, under all its names, is only in the added layers."""
        layers = any(isinstance(self.first.model.get_submodule(owner_of(name)), COVERED) for name in names)
        return not layers and bool(absorbed & set(names)) and not self.read & set(names)

    def _call(self, owner: str, site: CallSite, other: CallSite) -> tuple[PlannedCall | None, list[Tensor]]:
        """Return (the call with the layers that compute it, the tensors that these layers hold); None if the function stays."""
        operands, stays = site.operands, (None, list[Tensor]())
        if not site.plain or any(operand.dtype != torch.float32 or operand.dim() < 2 for operand in operands):
            return stays
        weights = [index for index, operand in enumerate(operands) if id(operand) not in self.first.activations]
        if isinstance(self.first.model.get_submodule(owner), COVERED):
            return self._own_weight(owner, site, other) if weights == [1] else stays
        if not weights:
            layers = self._products(owner, site)
            return (PlannedCall(function=site.function, layers=layers), []) if layers else stays
        if len(weights) > 1 or site.function == ATTENTION or not self._is_weight(operands[weights[0]], other.operands[weights[0]]):
            return stays
        bias = site.arguments.get("bias")
        if bias is not None and not self._is_weight(bias, other.arguments.get("bias")):
            return stays
        if site.function in PRODUCTS:
            return self._weighted(owner, site, weights[0])
        if weights != [1]:
            return stays
        layer = self._child(owner, site) or self._added(owner, site, _layer_of(site), operands[1], bias)
        shape, smaller = operands[0].shape, other.operands[0].shape
        second = site.function == "linear" and len(shape) > 2 and shape[0] == smaller[0] and shape[1] > smaller[1]
        return PlannedCall(function=site.function, layers=[layer], batch_second=second), [operands[1], *([] if bias is None else [bias])]

    def _is_weight(self, tensor: Tensor, other: Tensor | None) -> bool:
        """Return whether a tensor is computed from parameters, and equal for every input."""
        return id(tensor) in self.first.sources and other is not None and tensor.shape == other.shape and torch.equal(tensor, other)

    def _own_weight(self, owner: str, site: CallSite, other: CallSite) -> tuple[PlannedCall | None, list[Tensor]]:
        """Plan a layer for a weight that the module computes from its own, such as a standardized one: the layer holds the result."""
        weight, own = site.operands[1], dict(self.first.model.named_parameters())[f"{owner}.weight"]
        if weight is own or weight.shape != own.shape or not self._is_weight(weight, other.operands[1]) or owner in self.values:
            return None, []
        self.values[owner] = weight, None
        return PlannedCall(function=site.function, layers=[""]), [weight]

    def _products(self, owner: str, site: CallSite) -> list[str]:
        """Add the Matmuls of a product of activations; none if it is not a matrix product."""
        if site.function == ATTENTION:
            return [self._matmul(owner, "scores", transposed=True), self._matmul(owner, "mixture", transposed=False)]
        left, right = site.operands
        if site.function not in PRODUCTS:  # one operand of a convolution is a weight
            return []
        of = contraction(site.arguments.get("equation"), left.dim(), right.dim())
        named = "equation" in site.arguments
        if of is None or (of.broadcasts(left.shape, right.shape) and (named or left.dim() != right.dim())):
            return []
        return [self._matmul(owner, "matmul", is_transposed(of) if named else right.stride(-2) < right.stride(-1))]

    def _matmul(self, owner: str, name: str, transposed: bool) -> str:
        return self._add(owner, name, AddedLayer(kind="Matmul", settings={"transposed": transposed}))

    def _weighted(self, owner: str, site: CallSite, index: int) -> tuple[PlannedCall | None, list[Tensor]]:
        """Plan a product with a weight: one linear, or one for each expert."""
        left, right = site.operands
        of = contraction(site.arguments.get("equation"), left.dim(), right.dim())
        if of is None or of.broadcasts(left.shape, right.shape):
            return None, []
        weight, added = site.operands[index], site.arguments.get("added")
        experts = weight_rows_of(of, weight, index)
        scaled = site.arguments.get("beta", 1) != 1 or site.arguments.get("alpha", 1) != 1
        bias = added if added is not None and added.shape == experts.shape[1:2] and id(added) in self.first.sources and not scaled else None
        layers = [self._added(owner, site, _linear(rows, bias), rows, bias, weight) for rows in experts]
        return PlannedCall(function=site.function, layers=layers, weight=index), [weight, *([] if bias is None else [bias])]

    def _child(self, owner: str, site: CallSite) -> str | None:
        """Return the path of the linear inside the module whose weight `F.linear` reads and that does not run itself; it gets the
        function's bias."""
        weight, bias = site.arguments["weight"], site.arguments.get("bias")
        name = owner_of(self.first.parameters.get(id(weight), ""))
        inside = name != owner and (not owner or name.startswith(f"{owner}."))
        layer = self.first.model.get_submodule(name)
        if not inside or site.function != "linear" or type(layer).forward is not nn.Linear.forward or name in self.values:
            return None
        if self.first.count[name] or (layer.bias is None) != (bias is None):
            return None
        self.values[name] = weight, bias
        return name.removeprefix(f"{owner}.")

    def _added(
        self, owner: str, site: CallSite, layer: AddedLayer, weight: Tensor, bias: Tensor | None, source: Tensor | None = None
    ) -> str:
        """Add a layer with this weight and bias, named after the weight's parameter."""
        names = self.first.weights_behind([weight if source is None else source])
        name = min(names).removeprefix(f"{owner}.") if len(names) == 1 else ""
        name = name.replace(".", "_").removesuffix("weight").strip("_") or layer.kind.lower()
        path = self._add(owner, name, layer)
        self.values[f"{owner}.{path}".lstrip(".")] = weight, bias
        return path

    def _add(self, owner: str, name: str, layer: AddedLayer) -> str:
        """Add a layer under `name` or, if that is taken, a similar name, which is returned."""
        module, prefix = self.first.model.get_submodule(owner), f"{owner}." if owner else ""
        if hasattr(module, name) and prefix + name not in self.rewrite.layers:
            name = f"{name}_{layer.kind.lower()}"
        free = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        path = next(path for path in free if prefix + path not in self.taken and not hasattr(module, path))
        self.taken.add(prefix + path)
        self.rewrite.layers[prefix + path] = layer
        return path


def _linear(rows: Tensor, bias: Tensor | None) -> AddedLayer:
    return AddedLayer(kind="Linear", settings={"in_features": rows.shape[1], "out_features": rows.shape[0], "bias": bias is not None})


def _layer_of(site: CallSite) -> AddedLayer:
    """Return the linear or the convolution that a function computes."""
    weight, bias, function = site.arguments["weight"], site.arguments.get("bias"), site.function
    if function == "linear":
        return _linear(weight, bias)
    kind = ("ConvTranspose" if "transpose" in function else "Conv") + function[-2:]
    groups = site.arguments.get("groups", 1)
    channels = (weight.shape[0], weight.shape[1] * groups)
    channels = channels if "transpose" in function else channels[::-1]
    settings = {"in_channels": channels[0], "out_channels": channels[1], "kernel_size": list(weight.shape[2:]), "bias": bias is not None}
    for name in ("stride", "padding", "output_padding", "groups", "dilation"):
        if name in site.arguments:
            value = site.arguments[name]
            settings[name] = list(value) if isinstance(value, (tuple, list)) else value
    return AddedLayer(kind=kind, settings=settings)
