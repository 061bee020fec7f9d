"""Content digests of data sets: every input and every label counts, wherever it is stored."""

import os
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from anybit.data.contents import contents_of_samples
from anybit.errors import InvalidInput
from anybit.files import cache
from anybit.sources.inputs import as_samples, load_data


class Items(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


X = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(200) % 5


def changed(tensor, index):
    other = tensor.clone()
    other[index] += 1
    return other


def stacked(items):
    return [torch.stack(part) for part in zip(*items, strict=True)]


KINDS = {
    "arrays": lambda x, y: (x.numpy(), y.numpy()),
    "tensors": lambda x, y: TensorDataset(x, y),
    "items": Items,
    "list": lambda x, y: list(zip(x, y, strict=True)),
    "loader": lambda x, y: DataLoader(Items(x, y), shuffle=True, batch_size=7),
    "collated": lambda x, y: DataLoader(TensorDataset(x, y), collate_fn=stacked),
}


@pytest.mark.parametrize("kind", KINDS)
def test_digest_covers_every_input_and_label(kind):
    make = KINDS[kind]
    samples = as_samples(make(X, Y))
    assert contents_of_samples(samples) == contents_of_samples(as_samples(make(X.clone(), Y.clone())))
    others = [make(changed(X, 150), Y), make(X, changed(Y, 199)), make(X[:199], Y[:199])]
    others = [as_samples(other) for other in others] + [samples.subset(range(199, -1, -1)), samples.subset(range(199))]
    digests = [contents_of_samples(one) for one in [samples, *others]]
    assert len(set(digests[:5])) == 5 and digests[5] != digests[0]


def test_nested_subsets_have_the_digest_of_their_samples():
    samples = as_samples((X.numpy(), Y.numpy()))
    assert contents_of_samples(samples.subset([5, 7, 9]).subset([1])) == contents_of_samples(samples.subset([7]))


class Drawn(Items):
    """Adds noise from a generator to each input."""

    def __init__(self, draw):
        super().__init__(X, Y)
        self.draw = draw

    def __getitem__(self, index):
        return self.x[index] + self.draw(), self.y[index]


class Alone(Drawn):
    def __init__(self, y=Y):
        super().__init__(np.random.default_rng().random)
        self.y = y


@pytest.mark.parametrize("draw", [lambda: torch.rand(()), random.random, np.random.rand])
def test_random_data_has_a_stable_digest_and_generators_are_restored(draw):
    first, second, plain = as_samples(Drawn(draw)), as_samples(Drawn(draw)), as_samples(Items(X, Y))
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert contents_of_samples(first) == contents_of_samples(second) != contents_of_samples(plain)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_digest_of_unseedable_data_covers_its_labels():
    assert contents_of_samples(as_samples(Alone())) == contents_of_samples(as_samples(Alone()))
    assert contents_of_samples(as_samples(Alone())) != contents_of_samples(as_samples(Alone(changed(Y, 199))))


def test_data_set_that_ends_early_is_reported():
    samples = replace(as_samples(Items(X, Y)), dataset=Items(list(X), Y[:100]))
    with pytest.raises(InvalidInput, match=r"Item 100 .*IndexError.*ength is 200"):
        contents_of_samples(samples)


def write_images(folder):
    from PIL import Image

    for number in range(4):
        (folder / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(folder / "ab"[number % 2] / f"{number}.png")


def test_images_are_hashed_by_content_and_read_once(tmp_path, monkeypatch):
    write_images(tmp_path / "one")
    write_images(tmp_path / "two")
    for path in tmp_path.rglob("*.png"):
        os.utime(path, (1, 1))
    monkeypatch.setattr(cache, "RECENT", 0)
    first = contents_of_samples(load_data(str(tmp_path / "one")))
    assert contents_of_samples(load_data(str(tmp_path / "two"))) == first
    with monkeypatch.context() as patch:
        patch.setattr(cache, "sha256_of", lambda path: pytest.fail("read again"))
        assert contents_of_samples(load_data(str(tmp_path / "one"))) == first
    content, image = (tmp_path / "one/a/0.png").read_bytes(), tmp_path / "one/b/1.png"
    image.write_bytes(content[: image.stat().st_size].ljust(image.stat().st_size, b"\0"))
    os.utime(image, (1, 1))  # same size and modification time
    other = contents_of_samples(load_data(str(tmp_path / "one")))
    assert other != first
    (tmp_path / "two/a").rename(tmp_path / "two/c")
    assert contents_of_samples(load_data(str(tmp_path / "two"))) not in (first, other)
