"""The interface between the training loop and a method, and the loop's settings."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from anybit.data.augment import parse_augmentations
from anybit.data.batches import Batch
from anybit.errors import InvalidSetting

SMALLEST_GAMMA = 1e-5


class Trainee(Protocol):
    """A method as the loop sees it. `model` is prepared and unfolded; nothing else of it is known here."""

    model: nn.Module

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return Adam's groups: params and lr."""

    def before_step(self, progress: float) -> list[nn.Parameter]:
        """Set what depends on the share of the run that is done; returns re-initialised parameters, whose optimizer state is dropped."""

    def end_of_epoch(self) -> None:
        """Decide what is decided between epochs."""

    def passes(self) -> Iterator[None]:
        """Set the network for one forward and backward pass after another; their gradients are summed into one update."""

    def loss(self, outputs: Tensor, batch: Batch, task_loss: Tensor) -> Tensor:
        """Return the loss of a pass, 0-d, from the task's."""

    def penalty(self) -> Tensor:
        """Return what is added to each pass's loss, 0-d."""

    def summary(self) -> dict[str, Any]:
        """Return the method's part of an epoch's record."""

    def state(self) -> dict[str, Tensor]:
        """Return tensors of the method's own: averaged over the processes before `end_of_epoch`, stored in checkpoints."""

    def decisions(self) -> dict[str, Any]:
        """Return what was decided on the way, as JSON."""

    def restore(self, decisions: Mapping[str, Any]) -> None:
        """Take `decisions` back."""

    def freeze(self, model: nn.Module) -> None:
        """Put uniform quantizers into the slots of `model`, a copy of its own."""


@dataclass(frozen=True)
class TrainSettings:
    """epochs, batch_size (of all processes together), seed
    warmup         share of the run in which learning rates rise; afterwards they fall to zero along a cosine
    augment        of 4-d inputs: "flip" (mirror images), "crop4" (shifts by up to 4 pixels), joined by commas
    distill        weight of the divergence from the float model's outputs in the loss; the rest is the labels'
    half           compute in bfloat16 where autocast finds it safe
    compile        compile the training step's forward pass
    """

    epochs: int = 10
    batch_size: int = 256
    seed: int = 0
    warmup: float = 0.05
    augment: str = ""
    distill: float = 0.0
    half: bool = False
    compile: bool = False

    def __post_init__(self):
        if self.epochs < 1 or self.batch_size < 1:
            raise InvalidSetting(f"epochs {self.epochs} and batch size {self.batch_size} must be at least 1.")
        if not 0 <= self.distill <= 1 or not 0 <= self.warmup < 1:
            raise InvalidSetting(f"distill {self.distill} must be from 0 to 1, warmup {self.warmup} from 0 to below 1.")
        parse_augmentations(self.augment)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
