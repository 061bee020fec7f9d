"""The type of a zoo entry, a constructor and the inputs that the network takes; and wrappers of some networks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.zoo.inputs import Inputs


@dataclass(frozen=True)
class ZooNetwork:
    """A network of the zoo.

    build   creates it with random weights, in evaluation mode, and imports its library
    inputs  describes its samples
    """

    build: Callable[[], nn.Module]
    inputs: Inputs


class Heads(nn.Module):
    """A torchvision detector up to its raw outputs; the rest is code that processes boxes."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.head if hasattr(detector, "head") else detector.rpn.head

    def forward(self, images: torch.Tensor):
        return self.head(list(self.backbone(images).values()))


class RegionHeads(Heads):
    """A two-stage detector: the raw outputs of its proposals, and those of the second stage with the whole image as its only region."""

    def __init__(self, detector: nn.Module):
        super().__init__(detector)
        self.box_head, self.box_predictor = detector.roi_heads.box_head, detector.roi_heads.box_predictor

    def forward(self, images: torch.Tensor):
        features = list(self.backbone(images).values())
        region = nn.functional.adaptive_avg_pool2d(features[0], 7)
        return self.head(features), self.box_predictor(self.box_head(region))


class FewUpdates(nn.Module):
    """RAFT with three flow updates instead of twelve."""

    def __init__(self, raft: nn.Module):
        super().__init__()
        self.raft = raft

    def forward(self, first: torch.Tensor, second: torch.Tensor):
        return self.raft(first, second, num_flow_updates=3)
