"""The stages of train once: a float network made into a supernet, its subnets taken from it, and the folder that keeps it."""

import copy
import glob
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from anybit import batchnorm, stages, store
from anybit.batches import Batch, Samples, draw, map_tensors, split
from anybit.candidates import ActivationCandidate, Candidates, activation_candidate, check_finite_samples, frozen_candidate
from anybit.capture import input_samples
from anybit.checkpoint import Canonical, new_folder, read_json, read_tensors, remember, sha256_of, write_json
from anybit.cost import CostModel, LayerSize, leftovers, spec_of
from anybit.errors import InfeasibleBudget, InvalidFile, InvalidInput, InvalidSetting
from anybit.evaluation import TASKS, Metric, outputs_of
from anybit.evaluation import evaluate as evaluate_model
from anybit.layers import float_weight, from_rows, prepare, quantized_layers, weight_rows
from anybit.methods.multiquant import MultiQuant, MultiQuantSettings, SwitchableInput, SwitchableNorm, SwitchableWeight
from anybit.packing import TensorSpec
from anybit.pages import search_page
from anybit.progress import track
from anybit.quantizers import UniformQuantizer
from anybit.ranges import weight_scale
from anybit.reporting import environment
from anybit.scheme import FLOAT, MAX_BITS, Budget, Precision, Scheme, check_bits, check_names
from anybit.sensitivity import SensitivityTable
from anybit.stages import CalibrateSettings, Network
from anybit.store import STORE_BITS, LayerTensors, StoredLayer
from anybit.subnet_search import Evaluated, Found, SearchSettings, hypervolume, pareto_front, search
from anybit.training import TrainSettings, epoch_batches
from anybit.wiring import BATCH_NORMS, observe

JSON = "supernet.json"
SEARCH = "search.json"
TIE = 1e-3
"""Of two subnets that score the same, the one of lower loss is the better: points of the score that one nat is worth."""
FORMAT_VERSION = 1


@dataclass(frozen=True)
class SupernetSettings:
    """bits             bit-widths of weights and inputs, 2..8
    keep             shell pattern on layer names -> precision
    task             "classification" or "regression", where the outputs do not tell
    held_out         share of the training data that is not trained on: the search evaluates on it
    bn_images        training inputs, augmented as in training, from which batch-norm statistics are estimated anew for a subnet
    multiquant, train  the method's settings and the loop's
    """

    bits: tuple[int, ...] = (2, 4, 6, 8)
    keep: Mapping[str, Precision] = field(default_factory=dict)
    task: str | None = None
    held_out: float = 0.1
    bn_images: int = 4096
    multiquant: MultiQuantSettings = field(default_factory=MultiQuantSettings)
    train: TrainSettings = field(default_factory=TrainSettings)

    @classmethod
    def of(cls, **settings: Any) -> "SupernetSettings":
        """From one flat set of names, each a field of this class, of TrainSettings or of MultiQuantSettings."""
        homes = {"multiquant": MultiQuantSettings, "train": TrainSettings, "": cls}
        parts = {home: {n: v for n, v in settings.items() if n in kind.__dataclass_fields__} for home, kind in homes.items()}
        unknown = [name for name in settings if not any(name in part for part in parts.values())]
        if unknown:
            raise InvalidSetting(f"train has no setting {unknown[0]!r}.")
        return cls(**{home: kind(**parts[home]) for home, kind in homes.items() if home}, **parts[""])

    def __post_init__(self):
        if len(set(self.bits)) < len(self.bits) or len(self.bits) < 2:
            raise InvalidSetting(f"bits {', '.join(map(str, self.bits))}: give at least two bit-widths, each once.")
        for bits in self.bits:
            check_bits(bits)
        if self.task is not None and self.task not in TASKS:
            raise InvalidSetting(f"task {self.task!r} is unknown. Choose from {', '.join(TASKS)}.")
        if not 0 < self.held_out < 1:
            raise InvalidSetting(f"held_out {self.held_out} must be between 0 and 1: the search evaluates on that share.")
        if self.bn_images < 2:
            raise InvalidSetting(f"bn_images {self.bn_images} are too few for batch-norm statistics. Give at least 2; hundreds work well.")
        if self.multiquant.batch_norm == "switch" and self.train.compile:
            raise InvalidSetting("A batch norm for each bit-width cannot be compiled: every scheme would be compiled anew. Leave off one.")

    def to_json(self) -> dict[str, Any]:
        flat = {name: value for name, value in asdict(self).items() if name not in ("multiquant", "train", "keep")}
        rates = {str(bits): factor for bits, factor in self.multiquant.step_rates.items()}
        return flat | {
            "bits": list(self.bits),
            "keep": {pattern: str(precision) for pattern, precision in self.keep.items()},
            "multiquant": asdict(self.multiquant) | {"step_rates": rates},
            "train": self.train.to_json(),
        }


def held_out_split(samples: Samples, settings: SupernetSettings) -> tuple[Samples, Samples]:
    """(what is trained on, what the search evaluates on), by the training's seed."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(settings.train.seed)).tolist()
    kept = min(max(1, round(len(samples) * settings.held_out)), len(samples) - 1)
    return samples.subset(order[kept:]), samples.subset(order[:kept])


def bn_batches(samples: Samples, settings: SupernetSettings) -> list[Batch]:
    """Training inputs for batch-norm statistics, drawn once, augmented as in training."""
    return list(epoch_batches(draw(samples, settings.bn_images, settings.train.seed), settings.train, -1))


def observe_supernet(model: nn.Module, example: Batch, settings: SupernetSettings) -> Network:
    """The float network observed and folded, each layer with the precisions that it is trained for."""
    return stages.observe_network(model, example, CalibrateSettings(settings.bits, settings.bits, settings.keep))


def make_multiquant(network: Network, plain: Sequence[Batch], settings: SupernetSettings, classes: int | None) -> MultiQuant:
    """The unfolded network with switchable quantizers in its slots, each bit-width in its range of least squared error."""
    unfolded = copy.deepcopy(network.float_model)
    batchnorm.flip_negative(unfolded, network.norms)
    model = prepare(unfolded, network.names, [name for name, options in network.choices.items() if options[0].weight_bits is None])
    samples = input_samples(network.folded, network.names, plain, 2**17, settings.train.seed)
    check_finite_samples(samples)
    wanted = settings.multiquant
    for name, layer in quantized_layers(model).items():
        rows = weight_rows(layer, float_weight(layer)).detach()
        weights, inputs = _widths(network.choices[name])
        scales = {bits: weight_scale(rows if wanted.per_channel else rows.reshape(1, -1), bits) for bits in weights}
        starts = {bits: activation_candidate(samples[name], bits, "mse") for bits in inputs}
        _fill(layer, scales, {bits: (start.scale, start.zero_point) for bits, start in starts.items()}, wanted)
    return _made(model, network.choices, network.norms, settings, classes)


def _made(model: nn.Module, choices: Mapping, norms: Mapping[str, str], settings: SupernetSettings, classes: int | None) -> MultiQuant:
    method = MultiQuant(model, choices, settings.multiquant, classes, settings.train.seed)
    if settings.multiquant.batch_norm == "switch":
        method.switch_norms(norms)
    return method


def _widths(options: Sequence[Precision]) -> tuple[list[int], list[int]]:
    """Bit-widths of a layer's weights and of its input, ascending; without float."""
    return sorted({p.weight_bits for p in options if p.weight_bits}), sorted({p.activation_bits for p in options if p.activation_bits})


def _fill(layer: nn.Module, scales: Mapping[int, Tensor], ranges: Mapping[int, tuple[Tensor, Tensor]], wanted: MultiQuantSettings) -> None:
    layer.weight_quantizer = SwitchableWeight(scales, wanted.step_rates) if scales else None
    layer.input_quantizer = SwitchableInput(ranges, wanted.step_rates, wanted.offset_rate > 0) if ranges else None


def uniform(choices: Mapping[str, Sequence[Precision]], bits: int) -> Scheme:
    """Every layer at `bits`; kept layers, which have no choice, as they are kept."""
    wanted = {
        name: [p for p in options if p.weight_bits == bits and p.activation_bits in (bits, None)] for name, options in choices.items()
    }
    return Scheme({name: (wanted[name] or [options[-1]])[0] for name, options in choices.items()})


# Subnets


def active_norms(model: nn.Module) -> list[nn.Module]:
    """The batch norms that the network at hand computes with, in order of definition."""
    idle = {
        id(norm) for module in model.modules() if isinstance(module, SwitchableNorm) for norm in module.norms if norm is not module.chosen()
    }
    return [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.running_mean is not None and id(m) not in idle]


def statistics_of(model: nn.Module) -> Tensor:
    """Means and variances of all active batch norms, one after another, [numbers]."""
    parts = [part for norm in active_norms(model) for part in (norm.running_mean, norm.running_var)]
    return torch.cat(parts).clone() if parts else torch.zeros(0)


@torch.no_grad()
def set_statistics(model: nn.Module, statistics: Tensor) -> None:
    """Put back what `statistics_of` read."""
    at = 0
    for norm in active_norms(model):
        for part in (norm.running_mean, norm.running_var):
            part.copy_(statistics[at : at + part.numel()])
            at += part.numel()


@dataclass(frozen=True)
class Known:
    """A subnet whose batch-norm statistics and edge ranges are kept: statistics [numbers], edges [edges, 2]."""

    scheme: Scheme
    statistics: Tensor
    edges: Tensor


@dataclass
class Supernet:
    """A trained supernet: `switch` makes its `model` any subnet, at once and in place.

    network  the float network that it was made of
    norms    layer -> the batch norm that folds into it;   edges   names of the tensors between layers
    known    subnets whose batch-norm statistics are kept
    """

    network: nn.Module = field(repr=False)
    method: MultiQuant = field(repr=False)
    settings: SupernetSettings
    norms: Mapping[str, str]
    costs: CostModel
    edges: Sequence[str]
    task: str
    known: list[Known] = field(default_factory=list, repr=False)
    about: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        return self.method.model

    @property
    def choices(self) -> Mapping[str, Sequence[Precision]]:
        return self.method.choices

    def uniform(self, bits: int) -> Scheme:
        """Every layer at `bits`; kept layers as they are kept."""
        return uniform(self.choices, bits)

    def switch(self, scheme: Scheme | Mapping[str, str], batches: Sequence[Batch] | None = None) -> str:
        """Make the model a subnet, in evaluation mode: `scheme`'s layers changed, the others as they were.

        batches   from which its batch-norm statistics are estimated anew; without, those of the nearest subnet that is known are taken.
        Returns what the statistics are, in words. Raises SchemeMismatch where a precision was not trained.
        """
        scheme = scheme if isinstance(scheme, Scheme) else Scheme.parse(scheme)
        self.method.switch(scheme)
        self.model.eval()
        if batches is not None:
            batchnorm.reestimate(self.model, batches, active_norms(self.model))
            return f"estimated anew on {sum(map(len, batches))} inputs"
        nearest = self.nearest(self.method.scheme)
        set_statistics(self.model, nearest.statistics.to(next(self.model.parameters()).device))
        if nearest.scheme == self.method.scheme:
            return "stored for this scheme"
        return f"those stored for the nearest scheme, {distance(nearest.scheme, self.method.scheme, self.costs):.2f} bits away"

    def nearest(self, scheme: Scheme) -> Known:
        """The known subnet whose bits differ least, weighted as the budget counts weights."""
        return min(self.known, key=lambda known: distance(known.scheme, scheme, self.costs))

    def canonical(self) -> Canonical:
        """The canonical form of the subnet at hand: frozen and folded, with the statistics that it has."""
        model = copy.deepcopy(self.model)
        self.method.freeze(model)
        folded, _ = batchnorm.fold(model, self.norms)
        return Canonical(folded.eval().requires_grad_(True), self.norms)

    @torch.no_grad()
    def as_float(self, batches: Sequence[Batch]) -> nn.Module:
        """The float network with the shared weights and no quantizers; its batch-norm statistics are those of `batches`."""
        self.method.switch(self.method.highest)
        frozen = copy.deepcopy(self.model)
        self.method.freeze(frozen)
        for name, layer in self.method.layers.items():
            float_weight(frozen.get_submodule(name)).copy_(float_weight(layer))
        twin = copy.deepcopy(self.network).to(next(self.model.parameters()).device)
        state = frozen.state_dict()
        twin.load_state_dict({key: state[key] for key in twin.state_dict()})
        batchnorm.reestimate(twin, batches)
        return twin.eval()

    def learn(
        self, scheme: Scheme, batches: Sequence[Batch] | None, edge_ranges: Callable[[nn.Module], Mapping[str, tuple[float, float]]]
    ) -> Known:
        """Estimate a subnet's batch-norm statistics (without `batches` those that it has) and edge ranges, and keep them."""
        if batches is None:  # a batch norm for each bit-width has its own
            self.method.switch(scheme)
            self.model.eval()
        else:
            self.switch(scheme, batches)
        ends = edge_ranges(self.canonical().model)
        known = Known(scheme, statistics_of(self.model).cpu(), torch.tensor([ends[name] for name in self.edges]).reshape(-1, 2))
        self.known = [*(one for one in self.known if one.scheme != scheme), known]
        return known

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write the supernet's folder, all of it or nothing."""
        with new_folder(Path(folder), overwrite) as draft:
            write_supernet(draft, self)
            write_json(draft / "report.json", self.report)
        remember(Path(folder), JSON)
        return Path(folder)

    def stored_edges(self) -> dict[str, tuple[float, float]]:
        """Edge ranges of the nearest subnet that is known."""
        return {
            name: (float(low), float(high)) for name, (low, high) in zip(self.edges, self.nearest(self.method.scheme).edges, strict=True)
        }


def distance(one: Scheme, other: Scheme, costs: CostModel) -> float:
    """Mean difference in bits, of weights and inputs together, over all weights."""
    total = sum(size.weights for size in costs.layers.values())
    return sum(
        costs.layers[name].weights
        * (
            abs(one[name].stored_weight_bits - other[name].stored_weight_bits)
            + abs((one[name].activation_bits or 32) - (other[name].activation_bits or 32))
        )
        for name in one
    ) / (2 * total)


def scores(supernet: Supernet, scheme: Scheme, bn: Sequence[Batch] | None, test: Sequence[Batch], metric: Metric | None = None) -> dict:
    """What a subnet scores on `test`."""
    supernet.switch(scheme, bn)
    return evaluate_model(supernet.model, test, supernet.task, metric)


def uniform_schemes(supernet: Supernet) -> dict[str, Scheme]:
    """ "4 bits" -> the scheme."""
    return {f"{bits} bits": supernet.uniform(bits) for bits in sorted(supernet.settings.bits)}


def width_scores(supernet: Supernet, bn: Sequence[Batch] | None, test: Sequence[Batch], metric: Metric | None) -> dict[str, dict]:
    """What every uniform subnet scores on `test`; with a batch norm for each bit-width (`bn` None) with its own statistics."""
    told = {}
    for name, scheme in uniform_schemes(supernet).items():
        if bn is None and not supernet.known:
            supernet.method.switch(scheme)
        else:
            supernet.switch(scheme, bn)
        told[name] = evaluate_model(supernet.model, test, supernet.task, metric)
    return told


def folded_gammas(method: MultiQuant, norms: Mapping[str, str]) -> list[nn.Parameter]:
    """The gammas that will be folded into scales, and so must stay above zero: of every bit-width, where each has its own."""
    found = []
    for name in norms.values():
        module = method.model.get_submodule(name)
        found += [norm.weight for norm in (module.norms if isinstance(module, SwitchableNorm) else [module]) if norm.weight is not None]
    return found


# The search


@dataclass
class Search:
    """What a search found: `supernet` keeps the statistics of `chosen` (budget -> scheme) and of the front; `report` tells the rest."""

    supernet: Supernet
    chosen: dict[str, Scheme]
    report: dict[str, Any]

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write the search's folder: the supernet with the new statistics, search.json, report.json."""
        with new_folder(Path(folder), overwrite) as draft:
            write_supernet(draft, self.supernet)
            write_json(draft / SEARCH, self.report)
            (draft / "report.html").write_text(search_page(self.report), encoding="utf8")
            write_json(draft / "report.json", self.supernet.report | {"search": {k: v for k, v in self.report.items() if k != "evaluated"}})
        remember(Path(folder), JSON)
        return Path(folder)


def searched(
    supernet: Supernet,
    samples: Samples,
    budgets: Sequence[Budget],
    settings: SearchSettings,
    images: int,
    metric: Metric | None,
    cache: Path | None,
) -> Search:
    """Search, measure the front again on other held-out samples, and choose for each budget; `samples` are the training data."""
    if not samples.labelled:
        raise InvalidInput("The search needs labels: subnets are ranked by their accuracy. Give labelled data.")
    fitting, held_out = held_out_split(samples, supernet.settings)
    images = min(images, len(held_out) // 2)
    if images < 1:
        raise InvalidInput(
            f"{len(held_out)} held-out sample(s) are too few to search on and to measure the front on others. Hold out more."
        )
    search_on, measure_on = (list(held_out.subset(range(at, at + images)).batches(256)) for at in (0, images))
    bn = bn_batches(fitting, supernet.settings)
    key = "metric" if metric else "top1" if supernet.task == "classification" else "loss"
    done = Evaluations(cache)

    def score(scheme: Scheme, test: Sequence[Batch], where: str) -> float:
        def measure() -> float:
            told = scores(supernet, scheme, bn, test, metric)
            return -told["loss"] if key == "loss" else told[key] - TIE * min(told["loss"], 100.0)

        return done.recall(f"{where} {images} {json.dumps(scheme.to_json())}", measure)

    progress = iter(track(range(settings.evaluations), "evaluations"))

    def evaluate(scheme: Scheme) -> float:
        next(progress, None)
        return score(scheme, search_on, "search")

    uniform_ones = list(uniform_schemes(supernet).values())
    found = done.recall_search(
        f"{images} {json.dumps(asdict(settings))}",
        lambda: search(supernet.choices, supernet.costs, evaluate, settings, uniform_ones),
    )
    next(progress, None)
    front = pareto_front(found.evaluated)
    again = {one.scheme: score(one.scheme, measure_on, "measure") for one in [*front, *found.evaluated[: len(uniform_ones)]]}
    chosen = {}
    for budget in budgets:
        fit = [one for one in found.evaluated if stages.fits(supernet.costs, one.scheme, budget)]
        chosen[str(budget)] = max(fit, key=lambda one: (one.score, -one.cost)).scheme if fit else lowest(supernet)
    first = next(fitting.subset([0, 1]).batches(2))
    edge_batches = bn[:8]

    def edge_ranges(model: nn.Module) -> Mapping[str, tuple[float, float]]:
        return stages.edge_ranges(model, observe(model, first), edge_batches)

    for scheme in dict.fromkeys([*chosen.values(), *(one.scheme for one in front)]):
        if all(known.scheme != scheme for known in supernet.known):
            supernet.learn(scheme, bn, edge_ranges)
    corner = (max(one.cost for one in found.evaluated), min(one.score for one in found.evaluated))
    rows = [
        {"scheme": o.scheme.to_json(), "score": o.score, "cost": o.cost, "origin": o.origin, "measured": again.get(o.scheme)}
        for o in found.evaluated
    ]  # fmt: skip
    report = {
        "version": 1,
        "score": key,
        "quantity": settings.quantity,
        "evaluated": rows,
        "front": [rows[found.evaluated.index(one)] for one in front],
        "hypervolume": {"value": hypervolume(front, *corner), "cost": corner[0], "score": corner[1]},
        "rank_correlation": found.rank_correlation,
        "recalled": done.recalled,
        "budgets": {text: {"scheme": scheme.to_json(), **supernet.costs.summary(scheme)} for text, scheme in chosen.items()},
        "images": {"searched_on": images, "measured_on": images, "batch_norm": sum(map(len, bn))},
        "settings": asdict(settings),
        "environment": environment(),
    }
    supernet.model.cpu()
    return Search(supernet, chosen, report)


class Evaluations:
    """Scores by what was evaluated, and whole searches, each a line of a file as soon as it is known; a damaged line is measured again."""

    def __init__(self, path: Path | None):
        self.path, self.known, self.recalled = path, {}, 0
        if path is not None and path.is_file():
            for line in path.read_bytes().splitlines():
                with suppress(ValueError, TypeError, KeyError):
                    row = json.loads(line)
                    self.known[row["key"]] = row["value"] if row["key"].startswith("found ") else float(row["value"])

    def recall(self, key: str, measure: Callable[[], Any]) -> Any:
        """What is known of `key`; else what `measure` gives, from now on."""
        if key in self.known:
            self.recalled += 1
            return self.known[key]
        self.known[key] = measure()
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf8") as file:
                file.write(json.dumps({"key": key, "value": self.known[key]}) + "\n")
        return self.known[key]

    def recall_search(self, key: str, run: Callable[[], Found]) -> Found:
        """A whole search, under its settings."""

        def as_json() -> dict[str, Any]:
            found = run()
            rows = [{**vars(one), "scheme": one.scheme.to_json()} for one in found.evaluated]
            return {"evaluated": rows, "rank_correlation": found.rank_correlation}

        told = self.recall(f"found {key}", as_json)
        rows = [Evaluated(**{**row, "scheme": Scheme.parse(row["scheme"])}) for row in told["evaluated"]]
        return Found(rows, told["rank_correlation"])


def lowest(supernet: Supernet) -> Scheme:
    return supernet.method.lowest


def check_fits(supernet: Supernet, budget: Budget) -> None:
    """Raise InfeasibleBudget, naming the least, where even the lowest subnet is above the budget."""
    for condition in budget.conditions:
        if condition.quantity not in ("bits", "bytes", "percent", "bops"):
            raise InvalidSetting(f"A search takes budgets of bits, bytes, percent and BOPs, not {condition.quantity} ({budget}).")
    if not stages.fits(supernet.costs, lowest(supernet), budget):
        least = supernet.costs.summary(lowest(supernet))
        raise InfeasibleBudget(
            f"The smallest subnet has {least['weight_bits']:.4g} bits a weight, {least['bytes']} bytes ({least['percent']:.4g} %) and "
            f"{least['bops']:.4g} BOPs: more than the budget {budget}. Raise the budget to that, or train with lower --bits."
        )


def best_within(folder: Any, supernet: Supernet, budget: Budget) -> Scheme:
    """The best evaluated subnet of a search that fits; of a supernet that was not searched, the largest uniform one that fits."""
    check_fits(supernet, budget)
    file = Path(folder) / SEARCH if isinstance(folder, (str, Path)) else None
    if file is not None and file.is_file():
        rows = read_json(file)["evaluated"]
        fit = [row for row in rows if stages.fits(supernet.costs, Scheme.parse(row["scheme"]), budget)]
        if fit:
            return Scheme.parse(max(fit, key=lambda row: (row["score"], -row["cost"]))["scheme"])
    fits = [scheme for scheme in uniform_schemes(supernet).values() if stages.fits(supernet.costs, scheme, budget)]
    return fits[-1] if fits else lowest(supernet)


@torch.no_grad()
def candidates_of(canonical: Canonical) -> Candidates:
    """What stands in the slots of a canonical model."""
    found = Candidates()
    for name, layer in quantized_layers(canonical.model).items():
        weights, inputs = layer.weight_quantizer, layer.input_quantizer
        if isinstance(weights, UniformQuantizer):
            found.weights[name, weights.bits] = frozen_candidate(layer)
        if isinstance(inputs, UniformQuantizer):
            found.activations[name, inputs.bits] = ActivationCandidate(inputs.scale, inputs.zero_point)
    return found


def polished(
    supernet: Supernet, canonical: Canonical, samples: Samples, bn: Sequence[Batch], settings: CalibrateSettings
) -> tuple[Canonical, list[dict[str, Any]]]:
    """The subnet after calibrate's last steps, from its own codes and ranges, towards the outputs of the shared weights without quantizers:
    sequential AdaQuant, batch-norm tuning, bias tuning, each kept where held-out inputs say so. Returns (canonical, ladder)."""
    scheme = canonical.scheme
    calibration = split(draw(samples, settings.samples, settings.seed), settings.seed, settings.held_out, settings.batch_size)
    example = Batch(map_tensors(calibration.fitting[0].inputs, lambda tensor: tensor[:2]))
    fixed = replace(settings, keep={glob.escape(name): precision for name, precision in scheme.items()})
    network = stages.observe_network(supernet.as_float(bn), example, fixed)
    own = candidates_of(canonical)
    with torch.no_grad():
        references = [outputs_of(network.folded, [batch]) for batch in calibration.fitting]
        reference = outputs_of(network.folded, calibration.held_out)
    targets = stages.batch_norm_targets(network, calibration, settings)
    table = SensitivityTable({(name, precision): 0.0 for name, precision in scheme.items()}, FLOAT, 0)
    judge = stages.Judge(network, own, calibration.held_out, reference, supernet.task)
    bench = stages.Bench(network, calibration, settings, own, own, table, judge, targets, references, own)
    model, ladder, _ = stages.polish(bench, scheme)
    return Canonical(model.eval(), network.norms, stages.edge_ranges(model, network.wiring, calibration.fitting)), ladder[1:]


# The store


@torch.no_grad()
def to_store(method: MultiQuant) -> dict[str, tuple[Tensor, Tensor]]:
    """Round the shared weights to the store's 8 bits, in place; layer -> (int8 codes [rows, columns], step [rows, 1]).

    The step is the one trained for 8 bits where there is one, and else holds the largest weight of each row.
    """
    stored = {}
    for name, layer in method.layers.items():
        weights = layer.weight_quantizer
        if isinstance(weights, SwitchableWeight):
            rows = weight_rows(layer, float_weight(layer))
            if MAX_BITS in weights.widths:
                scale = weights.scales()[weights.widths.index(MAX_BITS)].expand(len(rows), 1)
            else:
                scale = weight_scale(rows, STORE_BITS, "minmax")
            quantizer = UniformQuantizer(STORE_BITS, True, scale)
            codes = quantizer.codes(rows)
            float_weight(layer).copy_(from_rows(layer, quantizer.values(codes)))
            stored[name] = (codes.to(torch.int8), quantizer.scale)
    return stored


def stored_layers(supernet: Supernet) -> dict[str, StoredLayer]:
    found = {}
    for name, options in supernet.choices.items():
        size = supernet.costs.layers[name]
        weights, inputs = _widths(options)
        found[name] = StoredLayer(size.rows, size.columns, tuple(weights) or (None,), tuple(inputs) or (None,))
    return found


def write_supernet(folder: Path, supernet: Supernet) -> None:
    """supernet.safetensors and supernet.json; the live weights are rounded to the store's."""
    stored, method = to_store(supernet.method), supernet.method
    slots = [method.layers[name] for name in supernet.choices]
    weights = [layer.weight_quantizer for layer in slots if isinstance(layer.weight_quantizer, SwitchableWeight)]
    inputs = [layer.input_quantizer for layer in slots if isinstance(layer.input_quantizer, SwitchableInput)]
    numbers, others = leftovers(supernet.model, list(stored))
    rows = {id(layer.weight_quantizer): supernet.costs.layers[name].rows for name, layer in method.layers.items()}
    shared = {
        "codes": [codes.flatten() for codes, _ in stored.values()],
        "code_scales": [scale.flatten() for _, scale in stored.values()],
        "weight_scales": [scale.expand(rows[id(slot)], 1).flatten() for slot in weights for scale in slot.scales()],
        "activation_scales": [slot.scales().flatten() for slot in inputs],
        "activation_zero_points": [slot.zero_points().to(torch.uint8).flatten() for slot in inputs],
        "floats": [tensor.flatten() for tensor in numbers.values()],
        "statistics": [torch.stack([known.statistics for known in supernet.known]).flatten()],
        "edges": [torch.stack([known.edges for known in supernet.known]).flatten()],
    }
    tensors = {name: torch.cat([part.detach().cpu() for part in parts]).contiguous() for name, parts in shared.items() if parts}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    tensors |= {key: tensor.detach().cpu().contiguous().clone() for key, tensor in others.items()}
    save_file(tensors, folder / store.FILE)
    about = SupernetFile(
        layers={
            name: SupernetLayer(**row, macs=supernet.costs.layers[name].macs, per_channel=method.settings.per_channel)
            for name, row in store.to_json(stored_layers(supernet)).items()
        },
        folded=dict(supernet.norms),
        edges=list(supernet.edges),
        subnets=[known.scheme.to_json() for known in supernet.known],
        settings=supernet.settings.to_json(),
        task=supernet.task,
        sha256=sha256_of(folder / store.FILE),
        **supernet.about,
    )
    write_json(folder / JSON, about.model_dump())


class SupernetLayer(BaseModel):
    """One layer of supernet.json."""

    model_config = ConfigDict(extra="forbid", strict=True)
    rows: int = Field(gt=0)
    columns: int = Field(gt=0)
    weight_bits: list[int | None] = Field(min_length=1)
    activation_bits: list[int | None] = Field(min_length=1)
    macs: int = Field(ge=0)
    per_channel: bool


class SupernetFile(BaseModel):
    """supernet.json. Strict: a wrong type, a missing or an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)
    format: Literal["anybit supernet"] = "anybit supernet"
    version: Literal[1] = FORMAT_VERSION
    layers: dict[str, SupernetLayer]
    folded: dict[str, str] = {}
    edges: list[str] = []
    subnets: list[dict[str, str]] = Field(min_length=1)
    settings: dict[str, Any] = {}
    model: dict[str, Any] = {}
    data: dict[str, Any] = {}
    preprocessing: dict[str, Any] = {}
    task: Literal["classification", "regression"] = "classification"
    sha256: str

    def stored(self) -> dict[str, StoredLayer]:
        return {
            name: StoredLayer(one.rows, one.columns, tuple(one.weight_bits), tuple(one.activation_bits))
            for name, one in self.layers.items()
        }


def read_supernet_file(folder: Path) -> SupernetFile:
    """supernet.json, strictly, and only if supernet.safetensors is the one it was written with."""
    data = read_json(folder / JSON)
    try:
        file = SupernetFile.model_validate(data)
        for name, layer in file.stored().items():
            _ = layer.choices
            if layer.has_codes and None in layer.weight_bits:
                raise InvalidFile(f"{folder / JSON}: layer {name} is both float and quantized.")
        schemes = [Scheme.parse(scheme) for scheme in file.subnets]
        for scheme in schemes:
            store.check_choices(scheme, {name: layer.choices for name, layer in file.stored().items()})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InvalidFile(f"{folder / JSON}: {where}: {first['msg']}.") from error
    except ValueError as error:
        raise InvalidFile(f"{folder / JSON}: {error}") from error
    if not (folder / store.FILE).is_file() or sha256_of(folder / store.FILE) != file.sha256:
        raise InvalidFile(f"{folder / store.FILE} is missing or not the file that {JSON} was written with. Restore it or train again.")
    return file


def read_supernet(folder: Path, float_model: nn.Module) -> Supernet:
    """The supernet that was saved, on a copy of the float network."""
    file = read_supernet_file(folder)
    layers = file.stored()
    settings = settings_from_json(file.settings)
    check_names([*layers, *file.folded, *file.folded.values()], [name for name, _ in float_model.named_modules()], "The model")
    kept_float = [name for name, layer in layers.items() if not layer.has_codes]
    model = prepare(float_model, list(layers), kept_float)
    for name, layer in layers.items():
        target = model.get_submodule(name)
        shape = tuple(weight_rows(target, float_weight(target)).shape)
        if shape != (layer.rows, layer.columns):
            raise InvalidFile(f"Layer {name} is {shape[0]} x {shape[1]} in the model; {folder / JSON} has {layer.rows} x {layer.columns}.")
        _fill(target, *_blank(layer, file.layers[name].per_channel), settings.multiquant)
    method = _made(model, {name: layer.choices for name, layer in layers.items()}, file.folded, settings, None)
    numbers, others = leftovers(model, [name for name in layers if name not in kept_float])
    statistics = statistics_of(model).numel()
    expected = _expected(layers, [tensor.numel() for tensor in numbers.values()], len(file.subnets), statistics, len(file.edges))
    expected |= {key: spec_of(tensor) for key, tensor in others.items()}
    tensors = read_tensors(folder / store.FILE, {key: (spec.dtype, spec.shape) for key, spec in expected.items()})
    parts = store.split_tensors(layers, {name: tensor.numpy() for name, tensor in tensors.items() if name not in others})
    with torch.no_grad():
        for name, part in parts.items():
            _load(model.get_submodule(name), part)
        flat = tensors.get("floats", torch.zeros(0)).split([tensor.numel() for tensor in numbers.values()])
        for target, values in zip(numbers.values(), flat, strict=True):
            target.copy_(values.view_as(target))
        for key, target in others.items():
            target.copy_(tensors[key])
    rows = tensors.get("statistics", torch.zeros(0)).view(len(file.subnets), statistics)
    ends = tensors.get("edges", torch.zeros(0)).view(len(file.subnets), len(file.edges), 2)
    known = [Known(Scheme.parse(scheme), row, end) for scheme, row, end in zip(file.subnets, rows, ends, strict=True)]
    folded, _ = batchnorm.fold(float_model, file.folded)
    costs = CostModel.of(prepare(folded, list(layers), kept_float), list(layers), None, len(file.edges), float_model)
    costs = replace(costs, layers={name: LayerSize(one.rows, one.columns, one.macs) for name, one in file.layers.items()})
    about = {"model": file.model, "data": file.data, "preprocessing": file.preprocessing}
    return Supernet(float_model, method, settings, file.folded, costs, file.edges, file.task, known, about)


def settings_from_json(data: Mapping[str, Any]) -> SupernetSettings:
    """What `SupernetSettings.to_json` wrote. Raises InvalidFile where it is something else."""
    try:
        values = dict(data)
        inner, train = dict(values.pop("multiquant")), dict(values.pop("train"))
        inner["step_rates"] = {int(bits): factor for bits, factor in inner["step_rates"].items()}
        values["keep"] = {pattern: Precision.parse(text) for pattern, text in values["keep"].items()}
        values["bits"] = tuple(values["bits"])
        return SupernetSettings(**values, multiquant=MultiQuantSettings(**inner), train=TrainSettings(**train))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidFile(f"{JSON}: settings: {error}") from error


def _blank(layer: StoredLayer, per_channel: bool) -> tuple[dict[int, Tensor], dict[int, tuple[Tensor, Tensor]]]:
    """Scales and ranges of the right shapes, to be overwritten."""
    scales = {bits: torch.ones(layer.rows if per_channel else 1, 1) for bits in layer.weight_bits if bits}
    return scales, {bits: (torch.ones(()), torch.zeros(())) for bits in layer.activation_bits if bits}


def _expected(layers: Mapping[str, StoredLayer], floats: Sequence[int], subnets: int, statistics: int, edges: int) -> dict[str, TensorSpec]:
    """The shared tensors of the file; those with nothing in them are left out."""
    coded = [layer for layer in layers.values() if layer.has_codes]
    inputs = sum(1 for layer in layers.values() for bits in layer.activation_bits if bits)
    shared = {
        "codes": TensorSpec("I8", (sum(layer.rows * layer.columns for layer in coded),)),
        "code_scales": TensorSpec("F32", (sum(layer.rows for layer in coded),)),
        "weight_scales": TensorSpec("F32", (sum(layer.rows * len(layer.weight_bits) for layer in coded),)),
        "activation_scales": TensorSpec("F32", (inputs,)),
        "activation_zero_points": TensorSpec("U8", (inputs,)),
        "floats": TensorSpec("F32", (sum(floats),)),
        "statistics": TensorSpec("F32", (subnets * statistics,)),
        "edges": TensorSpec("F32", (subnets * edges * 2,)),
    }
    return {name: spec for name, spec in shared.items() if spec.nbytes}


def _load(layer: nn.Module, part: LayerTensors) -> None:
    """Put a layer's stored numbers into its blank slots. Raises InvalidFile where a scale is none."""
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    if part.codes is not None:
        values = torch.from_numpy(part.codes.astype(np.float32) * part.code_scale[:, None])
        float_weight(layer).copy_(from_rows(layer, values))
        scales = torch.from_numpy(np.stack([scale for scale in part.weight_scales.values()]))[:, :, None]
        weights.load(scales if weights.start.shape[1] > 1 else scales[:, :1])
    if inputs is not None:
        inputs.load(torch.tensor([scale for scale, _ in part.ranges.values()]))
        inputs.offsets.copy_(torch.tensor([float(zero) for _, zero in part.ranges.values()]) / inputs.limits[:, 1])
