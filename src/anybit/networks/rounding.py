"""Edges rounded to 8 bits when a network computes them, as an integer runtime does between layers.

The network's class becomes a subclass of its own, as layers' classes do, which runs it under the observer that names operations (`wiring`)
and rounds the values that are edges. A custom forward keeps running and every state-dict key stays.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from anybit.data.batches import Batch, call
from anybit.networks.wiring import run_replacing
from anybit.numerics.affine import fake_quantize

Grid = tuple[float, int]
"""(scale, a float32; zero point) of 8 bits."""


class RoundedNetwork(nn.Module):
    """Mixin of the class of a network that rounds edges: name -> grid. Each such network has a class of its own, so that any copy of it,
    also by a custom method, keeps the grids."""

    edge_grids: Mapping[str, Grid] = {}
    float_class: type[nn.Module] = nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Not the class's forward: a network may have a custom one in an attribute.
        return run_replacing(self, super().__call__, args, kwargs, self.round_edge)

    def __reduce__(self) -> tuple:  # by the float class, which can be imported by name
        return _new_rounded, (self.float_class, dict(self.edge_grids)), self.__dict__

    def round_edge(self, name: str, tensor: Tensor) -> Tensor | None:
        """Return the tensor rounded if it is an edge, else None."""
        grid = self.edge_grids.get(name)
        if grid is None or not tensor.is_floating_point():
            return None
        scale, zero_point = torch.tensor(grid, dtype=tensor.dtype, device=tensor.device)
        return fake_quantize(tensor, scale, zero_point, 0, 255)


def _rounded_class(cls: type[nn.Module], grids: Mapping[str, Grid]) -> type[RoundedNetwork]:
    contents = {"__module__": __name__, "edge_grids": dict(grids), "float_class": cls}
    return type(f"QuantizedEdgesOf{cls.__name__}", (RoundedNetwork, cls), contents)


def _new_rounded(cls: type[nn.Module], grids: Mapping[str, Grid]) -> RoundedNetwork:
    rounded = _rounded_class(cls, grids)
    return rounded.__new__(rounded)


def rounded_values(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Run `model` on a batch and return its rounded edges by name; {} if it rounds none."""
    shown: dict[str, Tensor] = {}

    def keep(rounding: Callable[..., Tensor | None], name: str, tensor: Tensor) -> Tensor | None:
        rounded = rounding(name, tensor)
        if rounded is not None:
            shown[name] = rounded.clone()
        return rounded

    if isinstance(model, RoundedNetwork):
        model.__dict__["round_edge"] = functools.partial(keep, model.round_edge)  # takes precedence over the class's own
    try:
        with torch.no_grad():
            call(model, batch.inputs)
    finally:
        model.__dict__.pop("round_edge", None)
    return shown


def edge_grids(model: nn.Module) -> Mapping[str, Grid]:
    """Return the edges that `model` rounds, by name."""
    return model.edge_grids if isinstance(model, RoundedNetwork) else {}


def round_edges(model: nn.Module, grids: Mapping[str, Grid]) -> nn.Module:
    """Let `model` round the edges `grids`, and no others, in place; returns it."""
    cls = model.float_class if isinstance(model, RoundedNetwork) else type(model)
    model.__class__ = _rounded_class(cls, grids) if grids else cls
    return model
