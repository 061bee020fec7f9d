"""Observe in one pass which functions each module calls itself, on activations and on values computed from parameters only."""

from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from anybit.data.batches import Batch, call, evaluating, tensors_in
from anybit.networks.functions import ARGUMENTS, ATTENTION, PRODUCTS, bare_name, bound, running_module, seen_through
from anybit.networks.layer_types import COVERED
from anybit.networks.wiring import surroundings_of


@dataclass
class CallSite:
    """One call of a function that a layer could compute; `plain` if it would behave the same when the layer runs alone."""

    function: str
    arguments: dict[str, Any]
    plain: bool

    @property
    def operands(self) -> list[Tensor]:
        """Return the operands of the product."""
        names = ("query", "key", "value") if self.function == ATTENTION else PRODUCTS.get(self.function, ("input", "weight"))
        return [self.arguments[name] for name in names]


def observed_calls(model: nn.Module, batch: Batch) -> "Calls":
    """Run the model once and return its function calls."""
    observer = Calls(model)
    stack = ExitStack()
    for name, module in model.named_modules():
        stack.callback(module.register_forward_pre_hook(partial(observer.enter, name)).remove)
    with torch.no_grad(), evaluating(model), stack, observer:
        observer.begin(batch)
        observer.outputs = tensors_in(call(model, batch.inputs))
    for tensor in observer.outputs:
        observer.read |= observer.sources.get(id(tensor), frozenset())
    return observer


class Calls(TorchFunctionMode):
    """Sees every function of one pass. Tensors are kept alive, so that no id is reused.

    activations   ids of the tensors that depend on the inputs
    sources       id of a tensor computed from parameters alone -> their names
    read          parameters that are read other than by the calls in `sites`
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.names = {id(module): name for name, module in model.named_modules()}
        self.parameters = {id(parameter): name for name, parameter in reversed(list(model.named_parameters(remove_duplicate=False)))}
        self.sources = {number: frozenset([name]) for number, name in self.parameters.items()}
        self.activations: set[int] = set()
        self.alive: list[Tensor] = []
        self.sites: dict[str, list[CallSite]] = {}
        self.count: Counter[str] = Counter()
        self.read: frozenset[str] = frozenset()
        self.outputs: list[Tensor] = []

    def begin(self, batch: Batch) -> None:
        for tensor in tensors_in(batch.inputs):
            self._make(tensor)

    def enter(self, name: str, module: nn.Module, args: Any) -> None:
        self.count[name] += 1

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (inner := seen_through(func)) is not None:
            with self:
                return inner(*args, **kwargs)
        output, name = func(*args, **kwargs), bare_name(func)
        arguments = tensors_in((args, kwargs))
        results = tensors_in(args[0] if name == "setitem" else output)
        if not results:
            return output
        module = running_module()
        sources = frozenset().union(*(self.sources.get(id(tensor), frozenset()) for tensor in arguments))
        active = any(id(tensor) in self.activations for tensor in arguments)
        if name in ARGUMENTS and module is not None and id(module) in self.names:
            site = CallSite(name, bound(name, args, kwargs), all(surroundings_of(tensor) is None for tensor in results))
            self.sites.setdefault(self.names[id(module)], []).append(site)
        elif active:
            self.read |= sources
        for tensor in results:
            if active:
                self._make(tensor)
            elif (name in ARGUMENTS and isinstance(module, COVERED)) or 0 in tensor.stride():  # not a weight: a value that a layer computes
                # from a parameter, or a parameter expanded over samples
                self.read |= sources
            elif sources:
                self.sources[id(tensor)] = sources
                self.alive.append(tensor)
        return output

    def _make(self, tensor: Tensor) -> None:
        self.activations.add(id(tensor))
        self.alive.append(tensor)

    def weights_behind(self, tensors: Iterable[Tensor]) -> set[str]:
        """Return the parameters from which tensors are computed."""
        return {name for tensor in tensors for name in self.sources.get(id(tensor), ())}

    def tied(self) -> list[list[str]]:
        """Return all names of each parameter."""
        names: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        return list(names.values())
