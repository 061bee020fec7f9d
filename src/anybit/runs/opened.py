"""Open a run, as a folder or a result in memory: its network and its inputs."""

import copy
import re
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn

from anybit.calls import public
from anybit.data.samples import Samples
from anybit.data.tasks import Metric
from anybit.errors import AnybitError, InvalidInput, InvalidSetting
from anybit.networks.canonical import Canonical
from anybit.networks.refusals import check_network
from anybit.runs.report import read_report
from anybit.runs.scheme_file import SchemeFile, read_canonical, read_scheme, write_canonical
from anybit.runs.trusted import is_trusted
from anybit.sources.callables import absolute
from anybit.sources.inputs import samples_from
from anybit.sources.models import adapted_network, load_model
from anybit.sources.preprocessing import Preprocessing


@runtime_checkable
class Unsaved(Protocol):
    """A result in memory, not yet a folder: the canonical form, and the provenance for its scheme.json."""

    canonical: Canonical
    about: dict[str, Any]


Run = str | Path | Unsaved


def followed_reference(folder: Path, file: SchemeFile, model: nn.Module | str | None) -> dict[str, Any]:
    """Return the model reference to record for a result: one that was used, or a trusted one; never a foreign one."""
    if isinstance(model, str):
        return {"reference": absolute(model), "weights": file.model.get("weights")}
    return file.model if model is None or is_trusted(folder) else {}


def recorded_data(run: Run, file: SchemeFile) -> str:
    """Return the reference to a run's data, from this process or from this user's own run."""
    reference, folder = file.data.get("reference"), Path(run) if isinstance(run, str | Path) else None
    if not isinstance(reference, str) or not (folder is None or is_trusted(folder)):
        raise InvalidSetting(f"{folder or 'The result'} does not name data that anybit may load. Give inputs of the network with --data.")
    return reference


@public
def load(folder: str | Path, model: nn.Module | str | None = None) -> nn.Module:
    """Return the saved model, ready to run on preprocessed inputs, with its bits in `.scheme`; outputs are bitwise those that were saved.

    `model` is the float network's architecture (a network or a reference). It may be left out for a run that this user's own anybit
    wrote, and for timm:, torchvision: and hf: references; a reference in any other folder is foreign code and is not loaded. Raises
    InvalidFile if the folder is damaged, SchemeMismatch if the model is another.
    """
    canonical, _ = opened(folder, model)
    canonical.model.scheme = canonical.scheme  # type: ignore[assignment]  # the stubs allow only modules and tensors as attributes
    return canonical.model


def opened(run: Run, model: nn.Module | str | None = None) -> tuple[Canonical, SchemeFile]:
    """Return a run's canonical form and its scheme file; `model` as for `load`, ignored for a result in memory, which has its own."""
    if isinstance(run, str | Path):
        folder = Path(run)
        file = read_scheme(folder)
        return read_canonical(folder, float_model_of(folder, file, model), file), file
    with tempfile.TemporaryDirectory() as draft:
        write_canonical(Path(draft), run.canonical, run.about)
        file = read_scheme(Path(draft))
    return replace(run.canonical, model=copy.deepcopy(run.canonical.model)), file


def inputs_for(run: Run, file: SchemeFile, model: nn.Module, data: Any = None, workers: int = 0, metric: Metric | None = None) -> Samples:
    """Return samples for a run and its `model`: `data`, preprocessed as in the run, or the run's own data."""
    reference = recorded_data(run, file) if data is None else data
    return samples_from(reference, workers, Preprocessing.from_json(file.preprocessing), model, metric=metric)


def first_of(inputs: Samples, count: int | None) -> Samples:
    """Return the first `count` samples (None: all). Raises InvalidInput if there are none."""
    if count is not None and count < 1:
        raise InvalidSetting(f"--samples={count} must be at least 1.")
    if len(inputs) == 0:
        raise InvalidInput("The data is empty. Give inputs of the network with --data.")
    return inputs if count is None else inputs.subset(range(min(count, len(inputs))))


def float_model_of(folder: Path, file: Any, model: nn.Module | str | None, named_in: str = "scheme.json") -> nn.Module:
    """Return the float network of a folder: `model`, or the reference in `file`, read from `named_in`."""
    if isinstance(model, nn.Module):
        model = adapted_network(model)
        check_network(model)
        return model
    if model is not None:
        return load_model(model, file.model.get("weights"), file.task)
    reference = file.model.get("reference")
    if not isinstance(reference, str):
        raise InvalidSetting(f"{folder} does not name its network. Give it with --model.")
    if not is_trusted(folder, named_in) and not re.fullmatch(r"hf:.+|(timm|torchvision):[\w.]+", reference):
        raise InvalidSetting(
            f"{folder} was not written by your own anybit, and its model reference {reference!r} is code. "
            "If you trust it, name it yourself with --model."
        )
    return load_model(reference, file.model.get("weights"), file.task)


def recorded_preprocessing(run: str | Path) -> Preprocessing:
    """Return the preprocessing that a run recorded."""
    return Preprocessing.from_json(read_scheme(Path(run)).preprocessing)


def recorded_task(run: Run) -> str | None:
    """Return a run's task; None, so that labels decide, for a regression that nobody named: outputs without labels may be taken for it."""
    task: str | None = read_scheme(Path(run)).task if isinstance(run, str | Path) else run.about.get("task")
    if task != "regression":
        return task
    report = {} if isinstance(run, str | Path) else getattr(run, "report", {})
    if isinstance(run, str | Path):
        with suppress(AnybitError):  # a run without its report is still a run
            report = read_report(Path(run))
    return task if report.get("settings", {}).get("task") else None
