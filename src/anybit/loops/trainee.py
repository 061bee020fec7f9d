"""The interface between the training loop and a method."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from anybit.data.batches import Batch

SMALLEST_GAMMA = 1e-5


class Trainee(Protocol):
    """What a method tells the loop. `model` is prepared and unfolded; nothing else of it is known here."""

    model: nn.Module

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Adam's groups: params and lr."""

    def at(self, progress: float) -> list[nn.Parameter]:
        """Called before each step with the share of the run that is done; returns parameters that it set anew, whose momentum is void."""

    def end_epoch(self) -> None:
        """Called after each epoch."""

    def passes(self) -> Iterator[None]:
        """Set the network for one forward and backward pass after another; their gradients are summed into one update."""

    def loss(self, outputs: Tensor, batch: Batch, task_loss: Tensor) -> Tensor:
        """The loss of a pass, 0-d, given the task's."""

    def penalty(self) -> Tensor:
        """Added to each pass's loss, 0-d."""

    def record(self) -> dict[str, Any]:
        """What an epoch's record tells of the method."""

    def state(self) -> dict[str, Tensor]:
        """Tensors of the method's own: averaged over the processes before `end_epoch`, kept in checkpoints."""

    def decisions(self) -> dict[str, Any]:
        """What was decided on the way, as JSON."""

    def restore(self, decisions: Mapping[str, Any]) -> None:
        """Take `decisions` back."""

    def freeze(self, model: nn.Module) -> None:
        """Put uniform quantizers into the slots of `model`, a copy of its own."""
