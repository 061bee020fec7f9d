"""Settings of the methods, each explained in the file of its method. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from anybit.budget import own_costs
from anybit.errors import InvalidSetting
from anybit.loops.settings import SEEDS
from anybit.numerics.bits import check_bits
from anybit.settings import Settings, Text, documented, option

RATE = 1e-3
GATES = ("soft", "straight-through")


@documented
@dataclass(frozen=True)
class CSQSettings(Settings):
    """Settings of CSQ, in the words of `csq`."""

    common: ClassVar[Mapping[str, Any]] = {"rare": True}

    planes: int = option(
        7, "Bit planes that a layer starts with; with the sign one bit more.", least=1, most=7, why="with the sign they are 2 to 8 bits"
    )
    per_channel: bool = option(False, "A scale for each output channel instead of each layer.", switch=True)
    prune: bool = option(False, "A layer may lose all its planes.", switch=True)
    strength: float = option(0.3, "Weight of the budget in the loss.", above=0)
    anchor: bool = option(True, "Keep every layer's highest plane open until the planes are fixed.")
    ramp: float = option(
        0.8, "Share of the search in which the budget falls from all planes to the one given; 0 is at once, as published.", least=0, most=1
    )
    weighting: float = option(
        0.5, "Power of a layer's weights that its planes are penalized by: 1 as the budget counts, 0 all alike, as published.",
        least=0, most=1,
    )  # fmt: skip
    fix: float = option(0.15, "Share of the run after which the planes are fixed.", above=0, most=1)
    harden: float = option(0.9, "Share of the run after which every weight's bits are fixed.", above=0, most=1)
    logit: float = option(
        3.0, "Size of the logits of a gate that starts decided: 1 leaves it at 0.73 or 0.27, 3 at 0.95 or 0.05.",
        above=0, most=10, why="in float32 a gate of more is all but decided and cannot be trained", command_line=False,
    )  # fmt: skip
    plane_temperature: float = option(
        200.0, "Temperature of the plane gates when they are fixed.", least=1, why="temperatures start at 1", command_line=False
    )
    phase: str = option("restart", "How weights go on once the planes are fixed.", choices=("restart", "rewind", "continue"))
    fix_temperature: float = option(
        1.3, "Temperature of the weight gates when the planes are fixed.", least=1, why="temperatures start at 1", command_line=False
    )
    final_temperature: float = option(
        60.0, "Temperature of the weight gates when they are hardened.", least=1, why="temperatures start at 1", command_line=False
    )
    weight_gates: str = option("soft", "straight-through, for comparison: hard forward, soft backward.", choices=GATES, command_line=False)
    plane_gates: str = option(
        "soft", "straight-through, for comparison: hard, closed planes pruned for good every epoch (BSQ-like).",
        choices=GATES, command_line=False,
    )  # fmt: skip
    gate_rate: float = option(1e-2, "Learning rate of weight gates.", above=0)
    plane_rate: float = option(1e-2, "Learning rate of plane gates.", above=0)
    scale_rate: float = option(RATE, "Learning rate of the logarithms of scales.", above=0, command_line=False)
    rate: float = option(RATE, "Learning rate of batch norm, biases, and of weights at a fixed scheme.", above=0)

    def check(self) -> None:
        if self.fix > self.harden:
            raise InvalidSetting(f"fix {self.fix} and harden {self.harden} are shares of the run, 0 < fix <= harden <= 1.")


@documented
@dataclass(frozen=True)
class LSQSettings(Settings):
    """Settings of LSQ, of the names that CSQ's have."""

    common: ClassVar[Mapping[str, Any]] = {"rare": True}

    scale_rate: float = option(RATE, "Learning rate of the logarithms of scales.", above=0, command_line=False)
    rate: float = option(RATE, "Learning rate of weights and all other parameters.", above=0)


def parse_factors(text: str) -> dict[int, float]:
    """Bit-width -> factor, of "2=0.1,4=0.3"."""
    return {int(bits): float(factor) for bits, factor in (part.split("=") for part in text.split(","))} if text else {}


FACTORS = Text(
    parse_factors,
    lambda factors: ",".join(f"{bits}={factor}" for bits, factor in factors.items()) or None,
    "bit-widths and factors: 2=0.1,4=0.3",
)


@documented
@dataclass(frozen=True)
class MultiQuantSettings(Settings):
    """Settings of MultiQuant, in the words of `multiquant`."""

    common: ClassVar[Mapping[str, Any]] = {"rare": True}

    sandwich: str = option("HRL", "Networks of a step, in order: H highest, R random, L lowest bits; letters may repeat or be left out.")
    label: str = option(
        "one-hot", "one-hot, adaptive (online), or teacher (the wider network's outputs).", choices=("one-hot", "adaptive", "teacher")
    )
    label_weight: float = option(0.5, "Share of the adaptive label, or of the teacher, in the loss.", least=0, most=1)
    middle: str = option("uniform", "How R is drawn.", choices=("uniform", "worst", "best", "progressive"))
    per_channel: bool = option(
        True, "A weight step for each layer instead of each channel.", flag="--per-tensor", inverted=True, switch=True
    )
    batch_norm: str = option(
        "reestimate", "reestimate: statistics anew for each subnet; switch: a batch norm for each bit-width of the layer.",
        choices=("reestimate", "switch"),
    )  # fmt: skip
    step_rates: Mapping[int, float] = option(
        dict, "Factors on the steps' learning rate for some bit-widths: 2=0.1,4=0.3.", above=0, text=FACTORS
    )
    step_rate: float = option(RATE, "Learning rate of the steps.", above=0)
    offset_rate: float = option(0.0, "Learning rate of the inputs' offsets; 0 keeps them.", least=0)
    rate: float = option(RATE, "Learning rate of weights, biases and batch norm.", above=0)

    def check(self) -> None:
        if not self.sandwich or set(self.sandwich) - set("HRL"):
            raise InvalidSetting(f"sandwich {self.sandwich!r} cannot be read. Write the letters H, R and L in any order: HRL.")
        if self.label == "teacher" and sorted(self.sandwich, key="HRL".index) != list(self.sandwich):
            raise InvalidSetting(f"sandwich {self.sandwich!r}: with label teacher the wider network comes first. Write H, then R, then L.")
        for bits in self.step_rates:
            check_bits(bits, "step_rates: bit-width")


@documented
@dataclass(frozen=True)
class SearchSettings(Settings):
    """Settings of the search over a supernet's schemes, in the words of `subnet_search`."""

    common: ClassVar[Mapping[str, Any]] = {"rare": True}

    evaluations: int = option(150, "Subnets that are evaluated.", least=10, most=10**6, rare=False)
    strategy: str = option(
        "monte-carlo", "uniform: draws with the same predictor and search; integer-program: on measured sensitivities.",
        choices=("monte-carlo", "uniform", "integer-program"), rare=False,
    )  # fmt: skip
    quantity: str = option("bits", "The cost of the front.", choices=tuple(cost.name for cost in own_costs()), rare=False)
    images: int = option(2500, "Held-out inputs a subnet is evaluated on; others measure the front again.", least=1)
    bn_images: int | None = option(
        None, "Training inputs that batch norm is estimated on while searching; left out, as many as in training.", least=2
    )
    seed: int = option(0, "Seed of every draw.", least=-SEEDS, most=SEEDS, rare=False)
    explored: float = option(0.6, "Share of the evaluations that the predictor is first fitted to.", above=0, below=1, command_line=False)
    rounds: int = option(
        3, "How often the rest is spent: predict, search, evaluate the favourites.", least=1, most=1000, command_line=False
    )
    targets: int = option(20, "Averages that are searched for in a round.", least=1, most=1000, command_line=False)
    population: int = option(100, "Schemes in a generation of the genetic search.", least=4, most=10**5, command_line=False)
    generations: int = option(30, "Generations of the genetic search.", least=1, most=10**6, command_line=False)
    mutation: float = option(0.1, "Chance that a layer of a child is drawn anew.", above=0, most=1, command_line=False)

    @classmethod
    def recorded(cls, report: Mapping[str, Any]) -> Any:
        return super().recorded(report.get("search", report))
