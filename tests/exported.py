"""Networks for the exporter's tests, at random mixed schemes, covering every supported operator."""

import random

import torch
import torch.nn.functional as F
from torch import nn

from anybit.data.batches import Batch
from anybit.networks.canonical import Canonical
from anybit.networks.edges import finished
from anybit.networks.observed import observe_network, rounded_to_nearest
from anybit.roads.settings import CalibrateSettings
from anybit.scheme import Precision, Scheme


class Activated(nn.Module):
    """Convolutions, one of them depthwise, a concatenation, both pools and a linear around one activation function."""

    def __init__(self, activation=F.relu):
        super().__init__()
        self.activation = activation
        self.first, self.depth, self.point = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 12, 1)
        self.joined, self.head = nn.Conv2d(20, 8, 3, stride=2), nn.Linear(8, 10)

    def forward(self, x):
        a = self.activation(self.first(x))
        b = self.activation(self.point(self.activation(self.depth(a))))
        h = self.activation(self.joined(torch.cat([a, b], 1)))
        return self.head(F.max_pool2d(F.avg_pool2d(h, 2, 1), 2, ceil_mode=True).mean((2, 3)))


class Gated(nn.Module):
    """Squeeze and excitation: a product with a gate for each channel; an added constant; a flattened image."""

    def __init__(self):
        super().__init__()
        self.first, self.squeeze, self.excite = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.second, self.hidden, self.head = nn.Conv2d(8, 8, 3), nn.Linear(200, 16), nn.Linear(16, 5)

    def forward(self, x):
        h = F.relu(self.first(x))
        h = h * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(h, 1)))))
        return self.head(F.relu(self.hidden(F.avg_pool2d(self.second(h) + 0.5, 2).flatten(1))))


class Joined(nn.Module):
    """Sums of two branches, one clamped for one reader only; zero-padded channels; two outputs of layers with ranges of their own."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 12, 1, bias=False)
        self.last, self.other = nn.Conv2d(12, 5, 3, dilation=2), nn.Conv2d(12, 2, 12, groups=2)

    def forward(self, x):
        h = F.relu(self.first(x))
        h = h + self.second(F.relu6(h))
        wide = F.pad(h[:, ::2], (0, 0, 0, 0, 4, 4)) + self.third(F.relu(h))
        return self.last(wide), self.other(wide)


class Mixed(nn.Module):
    """Tokens: a float norm between three-dimensional linears."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.up, self.down = nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 3, bias=False)

    def forward(self, x):
        h = self.first(x)
        return self.head((h + self.down(F.gelu(self.up(self.norm(h))))).mean(1))


class Asymmetric(nn.Module):
    """Padding before a strided convolution, as in other frameworks."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, stride=2), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.second(F.relu6(self.first(F.pad(x, (0, 1, 0, 1)))).relu())


IMAGE, WORDS = (3, 12, 12), (7, 12)
EXACT = {
    "relu": (Activated, IMAGE),
    "relu6": (lambda: Activated(F.relu6), IMAGE),
    "silu": (lambda: Activated(F.silu), IMAGE),
    "gelu": (lambda: Activated(F.gelu), IMAGE),
    "hardswish": (lambda: Activated(F.hardswish), IMAGE),
    "leaky relu": (lambda: Activated(F.leaky_relu), IMAGE),
    "tanh": (lambda: Activated(torch.tanh), IMAGE),
    "gated": (Gated, IMAGE),
    "joined": (Joined, IMAGE),
    "mixed": (Mixed, WORDS),
    "asymmetric": (Asymmetric, IMAGE),
}
"""name -> (makes the network, shape of an input): all that the integer reference promises bit for bit."""


def inputs(shape, count=16, seed=1):
    return Batch(torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)))


def random_precision(draw: random.Random) -> Precision:
    return Precision(draw.randint(2, 8), draw.randint(4, 8))


def canonical_of(model: nn.Module, batch: Batch, precision) -> Canonical:
    """Round `model` to nearest at `precision(layer)`, with edge ranges from `batch`; a calibration would be slower."""
    network = observe_network(model.eval(), batch, CalibrateSettings((8,), (8,)).options)
    ready = rounded_to_nearest(network, [batch], Scheme({name: precision(name) for name in network.names}))
    return finished(Canonical(ready, network.norms), network.wiring, [batch])
