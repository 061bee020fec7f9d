"""The tensors of a network's output: which of them are compared, by name and weight, and how they become one row per sample."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, nn

from anybit.data.batches import Batch, are_token_classes, call, evaluating, not_plain, of_other_length, tensors_in, token_mask
from anybit.errors import InvalidSetting, UnsupportedModel


@dataclass(frozen=True)
class Output:
    """One tensor of the output: its name, its index among all of them, one sample's shape [rows per sample, ...], and its weight.

    If it has a row for each token of padded texts (`tokens`), the shape is that of a token, [1, ...].
    """

    name: str
    place: int
    shape: tuple[int, ...]
    weight: float = 1.0
    tokens: bool = False

    @property
    def numbers(self) -> int:
        """Return the numbers of a sample, or of a token."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        shape = [str(size) for size in self.shape[self.shape[0] == 1 :]]
        return f"{self.name} [{', '.join(['tokens', *shape] if self.tokens else shape)}]"


@dataclass(frozen=True)
class OutputReader:
    """Read the chosen tensors of an output: a single one unchanged, several as [N, numbers per sample].

    Of padded texts, real tokens are read. Several tensors, some of them with a row per token, are read as [rows, numbers + tensors]: a
    sample has as many rows as the tensor with the most, a shorter one has zeros in the last of them, and so has its own last column, which
    is one where it has a row. Zeros in outputs and reference leave a squared error over a mean square as it is.
    """

    outputs: tuple[Output, ...]
    task: str | None = None

    @property
    def unit(self) -> str:
        return "tokens" if self.outputs[0].tokens else "samples"

    @property
    def _by_token(self) -> bool:
        return any(one.tokens for one in self.outputs)

    def read(self, output: Any, batch: Batch) -> Tensor:
        """Return the tensors of a network's output, flattened and joined. Raises UnsupportedModel if one lacks rows for each sample."""
        tensors, count = tensors_in(output), len(batch)
        for one in self.outputs:
            tensor = tensors[one.place] if one.place < len(tensors) else torch.empty(())
            shape = _shape_of_token(tensor, batch) if one.tokens else _shape_of_sample(tensor, count)
            if shape is None or (len(self.outputs) > 1 and shape != one.shape):
                raise UnsupportedModel(
                    f"Output {one.name} has shape {list(one.shape)} per {'token' if one.tokens else 'sample'} on the first inputs, and on "
                    f"others {'none' if shape is None else list(shape)}. Leave it out: --outputs names those that are compared."
                )
        own = [tensors[one.place] for one in self.outputs]
        if self._by_token:
            return _aligned([_rows(tensor, one, batch) for tensor, one in zip(own, self.outputs, strict=True)], count)
        return own[0] if len(own) == 1 else torch.cat([tensor.reshape(count, -1) for tensor in own], 1)

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Split joined `rows` into the tensors that the network returned, of padded texts without padding."""
        if len(self.outputs) == 1:
            return (rows,)
        numbers = [one.numbers for one in self.outputs]
        parts = rows[:, : sum(numbers)].split(numbers, 1)
        if self._by_token:
            parts = tuple(part[there == 1] for part, there in zip(parts, rows[:, sum(numbers) :].unbind(1), strict=True))
        return tuple(part.reshape(-1, *one.shape[1:]) for part, one in zip(parts, self.outputs, strict=True))

    def score(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        return {}

    def align(self, labels: Tensor, batch: Batch) -> Tensor:
        mask = token_mask(labels, batch) if self.outputs[0].tokens and labels.dim() > 1 else None
        return labels if mask is None else labels[mask]


def _rows(tensor: Tensor, one: Output, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return (rows, numbers of rows of each sample) of an output: of real tokens, or one for a sample."""
    mask = token_mask(tensor, batch) if one.tokens else None
    if mask is None:
        return tensor.reshape(len(batch), -1), torch.ones(len(batch), dtype=torch.int64, device=tensor.device)
    return tensor[mask].reshape(-1, one.numbers), mask.sum(1)


def _aligned(parts: Sequence[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """Return the rows of several outputs side by side, each sample's from its first row on; of one output, its rows alone."""
    if len(parts) == 1:
        return parts[0][0]
    most = torch.stack([lengths for _, lengths in parts]).amax(0)
    starts = most.cumsum(0) - most
    columns, marks = [], []
    for rows, lengths in parts:
        within = torch.arange(len(rows), device=rows.device) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        places = starts.repeat_interleave(lengths) + within
        total = int(most.sum())
        columns.append(rows.new_zeros(total, rows.shape[1]).index_copy(0, places, rows))
        marks.append(rows.new_zeros(total, 1).index_fill(0, places, 1))
    return torch.cat([*columns, *marks], 1)


def named_tensors(value: Any) -> list[tuple[str, Tensor]]:
    """List every tensor of an output with its name ("0", "boxes", "heads.1"), in the order of `tensors_in`.

    A number follows a name that an earlier one has: {"a.b": p, "a": {"b": q}} are a.b and a.b#2.
    """
    unique: dict[str, Tensor] = {}
    for name, tensor in _by_path(value):
        names = chain([name], (f"{name}#{number}" for number in count(2)))
        unique[next(one for one in names if one not in unique)] = tensor
    return list(unique.items())


def _by_path(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name or "0", value
        return
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, (tuple, list)):
        items = list(enumerate(value)) if not hasattr(value, "_fields") else list(zip(value._fields, value, strict=True))
    elif hasattr(value, "__dataclass_fields__"):
        items = [(field, getattr(value, field)) for field in value.__dataclass_fields__]
    else:
        return
    for key, item in items:
        yield from _by_path(item, f"{name}.{key}".lstrip("."))


@torch.no_grad()
def output_reader(model: nn.Module, batches: Sequence[Batch], chosen: Mapping[str, float]) -> tuple[OutputReader | None, dict[str, str]]:
    """Return (the reader of a network's output, name -> reason for each output that is not compared).

    model    may change in its passes: pass a copy
    batches  one or two, with different numbers of samples: a tensor whose rows do not follow their number has no samples
    chosen   name or index -> weight; if empty, all that can be compared

    The reader is None if the output is one tensor, or only its first can be compared. Raises InvalidSetting if a name is unknown, or
    belongs to an output that cannot be compared.
    """
    passes = []
    with evaluating(model), suppress(Exception):  # a model's own checks may raise any error, which is reported later
        for batch in batches:
            passes.append(named_tensors(call(model, batch.inputs)))
    of_tokens = _places_of_tokens(model, batches, passes)
    if not passes or (len(passes[0]) < 2 and not chosen):
        _check_pairs([one[0][1] for one in passes if one], [len(batch) for batch in batches])
        return None, {}
    possible, others = {}, {}
    for place, (name, tensor) in enumerate(passes[0]):
        beside = [one[place][1] if place < len(one) else torch.empty(0) for one in passes[1:]]
        if place in of_tokens and not _cannot_be_compared(tensor):
            possible[name] = Output(name, place, (1, *tensor.shape[2:]), tokens=True)
            continue
        why = _why_not(tensor, len(batches[0]), beside, [len(batch) for batch in batches[1:]])
        if why is None:
            possible[name] = Output(name, place, _shape_of_sample(tensor, len(batches[0])) or ())
        else:
            others[name] = why
    outputs = _chosen(possible, others, [name for name, _ in passes[0]], chosen)
    if not outputs or (outputs[0].place == 0 and len(outputs) == 1):
        return None, others
    task = "token-classification" if outputs[0].tokens and are_token_classes(batches[0]) else None
    return OutputReader(outputs, task), {name: "not chosen" for name in possible if name not in {one.name for one in outputs}} | others


def _places_of_tokens(model: nn.Module, batches: Sequence[Batch], passes: Sequence[Sequence[tuple[str, Tensor]]]) -> set[int]:
    """Return the indices of the outputs with a row for each token of padded texts, which has the same shape in texts of another length: a
    size of another output may equal a length by chance, and attention has a number for each pair of tokens."""
    if not passes or batches[0].mask is None:
        return set()
    with evaluating(model), suppress(Exception):  # a model may reject any length
        other = of_other_length(batches[0])
        seen = [*zip(batches, passes, strict=False), (other, named_tensors(call(model, other.inputs)))]
        shapes = [[_shape_of_token(tensor, batch) for _, tensor in one] for batch, one in seen]
        return {place for place, shape in enumerate(shapes[0]) if shape and all(one[place : place + 1] == [shape] for one in shapes)}
    return set()


def _shape_of_token(tensor: Tensor, batch: Batch) -> tuple[int, ...] | None:
    """Return [1, ...], a token's shape in an output [N, T, ...] of padded texts; None for another output."""
    return None if tensor.dim() < 2 or token_mask(tensor, batch) is None else (1, *tensor.shape[2:])


def _check_pairs(outputs: Sequence[Tensor], counts: Sequence[int]) -> None:
    """Raise UnsupportedModel if the only output compares every input with every other."""
    if len(outputs) > 1 and all(output.shape == (count, count) for output, count in zip(outputs, counts, strict=True)):
        raise UnsupportedModel(
            f"The network's only output has shape {list(outputs[0].shape)} for {counts[0]} inputs and {list(outputs[1].shape)} for "
            f"{counts[1]}: a number for each pair of inputs, and no row of each input. Return what is multiplied to compare them, too."
        )


def _shape_of_sample(tensor: Tensor, count: int) -> tuple[int, ...] | None:
    """Return [rows per sample, ...] of a tensor of `count` samples; None if its rows do not belong to samples."""
    if not tensor.dim() or not count or len(tensor) % count:
        return None
    return len(tensor) // count, *tensor.shape[1:]


def _why_not(tensor: Tensor, count: int, beside: Sequence[Tensor], counts: Sequence[int]) -> str | None:
    """Return why an output cannot be compared, or None. `beside` is the same output for other numbers of samples."""
    if why := _cannot_be_compared(tensor):
        return why
    shape = _shape_of_sample(tensor, count)
    if shape is None or any(_shape_of_sample(other, number) != shape for other, number in zip(beside, counts, strict=True)):
        return f"{list(tensor.shape)} for {count} inputs, no fixed number of rows per input"
    return None


def _cannot_be_compared(tensor: Tensor) -> str:
    """Return why the values of an output cannot be compared, or ""."""
    if why := not_plain(tensor):
        return why.partition(". ")[0]
    if not tensor.is_floating_point():
        return f"{tensor.dtype}".removeprefix("torch.")
    if not torch.isfinite(tensor).all():
        return "holds NaN or infinity"
    return "" if tensor.numel() else "is empty"


def _chosen(
    possible: Mapping[str, Output], others: Mapping[str, str], names: Sequence[str], chosen: Mapping[str, float]
) -> tuple[Output, ...]:
    """Return the outputs named by `chosen`, each with its weight; all possible ones if it is empty."""
    if not chosen:
        return tuple(possible.values())
    weights = {}
    for name, weight in chosen.items():
        own = names[int(name)] if name not in names and name.isascii() and name.isdigit() and int(name) < len(names) else name
        if own not in names and (whole := f"{name}={weight:g}") in names:  # the name itself ends in =1, and the weight was left out
            own, weight = whole, 1.0
        if own in others:
            raise InvalidSetting(f"--outputs={name!r} cannot be compared: {others[own]}. Choose from {', '.join(possible) or 'none'}.")
        if own not in possible:
            raise InvalidSetting(f"--outputs={name!r} is not an output of the network. Choose from {', '.join(possible)}.")
        weights[own] = weight
    return tuple(replace(one, weight=weights[name]) for name, one in possible.items() if name in weights)
