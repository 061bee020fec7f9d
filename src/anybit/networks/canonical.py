"""The canonical form that every road ends in: a folded network with uniform quantizers."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from anybit.networks.fingerprint import Fingerprint
from anybit.networks.layers import scheme_of
from anybit.scheme import Scheme


@dataclass
class Canonical:
    """The canonical form, with what a file needs besides the tensors.

    model        folded, slots filled, with the edges rounded that an integer runtime holds as codes
    folded       layer -> batch norm folded into it
    edges        name -> (low, high) of every edge, rounded or not
    fingerprint  outputs by which the network at hand is known again
    """

    model: nn.Module
    folded: Mapping[str, str]
    edges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    fingerprint: Fingerprint | None = None

    @property
    def scheme(self) -> Scheme:
        return scheme_of(self.model)
