"""Preprocessing of images and texts. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from anybit.data.options import TEXT_SUFFIXES, parse_columns, suffix_of
from anybit.errors import InvalidSetting
from anybit.settings import NUMBERS, Settings, Text, documented, option
from anybit.sources.references import is_of_arrays, split_subset

LONGEST_SIDE = 2**14
"""Limit for resized images: beyond it, one image takes gigabytes."""
CLASSES = Text(lambda text: tuple(text.split(",")), ",".join, "names with commas: cat,dog")


@documented
@dataclass(frozen=True)
class Preprocessing(Settings):
    """Preprocessing of images and texts: from the user or the model's own files, recorded in the run, never guessed."""

    common: ClassVar[Mapping[str, Any]] = {"panel": "Input", "rare": True}

    mean: tuple[float, ...] | None = option(
        None, "Mean of each channel, pixels scaled to 0..1: 0.485,0.456,0.406", least=-1, most=1, why="pixels are divided by 255 first",
        text=NUMBERS, rare=False,
    )  # fmt: skip
    std: tuple[float, ...] | None = option(None, "Standard deviation of each channel.", least=1e-6, most=10, text=NUMBERS, rare=False)
    size: int | None = option(None, "Height and width of the input image.", least=1, most=LONGEST_SIDE, rare=False)
    resize: int | None = option(None, "Resize the short side before a centre crop to --size.", least=1, most=LONGEST_SIDE)
    interpolation: str = option("bilinear", "Interpolation of the resizing.", choices=("nearest", "bilinear", "bicubic", "lanczos"))
    classes: tuple[str, ...] | None = option(
        None, "Names of class folders, in the order of their numbers (default: sorted, over all data).", text=CLASSES
    )
    columns: str | None = option(
        None, "Columns of texts: text=NAME,pair=NAME,label=NAME or question=,context=,answers=; numbers from 0 without a header."
    )
    length: int | None = option(None, "Truncate texts to this many tokens (default: longer texts are an error).", least=1)
    stride: int | None = option(None, "Tokens by which windows of a long context overlap (default: 128).", least=1)

    def check(self) -> None:
        parse_columns(self.columns)
        if self.resize and self.size and self.size > self.resize:
            raise InvalidSetting(f"--size={self.size} cannot be cropped from a short side of {self.resize}. Give a larger --resize.")
        if self.classes is not None and (not all(self.classes) or len(set(self.classes)) < len(self.classes)):
            raise InvalidSetting(f"--classes={CLASSES.write(self.classes)} has a name twice, or none. Name each class folder once.")

    @property
    def black(self) -> tuple[float, ...]:
        """Return the value of a black pixel after normalization, one number for each channel or for all."""
        mean, std = self.mean or (0.0,), self.std or (1.0,)
        channels = max(len(mean), len(std))
        return tuple(-mean[i % len(mean)] / std[i % len(std)] for i in range(channels))

    @classmethod
    def recorded(cls, report: Mapping[str, Any]) -> Any:
        report = next(iter(report["budgets"].values())) if "budgets" in report else report
        return report.get("preprocessing") or {}

    @classmethod
    def from_json(cls, data: Any, where: str = "preprocessing") -> Self:
        return super().from_json(data, where)

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_json().items() if value is not None}


IMAGES, ARRAYS, TEXTS, CODE = "a folder of images", "a file of arrays", "a file of texts", "Python code"
APPLY_TO = {
    **dict.fromkeys(("mean", "std"), (IMAGES, ARRAYS)),
    **dict.fromkeys(("size", "resize", "interpolation", "classes"), (IMAGES,)),
    **dict.fromkeys(("columns", "length", "stride"), (TEXTS,)),
}
"""Option -> the kinds of data that it preprocesses."""


def kind_of(data: Any) -> str:
    """Return what data, or a reference to it, is: in memory, Python code has made it."""
    if not isinstance(data, str):
        return CODE
    path, _ = split_subset(data)
    if Path(path).is_dir():
        return IMAGES
    if is_of_arrays(path):
        return ARRAYS
    return TEXTS if data.startswith("hf:") or (suffix_of(path) in TEXT_SUFFIXES and Path(path).is_file()) else CODE


def check_applies(options: Preprocessing, data: Sequence[Any], recorded: Preprocessing = Preprocessing()) -> None:
    """Raise InvalidSetting if one of the user's `options` cannot apply to the data, such as the training and the test data; beside others,
    data that Python code makes are used as they are. `recorded` is what a run adds to them."""
    kinds = {kind_of(one): one if isinstance(one, str) else "the data in memory" for one in data if one is not None}
    for name, value in vars(options).items():
        if value == getattr(Preprocessing(), name):
            continue
        applies = APPLY_TO[name]
        wrong = [kind for kind in kinds if kind not in applies and not (kind == CODE and kinds.keys() & set(applies))]
        if wrong or not kinds:
            where = "there is no --data" if not wrong else f"{kinds[wrong[0]]} is {wrong[0]}"
            where = "the data are in memory" if wrong and kinds[wrong[0]] == "the data in memory" else where
            raise InvalidSetting(f"--{name} applies to {' or '.join(applies)}, and {where}. Leave it out.")
    merged = overridden(recorded, options)
    if options.interpolation != Preprocessing().interpolation and not (merged.size or merged.resize):
        raise InvalidSetting(
            f"--interpolation={options.interpolation} has no effect without --size or --resize. Give one, or leave it out."
        )


def applicable(preprocessing: Preprocessing, data: Any) -> Preprocessing:
    """Return the options that apply to the data: those of a run or a model may be for others."""
    kind = kind_of(data)
    return replace(preprocessing, **{name: getattr(Preprocessing(), name) for name, kinds in APPLY_TO.items() if kind not in kinds})


def overridden(recorded: Preprocessing, overrides: Preprocessing) -> Preprocessing:
    """Return the recorded preprocessing with those settings of `overrides` that are not at their default."""
    defaults = Preprocessing()
    values = {field.name: getattr(overrides, field.name) for field in fields(overrides)}
    return replace(recorded, **{name: value for name, value in values.items() if value != getattr(defaults, name)})
