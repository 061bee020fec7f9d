"""Data sets whose code fails: one line that names the data set, the item and the exception, in this process and in workers."""

import os
from pathlib import Path

import pytest
import torch
from commands import FAST, anybit_cli
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, get_worker_info

from anybit.data.contents import contents_of_samples
from anybit.errors import InvalidInput
from anybit.progress import listening, tell
from anybit.sources.inputs import as_samples

X = torch.randn(12, 4)


class Items(Dataset):
    length = 12

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return X[index], index % 3


class Failing(Items):
    def __getitem__(self, index):
        if index == 7:
            raise ValueError("broken\nfile")
        return super().__getitem__(index)


class Leaving(Failing):
    def __getitem__(self, index):
        return super().__getitem__(index) if index != 7 else exit("gone")


class TooLong(Items):
    length = 20


class Changing(Items):
    calls = 0

    def __init__(self, other):
        self.other = other

    def __getitem__(self, index):
        self.calls += 1
        return super().__getitem__(index) if self.calls % 5 else self.other


class Dying(Items):
    def __getitem__(self, index):
        if index == 7 and get_worker_info():
            os._exit(3)
        return super().__getitem__(index)


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(X[:5], range(5), strict=True)
        raise ValueError("the stream broke")


class Unreadable(DataLoader):
    def __iter__(self):
        raise RuntimeError("no batches")


def several_only(items):
    if len(items) > 1:
        raise TypeError("cannot be joined")
    return torch.utils.data.default_collate(items)


def generated():
    yield from Stream()


def with_length(value):
    def length(self):
        if isinstance(value, Exception):
            raise value
        return value

    return type("Lying", (Items,), {"__len__": length})()


def refusal(read, *words):
    with pytest.raises(InvalidInput) as refused:
        read()
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert "\n" not in str(refused.value) and "Traceback" not in str(refused.value)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Failing(), ("Item 7 of the data set Failing raises ValueError: broken file",)),
        (Subset(Failing(), [3, 7]), ("Item 7 of the data set Failing (item 1 of the Subset) raises",)),
        (Leaving(), ("Item 7 of the data set Leaving raises SystemExit: gone",)),
        (TooLong(), ("Item 12 of the data set TooLong raises IndexError", "Its length is 20")),
        (Changing(X[0]), ("the data set Changing, item 0 is (Tensor [4], int), and item", "is Tensor [4]")),
        (Changing(None), ("NoneType", "the data set Changing, item 0")),
        (Changing((X[0, :2], 1)), ("(Tensor [2], int)",)),
        (Changing((X[0], "cat")), ("(Tensor [4], str)",)),
        (DataLoader(Items(), collate_fn=several_only), ("collate_fn", "TypeError: cannot be joined")),
    ],
    ids=["raises", "subset", "exits", "too long", "no label", "nothing", "other shape", "text", "collate"],
)
def test_failing_item_is_named(data, words, workers):
    refusal(lambda: list(as_samples(data, workers).batches(4)), *words)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (with_length(-3), ("length of the data set Lying", "ValueError")),
        (with_length(2.0), ("length of the data set Lying", "TypeError")),
        (with_length(RuntimeError("unknown")), ("length of the data set Lying", "RuntimeError: unknown")),
        (with_length(10**12), ("length of the data set Lying is 1000000000000",)),
        (with_length(0), ("empty",)),
        (Stream(), ("Element 5 of the data set Stream raises ValueError: the stream broke",)),
        (generated(), ("Element 5", "ValueError: the stream broke")),
        (DataLoader(Stream(), batch_size=2), ("ValueError: the stream broke",)),
        (DataLoader(Stream(), batch_size=2, num_workers=1), ("worker processes", "ValueError: the stream broke")),
        (Unreadable(Stream()), ("data set Unreadable raises RuntimeError: no batches",)),
    ],
    ids=["negative", "float", "raises", "huge", "zero", "stream", "generator", "loader", "workers", "unreadable"],
)
def test_data_set_that_cannot_be_read_is_refused(data, words):
    refusal(lambda: as_samples(data), *words)


def test_dead_worker_is_reported_with_a_remedy(monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    refusal(lambda: list(as_samples(Dying(), 1).batches(4)), "worker processes", "--workers=0")


def test_subclass_of_a_subset_is_digested_with_its_changes():
    class Scaled(Subset):
        factor = 1

        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x * self.factor, y

        def __getitems__(self, indices):
            return [self[index] for index in indices]

    class Doubled(Scaled):
        factor = 2

    one, other = (contents_of_samples(as_samples(kind(Items(), range(6)))) for kind in (Scaled, Doubled))
    assert one != other
    assert torch.equal(next(as_samples(Doubled(Items(), range(6))).batches(6)).inputs, 2 * X[:6])


SCRIPT = """
import torch
class Base:
    def __len__(self): return 24
    def __getitem__(self, index): return torch.randn(3, 8, 8), index % 3
class Failing(Base):
    def __getitem__(self, index):
        if index == 20: raise OSError(5, "broken file")
        return super().__getitem__(index)
class Short(Base):
    def __getitem__(self, index): return [][index] if index > 9 else super().__getitem__(index)
class Lying(Base):
    def __len__(self): return -1
def stream():
    yield torch.randn(3, 8, 8), 0
    raise ValueError("ended")
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Failing", ("Item 20 of d.py:Failing raises OSError", "broken file")),
        ("Short", ("of d.py:Short raises IndexError", "ength is 24")),
        ("Lying", ("d.py:Lying", "ValueError")),
        ("stream", ("d.py:stream", "Element 1", "ValueError: ended")),
    ],
)
@pytest.mark.parametrize("verb", ["calibrate", "grow", "test data"])
def test_command_names_the_reference_and_writes_nothing(name, words, verb, here):
    Path("d.py").write_text(SCRIPT)
    first = {"calibrate": ["--data", f"d.py:{name}", *FAST], "grow": ["--train", f"d.py:{name}", "--epochs", "1"]}.get(
        verb, ["--data", "x.npz", "--test", f"d.py:{name}", *FAST]
    )
    done = anybit_cli(
        "grow" if verb == "grow" else "calibrate", "--model", "m.py:net", *first, "--budget", "6bit", "--output", "run", "--quiet"
    )
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and all(word in done.stderr for word in words), done.stderr
    assert not Path("run/scheme.json").exists()


def test_item_with_other_parts_is_named_by_its_number():
    items = [(one, 1) for one in X[:4]]
    items[2] = (*items[2], torch.ones(2))
    for data, size, words in (
        (items, 4, "and item 2 is (Tensor [4], int, Tensor [2])"), (items, 1, "It is item 2 of the data."),
        (Subset(items, [3, 2]), 2, "and item 2 (item 1 of the Subset) is"),
        (Subset(items, [3, 2]), 1, "It is item 2 of the data (item 1 of the Subset)."),
    ):  # fmt: skip
        refusal(lambda data=data, size=size: list(as_samples(data).batches(size)), "a tuple of 3, has other parts than the first", words)


def test_sample_of_a_subset_is_named_by_its_number_there():
    items = [(torch.full((4,), float("nan" if at == 3 else "1")), 1) for at in range(5)]
    (batch,) = as_samples(Subset(items, [4, 3, 2])).subset([1, 2]).batches(4)
    assert batch.name_of(0, "a batch") == "sample 1 of the data"


def test_equal_notes_are_shown_once():
    notes = []
    with listening(events=lambda event, fields: notes.append(fields.get("note"))):
        for note in ("one", "two", "one"):
            tell("note", note=note)
    assert notes == ["one", "two"]


def test_a_generator_that_may_give_samples_or_batches_is_a_question_whose_remedy_works():
    model = torch.nn.Sequential(torch.nn.Linear(8, 3))

    def batches():
        return (torch.full((8, 8), float(number)) for number in range(4))

    with pytest.raises(InvalidInput, match=r"DataLoader\(list\(data\), batch_size=None\)"):
        as_samples(batches(), 0, model)
    assert len(as_samples(DataLoader(list(batches()), batch_size=None), 0, model)) == 32


@pytest.mark.parametrize("labels", [[[1], [1, 2]], [[1, 2], "text"]])
def test_lists_of_several_lengths_are_no_numbers_and_no_traceback(labels):
    x = torch.randn(8, 4)
    items = [(row, labels) for row in x]
    assert not as_samples(items, 0, torch.nn.Linear(4, 2)).labelled
    with pytest.raises(InvalidInput):
        next(as_samples((x, labels * 4), 0, torch.nn.Sequential(torch.nn.Linear(4, 2))).batches(8))
