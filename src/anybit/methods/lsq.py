"""LSQ: quantization-aware training of a fixed scheme, with learned steps.

    W~ = clamp(round(W / s), quant_min, quant_max) s         s one a channel, trained with W; gradients as `numerics` states them

The scheme is given: uniform, or one that another road chose. It is what a grown scheme is compared with, and it trains any run further.

Source: Esser, McKinstry, Bablani, Appuswamy, Modha, "Learned Step Size Quantization", ICLR 2020, eq. 1 to 3. Deviations: a step a channel
(the paper has one a layer); its logarithm is trained with Adam, whose steps do not depend on the gradient's size, so the paper's gradient
scale has no part; steps start from the range of least squared error.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from anybit.data.batches import Batch
from anybit.methods.settings import LSQSettings
from anybit.networks.cost import CostModel
from anybit.networks.layers import Pruned, fill, float_weight, quantized_layers, weight_rows
from anybit.numerics.affine import fake_quantize
from anybit.numerics.quantizers import LearnedInput, UniformQuantizer
from anybit.numerics.ranges import weight_scale
from anybit.scheme import Scheme


class LearnedStep(nn.Module):
    """The weight slot of a layer while it is trained: the layer's own weight, rounded to learned steps."""

    def __init__(self, quantizer: UniformQuantizer):
        super().__init__()
        self.bits, self.limits = quantizer.bits, quantizer.limits
        self.log_scale = nn.Parameter(quantizer.scale.log())

    def forward(self, rows: Tensor) -> Tensor:
        return fake_quantize(rows, self.log_scale.exp(), torch.zeros((), device=rows.device), *self.limits)

    def freeze(self) -> UniformQuantizer:
        return UniformQuantizer(self.bits, True, self.log_scale.exp())


class LSQ:
    """A prepared, unfolded network trained at `scheme`: what `training.train` needs to know of the method."""

    def __init__(self, model: nn.Module, scheme: Scheme, costs: CostModel, settings: LSQSettings):
        self.model, self.scheme, self.costs, self.settings = model, scheme, costs, settings
        for name, precision in scheme.items():
            layer = model.get_submodule(name)
            if precision.weight_bits:
                scale = weight_scale(weight_rows(layer, float_weight(layer)).detach(), precision.weight_bits)
                layer.weight_quantizer = LearnedStep(UniformQuantizer(precision.weight_bits, True, scale))
            elif precision.weight_bits == 0:
                layer.weight_quantizer = Pruned()

    def parameter_groups(self) -> list[dict[str, Any]]:
        scales = [module.log_scale for module in self.model.modules() if isinstance(module, (LearnedStep, LearnedInput))]
        taken = {id(parameter) for parameter in scales}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in taken]
        groups = ((scales, self.settings.scale_rate), (others, self.settings.rate))
        return [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters]

    def at(self, progress: float) -> list[nn.Parameter]:
        """Nothing depends on the share of the run that is done."""
        return []

    def end_epoch(self) -> None:
        """Nothing is decided on the way."""

    def passes(self) -> Iterator[None]:
        """One, of the network as it is."""
        yield

    def loss(self, outputs: Tensor, batch: Batch, task_loss: Tensor) -> Tensor:
        """The task's."""
        return task_loss

    def penalty(self) -> Tensor:
        """None: the budget is met from the start."""
        return torch.zeros(())

    def record(self) -> dict[str, Any]:
        return {"weight_bits": self.costs.weight_bits(self.scheme), "layers": {n: p.weight_bits for n, p in self.scheme.items()}}

    def state(self) -> dict[str, Tensor]:
        """None: all is in the network."""
        return {}

    def decisions(self) -> dict[str, Any]:
        return {}

    def restore(self, decisions: Mapping[str, Any]) -> None:
        """There is nothing to take back."""

    @torch.no_grad()
    def freeze(self, model: nn.Module) -> None:
        """Put uniform quantizers into the slots of `model`, a copy of this one, in place of the learned steps."""
        for layer in quantized_layers(model).values():
            weights, inputs = layer.weight_quantizer, layer.input_quantizer
            frozen = weights.freeze() if isinstance(weights, LearnedStep) else weights
            fill(layer, frozen, inputs.freeze() if isinstance(inputs, LearnedInput) else inputs)
