"""Guessing a network's task, with the reason: from labels that fit, or else from shapes and values."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anybit
from anybit.data.batches import Batch
from anybit.data.tasks import IGNORED, TASKS, VOID, distance, guess_task, sample_distances, score, task_loss
from anybit.errors import InvalidInput
from anybit.progress import listening

QUICK = {"activation_bits": (8,), "pipeline": "light", "cache": False}
DRAW = torch.Generator().manual_seed(0)
LOGITS, MASKS = torch.randn(16, 5, generator=DRAW), torch.randn(16, 5, 4, 6, generator=DRAW)
CLASSES = LOGITS.argmax(1)
SCORES = 6 * F.one_hot(CLASSES, 5) + torch.randn(16, 5, generator=DRAW)
SCORES -= SCORES.mean(1, keepdim=True)  # as cross-entropy trains them: its gradients sum up to zero


@pytest.mark.parametrize(
    "outputs, labels, task",
    [
        (LOGITS, CLASSES, "classification"),
        (LOGITS.sigmoid(), CLASSES, "classification"),
        (LOGITS, LOGITS, "regression"),
        (F.normalize(LOGITS), CLASSES, "embedding"),  # identities of unit vectors are no classes of their coordinates
        (F.normalize(LOGITS), None, "embedding"),
        (LOGITS, (LOGITS > 0).long(), "multi-label"),
        (LOGITS, (LOGITS > 0).float(), "multi-label"),
        (MASKS, MASKS.argmax(1), "segmentation"),
        (MASKS, MASKS.argmax(1, keepdim=True), "segmentation"),
        (MASKS, torch.full((16, 8, 12), VOID).scatter(1, torch.zeros(16, 1, 12, dtype=torch.int64), 3), "segmentation"),
        (MASKS[:, :, 0].mT, MASKS[:, :, 0].argmax(1), "token-classification"),
        (SCORES, None, "classification"),
        (SCORES[:4], None, "regression"),  # so few are alike by chance
        (SCORES / 20, None, "regression"),  # they hardly tell one class from another
        (SCORES + torch.arange(16)[:, None], None, "regression"),  # a row's sum tells something
        (LOGITS, None, "regression"),
        (LOGITS * 80, None, "regression"),  # offsets of boxes in pixels
        (F.layer_norm(MASKS.flatten(1), (120,)), None, "regression"),  # features
        (LOGITS.softmax(1), None, "classification"),
        (LOGITS.log_softmax(1), None, "classification"),
        (LOGITS.sigmoid(), None, "regression"),
        (LOGITS.abs() * 100, None, "regression"),
        (MASKS, None, "regression"),
        (LOGITS[:, :1], None, "regression"),
        (LOGITS, torch.full((16,), 9), "classification"),  # labels that fit no task are ignored
    ],
)
def test_task_follows_from_labels_else_from_values(outputs, labels, task):
    guess = guess_task(outputs, None, labels)
    assert guess.task == task and guess.reason


def notes_of(work):
    notes = []
    with listening(lambda *_: None, lambda _, fields: notes.append(fields["note"]) if "note" in fields else None):
        result = work()
    return result, notes


def test_guess_is_reported_with_reason_and_override():
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).eval(), torch.randn(24, 12)
    result, notes = notes_of(lambda: anybit.calibrate(model, x, "8bit", **QUICK))
    assert result.about["task"] == "regression"
    assert any(note.startswith("task regression: ") and "--task" in note and "classification" in note for note in notes)
    _, notes = notes_of(lambda: anybit.calibrate(model, x, "8bit", task="regression", **QUICK))
    assert not any(note.startswith("task") for note in notes)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_outputs_show_whether_a_classifier_or_a_regression_was_trained(classes):
    torch.manual_seed(0)
    x, w = torch.randn(256, 16), torch.randn(16, classes)
    for task, loss in (("classification", lambda y: F.cross_entropy(y, (x @ w).argmax(1))), ("regression", lambda y: F.mse_loss(y, x @ w))):
        model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, classes))
        adam = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(60):
            adam.zero_grad()
            loss(model(x)).backward()
            adam.step()
        assert guess_task(model(x).detach()).task == task


def test_num_classes_of_the_network_marks_class_scores():
    assert guess_task(LOGITS, classes=5).task == "classification"
    assert guess_task(LOGITS, classes=80).task == "regression"
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).eval()
    model.num_classes = 5
    assert anybit.calibrate(model, torch.randn(24, 12), "8bit", **QUICK).about["task"] == "classification"


# Probabilities


def test_probabilities_are_compared_and_scored_as_their_logits():
    other = LOGITS + torch.randn(LOGITS.shape, generator=DRAW) / 4
    exact = {"rel": 1e-4}
    assert distance(other.softmax(1), LOGITS.softmax(1), "classification") == pytest.approx(
        distance(other, LOGITS, "classification"), **exact
    )
    assert distance(other.sigmoid(), LOGITS.sigmoid(), "multi-label") == pytest.approx(distance(other, LOGITS, "multi-label"), **exact)
    for task, squash, labels in (
        ("classification", torch.softmax, CLASSES),
        ("multi-label", lambda x, _: x.sigmoid(), (LOGITS > 0).long()),
    ):
        assert score(squash(other, 1), labels, task) == pytest.approx(score(other, labels, task), **exact)
        losses = [float(task_loss(one, Batch(one, labels), task, None, 0.0)) for one in (other, squash(other, 1))]
        assert losses[1] == pytest.approx(losses[0], **exact)
        gradient = torch.autograd.grad(TASKS[task].distance.loss(student := squash(other, 1).requires_grad_(), squash(LOGITS, 1)), student)
        assert torch.isfinite(gradient[0]).all()


def test_softmax_network_has_the_loss_of_its_logits():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    x = torch.randn(64, 12)
    with torch.no_grad():
        for layer in (body[0], body[2]):
            layer.weight.mul_(3)
        labels = body(x).argmax(1)
        expected = float(F.cross_entropy(body(x), labels))
    for model in (body, nn.Sequential(*body, nn.Softmax(1))):
        scores = anybit.evaluate(model, (x, labels))
        assert scores["top1"] == 100 and scores["loss"] == pytest.approx(expected, rel=1e-4)
    plain, ended = (
        anybit.calibrate(model, x, "4bit", task="classification", **QUICK) for model in (body, nn.Sequential(*body, nn.Softmax(1)))
    )
    assert plain.scheme == ended.scheme
    assert ended.report["ladder"][0]["loss"] == pytest.approx(plain.report["ladder"][0]["loss"], rel=1e-3)


def test_regression_between_zero_and_one_keeps_its_accuracy():
    """Mistaken for a classifier, the network once got 2 bits everywhere at a loss of 0.02, and was worse than a constant."""
    torch.manual_seed(0)
    x, w = torch.randn(800, 8), torch.randn(8, 4) / 4
    y = torch.sigmoid(x @ w) * 0.5 + 0.25
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        loss = F.mse_loss(model(x), y)
        adam.zero_grad()
        loss.backward()
        adam.step()
    model.eval()
    result = anybit.calibrate(model, x[:256], "loss=0.002", **QUICK)
    with torch.no_grad():
        assert F.mse_loss(result.model(x), y) < y.var() / 5 and result.report["result"]["weight_bits"] > 2


# Tasks


def test_mean_iou():
    labels = torch.tensor([[[0, 0, 1, 1], [2, 2, VOID, IGNORED]]])
    outputs = F.one_hot(torch.tensor([[[0, 1, 1, 1], [2, 0, 0, 0]]]), 4).movedim(-1, 1).float()
    scores = score(outputs, labels, "segmentation")
    assert scores["mean_iou"] == pytest.approx(100 * (1 / 3 + 2 / 3 + 1 / 2) / 3)  # an absent class does not count
    assert scores["pixel_accuracy"] == pytest.approx(100 * 4 / 6)


def test_multi_label_f1():
    outputs, labels = torch.tensor([[1.0, -1.0, 2.0], [-1.0, -1.0, 3.0]]), torch.tensor([[1, 1, 0], [0, 0, 1]])
    scores = score(outputs, labels, "multi-label")
    assert scores["f1"] == pytest.approx(100 * 2 * 2 / (2 * 2 + 1 + 1)) and scores["exact"] == 50


def test_multi_label_divergence():
    p, q = torch.tensor([[0.5, 0.25]], dtype=torch.float64), torch.tensor([[0.75, 0.25]], dtype=torch.float64)
    expected = (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)) / 2
    assert sample_distances(q.logit(), p.logit(), "multi-label").tolist() == pytest.approx([expected])
    assert sample_distances(q, p, "multi-label").tolist() == pytest.approx([expected], rel=1e-6)


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.zeros(16, 4, 6), "integers"),
        (torch.full((16, 4, 6), 7), "5 classes"),
        (torch.full((16, 4, 6), VOID), "nothing to score"),
        (torch.zeros(16, dtype=torch.int64), "integers"),
    ],
)
def test_rejects_masks_of_the_wrong_form(labels, message):
    with pytest.raises(InvalidInput, match=message):
        score(MASKS, labels, "segmentation")


def test_tokens_of_a_custom_network_are_scored_in_order():
    outputs = MASKS[:, :, 0].mT.contiguous()
    labels = outputs.argmax(-1)
    labels[:, 3:] = IGNORED
    assert score(outputs, labels, "language-model")["top1"] == 100
    assert score(outputs, labels, "token-classification") == score(
        outputs[:, :3].flatten(0, 1), labels[:, :3].flatten(), "token-classification"
    )


# Roads


def segmenting():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1)).eval(), torch.randn(32, 3, 8, 8)


def pixels(outputs, labels):
    return 100 * float((outputs.argmax(1) == labels).float().mean())


def of_paths(outputs, labels):
    return float(len(labels))


def test_segmentation_is_calibrated_scored_and_accepts_a_drop_budget():
    model, x = segmenting()
    with torch.no_grad():
        y = model(x).argmax(1)
    data = torch.utils.data.TensorDataset(x, y)
    result = anybit.calibrate(model, data, "drop=5%", test=data, metric=pixels, **QUICK)
    assert result.report["float_test"]["pixels"] == result.report["float_test"]["mean_iou"] == 100
    by_iou = anybit.calibrate(model, data, "drop=5%", **QUICK)
    assert by_iou.about["task"] == "segmentation" and all(0 < row["mean_iou"] <= 100 for row in by_iou.report["schemes"])
    assert anybit.evaluate(model, data)["mean_iou"] == 100


def test_labels_of_no_known_task_are_ignored_where_unneeded():
    model, x = segmenting()
    data = torch.utils.data.TensorDataset(x, torch.randn(32, 4))  # for example boxes
    result, notes = notes_of(lambda: anybit.calibrate(model, data, "4bit", **QUICK))
    assert any("labels of the data are not used" in note for note in notes)
    assert result.scheme == anybit.calibrate(model, x, "4bit", **QUICK).scheme
    assert "metric" in anybit.calibrate(model, data, "drop=5%", metric=of_paths, **QUICK).report["schemes"][0]
    assert anybit.evaluate(model, data, metric=of_paths) == {"samples": 32, "of_paths": 32.0}
    with pytest.raises(InvalidInput, match=r"task=|metric="):
        anybit.calibrate(model, data, "drop=5%", **QUICK)


def test_raw_detector_heads_are_scored_only_by_a_metric():
    model, x = segmenting()
    data = torch.utils.data.TensorDataset(x, torch.randn(32, 4))
    result = anybit.calibrate(model, data, "4bit", task="detection", **QUICK)
    assert result.about["task"] == "detection"
    with pytest.raises(InvalidInput, match="metric="):
        anybit.evaluate(model, data, task="detection")


@pytest.mark.parametrize("task", ["segmentation", "multi-label"])
def test_trains_tasks_guessed_from_labels(task):
    model, x = segmenting()
    if task == "multi-label":
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).eval()
    with torch.no_grad():
        y = model(x).argmax(1) if task == "segmentation" else (model(x) > 0).long()
    result = anybit.grow(model, (x, y), "6bit", test=(x, y), epochs=1, batch_size=16)
    assert result.about["task"] == task and TASKS[task].counted in result.report["test"]


class Features(nn.Module):
    """A classifier that returns its features before its scores."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 32), nn.Linear(32, 3)

    def forward(self, x):
        features = self.body(x).relu()
        return {"features": features, "scores": self.head(features)}


def test_labels_of_another_output_than_the_first_are_a_question_whose_answers_work():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Features().eval(), torch.randn(40, 8)
    labels = model(x)["scores"].argmax(1)
    for ask in (
        lambda **chosen: anybit.evaluate(model, (x, labels), **chosen),
        lambda **chosen: anybit.calibrate(model, (x, labels), "8bit", **QUICK, **chosen).report["float_held_out"],
        lambda **chosen: anybit.calibrate(model, x, "8bit", test=(x, labels), **QUICK, **chosen).report["float_test"],
    ):
        with pytest.raises(InvalidInput, match=r"output scores on 100 %") as question:
            ask()
        assert "outputs={'scores': 1.0} or outputs={'features': 1.0}" in str(question.value)
        assert ask(outputs={"scores": 1.0})["top1"] == 100
        assert ask(outputs={"features": 1.0})["top1"] < 30
