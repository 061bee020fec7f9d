"""LSQ: quantization-aware training of a fixed scheme, with learned steps.

    W~ = clamp(round(W / s), quant_min, quant_max) s         s one a channel, trained with W; gradients as `numerics` states them

The scheme is fixed: uniform, or chosen by another road. LSQ is the baseline for grown schemes, and trains any run further.

Source: Esser, McKinstry, Bablani, Appuswamy, Modha, "Learned Step Size Quantization", ICLR 2020, eq. 1 to 3. Deviations: one step per
channel (in the paper one per layer); its logarithm is trained with Adam, whose steps do not depend on the gradient's size, so that the
paper's gradient scale is not needed; steps start from the range of least squared error.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from anybit.budget import Budget
from anybit.data.batches import Batch
from anybit.methods.settings import LSQSettings
from anybit.networks.cost import CostModel
from anybit.networks.layers import Pruned, float_weight, freeze_slots, quantized_layers, weight_rows
from anybit.networks.observed import ObservedNetwork
from anybit.numerics.affine import fake_quantize
from anybit.numerics.quantizers import LearnedInput, UniformQuantizer
from anybit.numerics.ranges import weight_scale
from anybit.scheme import Precision, Scheme


class LearnedStep(nn.Module):
    """Weight slot of a layer during training: the layer's own weight, rounded to learned steps."""

    def __init__(self, quantizer: UniformQuantizer):
        super().__init__()
        self.bits, self.limits = quantizer.bits, quantizer.limits
        self.log_scale = nn.Parameter(quantizer.scale.log())

    def forward(self, rows: Tensor) -> Tensor:
        return fake_quantize(rows, self.log_scale.exp(), torch.zeros((), device=rows.device), *self.limits)

    def freeze(self, rows: Tensor) -> tuple[Tensor, UniformQuantizer]:
        """Return the rounded weight and its quantizer."""
        return self(rows), UniformQuantizer(self.bits, True, self.log_scale.exp())


class LSQ:
    """A prepared, unfolded network trained at `scheme`: a `Trainee` of the grow road."""

    needs_scheme = True

    def __init__(self, model: nn.Module, scheme: Scheme, costs: CostModel, settings: LSQSettings):
        self.model, self.scheme, self.costs, self.settings = model, scheme, costs, settings
        for name, precision in scheme.items():
            layer = model.get_submodule(name)
            if precision.weight_bits:
                scale = weight_scale(weight_rows(layer, float_weight(layer)).detach(), precision.weight_bits)
                layer.weight_quantizer = LearnedStep(UniformQuantizer(precision.weight_bits, True, scale))
            elif precision.weight_bits == 0:
                layer.weight_quantizer = Pruned()

    @staticmethod
    def layer_choices(settings: LSQSettings, activation_bits: int | None) -> list[Precision]:
        """Return the precisions that a scheme may give a layer."""
        return [Precision(bits, activation_bits) for bits in range(2, 9)]

    @staticmethod
    def check_budget(budget: Budget, network: ObservedNetwork) -> None:
        """Do nothing: a scheme replaces the budget."""

    @classmethod
    def attach(cls, model: nn.Module, network: ObservedNetwork, budget: Budget | None, settings: LSQSettings) -> "LSQ":
        """Put learned steps into the weight slots of `model`, at the single precision of each layer of `network`; `budget` is unused."""
        return cls(model, Scheme({name: options[0] for name, options in network.choices.items()}), network.costs, settings)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return scales and all other parameters, each with their rate."""
        scales = [module.log_scale for module in self.model.modules() if isinstance(module, (LearnedStep, LearnedInput))]
        taken = {id(parameter) for parameter in scales}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in taken]
        groups = ((scales, self.settings.scale_rate), (others, self.settings.rate))
        return [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters]

    def before_step(self, progress: float) -> list[nn.Parameter]:
        """Do nothing: nothing depends on the progress of the run."""
        return []

    def end_of_epoch(self) -> None:
        """Do nothing: nothing is decided between epochs."""

    def passes(self) -> Iterator[None]:
        """Yield once, with the network unchanged."""
        yield

    def loss(self, outputs: Tensor, batch: Batch, task_loss: Tensor) -> Tensor:
        """Return the task's loss."""
        return task_loss

    def penalty(self) -> Tensor:
        """Return zero: the scheme has its bits from the start."""
        return torch.zeros(())

    def summary(self) -> dict[str, Any]:
        """Return the scheme's weight bits, as a mean and layer by layer."""
        return {"weight_bits": self.costs.weight_bits(self.scheme), "layers": {n: p.weight_bits for n, p in self.scheme.items()}}

    def state(self) -> dict[str, Tensor]:
        """Return nothing: all state is in the network."""
        return {}

    def decisions(self) -> dict[str, Any]:
        """Return nothing: the scheme is fixed."""
        return {}

    def restore(self, decisions: Mapping[str, Any]) -> None:
        """Do nothing: there are no decisions."""

    def freeze(self, model: nn.Module) -> None:
        """Put uniform quantizers into the slots of `model`, a copy of this one, in place of the learned steps."""
        for layer in quantized_layers(model).values():
            freeze_slots(layer)
