"""Options of a run that its settings do not record: inputs, device, output. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from anybit.budget import BUDGETS
from anybit.calls import Amounts
from anybit.settings import Settings, documented, option, same_as
from anybit.sources.references import check_code, check_data, check_device, check_model, check_weights


@documented
@dataclass(frozen=True)
class RunOptions(Settings):
    """Options of a run that its settings do not record."""

    common: ClassVar[Mapping[str, Any]] = {"panel": "Runtime"}

    output: Path | None = option(None, "The run folder to write.", panel="Output")
    model: str | None = option(
        None, "FILE.py:function, module:function, torchvision:, timm: or hf:NAME.",
        panel="Input", ready=check_model,
    )  # fmt: skip
    weights: str | None = option(None, "State dict (.safetensors, .pt, .pth), or random.", panel="Input", ready=check_weights)
    data: str | None = option(
        None, "Inputs: image folder, FILE.npz, FILE.npz#test, .tsv, FILE.py:function.",
        panel="Input", ready=check_data,
    )  # fmt: skip
    train: str | None = option(None, "Labelled training data, as for --data elsewhere.", panel="Input", ready=check_data)
    test: str | None = option(None, "Labelled data for the report; nothing is chosen on it.", panel="Input", ready=check_data)
    budget: tuple[str, ...] | None = option(
        None, "4bit, 120kB, 12.5%, bops=2G, latency=3ms, loss=0.02 or drop=1%.",
        text=BUDGETS, repeat=True, panel="Budget",
    )  # fmt: skip
    metric: str | None = option(
        None, "FILE.py:function of (outputs, labels), higher is better: reported, and used by drop= budgets.",
        panel="Budget", ready=check_code, rare=True,
    )  # fmt: skip
    cache: bool = option(True, "Store results in the user's cache directory and reuse them.", rare=True)
    workers: int = same_as(Amounts, "workers")
    threads: int | None = same_as(Amounts, "threads")
    device: str = option("cpu", "Where to compute: cpu, cuda, cuda:1, ...", ready=check_device)
    overwrite: bool = option(False, "Replace a finished run.", switch=True, panel="Output")
