"""MSQ: a mixed-precision scheme that grows during training, by pulling bits to zero and dropping them; one float tensor per weight.

    W~ = clamp(round(W / s), quant_min, quant_max) s              s one per channel, trained with W; gradients as `numerics` states them
    B  = W / r - nearest code of n - 1 bits,   r = 2^(n-1) s      the least significant bit of a weight of n bits, as a number
    L  = L_task + lambda * sum over weights of |B|                the pull; its straight-through gradient is the sign of B
    cost of n bits = sum over rows of F |W - W~_n|^2              F = mean squared gradient of a row, in place of the Hessian

Training starts with `start_bits` everywhere. Over its first part (`dropping`), a limit falls from that scheme's size to the budget in
`drops` rounds. In each round, layers lose the bits that cost least among all choices that bring the scheme below the limit: one integer
program, which may take several bits from a layer at once. In the last round, bits may return where others leave room. Then the scheme is
fixed, and the rest of the run trains weights and steps at it, as LSQ does; CSQ needs a second run for that (`--scheme=RUN`).

Source: Han, Yoon, Kim, Wang, Jeon, Yang, Ko, "MSQ: Memory-Efficient Bit Sparsification Quantization", ICCV 2025 (arXiv 2507.22349);
from its abstract and notes on it, not from its text or code. Published, second-hand and not reproduced here: ResNet-20 on CIFAR-10 92.15 at
a 20.13-fold reduction (bits without sign, as CSQ counts them). Deviations:

  * Steps are learned, one per channel, and a code has a sign (published: weights normalized to 0..1, a fixed grid). r is the range of the
    codes, so that the pull on a weight does not depend on its layer's bits; its gradient to the step is omitted. The published lambda is
    unknown.
  * When bits are dropped, the step restarts from the range of least squared error (published: the grid of even codes).
  * The budget determines which bits are dropped, and when. Published: a layer loses one bit when few of its last bits are nonzero, or
    several when its Hessian's trace is small, until the whole network is small enough, so that the last drop decides how far it ends below.
  * F is a moving average of the squared gradients of batches, which training computes anyway, in place of the Hessian's trace. The pull's
    gradient is included.
  * Budgets count two's-complement bits, every layer by its weights, as everywhere in anybit. No layer is pruned.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from anybit.allocation.program import allocate, make_problem
from anybit.allocation.sensitivity import SensitivityTable
from anybit.budget import Budget, Condition, bits_above, check_counts_weights, check_within
from anybit.data.batches import Batch
from anybit.errors import InvalidFile
from anybit.files.strict import validated
from anybit.methods.settings import MSQSettings
from anybit.networks.cost import CostModel
from anybit.networks.layers import Pruned, float_weight, freeze_slots, quantized_layers, weight_rows
from anybit.networks.observed import ObservedNetwork
from anybit.numerics.affine import fake_quantize, quant_limits
from anybit.numerics.quantizers import LearnedInput, UniformQuantizer
from anybit.numerics.ranges import weight_scale
from anybit.progress import tell
from anybit.scheme import FLOAT, Precision, Scheme

MEMORY = 0.95
"""Share of the squared gradients' moving average that remains in each step."""
CANDIDATES = 20
"""Number of ranges to try for the steps of fewer bits, which are then trained further."""


class ShrinkingWeight(nn.Module):
    """Weight slot of a layer during training: the layer's own weight, rounded to learned steps with ever fewer bits.

    log_scale  log s, [channels, 1]
    limits     lowest and highest code, [2]: a tensor, so that dropping bits does not recompile a compiled network
    """

    limits: Tensor

    def __init__(self, rows: Tensor, bits: int):
        super().__init__()
        self.log_scale = nn.Parameter(weight_scale(rows, bits).log())
        self.register_buffer("limits", rows.new_zeros(2), persistent=False)
        self.set_bits(bits)

    def set_bits(self, bits: int) -> None:
        """Set the number of bits, and with it the range of the codes."""
        self.bits = bits
        self.limits.copy_(torch.tensor(quant_limits(bits, signed=True)))

    @torch.no_grad()
    def change(self, rows: Tensor, bits: int) -> None:
        """Continue with `bits`, and steps of least squared error for `rows`."""
        self.set_bits(bits)
        self.log_scale.copy_(weight_scale(rows, bits, candidates=CANDIDATES).log())

    def forward(self, rows: Tensor) -> Tensor:
        return fake_quantize(rows, self.log_scale.exp(), torch.zeros((), device=rows.device), self.limits[0], self.limits[1])

    def last_bits(self, rows: Tensor) -> Tensor:
        """Return B of each weight, as a share of the range, with straight-through gradients to the weights."""
        scale = self.log_scale.detach().exp()
        with torch.no_grad():
            lower = fake_quantize(rows, 2 * scale, torch.zeros((), device=rows.device), *quant_limits(self.bits - 1, signed=True))
        return (rows - lower) / (scale * 2 ** (self.bits - 1))

    @torch.no_grad()
    def errors(self, rows: Tensor, bits: int) -> Tensor:
        """Return the squared error of each row at this many bits, [channels], with the trained steps if these are the current bits."""
        scale = self.log_scale.exp() if bits == self.bits else weight_scale(rows, bits, candidates=CANDIDATES)
        values = fake_quantize(rows, scale, torch.zeros((), device=rows.device), *quant_limits(bits, signed=True))
        return (values - rows).square().sum(1)

    def freeze(self, rows: Tensor) -> tuple[Tensor, UniformQuantizer]:
        """Return the rounded weight and its quantizer."""
        return self(rows), UniformQuantizer(self.bits, True, self.log_scale.exp())


class MSQ:
    """A prepared, unfolded network whose layers lose bits until the budget is met: a `Trainee` of the grow road.

    choices  layer -> its possible final precisions; only one if it is kept
    budget   on bits, bytes or percent; None keeps every bit
    """

    needs_scheme = False

    def __init__(
        self, model: nn.Module, choices: Mapping[str, Sequence[Precision]], costs: CostModel, budget: Budget | None, settings: MSQSettings
    ):
        self.model, self.choices, self.costs, self.budget, self.settings = model, choices, costs, budget, settings
        self.layers = quantized_layers(model)
        self.squared_gradients: dict[str, Tensor] = {}
        for name, options in choices.items():
            layer, bits = self.layers[name], options[-1].weight_bits
            if bits:
                rows = self.rows(name)
                layer.weight_quantizer = ShrinkingWeight(rows, bits)
                self.squared_gradients[name] = rows.new_zeros(len(rows))
            elif bits == 0:
                layer.weight_quantizer = Pruned()
        self.rounds, self.steps = 0, 0  # rounds of dropping, and gradients seen
        self.dropped: list[dict[str, Any]] = []  # in this epoch
        self.ended = False
        self.certificate: dict[str, Any] = {}

    @staticmethod
    def layer_choices(settings: MSQSettings, activation_bits: int | None) -> list[Precision]:
        """Return the precisions that a layer may end with."""
        return [Precision(bits, activation_bits) for bits in range(2, settings.start_bits + 1)]

    @staticmethod
    def check_budget(budget: Budget, network: ObservedNetwork) -> None:
        """Raise InvalidSetting if the budget limits anything but weights, or exceeds the cost of the start."""
        check_counts_weights(budget)
        wider = {f"--start-bits={bits}": scheme for bits, scheme in network.wider().items()}
        check_within(budget, network.costs, (network.smallest, network.largest), "the bits of the start need", wider)

    @classmethod
    def attach(cls, model: nn.Module, network: ObservedNetwork, budget: Budget | None, settings: MSQSettings) -> "MSQ":
        """Put learned steps into the weight slots of `model`, with as many bits as the largest precision of each layer of `network` has."""
        return cls(model, network.choices, network.costs, budget, settings)

    def rows(self, name: str) -> Tensor:
        """Return the float weight of a layer, [channels, fan-in], outside of autograd."""
        return weight_rows(self.layers[name], float_weight(self.layers[name])).detach()

    @property
    def slots(self) -> dict[str, ShrinkingWeight]:
        """Return layer -> its weight slot, for layers with bits."""
        return {n: layer.weight_quantizer for n, layer in self.layers.items() if isinstance(layer.weight_quantizer, ShrinkingWeight)}

    @property
    def decided(self) -> bool:
        """Return whether the scheme is final."""
        return self.budget is None or self.rounds == self.settings.drops

    @property
    def shrinking(self) -> dict[str, ShrinkingWeight]:
        """Return layer -> weight slot, for layers that may still lose bits."""
        least = {name: options[0].weight_bits or 0 for name, options in self.choices.items()}
        return {} if self.decided else {name: slot for name, slot in self.slots.items() if slot.bits > least[name]}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return scales and all other parameters, each at their rate."""
        scales = [module.log_scale for module in self.model.modules() if isinstance(module, (ShrinkingWeight, LearnedInput))]
        taken = {id(parameter) for parameter in scales}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in taken]
        groups = ((scales, self.settings.scale_rate), (others, self.settings.rate))
        return [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters]

    def before_step(self, progress: float) -> list[nn.Parameter]:
        """Drop bits when a round is due; returns the re-initialised steps."""
        self.see_gradients()
        if self.ended and progress < 1:
            self.dropped, self.ended = [], False
        due = int(min(progress / self.settings.dropping, 1.0) * self.settings.drops)
        if self.budget is None or due <= self.rounds or not (self.steps or progress == 1):
            return []
        self.rounds = due
        return self.drop_bits(self.budget, due / self.settings.drops, progress)

    @torch.no_grad()
    def see_gradients(self) -> None:
        """Add the last step's gradients to the average and clear them, so that none counts twice."""
        seen = False
        for name in () if self.decided else self.slots:
            weight = float_weight(self.layers[name])
            if weight.grad is not None:
                squares = weight_rows(self.layers[name], weight.grad).square().mean(1)
                self.squared_gradients[name].lerp_(squares.to(self.squared_gradients[name]), 1 - MEMORY)
                weight.grad, seen = None, True
        self.steps += seen

    def drop_bits(self, budget: Budget, reached: float, progress: float) -> list[nn.Parameter]:
        """Drop the bits that cost least, down to a limit at the share `reached` of the way to the budget."""
        scheme, limit = self.scheme(), self._limit(budget, reached)
        if bits_above(limit, self.costs, scheme) <= 0:
            return []
        bits = {name: precision.stored_weight_bits for name, precision in scheme.items()}
        last = self.rounds == self.settings.drops
        options = {name: [p for p in own if last or p.stored_weight_bits <= bits[name]] for name, own in self.choices.items()}
        problem = make_problem(options, SensitivityTable(self.losses(options), FLOAT, 0), self.costs, limit)
        allocation = allocate(problem, name="least squared error of weights, times squared gradients")
        self.certificate = allocation.certificate()
        changed = {name: p.stored_weight_bits for name, p in allocation.scheme.items() if p != scheme[name]}
        for name, after in changed.items():
            self.dropped.append({"layer": name, "from": bits[name], "to": after, "progress": progress})
            self.slots[name].change(self.rows(name), after)
        words = ", ".join(f"{name} {bits[name]} -> {after}" for name, after in changed.items())
        mean = self.costs.weight_bits(self.scheme())
        note = f"bits dropped at {100 * progress:.0f} % of the run: {words}; now {mean:.2f} bits per weight"
        tell("dropped", progress=progress, weight_bits=mean, layers={n: [bits[n], after] for n, after in changed.items()}, note=note)
        return [self.slots[name].log_scale for name in changed]

    def _limit(self, budget: Budget, reached: float) -> Budget:
        """Return the budget's limits, each at the share `reached` of the way from the start's costs."""
        start = Scheme({name: options[-1] for name, options in self.choices.items()})
        limits = []
        for cost, limit in budget.costs():
            on_the_way = limit + (1 - reached) * max(cost.total(self.costs, start) - limit, 0.0)
            allowed = math.inf if cost.most is None else cost.most(self.costs)  # of a tiny network, the start may need more
            limits.append(Condition(cost.name, max(limit, min(on_the_way, allowed))))
        return Budget(budget.text, tuple(limits))

    def losses(self, choices: Mapping[str, Sequence[Precision]]) -> dict[tuple[str, Precision], float]:
        """Return the loss of each choice of a layer: the squared error of its rows, times their mean squared gradients."""
        known = any(bool(squares.any()) for squares in self.squared_gradients.values())
        losses = {(name, precision): 0.0 for name, options in choices.items() for precision in options}
        for name, slot in self.slots.items():
            rows, squares = self.rows(name), self.squared_gradients[name]
            for precision in choices[name]:
                errors = slot.errors(rows, precision.stored_weight_bits)
                losses[name, precision] = float((errors * squares if known else errors).sum())
        return losses

    def end_of_epoch(self) -> None:
        """Add the epoch's last gradients, which a checkpoint does not hold."""
        self.see_gradients()
        self.ended = True

    def passes(self) -> Iterator[None]:
        """Yield once, with the network unchanged."""
        yield

    def loss(self, outputs: Tensor, batch: Batch, task_loss: Tensor) -> Tensor:
        """Return the task's loss."""
        return task_loss

    def penalty(self) -> Tensor:
        """Return lambda times the sum of |B| over the layers that may still lose bits; 0 once the scheme is fixed."""
        total = torch.zeros((), device=next(self.model.parameters()).device)
        if self.settings.pull:
            for name, slot in self.shrinking.items():
                total = total + slot.last_bits(weight_rows(self.layers[name], float_weight(self.layers[name]))).abs().sum()
        return self.settings.pull * total

    def scheme(self) -> Scheme:
        """Return the current precisions."""
        slots = self.slots
        return Scheme({n: Precision(slots[n].bits, o[0].activation_bits) if n in slots else o[0] for n, o in self.choices.items()})

    # For records and checkpoints

    def summary(self) -> dict[str, Any]:
        """Return the current scheme, its distance to the budget, and the bits dropped in this epoch."""
        scheme = self.scheme()
        return {
            "weight_bits": self.costs.weight_bits(scheme),
            "above_budget": None if self.budget is None else bits_above(self.budget, self.costs, scheme),
            "layers": {name: precision.weight_bits for name, precision in scheme.items()},
            "dropped": list(self.dropped),
        }

    def state(self) -> dict[str, Tensor]:
        """Return the mean squared gradients of each layer's rows."""
        return self.squared_gradients

    def decisions(self) -> dict[str, Any]:
        """Return the decisions so far, as JSON for a checkpoint."""
        bits = {name: slot.bits for name, slot in self.slots.items()}
        return {"bits": bits, "rounds": self.rounds, "steps": self.steps, "certificate": self.certificate}

    def restore(self, decisions: Mapping[str, Any]) -> None:
        """Restore `decisions`. Raises InvalidFile if they belong to another network."""
        known, slots = validated(Decisions, decisions, "the decisions"), self.slots
        for name in slots:
            if known.bits.get(name) not in {precision.weight_bits for precision in self.choices[name]}:
                raise InvalidFile(f"{known.bits.get(name)} bits are not a choice of {name}")
        if set(known.bits) != set(slots) or not 0 <= known.rounds <= self.settings.drops:
            raise InvalidFile("the decisions belong to other layers or rounds")
        for name, slot in slots.items():
            slot.set_bits(known.bits[name])
        self.rounds, self.steps, self.certificate, self.ended = known.rounds, known.steps, known.certificate, True

    def freeze(self, model: nn.Module) -> None:
        """Put uniform quantizers into the slots of `model`, a copy of this one, in place of the learned steps."""
        for layer in quantized_layers(model).values():
            freeze_slots(layer)


class Decisions(BaseModel):
    """The method's part of a checkpoint: bits of each layer, rounds of dropping, gradients seen, and the last certificate."""

    model_config = ConfigDict(extra="forbid", strict=True)
    bits: dict[str, int]
    rounds: int
    steps: int
    certificate: dict[str, Any]
