"""MultiQuant: one set of weights, trained to serve every bit-width.

    W~ = clamp(round(W / s_b), -2^(b-1), 2^(b-1) - 1) s_b          W shared by all bit-widths b; a step s_b for each b, one per channel
    x~ = (clamp(round(x / s_b) + z_b, 0, 2^b - 1) - z_b) s_b       a step and an integer offset for each b, one per tensor

    LRH step    the gradients of three networks are summed into one update: H, every layer at its highest bits; R, the weights and the
                input of each layer at random bits; L, every layer at its lowest
    label       with one-hot labels the lowest network has the largest loss and gradient, and dominates the shared weights. The online
                adaptive label of class y is the mean softmax of L, R and H over the last epoch's correctly classified samples of y:

                    loss = (1 - a) CE(p, one-hot y) + a CE(p, label y)

Source: Xu, Feng, Zhang, Wang, "MultiQuant: Training Once for Multi-bit Quantization of Neural Networks", IJCAI 2022: shared weights, the
LRH step, the competition that it describes and the idea of the online adaptive label. Its equations were not accessible.

Reconstruction: the label's formula follows online label smoothing (Zhang et al., IEEE TIP 2021) and the same first author's EQ-Net (ICCV
2023), which has a = 0.5; the abstract says that soft labels replace one-hot ones, which is a = 1. EQ-Net's alternative,
`label="teacher"`, is measured as well: R learns from H's outputs and L from R's. A step and an offset per bit-width are EQ-Net's, too.

Deviations:

  * The labels are one-hot unless `label="adaptive"` is set: in runs of up to 8 epochs from trained weights, with one seed each, the online
    adaptive label ended below them at every bit-width, further with a = 1 than with 0.5. The published runs have 200 epochs.
  * Steps are trained as factors, exp of a free number, with Adam, whose updates do not depend on the size of a gradient (so LSQ's gradient
    scale is not needed).
  * In the first epoch, and for a class without a correct sample, there is no label yet, and one-hot is used.
  * Offsets have the least squared error and are fixed; `offset_rate` trains them (LSQ+).
  * Steps are per channel; `per_channel=False` is the original's form.
  * `middle` "worst" and "best" follow AttentiveNAS (Wang et al., CVPR 2021): of a few random networks, the one whose layers' bits had the
    highest or lowest losses so far. "progressive": bits below the highest join one after another in the first half of the run.
"""

import copy
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybit.data.batches import Batch
from anybit.errors import InvalidFile, InvalidSetting
from anybit.files.strict import validated
from anybit.loops.processes import average
from anybit.methods.settings import MultiQuantSettings
from anybit.networks.layers import fill, float_weight, quantized_layers, weight_rows
from anybit.numerics.affine import fake_quantize, quant_limits
from anybit.numerics.quantizers import UniformQuantizer, of_operand
from anybit.scheme import FLOAT_BITS, Precision, Scheme, check_choices

DRAWN = 4
"""Number of networks from which attentive sampling chooses."""


# The quantizers: one tensor for all bit-widths, and the index of the current one


class _Switchable(nn.Module):
    """Steps for several bit-widths. The index is a tensor, so that switching does not recompile a compiled network."""

    start: Tensor
    factors: Tensor
    limits: Tensor
    index: Tensor

    def __init__(self, scales: Mapping[int, Tensor], signed: bool, factors: Mapping[int, float]):
        super().__init__()
        self.widths, self.bits, self.signed = tuple(scales), next(iter(scales)), signed
        start = torch.stack([scale.detach() for scale in scales.values()])
        one_each = (-1, *[1] * (start.dim() - 1))
        self.register_buffer("start", start)
        self.register_buffer("factors", start.new_tensor([factors.get(bits, 1.0) for bits in scales]).view(one_each), persistent=False)
        self.register_buffer("limits", start.new_tensor([quant_limits(bits, signed) for bits in scales]), persistent=False)
        self.register_buffer("index", torch.zeros(1, dtype=torch.int64, device=start.device))
        self.change = nn.Parameter(torch.zeros_like(start))

    def switch(self, bits: int) -> None:
        self.bits = bits
        self.index.fill_(self.widths.index(bits))

    @torch.no_grad()
    def load(self, scales: Tensor) -> None:
        """Replace the steps of every bit-width, [widths, ...]."""
        if not (torch.isfinite(scales).all() and (scales > 0).all()):
            raise InvalidFile("A stored step is not a positive finite number.")
        self.start.copy_(scales)
        self.change.zero_()

    def scales(self) -> Tensor:
        """Return the steps of every bit-width, [widths, ...]; they are products with a factor, so that loaded steps are exact."""
        return self.start * (self.factors * self.change).exp()

    def scale(self) -> Tensor:
        """Return the current step."""
        return self.at_hand(self.scales())

    def at_hand(self, rows: Tensor) -> Tensor:
        """Return the current bit-width's row. (Selected by a tensor: a plain index would become a number and split a compiled graph.)"""
        return rows.index_select(0, self.index).squeeze(0)


class SwitchableWeight(_Switchable):
    """Weight slot of a supernet's layer: bits -> scale [channels, 1] or [1, 1]."""

    def __init__(self, scales: Mapping[int, Tensor], factors: Mapping[int, float] = {}):
        super().__init__(scales, True, factors)

    def forward(self, rows: Tensor) -> Tensor:
        low, high = self.at_hand(self.limits).unbind()
        return fake_quantize(rows, self.scale(), torch.zeros((), device=rows.device), low, high)

    def freeze(self, channels: int) -> UniformQuantizer:
        return UniformQuantizer(self.bits, True, self.scale().expand(channels, 1))


class SwitchableInput(_Switchable):
    """Input slot of a supernet's layer: bits -> (scale, zero point), 0-d each, or [2] each for a matmul's operands.

    Offsets are trained as shares of the range.
    """

    def __init__(self, ranges: Mapping[int, tuple[Tensor, Tensor]], factors: Mapping[int, float] = {}, train_offsets: bool = False):
        super().__init__({bits: scale for bits, (scale, _) in ranges.items()}, False, factors)
        zeros = torch.stack([zero.detach() for _, zero in ranges.values()])
        self.offsets = nn.Parameter(zeros / self.highest(), requires_grad=train_offsets)

    def highest(self) -> Tensor:
        """Return the highest code of every bit-width, with as many dimensions as the offsets."""
        return self.limits[:, 1].view(-1, *[1] * (self.start.dim() - 1))

    def zero_points(self) -> Tensor:
        """Return the integer zero point of every bit-width, [widths, ...], with straight-through gradients."""
        free = self.offsets.clamp(0, 1) * self.highest()
        return free + (free.round() - free).detach()

    def zero_point(self) -> Tensor:
        """Return the current zero point."""
        return self.at_hand(self.zero_points())

    def forward(self, x: Tensor, operand: int | None = None) -> Tensor:
        low, high = self.at_hand(self.limits).unbind()
        return fake_quantize(x, of_operand(self.scale(), operand), of_operand(self.zero_point(), operand), low, high)

    def freeze(self) -> UniformQuantizer:
        return UniformQuantizer(self.bits, False, self.scale(), self.zero_point().detach().round())


class SwitchableNorm(nn.Module):
    """A batch norm per bit-width of the layer before it, all initialised as copies of one."""

    def __init__(self, norm: nn.Module, widths: Sequence[int]):
        super().__init__()
        self.widths, self.bits = tuple(widths), widths[0]
        self.norms = nn.ModuleList([copy.deepcopy(norm) for _ in widths])

    def switch(self, bits: int) -> None:
        self.bits = bits

    def chosen(self) -> nn.Module:
        return self.norms[self.widths.index(self.bits)]

    def forward(self, x: Tensor) -> Tensor:
        return self.chosen()(x)


# The method


def bits_of(precision: Precision) -> tuple[int, int]:
    """Return the sort key of precisions: bits of weight and input together, then the weight's."""
    return precision.stored_weight_bits + (precision.activation_bits or FLOAT_BITS), precision.stored_weight_bits


class MultiQuant:
    """A prepared, unfolded network with switchable quantizers in its slots: the `Trainee` of this method.

    choices     layer -> its possible precisions
    classes     number of classes of a classifier; None uses the task's own loss, whatever the label rule
    """

    def __init__(
        self, model: nn.Module, choices: Mapping[str, Sequence[Precision]], settings: MultiQuantSettings, classes: int | None, seed: int
    ):
        self.model, self.choices, self.settings, self.classes, self.seed = model, choices, settings, classes, seed
        slots = quantized_layers(model)
        self.layers = {name: slots[name] for name in choices}  # in the order of the choices, not of definition
        self.norms: dict[str, SwitchableNorm] = {}
        device = next(model.parameters()).device
        self.right = torch.zeros(classes or 0, classes or 0, device=device)
        self.labels = torch.zeros_like(self.right)
        self.losses: dict[str, dict[str, float]] = {name: {} for name in choices}
        self.progress, self.letter = 0.0, ""
        self.wider: Tensor | None = None
        self.highest = Scheme({name: max(options, key=bits_of) for name, options in choices.items()})
        self.lowest = Scheme({name: min(options, key=bits_of) for name, options in choices.items()})
        self.scheme = self.highest
        self.switch(self.highest)

    def switch(self, scheme: Scheme) -> None:
        """Switch the network to `scheme`, in place. Raises SchemeMismatch if a precision was not trained."""
        check_choices(scheme, self.choices)
        for name, precision in scheme.items():
            weights, inputs = self.layers[name].weight_quantizer, self.layers[name].input_quantizer
            if isinstance(weights, SwitchableWeight):
                assert precision.weight_bits is not None  # the layer's choices all have bits
                weights.switch(precision.weight_bits)
            if isinstance(inputs, SwitchableInput):
                assert precision.activation_bits is not None
                inputs.switch(precision.activation_bits)
            if name in self.norms:
                assert precision.weight_bits is not None
                self.norms[name].switch(precision.weight_bits)
        self.scheme = self.scheme.replace(scheme)

    def switch_norms(self, norms: Mapping[str, str]) -> None:
        """Replace each batch norm that follows a layer (layer -> norm) by one for each of the layer's bit-widths."""
        for layer, name in norms.items():
            widths = getattr(self.layers[layer].weight_quantizer, "widths", ()) if layer in self.layers else ()
            if len(widths) > 1:
                self.norms[layer] = SwitchableNorm(self.model.get_submodule(name), widths)
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, self.norms[layer])
        self.switch(self.scheme)

    # The step

    def before_step(self, progress: float) -> list[nn.Parameter]:
        """Store the progress of the run, on which draws depend besides the seed."""
        self.progress = progress
        return []

    def passes(self) -> Iterator[None]:
        """Switch to the networks of one step, one after another, and yield for each."""
        generator = random.Random(f"{self.seed} {self.progress!r}")
        self.wider = None
        for letter in self.settings.sandwich:
            self.letter = letter
            self.switch({"H": self.highest, "L": self.lowest}.get(letter) or self.middle(generator))
            yield
        self.wider = None

    def middle(self, generator: random.Random) -> Scheme:
        """Return the scheme of R: random bits for each layer's weights and input, chosen independently unless `middle` says otherwise."""
        if self.settings.middle not in ("worst", "best"):
            return self.drawn(generator)
        known = [(self.expected_loss(scheme), scheme) for scheme in (self.drawn(generator) for _ in range(DRAWN))]
        pick = max if self.settings.middle == "worst" else min
        return pick(known, key=lambda pair: pair[0])[1]

    def drawn(self, generator: random.Random) -> Scheme:
        """Return a scheme drawn uniformly; with progressive shrinking, from the precisions that have joined."""
        scheme = {}
        for name, options in self.choices.items():
            options = sorted(options, key=bits_of)
            if self.settings.middle == "progressive":
                joined = 1 + math.floor(min(1.0, 2 * self.progress) * (len(options) - 1))
                options = options[-joined:]
            scheme[name] = generator.choice(options)
        return Scheme(scheme)

    def expected_loss(self, scheme: Scheme) -> float:
        """Return the sum over layers of the mean loss so far at this precision of the layer."""
        return sum(self.losses[name].get(str(precision), 0.0) for name, precision in scheme.items())

    def loss(self, outputs: Tensor, batch: Batch, task_loss: Tensor) -> Tensor:
        """Return the loss of the current network, by the label rule."""
        loss = self._labelled(outputs, batch, task_loss)
        if self.letter == "R" and self.settings.middle in ("worst", "best"):
            mean = float(average(loss.detach()))  # averaged, so that all processes draw alike
            for name, precision in self.scheme.items():
                row = self.losses[name]
                row[str(precision)] = 0.9 * row.get(str(precision), mean) + 0.1 * mean
        return loss

    def _labelled(self, outputs: Tensor, batch: Batch, task_loss: Tensor) -> Tensor:
        rule, share = self.settings.label, self.settings.label_weight
        labels = batch.labels if isinstance(batch.labels, Tensor) else None
        if rule == "adaptive" and labels is None:
            raise InvalidSetting(
                "The adaptive label needs labels, and this data has none. Give labelled data, or label teacher or one-hot."
            )
        if self.classes is None or rule == "one-hot":
            return task_loss
        log_p = F.log_softmax(outputs.float(), -1)
        if rule == "teacher" or labels is None:  # only the teacher works without labels
            wider, self.wider = self.wider, log_p.detach()
            if wider is None:
                return task_loss
            return (1 - share) * task_loss + share * F.kl_div(log_p, wider, log_target=True, reduction="batchmean")
        with torch.no_grad():
            right = log_p.argmax(-1) == labels
            self.right.index_add_(0, labels, log_p.exp() * right[:, None])
            soft = self.labels[labels]
            soft = torch.where(soft.sum(-1, keepdim=True) > 0, soft, F.one_hot(labels, self.classes).to(soft.dtype))
        return (1 - share) * task_loss - share * (soft * log_p).sum(-1).mean()

    def end_of_epoch(self) -> None:
        """Compute the online adaptive labels of the next epoch from this epoch's correct predictions."""
        counts = self.right.sum(-1, keepdim=True)
        self.labels.copy_(torch.where(counts > 0, self.right / counts.clamp_min(1e-12), torch.zeros_like(self.right)))
        self.right.zero_()

    def penalty(self) -> Tensor:
        """Return zero: every network has its bits from the start."""
        return torch.zeros(())

    def parameter_groups(self) -> list[dict[str, Any]]:
        switchable = [m for m in self.model.modules() if isinstance(m, _Switchable)]
        steps = [m.change for m in switchable]
        offsets = [m.offsets for m in switchable if isinstance(m, SwitchableInput) and m.offsets.requires_grad]
        taken = {id(parameter) for parameter in (*steps, *offsets)}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in taken]
        rates = self.settings
        groups = ((steps, rates.step_rate), (offsets, rates.offset_rate), (others, rates.rate))
        return [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters]

    # Reports and state of the training

    def summary(self) -> dict[str, Any]:
        """Return how certain the labels are: the mean share of the right class."""
        sure = self.labels.diagonal()[self.labels.sum(-1) > 0] if self.classes else self.labels
        return {"label_confidence": float(sure.mean()) if sure.numel() else None}

    def state(self) -> dict[str, Tensor]:
        """Return the tensors from which the online labels are computed."""
        return {"right": self.right, "labels": self.labels}

    def decisions(self) -> dict[str, Any]:
        """Return the losses on which attentive sampling depends."""
        return {"losses": self.losses}

    def restore(self, decisions: Mapping[str, Any]) -> None:
        losses = validated(dict[str, dict[str, dict[str, float]]], decisions, "the decisions").get("losses", {})
        if set(losses) != set(self.losses):
            raise InvalidFile("the decisions belong to other layers")
        self.losses = losses

    @torch.no_grad()
    def freeze(self, model: nn.Module) -> None:
        """Put the current network into the slots of `model`, a copy of this one: uniform quantizers and plain batch norms."""
        for layer in quantized_layers(model).values():
            weights, inputs = layer.weight_quantizer, layer.input_quantizer
            if isinstance(weights, SwitchableWeight):
                weights = weights.freeze(len(weight_rows(layer, float_weight(layer))))
            fill(layer, weights, inputs.freeze() if isinstance(inputs, SwitchableInput) else inputs)
        for name, module in list(model.named_modules()):
            if isinstance(module, SwitchableNorm):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.chosen())
