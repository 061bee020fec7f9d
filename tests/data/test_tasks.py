"""Scores compared with hand-computed cases; properties of the distance to the float model."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

import anybit
from anybit.data.batches import Batch
from anybit.data.tasks import agreement, distance, evaluate, guess_task, outputs_of, sample_distances, score
from anybit.errors import AnybitError, InvalidInput

few = settings(max_examples=60, deadline=None)
logits = arrays(np.float32, (3, 7), elements=st.floats(-50, 50, width=32)).map(torch.from_numpy)
BOTH_TASKS = ["classification", "regression"]


# Distance


@few
@given(logits, logits)
def test_kl_is_nonnegative_and_zero_for_equal_outputs(outputs, reference):
    assert (sample_distances(outputs, reference, "classification") >= 0).all()
    assert distance(reference, reference, "classification") == 0


@few
@given(logits, logits, st.floats(-100, 100), st.floats(-100, 100))
def test_kl_is_invariant_to_a_constant_added_to_logits(outputs, reference, one, other):
    outputs, reference = outputs.double(), reference.double()
    shifted = distance(outputs + one, reference + other, "classification")
    assert shifted == pytest.approx(distance(outputs, reference, "classification"), abs=1e-9)


def test_kl_of_a_hand_computed_case():
    # Reference: half and half; outputs: 3/4 and 1/4. KL = log(1/2) - (log(3/4) + log(1/4)) / 2.
    outputs = torch.tensor([[3.0, 1.0]]).log()
    expected = math.log(0.5) - (math.log(0.75) + math.log(0.25)) / 2
    assert distance(outputs, torch.zeros(1, 2), "classification") == pytest.approx(expected)


def test_class_excluded_by_both_models_adds_nothing():
    outputs = torch.tensor([[1.0, 2.0, -math.inf]])
    assert distance(outputs, outputs, "classification") == 0


@few
@given(logits, logits.filter(lambda x: x.abs().max() > 0.1), st.floats(0.1, 10))
def test_regression_error_is_independent_of_the_unit(outputs, reference, unit):
    outputs, reference = outputs.double(), reference.double()
    value = distance(outputs, reference, "regression")
    assert value >= 0 == distance(reference, reference, "regression")
    assert distance(outputs * unit, reference * unit, "regression") == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 2, 3)])
def test_zero_output_has_regression_error_1(shape):
    reference = torch.linspace(1, 3, math.prod(shape)).view(shape)
    assert distance(torch.zeros(shape), reference, "regression") == pytest.approx(1)
    assert sample_distances(torch.zeros(shape), reference, "regression").shape == (5,)


@few
@given(logits, logits)
def test_the_distance_is_the_mean_over_samples(outputs, reference):
    for task in BOTH_TASKS:
        assert distance(outputs, reference, task) == pytest.approx(float(sample_distances(outputs, reference, task).mean()))


def test_agreement_counts_samples_with_the_same_top_class():
    assert agreement(torch.eye(4), torch.eye(4)[[0, 1, 3, 2]]) == 50


@pytest.mark.parametrize(
    "shape, task",
    [((8, 2), "classification"), ((8, 10), "classification"), ((8, 1), "regression"), ((8,), "regression"), ((8, 3, 4), "regression")],
)
def test_task_follows_from_the_output_shape(shape, task):
    """Class scores need one row per sample; with a single one, the sum over a row shows nothing."""
    outputs = torch.zeros(shape)
    outputs.view(8, -1)[:, 0] = torch.tensor([9.0, -9.0]).repeat(4)
    assert guess_task(outputs - outputs.mean(-1, keepdim=outputs.dim() > 0)).task == task


# Score

RANKED = torch.arange(10.0).flip(0).repeat(4, 1)  # class 0 first, then 1, ... in all of four samples


def test_top1_and_top5_of_a_hand_computed_case():
    result = score(RANKED, torch.tensor([0, 4, 5, 9]), "classification")
    assert (result["top1"], result["top5"]) == (25, 50)


def test_uniform_classifier_has_log_classes_loss():
    result = score(torch.zeros(3, 4), torch.tensor([0, 1, 3]), "classification")
    assert result["loss"] == pytest.approx(math.log(4))
    assert "top5" not in result


@few
@given(logits, st.lists(st.integers(0, 6), min_size=3, max_size=3).map(torch.tensor))
@example(torch.ones(3, 7), torch.tensor([0, 0, 0]))  # ties are resolved to the first class in both
def test_top5_is_at_least_top1_and_both_are_percent(outputs, labels):
    result = score(outputs, labels, "classification")
    assert 0 <= result["top1"] <= result["top5"] <= 100


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_squared_error_of_a_hand_computed_case(shape):
    outputs = torch.tensor([1.0, 2.0, 4.0]).view(shape)
    assert score(outputs, torch.tensor([1.0, 0.0, 0.0]), "regression") == {"loss": pytest.approx(20 / 3)}


def test_custom_metric_is_added_under_its_name():
    def first(outputs, labels):
        return outputs[0, 0]

    assert score(RANKED, torch.zeros(4, dtype=torch.long), "classification", first)["first"] == 9


@pytest.mark.parametrize(
    "labels, task, message",
    [
        ([0, 1, 10, 3], "classification", "run from 0 to 10, but the model has 10 classes"),
        ([0, -1, 2, 3], "classification", "run from -1 to 3"),
        ([0, 1, 2], "classification", "3 labels for 4 outputs"),
        ([0, 1, 2], "regression", "3 labels for 4 outputs"),
        ([[0], [1], [2], [3]], "classification", "label"),
        ([0.5, 1.0, 2.0, 3.0], "classification", "label"),
    ],
)
def test_rejects_labels_of_the_wrong_form(labels, task, message):
    with pytest.raises(InvalidInput, match=message):
        score(RANKED, torch.tensor(labels), task)


def test_rejects_targets_of_another_shape_instead_of_broadcasting():
    with pytest.raises(InvalidInput):
        score(torch.zeros(3, 3), torch.zeros(3), "regression")


# Evaluate


class Frozen(nn.Module):
    """Returns its input; keeps a submodule in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.frozen, self.free = nn.Dropout(0.9), nn.Dropout(0.9)

    def forward(self, x):
        return self.free(self.frozen(x))


def batches(labels=(0, 4, 5, 9), size=3):
    return [Batch(x, y) for x, y in zip(RANKED.split(size), torch.tensor(labels).split(size), strict=True)]


def test_evaluate_scores_all_batches_together():
    result = evaluate(nn.Identity(), batches())
    assert result == {"samples": 4, **score(RANKED, torch.tensor([0, 4, 5, 9]), "classification")}


@few
@given(st.integers(1, 4))
def test_scores_are_independent_of_the_batch_size(size):
    assert evaluate(nn.Identity(), batches(size=size)) == evaluate(nn.Identity(), batches())


def test_model_agrees_with_itself_at_zero_distance():
    result = evaluate(nn.Identity(), batches(), reference=RANKED)
    assert (result["kl"], result["agreement"]) == (0, 100)


def test_unlabelled_data_cannot_be_evaluated():
    with pytest.raises(InvalidInput, match="Evaluation needs labels"):
        evaluate(nn.Identity(), [Batch(RANKED)])


@pytest.mark.parametrize("function", [outputs_of, evaluate])
def test_rejects_empty_data(function):
    with pytest.raises(InvalidInput):
        function(nn.Identity(), [])


def test_evaluates_a_single_sample():
    assert evaluate(nn.Identity(), [Batch(RANKED[:1], torch.tensor([0]))])["top1"] == 100


def test_outputs_are_those_of_evaluation_mode_without_gradients():
    model = nn.Sequential(nn.Linear(10, 10), nn.Dropout(0.9)).train()
    outputs = outputs_of(model, batches())
    assert not outputs.requires_grad
    torch.testing.assert_close(outputs, model[0](RANKED).detach())  # one batch: sums over other sizes may round differently


def test_restores_the_mode_of_every_module():
    model = Frozen().train()
    model.frozen.eval()
    outputs_of(model, batches())
    assert (model.training, model.frozen.training, model.free.training) == (True, False, True)


def test_restores_the_mode_after_an_error():
    model = nn.Linear(3, 3).train()
    with pytest.raises(InvalidInput, match="sample 0 of batch 0"):
        outputs_of(model, batches())
    assert model.training


def test_the_first_tensor_of_several_outputs_is_scored():
    class Two(nn.Module):
        def forward(self, x):
            return {"logits": x, "hidden": x[:, :2]}

    assert torch.equal(outputs_of(Two(), batches()), RANKED)


@pytest.mark.parametrize("shape", [(8, 1, 4), (8, 4, 1, 1)])
def test_class_scores_with_dimensions_of_size_1_are_refused_with_a_remedy(shape):
    network = nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, shape[1:]))
    data = (torch.randn(8, 4), torch.arange(8) % 4)
    for task in (None, "classification"):
        with pytest.raises(AnybitError, match=r"\[N, classes\].*flatten\(1\)"):
            anybit.evaluate(network, data, task=task)
    with pytest.raises(AnybitError, match=r"flatten\(1\)"):
        anybit.calibrate(network, data[0], "4bit", task="classification", cache=False)
