"""What a model's outputs are worth: accuracy with labels, distance to the float model without."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybit.data.batches import Batch, Reader, evaluating, predict
from anybit.errors import InvalidInput, InvalidSetting

Metric = Callable[[Tensor, Tensor], float]
COUNTED: dict[str, str | None] = {
    "classification": "top1",
    "regression": None,
    "embedding": "spearman",
    "question-answering": "f1",
    "language-model": "top1",
}
"""Task -> the score in percent that a limit on the drop counts in, where there is one."""
NUMBERS = 2**24
"""Outputs whose distance or loss is computed at once, in double precision: a vocabulary makes many."""


def compares_classes(task: str) -> bool:
    """Whether outputs are logits, whose distance is a KL divergence."""
    return task in ("classification", "question-answering", "language-model")


@torch.no_grad()
def outputs_of(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """What is read in the output on every sample, [N, ...], in evaluation mode."""
    with evaluating(model):
        outputs = [predict(model, batch) for batch in batches]
    if not outputs:
        raise InvalidInput("The data is empty: there is nothing to run the model on.")
    return torch.cat(outputs)


def guess_task(outputs: Tensor, reader: Reader | None = None) -> str:
    """The reader's; else "classification" where outputs are [N, classes >= 2], or "regression"; the user's --task overrules it."""
    if reader is not None:
        return reader.task
    return "classification" if outputs.dim() == 2 and outputs.shape[1] >= 2 else "regression"


def distance(outputs: Tensor, reference: Tensor, task: str) -> float:
    """How far `outputs` are from those of the float model: mean KL divergence of one sample's classes, or normalized squared error."""
    return float(sample_distances(outputs, reference, task).mean())


def sample_distances(outputs: Tensor, reference: Tensor, task: str) -> Tensor:
    """The same for each sample, [N]; where outputs are no logits each is divided by the mean square of the reference."""
    if compares_classes(task):
        return torch.cat([_divergence(some.double(), float_ones.double()) for some, float_ones in _in_parts(outputs, reference)])
    error = (outputs.double() - reference.double()).square().reshape(len(outputs), -1).mean(1)
    return error / reference.double().square().mean().clamp_min(1e-30)


def _in_parts(outputs: Tensor, beside: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some samples of both after the others, so that the outputs have NUMBERS at most."""
    count = max(1, NUMBERS // max(1, outputs[:1].numel()))
    return zip(outputs.split(count), beside.split(count), strict=True)


def _divergence(outputs: Tensor, reference: Tensor) -> Tensor:
    """KL divergence of each sample's classes, [N]; the mean of several where a sample has several."""
    log_p, log_q = F.log_softmax(reference, -1), F.log_softmax(outputs, -1)
    terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0)  # a class that both rule out adds nothing
    return terms.sum(-1).clamp_min(0).reshape(len(outputs), -1).mean(1)  # rounding alone can make it -1e-17


def agreement(outputs: Tensor, reference: Tensor) -> float:
    """Percent of samples whose top-1 class is the reference's."""
    return 100 * float((outputs.argmax(-1) == reference.argmax(-1)).double().mean())


def beside(simulated: Tensor, there: Tensor, batches: Sequence[Batch], task: str, metric: Metric | None = None) -> dict[str, Any]:
    """What an exported network gives on these batches beside the simulation: how far its outputs are away, and both scores on labels.

    simulation  the largest difference, the largest output, and where outputs are classes top-1 agreement in percent
    """
    apart = {"largest_difference": float((simulated - there).abs().max()), "largest_output": float(simulated.abs().max())}
    if simulated.dim() == 2 and simulated.shape[1] > 1:
        apart["agreement"] = agreement(there, simulated)
    found: dict[str, Any] = {"simulation": apart}
    if batches[0].labels is not None:
        labels = torch.cat([batch.labels for batch in batches])
        both = {"simulated": simulated, "exported": there}
        found["accuracy"] = {kind: score(outputs, labels, task, metric, batches[0].reader) for kind, outputs in both.items()}
    return found


def correct(outputs: Tensor, labels: Tensor) -> Tensor:
    """Which samples have their label first, bool [N]."""
    return outputs.argmax(-1) == labels


def places(outputs: Tensor, labels: Tensor) -> Tensor:
    """The label's place among the classes, [N], 0 the first; of equal classes the one of the lower number is before the other."""
    own = outputs.gather(1, labels[:, None])
    before = torch.arange(outputs.shape[1], device=outputs.device) < labels[:, None]
    return (outputs > own).sum(1) + ((outputs == own) & before).sum(1)


def check_labels(outputs: Tensor, labels: Tensor, task: str) -> None:
    """Raise InvalidInput where `labels` are not what a network with such `outputs` can be right about."""
    classes = task in ("classification", "language-model")
    if classes and (labels.dim() != 1 or labels.is_floating_point()):
        raise InvalidInput(f"Class labels are integers, one a sample; these labels are {labels.dtype} of shape {tuple(labels.shape)}.")
    if task == "regression" and outputs.numel() != labels.numel():
        raise InvalidInput(f"Targets of shape {tuple(labels.shape)} do not fit outputs of shape {tuple(outputs.shape)}.")
    if task == "embedding" and (len(outputs) % 2 or len(labels) < 4 or len(labels[0::2].unique()) < 2):
        raise InvalidInput("Embeddings are scored by pairs of sentences of different scores. Give at least two (--columns pair=NAME).")
    if task == "embedding" and not torch.equal(labels[0::2], labels[1::2]):
        raise InvalidInput("Embeddings are scored by pairs of sentences, one after the other with one score. Give both the same label.")
    if classes and (labels.min() < 0 or labels.max() >= outputs.shape[-1]):
        raise InvalidInput(
            f"Labels run from {int(labels.min())} to {int(labels.max())}, but the model has {outputs.shape[-1]} classes. "
            "Check that the data set's class numbers are the model's."
        )


def check_metric(metric: Metric | None, task: str) -> None:
    """Raise InvalidSetting where the task's labels are nothing that a function of outputs and labels can use."""
    if metric is not None and task == "question-answering":
        raise InvalidSetting("A metric compares outputs with labels, and those of question answering are texts. Leave --metric out.")


def metric_name(metric: Metric) -> str:
    """What a user's metric is called in a report."""
    return getattr(metric, "__name__", "metric")


def score(outputs: Tensor, labels: Tensor, task: str, metric: Metric | None = None, reader: Reader | None = None) -> dict[str, float]:
    """What the task counts, and the user's metric; the reader's own scores join them.

    classification  top1, top5 and loss (cross-entropy)         language-model  the same of next tokens, and perplexity
    regression      loss (squared error)                        embedding       spearman, pearson: correlation of the labels with the
                                                                                cosine of each two outputs, in percent
    """
    if len(labels) != len(outputs):
        raise InvalidInput(f"{len(labels)} labels for {len(outputs)} outputs. Give one label a sample.")
    check_metric(metric, task)
    result: dict[str, float] = {}
    check_labels(outputs, labels, task)
    if task in ("classification", "language-model"):
        classes = outputs.shape[-1]
        result["top1"] = 100 * float(correct(outputs, labels).double().mean())
        if classes > 5:
            result["top5"] = 100 * float((places(outputs, labels) < 5).double().mean())
        losses = [F.cross_entropy(some.double(), theirs, reduction="sum") for some, theirs in _in_parts(outputs, labels)]
        result["loss"] = float(sum(losses) / len(labels))
        if task == "language-model":
            result["perplexity"] = math.exp(min(result["loss"], 700.0))
    elif task == "embedding":
        from scipy.stats import pearsonr, spearmanr  # a third of the time that every command takes to start

        cosines = F.cosine_similarity(outputs[0::2].double(), outputs[1::2].double()).cpu().numpy()
        result["spearman"] = 100 * float(spearmanr(cosines, labels[0::2].cpu().numpy()).statistic)
        result["pearson"] = 100 * float(pearsonr(cosines, labels[0::2].cpu().numpy()).statistic)
    elif task == "regression":
        result["loss"] = float((outputs.double().flatten() - labels.double().flatten()).square().mean())
    if reader is not None:
        result |= reader.score(outputs, labels)
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
    readers: list[Reader | None] = [None]

    def watched() -> Iterable[Batch]:
        for batch in batches:
            if batch.labels is None:
                raise InvalidInput("Evaluation needs labels, and this data has none. Give a labelled set to --data or --test.")
            labels.append(batch.labels)
            readers[0] = batch.reader
            yield batch

    outputs = outputs_of(model, watched())
    task = task or guess_task(outputs, readers[0])
    unit = readers[0].unit if readers[0] else "samples"
    result: dict[str, Any] = {unit: len(outputs), **score(outputs, torch.cat(labels), task, metric, readers[0])}
    if reference is not None:
        result["kl" if compares_classes(task) else "error"] = distance(outputs, reference, task)
        if compares_classes(task):
            result["agreement"] = agreement(outputs, reference)
    return result


TRAINED_ON_CLASSES = ("classification", "language-model")


def task_loss(outputs: Tensor, batch: Batch, task: str, teacher: nn.Module | None, distill: float) -> Tensor:
    """Cross-entropy of a classifier (squared error of a regression), joined by the divergence from the teacher's outputs."""
    loss = torch.zeros((), device=outputs.device)
    classes = task in TRAINED_ON_CLASSES
    if distill < 1 and task not in (*TRAINED_ON_CLASSES, "regression"):
        raise InvalidSetting(f"A network for {task} is trained on the float network's outputs alone here: give --distill 1.")
    if distill < 1:
        if batch.labels is None:
            raise InvalidInput("Training needs labels, and this data has none. Give labelled data, or --distill 1.")
        labels = batch.labels
        check_labels(outputs, labels, task)
        loss = F.cross_entropy(outputs.float(), labels) if classes else F.mse_loss(outputs.float().flatten(), labels.float().flatten())
        loss = (1 - distill) * loss
    if distill > 0:
        with torch.no_grad():
            target = predict(teacher, batch).float()
        if compares_classes(task):
            apart = F.kl_div(F.log_softmax(outputs.float(), -1), F.log_softmax(target, -1), log_target=True, reduction="batchmean")
        else:
            apart = F.mse_loss(outputs.float(), target)
        loss = loss + distill * apart
    return loss
