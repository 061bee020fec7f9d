"""Batching: no sample lost or duplicated, one seeded split, invalid data reported by name."""

import multiprocessing
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from anybit.data.batches import Batch, call, check_finite, first_tensor, map_tensors, tensors_in
from anybit.data.samples import ArrayDataset, Samples, draw, split
from anybit.errors import InvalidInput

few = settings(max_examples=30, deadline=None)


def numbered(count, workers=0):
    """Samples whose input and label both encode their index."""
    x = np.arange(count, dtype=np.float32)[:, None]
    return Samples(ArrayDataset(x, np.arange(count)), True, workers)


def numbers(batches):
    return torch.cat([batch.inputs[:, 0] for batch in batches]).long().tolist()


# The split


@few
@given(st.integers(2, 40), st.integers(0, 99), st.floats(0, 1), st.integers(1, 50))
def test_split_is_disjoint_complete_and_nonempty_on_both_sides(count, seed, held_out, size):
    calibration = split(numbered(count), seed, held_out, size)
    fitting, held = numbers(calibration.fitting), numbers(calibration.held_out)
    assert sorted(fitting + held) == list(range(count))
    assert fitting and held
    assert calibration.count() == (len(fitting), len(held))
    assert abs(len(held) - held_out * count) <= 1


@few
@given(st.integers(0, 99), st.integers(1, 30), st.integers(1, 30))
def test_split_depends_only_on_the_seed(seed, size, other_size):
    one, two = (split(numbered(25), seed, 0.2, batch_size) for batch_size in (size, other_size))
    assert numbers(one.fitting) == numbers(two.fitting) and numbers(one.held_out) == numbers(two.held_out)


def test_another_seed_gives_another_split():
    assert len({tuple(sorted(numbers(split(numbered(40), seed, 0.25, 8).held_out))) for seed in range(5)}) == 5


def test_split_and_draw_leave_the_global_generator_unchanged():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    split(draw(numbered(10), 5, seed=0), 0, 0.5, 2)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("labelled", [True, False])
def test_two_workers_give_the_same_batches_as_none(labelled):
    x = torch.arange(10.0)[:, None]
    dataset = [(row, int(row)) for row in x] if labelled else list(x)
    alone, helped = (split(Samples(dataset, labelled, workers), 3, 0.3, 4) for workers in (0, 2))
    for one, two in zip(alone.fitting + alone.held_out, helped.fitting + helped.held_out, strict=True):
        assert torch.equal(one.inputs, two.inputs)
        assert torch.equal(one.labels, two.labels) if labelled else one.labels is two.labels is None


def test_two_workers_give_the_same_batches_of_arrays_as_none():
    one, two = (split(numbered(11, workers), 3, 0.3, 4) for workers in (0, 2))
    assert numbers(one.fitting) == numbers(two.fitting) and numbers(one.held_out) == numbers(two.held_out)


@pytest.mark.parametrize("count", [0, 1])
def test_split_requires_two_inputs(count):
    with pytest.raises(InvalidInput, match=rf"^{count} input\(s\) to calibrate on: at least 2 are needed"):
        split(numbered(count), 0, 0.5, 4)


# Drawing


@few
@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 99))
def test_draw_gives_distinct_samples(total, count, seed):
    drawn = numbers(draw(numbered(total), count, seed).batches(8))
    assert len(drawn) == len(set(drawn)) == min(count, total)
    assert set(drawn) <= set(range(total))
    assert numbers(draw(numbered(total), count, seed).batches(8)) == drawn


def test_draw_rejects_an_empty_set():
    with pytest.raises(InvalidInput, match="empty"):
        draw(numbered(0), 5, 0)


# Batches


@few
@given(st.integers(1, 20), st.integers(1, 25))
def test_batches_keep_order_and_labels_and_only_the_last_differs_in_size(count, size):
    batches = list(numbered(count).batches(size))
    assert numbers(batches) == list(range(count))
    sizes = [len(batch) for batch in batches]
    # All full except the last, which absorbs a single left-over sample.
    alone = count % size == 1 and count > size > 1
    assert sizes == [size] * (count // size - alone) + [size + 1 if alone else count % size] * (count % size > 0)
    assert all(torch.equal(batch.inputs[:, 0].long(), batch.labels) for batch in batches)


def test_subset_keeps_the_requested_order():
    assert numbers(numbered(10).subset([7, 2, 5]).subset([2, 0]).batches(4)) == [5, 7]


ITEMS = {
    "a tensor": (lambda x: x, lambda inputs: inputs),
    "two tensors": (lambda x: (x, -x), lambda inputs: inputs[0] + 0 * inputs[1]),
    "a dict": (lambda x: {"ids": x, "mask": x * 0}, lambda inputs: inputs["ids"]),
}


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("kind", ITEMS)
def test_batch_is_accepted_by_forward(kind, labelled):
    make, read = ITEMS[kind]
    dataset = [(make(torch.full((3,), float(i))), i) if labelled else make(torch.full((3,), float(i))) for i in range(4)]
    (batch,) = Samples(dataset, labelled).batches(4)
    assert type(batch.inputs) is {"a tensor": torch.Tensor, "two tensors": tuple, "a dict": dict}[kind]
    assert read(batch.inputs)[:, 0].tolist() == [0, 1, 2, 3]
    assert len(batch) == 4
    assert (batch.labels.tolist() == [0, 1, 2, 3]) if labelled else batch.labels is None


def test_call_unpacks_tuples_and_dicts_into_arguments():
    class Difference(nn.Module):
        def forward(self, left, right=0):
            return left - right

    one, two = torch.ones(2), 2 * torch.ones(2)
    assert torch.equal(call(Difference(), one), one)
    assert torch.equal(call(Difference(), (two, one)), one)
    assert torch.equal(call(Difference(), {"right": one, "left": two}), one)


nested = st.recursive(
    st.integers(0, 9).map(lambda n: torch.tensor(float(n))) | st.none() | st.text(max_size=2),
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


@few
@given(nested)
def test_map_applies_to_every_tensor_and_keeps_the_structure(value):
    mapped = map_tensors(value, lambda tensor: tensor + 1)
    assert [float(t) for t in tensors_in(mapped)] == [float(t) + 1 for t in tensors_in(value)]
    assert repr(map_tensors(value, lambda tensor: tensor)) == repr(value)


def test_rejects_value_without_tensors_by_type():
    with pytest.raises(InvalidInput, match="No tensor in a dict"):
        first_tensor({"a": None})


# Arrays


def test_uint8_images_are_scaled_transposed_and_normalized():
    x = np.zeros((1, 2, 4, 3), dtype=np.uint8)  # [N, H, W, C]
    x[0, 1, 2] = [255, 51, 0]
    image = ArrayDataset(x)[0]
    assert image.shape == (3, 2, 4)
    torch.testing.assert_close(image[:, 1, 2], torch.tensor([1.0, 0.2, 0.0]))
    normalized = ArrayDataset(x, mean=(0.5, 0.2, 0.0), std=(0.5, 1.0, 2.0))[0]
    torch.testing.assert_close(normalized[:, 1, 2], torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(normalized[:, 0, 0], torch.tensor([-1.0, -0.2, 0.0]))


def test_float_arrays_are_unchanged():
    x = np.linspace(-3, 3, 24, dtype=np.float32).reshape(2, 3, 4)
    assert np.array_equal(torch.stack([ArrayDataset(x)[i] for i in range(2)]).numpy(), x)


def test_regression_targets_stay_floats():
    (batch,) = Samples(ArrayDataset(np.zeros((2, 1), np.float32), np.array([0.25, -1.5], np.float32)), True).batches(2)
    assert batch.labels.tolist() == [0.25, -1.5]


# Finite inputs


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 3, 3)])
def test_non_finite_input_error_names_batch_and_sample(bad, shape):
    spoiled = torch.zeros(shape)
    spoiled[2] = bad
    with pytest.raises(InvalidInput, match="Sample 2 of batch 1 of the data holds NaN or infinity"):
        check_finite([Batch(torch.zeros(shape)), Batch(spoiled)])


def test_non_finite_inputs_are_detected_in_tuples_and_dicts():
    nan = torch.tensor([[0.0], [float("nan")]])
    for inputs in [(torch.zeros(2, 1), nan), {"ids": torch.zeros(2, 1), "mask": nan}]:
        with pytest.raises(InvalidInput, match="Sample 1 of"):
            check_finite([Batch(inputs)])


def test_accepts_finite_and_integer_inputs():
    check_finite([Batch(torch.zeros(2, 3)), Batch({"ids": torch.ones(2, 3, dtype=torch.long)})])


def test_workers_without_a_batch_are_not_started():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, about few cores
        assert [len(batch) for batch in numbered(6, workers=1000).batches(3)] == [3, 3]
        assert len(multiprocessing.active_children()) <= 2
