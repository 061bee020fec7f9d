"""Why a layer has its bits, told from a run's files alone: what each precision was predicted to lose and to cost, and what bits were worth
where the budget ended.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from anybit.allocation import Frontier, frontier
from anybit.checkpoint import read_report, runs_in
from anybit.errors import InvalidFile
from anybit.files import read_sealed
from anybit.reporting import human_bytes, human_count
from anybit.scheme import Budget, Precision, check_names
from anybit.searches import SEARCH, Row
from anybit.supernet import JSON as SUPERNET_JSON
from anybit.supernet import read_supernet_file

Kind = TypeVar("Kind")
LIMITED = {"bits": "bits", "bytes": "bytes", "percent": "bytes", "bops": "bops"}
"""Condition of a budget -> the cost that it limits."""
WHOLE = "steps are whole, and this scheme was the better one as a whole, predicted or measured"
EACH = {"bits": (1000, "kB of codes"), "bytes": (1000, "kB"), "bops": (1e6, "million BOPs")}
"""Cost -> (how much of it a price is told for, in words). Bits are counted as the bytes of codes that they take."""


def _is_precision(text: str) -> str:
    Precision.parse(text)
    return text


def _is_budget(text: str) -> str:
    Budget.parse(text)
    return text


PrecisionText = Annotated[str, AfterValidator(_is_precision)]
BudgetText = Annotated[str, AfterValidator(_is_budget)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class Candidate(Strict):
    """A layer at one precision: predicted loss above the float network's, bytes and BOPs."""

    loss: float
    bytes: int
    bops: int


class LayerRow(Strict):
    """A layer as the run has it."""

    precision: PrecisionText
    weights: int = Field(ge=0)
    bytes: int


class Table(Strict):
    """Every layer's candidates; `weights` of all layers."""

    weights: int
    layers: dict[str, dict[PrecisionText, Candidate]]


class Sizes(Strict):
    """What the whole scheme comes to."""

    weight_bits: float
    bytes: int = Field(gt=0)
    percent: float
    bops: int


class Errors(Strict):
    """Relative errors of what was reconstructed; None where there was nothing to do."""

    before: float | None = None
    after: float | None = None


class AllocatedReport(Strict):
    """What a report must have to tell why a layer has its bits, where an allocation gave them."""

    budget: BudgetText | None
    result: Sizes
    float_bytes: int = Field(gt=0)
    layers: dict[str, LayerRow]
    table: Table
    certificate: dict[str, Any]
    candidate_errors: dict[str, dict[str, Errors]] = {}
    units: dict[str, Errors] = {}


class Chosen(Strict):
    """What a search chose for a budget."""

    scheme: dict[str, str]


class Epoch(Strict):
    """A training's epoch: the weight bits of each layer after it (None: float)."""

    epoch: int
    layers: dict[str, int | None]


def explain(run: str | Path, layer: str) -> dict[str, Any]:
    """Why `layer` has its bits: numbers, and under "why" sentences that say what they mean.

    Of a calibrate run: "candidates" (each precision's predicted loss, bytes and BOPs), the "shadow_price" of its budget (what the last bits
    were spent on, and the loss that they gained for each unit of cost), what one step "more" or "less" would gain or lose, and the
    reconstruction "errors". Of grow the bits after each epoch; of a search what was tried. Raises SchemeMismatch for a name that is none
    of the layers, with near matches.
    """
    folder = Path(run)
    if runs_in(folder):
        names = ", ".join(one.name for one in runs_in(folder))
        raise InvalidFile(f"{folder} holds several runs: {names}. Name one of them: {runs_in(folder)[0]}.")
    report = read_report(folder)
    about = {"run": str(run), "layer": layer, "road": report.get("road", "calibrate")}
    if (folder / SUPERNET_JSON).is_file():
        return about | _of_supernet(folder, layer)
    layers = _validated(dict[str, LayerRow], report.get("layers"), folder / "report.json", "layers")
    check_names([layer], layers, str(folder))
    about |= {"budget": report.get("budget"), "precision": layers[layer].precision}
    if "epochs" in report:
        return about | _of_training(_validated(list[Epoch], report["epochs"], folder / "report.json", "epochs"), layer, layers[layer])
    if about["road"] != "calibrate":
        said = (
            f"{layer} is {layers[layer].precision} in this subnet: the search that it was extracted from, or --scheme, gave it these bits."
        )
        return about | {"why": [said, f"`anybit explain SEARCH {layer}` says what a search tried of it."]}
    if "table" not in report:
        raise InvalidFile(
            f"{folder / 'report.json'} was written by an earlier anybit and has no table of candidates. Make the run again, or "
            f"anybit allocate {folder} --budget {report.get('budget') or '4bit'} --output RUN2, and explain that."
        )
    return about | _of_allocation(_validated(AllocatedReport, report, folder / "report.json"), layer, folder)


def _validated(kind: type[Kind], data: Any, path: Path, within: str = "") -> Kind:
    """What the file holds (`within` a part of it) as `kind`, or InvalidFile naming the field that differs."""
    try:
        return TypeAdapter(kind).validate_python(data, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in (within, *first["loc"]) if part != "") or "the file"
        raise InvalidFile(f"{path}: {where}: {first['msg']}. Restore it or run again.") from error


# An allocation


def _of_allocation(report: AllocatedReport, layer: str, folder: Path) -> dict[str, Any]:
    """What the table says of the layer, and what a unit of the limited cost was worth where the budget ended."""
    for name in {**report.layers, **report.table.layers}:
        if name not in report.layers or report.layers[name].precision not in report.table.layers.get(name, {}):
            raise InvalidFile(f"{folder / 'report.json'}: the table and the layers do not agree on {name}. Restore it or run again.")
    row, candidates = report.layers[layer], report.table.layers[layer]
    cost, left = _limited(report)
    choices = {name: [Precision.parse(text) for text in options] for name, options in report.table.layers.items()}
    losses = {name: np.array([one.loss for one in options.values()]) for name, options in report.table.layers.items()}
    costs = {name: np.array([_cost(report, cost, name, text) for text in options]) for name, options in report.table.layers.items()}
    spent = math.fsum(_cost(report, cost, name, one.precision) for name, one in report.layers.items())
    hull = frontier(choices, losses, costs)
    paid = hull.within(spent) or 0
    last, following = _step_of(hull, paid - 1), _step_of(hull, paid)
    more, less = (_best_move(report, cost, layer, dearer) for dearer in (True, False))
    found = {
        "costs": {"weights": row.weights, "bytes": row.bytes, "bops": candidates[row.precision].bops},
        "candidates": {text: one.model_dump() for text, one in candidates.items()},
        "limited": cost,
        "left": left,
        "on_frontier": hull.scheme(paid).to_json() == {name: one.precision for name, one in report.layers.items()},
        "shadow_price": last,
        "next_step": following,
        "more": more,
        "less": less,
        "errors": {
            "candidates": {bits: one.model_dump() for bits, one in report.candidate_errors.get(layer, {}).items()},
            "units": {name: one.model_dump() for name, one in report.units.items() if name == layer or layer.startswith(f"{name}.")},
        },
    }
    return found | {"why": [*_choice_in_words(report, layer), *_prices_in_words(found), *_errors_in_words(found["errors"], row)]}


def _limited(report: AllocatedReport) -> tuple[str, float | None]:
    """(the cost that the budget limits most tightly, how much of it the scheme left); bytes, and None, where it limits none of them."""
    result, total = report.result, report.table.weights
    spent = {"bits": result.weight_bits, "bytes": result.bytes, "percent": result.percent, "bops": result.bops}
    unit = {"bits": total / 8, "bytes": 1, "percent": report.float_bytes / 100, "bops": 1}
    conditions = [one for one in Budget.parse(report.budget).conditions if one.quantity in LIMITED] if report.budget else []
    if not conditions:
        return "bytes", None
    tightest = max(conditions, key=lambda one: spent[one.quantity] / one.limit)
    return LIMITED[tightest.quantity], (tightest.limit - spent[tightest.quantity]) * unit[tightest.quantity]


def _cost(report: AllocatedReport, cost: str, layer: str, precision: str) -> float:
    """What a layer costs at a precision: bytes of the file, bytes of codes alone, or BOPs."""
    if cost == "bits":
        return report.layers[layer].weights * Precision.parse(precision).stored_weight_bits / 8
    return float(getattr(report.table.layers[layer][precision], cost))


def _move(layer: str, before: str, after: str, cost: float, loss: float) -> dict[str, Any]:
    """A change of one layer's precision: by how much the cost and the predicted loss rise, and the loss gained for each unit of cost."""
    return {"layer": layer, "from": before, "to": after, "cost": cost, "loss": loss, "price": -loss / cost}


def _step_of(hull: Frontier, index: int) -> dict[str, Any] | None:
    """A step of the frontier as a move, where there is one of this number."""
    if not 0 <= index < len(hull.steps):
        return None
    one, before = hull.steps[index], hull.steps[index - 1] if index else hull
    return _move(one.layer, str(hull.scheme(index)[one.layer]), str(one.precision), one.cost - before.cost, one.loss - before.loss)


def _best_move(report: AllocatedReport, cost: str, layer: str, dearer: bool) -> dict[str, Any] | None:
    """The step from the layer's precision that gains most for its cost, or, to a cheaper one, loses least for what it frees."""
    now = report.layers[layer].precision
    loss, spent = report.table.layers[layer][now].loss, _cost(report, cost, layer, now)
    moves = []
    for text, one in report.table.layers[layer].items():
        rise = _cost(report, cost, layer, text) - spent
        if rise > 0 if dearer else rise < 0:
            moves.append(_move(layer, now, text, rise, one.loss - loss))
    best = max if dearer else min
    return best(moves, key=lambda move: move["price"], default=None)


# In words


def _choice_in_words(report: AllocatedReport, layer: str) -> list[str]:
    row, result, options = report.layers[layer], report.result, report.table.layers[layer]
    share = f"{human_bytes(row.bytes)} of the file's {human_bytes(result.bytes)} ({100 * row.bytes / result.bytes:.1f} %)"
    said = [
        f"{layer} is {row.precision}: {human_count(row.weights)} weights, {share}, {options[row.precision].loss:.3g} of predicted loss."
    ]
    if len(options) == 1:
        said.append("It had no choice: this was its one candidate (--keep, --weight-bits and --activation-bits say what a layer may get).")
    elif report.budget is None:
        said.append("No budget was given: every layer has its largest candidate.")
    chosen = report.certificate.get("chosen")
    if isinstance(chosen, str) and chosen not in ("largest", "allocated 1") and not chosen.startswith("allocated at"):
        said.append(
            f"The whole scheme is the one called {chosen!r}: as measured on held-out inputs it was preferred to the one predicted best."
        )
    return said


def _prices_in_words(found: Mapping[str, Any]) -> list[str]:
    """The shadow price, and one step more and less beside it; nothing where there was no choice."""
    if len(found["candidates"]) == 1:
        return []
    return [*_frontier_in_words(found), _more_in_words(found), _less_in_words(found)]


def _frontier_in_words(found: Mapping[str, Any]) -> list[str]:
    cost, last, following = found["limited"], found["shadow_price"], found["next_step"]
    said = [] if found["on_frontier"] else ["The scheme lies beside the frontier of predicted losses: its prices are near, not exact."]
    if last is not None:
        bought = f"{_amount(last['cost'], cost)} for {-last['loss']:.3g} less predicted loss"
        said.append(f"The shadow price is {_price(last, cost)}: the last step that this size pays for took {_step(last)}, {bought}.")
    if following is not None:
        said.append(f"The next step would take {_step(following)}: {_amount(following['cost'], cost)} at {_price(following, cost)}.")
    return said


def _more_in_words(found: Mapping[str, Any]) -> str:
    cost, more = found["limited"], found["more"]
    if more is None:
        return "No precision of more cost is among its candidates."
    would = f"More, {more['to']}, would cost {_amount(more['cost'], cost)} and gain"
    if more["loss"] >= 0:
        return f"{would} nothing."
    return f"{would} {-more['loss']:.3g}, {_price(more, cost)}: {_why_not_more(found)}."


def _less_in_words(found: Mapping[str, Any]) -> str:
    cost, less, following = found["limited"], found["less"], found["next_step"]
    if less is None:
        return "No precision of less cost is among its candidates."
    would = f"Less, {less['to']}, would free {_amount(-less['cost'], cost)} and lose"
    if less["loss"] <= 0:
        return f"{would} nothing, as predicted."
    would += f" {less['loss']:.3g}, {_price(less, cost)}"
    if following is None:
        return f"{would}: and no other layer has a use for it."
    worth = less["price"] >= following["price"]
    return f"{would}: {'more' if worth else 'less'} than the next step would gain with it{'' if worth else f', but {WHOLE}'}."


def _why_not_more(found: Mapping[str, Any]) -> str:
    last, more, left = found["shadow_price"], found["more"], found["left"]
    if last is not None and more["price"] < last["price"]:
        return "less than the shadow price, so the budget bought more elsewhere"
    if left is not None and more["cost"] > left:
        return f"the budget has {_amount(left, found['limited'])} left, too little for it"
    if left is None:
        return "the budget asked for the smallest scheme that keeps its limit"
    return f"more than the shadow price, but {WHOLE}"


def _errors_in_words(errors: Mapping[str, Any], row: LayerRow) -> list[str]:
    alone = errors["candidates"].get(str(Precision.parse(row.precision).weight_bits))
    parts = [("the layer alone, at these weight bits", alone)] if alone else []
    parts += [(f"{unit}, in the chosen scheme", one) for unit, one in errors["units"].items()]
    return [
        f"AdaQuant on {what}: relative error {one['before']:.3g} before, {one['after']:.3g} after."
        for what, one in parts
        if None not in (one["before"], one["after"])
    ]


def _step(move: Mapping[str, Any]) -> str:
    return f"{move['layer']} from {move['from']} to {move['to']}"


def _amount(amount: float, cost: str) -> str:
    if cost == "bops":
        return f"{human_count(round(amount))} BOPs"
    return human_bytes(round(amount)) + (" of codes" if cost == "bits" else "")


def _price(move: Mapping[str, Any], cost: str) -> str:
    each, words = EACH[cost]
    return f"{move['price'] * each:.3g} of loss a {words}"


# Trainings and searches


def _of_training(epochs: list[Epoch], layer: str, row: LayerRow) -> dict[str, Any]:
    """The layer's bits after each epoch, and since when they stand."""
    for epoch in epochs:
        check_names([layer], epoch.layers, f"Epoch {epoch.epoch}")
    bits = {epoch.epoch: epoch.layers[layer] for epoch in epochs}
    moved = [after.epoch for before, after in pairwise(epochs) if before.layers[layer] != after.layers[layer]]
    told = ", ".join("float" if width is None else str(width) for width in bits.values())
    said = [f"{layer} is {row.precision} after {len(epochs)} epochs of training. Its weight bits after each: {told}."]
    if moved:
        said.append(f"They changed last in epoch {moved[-1]}.")
    said.append("A training has no table of what other bits would lose: its gates, under the budget's penalty, decided.")
    return {"bits": bits, "why": said}


def _of_supernet(folder: Path, layer: str) -> dict[str, Any]:
    """What a search tried of the layer; of a supernet that was not searched, what it was trained for."""
    stored = read_supernet_file(folder).stored()
    check_names([layer], stored, str(folder))
    options = [str(precision) for precision in stored[layer].choices]
    if not (folder / SEARCH).is_file():
        said = f"{layer} was trained for {_range(options)}. No scheme is chosen in a supernet: search it, or extract a subnet."
        return {"candidates": options, "why": [said]}
    found = read_sealed(folder / SEARCH, 1, "Search again.")
    if not isinstance(found, dict):
        raise InvalidFile(f"{folder / SEARCH} is no JSON object. Search again.")
    evaluated, front = (_validated(list[Row], found.get(key), folder / SEARCH, key) for key in ("evaluated", "front"))
    budgets = _validated(dict[str, Chosen], found.get("budgets"), folder / SEARCH, "budgets")
    for one in (*evaluated, *front, *budgets.values()):
        check_names([layer], one.scheme, str(folder / SEARCH))
    tried = {option: [one.score for one in evaluated if one.scheme[layer] == option] for option in options}
    on_front = {option: sum(one.scheme[layer] == option for one in front) for option in options}
    said = [f"{layer} has {_range(options)} to choose from. The search evaluated {len(evaluated)} subnets; {len(front)} are on the front."]
    said += [f"For {text} it chose {one.scheme[layer]}." for text, one in budgets.items()]
    said.append("A search scores whole subnets: what these bits alone are worth, it does not know.")
    return {
        "candidates": {
            option: {"evaluated": len(scores), "best_score": max(scores, default=None), "on_front": on_front[option]}
            for option, scores in tried.items()
        },
        "front": [{"cost": one.cost, "score": one.score, "precision": one.scheme[layer]} for one in front],
        "budgets": {text: one.scheme[layer] for text, one in budgets.items()},
        "why": said,
    }


def _range(options: list[str]) -> str:
    return options[0] if len(options) == 1 else f"{len(options)} precisions from {options[0]} to {options[-1]}"
