"""Settings of a supernet. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from anybit.data.options import OUTPUTS, TASK_NAMES
from anybit.errors import InvalidSetting
from anybit.loops.settings import TrainSettings
from anybit.methods.settings import MultiQuantSettings
from anybit.scheme import BITS, KEEP, Precision
from anybit.settings import Need, Settings, Text, documented, option


def parse_trained_bits(text: str) -> tuple[int | None, ...]:
    """Parse bit-widths. Raises InvalidSetting for float."""
    bits = BITS.parse(text)
    if None in bits:
        raise InvalidSetting("--bits takes only bit-widths: float has no step size to train. Keep layers float with --keep.")
    return bits


@documented
@dataclass(frozen=True)
class SupernetSettings(Settings):
    """Settings of `train`."""

    bits: tuple[int, ...] = option(
        (2, 4, 6, 8), "Bit-widths of weights and inputs, 2..8.", least=2, most=8, text=Text(parse_trained_bits, BITS.write, BITS.example),
        panel="Budget",
    )  # fmt: skip
    keep: Mapping[str, Precision] = option(
        dict, "PATTERN=W8A8 or PATTERN=float: fix layers by name.", text=KEEP, repeat=True, panel="Budget"
    )
    task: str | None = option(None, "Task of the network (default: from the model).", choices=TASK_NAMES, panel="Input", rare=True)
    outputs: Mapping[str, float] = option(
        dict,
        "NAME or NAME=WEIGHT: outputs to compare (default: all, with equal weights).",
        above=0,
        text=OUTPUTS,
        repeat=True,
        panel="Input",
        rare=True,
    )
    held_out: float = option(0.1, "Share of the data reserved for the search.", above=0, below=1, why="the search evaluates on that share")
    bn_images: int = option(
        4096, "Training inputs for batch-norm statistics, augmented as in training.", rare=True,
        least=2, why="fewer are too few for statistics, and hundreds work well",
    )  # fmt: skip
    multiquant: MultiQuantSettings = field(default_factory=MultiQuantSettings)
    train: TrainSettings = field(default_factory=TrainSettings)

    def check(self) -> None:
        if len(set(self.bits)) < len(self.bits) or len(self.bits) < 2:
            raise InvalidSetting(f"bits {', '.join(map(str, self.bits))}: give at least two bit-widths, each once.")
        if self.multiquant.batch_norm == "switch" and self.train.compile:
            raise InvalidSetting(
                "batch_norm switch cannot be compiled: every scheme would be compiled anew. Use batch_norm reestimate, or drop compile."
            )

    def needs(self) -> list[Need]:
        estimated = self.multiquant.batch_norm == "reestimate"
        untrained = next((bits for bits in self.multiquant.step_rates if bits not in self.bits), None)
        trained = f"for {untrained} bits, of which no step size is trained: --bits={BITS.write(self.bits)}"
        return [
            Need(("step_rates",), untrained is None, trained, f"--bits={BITS.write(sorted({*self.bits, untrained or 2}))}"),
            Need(("bn_images",), estimated, "with --batch-norm=switch, which stores statistics", "--batch-norm=reestimate", amounts=True),
        ]
