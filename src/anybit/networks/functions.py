"""Functions called in a module's forward, computed by layers in their place: `F.linear` on a parameter, `@`, attention.

A module with such calls is swapped for a subclass of its own class, which runs the same forward under a mode that sees every function
called in it. Calls are identified by their order. The layer holds the part that does not depend on the input, a weight; the tensor that
the forward passes for it is ignored.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from anybit.errors import UnsupportedModel
from anybit.networks.contractions import contraction, multiplied, weighted
from anybit.networks.matmul import Matmul, attend

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "linear": ("input", "weight", "bias"),
    **{f"conv{n}d": _CONVOLUTION for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _TRANSPOSED for n in (1, 2, 3)},
    "matmul": ("input", "other"),
    "mm": ("input", "mat2"),
    "bmm": ("input", "mat2"),
    "addmm": ("added", "mat1", "mat2"),
    "baddbmm": ("added", "batch1", "batch2"),
    "einsum": ("equation", "input", "other"),
    "scaled_dot_product_attention": ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
}
"""Functions that layers compute, by bare name -> names of their positional arguments."""

ATTENTION = "scaled_dot_product_attention"
PRODUCTS: dict[str, tuple[str, str]] = {
    "matmul": ("input", "other"),
    "mm": ("input", "mat2"),
    "bmm": ("input", "mat2"),
    "addmm": ("mat1", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "einsum": ("input", "other"),
}
"""Products of two tensors, either of which may be a weight -> names of the two."""


@dataclass(frozen=True)
class FunctionCall:
    """A call of a function.

    layers       that compute it: paths from the calling module; "" for that module's own weight; empty if the function stays
    weight       which operand of a product is the layer's weight; None for a product of two activations
    batch_second whether samples are the second dimension of a linear's input
    """

    function: str
    layers: tuple[str, ...] = ()
    weight: int | None = None
    batch_second: bool = False


def bound(function: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name."""
    if function == "einsum" and len(args) == 2 and isinstance(args[1], (tuple, list)):
        args = (args[0], *args[1])
    return {**dict(zip(ARGUMENTS[function], args, strict=False)), **kwargs}


def bare_name(func: Any) -> str:
    """Return "matmul" for torch.matmul and x @ y."""
    return getattr(func, "__name__", type(func).__name__).strip("_")


def running_module() -> nn.Module | None:
    """Return the innermost module whose forward is running, or None."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL:
            return frame.f_locals["self"]
        frame = frame.f_back  # type: ignore[assignment]
    return None


_CALL = nn.Module._call_impl.__code__


SEEN_THROUGH = {F.multi_head_attention_forward.__name__: F.multi_head_attention_forward}
"""Composite functions by name: a mode sees each as one call."""


@cache
def seen_through(func: Any) -> Any:
    """Return a composite function decomposed, so that a mode sees the functions that it calls; None for any other function."""
    if func not in SEEN_THROUGH.values():
        return None
    names = {**func.__globals__, "has_torch_function": lambda tensors: False}
    inner = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    inner.__kwdefaults__ = func.__kwdefaults__
    return inner


class CallsLayers(nn.Module):
    """Mixin of a module whose function calls are computed by layers: `function_calls`, in the order of the forward."""

    function_calls: tuple[FunctionCall, ...]


def _computing_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    """Return the forward of `cls` under a mode that passes calls to layers, with its own signature, by which exporters name inputs."""

    @functools.wraps(cls.forward)
    def forward(self, *args, **kwargs):
        with _Computing(self):
            return cls.forward(self, *args, **kwargs)

    return forward


_CALLING: dict[type[nn.Module], type[CallsLayers]] = {}


def call_layers(module: nn.Module, calls: Sequence[FunctionCall]) -> None:
    """Let layers compute the functions that the module calls, in place; its class keeps its name."""
    cls = type(module)
    if cls not in _CALLING:
        pickled: dict[str, Any] = {"__reduce__": lambda self: (_new, (cls,), self.__dict__)}  # its class is found through the float one
        named = {"__module__": __name__, "__qualname__": cls.__qualname__, "forward": _computing_forward(cls)}
        _CALLING[cls] = type(cls.__name__, (CallsLayers, cls), named | pickled)
    module.__class__ = _CALLING[cls]
    assert isinstance(module, CallsLayers)
    module.function_calls = tuple(calls)


def _new(cls: type[nn.Module]) -> nn.Module:
    module = cls.__new__(cls)
    call_layers(module, ())
    return module


class _Computing(TorchFunctionMode):
    """Lets layers compute the functions that a module itself calls in one pass, not those that its submodules call."""

    def __init__(self, module: CallsLayers):
        super().__init__()
        self.module, self.calls = module, iter(module.function_calls)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, bare_name(func)
        if (name not in ARGUMENTS and seen_through(func) is None) or running_module() is not self.module:
            return func(*args, **kwargs)
        if (inner := seen_through(func)) is not None:
            with self:
                return inner(*args, **kwargs)
        call = _next(self.calls, self.module, name)
        return _compute(self.module, call, bound(name, args, kwargs)) if call.layers else func(*args, **kwargs)


def _next(calls: Iterator[FunctionCall], module: nn.Module, name: str) -> FunctionCall:
    call = next(calls, None)
    if call is None or call.function != name:
        expected = "no more" if call is None else call.function
        raise UnsupportedModel(
            f"{type(module).__name__} calls {name} where it called {expected} on the first inputs: its forward depends on "
            "its inputs. Let it call layers instead: nn.Linear, anybit.Matmul."
        )
    return call


def _compute(module: nn.Module, call: FunctionCall, arguments: dict[str, Any]) -> Tensor:
    if call.layers == ("",):
        return getattr(F, call.function)(**{**arguments, "weight": module.weight})
    layers = [module.get_submodule(path) for path in call.layers]
    if call.function == ATTENTION:
        return _attention(layers, **arguments)
    if call.function not in PRODUCTS:
        x = arguments["input"]
        return layers[0](x.transpose(0, 1)).transpose(0, 1).contiguous() if call.batch_second else layers[0](x)
    left, right = operands = [arguments[name] for name in PRODUCTS[call.function]]
    of = contraction(arguments.get("equation"), left.dim(), right.dim())
    assert of is not None, "anything but a contraction stays a function"
    if call.weight is not None:
        result = weighted(of, operands, call.weight, layers)
    else:
        assert isinstance(layers[0], Matmul)
        result = multiplied(of, left, right, layers[0])
    if "added" not in arguments or getattr(layers[0], "bias", None) is not None:
        return result
    return arguments.get("beta", 1) * arguments["added"] + arguments.get("alpha", 1) * result


def _attention(
    layers: Sequence[nn.Module],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """Compute scaled_dot_product_attention, under its own argument names."""
    scores, mixture = layers
    assert isinstance(scores, Matmul) and isinstance(mixture, Matmul)
    return attend(
        (scores, mixture), (query, key, value), attn_mask, dropout_p, is_causal, options.get("scale"), options.get("enable_gqa", False)
    )
