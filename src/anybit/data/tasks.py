"""Tasks: the distance of a network's outputs from the float network's, the training loss, scores and labels; one class per task.

Files, settings and the command line use a task's name; `TASKS` maps names to tasks.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybit.data.batches import (
    IGNORED,
    Batch,
    Labels,
    Reader,
    Targets,
    check_numbers,
    evaluating,
    join_labels,
    map_tensors,
    naming_sample,
    predict,
)
from anybit.data.distances import (
    BINARY_DIVERGENCE,
    CHANNEL_DIVERGENCE,
    DIVERGENCE,
    SQUARED_ERROR,
    Distance,
    WeightedErrors,
    agreement,
    are_log_probabilities,
    are_probabilities,
    in_parts,
    lie_in_unit_interval,
    log_probabilities,
)
from anybit.data.outputs import OutputReader
from anybit.errors import AnybitError, InvalidInput, InvalidSetting
from anybit.progress import tell

Metric = Callable[[Any, Any], float]
"""A custom metric, higher is better: a function of (outputs, labels), with the outputs a tensor, or a tuple of several, and the labels a
tensor, or a list with the label of each sample if they are not numbers of one shape."""
VOID = 255
"""The label of a place that is not scored if there are fewer classes, as in PASCAL VOC."""


class Task:
    """The interface of every task; subclasses override what differs.

    distance   to the float network's outputs
    counted    the score in percent that "drop=" budgets limit, or None
    numbers    whether labels are numbers, which a custom metric can use
    of_one_class  whether a prediction is one class, and so right or wrong
    """

    name: str
    distance: Distance
    counted: str | None = None
    numbers = True
    of_one_class = False

    def tensors(self, outputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the outputs that a custom metric receives."""
        return outputs

    def judged(self, outputs: Tensor) -> Tensor:
        """Return the output that labels refer to."""
        return outputs

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        """Raise InvalidInput if `labels` cannot be labels of such `outputs`."""

    def scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Return name -> score of outputs against labels; {} if only the outputs' reader can score them."""
        return {}

    def check_trains_on_labels(self) -> None:
        """Raise InvalidSetting if labels define no training loss."""
        raise InvalidSetting(f"A network for {self.name} can only be trained on the float network's outputs: give --distill=1.")

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the training loss on labels. Raises InvalidSetting if they define none."""
        raise InvalidSetting(f"Labels define no training loss for {self.name}: give --distill=1.")

    def classes(self, outputs: Tensor) -> int | None:
        """Return the number of classes of a whole sample, or None."""
        return None


class Classification(Task):
    """Logits [N, classes], one class per sample: top1, top5 and loss (cross-entropy)."""

    name, distance, counted, of_one_class = "classification", DIVERGENCE, "top1", True

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        if outputs.dim() != 2:
            raise InvalidInput(_not_rows_of_scores(outputs))
        if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex():
            raise InvalidInput(
                f"Class labels are integers, one per sample; these labels are {labels.dtype} of shape {tuple(labels.shape)}. "
                f"{_other_tasks(outputs, labels)}"
            )
        if labels.min() < 0 or labels.max() >= outputs.shape[-1]:
            raise InvalidInput(
                f"Labels run from {int(labels.min())} to {int(labels.max())}, but the model has {outputs.shape[-1]} classes. "
                "Check that the data set's class numbers are the model's."
            )

    def scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        result = {"top1": 100 * float(correct(outputs, labels).double().mean())}
        if outputs.shape[-1] > 5:
            result["top5"] = 100 * float((places(outputs, labels) < 5).double().mean())
        logits = log_probabilities(outputs) if are_probabilities(outputs) else outputs
        losses = [F.cross_entropy(some.double(), theirs, reduction="sum") for some, theirs in in_parts(logits, labels)]
        return result | {"loss": float(sum(losses) / len(labels))}

    def check_trains_on_labels(self) -> None:
        pass

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy((log_probabilities(outputs) if are_probabilities(outputs) else outputs).float(), labels)

    def classes(self, outputs: Tensor) -> int | None:
        return outputs.shape[-1]


def _not_rows_of_scores(outputs: Tensor) -> str:
    remedy = "one row per sample: flatten(1)." if _is_one_row(outputs) else "one row per sample, or name another --task."
    return f"Class scores have shape [N, classes], and these outputs {list(outputs.shape)}. Let the network return {remedy}"


class TokenClassification(Classification):
    """Logits [tokens, classes] or [N, T, classes], one class per token: the scores of a classification, over the tokens whose label is not
    IGNORED."""

    name = "token-classification"

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        if outputs.dim() > 2 and labels.shape != outputs.shape[:-1]:
            raise InvalidInput(f"Token labels have one entry per token, {list(outputs.shape[:-1])}; these have shape {list(labels.shape)}.")
        if not (labels != IGNORED).any():
            raise InvalidInput("No token has a label, so there is nothing to score. Give labels for some tokens.")
        super().check(*self._labelled(outputs, labels))

    def _labelled(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return (outputs, labels) of the tokens with a label."""
        if outputs.dim() > 2:
            outputs, labels = outputs.flatten(0, -2), labels.flatten()
        scored = labels != IGNORED
        return (outputs[scored], labels[scored]) if labels.dim() == 1 else (outputs, labels)

    def scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        return super().scores(*self._labelled(outputs, labels))

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return super().loss(*self._labelled(outputs, labels))

    def classes(self, outputs: Tensor) -> int | None:
        return None


class LanguageModel(TokenClassification):
    """Logits [tokens, vocabulary] of the next token: the scores of a classification, and perplexity."""

    name = "language-model"

    def scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        result = super().scores(outputs, labels)
        return result | {"perplexity": math.exp(min(result["loss"], 700.0))}


class MaskedLanguageModel(LanguageModel):
    """Logits [tokens, vocabulary] of the token at each place, scored where the input hides it."""

    name = "masked-language-model"


class SequenceToSequence(LanguageModel):
    """Logits [tokens, vocabulary] of the next token of an answer, from an encoder-decoder that reads the answer so far."""

    name = "sequence-to-sequence"


def _is_one_row(outputs: Tensor) -> bool:
    """Return whether outputs are several numbers per sample in one row with further dimensions of size 1: [N, 1, C] or [N, C, 1, 1]."""
    return outputs.dim() > 2 and outputs.shape[1:].numel() == max(outputs.shape[1:]) > 1


def _one_for_each(outputs: Tensor, labels: Tensor) -> bool:
    """Return whether there is a label for each output, in the same order: shapes are equal up to dimensions of size 1."""
    return _shape_without_ones(outputs) == _shape_without_ones(labels)


def _shape_without_ones(tensor: Tensor) -> list[int]:
    return [len(tensor), *(size for size in tensor.shape[1:] if size > 1)]


class Regression(Task):
    """Values [N, ...]: loss (mean squared error)."""

    name, distance = "regression", SQUARED_ERROR

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        if labels.dim() == 1 and not labels.is_floating_point() and _is_one_row(outputs):
            raise InvalidInput(_not_rows_of_scores(outputs))
        if not _one_for_each(outputs, labels):
            raise InvalidInput(
                f"Labels of shape {tuple(labels.shape)} do not fit outputs of shape {tuple(outputs.shape)}, each with one label. "
                f"{_other_tasks(outputs, labels)}"
            )

    def scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        return {"loss": float((outputs.double().flatten() - labels.double().flatten()).square().mean())}

    def check_trains_on_labels(self) -> None:
        pass

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(outputs.float().flatten(), labels.float().flatten())


class Detection(Regression):
    """Raw heads of a detector, before box selection: values of any shape, which only a custom metric can score."""

    name = "detection"

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        raise InvalidInput("A detector's labels describe boxes, which its raw heads have not selected yet. Score them with --metric.")

    def check_trains_on_labels(self) -> None:
        Task.check_trains_on_labels(self)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return Task.loss(self, outputs, labels)


class MultiLabel(Task):
    """Logits or probabilities [N, labels] of independent labels: f1 and exact (all labels of a sample right) in percent, and loss (binary
    cross-entropy). Labels that are IGNORED or VOID are ignored, as those of pixels in a binary segmentation [N, 1, H, W]."""

    name, distance, counted = "multi-label", BINARY_DIVERGENCE, "f1"

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        scored = labels[_is_scored(labels)]
        if not _one_for_each(outputs, labels) or not ((scored == 0) | (scored == 1)).all():
            raise InvalidInput(
                f"Several labels per sample are zeros and ones {list(outputs.shape)}, one per output, or {IGNORED} if not known; these "
                f"are {labels.dtype} of shape {tuple(labels.shape)} from {labels.min():g} to {labels.max():g}. "
                f"{_other_tasks(outputs, labels)}"
            )
        if not len(scored):
            raise InvalidInput(f"Every label is {IGNORED} or {VOID}, so there is nothing to score. Give some labels.")

    def scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        labels = labels.reshape(outputs.shape)
        scored = _is_scored(labels)
        predicted, expected = (outputs > (0.5 if lie_in_unit_interval(outputs) else 0)) & scored, (labels == 1) & scored
        both, either = int((predicted & expected).sum()), int(predicted.sum() + expected.sum())
        exact = 100 * float((predicted == expected).reshape(len(outputs), -1).all(1).double().mean())
        return {"f1": 200 * both / either if either else 100.0, "exact": exact, "loss": float(self.loss(outputs.double(), labels))}

    def check_trains_on_labels(self) -> None:
        pass

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        labels = labels.reshape(outputs.shape).to(outputs.dtype)
        scored = _is_scored(labels)
        if lie_in_unit_interval(outputs.detach()):
            return F.binary_cross_entropy(outputs[scored], labels[scored])
        return F.binary_cross_entropy_with_logits(outputs[scored], labels[scored])


class Segmentation(Task):
    """Logits [N, classes, H, W], one class per place, with labels [N, H, W]: mean_iou (over classes that occur in labels or outputs) and
    pixel_accuracy in percent, and loss (cross-entropy). Places labelled IGNORED, or VOID if there is no such class, are ignored. Logits of
    another size are resized to that of the labels."""

    name, distance, counted = "segmentation", CHANNEL_DIVERGENCE, "mean_iou"

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        expected = [len(outputs), *outputs.shape[2:]]
        if outputs.dim() < 3 or labels.is_floating_point() or _as_masks(labels, outputs).dim() != outputs.dim() - 1:
            raise InvalidInput(
                f"Segmentation labels are integers {expected}, for logits [N, classes, H, W]; these are {labels.dtype} of shape "
                f"{tuple(labels.shape)}, and the outputs have shape {tuple(outputs.shape)}. {_other_tasks(outputs, labels)}"
            )
        masks, classes = _as_masks(labels, outputs), outputs.shape[1]
        _check_axes(outputs, masks)
        masks = masks[_is_scored(masks, classes)]
        if not len(masks):
            raise InvalidInput(f"Every label is {IGNORED} or {VOID}, so there is nothing to score. Give labels for some places.")
        if masks.min() < 0 or masks.max() >= classes:
            raise InvalidInput(
                f"Labels run from {int(masks.min())} to {int(masks.max())}, but the model has {classes} classes. "
                f"Check that the data set's class numbers are the model's; {IGNORED} and {VOID} are not scored."
            )

    def _at_labels(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return (logits [places, classes], labels [places]) of all scored places."""
        masks = _as_masks(labels, outputs)
        if outputs.shape[2:] != masks.shape[1:]:
            outputs = F.interpolate(outputs, masks.shape[1:], mode="bilinear" if outputs.dim() == 4 else "nearest")
        scored = _is_scored(masks, outputs.shape[1])
        return outputs.movedim(1, -1)[scored], masks[scored]

    def scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        count, loss = outputs.shape[1], 0.0
        confusion = torch.zeros(count, count, dtype=torch.float64, device=outputs.device)
        for some, theirs in in_parts(outputs, labels):
            logits, masks = self._at_labels(some, theirs)
            confusion += torch.bincount(masks * count + logits.argmax(1), minlength=count**2).view(count, count)
            loss += len(masks) * Classification().scores(logits, masks)["loss"] if len(masks) else 0.0
        right, union = confusion.diagonal(), confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
        return {
            "mean_iou": 100 * float((right[union > 0] / union[union > 0]).mean()),
            "pixel_accuracy": 100 * float(right.sum() / confusion.sum()),
            "loss": loss / float(confusion.sum()),
        }

    def check_trains_on_labels(self) -> None:
        pass

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return Classification().loss(*self._at_labels(outputs, labels))


def _is_scored(masks: Tensor, classes: int = 2) -> Tensor:
    """Return which places have a label, bool in the masks' shape."""
    return (masks != IGNORED) & ((masks != VOID) | (classes > VOID))


def _as_masks(labels: Tensor, outputs: Tensor) -> Tensor:
    """Return labels as [N, H, W], without a channel dimension, which may be the last."""
    if labels.dim() != outputs.dim():
        return labels
    last = labels.shape[-1] == 1 and labels.shape[1:-1] == outputs.shape[2:]
    return labels[..., 0] if last else labels[:, 0] if labels.shape[1] == 1 else labels


def _are_places(outputs: Tensor, masks: Tensor) -> bool:
    """Return whether masks have the outputs' sizes, perhaps in another order, which `_check_axes` names."""
    own, places = list(masks.shape[1:]), list(outputs.shape[2:])
    return own == places or (outputs.dim() > 3 and own in (places[::-1], list(outputs.shape[1:-1])))


def _check_axes(outputs: Tensor, masks: Tensor) -> None:
    """Raise InvalidInput if masks have the outputs' sizes in another order, so that resizing would hide it."""
    places, own = list(outputs.shape[2:]), list(masks.shape[1:])
    if own == places:
        return
    if own == list(outputs.shape[1:-1]):
        raise InvalidInput(
            f"Labels {list(masks.shape)} belong to outputs with the classes last, {list(outputs.shape)}, and segmentation reads "
            "[N, classes, H, W]. Let the network return outputs.movedim(-1, 1)."
        )
    if own == places[::-1]:
        raise InvalidInput(
            f"Labels {list(masks.shape)} have height and width in another order than the outputs, {list(outputs.shape)}. Give "
            "labels.movedim(1, -1)."
        )


class Embedding(Task):
    """Vectors [N, features], in pairs: spearman and pearson, the correlation of the pairs' labels with their cosines, in percent."""

    name, distance, counted = "embedding", SQUARED_ERROR, "spearman"

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        if len(outputs) % 2 or len(labels) < 4 or len(labels[0::2].unique()) < 2:
            raise InvalidInput(
                "Embeddings are scored on pairs of sentences with different scores. Give at least two (--columns='pair=NAME')."
            )
        if not torch.equal(labels[0::2], labels[1::2]):
            raise InvalidInput(
                "Embeddings are scored on pairs of samples, one after the other with one score. Give both the same label, or score them "
                "with a --metric."
            )

    def scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        from scipy.stats import pearsonr, spearmanr  # importing it would slow every command's start by half

        cosines = F.cosine_similarity(outputs[0::2].double(), outputs[1::2].double()).cpu().numpy()
        expected = labels[0::2].cpu().numpy()
        return {name: 100 * float(of(cosines, expected).statistic) for name, of in (("spearman", spearmanr), ("pearson", pearsonr))}


class QuestionAnswering(Task):
    """Logits [N, 2, length] of an answer's first and last token; the reader, which has the texts, computes exact and f1."""

    name, distance, counted, numbers = "question-answering", DIVERGENCE, "f1", False


_ALL: tuple[Task, ...] = (
    Classification(), Regression(), Embedding(), QuestionAnswering(), LanguageModel(), MaskedLanguageModel(), SequenceToSequence(),
    TokenClassification(), MultiLabel(), Segmentation(), Detection(),
)  # fmt: skip
TASKS = {task.name: task for task in _ALL}


class SeveralOutputs(Task):
    """Several outputs, with labels for the first, which has a task of its own; all are compared by their squared errors."""

    def __init__(self, first: Task, reader: OutputReader):
        self.first, self.reader, self.distance = first, reader, WeightedErrors(reader)
        self.name, self.counted, self.numbers, self.of_one_class = first.name, first.counted, first.numbers, first.of_one_class

    def tensors(self, outputs: Tensor) -> tuple[Tensor, ...]:
        return self.reader.split(outputs)

    def judged(self, outputs: Tensor) -> Tensor:
        return self.reader.split(outputs)[0]

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        self.first.check(self.judged(outputs), labels)

    def scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        return self.first.scores(self.judged(outputs), labels)

    def check_trains_on_labels(self) -> None:
        self.first.check_trains_on_labels()

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return self.first.loss(self.judged(outputs), labels)


_FIXED = ContextVar("fixed", default=False)


@contextmanager
def keeping_task() -> Iterator[None]:
    """Advise no --task inside the block, or a function that this decorates: one that keeps the task of a run."""
    token = _FIXED.set(True)
    try:
        yield
    finally:
        _FIXED.reset(token)


def _other_tasks(outputs: Tensor, labels: Tensor) -> str:
    """Return advice on labels that do not fit a task: the tasks whose labels have this form."""
    whole = not labels.is_floating_point()
    fitting = {
        "classification": whole and labels.dim() == 1 and outputs.dim() == 2 and outputs.shape[1] > 1,
        "segmentation": whole and outputs.dim() > 2 and _as_masks(labels, outputs).shape == (len(outputs), *outputs.shape[2:]),
        "token-classification": whole and outputs.dim() == 3 and labels.shape == outputs.shape[:2],
        "multi-label": _one_for_each(outputs, labels) and bool(((labels == 0) | (labels == 1)).all()),
        "regression": _one_for_each(outputs, labels),
    }
    names = ", ".join(name for name, fits in fitting.items() if fits)
    if not names and labels.numel() == outputs.numel() and len(labels) == len(outputs):
        return f"Give them in the outputs' order, {list(outputs.shape)}{_moved(outputs, labels)}."
    if not names:
        return "Give others, or score these with --metric."
    return f"{'Make the run with' if _FIXED.get() else 'Name'} their --task ({names}), or score them with --metric."


def _moved(outputs: Tensor, labels: Tensor) -> str:
    """Write the call that gives the labels the outputs' shape, after a colon; "" if there is none."""
    for source, target in ((-1, 1), (1, -1)):
        if labels.dim() > 2 and labels.movedim(source, target).shape == outputs.shape:
            return f": labels.movedim({source}, {target})"
    return ": labels.reshape(outputs.shape), if they are flattened" if labels.dim() == 2 else ""


# Outputs


@torch.no_grad()
def outputs_of(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """Run `model` in evaluation mode and return its predictions for every sample, [N, ...]."""
    return joined(outputs_of_each(model, batches))


@torch.no_grad()
def outputs_of_each(model: nn.Module, batches: Iterable[Batch]) -> list[Tensor]:
    """Run `model` in evaluation mode and return its predictions for each batch. Raises InvalidInput naming a sample on which it fails."""
    with evaluating(model):
        return [_predicted(model, batch, index) for index, batch in enumerate(batches)]


def _predicted(model: nn.Module, batch: Batch, index: int) -> Tensor:
    with naming_sample(model, batch, f"batch {index} of the data"):
        return predict(model, batch)


def joined(outputs: Sequence[Tensor]) -> Tensor:
    """Join the predictions of batches, [N, ...]. Raises InvalidInput if there are none, or rows differ in shape."""
    if not outputs:
        raise InvalidInput("The data is empty: there is nothing to run the model on.")
    first = outputs[0].shape[1:]
    for index, other in enumerate(outputs):
        if other.shape[1:] != first:
            raise InvalidInput(
                f"The network's outputs on batch {index} have rows of shape {list(other.shape[1:])}, and on batch 0 of {list(first)}. "
                "Give all samples the same shape, or texts as dictionaries with an attention_mask [T]."
            )
    return torch.cat(list(outputs))


def labels_in(batches: Sequence[Batch]) -> Labels | None:
    """Return the labels of the batches, or None."""
    labels = [batch.labels for batch in batches if batch.labels is not None]
    return join_labels(labels) if labels and len(labels) == len(batches) else None


class Guess(NamedTuple):
    """A network's task and the reason for the guess; the reason is empty if the task is known."""

    task: str
    reason: str = ""


def guess_task(outputs: Tensor, reader: Reader | None = None, labels: Tensor | None = None, classes: int | None = None) -> Guess:
    """Return the reader's task; else the task that fits the labels; else the one that shape and values of the (first) outputs suggest. The
    user's --task overrides it. `classes` is the network's own number of classes (`num_classes`)."""
    if reader is not None and reader.task is not None:
        return Guess(reader.task)
    if isinstance(reader, OutputReader):
        outputs = reader.split(outputs)[0]
    return (None if labels is None else _guess_by_labels(outputs, labels)) or _guess_by_values(outputs, classes)


def _guess_by_labels(outputs: Tensor, labels: Tensor) -> Guess | None:
    """Return the task that fits these labels, or None."""
    shapes = f"labels {list(labels.shape)} of outputs {list(outputs.shape)}"
    if labels.is_complex():
        return None
    whole = not labels.is_floating_point()
    scored = labels[_is_scored(labels)]
    several = len(scored.unique()) == 2 or 0 < len(scored) < labels.numel()  # one value alone may be any number
    ones = _one_for_each(outputs, labels) and several and bool(((scored == 0) | (scored == 1)).all())
    likely = {
        "classification": whole and labels.dim() == 1 and outputs.dim() == 2 and outputs.shape[1] > 1 and not _are_unit_vectors(outputs),
        "token-classification": whole and outputs.dim() == 3 and labels.shape == outputs.shape[:2] and labels.dim() == 2,
        "segmentation": whole and outputs.dim() > 2 and outputs.shape[1] > 1 and labels.dim() > 1,
        "multi-label": ones,
        "regression": not whole,
    }
    reasons = {
        "classification": "one integer per sample: a class",
        "token-classification": "an integer per token",
        "segmentation": "an integer per place",
        "multi-label": "zeros and ones",
        "regression": "a number for each output",
    }
    for name in (name for name, fits in likely.items() if fits):
        with suppress(InvalidInput):
            if name != "classification":  # no other task has such labels: out-of-range class numbers are errors
                TASKS[name].check(outputs, labels)
            return Guess(name, f"{shapes}, {reasons[name]}")
    of_form = {
        "token-classification": likely["token-classification"],
        "segmentation": likely["segmentation"] and _are_places(outputs, _as_masks(labels, outputs)),
        "multi-label": whole and outputs.dim() > 2 and _one_for_each(outputs, labels) and not len(scored),
    }
    return next((Guess(name, f"{shapes}, {reasons[name]}") for name, fits in of_form.items() if fits), None)  # whose values are wrong


def _guess_by_values(outputs: Tensor, classes: int | None = None) -> Guess:
    """Return the task that shape and values suggest: regression, unless something shows that they are class scores."""
    shape = f"outputs {list(outputs.shape)}"
    if outputs.dim() != 2 or outputs.shape[1] < 2:
        return Guess("regression", f"{shape} have no row of class scores per sample")
    if are_probabilities(outputs):
        return Guess("classification", f"{shape} are probabilities with sum one: the network ends in a softmax")
    if are_log_probabilities(outputs):
        return Guess("classification", f"{shape} are logarithms of probabilities with sum one: the network ends in a log-softmax")
    if lie_in_unit_interval(outputs):
        return Guess("regression", f"{shape} lie between 0 and 1 without sum one: numbers, or a sigmoid at the end (multi-label)")
    if outputs.min() >= 0 and outputs.max() > 0:
        return Guess("regression", f"none of the {shape} is negative, unlike class scores")
    if _are_unit_vectors(outputs):
        return Guess("embedding", f"the rows of {shape} have length one")
    if outputs.shape[1] == classes:
        return Guess("classification", f"{shape} have one number per class of the network's num_classes")
    if _are_trained_scores(outputs):
        return Guess("classification", f"{shape} vary as a trained classifier's: they separate classes, while the sums of rows hardly vary")
    return Guess("regression", f"nothing shows that {shape} are class scores: no labels, no final softmax, no similar values")


LEAST_SCORES = 8
"""Fewest samples whose output values can show whether they are class scores: fewer look alike by chance."""


def _are_unit_vectors(outputs: Tensor) -> bool:
    """Return whether every row has length one, as a network that ends in a normalization gives."""
    return outputs.shape[1] > 1 and len(outputs) >= LEAST_SCORES and bool(((outputs.double().square().sum(1) - 1).abs() < 1e-3).all())


def _are_trained_scores(outputs: Tensor) -> bool:
    """Return whether the outputs vary as those of a network trained with cross-entropy.

    Its gradients sum to zero over a row, so that the sums of rows hardly vary more than before the training (below a quarter of what
    independent numbers would), while their softmax says much about a sample's class (at least a fifth of the possible information).
    """
    count, classes = outputs.shape
    if count < LEAST_SCORES:
        return False
    outputs = outputs.double()
    p = outputs.softmax(1)
    information = (p * (p.clamp_min(1e-300) / p.mean(0).clamp_min(1e-300)).log()).sum(1).mean()
    return bool(outputs.sum(1).var() < outputs.var(0).sum() / 4 and information > math.log(min(count, classes)) / 5)


def task_of(
    outputs: Tensor,
    reader: Reader | None,
    task: str | Task | None = None,
    labelled: "LabelledOutputs | None" = None,
    model: nn.Module | None = None,
) -> Task:
    """Return the task of a network with such outputs: the given one, else the one that they suggest, which is reported with its reason;
    `labelled` are outputs with labels, if any, and `model` is the network, which may state its classes."""
    if isinstance(task, Task):
        return task
    labels, classes = labelled.labels if labelled and isinstance(labelled.labels, Tensor) else None, getattr(model, "num_classes", None)
    guess = Guess(task) if task else guess_task(outputs if labelled is None else labelled.outputs, reader, labels, classes)
    if guess.reason:
        if labels is not None:
            _check_unambiguous(guess.task, labelled.outputs if labelled else outputs, labels, reader)
            if guess.task == Classification.name and labelled is not None and isinstance(reader, OutputReader):
                _check_first(reader, labelled.outputs, labels)
        tell("note", note=f"task {guess.task}: {guess.reason}. --task overrides this ({', '.join(TASKS)})")
    one = TASKS[guess.task]
    judged = reader.split(outputs)[0] if isinstance(reader, OutputReader) else outputs
    if guess.task == "classification" and _is_one_row(judged):
        raise InvalidSetting(_not_rows_of_scores(judged))
    return SeveralOutputs(one, reader) if isinstance(reader, OutputReader) and len(reader.outputs) > 1 else one


def _check_unambiguous(task: str, outputs: Tensor, labels: Tensor, reader: Reader | None) -> None:
    """Raise InvalidInput if labels can be read in two ways, which give other scores."""
    outputs = reader.split(outputs)[0] if isinstance(reader, OutputReader) else outputs
    if task == MultiLabel.name:
        _check_foreground(labels)
    if task == TokenClassification.name and outputs.dim() == 3 and outputs.shape[1] == outputs.shape[2]:
        shape = list(outputs.shape)
        raise InvalidInput(
            f"Outputs {shape} with labels {list(labels.shape)} may have the classes last or second. Say which: "
            f"--task={TokenClassification.name} for [N, T, classes], --task={Segmentation.name} for [N, classes, T]."
        )
    if not labels.is_complex() and _one_for_each(outputs, labels):
        _check_negative(labels)


MOST_AT_CHANCE, LEAST_FOUND = 0.3, 0.3
"""Of the first output, the largest share of right classes, and the least that another output has more, for labels to be the other's."""


def _check_first(reader: OutputReader, outputs: Tensor, labels: Tensor) -> None:
    """Raise InvalidInput if class numbers are plainly those of another output than the first."""
    shares = {}
    for output, scores in zip(reader.outputs, reader.split(outputs), strict=True):
        if scores.dim() == 2 and len(scores) == len(labels) >= LEAST_SCORES and scores.shape[1] > int(labels.max()):
            shares[output.name] = float((scores.argmax(1) == labels).double().mean())
    first, other = reader.outputs[0].name, max(shares, key=lambda name: shares[name], default="")
    if first in shares and shares[first] <= MOST_AT_CHANCE and shares[other] >= shares[first] + LEAST_FOUND:
        raise InvalidInput(
            f"Labels belong to the first output, {first}, which is right on {100 * shares[first]:.0f} % of them; output {other} on "
            f"{100 * shares[other]:.0f} %. Say which they belong to: --outputs={other} or --outputs={first}."
        )


def _check_negative(labels: Tensor) -> None:
    """Raise InvalidInput if labels are 0, 1 and one negative number, which may mark labels that are not known."""
    values = labels[_is_scored(labels)].unique().tolist()
    if len(values) == 3 and values[1:] == [0, 1]:
        raise InvalidInput(
            f"The labels are 0, 1 and {values[0]:g}. Say what {values[0]:g} means: write {IGNORED} if it marks labels that are not known, "
            f"or name the --task={Regression.name} if it is a number."
        )


def _check_foreground(labels: Tensor) -> None:
    """Raise InvalidInput if masks hold only 0 and VOID, which may as well be the foreground's grey value."""
    if (labels == VOID).any() and (labels == 0).any() and not (labels == 1).any():
        raise InvalidInput(
            f"The labels are only 0 and {VOID}, and {VOID} is not scored. Write 1 for the foreground, or, without any, name the "
            f"--task={MultiLabel.name}."
        )


def named_task(task: str | Task) -> Task:
    """Return the task with this name; a task unchanged."""
    return task if isinstance(task, Task) else TASKS[task]


def distance(outputs: Tensor, reference: Tensor, task: str | Task) -> float:
    """Return the mean distance of `outputs` from those of the float model."""
    return float(sample_distances(outputs, reference, task).mean())


def sample_distances(outputs: Tensor, reference: Tensor, task: str | Task) -> Tensor:
    """Return the distance of each sample, [N]."""
    return named_task(task).distance.of_samples(outputs, reference)


def compare_exported(
    simulated: Tensor, exported: Tensor, batches: Sequence[Batch], name: str, metric: Metric | None = None
) -> dict[str, Any]:
    """Compare the outputs of an exported network with the simulation's: their difference, and the scores of both on labels, for the task of
    this name.

    simulation  the largest difference, the largest output, and for classes the top-1 agreement in percent, of the (first) output; with
                several outputs, `outputs` has the first two for each by name
    """
    task = task_of(simulated, batches[0].reader, name)
    report: dict[str, Any] = {"simulation": _apart(task.judged(simulated), task.judged(exported))}
    if isinstance(task, SeveralOutputs):
        pairs = zip(task.reader.outputs, task.tensors(simulated), task.tensors(exported), strict=True)
        report["simulation"]["outputs"] = {output.name: _apart(one, other) for output, one, other in pairs}
    labels = labels_in(batches)
    if labels is not None and (metric is not None or labels_fit(simulated, labels, task)):
        both = {"simulated": simulated, "exported": exported}
        report["accuracy"] = {kind: score(outputs, labels, task, metric, batches[0].reader) for kind, outputs in both.items()}
    return report


def _apart(simulated: Tensor, exported: Tensor) -> dict[str, float]:
    apart = {"largest_difference": float((simulated - exported).abs().max()), "largest_output": float(simulated.abs().max())}
    if simulated.dim() == 2 and simulated.shape[1] > 1:
        apart["agreement"] = agreement(exported, simulated)
    return apart


def correct(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return which samples have their label ranked first, bool [N]."""
    return outputs.argmax(-1) == labels


def places(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the label's rank among the classes, [N], 0 the first; ties go to the lower class number."""
    own = outputs.gather(1, labels[:, None])
    before = torch.arange(outputs.shape[1], device=outputs.device) < labels[:, None]
    return (outputs > own).sum(1) + ((outputs == own) & before).sum(1)


def check_labels(outputs: Tensor, labels: Labels, task: str | Task) -> None:
    """Raise InvalidInput if `labels` cannot be labels of such `outputs`."""
    if isinstance(labels, Targets):
        raise InvalidInput(f"The labels are {_described(labels)}, which only a --metric can score. Give one.")
    if labels.is_complex():
        raise InvalidInput(f"The labels are complex numbers ({labels.dtype}), which no task has. Give real ones, or score with --metric.")
    named_task(task).check(outputs, labels)


def fits(outputs: Tensor, labels: Labels, task: str | Task) -> bool:
    """Return whether the labels fit the task."""
    with suppress(InvalidInput):
        check_labels(outputs, labels, task)
        return True
    return False


def labels_fit(outputs: Tensor, labels: Labels, task: Task, needed: bool = False) -> bool:
    """Return whether the labels fit the task. If not, raise InvalidInput if they are `needed`, or if they are class numbers that the
    network lacks, which is always a mistake; otherwise leave a note, unless they are for a metric alone."""
    if isinstance(labels, Targets):
        return False
    try:
        check_labels(outputs, labels, task)
    except InvalidInput as error:
        if needed or (task.of_one_class and labels.dim() == 1 and labels.dtype == torch.int64):
            raise
        tell("note", note=f"the labels of the data are not used in this run: {str(error).rstrip('.')}")
        return False
    return True


def check_metric(metric: Metric | None, task: str | Task) -> None:
    """Raise InvalidSetting if the task's labels cannot be passed to a function of outputs and labels."""
    if metric is not None and not named_task(task).numbers:
        what = named_task(task).name.replace("-", " ")
        raise InvalidSetting(f"A metric compares outputs with labels, but those of {what} are texts. Leave --metric out.")


def metric_name(metric: Metric) -> str:
    """Return the name of a user's metric in reports."""
    return getattr(metric, "__name__", "metric")


def measure(metric: Metric, outputs: Tensor | tuple[Tensor, ...], labels: Labels) -> float:
    """Call a custom metric on copies, into which it may write. Raises InvalidInput naming it if it fails or does not return a finite
    number."""
    name = metric_name(metric)
    try:
        value = metric(map_tensors(outputs, Tensor.clone), _copied(labels))
    except AnybitError:
        raise
    except (Exception, SystemExit) as error:
        raise InvalidInput(
            f"The metric {name} failed on outputs {_described(outputs)} and labels {_described(labels)}: {type(error).__name__}: "
            f"{' '.join(str(error).split())}. Fix the metric, or check the labels."
        ) from error
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        returned = _described(value) if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise InvalidInput(
            f"The metric {name} returned {returned}, which is not one number. Let it return one, the higher the better."
        ) from error
    if not math.isfinite(number):
        raise InvalidInput(
            f"The metric {name} is {number} on outputs {_described(outputs)} and labels {_described(labels)}. Fix the metric, or check "
            "the data."
        )
    return number


def _copied(labels: Labels) -> Any:
    """Return a copy, a plain list of labels that are not numbers."""
    return labels.clone() if isinstance(labels, Tensor) else copy.deepcopy(list(labels))


def _described(tensor: Tensor | tuple[Tensor, ...] | Targets) -> str:
    if isinstance(tensor, tuple):
        return ", ".join(map(_described, tensor))
    if isinstance(tensor, Targets):
        first = tensor[0] if tensor else None
        held = f"dict of {', '.join(map(str, first))}" if isinstance(first, Mapping) else type(first).__name__
        return f"a list of {len(tensor)} (the first is a {held})"
    return f"{list(tensor.shape)} ({str(tensor.dtype).removeprefix('torch.')})"


def score(
    outputs: Tensor, labels: Labels, task: str | Task, metric: Metric | None = None, reader: Reader | None = None
) -> dict[str, float]:
    """Return name -> score of outputs against labels: the task's scores, the reader's own, and the user's metric."""
    task = named_task(task)
    judged = len(task.judged(outputs))
    if len(labels) != judged:
        raise InvalidInput(f"{len(labels)} labels for {judged} outputs. Give one label per sample.")
    check_metric(metric, task)
    own = {} if metric is None else {metric_name(metric): measure(metric, task.tensors(outputs), labels)}
    if own and not fits(outputs, labels, task):  # the metric interprets them
        return own
    check_labels(outputs, labels, task)
    assert isinstance(labels, Tensor), "others are refused"
    return task.scores(outputs, labels) | ({} if reader is None else reader.score(outputs, labels)) | own


@dataclass(frozen=True)
class LabelledOutputs:
    """A network's outputs on labelled batches, with the labels and the batches' `reader`."""

    outputs: Tensor
    labels: Labels
    reader: Reader | None = None

    @classmethod
    def of(cls, model: nn.Module, batches: Iterable[Batch]) -> "LabelledOutputs":
        """Run `model` on the batches. Raises InvalidInput if one has no labels."""
        labels: list[Labels] = []
        readers: list[Reader | None] = []

        def watched() -> Iterable[Batch]:
            for index, batch in enumerate(batches):
                check_numbers(index, batch)
                if batch.labels is None:
                    raise InvalidInput("Evaluation needs labels, and this data has none. Give a labelled set to --data or --test.")
                labels.append(batch.labels)
                readers.append(batch.reader)
                yield batch

        outputs = outputs_of(model, watched())
        return cls(outputs, join_labels(labels), readers[0])

    def scores(self, task: str | Task | None = None, metric: Metric | None = None, reference: Tensor | None = None) -> dict[str, Any]:
        """Return name -> score; with the float model's outputs as `reference`, also the distance to them and related numbers."""
        task = task_of(self.outputs, self.reader, task, self)
        unit = self.reader.unit if self.reader else "samples"
        result: dict[str, Any] = {unit: len(task.judged(self.outputs)), **score(self.outputs, self.labels, task, metric, self.reader)}
        if reference is not None:
            measured = task.distance
            result |= {measured.key: distance(self.outputs, reference, task)} | measured.further(self.outputs, reference)
        for name, value in result.items():
            if isinstance(value, float) and not math.isfinite(value):
                wrong = (~torch.isfinite(self.outputs.reshape(len(self.outputs), -1)).all(1)).nonzero().flatten().tolist()
                what = "outputs"
                if not wrong and isinstance(self.labels, Tensor):
                    what = "labels"
                    wrong = (~torch.isfinite(self.labels.reshape(len(self.labels), -1)).all(1)).nonzero().flatten().tolist()
                which = f": the {what} are NaN or infinite on {len(wrong)} {unit}, the first is {wrong[0]}" if wrong else ""
                raise InvalidInput(f"The score {name} is {value}{which}. Check the network and the data.")
        return result


def labelled_outputs(model: nn.Module, batch: Batch) -> LabelledOutputs | None:
    """Return the outputs of `model` on a batch with its labels; None if it has none."""
    return None if batch.labels is None else LabelledOutputs.of(model, [batch])


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    task: str | Task | None = None,
    metric: Metric | None = None,
    reference: Tensor | None = None,
) -> dict[str, Any]:
    """Score `model` on labelled batches, as `LabelledOutputs.scores` does."""
    return LabelledOutputs.of(model, batches).scores(task, metric, reference)


def check_metric_on(model: nn.Module, batches: Iterable[Batch], metric: Metric | None) -> None:
    """Call a custom metric once, before long work. Raises InvalidInput if it fails or the batches have no labels."""
    if metric is not None:
        on_labels = LabelledOutputs.of(model, batches)
        reader, outputs = on_labels.reader, on_labels.outputs
        several = reader.split(outputs) if isinstance(reader, OutputReader) else (outputs,)
        measure(metric, several if len(several) > 1 else outputs, on_labels.labels)


def task_loss(outputs: Tensor, batch: Batch, task: str | Task, teacher: nn.Module | None, distill: float) -> Tensor:
    """Return the task's training loss on labels, mixed with the distance to the teacher's outputs by the share `distill`."""
    task = named_task(task)
    loss = torch.zeros((), device=outputs.device)
    if distill < 1:
        task.check_trains_on_labels()
        if batch.labels is None:
            raise InvalidInput("Training needs labels, and this data has none. Give labelled data, or --distill=1.")
        check_labels(outputs, batch.labels, task)
        assert isinstance(batch.labels, Tensor), "others are refused"
        loss = (1 - distill) * task.loss(outputs, batch.labels)
    if distill > 0:
        assert teacher is not None, "distillation needs a teacher"
        with torch.no_grad():
            target = predict(teacher, batch).float()
        loss = loss + distill * task.distance.distilled(outputs, target)
    return loss
