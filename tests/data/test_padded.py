"""Texts padded to batches of several lengths, for a network without a known head: one row per token, and padding is not scored."""

import pytest
import torch
from networks import Items
from torch import nn
from torch.utils.data import DataLoader

import anybit
from anybit.data.batches import Batch, predict
from anybit.data.readers import token_reader
from anybit.data.tasks import distance, outputs_of, task_of
from anybit.sources.inputs import compared, samples_from

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


class TwoHeads(Tagger):
    """Two outputs for each token, and one for each text, in some order."""

    order = "ab"

    def __init__(self):
        super().__init__()
        self.more, self.pool = nn.Linear(8, 3), nn.Linear(8, 6)

    def forward(self, ids, attention_mask):
        x = self.embedding(ids)
        mean = (x * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        outputs = {"a": self.fc(x), "b": self.more(x) * 9, "p": self.pool(mean), "s": self.more(x)[..., 0]}
        return tuple(outputs[name] for name in self.order)


def heads(order):
    network = TwoHeads()
    network.order = order
    return network


def alone(network, items):
    """The outputs on each text without padding, joined."""
    outputs = [network(item["ids"][None], item["attention_mask"][None]) for item in items]
    by_name = dict(zip(network.order, zip(*outputs, strict=True), strict=True))
    return [torch.cat([one if name == "p" else one.squeeze(0) for one in parts]) for name, parts in by_name.items()]


@pytest.mark.parametrize("order", ["ab", "ap", "pa", "abps", "sp"])
@pytest.mark.parametrize("form", ["data set", "loader", "padded by a loader of single texts"])
def test_every_output_is_compared_on_its_real_tokens_and_pooled_ones_by_text(order, form):
    network, items = heads(order), texts()
    unlabelled = [dict(list(item.items())[:2]) for item in items]
    data = {
        "data set": Items(unlabelled), "loader": DataLoader(unlabelled, batch_size=1),
        "padded by a loader of single texts": DataLoader(unlabelled, batch_size=1, collate_fn=padded_by_hand),
    }[form]  # fmt: skip
    samples = compared(network, samples_from(data, 0, model=network), {})
    assert [(one.name, one.tokens) for one in samples.reader.outputs] == [(str(at), name != "p") for at, name in enumerate(order)]
    expected = alone(network, items)
    for size in (1, 5, 24):
        rows = torch.cat([predict(network, batch) for batch in samples.batches(size)])
        parts = samples.reader.split(rows)
        assert all(torch.allclose(part, one, atol=1e-6) for part, one in zip(parts, expected, strict=True))
    noise = [one * (2 + at) for at, one in enumerate(expected)]
    task = task_of(rows, samples.reader, "regression")
    other = outputs_of(Scaled(network), samples.batches(5))
    reference = outputs_of(network, samples.batches(5))
    errors = [((one - target).square().sum() / target.square().sum()).item() for one, target in zip(noise, expected, strict=True)]
    assert distance(other, reference, task) == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    assert float(task.distance.loss(other, reference)) == pytest.approx(sum(errors) / len(errors), rel=1e-4)


class Scaled(nn.Module):
    """A network whose outputs are multiplied by 2, 3, ..."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, ids, attention_mask):
        return tuple(one * (2 + at) for at, one in enumerate(self.network(ids, attention_mask)))


def padded_by_hand(items):
    longest = max(len(item["ids"]) for item in items) + 2
    return {name: torch.stack([nn.functional.pad(item[name], (0, longest - len(item[name]))) for item in items]) for name in items[0]}


class Attending(TwoHeads):
    """Outputs of tokens and texts, and attention [N, T, T], which has no row of a fixed length."""

    def forward(self, ids, attention_mask):
        x = self.embedding(ids)
        return {"a": self.fc(x), "attention": x @ x.transpose(1, 2), "p": self.pool(x.mean(1))}


def test_attention_between_tokens_is_not_compared():
    unlabelled = [dict(list(item.items())[:2]) for item in texts()]
    samples = compared(Attending(), samples_from(unlabelled, 0, model=Attending()), {})
    assert [(one.name, one.tokens) for one in samples.reader.outputs] == [("a", True), ("p", False)]


def test_labels_of_tokens_are_scored_beside_other_outputs():
    network = heads("ap")
    items = [item | {"labels": network.fc(network.embedding(item["ids"])).argmax(-1)} for item in texts()]
    scores = anybit.evaluate(network, Items(items), batch_size=5)
    assert scores["top1"] == 100 and scores["tokens"] == sum(len(item["ids"]) for item in items)
    of_texts = [item | {"labels": torch.ones(6)} for item in items]
    pooled = anybit.evaluate(heads("pa"), Items(of_texts), batch_size=5, metric=lambda outputs, labels: outputs[0].shape == labels.shape)
    assert pooled["samples"] == 24 == len(items) and pooled["<lambda>"] == 1


def test_calibration_of_several_outputs_on_padded_texts_runs_to_a_verified_file(tmp_path):
    network, items = heads("ap"), texts()
    result = anybit.calibrate(network, items, "4bit", test=items, **QUICK)
    assert set(result.report["outputs"]) == {"0", "1"} and result.report["test"]["tokens"] == sum(len(item["ids"]) for item in items)
    chosen = anybit.calibrate(network, items, "4bit", outputs={"1": 1.0}, **QUICK)
    assert chosen.report["result"]
    result.export(tmp_path / "run.onnx", items)
    verdict = result.verify(tmp_path / "run.onnx", items)
    assert verdict["ok"] and set(verdict["simulation"]["outputs"]) == {"0", "1"}, verdict
    trained = anybit.grow(network, items, "4bit", epochs=1, batch_size=4, distill=1.0)
    assert trained.model(**batch_of(items))[1].shape == (2, 6)


def batch_of(items):
    item = items[0]
    return {name: torch.stack([item[name]] * 2) for name in ("ids", "attention_mask")}
