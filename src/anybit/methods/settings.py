"""Settings of the methods, each explained in the file of its method. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from anybit.budget import own_costs
from anybit.errors import InvalidSetting
from anybit.loops.settings import SEEDS
from anybit.numerics.bits import check_bits
from anybit.settings import Need, Settings, Text, documented, option

RATE = 1e-3
GATES = ("soft", "straight-through")

FASTEST = 100
"""Largest learning rate: beyond it, every step leaves the range that float32 can train."""


@documented
@dataclass(frozen=True)
class CSQSettings(Settings):
    """Settings of CSQ; `methods/csq.py` explains them."""

    common: ClassVar[Mapping[str, Any]] = {"rare": True}

    planes: int = option(
        7, "Bit planes of a layer at the start; the sign adds one bit.", least=1, most=7, why="with the sign they are 2 to 8 bits"
    )
    per_channel: bool = option(False, "One scale per output channel instead of one per layer.", switch=True)
    prune: bool = option(False, "Allow a layer to lose all its planes.", switch=True)
    strength: float = option(0.3, "Weight of the budget's penalty in the loss.", above=0)
    anchor: bool = option(True, "Keep each layer's highest plane open until the planes are fixed.")
    ramp: float = option(
        0.8, "Share of the search in which the budget falls from all planes to yours; 0: at once, as published.", least=0, most=1
    )
    weighting: float = option(
        0.5, "Penalty of a plane, as a power of the layer's weight count: 1 as in the budget, 0 equal, as published.",
        least=0, most=1,
    )  # fmt: skip
    fix: float = option(0.15, "Share of the run after which the planes are fixed.", above=0, most=1)
    harden: float = option(0.9, "Share of the run after which every weight's bits are fixed.", above=0, most=1)
    logit: float = option(
        3.0, "Logits of gates that start decided: 1 gives 0.73 or 0.27, 3 gives 0.95 or 0.05.",
        above=0, most=10, why="in float32 a gate beyond it is nearly decided and cannot be trained", command_line=False,
    )  # fmt: skip
    plane_temperature: float = option(
        200.0, "Temperature of the plane gates when they are fixed.", least=1, why="temperatures start at 1", command_line=False
    )
    phase: str = option("restart", "Weights after the planes are fixed.", choices=("restart", "rewind", "continue"))
    fix_temperature: float = option(
        1.3, "Temperature of the weight gates when the planes are fixed.", least=1, why="temperatures start at 1", command_line=False
    )
    final_temperature: float = option(
        60.0, "Temperature of the weight gates when they are hardened.", least=1, why="temperatures start at 1", command_line=False
    )
    weight_gates: str = option("soft", "straight-through, for comparison: hard forward, soft backward.", choices=GATES, command_line=False)
    plane_gates: str = option(
        "soft", "straight-through, for comparison: hard; every epoch removes closed planes (BSQ-like).",
        choices=GATES, command_line=False,
    )  # fmt: skip
    gate_rate: float = option(1e-2, "Learning rate of weight gates.", above=0, most=FASTEST)
    plane_rate: float = option(1e-2, "Learning rate of plane gates.", above=0, most=FASTEST)
    scale_rate: float = option(RATE, "Learning rate of the logarithms of scales.", above=0, most=FASTEST, command_line=False)
    rate: float = option(RATE, "Learning rate of batch norm, biases, and of weights at a fixed scheme.", above=0, most=FASTEST)

    def check(self) -> None:
        if self.fix > self.harden:
            raise InvalidSetting(f"fix {self.fix} and harden {self.harden} are shares of the run, 0 < fix <= harden <= 1.")


@documented
@dataclass(frozen=True)
class MSQSettings(Settings):
    """Settings of MSQ; `methods/msq.py` explains them. Rates have the names of CSQ's."""

    common: ClassVar[Mapping[str, Any]] = {"rare": True}

    start_bits: int = option(6, "msq: bits of every weight at the start.", least=2, most=8)
    dropping: float = option(0.5, "msq: share of the run over which bits are dropped.", above=0, most=1)
    drops: int = option(20, "msq: rounds in which bits are dropped.", least=1, most=10**6)
    pull: float = option(5e-5, "msq: weight of the pull on each weight's last bit while bits are dropped; 0: none.", least=0)
    scale_rate: float = option(RATE, "Learning rate of the logarithms of scales.", above=0, most=FASTEST, command_line=False)
    rate: float = option(RATE, "Learning rate of weights and all other parameters.", above=0, most=FASTEST)


@documented
@dataclass(frozen=True)
class LSQSettings(Settings):
    """Settings of LSQ, with the names of CSQ's."""

    common: ClassVar[Mapping[str, Any]] = {"rare": True}

    scale_rate: float = option(RATE, "Learning rate of the logarithms of scales.", above=0, most=FASTEST, command_line=False)
    rate: float = option(RATE, "Learning rate of weights and all other parameters.", above=0, most=FASTEST)


def parse_factors(text: str) -> dict[int, float]:
    """Parse "2=0.1,4=0.3" into bit-width -> factor."""
    factors: dict[int, float] = {}
    for bits, factor in (part.split("=") for part in text.split(",")) if text else ():
        if int(bits) in factors:
            raise InvalidSetting(f"{int(bits)} bits are given twice. Keep one factor for each bit-width.")
        factors[int(bits)] = float(factor)
    return factors


FACTORS = Text(
    parse_factors,
    lambda factors: ",".join(f"{bits}={factor}" for bits, factor in factors.items()) or None,
    "bit-widths and factors: 2=0.1,4=0.3",
)


@documented
@dataclass(frozen=True)
class MultiQuantSettings(Settings):
    """Settings of MultiQuant; `methods/multiquant.py` explains them."""

    common: ClassVar[Mapping[str, Any]] = {"rare": True}

    sandwich: str = option("HRL", "Subnets of a step, in order: H highest, R random, L lowest bits; letters may repeat or be omitted.")
    label: str = option(
        "one-hot", "one-hot, adaptive (online), or teacher (the wider subnet's outputs).", choices=("one-hot", "adaptive", "teacher")
    )
    label_weight: float = option(0.5, "Share of the adaptive label or the teacher in the loss.", least=0, most=1)
    middle: str = option("uniform", "Choice of the random subnet R.", choices=("uniform", "worst", "best", "progressive"))
    per_channel: bool = option(
        True, "One weight step size per layer instead of one per channel.", flag="--per-tensor", inverted=True, switch=True
    )
    batch_norm: str = option(
        "reestimate", "reestimate: new statistics for each subnet; switch: one batch norm per bit-width of a layer.",
        choices=("reestimate", "switch"),
    )  # fmt: skip
    step_rates: Mapping[int, float] = option(
        dict, "Factors on the step sizes' learning rate by bit-width: 2=0.1,4=0.3.", above=0, text=FACTORS
    )
    step_rate: float = option(RATE, "Learning rate of step sizes.", above=0, most=FASTEST)
    offset_rate: float = option(0.0, "Learning rate of input offsets; 0 keeps them.", least=0, most=FASTEST)
    rate: float = option(RATE, "Learning rate of weights, biases and batch norm.", above=0, most=FASTEST)

    def check(self) -> None:
        if not self.sandwich or set(self.sandwich) - set("HRL"):
            raise InvalidSetting(f"sandwich {self.sandwich!r} cannot be read. Write the letters H, R and L in any order: HRL.")
        if self.label == "teacher" and sorted(self.sandwich, key="HRL".index) != list(self.sandwich):
            raise InvalidSetting(f"sandwich {self.sandwich!r}: with label teacher the wider network comes first. Write H, then R, then L.")
        for bits in self.step_rates:
            check_bits(bits, "step_rates: bit-width")

    def needs(self) -> list[Need]:
        return [
            Need(("label_weight",), self.label != "one-hot", "with one-hot labels", "--label=adaptive or --label=teacher"),
            Need(("middle",), "R" in self.sandwich, "in a sandwich without R", "--sandwich=HRL"),
            Need(("label",), self.label != "teacher" or len(self.sandwich) > 1, "with one network in the sandwich", "--sandwich=HRL"),
        ]


@documented
@dataclass(frozen=True)
class SearchSettings(Settings):
    """Settings of the search over a supernet's schemes; `methods/subnet_search.py` explains them."""

    common: ClassVar[Mapping[str, Any]] = {"rare": True}

    evaluations: int = option(150, "Number of subnets to evaluate.", least=10, most=10**6, rare=False)
    strategy: str = option(
        "monte-carlo", "uniform: uniform draws, same predictor and search; integer-program: from measured sensitivities.",
        choices=("monte-carlo", "uniform", "integer-program"), rare=False,
    )  # fmt: skip
    quantity: str = option("bits", "Cost axis of the Pareto front.", choices=tuple(cost.name for cost in own_costs()), rare=False)
    images: int = option(2500, "Held-out inputs per evaluation; others measure the front again.", least=1)
    bn_images: int | None = option(None, "Training inputs for batch-norm estimates during the search (default: as in training).", least=2)
    seed: int = option(0, "Random seed.", least=-SEEDS, most=SEEDS, rare=False)
    explored: float = option(0.6, "Share of the evaluations that the predictor is first fitted to.", above=0, below=1, command_line=False)
    rounds: int = option(3, "Rounds of the remaining evaluations: predict, search, evaluate best.", least=1, most=99, command_line=False)
    targets: int = option(20, "Average bit-widths to search for per round.", least=1, most=999, command_line=False)
    population: int = option(100, "Schemes per generation of the genetic search.", least=4, most=10**5, command_line=False)
    generations: int = option(30, "Generations of the genetic search.", least=1, most=10**6, command_line=False)
    mutation: float = option(0.1, "Probability that a layer of a child is redrawn.", above=0, most=1, command_line=False)

    def needs(self) -> list[Need]:
        drawn = ("explored", "rounds", "targets", "population", "generations", "mutation", "seed")
        return [Need(drawn, self.strategy != "integer-program", "with --strategy=integer-program, which draws nothing")]

    @classmethod
    def recorded(cls, report: Mapping[str, Any]) -> Any:
        return super().recorded(report.get("search", report))
