"""Recurrent layers whose matrices are layers, so that each has a name, bits and codes.

An LSTM or a GRU stays one float operator, and each of its matrices becomes a `RecurrentWeight`. A cell, which a network calls step by
step, is written out as two linears. A plain RNN, for which no exporter has an operator, is left unchanged.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

PREFIX = "weight_"


class RecurrentWeight(nn.Module):
    """A matrix [gates x hidden, inputs] of a recurrent layer; its output is the matrix itself, whatever it reads."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight

    def extra_repr(self) -> str:
        return " x ".join(map(str, self.weight.shape))


class HoldsWeights(nn.RNNBase):
    """Mixin of an LSTM or GRU whose matrices are children: `ih_l0` in place of `weight_ih_l0`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first = next(iter((*args, *kwargs.values())))
        read = first.data if isinstance(first, PackedSequence) else first
        self.__dict__["_held"] = {name: child(read) for name, child in self.named_children() if isinstance(child, RecurrentWeight)}
        try:
            return super().forward(*args, **kwargs)
        finally:
            del self.__dict__["_held"]

    def __getattr__(self, name: str) -> Any:
        child = self.__dict__.get("_modules", {}).get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
        if child is None:
            return super().__getattr__(name)
        return self.__dict__["_held"][name.removeprefix(PREFIX)] if "_held" in self.__dict__ else child.weight

    @property
    def _flat_weights(self) -> list[Any]:  # computed here, a list in PyTorch
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: Any) -> None:
        """Ignore PyTorch's own list, which is never used."""

    def flatten_parameters(self) -> None:
        """Leave the weights where they are: cuDNN would need them in one block of memory."""

    def _update_flat_weights(self) -> None:
        """Do nothing: there is no list to update."""


class LSTMCell(nn.LSTMCell):
    """An LSTM cell whose products are linears."""

    ih: nn.Linear
    hh: nn.Linear

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:  # noqa: A002  # as PyTorch calls it
        if hx is None:
            zeros = input.new_zeros(*input.shape[:-1], self.hidden_size)
            hx = zeros, zeros
        entered, forgotten, new, shown = (self.ih(input) + self.hh(hx[0])).chunk(4, -1)
        state = forgotten.sigmoid() * hx[1] + entered.sigmoid() * new.tanh()
        return shown.sigmoid() * state.tanh(), state


class GRUCell(nn.GRUCell):
    """A GRU cell whose products are linears."""

    ih: nn.Linear
    hh: nn.Linear

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:  # noqa: A002  # as PyTorch calls it
        hx = input.new_zeros(*input.shape[:-1], self.hidden_size) if hx is None else hx
        read, carried = self.ih(input).chunk(3, -1), self.hh(hx).chunk(3, -1)
        reset, update = (read[0] + carried[0]).sigmoid(), (read[1] + carried[1]).sigmoid()
        new = (read[2] + reset * carried[2]).tanh()
        return new + update * (hx - new)


class RNNCell(nn.RNNCell):
    """A plain recurrent cell whose products are linears."""

    ih: nn.Linear
    hh: nn.Linear

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:  # noqa: A002  # as PyTorch calls it
        hx = input.new_zeros(*input.shape[:-1], self.hidden_size) if hx is None else hx
        total = self.ih(input) + self.hh(hx)
        return total.tanh() if self.nonlinearity == "tanh" else total.relu()


CELLS: dict[type[nn.Module], Any] = {nn.LSTMCell: LSTMCell, nn.GRUCell: GRUCell, nn.RNNCell: RNNCell}
_HOLDING: dict[type[nn.Module], Any] = {}


def recurrent_layers(model: nn.Module) -> Iterator[Callable[[], object]]:
    """Yield functions that turn each recurrent layer or cell of `model` into one whose weights are layers, in place."""
    for module in model.modules():
        if isinstance(module, nn.LSTM | nn.GRU) and any(key.startswith(PREFIX) for key in module._parameters):
            yield partial(_hold, module)
        elif type(module) in CELLS and module._parameters:
            yield partial(_write_out, module)


def _holding(cls: type[nn.Module]) -> Any:
    """Return the subclass of a recurrent layer's class that holds its weights as children, created on first use."""
    if cls not in _HOLDING:
        pickled: dict[str, Any] = {"__reduce__": lambda self: (_new, (cls,), self.__getstate__())}
        _HOLDING[cls] = type(cls.__name__, (HoldsWeights, cls), {"__module__": __name__, "__qualname__": cls.__qualname__, **pickled})
    return _HOLDING[cls]


def _new(cls: type[nn.Module]) -> nn.Module:
    return _holding(cls).__new__(_holding(cls))


def _hold(layer: nn.RNNBase) -> None:
    weights: dict[str, Any] = {key: layer._parameters.pop(key) for key in list(layer._parameters) if key.startswith(PREFIX)}
    layer.__dict__.pop("_flat_weights", None)
    layer.__class__ = _holding(type(layer))
    for key, weight in weights.items():
        layer.add_module(key.removeprefix(PREFIX), RecurrentWeight(weight))
    layer._init_flat_weights()


def _write_out(cell: nn.Module) -> None:
    parameters: dict[str, Any] = {key: cell._parameters.pop(key) for key in list(cell._parameters)}
    cell.__class__ = CELLS[type(cell)]
    for name in ("ih", "hh"):
        weight, bias = parameters[f"weight_{name}"], parameters.get(f"bias_{name}")
        linear: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight, linear.bias = weight, bias
        cell.add_module(name, linear.train(cell.training))
