"""The methods by name: one line adds one. Read before torch is imported, so each is a place and not yet the object."""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anybit.loops.reconstruction import Rounding

ROUNDINGS: Mapping[str, str] = {
    "adaquant": "anybit.methods.adaquant:AdaQuant",
    "adaround": "anybit.methods.adaround:AdaRound",
}
"""Name -> the rounding that `calibrate --rounding` reconstructs with."""


def rounding_named(name: str) -> "type[Rounding]":
    """Import the rounding of a name."""
    module, rounding = ROUNDINGS[name].split(":")
    return getattr(import_module(module), rounding)
