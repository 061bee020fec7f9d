"""The methods by name: a new one takes a file here and a line below. Read before torch is imported, so each is given as module:name."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anybit.allocation.sensitivity import SensitivityTable
    from anybit.loops.moments import Solver
    from anybit.loops.reconstruction import Rounding
    from anybit.loops.trainee import GrowMethod

ROUNDINGS: Mapping[str, str] = {
    "adaquant": "anybit.methods.adaquant:AdaQuant",
    "adaround": "anybit.methods.adaround:AdaRound",
    "flexround": "anybit.methods.flexround:FlexRound",
}
"""The roundings of `calibrate --rounding`."""

SOLVERS: Mapping[str, str | None] = {
    "gptq": "anybit.methods.gptq:gptq",
    "none": None,
}
"""The solvers of `calibrate --solver`."""

SENSITIVITIES: Mapping[str, str] = {
    "measured": "anybit.allocation.sensitivity:measure_sensitivity",
    "hawq": "anybit.methods.hawq:hawq_sensitivity",
}
"""The sensitivity tables of `calibrate --sensitivity`."""

GROW_METHODS: Mapping[str, str] = {
    "csq": "anybit.methods.csq:CSQ",
    "msq": "anybit.methods.msq:MSQ",
    "lsq": "anybit.methods.lsq:LSQ",
}
"""The methods of `grow --method`; the first that fits is the default."""


def rounding_named(name: str) -> "type[Rounding]":
    """Import a rounding."""
    return _imported(ROUNDINGS[name])


def solver_named(name: str) -> "Solver | None":
    """Import a solver; None for "none"."""
    place = SOLVERS[name]
    return None if place is None else _imported(place)


def sensitivity_named(name: str) -> "Callable[..., SensitivityTable]":
    """Import a function with the arguments and the result of `measure_sensitivity`; `base` and `pairs` are of measurements alone."""
    return _imported(SENSITIVITIES[name])


def grow_method_named(name: str) -> "type[GrowMethod]":
    """Import a method of the grow road."""
    return _imported(GROW_METHODS[name])


def _imported(place: str) -> Any:
    module, name = place.split(":")
    return getattr(import_module(module), name)
