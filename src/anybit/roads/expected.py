"""Expected time of each stage of a road: its share of the whole from the start, and seconds after a forward pass was timed.

The constants were fitted to calibrations of a small residual network on digits and of ResNet-20, on one core. Finished stages correct the
time left, so that only proportions matter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from anybit.allocation.sensitivity import rows_to_measure
from anybit.methods.hawq import PRODUCTS
from anybit.methods.table import rounding_named
from anybit.networks.layer_types import LAYER_TYPES
from anybit.networks.observed import ObservedNetwork
from anybit.roads.settings import CalibrateSettings

Stages = list[tuple[str, float]]

GUESS = 1e-3
"""Seconds of a sample's forward pass until one is timed; only proportions depend on it."""
TRAINING = 5
"""Forward passes equal to one training step of a sample, with its capture and measurement."""
LAYER = 0.1
"""Seconds per layer, besides passes, for estimating ranges; solving for its codes takes twice as long."""
OBSERVED = 0.3
TUNED = 4
"""Expected epochs of bias tuning, which ends early."""


def layers_of(model: nn.Module) -> int:
    """Return how many modules may become layers, before any has run."""
    kinds = tuple(kind for one in LAYER_TYPES for kind in one.classes)
    return max(sum(isinstance(module, kinds) for module in model.modules()), 1)


@dataclass(frozen=True)
class Calibration:
    """Sizes that determine the length of each stage. `rows`: measurements of sensitivity; `forward`: seconds of a sample's forward pass."""

    settings: CalibrateSettings
    fitting: int
    held_out: int
    tests: int
    budgets: int
    layers: int
    rows: int
    has_norms: bool
    forward: float = GUESS

    @classmethod
    def of_model(cls, model: nn.Module, settings: CalibrateSettings, samples: int, tests: int, budgets: int) -> "Calibration":
        """Return the expectation before the network has run, from its number of modules."""
        held_out = round(samples * settings.held_out)
        layers = layers_of(model)
        rows = layers * (len(settings.weight_bits) + len(settings.activation_bits))
        has_norms = any("BatchNorm" in type(module).__name__ for module in model.modules())
        return cls(settings, samples - held_out, held_out, tests, budgets, layers, rows, has_norms)

    @classmethod
    def of_network(
        cls, network: ObservedNetwork, settings: CalibrateSettings, counts: tuple[int, int], tests: int, budgets: int, forward: float
    ) -> "Calibration":
        """Return the expectation after the network was observed and `forward` timed. `counts`: fitting and held-out samples."""
        rows = sum(len(network.choices[layer]) > 1 for layer, _ in rows_to_measure(network.choices, settings.pairs))
        return cls(settings, *counts, tests, budgets, len(network.choices), rows, bool(network.norms), forward)

    def stages(self) -> Stages:
        """Return every stage with its expected seconds, in order."""
        settings, widths = self.settings, len(self.settings.weight_bits)
        train = TRAINING * self.forward * settings.step_batch
        rounding = rounding_named(settings.rounding).__name__
        stages = [
            ("observe and fold", OBSERVED),
            ("float outputs", self.passes(self.fitting + self.held_out)),
            *([("float test", self.passes(self.tests))] if self.tests else []),
            ("ranges", self.passes(4 * self.fitting) + LAYER * self.layers),
        ]
        if settings.solver != "none":
            stages.append(("solution of candidates", self.passes(2 * self.fitting) + 2 * LAYER * self.layers))
        if settings.bn_tuning and self.has_norms:
            stages.append(("matching of candidates", self.passes(widths * self.fitting)))
        if settings.does("parallel"):
            stages.append((f"parallel {rounding}", train * settings.candidate_steps * widths))
        passes = self.rows if settings.sensitivity == "measured" else TRAINING * PRODUCTS
        stages.append(("sensitivity", self.passes(passes * self.held_out)))
        return stages + self._of_a_budget(rounding, train) * self.budgets

    def of_allocation(self) -> Stages:
        """Return the stages of another budget from finished candidates."""
        tests = [("float test", self.passes(self.tests))] if self.tests else []
        return [("observe and fold", OBSERVED), *tests, *self._of_a_budget(rounding_named(self.settings.rounding).__name__, 0.0)]

    def of_polish(self) -> Stages:
        """Return the stages of polishing alone."""
        rounding, train = rounding_named(self.settings.rounding).__name__, TRAINING * self.forward * self.settings.step_batch
        return [stage for stage in self._of_a_budget(rounding, train) if stage[0] not in ("allocation", "test")]

    def _of_a_budget(self, rounding: str, train: float) -> Stages:
        settings, tried = self.settings, 2 * self.settings.alternatives
        stages = [("allocation", self.passes(tried * self.held_out)), ("polish", self.passes(2 * self.held_out))]
        if settings.does("sequential"):
            stages.append((f"sequential {rounding}", train * settings.steps))
        elif settings.solver != "none":
            stages.append(("sequential solution", self.passes(4 * self.fitting) + 2 * LAYER * self.layers))
        if settings.bn_tuning and self.has_norms:
            stages.append(("batch-norm tuning", self.passes(2 * self.fitting)))
        if settings.does("bias_tuning"):
            stages.append(("bias tuning", self.passes(TUNED * (3 * self.fitting + self.held_out))))
        stages.append(("edge ranges", self.passes(3 * self.fitting)))
        return stages + ([("test", self.passes(self.tests))] if self.tests else [])

    def passes(self, samples: int) -> float:
        """Return the seconds of this many samples' forward passes."""
        return self.forward * samples


def training_stages(samples: int, epochs: int, tests: int, last: Sequence[str]) -> Stages:
    """Return the stages of a training in proportion: an update takes three passes, each of the `last` stages one over the data."""
    ends = [(name, float(tests or samples if name == "test" else samples)) for name in last]
    return [("observe and fold", samples / 10), ("training", epochs * (3.0 * samples + tests)), *ends]


def search_stages(evaluations: int, front: int, statistics: tuple[int, int], images: int) -> Stages:
    """Return the stages of a search in proportion. An evaluation estimates batch norm on the first of `statistics` samples and passes over
    `images`; each subnet of the `front` does so on the second, and its statistics are stored."""
    few, whole = statistics
    seconds = {"evaluations": evaluations * (few + images), "front": front * (whole + images), "statistics": front * whole}
    return [(name, GUESS * count) for name, count in seconds.items()]


def extract_stages(samples: int, tests: int, polish: Stages) -> Stages:
    """Return the stages of an extraction in proportion: batch norm estimated on `samples`, `polish`, the test."""
    return [("extract", GUESS * samples), *polish, *([("test", GUESS * tests)] if tests else [])]
