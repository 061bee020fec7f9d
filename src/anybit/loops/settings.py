"""Settings of the training loop. Imports no torch."""

from dataclasses import dataclass

from anybit.data.options import parse_augmentations
from anybit.settings import Need, Settings, documented, option

SEEDS = 2**32
"""Largest magnitude of a seed; the loop derives a 64-bit seed for each epoch from it."""


@documented
@dataclass(frozen=True)
class TrainSettings(Settings):
    """Settings of every training loop."""

    epochs: int = option(10, "Passes over the training data.", least=1, most=10**6)
    batch_size: int = option(256, "Inputs per training step, over all processes.", least=1)
    seed: int = option(0, "Random seed.", least=-SEEDS, most=SEEDS)
    warmup: float = option(
        0.05, "Share of the run in which learning rates rise; then they fall to zero along a cosine.",
        least=0, below=1, command_line=False,
    )  # fmt: skip
    augment: str = option("", "Images: flip, crop4 (shifts of 4 pixels), flip,crop4 or none.")
    border: str = option(
        "black", "Padding of shifted images: black pixels, or the mean colour (zeros after normalization).",
        choices=("black", "mean"), rare=True,
    )  # fmt: skip
    distill: float = option(0.0, "Weight of the float outputs in the loss.", least=0, most=1)
    half: bool = option(False, "Compute in bfloat16 where safe.", switch=True, panel="Runtime")
    compile: bool = option(False, "Compile the forward pass.", switch=True, panel="Runtime", rare=True)

    def check(self) -> None:
        parse_augmentations(self.augment)

    def needs(self) -> list[Need]:
        shifts = any(name == "crop" for name, _ in parse_augmentations(self.augment))
        parts = parse_augmentations(self.augment)
        change = ("crop", 0) not in parts and len({name for name, _ in parts}) == len(parts)
        return [
            Need(("augment",), change, "as a whole: a shift of 0 changes nothing, and each kind counts once", "--augment=flip,crop4"),
            Need(("border",), shifts, "without shifted images", "--augment=crop4"),
        ]
