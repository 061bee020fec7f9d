"""A digest of everything that the exporter's graph of a network depends on, except the values of its weights.

Two forward passes, on batches and texts of different sizes, are recorded operator by operator with their arguments. A tensor is identified
by its origin (a weight's name, an input, an earlier operator); others, which the exporter stores as constants, by their values. Any change
of the code, or of a number in it, therefore shows. Code that runs in neither pass, such as branches for other sizes, is covered by the code
of the modules' classes and the versions of their packages.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from anybit.data.batches import Inputs, map_tensors, run, tensors_in
from anybit.environment import code_version
from anybit.files.contents import digest

EXPORTER = ("torch", "onnx", "onnx_ir", "onnxscript")
"""Packages besides the modules' own whose versions the graph depends on."""


def graph_digest(model: nn.Module, inputs: Inputs, length: int | None) -> str:
    """Return the SHA-256 over the structure, code and recorded passes of `model`; `length` is that of padded texts among the inputs.

    Raises any error of the forward if its operators cannot be recorded.
    """
    classes = {f"{type(module).__module__}.{type(module).__qualname__}": type(module) for module in model.modules()}
    packages = {*EXPORTER, *(name.partition(".")[0] for name in classes)}
    names = {module: name for name, module in model.named_modules()}
    depends = [
        code_version(),
        sys.version,
        {package: str(getattr(sys.modules.get(package), "__version__", None)) for package in packages},
        [[name, names[module], type(module).__qualname__, module.training] for name, module in model.named_modules(remove_duplicate=False)],
        {name: _class_code(cls) for name, cls in classes.items()},
        [length, _recorded(model, inputs), _recorded(model, _of_another_size(inputs, length))],
    ]
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers under all their names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _of_another_size(inputs: Inputs, length: int | None) -> Inputs:
    """Add a sample and shorten texts by a token, to distinguish operators whose arguments depend on the size."""

    def resized(tensor: Tensor) -> Tensor:
        longer = torch.cat([tensor, tensor[:1]])
        return longer[:, :-1] if length is not None and length > 1 and tensor.dim() > 1 and tensor.shape[1] == length else longer

    return map_tensors(inputs, resized)


def _class_code(cls: type) -> list[str]:
    """Return the code of the class's own and inherited functions; PyTorch's are identified by its version."""
    return [
        f"{base.__qualname__}.{name}: {_code(function.__code__)}"
        for base in cls.__mro__
        if base.__module__.partition(".")[0] not in ("torch", "builtins")
        for name, member in vars(base).items()
        for function in _functions(member)
    ]


def _functions(member: Any) -> Iterator[FunctionType]:
    """Yield the Python functions in a class's attribute, unwrapped from decorators."""
    parts = [member.fget, member.fset] if isinstance(member, property) else [getattr(member, "__func__", member)]
    for part in parts:
        while isinstance(part, FunctionType):
            yield part
            part = getattr(part, "__wrapped__", None)


def _code(code: CodeType) -> str:
    constants = [_code(item) if isinstance(item, CodeType) else _repr(item) for item in code.co_consts]
    return repr((code.co_code, code.co_names, code.co_varnames, constants))


def _repr(constant: Any) -> str:
    """Return a representation that is the same in every process, unlike the order of a set."""
    return repr(sorted(map(repr, constant))) if isinstance(constant, frozenset) else repr(constant)


def _recorded(model: nn.Module, inputs: Inputs) -> list[Any]:
    """Record names and shapes of weights and inputs, and the operators of one pass."""
    recorder, inputs = _Recorder(), map_tensors(inputs, Tensor.clone)  # the forward may modify them
    for name, tensor in [*state_of(model).items(), *((f"input/{i}", tensor) for i, tensor in enumerate(tensors_in(inputs)))]:
        recorder.steps.append([name, recorder.known(tensor, name), list(tensor.shape), str(tensor.dtype), type(tensor).__name__])
    structure = _structure(inputs)
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(partial(recorder.mark, f"enter {name}")))
        hooks.append(module.register_forward_hook(partial(recorder.mark, f"leave {name}")))
    try:
        with torch.no_grad(), recorder:
            output = run(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [structure, recorder.steps, _structure(output), [recorder.label(tensor) for tensor in tensors_in(output)]]


def _structure(value: Any) -> Any:
    """Describe the nested containers around tensors."""
    if isinstance(value, Mapping):
        return [type(value).__qualname__, {str(key): _structure(item) for key, item in value.items()}]
    if isinstance(value, (tuple, list)):
        return [type(value).__qualname__, [_structure(item) for item in value]]
    return type(value).__qualname__


class _Recorder(TorchDispatchMode):
    """Records every operator with its arguments; a tensor's label states its origin."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Any] = []
        self.labels = WeakTensorKeyDictionary()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        described = [str(function), self.describe(args), self.describe(kwargs or {})]  # before an in-place operator changes them
        outputs = function(*args, **(kwargs or {}))
        for tensor in tensors_in(outputs):
            self.count += 1
            described.append(self.known(tensor, f"value/{self.count}"))
        self.steps.append(described)
        return outputs

    def mark(self, event: str, *_: Any) -> None:
        """Record that a module begins or ends."""
        self.steps.append(event)

    def known(self, tensor: Tensor, label: str) -> str:
        """Return the tensor's label, by default `label`."""
        return self.labels.setdefault(tensor, label)

    def label(self, tensor: Tensor) -> str:
        """Return the tensor's label; for a tensor from outside, a digest of its values."""
        return self.labels[tensor] if tensor in self.labels else self.known(tensor, f"constant {digest([tensor])}")

    def describe(self, value: Any) -> Any:
        """Describe an operator's arguments as JSON."""
        if isinstance(value, Tensor):
            return self.label(value)
        if isinstance(value, Mapping):
            return {str(key): self.describe(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return [self.describe(item) for item in value]
        return repr(value)
