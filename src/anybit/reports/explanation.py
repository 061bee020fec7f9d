"""Explain why a layer has its bits, from a run's files alone: predicted loss and cost of each precision, and the value of bits at the limit
of the budget.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from anybit.allocation.frontier import Frontier
from anybit.budget import BYTES, QUANTITIES, Budget, Cost, Costs
from anybit.calls import public
from anybit.errors import InvalidFile
from anybit.reports.words import human_bytes, human_count
from anybit.runs.folder import check_one
from anybit.runs.names import REPORT, SEARCH, SUPERNET_JSON
from anybit.runs.records import Amounts, LayerRow, Record, SearchRecord, Table
from anybit.runs.report import read_record, read_search
from anybit.scheme import Precision, check_names
from anybit.supernets.folder import read_supernet_file

WHOLE = "steps are whole, and this scheme was the better one as a whole, predicted or measured"
EACH = {"bits": (1000, "kB of codes"), "bytes": (1000, "kB"), "bops": (1e6, "million BOPs")}
"""Cost -> (amount that a price refers to, in words), if it is not the unit of its limits."""
AMOUNTS: Mapping[str, Callable[[float], str]] = {
    "bits": lambda amount: f"{human_bytes(round(amount))} of codes",
    "bytes": lambda amount: human_bytes(round(amount)),
    "bops": lambda amount: f"{human_count(round(amount))} BOPs",
}
"""Cost -> how to write an amount of it, if not as a limit."""


@public
def explain(run: str | Path, layer: str) -> dict[str, Any]:
    """Explain why `layer` has its bits: numbers, and sentences about them under "why".

    For a calibrate run: "candidates" (each precision's predicted loss, bytes and BOPs), the "shadow_price" of its budget (the last step
    that it paid for, and the loss saved per unit of cost), the gain or loss of one step "more" or "less", and the reconstruction "errors".
    For grow, the bits after each epoch; for a search, the schemes that it tried. Raises SchemeMismatch, with near matches, if `layer` is
    not a layer of the run.
    """
    folder = Path(run)
    check_one(folder)
    record = read_record(folder)
    explanation: dict[str, Any] = {"run": str(run), "layer": layer, "road": record.road}
    if (folder / SUPERNET_JSON).is_file():
        return explanation | _of_supernet(folder, layer)
    check_names([layer], record.layers, str(folder))
    explanation |= {"budget": record.budget, "precision": str(record.layers[layer].precision)}
    if record.epochs:
        return explanation | _of_training(record, layer)
    if record.road != "calibrate":
        sentences = (
            f"{layer} is {explanation['precision']} in this subnet: the search that it was extracted from, or --scheme, gave it these bits."
        )
        return explanation | {"why": [sentences, f"`anybit explain SEARCH {layer}` shows what a search tried for it."]}
    if record.table is None:
        raise InvalidFile(
            f"{folder / REPORT} was written by an earlier anybit and has no table of candidates. Repeat the run, or run "
            f"`anybit allocate {folder} --budget={record.budget or '4bit'} --output=RUN2`, and explain that."
        )
    return explanation | _of_allocation(record, layer)


def reason(record: Record, layer: str) -> str:
    """Return a sentence or two on why `layer` has its bits, from the record of a run alone."""
    if record.table is None:
        return f"{record.road} ended with {record.layers[layer].precision}"
    return " ".join(_choice_in_words(record, layer)[1:]) or _next_in_words(record, layer)


def _next_in_words(record: Record, layer: str) -> str:
    """Return what one more step of a layer would cost and gain at the limit of the budget, in words."""
    facts = _of_allocation(record, layer)
    return _more_in_words(facts)


# An allocation


def _of_allocation(record: Record, layer: str) -> dict[str, Any]:
    """Explain a layer from the table of candidates, and the price of the limited cost at the limit of the budget."""
    table = _table(record)
    row, candidates = record.layers[layer], table.layers[layer]
    scheme = {name: one.precision for name, one in record.layers.items()}
    cost, left = _limited(record)
    hull = table.frontier_over(lambda name, precision: _cost(record, cost, name, precision))
    paid = hull.within(math.fsum(_cost(record, cost, name, precision) for name, precision in scheme.items())) or 0
    facts: dict[str, Any] = {
        "costs": {"weights": row.weights, "bytes": row.bytes, "bops": candidates[row.precision].bops},
        "candidates": {str(precision): cell.model_dump() for precision, cell in candidates.items()},
        "limited": cost,
        "left": left,
        "on_frontier": dict(hull.scheme(paid)) == scheme,
        "shadow_price": _step_of(hull, paid - 1),
        "next_step": _step_of(hull, paid),
        "more": _best_move(record, cost, layer, dearer=True),
        "less": _best_move(record, cost, layer, dearer=False),
        "errors": {
            "candidates": {bits: one.model_dump() for bits, one in record.candidate_errors.get(layer, {}).items() if one},
            "units": {name: one.model_dump() for name, one in record.units.items() if one and f"{layer}.".startswith(f"{name}.")},
        },
    }
    return facts | {"why": [*_choice_in_words(record, layer), *_prices_in_words(facts), *_errors_in_words(facts["errors"], row)]}


def _table(record: Record) -> Table:
    assert record.table is not None, "only a run with a table of candidates is an allocation"
    return record.table


def _result(record: Record) -> Amounts:
    assert record.result is not None, "a run that has layers has a result"
    return record.result


def _limited(record: Record) -> tuple[str, float | None]:
    """Return (the cost that the budget limits most tightly, how much of it the scheme left unused); bytes, and None, if it limits none that
    a report states."""
    limits = Budget.parse(record.budget).costs() if record.budget else []
    counted = [cost for cost, _ in limits if cost.counted.recorded != "nowhere"]
    spent = {cost: _known(_result(record).amount(cost.report_key)) for cost in counted}
    if not spent:
        return BYTES.name, None
    tightest, limit = max(((cost, limit) for cost, limit in limits if cost in spent), key=lambda one: spent[one[0]] / one[1])
    return tightest.counted.name, (limit - spent[tightest]) * tightest.scale(_counts(record)) / _each(tightest)


def _cost(record: Record, cost: str, layer: str, precision: Precision) -> float:
    """Return a layer's cost at a precision; bits count as bytes of codes."""
    quantity = _cost_named(cost)
    if quantity.recorded == "weights":
        return quantity.layer(_counts(record), layer, precision) / _each(quantity)
    return _known(_table(record).layers[layer][precision].amount(cost))


def _counts(record: Record) -> Costs:
    """Return the record as counts for costs: only the layers' weights and the float bytes are known."""
    return cast(Costs, record)


def _known(amount: float | None) -> float:
    assert amount is not None, "an amount that a budget limits is reported"
    return float(amount)


def _cost_named(name: str) -> Cost:
    cost = QUANTITIES[name]
    assert isinstance(cost, Cost), "reports use this name for costs of layers, never for losses"
    return cost


def _each(cost: Cost) -> float:
    """Return the unit in which a layer's share is written: for a cost in stored bits, a byte."""
    return 8 / cost.stored_bits if cost.stored_bits else 1


def _move(layer: str, before: Precision, after: Precision, cost: float, loss: float) -> dict[str, Any]:
    """Describe a change of one layer's precision: the rise of the cost and of the predicted loss, and the loss saved per unit of cost."""
    return {"layer": layer, "from": str(before), "to": str(after), "cost": cost, "loss": loss, "price": -loss / cost}


def _step_of(hull: Frontier, index: int) -> dict[str, Any] | None:
    """Return a step of the frontier as a move; None if there is no step with this index."""
    if not 0 <= index < len(hull.steps):
        return None
    one, before = hull.steps[index], hull.steps[index - 1] if index else hull
    return _move(one.layer, hull.scheme(index)[one.layer], one.precision, one.cost - before.cost, one.loss - before.loss)


def _best_move(record: Record, cost: str, layer: str, dearer: bool) -> dict[str, Any] | None:
    """Return the layer's step that saves most loss per cost, or, to a cheaper precision, adds least loss per cost saved."""
    now = record.layers[layer].precision
    candidates = _table(record).layers[layer]
    loss, spent = candidates[now].loss, _cost(record, cost, layer, now)
    moves = []
    for precision, one in candidates.items():
        rise = _cost(record, cost, layer, precision) - spent
        if rise > 0 if dearer else rise < 0:
            moves.append(_move(layer, now, precision, rise, one.loss - loss))
    best = max if dearer else min
    return best(moves, key=lambda move: move["price"], default=None)


# In words


def _choice_in_words(record: Record, layer: str) -> list[str]:
    row, result, options = record.layers[layer], _result(record), _table(record).layers[layer]
    share = f"{human_bytes(row.bytes)} of the file's {human_bytes(result.bytes)} ({100 * row.bytes / result.bytes:.1f} %)"
    sentences = [
        f"{layer} is {row.precision}: {human_count(row.weights)} weights, {share}, {options[row.precision].loss:.3g} of predicted loss."
    ]
    if len(options) == 1:
        sentences.append("It had no choice: this was its only candidate (see --keep, --weight-bits and --activation-bits).")
    elif record.budget is None:
        sentences.append("No budget was given: every layer has its largest candidate.")
    chosen = record.certificate.chosen
    if chosen is not None and chosen not in ("largest", "allocated 1") and not chosen.startswith("allocated at"):
        sentences.append(f"The scheme is {chosen!r}: it measured better on held-out inputs than the one predicted best.")
    return sentences


def _prices_in_words(facts: Mapping[str, Any]) -> list[str]:
    """Return the shadow price, and one step more and less beside it, in words; nothing if there was no choice."""
    if len(facts["candidates"]) == 1:
        return []
    return [*_frontier_in_words(facts), _more_in_words(facts), _less_in_words(facts)]


def _frontier_in_words(facts: Mapping[str, Any]) -> list[str]:
    cost, last, following = facts["limited"], facts["shadow_price"], facts["next_step"]
    sentences = [] if facts["on_frontier"] else ["The scheme is not on the frontier of predicted losses: its prices are approximate."]
    if last is not None:
        bought = f"{_amount(last['cost'], cost)} for {-last['loss']:.3g} less predicted loss"
        sentences.append(f"The shadow price is {_price(last, cost)}: the last step within this size took {_step(last)}, {bought}.")
    if following is not None:
        sentences.append(f"The next step would take {_step(following)}: {_amount(following['cost'], cost)} at {_price(following, cost)}.")
    return sentences


def _more_in_words(facts: Mapping[str, Any]) -> str:
    cost, more = facts["limited"], facts["more"]
    if more is None:
        return "None of its candidates costs more."
    would = f"More, {more['to']}, would cost {_amount(more['cost'], cost)} and gain"
    if more["loss"] >= 0:
        return f"{would} nothing."
    return f"{would} {-more['loss']:.3g}, {_price(more, cost)}: {_why_not_more(facts)}."


def _less_in_words(facts: Mapping[str, Any]) -> str:
    cost, less, following = facts["limited"], facts["less"], facts["next_step"]
    if less is None:
        return "None of its candidates costs less."
    would = f"Less, {less['to']}, would free {_amount(-less['cost'], cost)} and lose"
    if less["loss"] <= 0:
        return f"{would} nothing, as predicted."
    would += f" {less['loss']:.3g}, {_price(less, cost)}"
    if following is None:
        return f"{would}: but no other layer can use it."
    worth = less["price"] >= following["price"]
    return f"{would}: {'more' if worth else 'less'} than the next step would gain with it{'' if worth else f', but {WHOLE}'}."


def _why_not_more(facts: Mapping[str, Any]) -> str:
    last, more, left = facts["shadow_price"], facts["more"], facts["left"]
    if last is not None and more["price"] < last["price"]:
        return "less than the shadow price, so the budget bought more elsewhere"
    if left is not None and more["cost"] > left:
        return f"the budget has {_amount(left, facts['limited'])} left, too little for it"
    if left is None:
        return "the budget asked for the smallest scheme that keeps its limit"
    return f"more than the shadow price, but {WHOLE}"


def _errors_in_words(errors: Mapping[str, Any], row: LayerRow) -> list[str]:
    alone = errors["candidates"].get(str(row.precision.weight_bits))
    parts = [("the layer alone, at these weight bits", alone)] if alone else []
    parts += [(f"{unit}, in the chosen scheme", one) for unit, one in errors["units"].items()]
    return [f"Fitted {what}: relative error {one['before']:.3g} before, {one['after']:.3g} after." for what, one in parts]


def _step(move: Mapping[str, Any]) -> str:
    return f"{move['layer']} from {move['from']} to {move['to']}"


def _amount(amount: float, cost: str) -> str:
    return (AMOUNTS.get(cost) or _cost_named(cost).in_words)(amount)


def _price(move: Mapping[str, Any], cost: str) -> str:
    unit = QUANTITIES[cost].unit
    each, words = EACH.get(cost, (QUANTITIES[cost].units[unit], unit))
    return f"{move['price'] * each:.3g} of loss per {words}"


# Trainings and searches


def _of_training(record: Record, layer: str) -> dict[str, Any]:
    """Explain a layer by its bits after each epoch, and when they last changed."""
    epochs = record.epochs
    for epoch in epochs:
        check_names([layer], epoch.layers, f"Epoch {epoch.epoch}")
    bits = {epoch.epoch: epoch.layers[layer] for epoch in epochs}
    moved = [after.epoch for before, after in pairwise(epochs) if before.layers[layer] != after.layers[layer]]
    widths = ", ".join("float" if width is None else str(width) for width in bits.values())
    sentences = [
        f"{layer} is {record.layers[layer].precision} after {len(epochs)} epochs of training. Its weight bits after each: {widths}."
    ]
    if moved:
        sentences.append(f"They last changed in epoch {moved[-1]}.")
    sought = record.certificate.objective
    decided = f"the {sought} within the budget decided" if sought else "its bits are those that training started with"
    sentences.append(f"Training has no table of losses at other bits: {decided}.")
    return {"bits": bits, "why": sentences}


def _of_supernet(folder: Path, layer: str) -> dict[str, Any]:
    """Explain a layer by the schemes that a search tried; in a supernet without a search, by its trained bit-widths."""
    stored = read_supernet_file(folder).stored()
    check_names([layer], stored, str(folder))
    options = stored[layer].choices
    if not (folder / SEARCH).is_file():
        unsearched = f"{layer} was trained for {_range(options)}. No scheme is chosen in a supernet: search it, or extract a subnet."
        return {"candidates": [str(option) for option in options], "why": [unsearched]}
    search = read_search(folder)
    for scheme in (one.scheme for rows in (search.evaluated, search.front, search.budgets.values()) for one in rows):
        check_names([layer], scheme, str(folder / SEARCH))
    sentences = [
        f"{layer} has {_range(options)} to choose from. The search evaluated {len(search.evaluated)} subnets; "
        f"{len(search.front)} are on the front."
    ]
    sentences += [f"For {text} it chose {one.scheme[layer]}." for text, one in search.budgets.items()]
    sentences.append("A search scores whole subnets; it does not know what these bits alone are worth.")
    return {
        "candidates": {str(option): _tried(search, layer, option) for option in options},
        "front": [{"cost": one.cost, "score": one.score, "precision": str(one.scheme[layer])} for one in search.front],
        "budgets": {text: str(one.scheme[layer]) for text, one in search.budgets.items()},
        "why": sentences,
    }


def _tried(search: SearchRecord, layer: str, option: Precision) -> dict[str, Any]:
    scores = [one.score for one in search.evaluated if one.scheme[layer] == option]
    on_front = sum(one.scheme[layer] == option for one in search.front)
    return {"evaluated": len(scores), "best_score": max(scores, default=None), "on_front": on_front}


def _range(options: Sequence[Precision]) -> str:
    return str(options[0]) if len(options) == 1 else f"{len(options)} precisions from {options[0]} to {options[-1]}"
