"""Verbs that create or read networks: calibrate, allocate, grow, train, search, extract, evaluate, inspect."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anybit
from anybit.budget import COUNTED, SIZE, budget_text, check_counts_weights, check_is_counted
from anybit.calls import Amounts
from anybit.cli.options import load_metric
from anybit.cli.work import Outcome, is_first
from anybit.errors import AnybitError, InvalidSetting
from anybit.methods.settings import SearchSettings
from anybit.roads.settings import CalibrateSettings, GrowSettings, check_subnet
from anybit.runs.folder import check_folder, check_free, check_run, check_supernet, free_checkpoint
from anybit.settings import argument, option, same_as
from anybit.sources.preprocessing import Preprocessing
from anybit.sources.references import check_data, check_there
from anybit.supernets.settings import SupernetSettings

WATCHED = "Labelled data to report on; nothing is chosen on it."


def calibrate(
    *, output, model, weights=None, data, test=None, budget=None, settings: CalibrateSettings, cache=True,
    preprocessing: Preprocessing, workers=0, metric=None, device="cpu", overwrite=False,
) -> Outcome:  # fmt: skip
    """Quantize a trained network to a budget, from a few hundred inputs.

    anybit calibrate --model torchvision:resnet18 --data images/ --budget 4bit --output runs/mine
    anybit calibrate --model net.py:net --weights net.pt --data x.npz --budget 3bit --output runs/b
    """
    check_free(output, overwrite)
    inputs = {"weights": weights, "preprocessing": preprocessing, "test": test, "metric": load_metric(metric), "workers": workers}
    return _saved(anybit.calibrate(model, data, budget, **inputs, device=device, cache=cache, **settings.flat()), output, overwrite)


def allocate(
    run: Path = argument("A run folder of calibrate.", ready=check_folder),
    *,
    output, budget, data=None, test=None, model=None,
    batch_size: int | None = same_as(Amounts, "batch_size"),
    memory: int | None = same_as(Amounts, "memory", text=SIZE),
    cache=True, workers=0, metric=None, device="cpu", overwrite=False,
) -> Outcome:  # fmt: skip
    """Meet other budgets from a finished calibrate run, in seconds.

    anybit allocate runs/mine --budget 3bit --output runs/smaller
    anybit allocate runs/mine --budget 12.5% --budget drop=1% --output runs/more
    """
    check_free(output, overwrite)
    options = {"metric": load_metric(metric), "device": device, "batch_size": batch_size, "memory": memory, "cache": cache}
    return _saved([anybit.allocate(run, one, data, model, workers, test=test, **options) for one in budget], output, overwrite)


def grow(
    *, output, model, weights=None, train, test: str | None = option(None, WATCHED, panel="Input", ready=check_data),
    budget: str | None = option(None, "Budget of weights: 3bit, 80kB, 12.5%.", text=budget_text(check_counts_weights), panel="Budget"),
    scheme: Path | None = option(None, "Instead of a budget: a run whose scheme to train.", ready=check_run, panel="Budget"),
    settings: GrowSettings, preprocessing: Preprocessing, workers=0, metric=None, device="cpu", overwrite=False,
) -> Outcome | None:  # fmt: skip
    """Train a network to a budget while its scheme grows; rerunning resumes.

    anybit grow --model net.py:net --weights net.pt --train train.npz --budget 3bit --output runs/g
    anybit grow --model net.py:net --train train.npz --scheme runs/mine --output runs/fixed
    """
    if (budget is None) == (scheme is None):
        raise InvalidSetting("Give either a budget, such as --budget 3bit, or the run whose scheme to train, --scheme RUN; not both.")
    checkpoint = free_checkpoint(output, overwrite, is_first())
    inputs = {"weights": weights, "preprocessing": preprocessing, "test": test, "metric": load_metric(metric), "workers": workers}
    with _naming_output():
        result = anybit.grow(model, train, budget, scheme=scheme, checkpoint=checkpoint, device=device, **inputs, **settings.flat())
    return _saved(result, output, overwrite=True) if is_first() else None


def train(
    *, output, model, weights=None, train, test: str | None = option(None, WATCHED, panel="Input", ready=check_data),
    settings: SupernetSettings, preprocessing: Preprocessing, workers=0, metric=None, device="cpu", overwrite=False,
) -> Outcome | None:  # fmt: skip
    """Train one network for every bit-width; rerunning resumes.

    anybit train --model net.py:net --weights net.pt --train train.npz --output runs/s
    anybit train --model net.py:net --train x.npz --test x.npz#test --bits 2,4,8 --output runs/s
    """
    from anybit.reports.outcomes import print_trained

    checkpoint = free_checkpoint(output, overwrite, is_first())
    inputs = {"weights": weights, "preprocessing": preprocessing, "test": test, "metric": load_metric(metric), "workers": workers}
    with _naming_output():
        supernet = anybit.train(model, train, checkpoint=checkpoint, device=device, **inputs, **settings.flat())
    if not is_first():
        return None
    folder, report = supernet.save(output, overwrite=True), supernet.report
    return Outcome({"folder": str(folder), **_fields(report, "subnets", "test", "float_test")}, partial(print_trained, folder, report))


def search(
    run: Path = argument("A supernet's folder.", ready=check_supernet),
    *,
    output, data=None,
    budget: tuple[str, ...] | None = option(
        None, "3bit, 80kB, 12.5%, bops=2.1G, latency=3ms; repeat.", text=COUNTED, repeat=True, panel="Budget"
    ),
    settings: SearchSettings, cache=True, model=None, workers=0, metric=None, device="cpu", overwrite=False,
) -> Outcome:  # fmt: skip
    """Find a supernet's best schemes at every cost and for each budget.

    anybit search runs/s --budget 3bit --budget 80kB --output runs/found
    anybit search runs/s --quantity bops --evaluations 400 --output runs/found
    """
    from anybit.reports.outcomes import print_searched

    check_free(output, overwrite)
    options = {"model": model, "metric": load_metric(metric), "workers": workers, "device": device, "cache": cache}
    result = anybit.search(run, data, budget, **options, **settings.flat())
    folder, report = result.save(output, overwrite), result.report
    summary = _fields(report, "budgets", "hypervolume", "rank_correlation", "recalled")
    return Outcome({"folder": str(folder), **summary}, partial(print_searched, folder, report))


def extract(
    run: Path = argument("A supernet's folder, or a search's.", ready=check_supernet),
    *,
    output, budget: str | None = option(
        None, "Extract the best known subnet within this budget.", text=budget_text(check_is_counted), panel="Budget"
    ),
    scheme: Path | None = option(None, "Scheme to extract: a run folder, or JSON {layer: precision}.", ready=check_there, panel="Budget"),
    data: str | None = option(None, "Training inputs for batch-norm statistics (default: stored ones).", panel="Input", ready=check_data),
    polish: bool = option(False, "Then run sequential AdaQuant, batch-norm and bias tuning on --data.", switch=True),
    samples: int = same_as(CalibrateSettings, "samples", doc="Inputs to draw for --polish."),
    steps: int = same_as(CalibrateSettings, "steps", doc="Adam steps per unit for --polish."),
    cache=True, test=None, model=None, workers=0, metric=None, overwrite=False,
) -> Outcome:  # fmt: skip
    """Take a subnet out of a supernet or a search, as an ordinary run.

    anybit extract runs/found --budget 3bit --output runs/subnet
    anybit extract runs/s --scheme runs/mine --data train.npz --polish --output runs/subnet
    """
    check_subnet(budget, scheme, polish, data)
    check_free(output, overwrite)
    inputs = {"scheme": scheme, "data": data, "test": test, "model": model, "metric": load_metric(metric), "workers": workers}
    sizes = {"samples": samples, "steps": steps}
    idle = next((name for name, value in sizes.items() if not polish and value != getattr(CalibrateSettings, name)), None)
    if idle is not None:
        raise InvalidSetting(f"--{idle}={sizes[idle]} has no effect without polishing. Leave it out, or give --polish and --data.")
    polishing = {"polish": True, **sizes, "cache": cache} if polish else {}
    return _saved(anybit.extract(run, budget, **inputs, **polishing), output, overwrite)


def evaluate(
    run: Path | None = argument("A run folder; for the float network, give --model instead.", None, ready=check_run),
    *,
    model=None, weights=None, data, preprocessing: Preprocessing,
    batch_size: int = same_as(CalibrateSettings, "batch_size", default=128), workers=0, metric=None, device="cpu", task=None, outputs=None,
) -> Outcome:  # fmt: skip
    """Measure accuracy and loss of a run, or of a float network.

    anybit evaluate runs/mine --data labelled/
    anybit evaluate --model torchvision:resnet18 --data labelled/ --size 224
    """
    if run is None and model is None:
        raise InvalidSetting("RUN or --model is missing. Give a run folder, or --model for the float network.")
    if run is not None and weights is not None:
        raise InvalidSetting(f"--weights={weights} has no effect on a run, which has its own. Leave it out, or give --model without RUN.")
    from anybit.reports.words import scores_line
    from anybit.roads.evaluate import evaluated_network, recorded_outputs, scores_of

    function = load_metric(metric)
    network, preprocessing, task = evaluated_network(run, model, weights, data, preprocessing, task)
    compared = outputs or (None if run is None else recorded_outputs(run))
    scores = scores_of(network, data, function, task, batch_size, workers, device, preprocessing, compared)
    return Outcome(scores, lambda details: print(scores_line(scores)))


def inspect(
    *, model, weights=None, data=None,
    weight_bits: tuple[int, ...] = same_as(CalibrateSettings, "weight_bits", doc="Bit-widths to show the size of."),
    keep=None, preprocessing: Preprocessing, task=None, outputs=None,
    export: bool = option(True, "Try an ONNX export of the network.", panel="Output"),
    cache=True,
) -> Outcome:  # fmt: skip
    """Show layers, coverage, the size at each bit-width, and whether the network can be exported.

    anybit inspect --model torchvision:resnet18
    anybit inspect --model net.py:net --data train.npz
    """
    from anybit.sources.inputs import load_data
    from anybit.sources.models import load_model, with_model_defaults
    from anybit.sources.preprocessing import check_applies

    check_applies(preprocessing, [data])
    network = load_model(model, weights, task)
    samples = None if data is None else load_data(data, with_model_defaults(preprocessing, network, [data]), model=network)
    settings = {"weight_bits": weight_bits, "keep": keep or {}, "outputs": outputs or {}}
    return Outcome(anybit.inspect(network, samples, export=export, cache=cache, **settings), "print_inspection")


@contextmanager
def _naming_output() -> Iterator[None]:
    """Name --output in errors about the checkpoint, which is inside it here."""
    try:
        yield
    except AnybitError as error:
        error.args = (str(error).replace("--checkpoint", "--output"),)
        raise


def _saved(results: Any, output: Path, overwrite: bool) -> Outcome:
    """Save one or several results to folders and summarize their reports."""
    from anybit.reports.outcomes import print_runs
    from anybit.roads.result import save_all
    from anybit.runs.report import read_report

    reports = {folder: read_report(folder) for folder in save_all(results, output, overwrite)}
    rows = [{"folder": str(folder), **_fields(report, "budget", "result", "test", "float_test")} for folder, report in reports.items()]
    return Outcome(rows[0] if len(rows) == 1 else {"runs": rows}, partial(print_runs, reports))


def _fields(report: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: report[key] for key in keys if key in report}
