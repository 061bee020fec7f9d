"""Settings of a supernet."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from anybit.data.tasks import TASKS
from anybit.errors import InvalidFile, InvalidSetting
from anybit.files.strict import read_settings, validated
from anybit.loops.trainee import TrainSettings
from anybit.methods.multiquant import MultiQuantSettings
from anybit.scheme import Precision, check_bits


@dataclass(frozen=True)
class SupernetSettings:
    """bits             bit-widths of weights and inputs, 2..8
    keep             shell pattern on layer names -> precision
    task             "classification" or "regression", where the outputs do not tell
    held_out         share of the training data that is not trained on: the search evaluates on it
    bn_images        training inputs, augmented as in training, from which batch-norm statistics are estimated anew for a subnet
    multiquant, train  the method's settings and the loop's
    """

    bits: tuple[int, ...] = (2, 4, 6, 8)
    keep: Mapping[str, Precision] = field(default_factory=dict)
    task: str | None = None
    held_out: float = 0.1
    bn_images: int = 4096
    multiquant: MultiQuantSettings = field(default_factory=MultiQuantSettings)
    train: TrainSettings = field(default_factory=TrainSettings)

    @classmethod
    def of(cls, **settings: Any) -> "SupernetSettings":
        """From one flat set of names, each a field of this class, of TrainSettings or of MultiQuantSettings."""
        homes = {"multiquant": MultiQuantSettings, "train": TrainSettings, "": cls}
        parts = {home: {n: v for n, v in settings.items() if n in kind.__dataclass_fields__} for home, kind in homes.items()}
        unknown = [name for name in settings if not any(name in part for part in parts.values())]
        if unknown:
            raise InvalidSetting(f"train has no setting {unknown[0]!r}.")
        weight = settings.get("label_weight", MultiQuantSettings.label_weight)
        if settings.get("label", MultiQuantSettings.label) == "one-hot" and weight != MultiQuantSettings.label_weight:
            raise InvalidSetting(f"label_weight {weight} has no part in one-hot labels. Choose label adaptive or teacher, or leave it out.")
        return cls(**{home: kind(**parts[home]) for home, kind in homes.items() if home}, **parts[""])

    def __post_init__(self):
        if len(set(self.bits)) < len(self.bits) or len(self.bits) < 2:
            raise InvalidSetting(f"bits {', '.join(map(str, self.bits))}: give at least two bit-widths, each once.")
        for bits in self.bits:
            check_bits(bits)
        if self.task is not None and self.task not in TASKS:
            raise InvalidSetting(f"task {self.task!r} is unknown. Choose from {', '.join(TASKS)}.")
        if not 0 < self.held_out < 1:
            raise InvalidSetting(f"held_out {self.held_out} must be between 0 and 1: the search evaluates on that share.")
        if self.bn_images < 2:
            raise InvalidSetting(f"bn_images {self.bn_images} are too few for batch-norm statistics. Give at least 2; hundreds work well.")
        if self.multiquant.batch_norm == "switch" and self.train.compile:
            raise InvalidSetting("A batch norm for each bit-width cannot be compiled: every scheme would be compiled anew. Leave off one.")

    def to_json(self) -> dict[str, Any]:
        flat = {name: value for name, value in asdict(self).items() if name not in ("multiquant", "train", "keep")}
        rates = {str(bits): factor for bits, factor in self.multiquant.step_rates.items()}
        return flat | {
            "bits": list(self.bits),
            "keep": {pattern: str(precision) for pattern, precision in self.keep.items()},
            "multiquant": asdict(self.multiquant) | {"step_rates": rates},
            "train": self.train.to_json(),
        }


def settings_from_json(data: Mapping[str, Any]) -> SupernetSettings:
    """What `SupernetSettings.to_json` wrote. Raises InvalidFile where it is something else."""
    where = "settings"
    parts = {key: validated(dict[str, Any], data.get(key), f"{where}: {key}") for key in ("multiquant", "train")}
    texts = validated(dict[str, float], parts["multiquant"].get("step_rates", {}), f"{where}: step_rates")
    patterns = validated(dict[str, str], data.get("keep", {}), f"{where}: keep")
    try:
        rates = {int(bits): factor for bits, factor in texts.items()}
        keep = {pattern: Precision.parse(text) for pattern, text in patterns.items()}
    except ValueError as error:
        raise InvalidFile(f"{where}: {error}") from error
    inner = {key: value for key, value in parts["multiquant"].items() if key != "step_rates"}
    multiquant = read_settings(MultiQuantSettings, inner, f"{where}: multiquant", {"step_rates": rates})
    train = read_settings(TrainSettings, parts["train"], f"{where}: train")
    flat = {key: value for key, value in data.items() if key not in ("multiquant", "train", "keep")}
    return read_settings(SupernetSettings, flat, where, {"keep": keep, "multiquant": multiquant, "train": train})
