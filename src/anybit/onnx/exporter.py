"""A network's graph by torch's exporter, with workarounds for what the exporter refuses or loses.

outputs     tensors may be in any containers, besides texts and numbers
names       modules may have names that are not Python identifiers
autocast    regions that turn autocast off where it is off already are left out: they hide which layer an operator belongs to
experts     a grouped product has no operator, so experts are gathered for each token
batch       all inputs have the same batch size; `len(x)` and the sizes of `x.chunk(n)` follow it
"""

import inspect
import itertools
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce, wraps
from pathlib import Path
from traceback import extract_tb
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, statically_known_true
from torch.overrides import TorchFunctionMode

from anybit.data.batches import Inputs, map_tensors, tensors_in
from anybit.errors import UnsupportedModel
from anybit.networks.wiring import Wiring
from anybit.onnx.graphs import quiet

NO_EXPORT = {
    "pack_padded_sequence": "it packs sequences, which a graph cannot represent. Let the recurrent layer read padded sequences, and "
    "take each one's last step by its length."
}
"""Functions that no exporter supports -> explanation when an export fails."""

EXPERTS = "_experts_implementation"
"""Attribute of transformers' configurations that selects the implementation of experts."""

CALL_SITE = re.compile(r'File "([^"]+)", line (\d+), in \w+\n(.+)')
"""File, line and code of a call in an exporter's traceback."""


def export_graph(plain: nn.Module, inputs: Inputs, length: int | None, wiring: Wiring, opset: int) -> ir.Model:
    """Return the graph before it is optimized; `inputs` are two samples, `length` is that of padded texts among them.

    Raises UnsupportedModel with the reason if the exporter does not support the network.
    """
    positional = inputs if isinstance(inputs, tuple) else (inputs,)
    passed: dict[str, Any] = {"kwargs": inputs} if isinstance(inputs, dict) else {"args": positional}
    sizes = {0: torch.export.Dim("batch", min=1)}
    tokens = {} if length is None else {1: torch.export.Dim("tokens", min=1)}
    bound = inspect.signature(plain.forward).bind(*passed.get("args", ()), **passed.get("kwargs", {}))
    shapes = map_tensors(
        dict(bound.arguments),  # by the forward's own names; *args and **kwargs contain theirs
        lambda tensor: sizes | tokens if tensor.dim() > 1 and tensor.shape[1] == length else sizes,
    )
    settings = {"dynamic_shapes": shapes, "opset_version": opset, "optimize": False, "verbose": False}
    _forget_recurrent_kernels()
    try:
        with (
            quiet(),
            _without_idle_autocast(),
            _gathered_experts(plain),
            _tensor_outputs(plain),
            _batch_as_size(plain),
            _any_names(),
            torch.no_grad(),
        ):  # so that a forward that turns gradients off stays one graph
            program = torch.onnx.export(plain, **passed, dynamo=True, **settings)
    except Exception as error:  # the exporter raises errors of many kinds
        known = (remedy for kind, remedy in NO_EXPORT.items() if any(op.kind == kind for op in wiring.operations))
        raise UnsupportedModel(f"The network cannot be exported to ONNX: {next(known, _reason(error, plain))}") from error
    assert program is not None, "without a file to write, the exporter returns its program"
    graph = program.model
    if any(value.shape is not None and len(value.shape) and isinstance(value.shape[0], int) for value in graph.graph.inputs):
        raise UnsupportedModel(
            "The network's forward fixes the size of the batch: it takes it as a number of Python, as in int(x.shape[0]) or a loop over "
            "samples. Let it use x.shape[0] as it is, or -1."
        )
    if isinstance(inputs, dict) and (shared := [value.name for value in graph.graph.inputs if value.name in graph.graph.initializers]):
        raise UnsupportedModel(
            f"{shared[0]} is an argument of the network's forward and a weight or buffer of the network, but a file with inputs by name "
            "can have it only once. Rename one of them."
        )
    _rename_apart(graph.graph)
    return graph


def _rename_apart(graph: ir.Graph) -> None:
    """Rename inputs and results of operators that have the name of a weight or buffer, such as a buffer called "mean" beside a mean."""
    values = [*graph.inputs, *(value for node in graph.all_nodes() for value in node.outputs)]
    used = {*graph.initializers, *(value.name for value in values)}
    for value in values:
        if value.name in graph.initializers:
            value.name = next(name for count in itertools.count(2) if (name := f"{value.name}_{count}") not in used)
            used.add(value.name)


@contextmanager
def _any_names() -> Iterator[None]:
    """Let modules have any name, such as "in" of a dictionary of layers, which the exporter otherwise writes into code as it is."""
    written = torch.fx.graph._format_target
    torch.fx.graph._format_target = lambda base, target: reduce(lambda of, name: f"getattr({of}, {name!r})", target.split("."), base)
    try:
        yield
    finally:
        torch.fx.graph._format_target = written


@contextmanager
def _tensor_outputs(model: nn.Module) -> Iterator[None]:
    """Let the forward return its tensors alone, in order: exporters refuse dataclasses, and texts or numbers beside the tensors."""
    forward = model.forward

    @wraps(forward)
    def tensors(*args: Any, **kwargs: Any) -> Any:
        batches = [tensor.shape[0] for tensor in tensors_in((args, kwargs)) if tensor.dim()]
        assert all(batch == batches[0] for batch in batches)  # tells the exporter, which gives the batch of each input another symbol
        output = forward(*args, **kwargs)
        return output if isinstance(output, Tensor) else tuple(tensors_in(output))

    own = vars(model).get("forward")
    model.forward = tensors
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


@contextmanager
def _batch_as_size(model: nn.Module) -> Iterator[None]:
    """Let `len(x)` in the network's own code, and `x.chunk(n)` of a tensor of n batches, be sizes of the graph, as x.shape[0] is."""
    packages = {cls.__module__.partition(".")[0] for module in model.modules() for cls in type(module).__mro__}
    packages -= {"torch", "builtins", "anybit"}
    modules = {
        id(module): module for name, module in list(sys.modules.items()) if name.partition(".")[0] in packages
    }  # some have two names
    without = [names for names in map(vars, modules.values()) if "len" not in names]
    try:
        for names in without:
            names["len"] = _length
        with _Translated():
            yield
    finally:
        for names in without:
            del names["len"]


def _length(of: Any) -> Any:
    return of.shape[0] if isinstance(of, Tensor) and of.dim() else len(of)


class _Translated(TorchFunctionMode):
    """Functions as others that the exporter translates: `chunk` of a tensor of n batches into n, and an integer tensor subtracted from a
    float number."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if function in (torch.chunk, Tensor.chunk):
            return _chunked(*args, **{"tensor" if name == "input" else name: value for name, value in (kwargs or {}).items()})
        if function is Tensor.__rsub__ and isinstance(args[1], float) and not args[0].is_floating_point():
            args = args[0].to(torch.get_default_dtype()), args[1]
        return function(*args, **(kwargs or {}))


def _chunked(tensor: Tensor, chunks: int, dim: int = 0) -> Any:
    size = tensor.shape[dim]
    if isinstance(size, torch.SymInt) and statically_known_true(size % chunks == 0):
        return tensor.split([size // chunks] * chunks, dim)
    return tensor.chunk(chunks, dim)


def _forget_recurrent_kernels() -> None:
    """Let the exporter use its kernels for sequences of any length, not those that PyTorch cached in an earlier call."""
    for operator in (torch.ops.aten.lstm.input, torch.ops.aten.gru.input):
        operator._dispatch_cache.clear()


@contextmanager
def _gathered_experts(model: nn.Module) -> Iterator[None]:
    """Let networks of transformers gather experts for each token: no ONNX operator exists for a grouped product."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None}
    grouped = [config for config in configs.values() if getattr(config, EXPERTS, None) == "grouped_mm"]
    try:
        for config in grouped:
            setattr(config, EXPERTS, "batched_mm")
        yield
    finally:
        for config in grouped:
            setattr(config, EXPERTS, "grouped_mm")


@contextmanager
def _without_idle_autocast() -> Iterator[None]:
    """Leave out regions that turn autocast off where it is off: they would hide which layer their operators belong to."""
    enter, leave, idle = torch.autocast.__enter__, torch.autocast.__exit__, "_idle_here"

    def entered(region: torch.autocast) -> Any:
        left_out = not region._enabled and not torch.is_autocast_enabled(region.device)
        vars(region).setdefault(idle, []).append(left_out)
        return region if left_out else enter(region)

    def left(region: torch.autocast, *error: Any) -> Any:
        return None if vars(region)[idle].pop() else leave(region, *error)

    torch.autocast.__enter__, torch.autocast.__exit__ = entered, left  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__, torch.autocast.__exit__ = enter, leave  # type: ignore[method-assign]


def _reason(error: BaseException, model: nn.Module) -> str:
    """Return the first line of the innermost cause, as the outer ones are about the exporter's stages, and the line of the network that it
    is about: one that the exporter names, or the last that was running."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    reason, remedy = (
        next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__),
        "Write that line differently.",
    )
    if isinstance(error, GuardOnDataDependentSymNode):
        reason = "a size or a branch depends on the numbers in a tensor (.item(), .max(), `if x.any()`), where a graph needs shapes alone."
        remedy = "Let it depend on shapes or constants; torch.where chooses between numbers."
    lines = CALL_SITE.findall(text.partition("Original traceback:")[2]) or _running(error, model)
    if not lines:
        return reason
    file, number, code = lines[-1]
    return f"{reason.removesuffix('Tried overloads:').strip()} It is about line {number} of {Path(file).name}: {code.strip()}. {remedy}"


def _running(error: BaseException, model: nn.Module) -> list[tuple[str, int | None, str]]:
    """Return (file, line, code) of the calls in the network's own files in which the error was raised."""
    names = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
    files = {getattr(sys.modules.get(name), "__file__", None) for name in names if name.partition(".")[0] not in ("torch", "anybit")}
    return [(frame.filename, frame.lineno, frame.line or "") for frame in extract_tb(error.__traceback__) if frame.filename in files]
