"""CSQ: a mixed-precision scheme that grows during training, by continuous sparsification of bits and of bit planes.

    W = s / (2^N - 1) * sum over b < N of  [ f(m_p[b]) - f(m_n[b]) ] 2^b g[b]          f(m) = sigmoid(beta m),  g[b] = f(m_B[b])
    L = L_task + lambda * dS * sum over layers and planes of |g|                        dS = average precision now - the budget's
    precision of a layer: its planes with m_B >= 0                                      beta grows from 1, exponentially

m_p, m_n: one logit per weight and bit plane, [N, channels, fan-in] each. m_B: one logit per layer and plane, [N]. s: one scale per layer,
or one per channel. As beta grows, every gate becomes a step, so that the network ends quantized, without a straight-through estimator or a
final rounding. dS > 0 closes planes, dS < 0 opens them again.

Source: Xiao, Yang, Dong, Keutzer, Du, Zhang, "CSQ: Growing Mixed-Precision Quantization Scheme with Bi-level Continuous Sparsification",
DAC 2023 (arXiv 2212.02770). Its equations are from the abstract and the authors' release; its tables were not accessible. Deviations:

  * Place values 2^b / (2^N - 1) are constants (the release trains them, and leaves the uniform grid).
  * Every gate is hardened by one rule, m >= 0 (the release only hardens planes, with another rule than it counts by).
  * A budget is counted as everywhere in anybit: two's-complement bits, each layer weighted by its parameters, every layer included.
    n adjacent planes and a sign are n + 1 bits; with gaps, highest minus lowest plus one counts. Dead low planes become a larger scale.
    The penalty has the same weights. The paper's count (planes, layers unweighted) is reported as well.
  * A layer's highest plane stays open until the planes are decided (unless `prune` lets a layer lose all): the batch norm behind a layer
    hides that all its planes close alike, so that without an anchor they do, whatever the layer needs.
  * The penalty does not see the whole distance to the budget at once: its own budget falls from all planes to the user's over the first
    `ramp` of the search. A layer's part in it is a power (`weighting`) of its share of the weights.
  * The planes to keep are decided once, at `fix` of the run, by an allocation: the likeliest planes under the gates' own odds that fit the
    budget. Their signs alone would exceed it, and gates that stay soft to the end settle half open, where the penalty balances.
  * A trained network starts at its own weights, where gates are soft (in the release, at the rounded ones, with the bit as the logit). A
    weight that is a code has logits at +-c. One between two codes has one gate open by its share of the way to the next: near the middle
    it is undecided and can still fall to either side; untrained, it ends at the nearest. The weight is divided by the value that gates at
    +-c give it, a number that goes to 1 as beta grows.
  * It starts at signed digits, which m_p and m_n allow: 3 is 4 - 1. Closing low planes therefore rounds to the nearest, where it truncates
    towards zero with binary digits (the release). And from an even code one gate leads to either neighbour, whereas with binary digits 1
    and 2 differ in two gates, which have to move in opposite directions while the gradient pushes both the same way. Only crossing odd
    codes still needs that.
  * The second phase starts as the first did: from the current weights, with new logits in the best range of the planes that stay, so that
    values between the codes of fewer planes are undecided and trained again; beta is at 1. `phase="rewind"` is the paper's form, which
    only resets beta; `phase="continue"` has no second phase.
  * Temperatures are chosen for logits of size c = 3, since only beta c matters. The weight gates have their own, because they are decided
    after the planes. Small logits let a soft weight go far beyond its codes, to values that hardening removes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from anybit.allocation.program import allocate, make_problem
from anybit.allocation.sensitivity import SensitivityTable
from anybit.budget import Budget, bits_above, check_counts_weights, check_within
from anybit.data.batches import Batch
from anybit.errors import InvalidFile
from anybit.files.strict import validated
from anybit.methods.settings import CSQSettings
from anybit.networks.cost import CostModel
from anybit.networks.layers import Pruned, float_weight, freeze_slots, quantized_layers, weight_rows
from anybit.networks.observed import ObservedNetwork
from anybit.numerics.quantizers import LearnedInput, UniformQuantizer
from anybit.numerics.ranges import weight_scale
from anybit.scheme import FLOAT, Precision, Scheme

Gates = Literal["soft", "straight-through", "hard"]


# The gates


def gate(logits: Tensor, temperature: Tensor, kind: Gates) -> Tensor:
    """Return f(m): a sigmoid that the temperature turns into a step, or the step itself, which is 1 at m >= 0."""
    return torch.sigmoid(temperature * logits) if kind == "soft" else (logits >= 0).to(logits.dtype)


def slope(logits: Tensor, temperature: Tensor, kind: Gates) -> Tensor:
    """Return df / dm. The straight-through gate has the sigmoid's slope, the decided one none."""
    if kind == "hard":
        return torch.zeros_like(logits)
    rest = 1 - torch.sigmoid(temperature * logits)
    return temperature * rest * (1 - rest)  # rounds to zero for decided gates: subnormal numbers slow an optimizer down


class _GatedSum(torch.autograd.Function):
    """step times the sum over `planes` of  [ f(p[b]) - f(n[b]) ] place[b] : backward recomputes the gates, so only logits are stored.

    One plane at a time: apart from the logits' own gradients, no tensor of all planes is created in either direction.
    """

    @staticmethod
    def forward(
        ctx, positive: Tensor, negative: Tensor, place: Tensor, step: Tensor, temperature: Tensor, kind: Gates, planes: Sequence[int]
    ) -> Tensor:
        ctx.save_for_backward(positive, negative, place, step, temperature)
        ctx.kind, ctx.planes = kind, planes
        total = torch.zeros_like(positive[0])
        for b in planes:
            total += (gate(positive[b], temperature, kind) - gate(negative[b], temperature, kind)) * place[b]
        return total * step

    @staticmethod
    def backward(ctx, grad: Tensor):
        positive, negative, place, step, temperature = ctx.saved_tensors
        to_positive, to_negative = (torch.zeros_like(m) if ctx.needs_input_grad[0] else None for m in (positive, negative))
        to_place, total = torch.zeros_like(place), torch.zeros_like(positive[0])
        scaled = grad * step
        for b in ctx.planes:
            p, n = positive[b], negative[b]
            bit = gate(p, temperature, ctx.kind) - gate(n, temperature, ctx.kind)
            to_place[b] = (bit * scaled).sum()
            total += bit * place[b]
            if to_positive is not None and to_negative is not None:
                shared = scaled * place[b]
                torch.mul(shared, slope(p, temperature, ctx.kind), out=to_positive[b])
                torch.mul(shared, -slope(n, temperature, ctx.kind), out=to_negative[b])
        return to_positive, to_negative, to_place, (total * grad).sum_to_size(step.shape), None, None, None


class GatedWeight(nn.Module):
    """Weight slot of a growing layer: rows [channels, fan-in] computed from gates; the layer's own weight is not read.

    positive, negative  m_p, m_n, [N, channels, fan-in]
    planes              m_B, [N]
    log_scale           log s, [1, 1] or [channels, 1]
    live                the planes that stay after they are fixed; None before
    """

    place_values: Tensor
    temperature: Tensor
    plane_temperature: Tensor

    def __init__(
        self,
        rows: Tensor,
        planes: int,
        per_channel: bool,
        weight_gates: Gates = "soft",
        plane_gates: Gates = "soft",
        logit: float = CSQSettings.logit,
        anchor: bool = False,
    ):
        super().__init__()
        self.weight_gates, self.plane_gates, self.logit, self.anchor = weight_gates, plane_gates, logit, anchor
        self.live: tuple[int, ...] | None = None
        self.positive = nn.Parameter(rows.new_empty(planes, *rows.shape))
        self.negative = nn.Parameter(rows.new_empty(planes, *rows.shape))
        self.planes = nn.Parameter(rows.new_ones(planes))
        self.log_scale = nn.Parameter(rows.new_empty(len(rows) if per_channel else 1, 1))
        self.register_buffer("place_values", 2.0 ** torch.arange(planes, device=rows.device) / (2**planes - 1), persistent=False)
        self.register_buffer("temperature", rows.new_ones(()))
        self.register_buffer("plane_temperature", rows.new_ones(()))
        self.start(rows, range(planes))

    @torch.no_grad()
    def start(self, rows: Tensor, planes: range) -> None:
        """Set the logits so that the weight is `rows`, clamped to the values of these adjacent planes in their best range.

        Each plane has the digit -1, 0 or 1 that leaves the nearest representable value to the planes above it, so that closing low planes
        rounds. Between two codes, one gate of the lowest plane is open by the share of the way.
        """
        step = weight_scale(rows if len(self.log_scale) > 1 else rows.reshape(1, -1), len(planes) + 1, symmetric=True)
        closed, opened = torch.sigmoid(rows.new_tensor([-self.logit, self.logit]))
        largest = 2 ** len(planes) - 1
        codes = (rows / step).clamp(-largest, largest)
        left = codes
        for place, b in enumerate(planes, 1):
            largest //= 2  # of the planes above
            above = (codes / 2**place).round().clamp(-largest, largest)
            digit = left - 2 * above
            self.positive[b] = torch.logit(closed + (opened - closed) * digit.clamp(min=0))
            self.negative[b] = torch.logit(closed - (opened - closed) * digit.clamp(max=0))
            left = above
        self.log_scale.copy_((step / self.place_values[planes[0]]).log())

    def plane_gate(self) -> Tensor:
        """Return g, [N], of planes that are not fixed."""
        planes = torch.cat([self.planes[:-1], self.planes[-1:].detach()]) if self.anchor else self.planes
        if self.plane_gates == "straight-through":
            soft = torch.sigmoid(planes)
            return soft + ((planes >= 0).to(soft.dtype) - soft).detach()
        return gate(planes, self.plane_temperature, "soft")

    def shrinkage(self) -> Tensor | float:
        """Return the factor of decided gates on an initial weight: tanh(c beta / 2) of its bits, f(1) of its planes; 1 if hard."""
        weights = torch.tanh(self.logit * self.temperature / 2) if self.weight_gates == "soft" else 1.0
        return weights * (torch.sigmoid(self.plane_temperature) if self.live is None and self.plane_gates == "soft" else 1.0)

    def forward(self, rows: Tensor) -> Tensor:
        step = self.log_scale.exp() / self.shrinkage()
        place = self.place_values * self.plane_gate() if self.live is None else self.place_values
        planes = range(len(self.planes)) if self.live is None else self.live
        return _GatedSum.apply(self.positive, self.negative, place, step, self.temperature, self.weight_gates, planes)

    # Precision, and its decisions

    def kept_planes(self) -> list[int]:
        """Return the planes that count: fixed, or with m_B >= 0."""
        return torch.nonzero(self.planes.detach() >= 0).flatten().tolist() if self.live is None else list(self.live)

    def bits(self) -> int:
        """Return the two's-complement bits that the kept planes need: highest minus lowest plus one, and the sign; 0 without planes."""
        counted = self.kept_planes()
        return counted[-1] - counted[0] + 2 if counted else 0

    def fix(self, live: Iterable[int]) -> None:
        """Decide the planes for good."""
        self.live = tuple(sorted(live))
        self.planes.requires_grad_(False)

    def harden(self) -> None:
        """Decide every bit of every weight for good."""
        self.weight_gates = "hard"
        self.positive.requires_grad_(False)
        self.negative.requires_grad_(False)

    def undecided(self) -> tuple[int, int]:
        """Return (gates between 0.01 and 0.99, all gates) of the planes that count, including plane gates until they are fixed."""
        counted = self.kept_planes()
        gates = [gate(logits[counted], self.temperature, self.weight_gates) for logits in (self.positive, self.negative)]
        if self.live is None and self.plane_gates == "soft":
            gates.append(self.plane_gate())
        return sum(int(((g > 0.01) & (g < 0.99)).sum()) for g in gates), sum(g.numel() for g in gates)

    @torch.no_grad()
    def freeze(self, rows: Tensor) -> tuple[Tensor, UniformQuantizer | None]:
        """Return (values [channels, fan-in], the uniform quantizer that leaves them unchanged); (zeros, None) without planes."""
        counted = self.kept_planes()
        bits = (self.positive >= 0).long() - (self.negative >= 0).long()  # [N, channels, fan-in], each -1, 0 or 1
        if not counted:
            return torch.zeros_like(self.positive[0]), None
        codes = sum((bits[b] << (b - counted[0]) for b in counted), torch.zeros_like(bits[0]))
        step = self.log_scale.exp() * self.place_values[counted[0]]
        quantizer = UniformQuantizer(self.bits(), True, step.expand(len(codes), 1))
        return quantizer.values(codes.float()), quantizer


# From the gate to the budget


class CSQ:
    """A prepared, unfolded network whose scheme grows: a `Trainee` of the grow road.

    choices  layer -> its possible final precisions; only one if it is kept
    budget   on bits, bytes or percent; None keeps every plane
    """

    needs_scheme = False

    def __init__(
        self, model: nn.Module, choices: Mapping[str, Sequence[Precision]], costs: CostModel, budget: Budget | None, settings: CSQSettings
    ):
        self.model, self.choices, self.costs, self.budget, self.settings = model, choices, costs, budget, settings
        self.layers = quantized_layers(model)
        for name, options in choices.items():
            layer = self.layers[name]
            most = options[-1].weight_bits
            if most is None:
                continue
            float_weight(layer).requires_grad_(False)
            if most == 0:
                layer.weight_quantizer = Pruned()
                continue
            rows, planes = weight_rows(layer, float_weight(layer)).detach(), most - 1
            layer.weight_quantizer = GatedWeight(
                rows,
                planes,
                settings.per_channel,
                cast(Gates, settings.weight_gates),  # settings are checked to be among GATES
                cast(Gates, settings.plane_gates),
                settings.logit,
                settings.anchor and not settings.prune,
            )
            if len(options) == 1:
                layer.weight_quantizer.fix(range(planes))
        self.hard, self.searched = False, 0.0
        self.certificate: dict[str, Any] = {}

    @staticmethod
    def layer_choices(settings: CSQSettings, activation_bits: int | None) -> list[Precision]:
        """Return the precisions that a layer may end with."""
        return [Precision(bits, activation_bits) for bits in ((0,) if settings.prune else ()) + tuple(range(2, settings.planes + 2))]

    @staticmethod
    def check_budget(budget: Budget, network: ObservedNetwork) -> None:
        """Raise InvalidSetting if the budget limits anything but weights, or exceeds the cost of all planes."""
        check_counts_weights(budget)
        wider = {f"--planes={bits - 1}": scheme for bits, scheme in network.wider().items()}
        check_within(budget, network.costs, (network.smallest, network.largest), "all planes need", wider)

    @classmethod
    def attach(cls, model: nn.Module, network: ObservedNetwork, budget: Budget | None, settings: CSQSettings) -> "CSQ":
        """Put gates into the weight slots of `model`, with as many planes as the largest precision of each layer of `network` needs."""
        return cls(model, network.choices, network.costs, budget, settings)

    @property
    def gated(self) -> dict[str, GatedWeight]:
        """Return layer -> its gates."""
        return {n: layer.weight_quantizer for n, layer in self.layers.items() if isinstance(layer.weight_quantizer, GatedWeight)}

    @property
    def growing(self) -> dict[str, GatedWeight]:
        """Return layer -> gates, for layers whose planes are not fixed yet."""
        return {name: weight for name, weight in self.gated.items() if weight.live is None}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameters with their rates. No weight decay: it would pull logits back to undecided."""
        gates = list(self.gated.values())
        scales = [weight.log_scale for weight in gates] + [m.log_scale for m in self.model.modules() if isinstance(m, LearnedInput)]
        logits, planes = [m for weight in gates for m in (weight.positive, weight.negative)], [weight.planes for weight in gates]
        taken = {id(parameter) for parameter in (*scales, *logits, *planes)}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in taken]
        rates = self.settings
        groups = ((logits, rates.gate_rate), (planes, rates.plane_rate), (scales, rates.scale_rate), (others, rates.rate))
        return [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters]

    def before_step(self, progress: float) -> list[nn.Parameter]:
        """Set temperatures, and decide planes and weights when it is time; returns the re-initialised parameters."""
        s, restarted = self.settings, []
        if progress >= s.fix and self.growing:
            gates = list(self.growing.values()) if s.phase == "restart" else []
            self.fix_planes()
            restarted = [parameter for weight in gates for parameter in (weight.positive, weight.negative, weight.log_scale)]
        if progress >= s.harden and not self.hard:
            self.harden()
        search, settle = min(progress / s.fix, 1), min(max(progress - s.fix, 0) / max(s.harden - s.fix, 1e-9), 1)
        self.searched = search
        before = s.final_temperature if s.phase == "rewind" else s.fix_temperature
        after = s.fix_temperature if s.phase == "continue" else 1.0
        temperature = before**search if progress < s.fix else after * (s.final_temperature / after) ** settle
        for weight in self.gated.values():
            weight.temperature.fill_(1.0 if s.weight_gates == "straight-through" else temperature)
            weight.plane_temperature.fill_(s.plane_temperature**search)
        return restarted

    def passes(self) -> Iterator[None]:
        """Yield once, with the network unchanged."""
        yield

    def loss(self, outputs: Tensor, batch: Batch, task_loss: Tensor) -> Tensor:
        """Return the task's loss."""
        return task_loss

    def penalty(self) -> Tensor:
        """Return lambda dS times the soft mean bits of a layer, weighted; 0 once all planes are fixed."""
        growing = self.growing
        if not growing or self.budget is None:
            return torch.zeros((), device=next(self.model.parameters()).device)
        shares = {name: self.costs.layers[name].weights ** self.settings.weighting for name in self.choices}
        soft_bits = sum(shares[name] * weight.plane_gate().sum() for name, weight in growing.items()) / sum(shares.values())
        reached = min(1.0, self.searched / self.settings.ramp) if self.settings.ramp else 1.0
        largest = self.scheme_of_all_planes()
        distance = self._excess(largest)
        return self.settings.strength * (self.excess() - (1 - reached) * max(distance, 0.0)) * soft_bits

    def scheme_of_all_planes(self) -> Scheme:
        """Return the scheme at which the search starts."""
        return Scheme({name: options[-1] for name, options in self.choices.items()})

    def excess(self) -> float:
        """Return dS: bits per weight of the current scheme above the budget (negative: below)."""
        return self._excess(self.scheme())

    def _excess(self, scheme: Scheme) -> float:
        assert self.budget is not None  # without a budget there is no excess
        return bits_above(self.budget, self.costs, scheme)

    def scheme(self) -> Scheme:
        """Return the precisions of the current planes."""
        gated = self.gated
        return Scheme({n: Precision(gated[n].bits(), o[0].activation_bits) if n in gated else o[0] for n, o in self.choices.items()})

    def fix_planes(self) -> None:
        """Keep the likeliest planes by the gates' own odds, among those that fit the budget: an allocation.

        A gate at logit m is open with odds exp(m), so the log likelihood of a set of planes is the sum of their m, up to a constant. It
        counts once for every weight of the layer, as in the penalty and the budget.
        """
        growing = self.growing
        best = {name: dict(_likeliest(weight.planes.detach().tolist(), weight.anchor)) for name, weight in growing.items()}
        losses = {
            (name, precision): -self.costs.layers[name].weights * best[name][precision.stored_weight_bits][0] if name in best else 0.0
            for name, options in self.choices.items()
            for precision in options
        }
        problem = make_problem(self.choices, SensitivityTable(losses, FLOAT, 0), self.costs, self.budget)
        allocation = allocate(problem, name="likeliest planes")
        scheme, self.certificate = allocation.scheme, allocation.certificate()
        for name, planes in best.items():
            weight = growing[name]
            live: Sequence[int] = planes[scheme[name].stored_weight_bits][1]
            if live and self.settings.phase == "restart":
                live = range(live[0], live[-1] + 1)  # those in between cost nothing and are useful
                rows = weight(float_weight(self.layers[name])).detach()
                weight.temperature.fill_(1.0)
                weight.start(rows, live)
            weight.fix(live)

    def end_of_epoch(self) -> None:
        """Prune closed planes for good, with straight-through plane gates only."""
        if self.settings.plane_gates == "straight-through":
            for weight in self.growing.values():
                weight.planes.data[weight.planes < 0] = -math.inf

    def harden(self) -> None:
        """Decide every weight gate for good."""
        self.hard = True
        for weight in self.gated.values():
            weight.harden()

    # For records and checkpoints

    def summary(self) -> dict[str, Any]:
        """Return the current scheme, in anybit's count and in the paper's, and how decided it is."""
        gated, scheme = self.gated, self.scheme()
        undecided = [weight.undecided() for weight in gated.values()]
        first = next(iter(gated.values()), None)
        return {
            "weight_bits": self.costs.weight_bits(scheme),
            "paper_bits": sum(len(weight.kept_planes()) for weight in gated.values()) / max(len(gated), 1),
            "undecided": sum(part for part, _ in undecided) / max(sum(total for _, total in undecided), 1),
            "temperature": float(first.temperature) if first else 1.0,
            "plane_temperature": float(first.plane_temperature) if first else 1.0,
            "above_budget": None if self.budget is None else self.excess(),
            "layers": {name: precision.weight_bits for name, precision in scheme.items()},
        }

    def state(self) -> dict[str, Tensor]:
        """Return nothing: all state is in the network."""
        return {}

    def decisions(self) -> dict[str, Any]:
        """Return the decisions so far, as JSON for a checkpoint."""
        fixed = {name: weight.kept_planes() for name, weight in self.gated.items() if weight.live is not None}
        return {"fixed": fixed, "hard": self.hard, "certificate": self.certificate}

    def restore(self, decisions: Mapping[str, Any]) -> None:
        """Restore `decisions`. Raises InvalidFile if they belong to another network."""
        known, gated = validated(Decisions, decisions, "the decisions"), self.gated
        for name, live in known.fixed.items():
            planes = len(gated[name].planes) if name in gated else 0
            if sorted(set(live)) != live or not set(live) <= set(range(planes)):
                raise InvalidFile(f"planes {live} of {name} are not some of its {planes}, in order")
        self.certificate = known.certificate
        for name, live in known.fixed.items():
            gated[name].fix(live)
        if known.hard:
            self.harden()

    def freeze(self, model: nn.Module) -> None:
        """Put uniform quantizers into the slots of `model`, a copy of this one, in place of the gates."""
        for layer in quantized_layers(model).values():
            freeze_slots(layer)


class Decisions(BaseModel):
    """The method's part of a checkpoint: fixed planes, whether every weight's bits are fixed, and the allocation's certificate."""

    model_config = ConfigDict(extra="forbid", strict=True)
    fixed: dict[str, list[int]]
    hard: bool
    certificate: dict[str, Any]


def _likeliest(logits: list[float], anchored: bool = False) -> Iterator[tuple[int, tuple[float, list[int]]]]:
    """Yield bits -> (log odds, planes) of the likeliest planes that need this many bits; between highest and lowest, those with m >= 0.

    The highest plane is included if it is `anchored`.
    """
    yield 0, (0.0, [])
    count = len(logits)
    for width in range(1, count + 1):
        options = []
        for low in range(count - width if anchored else 0, count - width + 1):
            planes = [b for b in range(low, low + width) if b in (low, low + width - 1) or logits[b] >= 0]
            options.append((sum(max(logits[b], -1e3) for b in planes), planes))  # a pruned plane has odds of zero, and JSON has no infinity
        yield width + 1, max(options)
