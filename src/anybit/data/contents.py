"""A digest of all samples of a data set, inputs and labels, to tell whether stored work was done on it."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils.data import TensorDataset

from anybit.data.batches import stacked, tensors_in
from anybit.data.reading import whole
from anybit.data.samples import Samples
from anybit.files.contents import contents_of, digest

AT_ONCE = 16
"""Number of samples that are read at once."""


@runtime_checkable
class Digested(Protocol):
    """A data set that knows a digest of its contents without loading every sample."""

    def contents_digest(self) -> str:
        """Return the digest."""


def contents_of_samples(samples: Samples) -> str:
    """Return a SHA-256 over all samples.

    Arrays and files are hashed directly. Of any other data set each item is loaded once, with all generators seeded; if inputs still
    differ, because they are drawn in every epoch, only the labels count.
    """
    samples = samples.on("cpu")
    dataset, indices = whole(samples.dataset)
    if samples.collate is stacked and type(dataset) is TensorDataset:
        return contents_of([indices, *dataset.tensors])
    if samples.collate is stacked and isinstance(dataset, Digested):
        return contents_of([indices, dataset.contents_digest()])
    with_inputs = _first(samples) == _first(samples)
    digests = hashlib.sha256()
    for tensors in _read(samples, with_inputs):
        digests.update(tensors.encode())
    return digests.hexdigest()


def _first(samples: Samples) -> list[str]:
    return list(islice(_read(samples.subset(range(min(AT_ONCE, len(samples)))), True), 1))


def _read(samples: Samples, with_inputs: bool) -> Iterator[str]:
    """Yield a digest of each batch."""
    with _seeded():
        for batch in samples.batches(AT_ONCE):
            yield digest(tensors_in([batch.inputs if with_inputs else [], batch.labels]))


@contextmanager
def _seeded() -> Iterator[None]:
    """Seed every generator that data sets use inside the block, and restore all afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
