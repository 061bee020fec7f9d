"""Tasks: how far a network's outputs are from the float network's, what it is trained on, and what labels say of it; one class a task.

A task is called by its name in files, settings and on the command line; `TASKS` has it by that name.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybit.data.batches import Batch, Reader, evaluating, predict
from anybit.data.outputs import OutputReader
from anybit.errors import AnybitError, InvalidInput, InvalidSetting

Metric = Callable[[Tensor, Tensor], float]
IGNORED = -100
"""The label of a token that is not scored, as PyTorch's cross-entropy has it."""
NUMBERS = 2**24
"""Outputs whose distance or loss is computed at once, in double precision: a vocabulary makes many."""


# Distances to the float network's outputs


class Distance(Protocol):
    """How far outputs [N, ...] are from those of the float network. `key` is its name in a report."""

    key: str

    def of_samples(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """Measure each sample in double precision, [N]."""

    def loss(self, outputs: Tensor, reference: Tensor, whole: Tensor | None = None) -> Tensor:
        """Measure all at once, differentiable and in the outputs' own precision. Of a chunk of the samples, whose `whole` reference is
        given: its part in the loss of all, so that the losses of chunks sum up to it."""

    def distilled(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """Return the training loss towards a teacher's outputs."""

    def further(self, outputs: Tensor, reference: Tensor) -> dict[str, float]:
        """Measure what else a report tells beside the distance."""


class Divergence:
    """KL divergence of a sample's classes, whose logits the outputs are; the mean of several where a sample has several."""

    key = "kl"

    def of_samples(self, outputs: Tensor, reference: Tensor) -> Tensor:
        return torch.cat([self._of_some(some.double(), float_ones.double()) for some, float_ones in _in_parts(outputs, reference)])

    def _of_some(self, outputs: Tensor, reference: Tensor) -> Tensor:
        log_p, log_q = F.log_softmax(reference, -1), F.log_softmax(outputs, -1)
        terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0)  # a class that both rule out adds nothing
        return terms.sum(-1).clamp_min(0).reshape(len(outputs), -1).mean(1)  # rounding alone can make it -1e-17

    def loss(self, outputs: Tensor, reference: Tensor, whole: Tensor | None = None) -> Tensor:
        share = 1.0 if whole is None else len(reference) / len(whole)
        terms = F.kl_div(F.log_softmax(outputs, -1), F.log_softmax(reference, -1), reduction="none", log_target=True)
        return terms.sum(-1).mean() * share

    def distilled(self, outputs: Tensor, reference: Tensor) -> Tensor:
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


DIVERGENCE, SQUARED_ERROR = Divergence(), SquaredError()


@dataclass(frozen=True)
class WeightedErrors:
    """Squared errors of several outputs, each divided by the mean square of its own reference: their mean by weight.

    An output that is zero in all the reference counts for nothing: there is nothing to divide by.
    """

    reader: OutputReader
    key = "error"

    def of_each(self, outputs: Tensor, reference: Tensor) -> dict[str, Tensor]:
        """Measure each sample's error of each output, [N], by the output's name."""
        parts = zip(self.reader.outputs, self.reader.split(outputs), self.reader.split(reference), strict=True)
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
        terms = [w * error / energy for w, error, energy in zip(weights, errors, energies, strict=True) if w]
        return sum(terms, outputs.new_zeros(())) / max(sum(weights), 1e-30)

    def distilled(self, outputs: Tensor, reference: Tensor) -> Tensor:
        return self.loss(outputs.float(), reference)

    def further(self, outputs: Tensor, reference: Tensor) -> dict[str, float]:
        return {}


# Tasks


class Task:
    """The questions that every task answers; a task overrides what differs for it.

    distance   to the float network's outputs
    counted    the score in percent that a limit on the drop counts in; None where there is none
    numbers    whether labels are numbers, which a metric of the user's own can be given
    of_one_class  whether a prediction is of one class, and so right or wrong
    """

    name: str
    distance: Distance
    counted: str | None = None
    numbers = True
    of_one_class = False

    def tensors(self, outputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return what a user's metric is given of the outputs."""
        return outputs

    def judged(self, outputs: Tensor) -> Tensor:
        """Return the part of the outputs that labels are about."""
        return outputs

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        """Raise InvalidInput where `labels` are not what a network with such `outputs` can be right about."""

    def scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Score outputs by labels; {} where only the reader of the outputs can."""
        return {}

    def check_trains_on_labels(self) -> None:
        """Raise InvalidSetting where labels make no training loss."""
        raise InvalidSetting(f"A network for {self.name} is trained on the float network's outputs alone here: give --distill 1.")

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the training loss on labels; raise InvalidSetting where they make none."""
        raise InvalidSetting(f"Labels make no training loss of a network for {self.name}: give --distill 1.")

    def classes(self, outputs: Tensor) -> int | None:
        """Return the number of classes that a whole sample is of one of; None where it is of none."""
        return None


class Classification(Task):
    """Logits [N, classes] of which class a sample is: top1, top5 and loss (cross-entropy)."""

    name, distance, counted, of_one_class = "classification", DIVERGENCE, "top1", True

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        if labels.dim() != 1 or labels.is_floating_point():
            raise InvalidInput(f"Class labels are integers, one a sample; these labels are {labels.dtype} of shape {tuple(labels.shape)}.")
        if labels.min() < 0 or labels.max() >= outputs.shape[-1]:
            raise InvalidInput(
                f"Labels run from {int(labels.min())} to {int(labels.max())}, but the model has {outputs.shape[-1]} classes. "
                "Check that the data set's class numbers are the model's."
            )

    def scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        result = {"top1": 100 * float(correct(outputs, labels).double().mean())}
        if outputs.shape[-1] > 5:
            result["top5"] = 100 * float((places(outputs, labels) < 5).double().mean())
        losses = [F.cross_entropy(some.double(), theirs, reduction="sum") for some, theirs in _in_parts(outputs, labels)]
        return result | {"loss": float(sum(losses) / len(labels))}

    def check_trains_on_labels(self) -> None:
        pass

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs.float(), labels)

    def classes(self, outputs: Tensor) -> int | None:
        return outputs.shape[-1]


class TokenClassification(Classification):
    """Logits [tokens, classes] of which class each token is: the scores of a classification, of the tokens whose label is not IGNORED."""

    name = "token-classification"

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        scored = labels != IGNORED
        if not scored.any():
            raise InvalidInput("No token has a label, so there is nothing to score. Give labels of some tokens.")
        super().check(outputs, labels[scored] if labels.dim() == 1 else labels)

    def scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        scored = labels != IGNORED
        return super().scores(outputs[scored], labels[scored])

    def classes(self, outputs: Tensor) -> int | None:
        return None


class LanguageModel(TokenClassification):
    """Logits [tokens, vocabulary] of the next token: the scores of a classification, and perplexity."""

    name = "language-model"

    def scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        result = super().scores(outputs, labels)
        return result | {"perplexity": math.exp(min(result["loss"], 700.0))}


class MaskedLanguageModel(LanguageModel):
    """Logits [tokens, vocabulary] of the token at each place: scored where the input hides it."""

    name = "masked-language-model"


class SequenceToSequence(LanguageModel):
    """Logits [tokens, vocabulary] of the next token of an answer, of an encoder-decoder that is given the answer so far."""

    name = "sequence-to-sequence"


class Regression(Task):
    """Values [N, ...]: loss (mean squared error)."""

    name, distance = "regression", SQUARED_ERROR

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        if outputs.numel() != labels.numel():
            raise InvalidInput(f"Targets of shape {tuple(labels.shape)} do not fit outputs of shape {tuple(outputs.shape)}.")

    def scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        return {"loss": float((outputs.double().flatten() - labels.double().flatten()).square().mean())}

    def check_trains_on_labels(self) -> None:
        pass

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(outputs.float().flatten(), labels.float().flatten())


class Embedding(Task):
    """Vectors [N, features], each two of a pair: spearman and pearson, correlation of the pairs' labels with their cosines, in percent."""

    name, distance, counted = "embedding", SQUARED_ERROR, "spearman"

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        if len(outputs) % 2 or len(labels) < 4 or len(labels[0::2].unique()) < 2:
            raise InvalidInput("Embeddings are scored by pairs of sentences of different scores. Give at least two (--columns pair=NAME).")
        if not torch.equal(labels[0::2], labels[1::2]):
            raise InvalidInput("Embeddings are scored by pairs of sentences, one after the other with one score. Give both the same label.")

    def scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        from scipy.stats import pearsonr, spearmanr  # a third of the time that every command takes to start

        cosines = F.cosine_similarity(outputs[0::2].double(), outputs[1::2].double()).cpu().numpy()
        expected = labels[0::2].cpu().numpy()
        return {name: 100 * float(of(cosines, expected).statistic) for name, of in (("spearman", spearmanr), ("pearson", pearsonr))}


class QuestionAnswering(Task):
    """Logits [N, 2, length] of an answer's first and last token; the reader, which has the texts, scores them by exact and f1."""

    name, distance, counted, numbers = "question-answering", DIVERGENCE, "f1", False


_ALL: tuple[Task, ...] = (
    Classification(), Regression(), Embedding(), QuestionAnswering(), LanguageModel(), MaskedLanguageModel(), SequenceToSequence(),
    TokenClassification(),
)  # fmt: skip
TASKS = {task.name: task for task in _ALL}


class SeveralOutputs(Task):
    """Several outputs, the labels being about the first, which is of another task; all are compared by their squared errors."""

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


# Outputs


@torch.no_grad()
def outputs_of(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """Run `model` in evaluation mode and return what is read in its output on every sample, [N, ...]."""
    with evaluating(model):
        outputs = [predict(model, batch) for batch in batches]
    if not outputs:
        raise InvalidInput("The data is empty: there is nothing to run the model on.")
    return torch.cat(outputs)


def guess_task(outputs: Tensor, reader: Reader | None = None) -> str:
    """Return the reader's task; else "classification" if outputs are [N, classes >= 2], or "regression". The user's --task overrules it."""
    if reader is not None and reader.task is not None:
        return reader.task
    if isinstance(reader, OutputReader):
        outputs = reader.split(outputs)[0]
    return "classification" if outputs.dim() == 2 and outputs.shape[1] >= 2 else "regression"


def task_of(outputs: Tensor, reader: Reader | None, task: str | Task | None = None) -> Task:
    """Return the task of a network with such outputs: the one that is given or named, else the one that they are taken for."""
    if isinstance(task, Task):
        return task
    one = TASKS[task or guess_task(outputs, reader)]
    return SeveralOutputs(one, reader) if isinstance(reader, OutputReader) and len(reader.outputs) > 1 else one


def _named(task: str | Task) -> Task:
    return task if isinstance(task, Task) else TASKS[task]


def distance(outputs: Tensor, reference: Tensor, task: str | Task) -> float:
    """Measure how far `outputs` are from those of the float model: the mean over samples."""
    return float(sample_distances(outputs, reference, task).mean())


def sample_distances(outputs: Tensor, reference: Tensor, task: str | Task) -> Tensor:
    """Measure the distance of each sample, [N]."""
    return _named(task).distance.of_samples(outputs, reference)


def _in_parts(outputs: Tensor, beside: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Split both into runs of samples whose outputs have at most NUMBERS numbers."""
    count = max(1, NUMBERS // max(1, outputs[:1].numel()))
    return zip(outputs.split(count), beside.split(count), strict=True)


def agreement(outputs: Tensor, reference: Tensor) -> float:
    """Return the percentage of samples whose top-1 class is the reference's."""
    return 100 * float((outputs.argmax(-1) == reference.argmax(-1)).double().mean())


def beside(simulated: Tensor, there: Tensor, batches: Sequence[Batch], task: str, metric: Metric | None = None) -> dict[str, Any]:
    """Compare an exported network's outputs with the simulation's: how far apart they are, and the scores of both on labels.

    simulation  the largest difference, the largest output, and where outputs are classes top-1 agreement in percent
    """
    apart = {"largest_difference": float((simulated - there).abs().max()), "largest_output": float(simulated.abs().max())}
    if simulated.dim() == 2 and simulated.shape[1] > 1:
        apart["agreement"] = agreement(there, simulated)
    report: dict[str, Any] = {"simulation": apart}
    if batches[0].labels is not None:
        labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
        both = {"simulated": simulated, "exported": there}
        report["accuracy"] = {kind: score(outputs, labels, task, metric, batches[0].reader) for kind, outputs in both.items()}
    return report


def correct(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return which samples have their label first, bool [N]."""
    return outputs.argmax(-1) == labels


def places(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the label's place among the classes, [N], 0 the first; ties go to the class of the lower number."""
    own = outputs.gather(1, labels[:, None])
    before = torch.arange(outputs.shape[1], device=outputs.device) < labels[:, None]
    return (outputs > own).sum(1) + ((outputs == own) & before).sum(1)


def check_labels(outputs: Tensor, labels: Tensor, task: str | Task) -> None:
    """Raise InvalidInput where `labels` are not what a network with such `outputs` can be right about."""
    _named(task).check(outputs, labels)


def check_metric(metric: Metric | None, task: str | Task) -> None:
    """Raise InvalidSetting where the task's labels are nothing that a function of outputs and labels can use."""
    if metric is not None and not _named(task).numbers:
        what = _named(task).name.replace("-", " ")
        raise InvalidSetting(f"A metric compares outputs with labels, and those of {what} are texts. Leave --metric out.")


def metric_name(metric: Metric) -> str:
    """Return the name of a user's metric in reports."""
    return getattr(metric, "__name__", "metric")


def measure(metric: Metric, outputs: Tensor | tuple[Tensor, ...], labels: Tensor) -> float:
    """Call a user's metric. Raise InvalidInput naming it where it fails, or returns anything but a finite number."""
    name = metric_name(metric)
    try:
        value = metric(outputs, labels)
    except AnybitError:
        raise
    except Exception as error:
        raise InvalidInput(
            f"The metric {name} failed on outputs {_described(outputs)} and labels {_described(labels)}: {type(error).__name__}: "
            f"{' '.join(str(error).split())}. Mend the metric, or look at the labels."
        ) from error
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        returned = _described(value) if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise InvalidInput(
            f"The metric {name} returned {returned}, which is not one number. Let it return one, higher being better."
        ) from error
    if not math.isfinite(number):
        raise InvalidInput(
            f"The metric {name} is {number} on outputs {_described(outputs)} and labels {_described(labels)}. Mend the metric, or look at "
            "the data."
        )
    return number


def _described(tensor: Tensor | tuple[Tensor, ...]) -> str:
    if isinstance(tensor, tuple):
        return ", ".join(map(_described, tensor))
    return f"{list(tensor.shape)} ({str(tensor.dtype).removeprefix('torch.')})"


def score(
    outputs: Tensor, labels: Tensor, task: str | Task, metric: Metric | None = None, reader: Reader | None = None
) -> dict[str, float]:
    """Score outputs by labels: the task's scores, the reader's own, and the user's metric."""
    if len(labels) != len(outputs):
        raise InvalidInput(f"{len(labels)} labels for {len(outputs)} outputs. Give one label a sample.")
    task = _named(task)
    check_metric(metric, task)
    check_labels(outputs, labels, task)
    result = task.scores(outputs, labels)
    if reader is not None:
        result |= reader.score(outputs, labels)
    if metric is not None:
        result[metric_name(metric)] = measure(metric, task.tensors(outputs), labels)
    return result


@dataclass(frozen=True)
class LabelledOutputs:
    """What a network gives on labelled batches, with the labels; `reader` is the batches'."""

    outputs: Tensor
    labels: Tensor
    reader: Reader | None = None

    @classmethod
    def of(cls, model: nn.Module, batches: Iterable[Batch]) -> "LabelledOutputs":
        """Run `model` on the batches. Raise InvalidInput where one has no labels."""
        labels: list[Tensor] = []
        readers: list[Reader | None] = []

        def watched() -> Iterable[Batch]:
            for batch in batches:
                if batch.labels is None:
                    raise InvalidInput("Evaluation needs labels, and this data has none. Give a labelled set to --data or --test.")
                labels.append(batch.labels)
                readers.append(batch.reader)
                yield batch

        outputs = outputs_of(model, watched())
        return cls(outputs, torch.cat(labels), readers[0])

    def scores(self, task: str | Task | None = None, metric: Metric | None = None, reference: Tensor | None = None) -> dict[str, Any]:
        """Score them; with the float model's outputs as `reference`, measure the distance to these and what goes with it too."""
        task = task_of(self.outputs, self.reader, task)
        unit = self.reader.unit if self.reader else "samples"
        result: dict[str, Any] = {unit: len(self.outputs), **score(self.outputs, self.labels, task, metric, self.reader)}
        if reference is not None:
            measured = task.distance
            result |= {measured.key: distance(self.outputs, reference, task)} | measured.further(self.outputs, reference)
        return result


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
    """Ask a user's metric once, before work that it would waste. Raise InvalidInput where it fails or the batches have no labels."""
    if metric is not None:
        on_labels = LabelledOutputs.of(model, batches)
        measure(metric, task_of(on_labels.outputs, on_labels.reader).tensors(on_labels.outputs), on_labels.labels)


def task_loss(outputs: Tensor, batch: Batch, task: str | Task, teacher: nn.Module | None, distill: float) -> Tensor:
    """Return the task's training loss on labels, joined by the distance to the teacher's outputs, which weighs `distill`."""
    task = _named(task)
    loss = torch.zeros((), device=outputs.device)
    if distill < 1:
        task.check_trains_on_labels()
        if batch.labels is None:
            raise InvalidInput("Training needs labels, and this data has none. Give labelled data, or --distill 1.")
        check_labels(outputs, batch.labels, task)
        loss = (1 - distill) * task.loss(outputs, batch.labels)
    if distill > 0:
        assert teacher is not None, "distillation is from a teacher"
        with torch.no_grad():
            target = predict(teacher, batch).float()
        loss = loss + distill * task.distance.distilled(outputs, target)
    return loss
