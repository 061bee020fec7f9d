"""Settings of the calibrate and grow roads."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from anybit.data.tasks import TASKS
from anybit.errors import InvalidSetting
from anybit.loops.trainee import TrainSettings
from anybit.methods.csq import CSQSettings
from anybit.methods.lsq import LSQSettings
from anybit.networks.options import LayerOptions
from anybit.numerics.ranges import ESTIMATORS
from anybit.roads.methods import GROW_METHODS, ROUNDINGS
from anybit.scheme import FLOAT, Precision, check_bits, parsed_keep

PIPELINES = ("advanced", "light")


@dataclass(frozen=True)
class CalibrateSettings:
    """Every choice of the calibrate road; `None` in a step's switch means: as the pipeline has it.

    weight_bits, activation_bits  what a layer may get (None among the activation bits: float activations)
    keep                          shell pattern on layer names -> precision, overriding the above
    pipeline                      "advanced" (with reconstruction and bias tuning) or "light" (no back-propagation)
    parallel, sequential, bn_tuning, bias_tuning  switches of the steps
    samples, held_out             inputs drawn, fitting and held-out together, and the share held out
    estimator                     range estimator: "mse", "minmax" or "percentile"
    unit                          what is reconstructed at once: "block" or "layer"; `blocks` names the blocks instead of finding them
    rounding                      how a reconstruction rounds weights: "adaquant" or "adaround"
    steps, candidate_steps        of Adam a unit, sequential and for each candidate
    step_batch                    inputs that such a step sees; of padded texts it sees a whole batch
    start                         where sequential reconstruction starts: "ranges", "matched" statistics (as ranges where no batch norm
                                  folds), or None: AdaQuant at the codes of its parallel form where that ran, else ranges
    drop                          share of activation quantizations dropped while reconstructing (0: none)
    mirror                        also fit to the mirror images of 4-d inputs
    sensitivity_base              precision of the other layers while one is measured
    pairs                         measure (W, A) pairs instead of summing a W and an A measurement
    alternatives                  how many of the best schemes are measured before one is chosen
    tune_scales                   bias tuning trains the scales too (off in the paper)
    bn_prior                      weight of the target in the measured statistics, of candidates and in batch-norm tuning alike
    bn_target                     "float" or "prior" (the paper's form)
    memory                        bytes of activations that are held at once: what a step of work needs, and what is captured, the rest of
                                  which spills to disk
    group                         a weight scale for each so many inputs of a channel, in linears and embeddings that have a multiple of
                                  them and no batch norm; None: one a channel
    """

    weight_bits: tuple[int, ...] = (2, 3, 4, 6, 8)
    activation_bits: tuple[int | None, ...] = (4, 6, 8)
    keep: Mapping[str, Precision] = field(default_factory=dict)
    pipeline: str = "advanced"
    parallel: bool | None = None
    sequential: bool | None = None
    bn_tuning: bool = True
    bias_tuning: bool | None = None
    samples: int = 1024
    held_out: float = 0.2
    batch_size: int = 64
    seed: int = 0
    estimator: str = "mse"
    unit: str = "block"
    blocks: tuple[str, ...] | None = None
    rounding: str = "adaquant"
    steps: int = 300
    candidate_steps: int = 60
    step_batch: int = 32
    start: str | None = None
    drop: float = 0.0
    mirror: bool = False
    sensitivity_base: Precision = FLOAT
    pairs: bool = False
    alternatives: int = 5
    tune_scales: bool = False
    bn_prior: float = 0.0
    bn_target: str = "float"
    memory: int = 2**31
    group: int | None = None
    task: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "keep", parsed_keep(self.keep))
        if isinstance(self.sensitivity_base, str):
            object.__setattr__(self, "sensitivity_base", Precision.parse(self.sensitivity_base))
        for name in ("weight_bits", "activation_bits"):
            values = getattr(self, name)
            if not values:
                raise InvalidSetting(f"{name.replace('_', '-')} is empty. Give at least one bit-width.")
            for bits in values:
                if not (bits is None and name == "activation_bits"):
                    check_bits(bits, name.replace("_", " ").removesuffix("s") + "-width")
        for name, allowed in (
            ("pipeline", PIPELINES),
            ("estimator", ESTIMATORS),
            ("unit", ("block", "layer")),
            ("rounding", tuple(ROUNDINGS)),
            ("bn_target", ("float", "prior")),
            ("start", (None, "ranges", "matched")),
        ):
            if getattr(self, name) not in allowed:
                raise InvalidSetting(f"{name} {getattr(self, name)!r} is unknown. Choose from {', '.join(filter(None, allowed))}.")
        if self.task is not None and self.task not in TASKS:
            raise InvalidSetting(f"task {self.task!r} is unknown. Choose from {', '.join(TASKS)}.")
        if not 0 < self.held_out < 1 or not 0 <= self.drop <= 1 or self.samples < 2 or self.steps < 1:
            raise InvalidSetting("held_out must be between 0 and 1, drop from 0 to 1, samples at least 2 and steps at least 1.")
        for name, least in (
            ("batch_size", 1),
            ("step_batch", 1),
            ("candidate_steps", 1),
            ("alternatives", 1),
            ("memory", 0),
            ("bn_prior", 0),
        ):
            if getattr(self, name) < least:
                raise InvalidSetting(f"{name} {getattr(self, name)} must be at least {least}.")
        if self.alternatives > 100:  # each is a program to solve and a network to measure
            raise InvalidSetting(f"alternatives {self.alternatives} must be at most 100.")
        if self.group is not None and self.group < 2:
            raise InvalidSetting(f"group {self.group} must be at least 2 weights: 128, 64 and 32 are usual.")
        if self.bn_prior >= 1:
            raise InvalidSetting(f"bn_prior {self.bn_prior} must be below 1.")

    @property
    def options(self) -> LayerOptions:
        """What observing the network needs of these settings."""
        gradients = self.does("bias_tuning")
        return LayerOptions(self.weight_bits, self.activation_bits, self.keep, self.group, self.unit, self.blocks, gradients)

    def does(self, step: str) -> bool:
        """Whether `step` runs: its switch, or what the pipeline has."""
        switch = getattr(self, step)
        return self.pipeline == "advanced" if switch is None else switch

    def to_json(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["keep"] = {pattern: str(precision) for pattern, precision in self.keep.items()}
        values["sensitivity_base"] = str(self.sensitivity_base)
        for step in ("parallel", "sequential", "bias_tuning"):
            values[step] = self.does(step)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


@dataclass(frozen=True)
class GrowSettings:
    """activation_bits  of every layer's input, 2..8, with a learned range; None leaves activations float
    keep             shell pattern on layer names -> precision
    method           "csq" or "lsq"; None is lsq at a scheme and csq without one
    from_scratch     forget the trained weights; they are learned before they are decided with fix 0.6 and gate_rate 0.03
    task             "classification" or "regression", where the outputs do not tell
    csq, train       the method's settings and the loop's
    """

    activation_bits: int | None = 8
    keep: Mapping[str, Precision] = field(default_factory=dict)
    method: str | None = None
    from_scratch: bool = False
    task: str | None = None
    csq: CSQSettings = field(default_factory=CSQSettings)
    lsq: LSQSettings = field(default_factory=LSQSettings)
    train: TrainSettings = field(default_factory=TrainSettings)

    @classmethod
    def of(cls, **settings: Any) -> "GrowSettings":
        """From one flat set of names, each a field of this class, of TrainSettings, or of the methods' settings that have it."""
        homes = {"csq": CSQSettings, "lsq": LSQSettings, "train": TrainSettings, "": cls}
        parts = {home: {n: v for n, v in settings.items() if n in kind.__dataclass_fields__} for home, kind in homes.items()}
        unknown = [name for name in settings if not any(name in part for part in parts.values())]
        if unknown:
            raise InvalidSetting(f"grow has no setting {unknown[0]!r}.")
        inner = {home: kind(**parts[home]) for home, kind in homes.items() if home}
        return cls(**inner, **parts[""])

    def __post_init__(self):
        if self.method is not None and self.method not in GROW_METHODS:
            raise InvalidSetting(f"method {self.method!r} is unknown. Choose from {', '.join(GROW_METHODS)}.")
        if self.task is not None and self.task not in TASKS:
            raise InvalidSetting(f"task {self.task!r} is unknown. Choose from {', '.join(TASKS)}.")

    def to_json(self) -> dict[str, Any]:
        flat = {name: value for name, value in asdict(self).items() if name not in ("csq", "lsq", "train", "keep")}
        flat["keep"] = {pattern: str(precision) for pattern, precision in self.keep.items()}
        return flat | {"csq": asdict(self.csq), "lsq": asdict(self.lsq), "train": self.train.to_json()}
