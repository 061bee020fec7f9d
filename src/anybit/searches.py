"""The road from a supernet to its best subnets: what is evaluated on which samples, what is kept, what each budget gets."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from anybit import stages
from anybit.batches import Batch, Samples
from anybit.checkpoint import new_folder, read_json, remember, write_json
from anybit.errors import InfeasibleBudget, InvalidInput, InvalidSetting
from anybit.evaluation import Metric
from anybit.pages import search_page
from anybit.progress import track
from anybit.reporting import environment
from anybit.scheme import Budget, Scheme
from anybit.subnet_search import Evaluated, Found, SearchSettings, hypervolume, pareto_front, search
from anybit.subnets import bn_batches, held_out_split
from anybit.supernet import JSON, Supernet, scores, uniform_schemes, write_supernet
from anybit.wiring import observe

SEARCH = "search.json"
TIE = 1e-3
"""Of two subnets that score the same, the one of lower loss is the better: points of the score that one nat is worth."""


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
