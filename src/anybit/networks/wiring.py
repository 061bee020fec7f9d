"""Observe in one forward pass which operation reads which values.

A TorchFunctionMode sees module calls and plain functions alike. Control flow, functional activations and in-place sums are therefore
covered without tracing the model. The operations determine the batch norm and the activation after each layer, every tensor's readers,
the joins, the blocks, and the shapes from which costs are computed.
"""

import operator
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from anybit.data.batches import Batch, evaluating, map_leaves, map_tensors, run, tensors_in
from anybit.errors import InvalidInput, InvalidSetting, UnsupportedModel
from anybit.networks.layer_types import COVERED, type_of
from anybit.networks.norms import is_norm

LAYER, BATCH_NORM = "a layer", "a batch norm"  # kinds that no function's name can be
PRODUCTS = {"matmul", "bmm", "baddbmm", "mm", "addmm", "einsum", "scaled_dot_product_attention"}
FUNCTIONS = {
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "bilinear", "embedding",
}  # fmt: skip
JOINS = {"add", "sub", "mul", "cat", "concat", "concatenate", "stack"}
RESHAPES = {
    "flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "getitem", "chunk", "split",
    "expand", "narrow", "reshape_as", "view_as", "expand_as", "type_as", "dropout", "detach", "clone", "to", "float", "type", "t", "T",
    "movedim", "unflatten",
}  # fmt: skip
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu, "relu6": F.relu6, "hardtanh": F.hardtanh, "silu": F.silu, "gelu": F.gelu, "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "leaky_relu": F.leaky_relu, "elu": F.elu,
    "mish": F.mish, "clamp": torch.clamp, "clip": torch.clamp,
}  # fmt: skip
ESCAPES = {"item", "tolist", "numpy", "array", "bool", "float", "int", "index", "equal", "allclose", "is_nonzero"}
"""Functions that read values and return no tensor."""
LITERALS = {"tensor", "as_tensor", "asarray", "from_numpy"}
"""Functions whose numbers may come from anywhere."""
CLAMPS = {"relu", "relu6", "hardtanh", "clamp", "clip"}
"""Activations that only bound values, and so create no new ones."""
PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
"""Arguments that depend on no batch."""
MOVES = RESHAPES | {"max_pool1d", "max_pool2d", "max_pool3d", "identity"}
"""Functions whose output contains only numbers of their input, or zeros from padding."""


def name_of_call(module: str, call: int) -> str:
    """Return the name of a module's call, counted from 1; the first call has the module's own name."""
    return module if call == 1 else f"{module}#{call}"


def module_of_call(name: str) -> str:
    """Return the module of the call `name`."""
    module, mark, number = name.rpartition("#")
    return module if mark and number.isdecimal() else name


@dataclass(frozen=True)
class Operation:
    """Describe one observed step: a layer, a batch norm, or a function.

    name      the module's own name for a layer or batch norm, else "block/add", numbered if a block adds twice
    kind      LAYER or BATCH_NORM for a module, else the bare name of a function ("add" for +, += and torch.add)
    owner     the innermost module whose forward ran it; "" is the root
    inputs    numbers of the values that it reads; values are numbered in order of creation, starting with the model's inputs
    outputs   numbers of the values that it creates
    shape     shape of the first output, including the batch
    function  of an activation: the out-of-place function of one tensor
    call      of a module: which of its calls this is, from 1
    within    of a layer: the modules whose forwards were running, outermost first
    read      of a layer: the shape of the first tensor that it reads, including the batch
    moves     whether the output contains only numbers of the input, and zeros
    constants tensors of several numbers among the operands that are not observed values: weights, masks, buffers
    constant  whether all that it reads was computed from parameters, buffers and sizes alone
    """

    name: str
    kind: str
    owner: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    shape: tuple[int, ...]
    function: Callable[[Tensor], Tensor] | None = None
    call: int = 1
    within: tuple[str, ...] = ()
    read: tuple[int, ...] = ()
    moves: bool = False
    constants: int = 0
    constant: bool = False

    @property
    def edge(self) -> str:
        """Return the name of its first output's value; each call of a module has its own."""
        return name_of_call(self.name, self.call)

    @property
    def clamps(self) -> bool:
        """Return whether it only bounds one value."""
        return self.kind in CLAMPS and len(self.inputs) == 1 and not self.constants


@dataclass(frozen=True)
class Unit:
    """Describe a layer or a block whose output is reconstructed as a whole: `name` is the module to run, `layers` those in it, in call
    order.

    A layer may run in several `calls` of a pass.
    """

    name: str
    layers: tuple[str, ...]
    calls: int = 1


@dataclass(frozen=True)
class _Place:
    """Stand for the value of a tensor among a module's arguments."""

    value: int | None


@dataclass(frozen=True)
class SoleInput:
    """Describe the one tensor that a module reads: its value, and the module's (args, kwargs) with a placeholder for it."""

    value: int
    places: tuple[tuple, dict]

    def filled(self, item: Any) -> tuple[tuple, dict]:
        """Return (args, kwargs) with `item` in place of the placeholder."""
        return map_leaves(self.places, _Place, lambda _: item)


def _leaves(value: Any) -> list[Any]:
    """List the contents of nested tuples, lists and dicts."""
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


@dataclass(frozen=True)
class Wiring:
    """Hold the record of one forward pass. Lookups are by name; `calls` counts how often each module ran, and `module_outputs` are its
    outputs in each call, if all are tensors."""

    operations: tuple[Operation, ...]
    calls: dict[str, int]
    module_outputs: dict[str, tuple[int, ...]]
    input_values: tuple[int, ...]
    output_values: tuple[int, ...]
    batch_size: int
    classes: dict[str, str] = field(default_factory=dict)
    module_inputs: dict[str, "SoleInput"] = field(default_factory=dict)
    """Modules that read one tensor and otherwise only plain values."""
    escaped: frozenset[int] = frozenset()
    """Values read by something that is not an operation here: a comparison, an index, a number taken out."""
    surroundings: dict[str, str] = field(default_factory=dict)
    """Layer -> the context of its forward that is lost when it runs alone (vmap, autocast, gradients)."""
    read_weights: frozenset[str] = frozenset()
    """Layers whose weight or bias is also read elsewhere."""
    channels_second: dict[int, str] = field(default_factory=dict)
    """Value that a batch norm reads -> the layer whose channels, complete and in order, are its second dimension."""
    outputs: tuple[int | None, ...] = ()
    """Value of each tensor of the output, in order; None for a tensor that no operation computed."""

    @cached_property
    def _by_name(self) -> dict[str, Operation]:
        return {operation.name: operation for operation in reversed(self.operations)}  # the first of each name wins

    @cached_property
    def _by_input(self) -> dict[int, list[Operation]]:
        readers: dict[int, list[Operation]] = {}
        for operation in self.operations:
            for value in dict.fromkeys(operation.inputs):
                readers.setdefault(value, []).append(operation)
        return readers

    @cached_property
    def _by_output(self) -> dict[int, Operation]:
        return {value: operation for operation in self.operations for value in operation.outputs}

    @cached_property
    def _given_out(self) -> frozenset[int]:
        return frozenset(self.output_values) | self.escaped

    def operation(self, name: str) -> Operation:
        """Return the (first) operation with that name."""
        return self._by_name[name]

    def runs(self, layer: str) -> list[Operation]:
        """Return the operations of all calls of a layer or batch norm, in order."""
        return self._runs.get(layer, [])

    @cached_property
    def _runs(self) -> dict[str, list[Operation]]:
        runs: dict[str, list[Operation]] = {}
        for operation in self.operations:
            if operation.kind in (LAYER, BATCH_NORM):
                runs.setdefault(operation.name, []).append(operation)
        return runs

    def readers(self, value: int) -> list[Operation]:
        """Return the operations that read `value`, in order."""
        return self._by_input.get(value, [])

    def maker(self, value: int) -> Operation | None:
        """Return the operation that computes `value`; None for the model's inputs."""
        return self._by_output.get(value)

    def only_reader(self, value: int) -> Operation | None:
        """Return the only operation that reads `value`; None if there are several, or if the model returns the value."""
        readers = self.readers(value)
        return readers[0] if len(readers) == 1 and value not in self._given_out else None

    def operations_behind(self, places: Sequence[int] | None = None, escaped: bool = False) -> tuple[Operation, ...]:
        """Return the operations on which the outputs at `places` (None: all) depend, and if `escaped`, those on which escaped values do."""
        reached = {value for place, value in enumerate(self.outputs) if places is None or place in places}
        reached |= self.escaped if escaped else set()
        behind = []
        for op in reversed(self.operations):
            if reached & set(op.outputs):
                reached.update(op.inputs)
                behind.append(op)
        return tuple(reversed(behind))

    def layers_behind(self, places: Sequence[int] | None = None, escaped: bool = False) -> set[str]:
        """Return the layers among `operations_behind`."""
        return {op.name for op in self.operations_behind(places, escaped) if op.kind == LAYER}

    def layer_names(self) -> list[str]:
        """Return the layers of a supported class that ran, in order of their first call."""
        return list(dict.fromkeys(op.name for op in self.operations if op.kind == LAYER))

    def constant_layers(self) -> set[str]:
        """Return the layers that do not depend on the inputs in any of their calls."""
        return {name for name in self.layer_names() if all(op.constant for op in self.runs(name))}

    def batch_norm_after(self, layer: str) -> str | None:
        """Return the batch norm that alone reads this layer's output and normalizes its channels, both called once; None if there is
        none."""
        value = self.operation(layer).outputs[0]
        reader = self.only_reader(value)
        while reader is not None and reader.kind in RESHAPES and len(reader.outputs) == 1:
            (value,) = reader.outputs
            reader = self.only_reader(value)
        if reader is None or reader.kind != BATCH_NORM or self.calls[layer] != 1 or self.calls[reader.name] != 1:
            return None
        return reader.name if self.channels_second.get(value) == layer else None

    def activation_after(self, module: str) -> Callable[[Tensor], Tensor] | None:
        """Return the activation that alone reads this module's output (directly or after its batch norm), or None. For a module that runs
        several times, all its outputs must be read by the same activation.

        A ReLU after a residual sum belongs to the sum, not to the convolution: the sum stands between them here as in the network.
        """
        first, *others = [self._activation_of(value) for value in self.module_outputs.get(module, ())] or [None]
        return first if all(_alike(first, other) for other in others) else None

    def _activation_of(self, value: int) -> Callable[[Tensor], Tensor] | None:
        reader = self.only_reader(value)
        if reader is not None and reader.kind == BATCH_NORM:
            reader = self.only_reader(reader.outputs[0])
        return None if reader is None else reader.function

    def feeds(self, first: str, second: str) -> bool:
        """Return whether module `second` reads only the output of `first`, through the activation after it if there is one."""
        if self.calls.get(first) != 1 or self.calls.get(second) != 1 or first not in self.module_outputs:
            return False
        (value,) = self.module_outputs[first]
        reader = self.only_reader(value)
        if reader is not None and reader.function is not None:
            value = reader.outputs[0]
        elif reader is not None and reader.kind == BATCH_NORM:
            return False
        return second in self.module_inputs and self.module_inputs[second].value == value

    def joins(self) -> list[Operation]:
        """Return the sums, products and concatenations of several observed values."""
        return [op for op in self.operations if op.kind in JOINS and len(set(op.inputs)) > 1]

    def products(self) -> list[Operation]:
        """Return matrix products of several observed values that no layer computes."""
        return [op for op in self.operations if op.kind in PRODUCTS and len(set(op.inputs)) > 1]

    def functions(self) -> list[Operation]:
        """Return the convolutions, linears and embeddings that no layer computes."""
        return [op for op in self.operations if op.kind in FUNCTIONS]

    def blocks(self, named: list[str] | None = None) -> list[str]:
        """Return the modules to reconstruct as a whole: the innermost ones whose forward joins values, and others of the same class.

        A join in the root makes no block; of two nested candidates the inner one wins. A module that shares a layer with the outside is not
        a block. `named` replaces this choice.
        """
        if named is not None:
            return self._check_blocks(named)
        joining = {op.owner for op in self.joins() if op.owner}
        # The first block of a stage often has no shortcut and hence no join, but it has the same class as the others.
        kinds = {self.classes[name] for name in joining}
        candidates = {name for name, count in self.calls.items() if name and count == 1 and self.classes[name] in kinds}
        candidates = {name for name in candidates | joining if self._is_whole(name)}
        return [name for name in self.calls if name in candidates and not any(_inside(other, name) for other in candidates)]

    def _is_whole(self, module: str) -> bool:
        """Return whether a module runs once, returns one tensor, and runs all calls of the layers in it and of no others."""
        runs_once = self.calls.get(module) == 1 and module in self.module_outputs
        return runs_once and all(_inside(op.name, module) == (module in op.within) for op in self.operations if op.kind == LAYER)

    def _check_blocks(self, named: list[str]) -> list[str]:
        for name in named:
            if not self._is_whole(name):
                raise InvalidSetting(
                    f"Block {name!r} is not a module that runs once, returns one tensor and shares no layer. Name a submodule that is."
                )
            nested = [other for other in named if _inside(other, name)]
            if nested:
                raise InvalidSetting(f"Block {name!r} contains block {nested[0]!r}. Name one of the two.")
        return named

    def units(self, layers: list[str], blocks: list[str]) -> list[Unit]:
        """Return the layers grouped into blocks, the others alone, in order of their first call."""
        units: dict[str, list[str]] = {}
        for layer in layers:
            home = next((block for block in blocks if _inside(layer, block)), layer)
            units.setdefault(home, []).append(layer)
        return [Unit(name, tuple(members), self.calls[name]) for name, members in units.items()]

    def edges(self) -> list[str]:
        """Return the names of the tensors that a runtime may hold as integers: the inputs ("input/0", ...) and each operation's output.

        Reshapes are left out (their input's range applies), and so are values that only a clamp reads (ReLU; the clamp's output is the
        edge).
        """
        names = [f"input/{index}" for index in range(len(self.input_values))]
        for op in self.operations:
            reader = self.only_reader(op.outputs[0]) if op.outputs else None
            if op.kind not in RESHAPES and not (reader is not None and reader.clamps):
                names.append(op.edge)
        return list(dict.fromkeys(names))


def _inside(name: str, block: str) -> bool:
    return name.startswith(block + ".")


def _alike(one: Callable[[Tensor], Tensor] | None, other: Callable[[Tensor], Tensor] | None) -> bool:
    """Return whether two activations compute the same function, judged by their values."""
    x = torch.linspace(-10, 10, 1001)
    return one is other or (one is not None and other is not None and torch.equal(one(x), other(x)))


def observe(model: nn.Module, batch: Batch, on_value: Callable[[str, Tensor], None] | None = None) -> Wiring:
    """Run `model` once on `batch`, in evaluation mode and without gradients, and return its wiring.

    `on_value(name, tensor)` is called with every named value when it is computed ("input/0", ..., then each operation's first output).
    Raises InvalidInput if the model rejects the batch, UnsupportedModel if it returns no tensor.
    """
    return observe_outputs(model, batch, on_value)[0]


def observe_outputs(model: nn.Module, batch: Batch, on_value: Callable[[str, Tensor], None] | None = None) -> tuple[Wiring, Any]:
    """Return (wiring, the model's output) of one pass as in `observe`, so that the output needs no pass of its own."""
    observer = _Observer(model, on_value)
    batch = replace(batch, inputs=map_tensors(batch.inputs, Tensor.clone))  # the forward may modify them
    try:
        with torch.no_grad(), evaluating(model), observer.hooks(), observer, without_replacing():
            observer.begin(batch)
            output = run(model, batch.inputs)
    except (InvalidInput, UnsupportedModel):
        raise
    except Exception as error:  # a model's own checks may raise any error
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(batch.inputs))
        message = " ".join(str(error).split()).rstrip(".")
        remedy = _remedy(message, tensors_in(batch.inputs), model)
        raise InvalidInput(f"The model refuses inputs of shape {shapes}: {type(error).__name__}: {message}. {remedy}") from error
    return observer.finish(output, len(batch)), output


def _remedy(message: str, inputs: Sequence[Tensor], model: nn.Module) -> str:
    """Return what to do about inputs that a network refuses with this message."""
    channels = re.search(r"to have (\d+) channels, but got (\d+) channels", message)
    if channels and channels.groups() == ("1", "3"):
        return "Give grey images: of one channel, or as an array uint8 [N, H, W]."
    if channels and channels.groups() == ("3", "1"):
        return "Give images of three channels: a grey one has its channel three times."
    other = next(
        (f"{name} is {one.dtype}" for name, one in model.named_parameters() if one.dtype != torch.float32 and one.is_floating_point()), None
    )
    if other is not None and re.search(r"d?type", message):
        return f"{other}, and anybit computes in float32. Convert the network first: model.float()."
    if re.search(r"d?type", message) and any(not tensor.is_floating_point() for tensor in inputs):
        kinds = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in inputs}))
        return f"The inputs are {kinds}. If the network computes on floats, convert them to float32 first."
    return "Check --data, --size and the model's own input shape."


_PLAIN = ContextVar("plain", default=False)


@contextmanager
def without_replacing() -> Iterator[None]:
    """Disable `run_replacing` inside the block, so that the network itself is observed."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def run_replacing(
    model: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict, replace: Callable[[str, Tensor], Tensor | None]
) -> Any:
    """Run `forward` of `model` and replace values by the results of `replace(name, tensor)`, with the names of `observe`; None
    leaves a value unchanged. Nothing is replaced during `observe`."""
    if _PLAIN.get():
        return forward(*args, **kwargs)
    observer = _Replacer(model, replace)
    with observer.hooks(), observer:
        tensors = tensors_in((args, kwargs))
        shown = [observer.begin_with(f"input/{index}", tensor) for index, tensor in enumerate(tensors)]
        if any(new is not old for new, old in zip(shown, tensors, strict=True)):
            following = iter(shown)
            args, kwargs = map_tensors((args, kwargs), lambda _: next(following))
        return forward(*args, **kwargs)


class _Namer(TorchFunctionMode):
    """Name every value when it is computed."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.values: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()  # a live tensor -> number of its current value
        self.made = 0
        self.stack: list[str] = [""]
        self.inside_leaf = 0
        self.names: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        self.norms = {id(module) for module in model.modules() if is_norm(module)}

    def hooks(self) -> ExitStack:
        """Put hooks on every module, removed when the stack closes."""
        stack = ExitStack()
        for name, module in self.model.named_modules():
            if name:
                stack.callback(module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(partial(self._leave, name), with_kwargs=True, always_call=False).remove)
        return stack

    def _enter(self, name: str, module: nn.Module, args, kwargs) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        self.stack.append(name)
        self.inside_leaf += self._is_leaf(module)

    def _leave(self, name: str, module: nn.Module, args, kwargs, output) -> Any:
        """Record the output of a leaf module; returns the output."""
        self.stack.pop()
        if self._is_leaf(module):
            self.inside_leaf -= 1
            if not self.inside_leaf:
                kind = LAYER if isinstance(module, COVERED) else BATCH_NORM
                output = self._record(name, kind, self.stack[-1], (args, kwargs), output)
        return output

    def _is_leaf(self, module: nn.Module) -> bool:
        return isinstance(module, COVERED) or id(module) in self.norms

    def _record(self, name: str, kind: str, owner: str, arguments, output, function=None) -> Any:
        raise AssertionError("subclasses record")

    def _named(self, name: str, kind: str) -> tuple[str, int]:
        """Return (the name of an operation, the index of its module's call)."""
        if kind in (LAYER, BATCH_NORM):
            return name, self.calls[name]
        count = self.names[name] = self.names.get(name, 0) + 1
        return (name if count == 1 else f"{name}.{count}"), 1

    def _new_value(self, tensor: Tensor) -> int:
        """Number a value. An in-place operation gives its tensor a new number: earlier readers read another value."""
        self.values[tensor] = self.made
        self.made += 1
        return self.made - 1


class _Replacer(_Namer):
    """Replace some values in every run of a network that rounds its edges; nothing is recorded and no tensor is kept."""

    def __init__(self, model: nn.Module, replace: Callable[[str, Tensor], Tensor | None]):
        super().__init__(model)
        self.replace = replace

    def begin_with(self, name: str, tensor: Tensor) -> Tensor:
        """Number one of the network's inputs and return its replacement."""
        self._new_value(tensor)
        return self._replaced(name, tensor, False)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self.inside_leaf:
            return output
        kind = _bare_name(func)
        created = args[0] if kind == "setitem" else output
        if not any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors_in(created)):
            return output
        arguments = (args[:1] if kind.endswith("_as") else args), kwargs
        if not any(tensor in self.values for tensor in tensors_in(arguments)):
            return output
        shown = self._record(f"{self.stack[-1]}/{kind}".lstrip("/"), kind, self.stack[-1], arguments, created)
        return output if kind == "setitem" else shown

    def _record(self, name: str, kind: str, owner: str, arguments, output, function=None) -> Any:
        """Name the values that an operation computed; returns its output or the replacement."""
        name, tensors = name_of_call(*self._named(name, kind)), tensors_in(output)
        for tensor in tensors:
            self._new_value(tensor)
        if not tensors:
            return output
        shown = self._replaced(name, tensors[0], any(tensor is tensors[0] for tensor in tensors_in(arguments)))
        return shown if isinstance(output, Tensor) else output

    def _replaced(self, name: str, tensor: Tensor, in_place: bool) -> Tensor:
        """Return the replacement of a value; after an `in_place` operation the tensor itself, since others may hold it."""
        self.inside_leaf += 1  # its computation is not part of the network
        replaced = self.replace(name, tensor)
        if replaced is not None:
            if in_place and not tensor.requires_grad:
                tensor.copy_(replaced)
            else:  # autograd forbids writing into tensors that it has saved
                self.values[replaced] = self.values[tensor]
                tensor = replaced
        self.inside_leaf -= 1
        return tensor


class _Observer(_Namer):
    """Record all operations of a pass. Every tensor is kept alive for it."""

    def __init__(self, model: nn.Module, on_value: Callable[[str, Tensor], None] | None):
        super().__init__(model)
        self.on_value = on_value
        self.operations: list[Operation] = []
        self.alive: list[Tensor] = []
        self.module_outputs: dict[str, list[int]] = {}
        self.classes = {name: _float_class(module).__name__ for name, module in model.named_modules()}
        self.shapes_read: dict[str, tuple[int, ...]] = {}
        self.module_inputs: dict[str, SoleInput] = {}
        self.escaped: set[int] = set()
        self.surroundings: dict[str, str] = {}
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, COVERED)]
        self.weights = {id(parameter): name for name, module in layers for parameter in module.parameters(recurse=False)}
        self.read_weights: set[str] = set()
        self.channels_last = {name for name, module in layers if type_of(module).channels_last}
        self.marks: dict[int, tuple[str, int, Tensor]] = {}  # value -> (layer, number of channels, channel index at each place)
        self.channels_second: dict[int, str] = {}
        self.constants: MutableMapping[Tensor, None] = WeakTensorKeyDictionary()
        for module in model.modules():
            attributes = {key: value for key, value in vars(module).items() if key != "_modules"}
            self.constants.update(dict.fromkeys(tensors_in(attributes)))

    def begin(self, batch: Batch) -> None:
        self.input_values = tuple(self._new_value(tensor) for tensor in tensors_in(batch.inputs))
        for index, tensor in enumerate(tensors_in(batch.inputs)):
            self._show(f"input/{index}", tensor)

    def finish(self, output, batch_size: int) -> Wiring:
        tensors = tensors_in(output)
        if not tensors:
            raise UnsupportedModel(f"The model returns a {type(output).__name__} without a tensor; anybit needs at least one.")
        given_out = tuple(self.values[tensor] for tensor in tensors if tensor in self.values)
        return Wiring(
            tuple(self.operations), self.calls,
            {name: tuple(values) for name, values in self.module_outputs.items() if len(values) == self.calls[name]},
            self.input_values, given_out, batch_size, self.classes, self.module_inputs, frozenset(self.escaped),
            self.surroundings, frozenset(self.read_weights), self.channels_second,
            tuple(self.values.get(tensor) for tensor in tensors),
        )  # fmt: skip

    def _enter(self, name: str, module: nn.Module, args, kwargs) -> None:
        super()._enter(name, module, args, kwargs)
        self._note_sole_input(name, (args, kwargs))
        if isinstance(module, COVERED):
            read = tensors_in((args, kwargs))
            if not read and type_of(module).reads_numbers:
                raise UnsupportedModel(f"Layer {name} receives no tensor. Pass it one, or remove the layer.")
            self.shapes_read[name] = tuple(read[0].shape) if read else ()
            if read and (context := surroundings_of(read[0])):
                self.surroundings[name] = context

    def _note_sole_input(self, name: str, arguments: tuple[tuple, dict]) -> None:
        places = map_leaves(arguments, Tensor, lambda tensor: _Place(self.values.get(tensor)))
        match [leaf for leaf in _leaves(places) if not isinstance(leaf, PLAIN)]:
            case [_Place(value=int(value))]:
                self.module_inputs[name] = SoleInput(value, places)

    def _leave(self, name: str, module: nn.Module, args, kwargs, output) -> None:
        super()._leave(name, module, args, kwargs, output)
        if isinstance(output, Tensor) and output in self.values:
            self.module_outputs.setdefault(name, []).append(self.values[output])

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if not self.inside_leaf:
            kind, owner = _bare_name(func), self.stack[-1]
            created = args[0] if kind == "setitem" else output
            tensors = tensors_in(created)
            self._note_constants(kind, tensors_in((args, kwargs)), tensors)
            if not tensors and kind not in ESCAPES:  # a shape, a type, a device: most calls
                return output
            arguments = (args[:1] if kind.endswith("_as") else args), kwargs  # only a shape or type of the other is read
            reads = [tensor for tensor in tensors_in(arguments) if tensor in self.values]
            makes = [tensor for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]
            self.read_weights.update(self.weights[id(tensor)] for tensor in tensors_in(arguments) if id(tensor) in self.weights)
            if not makes:
                self.escaped.update(self.values[tensor] for tensor in reads)
            if reads and kind == "add" and _adds_zero(args, kwargs):
                self._named(f"{owner}/{kind}".lstrip("/"), kind)  # so that later operations keep their names
                self._alias(output, reads[0])
            elif reads and makes:
                marked = self.marks.get(self.values[reads[0]]) if kind in RESHAPES else None
                self._record(f"{owner}/{kind}".lstrip("/"), kind, owner, arguments, created, _activation(kind, args, kwargs))
                if marked is not None:
                    self._mark(marked, tensors, func, args, kwargs)
        return output

    def _note_constants(self, kind: str, read: Sequence[Tensor], created: Sequence[Tensor]) -> None:
        """Note which tensors do not depend on the inputs: those computed from others like them, or from sizes."""
        constant = kind not in LITERALS and all(tensor in self.constants for tensor in read)
        for tensor in created:
            if constant:
                self.constants[tensor] = None
            else:
                self.constants.pop(tensor, None)  # an in-place operation may have written into it

    def _alias(self, output: Tensor, value: Tensor) -> None:
        """Give the output of an operation that changes nothing the number of its input."""
        if output is not value:
            self.alive.append(output)
            self.values[output] = self.values[value]

    def _mark(self, marked: tuple[str, int, Tensor], outputs: list[Tensor], func, args: tuple, kwargs: dict) -> None:
        """Reshape the channel marks of an operation's input as the operation reshaped its values."""
        layer, count, marks = marked
        with suppress(Exception):  # if the values are not the first argument, their channels are unknown
            moved = tensors_in(func(marks, *args[1:], **kwargs))
            self.marks |= {self.values[output]: (layer, count, mark) for output, mark in zip(outputs, moved, strict=True)}

    def _record(self, name: str, kind: str, owner: str, arguments, output, function=None) -> Any:
        """Record an operation; returns its output."""
        read = tensors_in(arguments)
        inputs = tuple(self.values[tensor] for tensor in read if tensor in self.values)
        constants = sum(tensor.numel() > 1 for tensor in read if tensor not in self.values)
        tensors = tensors_in(output)
        is_layer = kind == LAYER
        name, call = self._named(name, kind)
        outputs = tuple(self._new_value(tensor) for tensor in tensors)
        shape = tuple(tensors[0].shape) if tensors else ()
        within, seen = (tuple(self.stack[1:]), self.shapes_read[name]) if is_layer else ((), ())
        moves = kind in MOVES or (kind == "pad" and _pads_zeros(*arguments))
        constant = all(tensor in self.constants for tensor in read)
        operation = Operation(name, kind, owner, inputs, outputs, shape, function, call, within, seen, moves, constants, constant)
        self.operations.append(operation)
        if is_layer or kind == BATCH_NORM:  # functions are noted where they are called
            self._note_constants(kind, read, tensors)
        if not tensors:
            return output
        self._mark_channels(operation, tensors)
        self._show(operation.edge, tensors[0])
        return output

    def _mark_channels(self, operation: Operation, outputs: list[Tensor]) -> None:
        """Mark the channels in the output of a layer; look them up in the input of a batch norm."""
        if operation.kind == LAYER and len(outputs) == 1 and outputs[0].dim() > 1:
            dimension = -1 if operation.name in self.channels_last else 1
            channels = _channels(outputs[0].shape, dimension)
            self.marks[operation.outputs[0]] = operation.name, outputs[0].shape[dimension], channels
        if operation.kind == BATCH_NORM and operation.inputs and operation.inputs[0] in self.marks:
            layer, count, marks = self.marks[operation.inputs[0]]
            if marks.shape[1:2] == (count,) and torch.equal(marks, _channels(marks.shape, 1)):
                self.channels_second[operation.inputs[0]] = layer

    def _show(self, name: str, tensor: Tensor) -> None:
        self.inside_leaf += 1  # the caller's computation is not part of the network
        if self.on_value:
            self.on_value(name, tensor)
        self.inside_leaf -= 1

    def _new_value(self, tensor: Tensor) -> int:
        self.alive.append(tensor)
        return super()._new_value(tensor)


def _channels(shape: Sequence[int], dimension: int) -> Tensor:
    """Return the channel index at each place of a tensor with channels in `dimension`: a view of few numbers."""
    places = [1] * len(shape)
    places[dimension] = -1
    return torch.arange(shape[dimension], dtype=torch.float32).view(places).expand(*shape)


def surroundings_of(tensor: Tensor) -> str | None:
    """Return the context of a layer that reads `tensor` which is lost when the layer runs alone; None in a plain forward."""
    if torch._C._functorch.is_batchedtensor(tensor):
        return "inside torch.vmap"
    if torch.is_autocast_enabled(tensor.device.type):
        return "under torch.autocast, in half precision"
    return "with gradients enabled by the network's forward" if torch.is_grad_enabled() else None


def _float_class(module: nn.Module) -> type:
    """Return the class that the model's author wrote, below a swapped one."""
    return next(cls for cls in type(module).__mro__ if not cls.__name__.startswith(("Quantized", "Folded")))


_IN_PLACE = {operator.iadd.__name__: "add", "radd": "add", "imul": "mul", "rmul": "mul", "isub": "sub", "rsub": "sub"}


def _bare_name(func) -> str:
    """Return "add" for torch.add, Tensor.add_, x + y and x += y."""
    name = getattr(func, "__name__", type(func).__name__).strip("_")
    return _IN_PLACE.get(name, name)


def _adds_zero(args: tuple, kwargs: dict) -> bool:
    """Return whether a sum adds the number 0 to a tensor, as sums over branches do first or last: exporters omit it."""
    terms = [*args, *kwargs.values()]
    numbers = [term for term in terms if isinstance(term, int | float)]
    return len(terms) == 2 and numbers == [0] and len(tensors_in(terms)) == 1


def _pads_zeros(args: tuple, kwargs: dict) -> bool:
    """Return whether a call of `F.pad` puts zeros around its input."""
    mode, value = [*args[2:], *[None] * 2][:2]
    return kwargs.get("mode", mode) in (None, "constant") and not kwargs.get("value", value)


def _activation(kind: str, args: tuple, kwargs: dict) -> Callable[[Tensor], Tensor] | None:
    """Return this call as an out-of-place function of one tensor; None if it is not an activation."""
    if kind not in ACTIVATIONS or tensors_in((args[1:], kwargs)):
        return None
    settings = {key: value for key, value in kwargs.items() if key not in ("inplace", "input")}
    rest = args[1:]
    if kind in ("relu", "relu6", "silu", "hardswish", "hardsigmoid", "mish"):
        rest = ()  # its only positional argument is `inplace`
    if kind in ("hardtanh", "leaky_relu", "elu"):
        rest = rest[: {"hardtanh": 2, "leaky_relu": 1, "elu": 1}[kind]]
    return lambda x: ACTIVATIONS[kind](x, *rest, **settings)
