"""Independent copies of a network, and the check that they are independent.

A deep copy shares functions with the original: a hook or an attribute that closes over a layer, or over a dictionary that the network
reads, still reaches the original's. `copied` rebinds such functions to the objects of the copy, and `checked_copy` compares a copy with
its original while the original's weights are replaced.
"""

import copy
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from anybit.data.batches import Batch, evaluating, map_tensors, predict
from anybit.errors import UnsupportedModel, some
from anybit.files.strict import in_words


class BoundFunction:
    """A function whose values at `places` (closure, globals and defaults) are copied with the object that holds the function, as
    attributes are."""

    def __init__(self, function: FunctionType, places: Sequence["Place"]):
        self.function, self.places = function, places
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "BoundFunction":
        return _rebuilt(self, self.function, self.places, lambda value: copy.deepcopy(value, memo), memo)


class BoundReference:
    """A weak reference whose object is copied with its holder."""

    def __init__(self, target: Any):
        self.target = target

    def __call__(self) -> Any:
        return self.target


def copied(model: nn.Module, instead: dict[int, Any] | None = None) -> nn.Module:
    """Return a deep copy whose functions refer to its own modules and containers. Raises UnsupportedModel naming the innermost module that
    cannot be copied.

    `instead`   id of an object -> its replacement in the copy
    """
    memo = {} if instead is None else instead
    memo.update(_detached(model))
    try:
        clone = copy.deepcopy(model, memo)
        _Binder(model, memo).bind(clone)
    except Exception as error:  # an attribute's class may raise any error
        name, module, reason = _uncopiable(model, error)
        raise UnsupportedModel(
            f"{name or 'The network'}, a {type(module).__name__}, cannot be copied, and anybit works on a copy: {reason}. "
            "Keep such attributes out of the module, detach() its tensors, or give it a __deepcopy__."
        ) from error
    return clone


def _detached(model: nn.Module) -> dict[int, Tensor]:
    """Return a detached copy of each tensor that an earlier pass left in a list or dictionary of the model."""
    containers = [one for one in _reachable(model, functions=False) if isinstance(one, (dict, list))]
    tensors = [item for one in containers for item in (one.values() if isinstance(one, dict) else one) if isinstance(item, Tensor)]
    return {id(tensor): tensor.detach().clone() for tensor in tensors if tensor.grad_fn is not None}


def _uncopiable(model: nn.Module, error: Exception) -> tuple[str, nn.Module, str]:
    for name, module in reversed(list(model.named_modules())):
        try:
            copy.deepcopy(module)
        except Exception as inner:
            return name, module, f"{type(inner).__name__}: {in_words(inner)}"
    return "", model, f"{type(error).__name__}: {in_words(error)}"


# Functions of the copy


class _Binder:
    """Rebinds the functions in a copy that close over objects of the original; `memo` is the memo of the deep copy."""

    def __init__(self, original: nn.Module, memo: dict[int, Any]):
        self.memo = memo
        self.original = list(_reachable(original, functions=False))  # held, so that no id is used twice
        self.owned = {id(one) for one in self.original if _is_mutable(one)}
        self.seen = {id(one) for one in self.original}  # shared objects stay unchanged

    def bind(self, value: Any) -> Any:
        """Return the counterpart of `value` in the copy: itself, changed in place, or a new object."""
        if isinstance(value, BoundFunction):  # already copied with its contents
            return value
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, weakref.ref) and id(value()) in self.owned:
            return BoundReference(copy.deepcopy(value(), self.memo))
        if isinstance(value, functools.partial):
            function, args, keywords = self.bind(value.func), tuple(map(self.bind, value.args)), self._values(value.keywords)
            same = (
                function is value.func and all(map(_is, args, value.args)) and all(keywords[key] is value.keywords[key] for key in keywords)
            )
            return value if same else functools.partial(function, *args, **keywords)
        if isinstance(value, MethodType):
            function = self.bind(value.__func__)
            self.bind(value.__self__)
            return value if function is value.__func__ else functools.partial(function, value.__self__)
        if type(value) is tuple:
            items = tuple(map(self.bind, value))
            return value if all(map(_is, items, value)) else items
        if id(value) not in self.seen:
            self.seen.add(id(value))
            self._inside(value)
        return value

    def _inside(self, value: Any) -> None:
        """Bind the contents of a container or an object of the copy, in place."""
        if isinstance(value, dict):
            value.update(self._changed(value))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if (bound := self.bind(item)) is not item:
                    value[index] = bound
        elif _has_attributes(value):
            value.__dict__.update(self._changed(value.__dict__))

    def _values(self, items: dict) -> dict:
        return {key: self.bind(item) for key, item in items.items()}

    def _changed(self, items: dict) -> dict:
        return {key: bound for key, bound in self._values(items).items() if bound is not items[key]}

    def _function(self, function: FunctionType) -> Any:
        if id(function) in self.memo:
            return self.memo[id(function)]
        places = [place for place, value in _held(function) if any(id(one) in self.owned for one in _reachable(value, functions=True))]
        if not places:
            return function
        return _rebuilt(function, function, places, lambda value: self.bind(copy.deepcopy(value, self.memo)), self.memo)


def _is(one: Any, other: Any) -> bool:
    return one is other


Place = tuple[str, int | str]
"""Where a function holds a value: ("closure", index), ("defaults", index), ("keywords", name) or ("globals", name)."""


def _held(function: FunctionType) -> Iterator[tuple[Place, Any]]:
    """Yield (place, value) of all that the function holds; of its globals, those that may lead to modules."""
    for index, cell in enumerate(function.__closure__ or ()):
        with _empty_cells():
            yield ("closure", index), cell.cell_contents
    for index, value in enumerate(function.__defaults__ or ()):
        yield ("defaults", index), value
    for name, value in (function.__kwdefaults__ or {}).items():
        yield ("keywords", name), value
    for name in _names_in(function.__code__):
        value = function.__globals__.get(name)
        ours = isinstance(value, FunctionType) and value.__globals__ is function.__globals__
        if ours or isinstance(value, (nn.Module, Tensor, MethodType, functools.partial, dict, list)):
            yield ("globals", name), value


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _rebuilt(
    key: Any, function: FunctionType, places: Sequence[Place], clone_of: Callable[[Any], Any], memo: dict[int, Any]
) -> BoundFunction:
    """Return the same code with the copies of its values at `places`. It is entered into `memo` first, since the values may refer back to
    it.

    Functions that shared a variable still share it.
    """
    cells, values, added = list(function.__closure__ or ()), dict(_held(function)), []
    for kind, index in places:
        if kind == "closure":
            assert isinstance(index, int)
            cell = cells[index]
            if id(cell) not in memo:
                memo[id(cell)] = CellType()
                added.append((cell, values[kind, index]))
            cells[index] = memo[id(cell)]
    scope = {**function.__globals__} if any(kind == "globals" for kind, _ in places) else function.__globals__
    clone = FunctionType(function.__code__, scope, function.__name__, None, tuple(cells))
    clone.__qualname__, clone.__doc__, clone.__module__ = function.__qualname__, function.__doc__, function.__module__
    bound = memo[id(key)] = BoundFunction(clone, places)
    for cell, value in added:
        memo[id(cell)].cell_contents = clone_of(value)
    clones = {place: clone_of(values[place]) for place in places if place[0] != "closure"}
    scope.update({str(name): one for (kind, name), one in clones.items() if kind == "globals"})
    clone.__defaults__ = tuple(clones.get(("defaults", index), one) for index, one in enumerate(function.__defaults__ or ())) or None
    clone.__kwdefaults__ = {name: clones.get(("keywords", name), one) for name, one in (function.__kwdefaults__ or {}).items()} or None
    return bound


@contextmanager
def _empty_cells() -> Iterator[None]:
    """Keep cells empty whose variable has no value yet."""
    try:
        yield
    except ValueError as error:
        if "empty" not in str(error):
            raise


def _reachable(root: Any, functions: bool) -> Iterator[Any]:
    """Yield everything reachable from `root`, once each: through the closures of functions or, as deep copies do, not through them."""
    seen, stack = set(), [root]
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, _ATOMS):
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, FunctionType):
            stack.extend(one for _, one in _held(value)) if functions else None
        elif isinstance(value, weakref.ref):
            stack.append(value() if functions else None)
        elif isinstance(value, functools.partial):
            stack.extend((value.func, *value.args, *value.keywords.values()))
        elif isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, (list, tuple, set, frozenset)):
            stack.extend(value)
        elif isinstance(value, MethodType):
            stack.extend((value.__self__, value.__func__))
        elif _has_attributes(value):
            stack.extend(vars(value).values())


_ATOMS = (type(None), int, float, complex, str, bytes, type, ModuleType, BuiltinFunctionType, torch.dtype, torch.device)


def _has_attributes(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, (*_ATOMS, FunctionType, Tensor))


def _is_mutable(value: Any) -> bool:
    return isinstance(value, (dict, list, set, Tensor)) or _has_attributes(value)


# A copy compared with its original


def checked_copy(model: nn.Module, example: Batch) -> nn.Module:
    """Return a copy with the outputs of `model` on `example` and on its samples in another order, independent of the model's weights.

    `model` itself only runs if it has functions that could reach the original, and is left unchanged. Raises UnsupportedModel, naming what
    the copy reaches in the original, if no copy is independent.
    """
    place = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    batches = [example.to(place), Batch(map_tensors(example.inputs, lambda tensor: tensor.flip(0)), None, example.reader).to(place)]
    suspects = own_functions(model)
    for make in (copied, copy.deepcopy) if suspects else (copied,):
        untouched = make(model) if suspects else None  # made before the model runs
        if _computes_alone(make(model), model, batches, bool(suspects)):
            return make(model) if untouched is None else untouched
    raise UnsupportedModel(_unfaithful(model, batches[0], suspects))


def _computes_alone(clone: nn.Module, model: nn.Module, batches: Sequence[Batch], suspect: bool) -> bool:
    """Return whether `clone` gives the outputs of `model` while the weights of `model` are replaced; True if the outputs cannot tell."""
    source = model if suspect else clone
    with _restored(clone, parameters=False), _restored(source, parameters=suspect):
        with _moved_away(model):
            alone = _outputs(clone, batches if suspect else batches[:1])
        if not suspect and alone is not None and all(map(_is_finite, alone)):
            return True
        expected = _outputs(source, batches[: len(alone or batches)])
        if expected is None or _same(alone, expected):
            return True  # if a pass fails on the original, a later check reports the inputs
        return not _same(_outputs(source, batches[: len(expected)]), expected)  # random or stateful outputs cannot tell either


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


@torch.no_grad()
def _outputs(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor] | None:
    """Return the outputs in evaluation mode; None if a pass fails."""
    try:
        with evaluating(model):
            return [predict(model, batch) for batch in batches]
    except Exception:  # a model may raise any error
        return None


def _same(ones: list[Tensor] | None, others: list[Tensor] | None) -> bool:
    if ones is None or others is None:
        return ones is others
    return all(
        one.shape == other.shape and torch.allclose(one, other, 1e-4, 1e-5, equal_nan=True) for one, other in zip(ones, others, strict=True)
    )


@contextmanager
def _moved_away(model: nn.Module) -> Iterator[None]:
    """Replace all weights and buffers by NaN inside the block, without writing to the memory that holds them."""
    own: list[tuple[Tensor, Tensor]] = []
    try:
        for tensor in {id(one): one for one in (*model.parameters(), *model.buffers())}.values():
            if tensor.is_floating_point():
                with suppress(RuntimeError):  # a tensor created in inference mode stays
                    values, away = tensor.data, torch.full((), torch.nan, dtype=tensor.dtype, device=tensor.device)
                    tensor.data = away.expand(tensor.shape)
                    own.append((tensor, values))
        yield
    finally:
        for tensor, values in own:
            tensor.data = values


@contextmanager
def _restored(model: nn.Module, parameters: bool) -> Iterator[None]:
    """Restore buffers, parameters if `parameters`, and the random generators after the block."""
    held = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    tensors = [*model.buffers(), *(model.parameters() if parameters else ())]
    before = [(tensor, tensor._version if not tensor.is_inference() else None, tensor.detach().clone()) for tensor in tensors]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for buffers, own in held:
            buffers.clear()
            buffers.update(own)
        for tensor, version, values in before:
            if version is None or tensor._version != version:
                tensor.data.copy_(values)


def own_functions(model: nn.Module) -> list[str]:
    """Return the names of the modules' hooks, replaced `forward`s, and other attributes that close over something."""
    names = []
    for name, module in model.named_modules():
        where = name or "the network"
        if module._forward_hooks or module._forward_pre_hooks:
            names.append(f"a hook of {where}")
        for key, value in vars(module).items():
            if key == "forward" or (isinstance(value, FunctionType) and any(_held(value))) or isinstance(value, weakref.ref):
                names.append(f"{name}.{key}".lstrip("."))
    return names


def _unfaithful(model: nn.Module, example: Batch, suspects: Sequence[str]) -> str:
    """Return an error message that says what the copy calls in the original, or that its outputs differ."""
    names, called = {id(module): name for name, module in model.named_modules()}, dict[str, None]()
    handle = register_module_forward_pre_hook(lambda module, args: called.update({names[id(module)]: None} if id(module) in names else {}))
    try:
        _outputs(copied(model), [example])
    finally:
        handle.remove()
    reached = f"calls {some([name or 'the network' for name in called])} of the network itself" if called else "gives other outputs"
    by = f" ({some(list(suspects))})" if suspects else ""
    return (
        f"The work is done on a copy, and a copy of this network {reached}: a function, a hook or a global variable{by} reaches the "
        "original. Call layers through `self` in a method of the class, and let hooks write into the module that they are given."
    )
