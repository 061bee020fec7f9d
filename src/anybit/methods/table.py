"""The methods by name: one line adds one."""

from collections.abc import Mapping

from anybit.loops.reconstruction import Rounding
from anybit.methods.adaquant import AdaQuant
from anybit.methods.adaround import AdaRound

ROUNDINGS: Mapping[str, type[Rounding]] = {
    "adaquant": AdaQuant,
    "adaround": AdaRound,
}
"""Name -> the rounding that `calibrate --rounding` reconstructs with."""
