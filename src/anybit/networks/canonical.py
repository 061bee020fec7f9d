"""The canonical form that every road ends in: a folded network with uniform quantizers."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from anybit.networks.layers import scheme_of
from anybit.scheme import Scheme


@dataclass
class Canonical:
    """The canonical form, with what a file needs besides the tensors.

    model    folded, slots filled; edges: name -> (low, high) observed on it; folded: layer -> batch norm folded into it
    """

    model: nn.Module
    folded: Mapping[str, str]
    edges: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def scheme(self) -> Scheme:
        return scheme_of(self.model)
