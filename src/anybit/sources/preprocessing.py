"""How pictures and texts become inputs of the network."""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from anybit.data.texts import parse_columns
from anybit.errors import InvalidSetting
from anybit.files.strict import read_settings

LONGEST_SIDE = 2**14
"""Of a picture that is resized: beyond it one picture takes gigabytes."""
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True)
class Preprocessing:
    """How pictures and texts become inputs; stated by the user or by the model's own files, recorded in the run, never guessed.

    mean, std      of each channel, for pixels scaled to 0..1 (None: no normalization)
    size           both sides of the input; resize: the short side before a centre crop to `size` (None: both sides are resized to it)
    interpolation  of the resizing
    columns        of texts: role=column, joined by commas
    length         the most tokens of a text, longer ones are cut (None: a text that is too long is an error)
    stride         tokens by which the windows of a long context overlap
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int | None = None
    resize: int | None = None
    interpolation: str = "bilinear"
    columns: str | None = None
    length: int | None = None
    stride: int | None = None

    def __post_init__(self):
        parse_columns(self.columns)
        if self.interpolation not in INTERPOLATIONS:
            raise InvalidSetting(f"Interpolation {self.interpolation!r} is unknown. Choose from {', '.join(INTERPOLATIONS)}.")
        if self.std is not None and not all(0 < value < math.inf for value in self.std):
            raise InvalidSetting(f"--std {self.std} must be above zero in every channel.")
        if self.mean is not None and not all(math.isfinite(value) for value in self.mean):
            raise InvalidSetting(f"--mean {self.mean} must be finite in every channel.")
        if self.resize and self.size and self.size > self.resize:
            raise InvalidSetting(f"--size {self.size} cannot be cropped from a short side of {self.resize}. Give a larger --resize.")
        for name, most in (("size", LONGEST_SIDE), ("resize", LONGEST_SIDE), ("length", None), ("stride", None)):
            value = getattr(self, name)
            if value is not None and (value < 1 or (most and value > most)):
                raise InvalidSetting(f"--{name} {value} must be at least 1{f' and at most {most}' if most else ''}.")

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Preprocessing":
        return read_settings(cls, data, "preprocessing")


def overridden(recorded: Preprocessing, overrides: Preprocessing) -> Preprocessing:
    """Return the recorded preprocessing with the settings that are not at their default in `overrides`."""
    defaults = Preprocessing()
    values = {field.name: getattr(overrides, field.name) for field in fields(overrides)}
    return replace(recorded, **{name: value for name, value in values.items() if value != getattr(defaults, name)})
