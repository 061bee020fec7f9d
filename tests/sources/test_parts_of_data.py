"""Parts of data: parts that only some items have, labels that are not numbers, nested arrays, and samplers of loaders."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

import anybit
from anybit.errors import InvalidInput
from anybit.progress import listening
from anybit.sources.inputs import as_samples, load_data

N = 20
DRAW = torch.Generator().manual_seed(0)
X, Z = torch.randn(2, N, 3, generator=DRAW)


class Adding(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, a, b=None):
        return self.first(a) if b is None else self.first(a) + self.second(b)


class Both(Adding):
    def forward(self, a, b):
        return super().forward(a, b)


class Dictionary(Adding):
    def forward(self, batch):
        return super().forward(batch["x"], batch["z"])


MODEL, BOTH, TAKING = Adding().eval(), Both().eval(), Dictionary().eval()
Y = MODEL(X).argmax(1)
Y_BOTH = BOTH(X, Z).argmax(1)


def refusal(work):
    with pytest.raises(InvalidInput) as refused:
        work()
    return str(refused.value)


def notes_of(work):
    notes = []
    with listening(events=lambda event, fields: notes.append(str(fields.get("note", "")))):
        work()
    return " ".join(notes)


LATER = {
    "input": ({"a": X[0], "labels": 1}, {"a": X[0], "labels": 1, "b": Z[0]}),
    "label": ({"a": X[0]}, {"a": X[0], "labels": 1}),
    "tensor of a tuple": ((X[0], Z[0], 1), (X[0], Z[0], 1, Z[0])),
    "tuple": (X[0], (X[0], 1)),
    "no tuple": ((X[:2, 0], 1), X[:2, 0]),
    "no dictionary": ({"a": X[0], "labels": 1}, (X[0], 1)),
}


@pytest.mark.parametrize("case", LATER)
def test_parts_that_only_later_items_have_are_refused(case):
    first, later = LATER[case]
    message = refusal(lambda: list(as_samples([first] * 3 + [later], 0, MODEL).batches(4)))
    assert "other parts" in message or "cannot be joined" in message


@pytest.mark.parametrize("texts", [False, True])
def test_samples_whose_dictionaries_differ_are_refused(texts):
    mask = {"attention_mask": torch.ones(3)} if texts else {}
    items = [{"a": X[0]} | mask, {"a": X[0], "b": Z[0]} | mask]
    for some in (items, items[::-1]):
        samples = anybit.Samples(some, labelled=False)
        assert "other parts" in refusal(lambda samples=samples: list(as_samples(samples, 0, MODEL).batches(2)))


def test_unused_parts_of_some_items_are_allowed():
    items = [{"a": x, "labels": int(y)} | {"weight": 0.5, "b": None} for x, y in zip(X, Y, strict=True)]
    items[0] = {"a": X[0], "labels": int(Y[0])}
    assert anybit.evaluate(MODEL, items)["top1"] == 100
    paths = [(x, int(y), *["path"] * (place % 2)) for place, (x, y) in enumerate(zip(X, Y, strict=True))]
    assert anybit.evaluate(MODEL, paths)["top1"] == 100


@pytest.mark.parametrize("label", ["cat", None])
def test_labels_that_are_no_numbers_are_named(label):
    what = "None" if label is None else "text ('cat'), not a number: numpy.unique"
    assert f"Element 1 of its items is {what}" in refusal(lambda: anybit.evaluate(MODEL, [(x, label) for x in X]))
    assert f"Entry label of its items is {what}" in refusal(lambda: anybit.evaluate(MODEL, [{"a": x, "label": label} for x in X]))
    test = [(x, label) for x in X]
    assert what in refusal(lambda: anybit.calibrate(MODEL, X, "6bit", test=test))


def test_a_list_of_texts_as_labels_is_named():
    assert "numpy.unique" in refusal(lambda: anybit.evaluate(MODEL, (X, ["0", "1"] * 10)))
    assert "numpy.unique" in refusal(lambda: anybit.evaluate(BOTH, ((X, Z), ["0", "1"] * 10)))


@pytest.mark.parametrize("labels", [Y_BOTH, Y_BOTH.numpy(), Y_BOTH.tolist(), Y_BOTH[:, None]], ids=["tensor", "array", "list", "column"])
def test_nested_arrays_are_inputs_and_labels(labels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model, inputs in ((BOTH, (X, Z)), (BOTH, [X.numpy(), Z]), (BOTH, {"b": Z, "a": X}), (TAKING, {"x": X, "z": Z})):
            assert anybit.evaluate(model, (inputs, labels))["top1"] == 100
    assert "5 labels" in refusal(lambda: anybit.evaluate(BOTH, ((X, Z), labels[:5])))


def test_nested_images_are_read_as_images():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    images = np.random.default_rng(0).integers(0, 256, (N, 4, 4, 3), dtype=np.uint8)
    assert anybit.evaluate(model, ((images,), Y)) == anybit.evaluate(model, (images, Y))


def test_lists_of_rows_and_labels_are_read():
    assert anybit.evaluate(MODEL, (X.tolist(), Y.tolist()))["top1"] == 100


SUBSETS = {
    "list": {"sampler": list(range(3, 9))},
    "range": {"sampler": range(3, 9)},
    "random": {"sampler": SubsetRandomSampler(range(3, 9))},
    "batches": {"batch_sampler": [[3, 4, 5], [6, 7, 8]]},
    "batches of a list": {"batch_sampler": BatchSampler(range(3, 9), 2, False)},
}


@pytest.mark.parametrize("case", SUBSETS)
def test_the_subset_of_a_sampler_is_used(case):
    loader = DataLoader(TensorDataset(X, Y), **SUBSETS[case])
    samples = as_samples(loader, 0, MODEL)
    assert torch.equal(next(samples.batches(N)).inputs, X[3:9])
    assert "DataLoader" not in notes_of(lambda: as_samples(loader, 0, MODEL))


class Own(torch.utils.data.Sampler):
    def __iter__(self):
        return iter([[0, 1], [1, 2]])


UNUSED = {
    "weighted": ({"sampler": WeightedRandomSampler([1.0] * N, N)}, "WeightedRandomSampler"),
    "with replacement": ({"sampler": RandomSampler(X, replacement=True)}, "RandomSampler"),
    "fewer": ({"sampler": RandomSampler(X, num_samples=5)}, "RandomSampler"),
    "repeated": ({"sampler": [0, 0, 1]}, "list"),
    "own": ({"batch_sampler": Own()}, "Own"),
}


@pytest.mark.parametrize("case", UNUSED)
def test_samplers_that_are_not_used_are_noted(case):
    options, name = UNUSED[case]
    loader = DataLoader(TensorDataset(X, Y), **options)
    assert f"the {name} of the DataLoader is not used" in notes_of(lambda: as_samples(loader, 0, MODEL))
    assert len(as_samples(loader, 0, MODEL)) == N


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"shuffle": True, "drop_last": True, "batch_size": 8}])
def test_ordinary_loaders_provide_all_samples_without_a_note(options):
    loader = DataLoader(TensorDataset(X, Y), **options)
    assert not notes_of(lambda: as_samples(loader, 0, MODEL)) and len(as_samples(loader, 0, MODEL)) == N


def test_an_image_beside_class_folders_is_named(tmp_path):
    for name in ("a/1.png", "b/1.png", "preview.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    assert "preview.png" in refusal(lambda: anybit.evaluate(model, str(tmp_path)))
    notes = notes_of(lambda: load_data(str(tmp_path), model=model))
    assert notes.count("preview.png") == 1 and "without labels" in notes
    (tmp_path / "preview.png").unlink()
    assert not notes_of(lambda: load_data(str(tmp_path), model=model)) and anybit.evaluate(model, str(tmp_path))["samples"] == 2


def test_several_labels_are_a_question(tmp_path):
    items = [{"a": X[i], "label": i % 4, "target": (i + 1) % 4} for i in range(N)]
    with pytest.raises(InvalidInput, match="several labels: label, target"):
        anybit.evaluate(Adding(), items)
    one = [{k: v for k, v in item.items() if k != "target"} for item in items]  # as the message says
    assert anybit.evaluate(Adding(), one)["samples"] == N
    np.savez(tmp_path / "two.npz", x=X, y=np.arange(N) % 4, labels=np.arange(N) % 3)
    with pytest.raises(InvalidInput, match="several arrays of labels: y, labels"):
        anybit.evaluate(Adding(), str(tmp_path / "two.npz"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_other_types_are_read_alike_in_every_container(dtype):
    x, y = X.to(dtype), torch.arange(N) % 4
    expected = anybit.evaluate(Adding(), (x.float(), y))
    for data in (
        (x, y),
        TensorDataset(x, y),
        DataLoader(TensorDataset(x, y), 8),
        [{"a": a, "label": b} for a, b in zip(x, y, strict=True)],
    ):
        assert anybit.evaluate(Adding(), data) == pytest.approx(expected)
