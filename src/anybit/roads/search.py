"""Search a supernet for its best schemes, and choose one for each budget."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from anybit.allocation.choice import fits_budget
from anybit.budget import BYTES, PERCENT, Budget, budget_check, check_is_counted, cost_quantities, listed, own_costs, parse_budgets
from anybit.calls import checking, public
from anybit.data.batches import Batch, check_finite
from anybit.data.samples import Samples
from anybit.data.tasks import TASKS, Metric, keeping_task, metric_name
from anybit.environment import environment
from anybit.errors import AnybitError, InfeasibleBudget, InvalidFile, InvalidInput, InvalidSetting
from anybit.files.cache import Cache, Entry, open_cache
from anybit.files.strict import in_words, sealed, sha256_of, validated, write_json
from anybit.methods.settings import SearchSettings
from anybit.methods.subnet_search import Evaluated, SearchResult, hypervolume, pareto_front, search_subnets, total_cost
from anybit.networks.edges import observe_edge_ranges
from anybit.networks.wiring import observe
from anybit.progress import plan, tell, track
from anybit.reports.bars import shown_in_notebooks
from anybit.reports.page import run_page
from anybit.roads.expected import search_stages
from anybit.roads.inputs import on_device, supernet_data
from anybit.roads.keys import key_of_supernet
from anybit.roads.latencies import supernet_with_latencies
from anybit.runs.folder import new_folder
from anybit.runs.names import SEARCH, SUPERNET, SUPERNET_JSON
from anybit.runs.records import EvaluatedRecord
from anybit.runs.report import read_search, write_report
from anybit.runs.trusted import trust
from anybit.scheme import Scheme, check_whole
from anybit.settings import takes
from anybit.supernets.folder import load_supernet
from anybit.supernets.prepared import bn_batches, held_out_split
from anybit.supernets.statistics import KnownSubnet
from anybit.supernets.supernet import Supernet, scores, uniform_schemes, write_supernet

TIE = 1e-3
"""Points of top-1 that equal one nat of loss."""


def cached_search(cache: Cache, supernet: Supernet, settings: SearchSettings, images: int, run: Callable[[], SearchResult]) -> SearchResult:
    """Return a whole search, cached by its settings."""

    def as_json() -> dict[str, Any]:
        result = run()
        rows = [{**vars(one), "scheme": one.scheme.to_json()} for one in result.evaluated]
        return {"evaluated": rows, "rank_correlation": result.rank_correlation}

    def from_json(data: Any) -> SearchResult:
        entry = validated(SearchEntry, data, "the search")
        rows = [Evaluated(Scheme(row.scheme), row.score, row.cost, row.origin) for row in entry.evaluated]
        for row in rows:
            check_whole(row.scheme, supernet.choices)
            if row.cost != total_cost(supernet.costs, settings.quantity, row.scheme):
                raise InvalidFile(f"{row.scheme} does not cost {row.cost:g}")
        return SearchResult(rows, entry.rank_correlation)

    return cache.keyed(images, settings.to_json()).value("search", as_json, from_json)


def cached_statistics(cache: Cache, supernet: Supernet, scheme: Scheme, learn: Callable[[], KnownSubnet]) -> None:
    """Store a subnet's batch-norm statistics and edge ranges in the supernet, from the cache or estimated."""

    def make() -> Entry:
        known = learn()
        return Entry(None, {"statistics": known.statistics, "edges": known.edges})

    def read(entry: Entry) -> KnownSubnet:
        known, another = KnownSubnet(scheme, entry.tensors["statistics"], entry.tensors["edges"]), supernet.known[0]
        if known.statistics.shape != another.statistics.shape or known.edges.shape != another.edges.shape:
            raise InvalidFile("it is of another network")
        supernet.check_known(known, f"statistics of {scheme}")
        return known

    known = cache(f"statistics of {scheme}", make, read)
    supernet.known = [*(one for one in supernet.known if one.scheme != scheme), known]


class SearchEntry(BaseModel):
    """Cache entry of a whole search."""

    model_config = ConfigDict(extra="forbid", strict=True)
    evaluated: list[EvaluatedRecord] = Field(min_length=1)
    rank_correlation: float | None


@dataclass
class Search:
    """The result of a search: `supernet` stores the statistics of `chosen` (budget -> scheme) and of the front; `report` holds the rest."""

    supernet: Supernet
    chosen: dict[str, Scheme]
    report: dict[str, Any]

    @public
    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write the folder of the search: the supernet with the new statistics, search.json, report.json."""
        with new_folder(Path(folder), overwrite) as draft:
            write_supernet(draft, self.supernet)
            write_json(draft / SEARCH, sealed({**self.report, "sha256": sha256_of(draft / SUPERNET)}))
            (draft / "report.html").write_text(run_page(self.supernet.report | {"search": self.report}), encoding="utf8")
            write_report(draft, self.supernet.report | {"search": {k: v for k, v in self.report.items() if k != "evaluated"}})
        trust(Path(folder), SUPERNET_JSON)
        return Path(folder)


FRONT = 10
"""Subnets of a front, as expected for the progress."""


def run_search(
    supernet: Supernet,
    samples: Samples,
    budgets: Sequence[Budget],
    settings: SearchSettings,
    metric: Metric | None,
    cache: Cache,
) -> Search:
    """Search, measure the front again on other held-out samples, and choose a scheme for each budget; `samples` are the training data.

    During the search, batch norm is estimated on `settings.bn_images` inputs, which takes most of the time. The front is measured again,
    and stored, with as many inputs as in training.
    """
    # Long, because it is the list of the search's stages, which share inputs, cache and scores.
    fitting, images, search_on, measure_on = _split_samples(supernet, samples, settings)
    bn = bn_batches(fitting, supernet.settings)
    check_finite([*search_on, *measure_on, *bn])
    asked = settings.bn_images or supernet.settings.bn_images
    few = bn_batches(fitting, replace(supernet.settings, bn_images=asked))
    cache = key_of_supernet(cache, supernet, [*search_on, *measure_on, *bn, *few], metric)
    key = metric_name(metric) if metric else TASKS[supernet.task].counted or "loss"

    def score(scheme: Scheme, test: Sequence[Batch], statistics: Sequence[Batch], where: tuple[str, int]) -> float:
        def measure() -> float:
            measured = scores(supernet, scheme, statistics, test, metric)
            # Ties in accuracy are broken by the loss; a custom metric is used as it is.
            if key == "loss":
                return -measured["loss"]
            return measured[key] - (TIE * min(measured["loss"], 100.0) if key == "top1" else 0.0)

        return cache.keyed(*where, images).value(f"score of {scheme}", measure, float)

    statistics = sum(map(len, few)), sum(map(len, bn))
    plan(search_stages(settings.evaluations, FRONT, statistics, images), measured=None)
    progress = iter(track(range(settings.evaluations), "evaluations"))

    def evaluate(scheme: Scheme) -> float:
        next(progress, None)
        value = score(scheme, search_on, few, ("search", asked))
        tell("subnet", score=value, cost=total_cost(supernet.costs, settings.quantity, scheme), scheme=scheme)
        return value

    uniform_ones = list(uniform_schemes(supernet).values())
    result = cached_search(
        cache.keyed(asked),
        supernet,
        settings,
        images,
        lambda: search_subnets(supernet.choices, supernet.costs, evaluate, settings, uniform_ones),
    )
    next(progress, None)
    front = pareto_front(result.evaluated)
    shown = dict.fromkeys(one.scheme for one in [*front, *result.evaluated[: len(uniform_ones)]])
    where = ("measure", supernet.settings.bn_images)
    again = {scheme: score(scheme, measure_on, bn, where) for scheme in track(shown, "front")}
    chosen = {}
    for budget in budgets:
        fit = [one for one in result.evaluated if fits_budget(supernet.costs, one.scheme, budget)]
        chosen[str(budget)] = max(fit, key=lambda one: (one.score, -one.cost)).scheme if fit else lowest(supernet)
    first = next(fitting.subset([0, 1]).batches(2))
    edge_batches = bn[:8]

    def edge_ranges(model: nn.Module) -> Mapping[str, tuple[float, float]]:
        return observe_edge_ranges(model, observe(model, first), edge_batches)

    for scheme in track(dict.fromkeys([*chosen.values(), *(one.scheme for one in front)]), "statistics"):
        if all(known.scheme != scheme for known in supernet.known):
            cached_statistics(cache, supernet, scheme, partial(supernet.learn, scheme, bn, edge_ranges))
    report: dict[str, Any] = {
        "version": 1,
        "score": key,
        **_front_in_report(supernet, result, front, again, settings.quantity),
        "recalled": cache.counts["recalled"],
        "budgets": {text: {"scheme": scheme.to_json(), **supernet.costs.summary(scheme)} for text, scheme in chosen.items()},
        "images": {
            "searched_on": images,
            "measured_on": images,
            "batch_norm": sum(map(len, few)),
            "batch_norm_of_the_front": sum(map(len, bn)),
        },
        "settings": settings.to_json(),
        "environment": environment(),
    }
    tell("result", budgets=report["budgets"], hypervolume=report["hypervolume"]["value"], rank_correlation=result.rank_correlation)
    return Search(supernet, chosen, report)


def _split_samples(supernet: Supernet, samples: Samples, settings: SearchSettings) -> tuple[Samples, int, list[Batch], list[Batch]]:
    """Return (training samples, number of held-out samples to search on, these as batches, as many others to measure the front on)."""
    if not samples.labelled:
        raise InvalidInput(f"The search needs labels: subnets are ranked by their accuracy. {samples.unlabelled}Give labelled data.")
    fitting, held_out = held_out_split(samples, supernet.settings)
    images = min(settings.images, len(held_out) // 2)
    if images < 1:
        raise InvalidInput(
            f"{len(held_out)} held-out sample(s) are too few: both the search and the front need some. Train with a larger --held-out."
        )
    search_on, measure_on = (list(held_out.subset(range(at, at + images)).batches(256)) for at in (0, images))
    return fitting, images, search_on, measure_on


def _front_in_report(
    supernet: Supernet, result: SearchResult, front: Sequence[Evaluated], again: Mapping[Scheme, float], quantity: str
) -> dict[str, Any]:
    """Return the evaluated subnets, the front among them and its hypervolume; `again` are the scores of the second measurement."""
    # The same corner for every search of this supernet: the highest bits' cost, the lowest bits' score.
    corner = (total_cost(supernet.costs, quantity, supernet.method.highest), result.evaluated[0].score)
    rows = [
        {"scheme": o.scheme.to_json(), "score": o.score, "cost": o.cost, "origin": o.origin, "measured": again.get(o.scheme)}
        for o in result.evaluated
    ]  # fmt: skip
    return {
        "quantity": quantity,
        "evaluated": rows,
        "front": [rows[result.evaluated.index(one)] for one in front],
        "hypervolume": {"value": hypervolume(front, *corner), "cost": corner[0], "score": corner[1]},
        "rank_correlation": result.rank_correlation,
    }


def lowest(supernet: Supernet) -> Scheme:
    return supernet.method.lowest


def check_fits(supernet: Supernet, budget: Budget) -> None:
    """Raise InfeasibleBudget with the smallest possible budget if even the lowest subnet exceeds `budget`."""
    check_is_counted(budget)
    for quantity, _ in budget.costs():
        if not quantity.is_known(supernet.costs):
            raise InvalidSetting(
                f"A budget of {quantity.name} ({budget}) depends on the shapes of the network's inputs: give them with --data."
            )
    if not fits_budget(supernet.costs, lowest(supernet), budget):
        raise InfeasibleBudget(_why_too_large(supernet, budget))


def _why_too_large(supernet: Supernet, budget: Budget) -> str:
    """Write the costs of the smallest subnet and the remedies."""
    amounts = {cost: cost.total(supernet.costs, lowest(supernet)) for cost in cost_quantities() if cost.is_known(supernet.costs)}
    least = {cost: cost.in_words(amount) for cost, amount in amounts.items()}
    counted = ", ".join(f"{least[cost]} ({least[PERCENT]})" if cost is BYTES else least[cost] for cost in own_costs())
    timed = "".join(f" and is predicted to take {words}" for cost, words in least.items() if cost.known)
    exceeded = [cost for cost, limit in budget.costs() if amounts[cost] > limit]
    enough = ",".join(
        cost.text(amounts[cost], cost.unit_for(limit)) if cost in exceeded else cost.exact_text(limit) for cost, limit in budget.costs()
    )
    remedy = next((cost.remedy for cost in exceeded if cost.known), exceeded[0].remedy)
    return f"The smallest subnet has {counted}{timed}: more than the budget {budget}. Raise the budget to {enough}, or {remedy}."


def _evaluated_in(folder: Path, supernet: Supernet) -> list[tuple[float, float, Scheme]]:
    """Yield (score, -cost, scheme) of each subnet in the folder's search.json."""
    known = [(row.score, -row.cost, Scheme(row.scheme)) for row in read_search(folder).evaluated]
    try:
        for _, _, scheme in known:
            check_whole(scheme, supernet.choices)
    except AnybitError as error:
        raise InvalidFile(f"{folder / SEARCH}: {in_words(error)} Search again.") from error
    return known


def best_within(folder: Any, supernet: Supernet, budget: Budget) -> Scheme:
    """Return the best evaluated subnet of a search that fits; in a supernet without a search, the largest uniform one that fits."""
    check_fits(supernet, budget)
    if isinstance(folder, (str, Path)) and (Path(folder) / SEARCH).is_file():
        known = _evaluated_in(Path(folder), supernet)
        fit = [one for one in known if fits_budget(supernet.costs, one[2], budget)]
        if fit:
            return max(fit, key=lambda one: one[:2])[2]
    fits = [scheme for scheme in uniform_schemes(supernet).values() if fits_budget(supernet.costs, scheme, budget)]
    return fits[-1] if fits else lowest(supernet)


@public
@checking(budget=budget_check(check_is_counted))
@shown_in_notebooks
@takes(SearchSettings)
@keeping_task()
def search(
    run: str | Path | Supernet,
    data: Any = None,
    budget: str | Budget | Sequence[str | Budget] | None = None,
    *,
    model: nn.Module | str | None = None,
    metric: Metric | None = None,
    workers: int = 0,
    device: str = "cpu",
    cache: str | Path | bool = True,
    **settings: Any,
) -> Search:
    """Find a supernet's best schemes at every cost, and for each budget the best that fits.

    data        the supernet's training data; subnets are evaluated on its held-out share
    budget      one or several, each as for `calibrate`, but only costs
    model, metric, workers, device  as for `calibrate`
    cache       store every evaluation, in this folder or (True) in the user's cache directory: a search that was interrupted, or has
                another budget, does not repeat them. Scores of another supernet, data or metric are never reused

    Raises InfeasibleBudget with the smallest possible budget if no subnet fits one.
    """
    options = SearchSettings.of(**settings)
    budgets = parse_budgets(listed(budget), check_is_counted)
    supernet = run if isinstance(run, Supernet) else load_supernet(run, model)
    samples = supernet_data(run, supernet, data, workers, metric).on(device)
    supernet = supernet_with_latencies(supernet, samples, budgets)
    for one in budgets:
        check_fits(supernet, one)
    on_device(torch.nn.Identity(), device)  # raises if there is no such device
    supernet.model.to(device)
    try:
        result = run_search(supernet, samples, budgets, options, metric, open_cache(cache))
        if supernet.costs.latency is not None:  # only for these budgets
            result.supernet = replace(supernet, costs=replace(supernet.costs, latency=None))
        return result
    finally:
        supernet.model.cpu()
