"""The canonical form that every road ends in: a folded network with uniform quantizers."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from anybit.networks.fingerprint import Fingerprint
from anybit.networks.layers import scheme_of
from anybit.scheme import Scheme


@dataclass
class Canonical:
    """The canonical form, and the values stored besides its tensors.

    model        folded, slots filled, with those edges rounded that an integer runtime holds as codes
    folded       layer -> batch norm folded into it
    edges        name -> (low, high) of every edge, rounded or not
    fingerprint  outputs that identify the network
    """

    model: nn.Module
    folded: Mapping[str, str]
    edges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    fingerprint: Fingerprint | None = None

    @property
    def scheme(self) -> Scheme:
        return scheme_of(self.model)
