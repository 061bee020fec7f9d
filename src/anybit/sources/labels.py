"""The form of labels is recognized here: class numbers as integers, floats, columns or one-hot rows."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.utils.data import TensorDataset

from anybit.data.batches import evaluating, predict
from anybit.data.outputs import OutputReader
from anybit.data.reading import whole
from anybit.data.samples import ArrayDataset, NamedArrays, Samples, are_one_hot, fractions, have_form_of_classes
from anybit.networks.copies import copied
from anybit.progress import tell

FIRST_LABELS = 8
"""Samples whose labels show whether they are class numbers."""

MORE_LABELS, IN_MEMORY = 64, 4096
"""Samples whose rows of labels show whether they are one-hot, spread over data that are loaded or in memory; of arrays, all show it."""

OF_CLASSES = (None, "classification", "token-classification", "segmentation")
"""Tasks whose labels are class numbers, which the first labels may show."""


def task_of_labels(named: str | None, recorded: str) -> str | None:
    """Return the task by which the labels of further data are read: the one that a run's user named, or the recorded one if its labels are
    not class numbers; None if the labels show their form themselves."""
    return named or (None if recorded in OF_CLASSES else recorded)


@torch.no_grad()
def with_class_numbers(model: nn.Module, samples: Samples, task: str | None, one_hot: bool = True) -> Samples:
    """Return the samples with labels as whole numbers, if the first are class numbers stored as floats, in a column or one-hot. `one_hot`
    says whether rows of labels may be one-hot."""
    if not samples.labelled:
        return samples
    if task not in OF_CLASSES or (samples.reader and samples.reader.task not in OF_CLASSES):
        return replace(samples, one_hot=None)
    batches = list(samples.subset(range(min(FIRST_LABELS, len(samples)))).batches(2))
    try:
        with evaluating(model):
            outputs = predict(copied(model), batches[0])
    except Exception:  # a model may raise any error on inputs that it rejects; the observing pass reports it
        return samples
    outputs = samples.reader.split(outputs)[0] if isinstance(samples.reader, OutputReader) else outputs
    labels = [batch.labels for batch in batches if isinstance(batch.labels, torch.Tensor)]
    if not labels:
        return samples
    dimension = _one_hot_dimension(labels, outputs, task)
    if dimension is not None and task is None and outputs.dim() == 2:  # the first of several labels per sample may look alike
        dimension = dimension if one_hot and _rows_are_one_hot(samples) else None
    if dimension is not None:
        shape = ", ".join(["N", *map(str, labels[0].shape[1:])])
        tell("note", note=f"labels [{shape}] are zeros and a single one: one-hot, read as class numbers (not with --task=multi-label)")
        return replace(samples, one_hot=dimension)
    if not have_form_of_classes(labels[0], outputs) or (task is None and any(fractions(one).any() for one in labels)):
        return samples
    if labels[0].is_floating_point() and task is None:
        tell("note", note="labels are whole numbers stored as floats, one for each row of outputs: they are read as class numbers")
    return replace(samples, classes=True)


def _one_hot_dimension(labels: Sequence[torch.Tensor], outputs: torch.Tensor, task: str | None) -> int | None:
    """Return the dimension along which all these labels are one-hot, if the outputs have scores of as many classes; else None. Labels may
    have the classes last where the outputs have them second, or second where they have them last."""
    last = outputs.dim() - 1
    by_task = {"segmentation": (1,), "token-classification": (last,)}
    axes = by_task.get(task or "", (2, 1) if outputs.dim() == 3 and task is None else (1,))
    least = 3 if task == "token-classification" else 2
    if outputs.dim() < least or any(one.dim() != outputs.dim() or one.is_complex() for one in labels):
        return None
    own = [(axis, axis) for axis in axes]
    moved = [(axis, last if axis == 1 else 1) for axis in axes if outputs.dim() > 2]
    for axis, dimension in own + moved:
        classes = outputs.shape[axis]
        if classes > 1 and all(one.shape[dimension] == classes and are_one_hot(one, dimension) for one in labels):
            return dimension
    return None


def _rows_are_one_hot(samples: Samples) -> bool:
    """Return whether rows of labels are one-hot all over the data: of arrays all, of other data as many as are quickly read."""
    dataset, indices = whole(samples.dataset)
    if isinstance(dataset, ArrayDataset | NamedArrays):
        return dataset.y is not None and are_one_hot(dataset.y if indices is None else dataset.y[indices], 1)
    most = IN_MEMORY if isinstance(dataset, list | tuple | TensorDataset) else MORE_LABELS
    spread = range(0, len(samples), -(-len(samples) // most))
    labels = (batch.labels for batch in samples.subset(spread).batches(2))
    return all(isinstance(one, torch.Tensor) and one.dim() == 2 and are_one_hot(one, 1) for one in labels)
