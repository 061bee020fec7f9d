"""A network rewritten so that layers compute what functions did: on weights that are no layer's, or products of two activations.

One observed pass shows which functions each module calls itself, on activations and on what is made of parameters alone. A copy then gets
a layer for each: a Linear or a convolution that holds the weight, a Matmul, or the layer whose weight the function took. What was done is a
`Rewrite`, which a run's file holds, so that a network loaded without inputs can be rewritten alike.
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
    """A layer that a rewrite adds: the name of its class and what it is made with."""

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
        """Return how many numbers its weight has."""
        return float_weight(self.make("meta")).numel()

    def make(self, device: torch.device | str | None) -> nn.Module:
        """Make the layer; its weight is yet to be loaded."""
        settings: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in self.settings.items()}
        with torch.device("meta"):
            return ADDED[self.kind](**settings).to_empty(device=device)


class PlannedCall(BaseModel):
    """A `FunctionCall` as a file holds it."""

    model_config = ConfigDict(extra="forbid", strict=True)
    function: str
    layers: list[str] = []
    weight: int | None = None
    batch_second: bool = False


class Rewrite(BaseModel):
    """Turn a network into one whose layers compute its functions.

    calls    module -> the functions that it calls itself, in order
    layers   layer that is added -> how it is made
    dropped  parameters that nothing reads any more
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    calls: dict[str, list[PlannedCall]] = {}
    layers: dict[str, AddedLayer] = {}
    dropped: list[str] = []


def calls_functions(model: nn.Module, wiring: Wiring) -> bool:
    """Return whether there may be something to rewrite in a network: functions that layers could compute, in the pass that `wiring` is of
    or hidden in a layer with a forward of its own."""
    functions = {*ARGUMENTS, *SEEN_THROUGH}
    called = any(operation.kind in functions for operation in wiring.operations)
    return called or any(isinstance(module, COVERED) and type(module).forward is not _float_forward(module) for module in model.modules())


def _float_forward(module: nn.Module) -> Any:
    """Return the forward of the class that anybit covers, from which the module's own inherits."""
    return next(cls for cls in type(module).__mro__ if cls in COVERED).__dict__.get("forward")


def rewritten(model: nn.Module, example: Batch) -> nn.Module:
    """Return a copy of `model` whose layers compute what its functions did; the model itself where there is nothing to rewrite, where the
    copy's outputs would not be the model's, and where the model refuses the inputs."""
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
    except Exception:  # of a forward, whatever it likes: the pass that every network is observed in says what
        return model
    return result if all(_alike(new, one.outputs) for new, one in zip(outputs, passes, strict=True)) else model


def rewrite_of(model: nn.Module) -> Rewrite | None:
    """Return the rewrite that made this network; None where nothing was rewritten."""
    return getattr(model, "_rewrite", None)


def rewritten_as(model: nn.Module, rewrite: Rewrite) -> nn.Module:
    """Return a copy of `model` with the layers of `rewrite`, whose weights are yet to be loaded; itself, where it is rewritten.

    Raise SchemeMismatch where the model lacks a module or a parameter of it.
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
        assert parameter is not None  # as its name was found
        # Whatever reads it still shows in the outputs.
        owner.register_buffer(key, torch.full((), torch.nan, device=device).expand(parameter.shape), persistent=False)
    for name, calls in rewrite.calls.items():
        call_layers(model.get_submodule(name), [FunctionCall(**{**dict(call), "layers": tuple(call.layers)}) for call in calls])
    vars(model)["_rewrite"] = rewrite
    return model


def _leave_fused_paths(model: nn.Module) -> None:
    """Let each layer of PyTorch's transformers run itself: their fused paths read the weights, in evaluation mode alone."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.enable_nested_tensor = module.use_nested_tensor = False


def owner_of(name: str) -> str:
    """Return the module of a parameter or a module."""
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
    """Return whether outputs are the same up to the order of float sums."""
    return len(outputs) == len(others) and all(
        one.shape == other.shape
        and torch.allclose(one.float(), other.float(), 1e-3, 1e-3 * float(other.float().abs().nan_to_num().amax()), True)
        if one.numel()
        else one.shape == other.shape
        for one, other in zip(outputs, others, strict=True)
    )


# What becomes of each call


class _Plan:
    """The rewrite that two passes of a network, on batches of two sizes, allow: a call that differs between them stays as it is.

    values   layer -> the weight and the bias that it gets
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
        """Return whether a parameter, by all its names, is in the added layers alone."""
        layers = any(isinstance(self.first.model.get_submodule(owner_of(name)), COVERED) for name in names)
        return not layers and bool(absorbed & set(names)) and not self.read & set(names)

    def _call(self, owner: str, site: CallSite, other: CallSite) -> tuple[PlannedCall | None, list[Tensor]]:
        """Return (the call with the layers that compute it, the tensors that are in those layers then); None where the function stays."""
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
        """Return whether a tensor is made of parameters, and the same for each input."""
        return id(tensor) in self.first.sources and other is not None and tensor.shape == other.shape and torch.equal(tensor, other)

    def _own_weight(self, owner: str, site: CallSite, other: CallSite) -> tuple[PlannedCall | None, list[Tensor]]:
        """Plan a layer that computes with a weight made of its own, such as a standardized one: it gets what it computes with."""
        weight, own = site.operands[1], dict(self.first.model.named_parameters())[f"{owner}.weight"]
        if weight is own or weight.shape != own.shape or not self._is_weight(weight, other.operands[1]) or owner in self.values:
            return None, []
        self.values[owner] = weight, None
        return PlannedCall(function=site.function, layers=[""]), [weight]

    def _products(self, owner: str, site: CallSite) -> list[str]:
        """Add the Matmuls of a product of activations; none where it is no matrix product."""
        if site.function == ATTENTION:
            return [self._matmul(owner, "scores", transposed=True), self._matmul(owner, "mixture", transposed=False)]
        left, right = site.operands
        if site.function not in PRODUCTS:  # an operand of a convolution is the weight
            return []
        of = contraction(site.arguments.get("equation"), left.dim(), right.dim())
        named = "equation" in site.arguments
        if of is None or (of.broadcasts(left.shape, right.shape) and (named or left.dim() != right.dim())):
            return []
        return [self._matmul(owner, "matmul", is_transposed(of) if named else right.stride(-2) < right.stride(-1))]

    def _matmul(self, owner: str, name: str, transposed: bool) -> str:
        return self._add(owner, name, AddedLayer(kind="Matmul", settings={"transposed": transposed}))

    def _weighted(self, owner: str, site: CallSite, index: int) -> tuple[PlannedCall | None, list[Tensor]]:
        """Plan a product with a weight: a linear, or one for each of several experts."""
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
        """Return the path of the linear inside the module whose weight `F.linear` takes, and that itself does not run; it gets the bias
        that the function takes."""
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
        """Add a layer of this weight and bias, called after the parameter that the weight comes from."""
        names = self.first.weights_behind([weight if source is None else source])
        name = min(names).removeprefix(f"{owner}.") if len(names) == 1 else ""
        name = name.replace(".", "_").removesuffix("weight").strip("_") or layer.kind.lower()
        path = self._add(owner, name, layer)
        self.values[f"{owner}.{path}".lstrip(".")] = weight, bias
        return path

    def _add(self, owner: str, name: str, layer: AddedLayer) -> str:
        """Add a layer under a name like this that is free, which is returned."""
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
