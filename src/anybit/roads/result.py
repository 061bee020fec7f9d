"""The result of a run: evaluate, export, show and save it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from anybit.calls import public
from anybit.networks.candidates import Candidates
from anybit.networks.canonical import Canonical
from anybit.networks.cost import CostModel
from anybit.reports.frames import frontier_frame, layers_frame
from anybit.reports.page import Page, figure_page, run_page, runs_page
from anybit.reports.terminal import result_line
from anybit.roads.evaluate import evaluate
from anybit.runs.candidates import write_candidates
from anybit.runs.folder import new_folder
from anybit.runs.records import record_of
from anybit.runs.report import write_report
from anybit.runs.scheme_file import write_canonical
from anybit.runs.trusted import trust
from anybit.scheme import Scheme

if TYPE_CHECKING:
    import pandas


@dataclass(repr=False)
class Result:
    """The result of a run: the canonical model, with its bits in `scheme`, and the report.

    result.evaluate(data)                  scores on labelled data, preprocessed as the calibration data was
    result.summary()                       size, bits and scores in a line; in a notebook the result shows itself
    result.layers, result.frontier()       data frames (with pandas): the layers, and the schemes by size
    result.plot()                          the charts of size against loss and score
    result.export("net.onnx")              then result.verify("net.onnx"), result.bench("net.onnx")
    result.save("runs/mine")               the run folder, for `load`, `export`, `allocate` and the command line
    """

    canonical: Canonical
    report: dict[str, Any]
    about: dict[str, Any]
    candidates: Candidates | None = None
    table: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        return self.canonical.model

    @property
    def scheme(self) -> Scheme:
        return self.canonical.scheme

    def evaluate(self, data: Any, **options: Any) -> dict[str, Any]:
        """Score the model on labelled data: `anybit.evaluate`, with the task and preprocessing of the run."""
        return evaluate(self, data, **options)

    def export(self, onnx: str | Path, data: Any = None, **options: Any) -> dict[str, Any]:
        """Write the model as an ONNX file: `anybit.export`."""
        from anybit.exports import verbs  # optional packages

        return verbs.export(self, onnx, data=data, **options)

    def verify(self, onnx: str | Path, data: Any = None, **options: Any) -> dict[str, Any]:
        """Check an exported file against the model: `anybit.verify`."""
        from anybit.exports import verbs

        return verbs.verify(self, onnx, data=data, **options)

    def bench(self, onnx: str | Path | None = None, data: Any = None, **options: Any) -> dict[str, Any]:
        """Measure the size and latency of an exported file: `anybit.bench`."""
        from anybit.exports import verbs

        return verbs.bench(self, onnx, data=data, **options)

    def summary(self) -> str:
        """Return size, bits and scores in one line."""
        return result_line(self.report)

    @property
    def layers(self) -> "pandas.DataFrame":
        """Return a row for each layer: precision, weights, bytes, sensitivity, why. Needs pandas."""
        return layers_frame(record_of(self.report))

    def frontier(self) -> "pandas.DataFrame":
        """Return predicted and measured schemes by size. Needs pandas."""
        return frontier_frame(record_of(self.report))

    def plot(self) -> Page:
        """Return a page with the charts of size against loss and score, which a notebook shows and `save` writes."""
        return Page(figure_page(self.report))

    def __repr__(self) -> str:
        return f"<anybit {self.report.get('road', 'calibrate')} result: {self.summary()}>"

    def _repr_html_(self) -> str:
        return self.plot()._repr_html_()

    @public
    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write the run folder, completely or not at all."""
        with new_folder(Path(folder), overwrite) as draft:
            self.write(draft)
        trust(Path(folder))
        return Path(folder)

    def write(self, folder: Path) -> None:
        """Write the run's files into an existing folder."""
        write_canonical(folder, self.canonical, self.about)
        size = (folder / "model.safetensors").stat().st_size
        assert size == self.report["result"]["bytes"], f"counted {self.report['result']['bytes']} bytes, wrote {size}"
        write_report(folder, self.report)
        (folder / "report.html").write_text(run_page(self.report), encoding="utf8")
        if self.candidates is not None:
            write_candidates(folder, self.candidates, self.table)


class Results(list[Result]):
    """The results of several budgets: a list that prints as a table, and shows itself in a notebook as the runs side by side."""

    def __repr__(self) -> str:
        rows = [(str(result.report["budget"] or "largest"), result.summary()) for result in self]
        width = max((len(budget) for budget, _ in rows), default=0)
        return "\n".join(f"{budget:<{width}}  {summary}" for budget, summary in rows)

    def _repr_html_(self) -> str:
        return Page(runs_page({str(result.report["budget"] or "largest"): result.report for result in self}))._repr_html_()


def test_scores(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scores on test data."""
    return {key: report[key] for key in ("test", "float_test") if key in report}


def layer_costs(costs: CostModel, scheme: Scheme) -> dict[str, Any]:
    """Return each layer's precision, size and costs."""
    return {
        name: {
            "precision": str(precision),
            "weights": costs.layers[name].weights,
            "macs": costs.layers[name].macs,
            "bytes": costs.layer_bytes(name, precision),
        }
        for name, precision in scheme.items()
    }


def save_all(results: Result | Sequence[Result], output: str | Path, overwrite: bool = False) -> list[Path]:
    """Write one result to `output`, or each of several to `output/<budget>/` with a common report.json in `output`."""
    output = Path(output)
    if isinstance(results, Result):
        return [results.save(output, overwrite)]
    if len(results) == 1:
        return [results[0].save(output, overwrite)]
    names = [str(result.report["budget"] or "largest").replace("/", "_") for result in results]
    with new_folder(output, overwrite) as draft:
        for name, result in zip(names, results, strict=True):
            (draft / name).mkdir()
            result.write(draft / name)
        reports = {name: result.report for name, result in zip(names, results, strict=True)}
        write_report(draft, {"version": 1, "budgets": reports})
        (draft / "report.html").write_text(runs_page(reports), encoding="utf8")
    for name in names:
        trust(output / name)
    return [output / name for name in names]
