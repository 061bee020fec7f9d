"""Parts of an item are inputs or label: by the forward's signature, or by an explicit choice."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import anybit
from anybit.data.batches import call
from anybit.errors import InvalidInput
from anybit.progress import listening
from anybit.sources.inputs import as_samples


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, a, b):
        return self.fc(torch.cat([a, b], -1))


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x, mask=None):
        y = self.fc(x)
        return y.mean(1) if mask is None else (y * mask[..., None]).sum(1)


class Switched(Masked):
    def forward(self, x, pre_logits: bool = False):
        return super().forward(x)


class Losing(Masked):
    def forward(self, x, targets=None):
        return super().forward(x)


class Taking(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, batch):
        return self.fc(batch["image"])


class Single(Taking):
    def forward(self, x):
        return self.fc(x)


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


N = 6
A, B, X, MASK, P = torch.randn(N, 3), torch.randn(N, 3), torch.randn(N, 4, 6), torch.ones(N, 4), torch.randn(N, 3, 8, 8)
CLASS = torch.arange(N) % 5


def first(data, model):
    batch = next(as_samples(data, model=model).batches(N))
    call(model, batch.inputs)
    return batch


def same(tree, other) -> bool:
    if isinstance(tree, torch.Tensor):
        return torch.equal(tree, other)
    keys = tree.keys() if isinstance(tree, dict) else range(len(tree))
    return type(tree) is type(other) and len(tree) == len(other) and all(same(tree[key], other[key]) for key in keys)


@pytest.mark.parametrize(
    ("model", "data", "inputs", "labels"),
    [
        (Pair(), TensorDataset(A, B), (A, B), None),
        (Pair(), (A, B), {"a": A, "b": B}, None),
        (Pair(), (A, B, CLASS), {"a": A, "b": B}, CLASS),
        (Pair(), TensorDataset(A, B, CLASS), (A, B), CLASS),
        (Pair(), [((a, b), c) for a, b, c in zip(A, B, range(N), strict=True)], (A, B), torch.arange(N)),
        (Pair(), [({"a": a, "b": b, "id": "x"}, c) for a, b, c in zip(A, B, range(N), strict=True)], {"a": A, "b": B}, torch.arange(N)),
        (Masked(), TensorDataset(X, MASK, CLASS), (X, MASK), CLASS),
        (Masked(), TensorDataset(X, CLASS), X, CLASS),
        (Switched(), TensorDataset(X, MASK[:, 0]), X, MASK[:, 0]),
        (Losing(), TensorDataset(X, CLASS), X, CLASS),
        (Masked(), {"x": X, "mask": MASK}, {"x": X, "mask": MASK}, None),
        (Single(), [(a, {"boxes": torch.rand(n, 4), "labels": torch.ones(n)}) for n, a in enumerate(A)], A, None),
        (Single(), [(a, f"{n}.png") for n, a in enumerate(A)], A, None),
        (Single(), [(a, n, f"{n}.png") for n, a in enumerate(A)], A, torch.arange(N)),
        (Single(), [(a, Path(f"{n}.png")) for n, a in enumerate(A)], A, None),
        (Single(), [(a, n, Path(f"{n}.png")) for n, a in enumerate(A)], A, torch.arange(N)),
        (Single(), [(a, Path(f"{n}.png"), n) for n, a in enumerate(A)], A, torch.arange(N)),
        (Single(), [(f"{n}.png", a, n) for n, a in enumerate(A)], A, torch.arange(N)),
        (Pair(), [(Path(f"{n}.png"), a, b) for n, (a, b) in enumerate(zip(A, B, strict=True))], (A, B), None),
        (Single(), [(a, None) for a in A], A, None),
        (Single(), [(a, (torch.rand(2, 4), torch.ones(2))) for a in A], A, None),
        (Single(), [(a, (0.0, 1.0)) for a in A], A, torch.tensor([[0.0, 1.0]] * N)),
        (Single(), [{"x": a, "target": {"boxes": torch.rand(n, 4)}} for n, a in enumerate(A)], A, None),
        (Single(), [(a, [0.0, 1.0]) for a in A], A, torch.tensor([[0.0, 1.0]] * N)),
        (Single(), [{"x": a, "label": n} for n, a in enumerate(A)], A, torch.arange(N)),
        (Single(), [{"pixel_values": a, "labels": n} for n, a in enumerate(A)], A, torch.arange(N)),
        (Single(), {"pixel_values": A, "label": CLASS}, A, CLASS),
        (Single(), {"x": A.numpy(), "y": CLASS.numpy()}, A, CLASS),
        (Taking(), [{"image": a, "label": n, "path": "x"} for n, a in enumerate(A)], ({"image": A},), torch.arange(N)),
        (Convolution(), [{"image": p, "id": n} for n, p in enumerate(P)], P, None),
        (Convolution(), [(P[:4], CLASS[:4]), (P[4:], CLASS[4:])], P, CLASS),
        (Convolution(), iter([P[:4], P[4:]]), P, None),
        (Convolution(), [P[:4], P[4:]], P, None),
        (Convolution(), [{"x": P[:4], "labels": CLASS[:4]}, {"x": P[4:], "labels": CLASS[4:]}], P, CLASS),
        (Convolution(), iter(list(P)), P, None),
        (Convolution(), DataLoader([(P[:4], CLASS[:4]), (P[4:], CLASS[4:])], batch_size=None), P, CLASS),
        (Single(), DataLoader([A[:4], A[4:]], batch_size=None), A, None),
    ],
)
def test_signature_of_the_forward_selects_the_inputs(model, data, inputs, labels):
    batch = first(data, model)
    got = batch.inputs["x"] if isinstance(batch.inputs, dict) and not isinstance(inputs, dict) else batch.inputs
    assert same(inputs, got)
    assert batch.labels is None if labels is None else torch.equal(batch.labels, labels)


class Stream(IterableDataset):
    def __iter__(self):
        while True:
            yield from zip(P, range(N), strict=True)


@pytest.mark.parametrize("data", [Stream(), DataLoader(Stream(), batch_size=4), iter(Stream())], ids=["data set", "loader", "iterator"])
def test_iterable_data_keep_only_the_first_samples(data):
    notes = []
    with listening(events=lambda event, fields: notes.append(fields.get("note"))):
        samples = as_samples(data, model=Convolution(), most=N)
    batch = next(samples.batches(2 * N))
    assert torch.equal(batch.inputs, P) and batch.labels.tolist() == list(range(N)) and "the first 6 samples" in str(notes)


def test_rejects_endless_stream(monkeypatch):
    monkeypatch.setattr("anybit.sources.inputs.BYTES", 10_000)
    with pytest.raises(InvalidInput, match=r"no length, and its first \d+ samples"):
        as_samples(Stream(), model=Convolution())
    with pytest.raises(InvalidInput, match="empty"):
        as_samples(iter([]), model=Convolution())


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        (Masked(), TensorDataset(X, MASK), ("Masked.forward(x, mask=None)", "labelled=False) if it is mask", "labelled=True)")),
        (Masked(), (X, MASK), ("Masked.forward(x, mask=None)", "labelled=False", "labelled=True")),
        (
            Single(),
            [torch.randn(4, 3), torch.randn(4, 3)],
            ("anybit.Samples(data, labelled=False)", "DataLoader(list(data), batch_size=None)"),
        ),
        (Single(), [{"image": a, "other": a} for a in A], ("'image' alone or 'other' alone", "'x'")),
    ],
    ids=["mask", "arrays", "batches", "keys"],
)
def test_ambiguous_items_raise_a_question_with_its_answers(model, data, words):
    with pytest.raises(InvalidInput) as refused:
        as_samples(data, model=model)
    assert all(word in str(refused.value) for word in words) and "\n" not in str(refused.value)


def test_answers_to_the_question_work():
    model, data = Masked(), TensorDataset(X, MASK)
    assert same((X, MASK), first(anybit.Samples(data, labelled=False), model).inputs)
    assert torch.equal(first(anybit.Samples(data, labelled=True), model).labels, MASK)
    batches = [torch.randn(4, 3), torch.randn(4, 3)]
    assert torch.equal(first(DataLoader(batches, batch_size=None), Single()).inputs, torch.cat(batches)[:N])
    assert torch.equal(first(anybit.Samples(batches, labelled=False), Single()).inputs, torch.stack(batches))


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        (Pair(), [{"a": a, "c": a} for a in A], ("dictionaries of a, c", "Pair.forward(a, b)")),
        (Single(), [(), ()], ("empty tuples",)),
        (Single(), [{"path": "x"}, {"path": "y"}], ("dictionaries of path", "Single.forward(x)")),
        (Single(), [(a, torch.rand(n + 1, 4)) for n, a in enumerate(A)], ("do not fit into one batch",)),
    ],
    ids=["other names", "nothing", "no numbers", "labels of several shapes"],
)
def test_rejects_items_that_the_forward_does_not_accept_in_one_line(model, data, words):
    with pytest.raises(InvalidInput) as refused:
        next(as_samples(data, model=model).batches(4))
    assert all(word in str(refused.value) for word in words) and "\n" not in str(refused.value)


def test_ignored_parts_of_an_item_are_reported():
    notes = []
    with listening(events=lambda event, fields: notes.append(fields.get("note"))):
        first([(a, f"{n}.png") for n, a in enumerate(A)], Single())
        first([{"x": a, "id": n} for n, a in enumerate(A)], Single())
    assert "elements 1 (str)" in notes[0] and "entries id" in notes[1]


def test_network_and_generators_are_unchanged():
    class Counting(Masked):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x, mask=None):
            self.count += 1
            return super().forward(x, mask) + torch.rand(())

    model = Counting().train()
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    as_samples(TensorDataset(X, CLASS), model=model)
    assert model.count == 0 and model.training and torch.equal(torch.random.get_rng_state(), before)


def test_calibrates_on_pairs_of_inputs():
    result = anybit.calibrate(
        Pair().eval(), TensorDataset(A, B), "8bit", weight_bits=(8,), activation_bits=(8,), pipeline="light", cache=False
    )
    assert set(result.scheme) == {"fc"}


def test_arrays_of_a_loader_with_its_own_collate_function_are_split_as_its_batches():
    def collate(items):
        return torch.stack([p for p, _ in items]), [f"{n}.png" for _, n in items]

    batch = first(DataLoader(list(zip(P, range(N), strict=True)), collate_fn=collate), Convolution())
    assert torch.equal(batch.inputs, P) and batch.labels is None
    with_numbers = DataLoader(list(zip(P.numpy(), np.arange(N), strict=True)))
    assert first(with_numbers, Convolution()).labels.tolist() == list(range(N))


class Reading(nn.Module):
    """Class scores of tokens, each computed with the mean over its text."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask):
        words = self.words(input_ids)
        mean = (words * attention_mask[..., None]).sum(1, keepdim=True) / attention_mask.sum(1)[:, None, None]
        return self.head(torch.tanh(words + mean))


def text_batches(labelled=False):
    draw = torch.Generator().manual_seed(0)
    tokens = [torch.randint(20, shape, generator=draw) for shape in ((8, 5), (8, 9), (8, 7))]
    batches = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in tokens]
    return [one | {"labels": one["input_ids"] % 3} for one in batches] if labelled else batches


@pytest.mark.parametrize("kind", [list, iter, lambda batches: DataLoader(batches, batch_size=None)])
def test_text_batches_of_several_lengths_are_padded(kind):
    model = Reading().eval()
    batch = next(as_samples(kind(text_batches()), model=model).batches(24))
    assert batch.inputs["input_ids"].shape == (24, 9) and batch.mask.sum().item() == 8 * (5 + 9 + 7)
    with torch.no_grad():
        expected = [model(**one).flatten(0, 1) for one in text_batches()]
        torch.testing.assert_close(model(**batch.inputs)[batch.mask], torch.cat(expected))


def test_scores_of_padded_texts_exclude_padding():
    model, data = Reading().eval(), text_batches(labelled=True)
    with torch.no_grad():
        right = torch.cat([(model(one["input_ids"], one["attention_mask"]).argmax(-1) == one["labels"]).flatten() for one in data])
    assert anybit.evaluate(model, data)["top1"] == pytest.approx(100 * right.double().mean().item())
    result = anybit.calibrate(model, data, "4bit", activation_bits=(8,), pipeline="light", cache=False)
    assert result.report["inputs"]["fitting"] + result.report["inputs"]["held_out"] == 24


@pytest.mark.parametrize(
    ("shape", "remedy"), [((3, 8, "n"), "--size"), (("n",), "attention_mask"), (("n", 4), "all the same shape.")], ids=str
)
def test_samples_of_several_shapes_are_refused_with_a_fitting_remedy(shape, remedy):
    data = [torch.zeros([8 + n if size == "n" else size for size in shape]) for n in range(4)]
    with pytest.raises(InvalidInput, match=f"do not fit into one batch.*{remedy}"):
        next(as_samples(data).batches(4))


UNUSUAL = {
    "sparse": lambda x: x.to_sparse(),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
    "meta": lambda x: x.to("meta"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("form", ["alone", "labelled", "list"])
def test_unusual_tensors_are_refused_in_one_line(kind, form):
    x = torch.randn(6, 3)
    whole = UNUSUAL[kind](x)
    data = {"alone": whole, "labelled": (whole, torch.zeros(6, dtype=torch.int64)), "list": list(map(UNUSUAL[kind], x))}[form]
    with pytest.raises(InvalidInput, match=f"tensor of the data is .*{kind}.*(first|CPU)"):
        anybit.evaluate(Single(), data)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nested_tensors_are_refused_in_one_line():
    with pytest.raises(InvalidInput, match=r"nested tensor.*to_padded_tensor"):
        anybit.evaluate(Single(), torch.nested.nested_tensor([torch.randn(3), torch.randn(2)]))


def test_conjugate_and_negated_views_are_read():
    x = torch.randn(6, 3)
    view = torch.complex(x, -x).conj().imag
    assert view.is_neg()
    for data in (view, list(view)):
        torch.testing.assert_close(first(data, Single()).inputs, x[: len(first(data, Single()))])
