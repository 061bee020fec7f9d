"""Quadratic forms of a layer's weights: the second moments of its inputs, as a matrix or, with few inputs, as the rows themselves.

`Full` holds H [groups, fan-in, fan-in]; `Thin` holds F [groups, rows, fan-in] with H = F^T F: with fewer rows than inputs, its products
take less time and memory. Values are [groups, inputs, channels]. Their *images* are H or F times the values, from which slopes and
products follow.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

COLUMNS = 32
"""Inputs that are processed among themselves before the others receive their changes, in one product."""
SMALLEST_VARIANCE = 1e-35
"""Below this mean, inputs count as ones that never vary: the inverse would overflow float32."""

Step = tuple[slice, Tensor, Tensor]
"""(block of inputs, triangle [groups, block, block], pull [groups, block, state]) of an elimination."""


def blocks(fan_in: int) -> list[slice]:
    return [slice(start, min(start + COLUMNS, fan_in)) for start in range(0, fan_in, COLUMNS)]


def ridge(variance: Tensor, damping: float) -> Tensor:
    """Return `damping` times the mean variance, [groups, 1, 1]; 1 if that is negligible."""
    mean = variance.mean(1)[:, None, None]
    return torch.where(mean > SMALLEST_VARIANCE, damping * mean, torch.ones_like(mean))


@dataclass(frozen=True)
class Full:
    """H itself, symmetric and positive semidefinite, possibly singular."""

    hessian: Tensor

    def largest(self) -> Tensor:
        return self.hessian.abs().amax()

    def variance(self) -> Tensor:
        """Return H's diagonal, [groups, fan-in]."""
        return torch.diagonal(self.hessian, dim1=1, dim2=2)

    def images(self, values: Tensor, block: slice = slice(None)) -> Tensor:
        """Return the images of values for the inputs in `block`."""
        return self.hessian[:, :, block] @ values

    def slopes(self, images: Tensor, block: slice = slice(None)) -> Tensor:
        """Return H times the values, for the inputs in `block`."""
        return images[:, block]

    def inner(self, block: slice) -> Tensor:
        return self.hessian[:, block, block]

    def products(self, values: Tensor, own: Tensor, images: Tensor) -> Tensor:
        """Return the bilinear form of values (with images `own`) and other values (with `images`), for each channel: [groups, channels]."""
        return (values * images).sum(1)

    def towards(self, weight: Tensor, cross: Tensor, damping: float) -> Tensor:
        """Return W (C - H) (H + ridge)^-1 for W [groups, channels, fan-in]; `cross` is C."""
        return torch.linalg.solve(self._damped(damping), weight @ (cross - self.hessian), left=False)

    def ordered(self, order: Tensor) -> "Full":
        """Return the form with the inputs in another order, [groups, fan-in]."""
        rows = self.hessian.gather(1, order[:, :, None].expand_as(self.hessian))
        return Full(rows.gather(2, order[:, None, :].expand_as(rows)))

    def elimination(self, damping: float) -> Iterator[Step]:
        """Yield the factors by which rounding compensates for errors of later inputs, the last block of inputs first.

        With H + ridge = R^T R and U = R / diagonal, an input's best weight is w + (U - 1) errors. The state is the errors of all later
        inputs.
        """
        upper = torch.linalg.cholesky(self._damped(damping), upper=True)
        upper = upper / torch.diagonal(upper, dim1=1, dim2=2)[:, :, None]
        for block in reversed(blocks(upper.shape[1])):
            yield block, upper[:, block, block], upper[:, block, block.stop :]

    def state(self, errors: Tensor, block: slice, before: Tensor | None) -> Tensor:
        """Return the state after the inputs from `block` on have errors; `before` is the state without the block."""
        return errors[:, block.start :]

    def _damped(self, damping: float) -> Tensor:
        return self.hessian + ridge(self.variance(), damping) * torch.eye(self.hessian.shape[1], dtype=self.hessian.dtype).to(self.hessian)


@dataclass(frozen=True)
class Thin:
    """H by its factor F: rows of inputs over the square root of their number."""

    factor: Tensor

    def largest(self) -> Tensor:
        return self.factor.abs().amax().square() * self.factor.shape[1]

    def variance(self) -> Tensor:
        return self.factor.square().sum(1)

    def images(self, values: Tensor, block: slice = slice(None)) -> Tensor:
        return self.factor[:, :, block] @ values

    def slopes(self, images: Tensor, block: slice = slice(None)) -> Tensor:
        return self.factor[:, :, block].transpose(1, 2) @ images

    def inner(self, block: slice) -> Tensor:
        part = self.factor[:, :, block]
        return part.transpose(1, 2) @ part

    def products(self, values: Tensor, own: Tensor, images: Tensor) -> Tensor:
        return (own * images).sum(1)

    def towards(self, weight: Tensor, cross: Tensor, damping: float) -> Tensor:
        """Return W (C - H) (H + ridge)^-1; `cross` is the factor G of the other rows, with C = G^T F."""
        square = self.factor @ self.factor.transpose(1, 2)
        square = square + ridge(self.variance(), damping) * torch.eye(square.shape[1], dtype=square.dtype).to(square)
        shift = weight @ (cross - self.factor).transpose(1, 2)
        return torch.linalg.solve(square, shift, left=False) @ self.factor

    def ordered(self, order: Tensor) -> "Thin":
        return Thin(self.factor.gather(2, order[:, None, :].expand_as(self.factor)))

    def elimination(self, damping: float) -> Iterator[Step]:
        """Yield the factors as `Full` does; the state is F times the errors of all later inputs.

        The inputs before a block, if free, would leave the share M y of a state y, M = ridge (F F^T + ridge)^-1 over these inputs, so that
        the block is rounded under A = 1 + F^T M F / ridge. Adding a block to those before it updates M by the block's rank.
        """
        factor, shrunk = self.factor.double(), ridge(self.variance(), damping).double()
        share = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device).expand(len(factor), -1, -1)
        steps = []
        for block in blocks(factor.shape[2]):
            part = factor[:, :, block]
            reached = share @ part
            damped = part.transpose(1, 2) @ reached / shrunk
            damped = (damped + damped.transpose(1, 2)) / 2 + torch.eye(damped.shape[1], dtype=damped.dtype).to(damped)
            upper = torch.linalg.cholesky(damped, upper=True)
            spread = torch.linalg.solve_triangular(upper.transpose(1, 2), reached.transpose(1, 2), upper=False)
            share = share - spread.transpose(1, 2) @ spread / shrunk
            diagonal = torch.diagonal(upper, dim1=1, dim2=2)[:, :, None]
            triangle, pull = upper / diagonal, spread / (diagonal * shrunk)
            steps.append((block, triangle.to(self.factor), pull.to(self.factor)))
        yield from reversed(steps)

    def state(self, errors: Tensor, block: slice, before: Tensor | None) -> Tensor:
        added = self.images(errors[:, block], block)
        return added if before is None else before + added


Quadratic = Full | Thin
