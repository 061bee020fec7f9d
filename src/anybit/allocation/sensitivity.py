"""Measure how much each layer's quantization costs in output quality at each bit-width, on held-out unlabelled inputs.

One row per (layer, bits): the distance of the outputs to the float model's (`data.tasks.distance`) with this layer at these bits and every
other one at the base precision, minus that of the base alone. Weights and activations are measured separately; a pair (W, A) is predicted
by the sum of its two rows unless pairs are measured too. One copy of the network serves all rows: each candidate is swapped in and out.

Source: Hubara et al., ICML 2021, section 3.3. Deviation: the paper measures the loss. On the inputs to which the layers were fitted, the
loss is too optimistic, so held-out inputs are used; and the divergence from the float outputs needs no labels.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from anybit.data.batches import Batch
from anybit.data.tasks import Task, distance, outputs_of
from anybit.errors import UnsupportedModel
from anybit.files.cache import Cache
from anybit.networks.candidates import Candidates, apply_scheme, swapped
from anybit.networks.rounding import Grid, round_edges
from anybit.progress import tell, track
from anybit.scheme import FLOAT, Precision, Scheme

Row = tuple[str, Precision]


@dataclass(frozen=True)
class SensitivityTable:
    """(layer, precision) -> predicted rise of the distance above `floor`, the distance with every layer at its base.

    `measured` are the rows as measured: W, A and, if requested, WA.
    """

    measured: Mapping[Row, float]
    base: Precision
    samples: int
    pairs: bool = False
    floor: float = 0.0

    def loss(self, layer: str, precision: Precision) -> float:
        """Return the measured row, or the sum of the weights-only and the activations-only row."""
        if (layer, precision) in self.measured:
            return self.measured[layer, precision]
        return sum(self.measured[layer, part] for part in _parts(precision))

    def total(self, scheme: Scheme) -> float:
        """Predict the distance of a whole scheme: the floor and the sum over layers."""
        return self.floor + sum(self.loss(name, precision) for name, precision in scheme.items())

    def to_json(self) -> dict:
        """Return layer -> precision -> value, with the conditions of the measurement."""
        rows: dict[str, dict[str, float]] = {}
        for (layer, precision), value in self.measured.items():
            rows.setdefault(layer, {})[str(precision)] = value
        return {"base": str(self.base), "samples": self.samples, "pairs": self.pairs, "floor": self.floor, "rows": rows}

    @classmethod
    def from_json(cls, data: Mapping) -> "SensitivityTable":
        """Return the table that `to_json` wrote."""
        rows = {(layer, Precision.parse(text)): value for layer, row in data["rows"].items() for text, value in row.items()}
        return cls(rows, Precision.parse(data["base"]), data["samples"], data["pairs"], data["floor"])


def _parts(precision: Precision) -> list[Precision]:
    parts = [Precision(precision.weight_bits, None), Precision(None, precision.activation_bits)]
    return [part for part in parts if part != Precision()]


def rows_to_measure(choices: Mapping[str, Sequence[Precision]], pairs: bool) -> list[Row]:
    """Return the (layer, precision) rows that the table of `choices` needs."""
    rows: dict[Row, None] = {}
    for layer, precisions in choices.items():
        for precision in precisions:
            for row in [precision] if pairs else _parts(precision):
                rows[layer, row] = None
    return list(rows)


def _completed(precision: Precision, base: Precision) -> Precision:
    """Take the bits that `precision` leaves open from `base`."""
    return Precision(
        base.weight_bits if precision.weight_bits is None else precision.weight_bits,
        base.activation_bits if precision.activation_bits is None else precision.activation_bits,
    )


def measure_sensitivity(
    prepared: nn.Module,
    candidates: Candidates,
    choices: Mapping[str, Sequence[Precision]],
    held_out: list[Batch],
    reference: Tensor,
    task: Task | str,
    base: Precision = FLOAT,
    pairs: bool = False,
    cache: Cache = Cache(),
    edges: Mapping[str, Grid] = {},
) -> SensitivityTable:
    """Measure every row that `choices` (layer -> precisions) needs; `reference` are the float model's outputs on `held_out`.

    A row of weights is measured with the layer's activations at the base, a row of activations with its weights there. The `edges` are
    rounded in every row, as they are in the resulting schemes; the cost of that is in the floor.
    """
    base_scheme = Scheme({name: options[0] if len(options) == 1 else base for name, options in choices.items()})

    @functools.cache  # only created if a row is not cached
    def at_base() -> nn.Module:
        return round_edges(apply_scheme(prepared, base_scheme, candidates), edges)

    def measure() -> float:
        return distance(outputs_of(at_base(), held_out), reference, task)

    def measure_at(layer: str, precision: Precision) -> float:
        with swapped(at_base(), prepared, layer, precision, candidates):
            return measure()

    floor = cache.value("floor", measure, float)
    measured = {}
    for layer, precision in track(rows_to_measure(choices, pairs), "sensitivity", lambda row: f"{row[0]} {row[1]}"):
        if len(choices[layer]) == 1:
            measured[layer, precision] = 0.0  # nothing to choose: its loss is the same in every scheme
            continue
        at = precision if pairs else _completed(precision, base)
        value = cache.value(f"sensitivity of {layer} at {precision}", partial(measure_at, layer, at), float) - floor
        if not value < float("inf"):
            raise UnsupportedModel(
                f"{layer} at {precision} makes the outputs NaN or infinite. Leave it out, or choose another with --keep."
            )
        measured[layer, precision] = value
        tell("sensitivity", layer=layer, precision=str(precision), loss=value)
    return SensitivityTable(measured, base, sum(map(len, held_out)), pairs, floor)
