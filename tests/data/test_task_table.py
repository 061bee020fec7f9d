"""Properties of every task: its distance, scores, loss and label checks; Hugging Face heads map to tasks."""

from typing import get_args

import pytest
import torch
from torch import nn

from anybit.data.batches import Batch
from anybit.data.options import TaskName
from anybit.data.tasks import IGNORED, TASKS, TokenClassification, check_metric, distance, sample_distances, score, task_loss
from anybit.errors import InvalidInput, InvalidSetting

ALL = list(TASKS.values())
SHAPES = {
    "embedding": (6, 8),
    "question-answering": (6, 2, 9),
    "regression": (6, 1),
    "segmentation": (6, 3, 4, 5),
    "detection": (6, 9, 4, 4),
}
LABELS = {  # the labels that the outputs of `perfect` predict correctly
    "regression": lambda outputs: outputs.flatten(),
    "embedding": lambda outputs: nn.functional.cosine_similarity(outputs[0::2], outputs[1::2]).repeat_interleave(2),
    "question-answering": lambda outputs: torch.arange(6),
    "segmentation": lambda outputs: outputs.argmax(1),
    "multi-label": lambda outputs: (outputs > 0).long(),
    "detection": lambda outputs: torch.zeros(6),
}
NEVER_SCORED = ("detection",)
"""Tasks whose labels a metric of the user's own alone can use."""


def named(task):
    return task.name


def outputs_for(task, seed=0):
    return torch.randn(SHAPES.get(task.name, (6, 7)), generator=torch.Generator().manual_seed(seed))


def labels_for(task, outputs):
    return LABELS.get(task.name, lambda outputs: outputs.argmax(-1))(outputs)


def test_table_has_every_task_of_the_file_format():
    assert set(TASKS) == set(get_args(TaskName)) and all(TASKS[task.name] is task for task in ALL)


@pytest.mark.parametrize("task", ALL, ids=named)
def test_distance_is_zero_only_for_equal_outputs(task):
    reference = outputs_for(task)
    assert distance(reference, reference.clone(), task.name) == 0
    for sample in range(len(reference)):
        other = reference.clone()
        other[sample].view(-1)[0] += 0.5  # adding a constant to all logits would change nothing
        apart = sample_distances(other, reference, task.name)
        assert apart[sample] > 0 and apart.count_nonzero() == 1


@pytest.mark.parametrize("task", ALL, ids=named)
def test_differentiable_distance_equals_the_measured_one_and_descends(task):
    reference, outputs = outputs_for(task), outputs_for(task, 1).requires_grad_()
    loss = task.distance.loss(outputs, reference)
    assert loss.item() == pytest.approx(distance(outputs.detach(), reference, task.name), rel=1e-4)
    (gradient,) = torch.autograd.grad(loss, outputs)
    assert distance(outputs.detach() - 1e-2 * gradient, reference, task.name) < loss.item()


@pytest.mark.parametrize("task", ALL, ids=named)
@pytest.mark.parametrize("parts", [(3, 3), (1, 5), (2, 2, 2)])
def test_weighted_losses_of_parts_sum_to_the_loss_of_the_whole(task, parts):
    reference, outputs = outputs_for(task), outputs_for(task, 1)
    pieces = zip(outputs.split(parts), reference.split(parts), strict=True)
    weighted = sum(task.distance.loss(one, target, reference) for one, target in pieces)
    assert float(weighted) == pytest.approx(float(task.distance.loss(outputs, reference)), rel=1e-5)


@pytest.mark.parametrize("task", ALL, ids=named)
def test_distillation_loss_is_zero_for_equal_outputs(task):
    outputs = outputs_for(task)
    batch = Batch(outputs)
    loss = task_loss(outputs.clone().requires_grad_(), batch, task.name, nn.Identity(), 1.0)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert task_loss(outputs_for(task, 1), batch, task.name, nn.Identity(), 1.0) > 0.01


@pytest.mark.parametrize("task", [task for task in ALL if task.name not in NEVER_SCORED], ids=named)
def test_perfect_outputs_score_best(task):
    best = dict.fromkeys(("top1", "top5", "spearman", "pearson", "f1", "exact", "mean_iou", "pixel_accuracy"), 100)
    outputs = outputs_for(task)
    labels = labels_for(task, outputs)
    perfect, other = score(outputs, labels, task.name), score(outputs_for(task, 2), labels, task.name)
    for key in perfect:
        if key in best:
            assert perfect[key] == pytest.approx(best[key]) and other[key] < best[key]
        else:
            assert perfect[key] < other[key]  # a loss, and metrics that grow with it
    if task.counted and perfect:  # the reader, which has the texts, scores answers
        assert task.counted in perfect


@pytest.mark.parametrize("task", ALL, ids=named)
def test_label_loss_descends_or_is_rejected_by_name(task):
    outputs = outputs_for(task, 3).requires_grad_()
    labels = labels_for(task, outputs_for(task))
    batch = Batch(outputs.detach(), labels)
    try:
        task.check_trains_on_labels()
    except InvalidSetting as refusal:
        assert task.name in str(refusal) and "--distill=1" in str(refusal)
        with pytest.raises(InvalidSetting, match="--distill=1"):
            task_loss(outputs, batch, task.name, nn.Identity(), 0.5)
        return
    loss = task_loss(outputs, batch, task.name, None, 0.0)
    (gradient,) = torch.autograd.grad(loss, outputs)
    assert task_loss(outputs.detach() - 0.1 * gradient, batch, task.name, None, 0.0) < loss
    with pytest.raises(InvalidInput, match="needs labels"):
        task_loss(outputs, Batch(outputs.detach()), task.name, None, 0.5)


@pytest.mark.parametrize("task", ALL, ids=named)
def test_metric_requires_numeric_outputs(task):
    if task.numbers:
        outputs = outputs_for(task)
        labels = labels_for(task, outputs)

        def right(outputs, labels):
            return float(len(outputs) == len(labels))

        assert score(outputs, labels, task.name, right)["right"] == 1
    else:
        with pytest.raises(InvalidSetting, match="Leave --metric out"):
            check_metric(lambda outputs, labels: 1.0, task.name)


@pytest.mark.parametrize("task", ALL, ids=named)
def test_rejects_labels_for_another_number_of_outputs(task):
    outputs = outputs_for(task)
    with pytest.raises(InvalidInput):
        score(outputs, labels_for(task, outputs)[:-1], task.name)


@pytest.mark.parametrize("task", [task for task in ALL if isinstance(task, TokenClassification)], ids=named)
def test_tokens_without_a_label_are_ignored(task):
    outputs = outputs_for(task)
    labels = labels_for(task, outputs)
    some = torch.where(torch.arange(len(labels)) < 4, labels, IGNORED)
    assert score(outputs, some, task.name) == score(outputs[:4], labels[:4], task.name)
    assert torch.isclose(task.loss(outputs, some), task.loss(outputs[:4], labels[:4]))
    with pytest.raises(InvalidInput, match="No token has a label"):
        score(outputs, torch.full_like(labels, IGNORED), task.name)


@pytest.mark.parametrize("task", [task for task in ALL if task.of_one_class], ids=named)
def test_single_class_task_counts_top1(task):
    assert task.counted == "top1" and task.distance.key == "kl"
    assert task.classes(outputs_for(task)) in (None, 7)


def test_every_task_has_a_hugging_face_head():
    pytest.importorskip("transformers")
    from anybit.sources.huggingface.heads import HEADS

    assert set(HEADS) == set(TASKS) - {"multi-label", "segmentation", "detection"}
    config = type("Config", (), {})
    for name, head in HEADS.items():
        for ending in (*head.endings, *head.others):
            model = type(f"Some{ending}", (nn.Module,), {})()
            model.config = config()
            model.config.num_labels = 1 if head.one_value else 2
            model.config.max_position_embeddings, model.config.is_encoder_decoder = 16, head.decodes
            first = next(task for task, one in HEADS.items() if one.fits(model))
            assert first == name
            if name != "embedding":  # whose pooling is in its files
                assert head.reader(model).task == name
