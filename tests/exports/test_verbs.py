"""Outputs of an exported file, read as the network's own."""

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anybit.data.batches import Batch, tensors_in
from anybit.data.readers import FirstOutput, SentenceEmbedding
from anybit.data.tasks import outputs_of
from anybit.exports.verbs import _predicted


@dataclass
class Plain:
    scores: Tensor
    inner: Any


Named = namedtuple("Named", "scores inner")


class Pairs(nn.Module):
    """Scores of pairs [N, N] first, then embeddings by name and a nested container, as CLIP returns them."""

    def __init__(self, container=dict):
        super().__init__()
        self.container = container

    def forward(self, x: Tensor) -> Any:
        inner = {"states": (2 * x, None, [3 * x])}
        return self.container(scores=x @ x.T, inner=inner) if self.container is not dict else self.by_name(x, inner)

    def by_name(self, x: Tensor, inner: dict) -> dict[str, Any]:
        return {"scores": x @ x.T, "nothing": None, "text_embeds": x + 1, "inner": inner, "image_embeds": x - 1}


def running(model: nn.Module) -> SimpleNamespace:
    """A session that computes what the network does, and returns a list, as a runtime does."""

    def run(_names, feeds):
        return [tensor.numpy() for tensor in tensors_in(model(*map(torch.from_numpy, feeds.values())))]

    return SimpleNamespace(get_inputs=lambda: [SimpleNamespace(name="x")], run=run)


@pytest.mark.parametrize(("container", "reader"), [(dict, SentenceEmbedding()), (Named, FirstOutput("regression")), (Plain, None)])
def test_reads_a_file_as_the_network(container, reader):
    model, batches = Pairs(container), [Batch(torch.randn(4, 3), None, reader), Batch(torch.randn(4, 3), None, reader)]
    assert torch.equal(_predicted(running(model), model, batches), outputs_of(model, batches))
