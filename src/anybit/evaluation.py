"""What a model's outputs are worth: accuracy with labels, distance to the float model without."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybit.batches import Batch, call, evaluating, first_tensor
from anybit.errors import InvalidInput

Metric = Callable[[Tensor, Tensor], float]
TASKS = ("classification", "regression")


@torch.no_grad()
def outputs_of(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """The first output of every sample, [N, ...], in evaluation mode."""
    with evaluating(model):
        outputs = [first_tensor(call(model, batch.inputs)) for batch in batches]
    if not outputs:
        raise InvalidInput("The data is empty: there is nothing to run the model on.")
    return torch.cat(outputs)


def guess_task(outputs: Tensor) -> str:
    """ "classification" where outputs are [N, classes >= 2], else "regression"; the user's --task overrules it."""
    return "classification" if outputs.dim() == 2 and outputs.shape[1] >= 2 else "regression"


def distance(outputs: Tensor, reference: Tensor, task: str) -> float:
    """How far `outputs` are from those of the float model: mean KL divergence of one sample's classes, or normalized squared error."""
    return float(sample_distances(outputs, reference, task).mean())


def sample_distances(outputs: Tensor, reference: Tensor, task: str) -> Tensor:
    """The same for each sample, [N]; for regression each is divided by the mean square of the reference."""
    if task == "classification":
        log_p, log_q = F.log_softmax(reference.double(), -1), F.log_softmax(outputs.double(), -1)
        terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0)  # a class that both rule out adds nothing
        return terms.sum(-1).clamp_min(0)  # rounding alone can make it -1e-17
    error = (outputs.double() - reference.double()).square().reshape(len(outputs), -1).mean(1)
    return error / reference.double().square().mean().clamp_min(1e-30)


def agreement(outputs: Tensor, reference: Tensor) -> float:
    """Percent of samples whose top-1 class is the reference's."""
    return 100 * float((outputs.argmax(-1) == reference.argmax(-1)).double().mean())


def correct(outputs: Tensor, labels: Tensor) -> Tensor:
    """Which samples have their label first, bool [N]."""
    return outputs.argmax(-1) == labels


def check_labels(outputs: Tensor, labels: Tensor, task: str) -> None:
    """Raise InvalidInput where `labels` are not what a network with such `outputs` can be right about."""
    if task == "classification" and (labels.dim() != 1 or labels.is_floating_point()):
        raise InvalidInput(f"Class labels are integers, one a sample; these labels are {labels.dtype} of shape {tuple(labels.shape)}.")
    if task != "classification" and outputs.numel() != labels.numel():
        raise InvalidInput(f"Targets of shape {tuple(labels.shape)} do not fit outputs of shape {tuple(outputs.shape)}.")
    if task == "classification" and (labels.min() < 0 or labels.max() >= outputs.shape[-1]):
        raise InvalidInput(
            f"Labels run from {int(labels.min())} to {int(labels.max())}, but the model has {outputs.shape[-1]} classes. "
            "Check that the data set's class numbers are the model's."
        )


def metric_name(metric: Metric) -> str:
    """What a user's metric is called in a report."""
    return getattr(metric, "__name__", "metric")


def score(outputs: Tensor, labels: Tensor, task: str, metric: Metric | None = None) -> dict[str, float]:
    """top1, top5 and loss (cross-entropy) of a classifier, squared error of a regression; plus the user's metric."""
    if len(labels) != len(outputs):
        raise InvalidInput(f"{len(labels)} labels for {len(outputs)} outputs. Give one label a sample.")
    result: dict[str, float] = {}
    check_labels(outputs, labels, task)
    if task == "classification":
        classes = outputs.shape[-1]
        result["top1"] = 100 * float(correct(outputs, labels).double().mean())
        if classes > 5:
            result["top5"] = 100 * float((outputs.argsort(descending=True, stable=True)[:, :5] == labels[:, None]).any(1).double().mean())
        result["loss"] = float(F.cross_entropy(outputs.double(), labels))
    else:
        result["loss"] = float((outputs.double().flatten() - labels.double().flatten()).square().mean())
    if metric is not None:
        name = metric_name(metric)
        result[name] = float(metric(outputs, labels))
        if not math.isfinite(result[name]):
            raise InvalidInput(f"The metric {name} is {result[name]} on these outputs. Mend the metric, or look at the data.")
    return result


def evaluate(
    model: nn.Module, batches: Iterable[Batch], task: str | None = None, metric: Metric | None = None, reference: Tensor | None = None
) -> dict[str, Any]:
    """Score `model` on labelled batches; with the float model's outputs as `reference`, their KL divergence and top-1 agreement too."""
    labels: list[Tensor] = []

    def watched() -> Iterable[Batch]:
        for batch in batches:
            if batch.labels is None:
                raise InvalidInput("Evaluation needs labels, and this data has none. Give a labelled set to --data or --test.")
            labels.append(batch.labels)
            yield batch

    outputs = outputs_of(model, watched())
    task = task or guess_task(outputs)
    result: dict[str, Any] = {"samples": len(outputs), **score(outputs, torch.cat(labels), task, metric)}
    if reference is not None:
        result["kl" if task == "classification" else "error"] = distance(outputs, reference, task)
        if task == "classification":
            result["agreement"] = agreement(outputs, reference)
    return result
