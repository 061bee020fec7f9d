"""Preprocessing of images and texts. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from anybit.data.options import TEXT_SUFFIXES, parse_columns, suffix_of
from anybit.errors import InvalidSetting
from anybit.settings import NUMBERS, Need, Settings, Text, documented, option

LONGEST_SIDE = 2**14
"""Limit for resized images: beyond it, one image takes gigabytes."""
OF_IMAGES, OF_PIXELS, OF_TEXTS = ("size", "resize", "interpolation", "classes"), ("mean", "std"), ("columns", "length", "stride")
FOR = {
    **dict.fromkeys(OF_PIXELS, "folders of images and files of arrays"),
    **dict.fromkeys(OF_IMAGES, "folders of images"),
    **dict.fromkeys(OF_TEXTS, "files of texts"),
}
"""Option -> the data to which it applies."""
CLASSES = Text(lambda text: tuple(text.split(",")), ",".join, "names with commas: cat,dog")


@documented
@dataclass(frozen=True)
class Preprocessing(Settings):
    """Preprocessing of images and texts: from the user or the model's own files, recorded in the run, never guessed."""

    common: ClassVar[Mapping[str, Any]] = {"panel": "Input", "rare": True}

    mean: tuple[float, ...] | None = option(
        None, "Mean of each channel, pixels scaled to 0..1: 0.485,0.456,0.406", text=NUMBERS, rare=False
    )
    std: tuple[float, ...] | None = option(None, "Standard deviation of each channel.", least=1e-6, text=NUMBERS, rare=False)
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

    def needs(self) -> list[Need]:
        return [Need(("interpolation",), bool(self.size or self.resize), "without resizing", "--size=224")]

    def check_applies(self, *references: Any) -> None:
        """Raise InvalidSetting for an option that changes nothing in any of the data, references or data in memory (None: not given)."""
        given = [one for one in references if one is not None]
        applied = {name for one in given for name in (_applied_to(one) if isinstance(one, str) else ())}
        places = " and ".join(f"data {one}" if isinstance(one, str) else "data in memory" for one in given) or "without data"
        where = f"on {places}" if given else places
        needs = [Need((name,), name in applied, f"{where}: it is for {FOR[name]}") for name in FOR]
        self.check_effect(needs)

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


def _applied_to(reference: str) -> tuple[str, ...]:
    """Return the options that change the data of a reference; of what cannot be told here, all."""
    if reference.startswith("hf:") or suffix_of(reference) in TEXT_SUFFIXES:
        return OF_TEXTS
    if suffix_of(reference) in (".npz", ".npy"):
        return OF_PIXELS
    return () if ":" in reference and not Path(reference).exists() else (*OF_IMAGES, *OF_PIXELS)


def overridden(recorded: Preprocessing, overrides: Preprocessing) -> Preprocessing:
    """Return the recorded preprocessing with those settings of `overrides` that are not at their default."""
    defaults = Preprocessing()
    values = {field.name: getattr(overrides, field.name) for field in fields(overrides)}
    return replace(recorded, **{name: value for name, value in values.items() if value != getattr(defaults, name)})
