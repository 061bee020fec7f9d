"""A SHA-256 over values, the same in every process: numbers, arrays, objects, networks, and the code of functions and classes.

User code is hashed with everything that it reads by name: functions that it calls, globals, and closures. Code of installed packages is
hashed by name: its effect shows in a network's outputs, and versions are compared elsewhere.
"""

import dis
import functools
import hashlib
import logging
import os
import sys
import sysconfig
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice, type(...), Path, torch.dtype, torch.device, np.generic)
WALKED = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"}
"""Attributes of an nn.Module that are hashed separately, or carry no information."""
READERS = {
    "open", "load", "loadtxt", "genfromtxt", "fromfile", "memmap", "read_text", "read_bytes", "read_csv", "read_json", "imread", "urlopen",
    "environ", "getenv",
}  # fmt: skip
"""Names by which code reads files, or what else may change between two runs."""


def digest(tensors: Mapping[str, Tensor] | Iterable[Tensor]) -> str:
    """Return the SHA-256 over the bytes, types and shapes of tensors, and over their names if they have any."""
    whole = hashlib.sha256()
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else (("", tensor) for tensor in tensors):
        whole.update(f"{name}{tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(_bytes(tensor))
    return whole.hexdigest()


def contents_of(value: Any, reading: bool = False) -> str:
    """Return the SHA-256 of `value` with its contents; for an opaque value, one that no other value in any process has. `reading`:
    code that may read files, or import the user's modules, has another one at each call, since what it reads may have changed."""
    return _digested(value, _Walk(lambda value: f"{_type_name(value)} {os.getpid()} {id(value)}", reading=reading))


def network_contents(model: nn.Module) -> dict[str, str]:
    """Return module name -> digest of what its state dict omits: its code, attributes, hooks and non-persistent buffers. Opaque values are
    hashed by type, since the outputs of a network are compared, too."""
    names = {id(module): name for name, module in model.named_modules()}
    digests = {}
    for name, module in model.named_modules():
        walk = _Walk(_type_name, names, root=module)
        digests[name] = _digested(module, walk)[:16]
    return digests


@dataclass
class _Walk:
    """One walk over a value. `around` are the values that contain the current one, to detect cycles; `known` the finished ones.

    opaque  returns the substitute for an opaque value
    names   id of a module -> its name
    root    a module of a network: its state dict is left out, and so are objects of installed packages, such as a configuration, whose
            effect shows elsewhere
    reading whether code that may read files is unlike any other
    """

    opaque: Callable[[Any], str]
    names: Mapping[int, str] = field(default_factory=dict)
    root: nn.Module | None = None
    reading: bool = False
    around: list[int] = field(default_factory=list)
    known: dict[int, tuple[Any, str]] = field(default_factory=dict)
    whole: Any = field(default_factory=hashlib.sha256)

    def put(self, *parts: Any) -> None:
        for part in parts:
            data = part if isinstance(part, (bytes, memoryview)) else str(part).encode("utf8", "surrogatepass")
            self.whole.update(f"{len(data)}:".encode())
            self.whole.update(data)

    def add(self, value: Any) -> None:
        if isinstance(value, PLAIN):
            self.put(type(value).__name__, repr(value))
        elif id(value) in self.around:
            self.put("around", self.around.index(id(value)))
        else:
            if id(value) not in self.known:
                self.known[id(value)] = value, self._digest(value)
            self.put(self.known[id(value)][1])

    def _digest(self, value: Any) -> str:
        outer, self.whole = self.whole, hashlib.sha256()
        self.around.append(id(value))
        try:
            _add(value, self)
            return self.whole.hexdigest()
        finally:
            self.around.pop()
            self.whole = outer


def _digested(value: Any, walk: _Walk) -> str:
    try:
        walk.add(value)
    except RecursionError:
        walk.put(walk.opaque(value))
    return walk.whole.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


# By type


@functools.singledispatch
def _add(value: Any, walk: _Walk) -> None:
    """Add an object of any other type: its class and its contents."""
    walk.add(type(value))
    if walk.root is not None and _is_installed(type(value).__module__):
        return
    slots = [name for base in type(value).__mro__ for name in getattr(base, "__slots__", ()) if isinstance(name, str)]
    held = {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in slots if hasattr(value, name)}}
    if held:
        _add_mapping(held, walk)
    else:
        walk.put(walk.opaque(value))


@_add.register
def _add_tensor(value: Tensor, walk: _Walk) -> None:
    walk.put("tensor", value.dtype, tuple(value.shape))
    if value.layout is torch.strided and value.device.type != "meta":
        walk.put(_bytes(value))


@_add.register
def _add_array(value: np.ndarray, walk: _Walk) -> None:
    walk.put("array", value.dtype, value.shape)
    if value.dtype.hasobject:
        _add_items(value.ravel().tolist(), walk)
    else:
        walk.put(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)


@_add.register(list)
@_add.register(tuple)
def _add_items(value: Any, walk: _Walk) -> None:
    walk.put(type(value).__name__, len(value))
    for one in value:
        walk.add(one)


@_add.register
def _add_mapping(value: Mapping, walk: _Walk) -> None:
    walk.put(type(value).__name__, len(value))
    for key, one in value.items():
        walk.add(key)
        walk.add(one)


@_add.register(set)
@_add.register(frozenset)
def _add_set(value: Any, walk: _Walk) -> None:
    walk.put("set", *sorted(_digested(one, _Walk(walk.opaque, walk.names, walk.root, walk.reading)) for one in value))


@_add.register
def _add_module(value: nn.Module, walk: _Walk) -> None:
    if id(value) in walk.names and value is not walk.root:
        walk.put("module", walk.names[id(value)])
        return
    walk.add(type(value))
    stored = {*value._parameters, *(set(value._buffers) - value._non_persistent_buffers_set)}
    for name, one in [*value._parameters.items(), *value._buffers.items()]:
        walk.put(name)
        if not (value is walk.root and name in stored):
            walk.add(one)
    for name, one in [*vars(value).items(), *value._modules.items()]:
        if name not in WALKED:
            walk.put(name)
            walk.add(list(one.values()) if name.endswith("_hooks") and isinstance(one, Mapping) else one)


@_add.register
def _add_class(value: type, walk: _Walk) -> None:
    walk.put("class", value.__module__, value.__qualname__)
    for base in value.__mro__:
        if not _is_installed(base.__module__):
            for name, member in vars(base).items():
                for function in _functions(member):
                    walk.put(name)
                    walk.add(function)


@_add.register
def _add_function(value: FunctionType, walk: _Walk) -> None:
    walk.put("function", value.__module__, value.__qualname__)
    if value.__module__ in (None, "builtins") or not _is_installed(value.__module__):  # functions made by `exec` look like builtins
        walk.add(value.__defaults__)
        walk.add(value.__kwdefaults__)
        _add_code(value.__code__, value.__globals__, walk)
        for cell in value.__closure__ or ():
            try:
                walk.add(cell.cell_contents)
            except ValueError:  # still empty
                walk.put("empty")


def _add_code(code: CodeType, names: Mapping[str, Any], walk: _Walk) -> None:
    """Add code, and everything that it reads by name: functions, classes and values of its module, and user modules."""
    walk.put(code.co_code, code.co_names, code.co_varnames)
    imported = {one.argval for one in dis.get_instructions(code) if one.opname == "IMPORT_NAME"} if walk.reading else set()
    if walk.reading and (READERS & {*code.co_names} or not all(map(_is_installed, imported))):
        walk.put(uuid.uuid4().hex)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _add_code(constant, names, walk)
        else:
            walk.add(constant)
    for name in code.co_names:
        one = names.get(name)
        if isinstance(one, ModuleType) and not _is_installed(one.__name__):
            walk.add({attribute: vars(one)[attribute] for attribute in code.co_names if attribute in vars(one)})
        elif not isinstance(one, ModuleType):
            walk.add(one)


@_add.register
def _add_method(value: MethodType, walk: _Walk) -> None:
    _add_items((value.__func__, value.__self__), walk)


@_add.register
def _add_partial(value: functools.partial, walk: _Walk) -> None:
    _add_items((value.func, value.args, value.keywords), walk)


@_add.register(ModuleType)
@_add.register(BuiltinFunctionType)
@_add.register(logging.Logger)
def _add_name(value: Any, walk: _Walk) -> None:
    walk.put(getattr(value, "__module__", ""), getattr(value, "__qualname__", getattr(value, "name", "")), getattr(value, "__name__", ""))


def _functions(member: Any) -> Iterator[FunctionType]:
    """Yield the Python functions in a class's attribute, unwrapped from decorators."""
    for part in [member.fget, member.fset] if isinstance(member, property) else [getattr(member, "__func__", member)]:
        while isinstance(part, FunctionType):
            yield part
            part = getattr(part, "__wrapped__", None)


@functools.cache
def _is_installed(module: str) -> bool:
    """Return whether a module belongs to Python, to an installed package or to anybit."""
    if module.partition(".")[0] in ("anybit", "torch", *sys.stdlib_module_names):
        return True
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return file.startswith(sysconfig.get_path("stdlib") + os.sep) or bool({"site-packages", "dist-packages"} & {*Path(file).parts})
