"""The interface between the training loop and a method."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, Self

from torch import Tensor, nn

from anybit.budget import Budget
from anybit.data.batches import Batch
from anybit.networks.observed import ObservedNetwork
from anybit.scheme import Precision

SMALLEST_GAMMA = 1e-5


class Trainee(Protocol):
    """A method as the loop sees it. `model` is prepared and unfolded; the loop knows nothing else about it."""

    model: nn.Module

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return Adam's groups: params and lr."""

    def before_step(self, progress: float) -> list[nn.Parameter]:
        """Set values that depend on the completed share of the run; returns re-initialised parameters, whose optimizer state is dropped."""

    def end_of_epoch(self) -> None:
        """Make the decisions that fall between epochs."""

    def passes(self) -> Iterator[None]:
        """Set up the network for one forward and backward pass after another; their gradients are summed into one update."""

    def loss(self, outputs: Tensor, batch: Batch, task_loss: Tensor) -> Tensor:
        """Return the loss of a pass, 0-d, given the task's loss."""

    def penalty(self) -> Tensor:
        """Return the penalty that is added to each pass's loss, 0-d."""

    def summary(self) -> dict[str, Any]:
        """Return the method's part of an epoch's record."""

    def state(self) -> dict[str, Tensor]:
        """Return the method's own tensors: averaged over the processes before `end_of_epoch`, and stored in checkpoints."""

    def decisions(self) -> dict[str, Any]:
        """Return the decisions so far, as JSON."""

    def restore(self, decisions: Mapping[str, Any]) -> None:
        """Restore `decisions`."""

    def freeze(self, model: nn.Module) -> None:
        """Put uniform quantizers into the slots of `model`, a copy of its own."""


class GrowMethod(Trainee, Protocol):
    """A trainee of the grow road; `settings` are the method's own, from the field of `GrowSettings` that has its name.

    needs_scheme   whether it trains a scheme; else it finds one
    """

    needs_scheme: bool

    @staticmethod
    def layer_choices(settings: Any, activation_bits: int | None) -> list[Precision]:
        """Return the precisions that a layer may end with, by rising weight bits."""

    @staticmethod
    def check_budget(budget: Budget, network: ObservedNetwork) -> None:
        """Raise InvalidSetting if the method cannot meet `budget`; infeasible budgets are refused elsewhere."""

    @classmethod
    def attach(cls, model: nn.Module, network: ObservedNetwork, budget: Budget | None, settings: Any) -> Self:
        """Put the method's quantizers into the weight slots of `model`, prepared and unfolded; `network` has each layer's choices."""
