"""Data frames of a run's layers and of the schemes from which it chose."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from anybit.errors import InvalidSetting, MissingPackage
from anybit.reports.explanation import reason
from anybit.runs.records import SCORES, Record

if TYPE_CHECKING:
    import pandas


def layers_frame(record: Record) -> "pandas.DataFrame":
    """Return a row for each layer: precision, weights, bytes, predicted loss from the table of candidates (sensitivity), and why it has its
    bits."""
    rows = {
        name: {
            "precision": str(row.precision),
            "weights": row.weights,
            "bytes": row.bytes,
            "sensitivity": row.predicted_loss,
            "why": reason(record, name),
        }
        for name, row in record.layers.items()
    }
    return _frame(list(rows.values()), index=list(rows))


def frontier_frame(record: Record) -> "pandas.DataFrame":
    """Return a row for each scheme, by size: the best predicted one of every size (`scheme` is empty), and the measured ones.

    `dominated` marks schemes that another beats: no larger, and of less loss as predicted and (if both were measured) as measured.
    Raises InvalidSetting if the run did not choose among schemes.
    """
    if record.table is None:
        raise InvalidSetting(
            f"A run of {record.road} has no frontier, because it has no table of candidates. Use a run of calibrate or allocate."
        )
    table, frontier = record.table, record.table.frontier
    ends = [(frontier.cost, frontier.loss), *((step.cost, step.loss) for step in frontier.steps)]
    rows: list[dict[str, Any]] = [{"bytes": table.fixed_bytes + int(cost), "predicted": table.floor + loss} for cost, loss in ends]
    scores = [score for score in SCORES if any(getattr(row, score) is not None for row in record.schemes)]
    for row in record.schemes:
        values = {"bytes": row.bytes, "predicted": row.predicted, "scheme": row.name, "weight_bits": row.weight_bits, "bops": row.bops}
        rows.append(values | {"measured": row.measured, **{score: getattr(row, score) for score in scores}, "chosen": row.chosen})
    columns = ["scheme", "bytes", "weight_bits", "bops", "predicted", "measured", *scores, "chosen", "dominated"]
    for one in rows:
        one["dominated"] = any(_beats(other, one) for other in rows)
    frame = _frame(rows, columns=columns).sort_values("bytes", ignore_index=True)
    return frame.assign(chosen=frame["chosen"].eq(True), scheme=frame["scheme"].fillna(""))


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    losses = [name for name in ("predicted", "measured") if one.get(name) is not None and other.get(name) is not None]
    return one["bytes"] <= other["bytes"] and all(one[name] < other[name] for name in losses)


def _frame(rows: list[dict[str, Any]], **more: Any) -> "pandas.DataFrame":
    try:
        import pandas
    except ImportError as error:
        raise MissingPackage("Data frames need pandas, which cannot be imported: run `pip install 'anybit[pandas]'`.") from error
    return pandas.DataFrame(rows, **more)
