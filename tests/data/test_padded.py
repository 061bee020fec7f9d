"""Texts padded to batches of several lengths, for a network without a known head: one row per token, and padding is not scored."""

import pytest
import torch
from networks import Items
from torch import nn
from torch.utils.data import DataLoader

import anybit
from anybit.data.batches import Batch, predict
from anybit.data.readers import token_reader

QUICK = {"activation_bits": (8,), "pipeline": "light", "cache": False, "samples": 12, "batch_size": 4}


class Tagger(nn.Module):
    """Gives the class scores of each token."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.fc = nn.Embedding(20, 8), nn.Linear(8, 5)

    def forward(self, ids, attention_mask=None):
        return self.fc(self.embedding(ids))


class Whole(Tagger):
    """The same network, called with a dictionary."""

    def forward(self, batch):
        return super().forward(batch["ids"])


class Pooled(Tagger):
    """A network of fixed outputs [N, 5]."""

    def forward(self, ids, attention_mask=None):
        return super().forward(ids).mean(1)


class Unmasked(Tagger):
    def forward(self, ids):
        return super().forward(ids).mean(1)


def texts(count=24):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, 20, (1 + index % 7,), generator=generator) for index in range(count)]
    return [{"ids": one, "attention_mask": torch.ones_like(one), "labels": Tagger()(one).argmax(-1)} for one in ids]


FORMS = {
    "data set": Items,
    "list": list,
    "labelled": lambda items: anybit.Samples(items, labelled=True),
    "unlabelled": lambda items: anybit.Samples(items, labelled=False),
    "loader": lambda items: DataLoader(items, batch_size=5),
    "pairs": lambda items: [(dict(list(item.items())[:2]), item["labels"]) for item in items],
    "labelled pairs": lambda items: anybit.Samples(FORMS["pairs"](items), labelled=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_labels_of_tokens_are_scored_without_padding_in_every_form(form):
    items = texts()
    scores = anybit.evaluate(Tagger(), FORMS[form](items), batch_size=5)
    assert scores["top1"] == 100 and scores["tokens"] == sum(len(item["ids"]) for item in items)


def test_calibration_runs_on_batches_of_several_lengths():
    result = anybit.calibrate(Tagger(), texts(), "4bit", test=texts(), **QUICK)
    assert result.report["float_test"]["top1"] == 100


def test_a_dictionary_that_the_forward_receives_whole_is_unpadded_too():
    assert anybit.evaluate(Whole(), Items(texts()), batch_size=5)["top1"] == 100


def test_samples_said_to_be_labelled_need_a_label_by_name():
    items = [{"ids": item["ids"], "attention_mask": item["attention_mask"]} for item in texts()]
    with pytest.raises(anybit.InvalidInput, match="none of which is a label"):
        anybit.evaluate(Tagger(), anybit.Samples(items, labelled=True))


def test_a_number_of_classes_that_equals_a_length_is_no_token():
    ids = torch.ones(2, 5, dtype=torch.int64)
    batch = Batch({"ids": ids, "attention_mask": ids})
    assert token_reader(Pooled(), batch) is None
    reader = token_reader(Tagger(), batch)
    assert predict(Tagger(), Batch(batch.inputs, reader=reader)).shape == (10, 5)


def test_batches_whose_outputs_differ_in_shape_are_refused_by_name():
    def growing(ids, attention_mask=None):
        return torch.zeros(len(ids), 3 + ids.shape[1] % 2)

    network = Pooled()
    network.forward = growing
    with pytest.raises(anybit.InvalidInput, match="rows of shape"):
        anybit.data.tasks.outputs_of(network, [Batch({"ids": torch.ones(2, length, dtype=torch.int64)}) for length in (2, 3)])


def late():
    items = torch.arange(40).remainder(19)[:, None].repeat(1, 3)
    items[33] = 99
    return items


def test_a_later_sample_that_the_network_refuses_is_named():
    labelled = (late(), torch.zeros(40, dtype=torch.int64))
    with pytest.raises(anybit.InvalidInput, match=r"sample 33 of the data \(int64 \[1, 3\] from 99 to 99\): IndexError"):
        anybit.evaluate(Unmasked(), labelled, batch_size=10)
    with pytest.raises(anybit.InvalidInput, match=r"sample \d+ of .*from 99 to 99.*IndexError"):
        anybit.calibrate(Unmasked(), late(), "4bit", **QUICK | {"samples": 40})


def test_a_later_training_sample_that_the_network_refuses_is_named():
    labelled = (late(), torch.zeros(40, dtype=torch.int64))
    with pytest.raises(anybit.InvalidInput, match=r"sample \d+ of .*from 99 to 99.*IndexError"):
        anybit.grow(Unmasked(), labelled, "4bit", epochs=1, batch_size=10)
