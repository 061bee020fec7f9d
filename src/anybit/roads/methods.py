"""The methods by name: a new one is a file in `methods` and a line here."""

from collections.abc import Mapping
from typing import Any, Protocol, Self

from torch import nn

from anybit.budget import Budget
from anybit.errors import InvalidSetting
from anybit.loops.reconstruction import Rounding
from anybit.loops.trainee import Trainee
from anybit.methods.adaquant import AdaQuant
from anybit.methods.adaround import AdaRound
from anybit.methods.csq import CSQ
from anybit.methods.lsq import LSQ
from anybit.networks.observed import ObservedNetwork
from anybit.scheme import Precision


class GrowMethod(Trainee, Protocol):
    """A trainee of the grow road; `settings` are the method's own, the field of `GrowSettings` that has its name.

    needs_scheme   it trains a scheme; else it ends at one of its own
    """

    needs_scheme: bool

    @staticmethod
    def choices(settings: Any, activation_bits: int | None) -> list[Precision]:
        """Return the precisions that a layer may end with, by rising weight bits."""

    @staticmethod
    def check_budget(budget: Budget, network: ObservedNetwork) -> None:
        """Raise InvalidSetting where the method cannot end at `budget`; one that no scheme meets is refused elsewhere."""

    @classmethod
    def attach(cls, model: nn.Module, network: ObservedNetwork, budget: Budget | None, settings: Any) -> Self:
        """Put the method's quantizers into the weight slots of `model`, prepared and unfolded; `network` has each layer's choices."""


ROUNDINGS: Mapping[str, type[Rounding]] = {
    "adaquant": AdaQuant,
    "adaround": AdaRound,
}
"""What `calibrate --rounding` reconstructs with."""

GROW_METHODS: Mapping[str, type[GrowMethod]] = {
    "csq": CSQ,
    "lsq": LSQ,
}
"""What `grow --method` trains with; the first that fits is the default."""


def grow_method_name(method: str | None, has_scheme: bool) -> str:
    """Return the method, or the default with or without a scheme; raises InvalidSetting where it needs what is not there."""
    fitting = [name for name, kind in GROW_METHODS.items() if kind.needs_scheme == has_scheme]
    if method is None:
        return fitting[0]
    if method not in fitting:
        trouble = "grows a scheme of its own: leave out --scheme" if has_scheme else "trains a scheme: give one with --scheme RUN"
        raise InvalidSetting(f"Method {method} {trouble}, or choose --method {' or '.join(fitting)}.")
    return method
