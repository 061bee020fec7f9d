"""An entry of the zoo: a network by name, its constructor and the inputs that it takes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.zoo.inputs import Inputs


@dataclass(frozen=True)
class ZooNetwork:
    """build   the network with random weights, in evaluation mode; its library is imported here
    inputs  what a sample of it is
    """

    build: Callable[[], nn.Module]
    inputs: Inputs


class Heads(nn.Module):
    """A torchvision detector up to its raw outputs; the rest is code on boxes."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.head if hasattr(detector, "head") else detector.rpn.head

    def forward(self, pictures: torch.Tensor):
        return self.head(list(self.backbone(pictures).values()))


class RegionHeads(Heads):
    """A two-stage detector: the raw outputs of its proposals, and those of the second stage with the whole image as its only region."""

    def __init__(self, detector: nn.Module):
        super().__init__(detector)
        self.box_head, self.box_predictor = detector.roi_heads.box_head, detector.roi_heads.box_predictor

    def forward(self, pictures: torch.Tensor):
        features = list(self.backbone(pictures).values())
        region = nn.functional.adaptive_avg_pool2d(features[0], 7)
        return self.head(features), self.box_predictor(self.box_head(region))


class FewUpdates(nn.Module):
    """RAFT with three flow updates instead of twelve."""

    def __init__(self, raft: nn.Module):
        super().__init__()
        self.raft = raft

    def forward(self, first: torch.Tensor, second: torch.Tensor):
        return self.raft(first, second, num_flow_updates=3)
