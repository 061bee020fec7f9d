"""Products of two tensors, written as einsum subscripts, turned into the matrix products that layers compute."""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from anybit.networks.matmul import Matmul


@dataclass(frozen=True)
class Contraction:
    """A sum of products of two tensors, with a letter for each dimension of both and of the output. No letter occurs twice in one tensor,
    and none that is summed over occurs in only one."""

    first: str
    second: str
    output: str

    @cached_property
    def batch(self) -> str:
        """Return the dimensions that all three share."""
        return "".join(letter for letter in self.output if letter in self.first and letter in self.second)

    @cached_property
    def summed(self) -> str:
        return "".join(letter for letter in self.first if letter in self.second and letter not in self.output)

    def own(self, subscripts: str) -> str:
        """Return the dimensions that this operand shares only with the output."""
        return "".join(letter for letter in subscripts if letter not in self.batch + self.summed)

    def sizes(self, first: Sequence[int], second: Sequence[int]) -> dict[str, int]:
        """Return letter -> size, for operands of these shapes."""
        return dict(zip(self.second + self.first, [*second, *first], strict=True))

    def broadcasts(self, first: Sequence[int], second: Sequence[int]) -> bool:
        """Return whether the operands differ in the size of a dimension."""
        sizes = self.sizes(first, second)
        return any(sizes[letter] != size for letter, size in zip(self.second, second, strict=True))


def contraction(equation: str | None, first: int, second: int) -> Contraction | None:
    """Return the contraction of an einsum over operands with these numbers of dimensions, or of `@` if there is no equation; else None."""
    if equation is None:
        batch = string.ascii_uppercase[: max(first, second) - 2]
        return Contraction(batch[len(batch) - first + 2 :] + "ik", batch[len(batch) - second + 2 :] + "kj", batch + "ij")
    operands, arrow, output = equation.replace(" ", "").partition("->")
    left, _, right = operands.partition(",")
    output = output if arrow else "".join(sorted({*left} ^ {*right}))
    if "." in equation or (len(left), len(right)) != (first, second):
        return None
    shared, both = {*left} & {*right}, {*left} | {*right}
    repeats = any(len({*part}) < len(part) for part in (left, right, output))
    return None if repeats or not both - shared <= {*output} <= both or shared <= {*output} else Contraction(left, right, output)


def is_transposed(of: Contraction) -> bool:
    """Return whether the summed dimensions come last in the second operand, as in keys."""
    own = of.own(of.second)
    return bool(own) and of.second.index(of.summed[-1]) > of.second.index(own[-1])


def multiplied(of: Contraction, first: Tensor, second: Tensor, layer: Matmul) -> Tensor:
    """Compute a product of two activations by a Matmul."""
    left, right = of.own(of.first), of.own(of.second)
    rows = _arranged(first, of.first, [*of.batch, left, of.summed])
    last = [right, of.summed] if layer.transposed else [of.summed, right]
    result = layer(rows, _arranged(second, of.second, [*of.batch, *last]))
    return _restored(result, [*of.batch, left, right], of.output, of.sizes(first.shape, second.shape))


def weight_rows_of(of: Contraction, weight: Tensor, operand: int) -> Tensor:
    """Return the weight operand as [experts, outputs, inputs]: a linear's weight for each place of the batch dimensions."""
    subscripts = (of.first, of.second)[operand]
    return _arranged(weight, subscripts, [of.batch, of.own(subscripts), of.summed])


def weighted(of: Contraction, operands: Sequence[Tensor], operand: int, layers: Sequence[nn.Module]) -> Tensor:
    """Compute a product with a weight by a linear for each expert; only the shape of the weight operand is read."""
    activation, subscripts = operands[1 - operand], (of.first, of.second)
    inputs, outputs = of.own(subscripts[1 - operand]), of.own(subscripts[operand])
    groups = [of.batch] if of.batch else []
    rows = _arranged(activation, subscripts[1 - operand], [*groups, *inputs, of.summed])
    parts = [layer(part) for layer, part in zip(layers, rows.unbind(0) if of.batch else [rows], strict=True)]
    result = torch.stack(parts) if of.batch else parts[0]
    return _restored(result, [*groups, *inputs, outputs], of.output, of.sizes(operands[0].shape, operands[1].shape))


def _arranged(tensor: Tensor, subscripts: str, groups: Sequence[str]) -> Tensor:
    """Return the tensor with one dimension for each group of dimensions."""
    order = [subscripts.index(letter) for letter in "".join(groups)]
    arranged = tensor if order == sorted(order) else tensor.permute(order)
    for place, group in enumerate(groups):
        if len(group) != 1:
            arranged = arranged.flatten(place, place + len(group) - 1) if group else arranged.unsqueeze(place)
    return arranged


def _restored(result: Tensor, groups: Sequence[str], output: str, sizes: dict[str, int]) -> Tensor:
    """Return the tensor with its groups split again, in the order of the output."""
    for place, group in reversed(list(enumerate(groups))):
        if len(group) != 1:
            result = result.unflatten(place, [sizes[letter] for letter in group]) if group else result.squeeze(place)
    order = ["".join(groups).index(letter) for letter in output]
    return result if order == sorted(order) else result.permute(order)
