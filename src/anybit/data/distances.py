"""Distances between a network's outputs and the float network's: divergences of classes and labels, squared errors of numbers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from anybit.data.outputs import OutputReader

NUMBERS = 2**24
"""Numbers of outputs whose distance or loss is computed at once, in double precision: large vocabularies need chunks."""
TINY = 1e-7
"""The least probability whose logarithm is taken: float32 cannot distinguish smaller ones in 1 - p."""


def are_probabilities(outputs: Tensor) -> bool:
    """Return whether each row holds class probabilities, non-negative with sum one: the network ends in a softmax."""
    if outputs.shape[-1] < 2 or not outputs.numel():
        return False
    return all(bool((some >= 0).all() and ((some.sum(-1) - 1).abs() < 1e-3).all()) for some in (outputs[:1], outputs))


def are_log_probabilities(outputs: Tensor) -> bool:
    """Return whether each row holds logarithms of class probabilities with sum one: the network ends in a log-softmax."""
    return outputs.shape[-1] > 1 and bool((outputs <= 0).all()) and are_probabilities(outputs.exp())


def lie_in_unit_interval(outputs: Tensor) -> bool:
    """Return whether all outputs lie between 0 and 1 and are not all equal: the network ends in a sigmoid, or returns shares."""
    least, most = outputs.aminmax()
    return bool(0 <= least < most <= 1)


def log_probabilities(outputs: Tensor) -> Tensor:
    """Return logits whose softmax is `outputs`, which are probabilities."""
    return outputs.clamp_min(torch.finfo(outputs.dtype).tiny).log()


def as_logits(outputs: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Return (outputs, reference) as logits if the reference holds probabilities; else unchanged."""
    return (log_probabilities(outputs), log_probabilities(reference)) if are_probabilities(reference) else (outputs, reference)


class Distance(Protocol):
    """A distance of outputs [N, ...] from those of the float network. `key` is its name in a report."""

    key: str

    def of_samples(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """Measure each sample in double precision, [N]."""

    def loss(self, outputs: Tensor, reference: Tensor, whole: Tensor | None = None) -> Tensor:
        """Measure all samples at once, differentiable and in the outputs' own precision. For a chunk of samples, `whole` is the reference
        of all: the result is then the chunk's part, and the parts of all chunks add up to the loss."""

    def distilled(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """Return the training loss towards a teacher's outputs."""

    def further(self, outputs: Tensor, reference: Tensor) -> dict[str, float]:
        """Measure further numbers that a report states beside the distance."""


class Divergence:
    """KL divergence of a sample's classes, with logits as outputs; the mean if a sample has several rows."""

    key = "kl"

    def of_samples(self, outputs: Tensor, reference: Tensor) -> Tensor:
        outputs, reference = as_logits(outputs, reference)
        return torch.cat([self._of_some(some.double(), float_ones.double()) for some, float_ones in in_parts(outputs, reference)])

    def _of_some(self, outputs: Tensor, reference: Tensor) -> Tensor:
        log_p, log_q = F.log_softmax(reference, -1), F.log_softmax(outputs, -1)
        terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0)  # a class that both exclude adds nothing
        return terms.sum(-1).clamp_min(0).reshape(len(outputs), -1).mean(1)  # rounding errors can make it -1e-17

    def loss(self, outputs: Tensor, reference: Tensor, whole: Tensor | None = None) -> Tensor:
        share = 1.0 if whole is None else len(reference) / len(whole)
        outputs, reference = as_logits(outputs, reference)
        terms = F.kl_div(F.log_softmax(outputs, -1), F.log_softmax(reference, -1), reduction="none", log_target=True)
        return terms.sum(-1).mean() * share

    def distilled(self, outputs: Tensor, reference: Tensor) -> Tensor:
        outputs, reference = as_logits(outputs, reference)
        return F.kl_div(F.log_softmax(outputs.float(), -1), F.log_softmax(reference, -1), log_target=True, reduction="batchmean")

    def further(self, outputs: Tensor, reference: Tensor) -> dict[str, float]:
        return {"agreement": agreement(outputs, reference)}


class SquaredError:
    """Squared error, divided by the mean square of the reference."""

    key = "error"

    def of_samples(self, outputs: Tensor, reference: Tensor) -> Tensor:
        error = (outputs.double() - reference.double()).square().reshape(len(outputs), -1).mean(1)
        return error / reference.double().square().mean().clamp_min(1e-30)

    def loss(self, outputs: Tensor, reference: Tensor, whole: Tensor | None = None) -> Tensor:
        energy = reference.square().sum().clamp_min(1e-30)
        share = 1.0 if whole is None else reference.square().sum() / whole.square().sum().clamp_min(1e-30)
        return (outputs - reference).square().sum() / energy * share

    def distilled(self, outputs: Tensor, reference: Tensor) -> Tensor:
        return F.mse_loss(outputs.float(), reference)

    def further(self, outputs: Tensor, reference: Tensor) -> dict[str, float]:
        return {}


class ChannelDivergence(Divergence):
    """KL divergence for outputs [N, classes, ...], averaged over a sample's places."""

    def of_samples(self, outputs: Tensor, reference: Tensor) -> Tensor:
        return super().of_samples(outputs.movedim(1, -1), reference.movedim(1, -1))

    def loss(self, outputs: Tensor, reference: Tensor, whole: Tensor | None = None) -> Tensor:
        return super().loss(outputs.movedim(1, -1), reference.movedim(1, -1), whole)

    def distilled(self, outputs: Tensor, reference: Tensor) -> Tensor:
        return self.loss(outputs.float(), reference)

    def further(self, outputs: Tensor, reference: Tensor) -> dict[str, float]:
        return super().further(outputs.movedim(1, -1), reference.movedim(1, -1))


class BinaryDivergence:
    """KL divergence of independent binary labels, with logits or probabilities as outputs, averaged over a sample's labels."""

    key = "kl"

    def _terms(self, outputs: Tensor, reference: Tensor, whole: Tensor | None = None) -> Tensor:
        if lie_in_unit_interval(reference if whole is None else whole):
            outputs, reference = outputs.clamp(0, 1).logit(TINY), reference.logit(TINY)
        p, excess = reference.sigmoid(), F.softplus(outputs) - F.softplus(reference)
        return (excess - p * (outputs - reference)).clamp_min(
            0
        )  # p log(p/q) + (1-p) log((1-p)/(1-q)); rounding errors can make it negative

    def of_samples(self, outputs: Tensor, reference: Tensor) -> Tensor:
        return self._terms(outputs.double(), reference.double()).reshape(len(outputs), -1).mean(1)

    def loss(self, outputs: Tensor, reference: Tensor, whole: Tensor | None = None) -> Tensor:
        share = 1.0 if whole is None else len(reference) / len(whole)
        return self._terms(outputs, reference, whole).mean() * share

    def distilled(self, outputs: Tensor, reference: Tensor) -> Tensor:
        return self.loss(outputs.float(), reference)

    def further(self, outputs: Tensor, reference: Tensor) -> dict[str, float]:
        threshold = 0.5 if lie_in_unit_interval(reference) else 0.0
        return {"agreement": 100 * float(((outputs > threshold) == (reference > threshold)).double().mean())}


DIVERGENCE, CHANNEL_DIVERGENCE, BINARY_DIVERGENCE, SQUARED_ERROR = Divergence(), ChannelDivergence(), BinaryDivergence(), SquaredError()


@dataclass(frozen=True)
class WeightedErrors:
    """Squared errors of several outputs, each divided by the mean square of its own reference, averaged by weight.

    An output whose reference is all zero is ignored: there is nothing to divide by.
    """

    reader: OutputReader
    key = "error"

    def of_each(self, outputs: Tensor, reference: Tensor) -> dict[str, Tensor]:
        """Measure each sample's error of each output, [N], by the output's name."""
        numbers = [one.numbers for one in self.reader.outputs]
        parts = zip(self.reader.outputs, *(rows[:, : sum(numbers)].split(numbers, 1) for rows in (outputs, reference)), strict=True)
        count = len(outputs)
        rows = {one.name: (part.reshape(count, -1), target.reshape(count, -1)) for one, part, target in parts}
        return {name: SQUARED_ERROR.of_samples(part, target) for name, (part, target) in rows.items() if target.any()}

    def of_samples(self, outputs: Tensor, reference: Tensor) -> Tensor:
        errors, weights = self.of_each(outputs, reference), {one.name: one.weight for one in self.reader.outputs}
        total = sum(weights[name] for name in errors)
        return sum((errors[name] * (weights[name] / total) for name in errors), outputs.new_zeros(len(outputs), dtype=torch.float64))

    def loss(self, outputs: Tensor, reference: Tensor, whole: Tensor | None = None) -> Tensor:
        energies = [one.square().sum() for one in self.reader.split(reference if whole is None else whole)]
        errors = [(one - target).square().sum() for one, target in zip(*map(self.reader.split, (outputs, reference)), strict=True)]
        weights = [one.weight * bool(energy > 0) for one, energy in zip(self.reader.outputs, energies, strict=True)]
        terms = [w / sum(weights) * error / energy for w, error, energy in zip(weights, errors, energies, strict=True) if w]
        return sum(terms, outputs.new_zeros(()))

    def distilled(self, outputs: Tensor, reference: Tensor) -> Tensor:
        return self.loss(outputs.float(), reference)

    def further(self, outputs: Tensor, reference: Tensor) -> dict[str, float]:
        return {}


def in_parts(outputs: Tensor, beside: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Split both into runs of samples with at most NUMBERS numbers in `outputs`."""
    count = max(1, NUMBERS // max(1, outputs[:1].numel()))
    return zip(outputs.split(count), beside.split(count), strict=True)


def agreement(outputs: Tensor, reference: Tensor) -> float:
    """Return the percentage of samples whose top-1 class equals the reference's."""
    return 100 * float((outputs.argmax(-1) == reference.argmax(-1)).double().mean())
