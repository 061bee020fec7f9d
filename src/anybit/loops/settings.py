"""Settings of the training loop. Imports no torch."""

from dataclasses import dataclass

from anybit.data.options import parse_augmentations
from anybit.settings import Settings, documented, option

SEEDS = 2**32
"""Seeds are within this, either way: the loop makes a seed for each epoch of one, in 64 bits."""


@documented
@dataclass(frozen=True)
class TrainSettings(Settings):
    """How any method is trained."""

    epochs: int = option(10, "Passes over the training data.", least=1, most=10**6)
    batch_size: int = option(256, "Inputs a training step, of all processes together.", least=1)
    seed: int = option(0, "Seed of every draw.", least=-SEEDS, most=SEEDS)
    warmup: float = option(
        0.05, "Share of the run in which learning rates rise; afterwards they fall to zero along a cosine.",
        least=0, below=1, command_line=False,
    )  # fmt: skip
    augment: str = option("", "Of pictures: flip, crop4 (shifts by up to 4 pixels), or flip,crop4.")
    distill: float = option(0.0, "Weight in the loss of the float outputs; the labels have the rest.", least=0, most=1)
    half: bool = option(False, "Compute in bfloat16 where that is safe.", switch=True, panel="Runtime")
    compile: bool = option(False, "Compile the forward pass.", switch=True, panel="Runtime", rare=True)

    def check(self) -> None:
        parse_augmentations(self.augment)
