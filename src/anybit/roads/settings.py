"""Settings of the calibrate and grow roads. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from anybit.budget import SIZE
from anybit.calls import BYTES
from anybit.data.options import OUTPUTS, TASK_NAMES
from anybit.errors import InvalidSetting
from anybit.loops.settings import SEEDS, TrainSettings
from anybit.methods.settings import CSQSettings, LSQSettings, MSQSettings
from anybit.methods.table import GROW_METHODS, ROUNDINGS, SENSITIVITIES, SOLVERS
from anybit.scheme import BITS, FLOAT, KEEP, PRECISION, WEIGHT_BITS, Precision
from anybit.settings import NAMES, Need, Settings, Text, documented, option, options_of, same_as

if TYPE_CHECKING:
    from anybit.networks.options import LayerOptions

SWITCHES = ("parallel", "sequential", "bias_tuning")
"""Steps whose default depends on the pipeline."""


@documented
@dataclass(frozen=True)
class CalibrateSettings(Settings):
    """Settings of `calibrate`. A step whose switch is None follows the pipeline."""

    common: ClassVar[Mapping[str, Any]] = {"rare": True}

    weight_bits: tuple[int, ...] = option(
        (2, 3, 4, 6, 8), "Bit-widths that weights may get.", least=2, most=8, text=WEIGHT_BITS, panel="Budget", rare=False
    )
    activation_bits: tuple[int | None, ...] = option(
        (4, 6, 8),
        "Bit-widths that inputs may get, or float (Python: None).",
        least=2,
        most=8,
        text=BITS,
        panel="Budget",
        rare=False,
    )
    keep: Mapping[str, Precision] = option(
        dict, "PATTERN=W8A8 or PATTERN=float: fix layers by name.", text=KEEP, repeat=True,
        panel="Budget", rare=False,
    )  # fmt: skip
    pipeline: str = option("advanced", "light: no back-propagation.", choices=("advanced", "light"), rare=False)
    parallel: bool | None = option(None, "AdaQuant at every candidate bit-width before the allocation (default: only without a solver).")
    sequential: bool | None = option(None, "AdaQuant on the chosen scheme.")
    bn_tuning: bool = option(True, "Batch-norm tuning.")
    bias_tuning: bool | None = option(None, "Bias tuning towards the float outputs.")
    tune_scales: bool = option(False, "Let bias tuning train the scales too.")
    samples: int = option(1024, "Inputs to draw, fitting and held-out together.", least=2, rare=False)
    held_out: float = option(0.2, "Share of the inputs that is held out.", above=0, below=1)
    steps: int = option(300, "Adam steps per unit on the chosen scheme.", least=1, rare=False)
    candidate_steps: int = option(60, "Adam steps per layer and candidate.", least=1)
    step_batch: int = option(32, "Inputs per Adam step (of padded texts, a whole batch).", least=1)
    unit: str = option("block", "Reconstruct whole blocks or single layers.", choices=("block", "layer"))
    blocks: tuple[str, ...] | None = option(
        None, "Name a block instead of detecting blocks; repeat.", text=NAMES, flag="--block", repeat=True
    )
    rounding: str = option("adaquant", "Rounding learned by reconstruction.", choices=tuple(ROUNDINGS))
    solver: str = option("gptq", "Closed-form choice of codes, before training.", choices=tuple(SOLVERS), rare=False)
    start: str | None = option(
        None, "Start of sequential AdaQuant: ranges, or matched statistics (default: parallel AdaQuant's codes, else ranges).",
        choices=("ranges", "matched"),
    )  # fmt: skip
    drop: float = option(0.0, "Share of activation quantizations to drop during reconstruction.", least=0, most=1)
    mirror: bool = option(False, "Also fit to mirrored images.")
    estimator: str = option("mse", "Estimator of quantization ranges.", choices=("mse", "minmax", "percentile"))
    sensitivity: str = option(
        "measured", "Loss of each layer at each bit-width: measured, or predicted from Hessian traces.", choices=tuple(SENSITIVITIES)
    )
    sensitivity_base: Precision = option(FLOAT, "Precision of the other layers while measuring one.", text=PRECISION)
    pairs: bool = option(False, "Measure every (W, A) pair instead of summing two measurements.")
    alternatives: int = option(
        5, "Number of best schemes to measure.", least=1, most=100, why="each is a program to solve and a network to measure"
    )
    bn_prior: float = option(0.0, "Weight of the target in measured batch-norm statistics, also of candidates.", least=0, below=1)
    bn_target: str = option(
        "float", "float: the float network's statistics; prior: beta and |gamma| (the paper's form).", choices=("float", "prior")
    )
    group: int | None = option(
        None, "Inputs per weight scale, in linear layers and embeddings (default: whole channels).", least=2, why="128, 64 and 32 are usual"
    )
    memory: int = option(2**31, "Memory for activations; more spills to disk.", least=0, most=BYTES, text=SIZE, panel="Runtime", rare=False)
    seed: int = option(0, "Random seed.", least=-SEEDS, most=SEEDS, rare=False)
    batch_size: int = option(64, "Inputs per forward pass.", least=1, panel="Runtime")
    task: str | None = option(None, "Task of the network (default: from the model).", choices=TASK_NAMES, panel="Input")

    outputs: Mapping[str, float] = option(
        dict, "NAME or NAME=WEIGHT: outputs to compare (default: all, with equal weights).", above=0, text=OUTPUTS, repeat=True,
        panel="Input",
    )  # fmt: skip

    def check(self) -> None:
        for name in ("weight_bits", "activation_bits"):
            if not getattr(self, name):
                raise InvalidSetting(f"{name} is empty. Give at least one bit-width.")

    def needs(self) -> list[Need]:
        sequential, parallel, tunes = (self.does(step) for step in ("sequential", "parallel", "bias_tuning"))
        light = "with --pipeline=light, which trains nothing" if self.pipeline == "light" else ""
        fits = sequential or parallel or self.solver != "none"
        return [
            Need(("steps",), sequential, light or "with --no-sequential", "--sequential", amounts=True),
            Need(("start",), sequential, light or "with --no-sequential", "--sequential"),
            Need(("candidate_steps",), parallel, light or "without parallel training of the candidates", "--parallel", amounts=True),
            Need(("step_batch",), sequential or parallel, light or "without training", "--sequential or --parallel", amounts=True),
            Need(("rounding", "drop"), sequential or parallel, light or "without training", "--sequential or --parallel"),
            Need(("unit", "blocks"), fits, "without a solver and training", "--sequential"),
            Need(("blocks",), self.unit == "block", "with --unit=layer", "--unit=block"),
            Need(("tune_scales",), tunes, light or "with --no-bias-tuning", "--bias-tuning"),
            Need(
                ("pairs", "sensitivity_base"),
                self.sensitivity == "measured",
                f"with --sensitivity={self.sensitivity}",
                "--sensitivity=measured",
            ),
            Need(("bn_prior", "bn_target"), self.bn_tuning, "with --no-bn-tuning", "--bn-tuning"),
        ]

    @property
    def options(self) -> "LayerOptions":
        """Return the settings that observing the network needs."""
        from anybit.networks.options import LayerOptions

        gradients, curvature = self.does("bias_tuning"), self.sensitivity == "hawq"
        return LayerOptions(self.weight_bits, self.activation_bits, self.keep, self.group, self.unit, self.blocks, gradients, curvature)

    def does(self, step: str) -> bool:
        """Return whether `step` runs, by its switch or by the pipeline."""
        switch = getattr(self, step)
        if step == "parallel" and switch is None and self.solver != "none":
            return False  # the solver's candidates are equally good in a hundredth of the time
        return self.pipeline == "advanced" if switch is None else switch

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {step: self.does(step) for step in SWITCHES}

    @classmethod
    def recorded(cls, report: Mapping[str, Any]) -> Any:
        report = next(iter(report["budgets"].values())) if "budgets" in report else report
        settings = super().recorded(report)
        if settings and "solver" not in settings:  # a run older than the solver
            settings = {**settings, "solver": "none"}
        if (
            settings and settings.get("parallel") and not report.get("candidate_errors")
        ):  # the pipeline's default, without a layer to choose for
            settings = {**settings, "parallel": None}
        return settings


def parse_one_width(text: str) -> int | None:
    """Parse one bit-width, or "float" as None."""
    bits = BITS.parse(text)
    if len(bits) != 1:
        raise InvalidSetting(f"--activation-bits={text}: grow trains one activation bit-width. Give one number, or float.")
    return bits[0]


ONE_WIDTH = Text(parse_one_width, lambda bits: BITS.write([bits]), "a bit-width, or float")


@documented
@dataclass(frozen=True)
class GrowSettings(Settings):
    """Settings of `grow`."""

    activation_bits: int | None = option(
        8, "Bits of every layer's input, 2..8, or `float` (in Python None).", least=2, most=8, text=ONE_WIDTH, panel="Budget"
    )
    keep: Mapping[str, Precision] = same_as(CalibrateSettings, "keep")
    method: str | None = option(None, "csq, msq: grow a scheme; lsq: train one (default: csq, lsq).", choices=tuple(GROW_METHODS))
    from_scratch: bool = option(False, "Start from new weights; use with --fix=0.6 --gate-rate=0.03.", switch=True, rare=True)
    task: str | None = same_as(CalibrateSettings, "task", rare=True)
    outputs: Mapping[str, float] = same_as(CalibrateSettings, "outputs", rare=True)
    csq: CSQSettings = field(default_factory=CSQSettings)
    msq: MSQSettings = field(default_factory=MSQSettings)
    lsq: LSQSettings = field(default_factory=LSQSettings)
    train: TrainSettings = field(default_factory=TrainSettings)

    def needs_of(self, method: str, has_budget: bool, scheme: "Mapping[str, Precision] | None") -> list[Need]:
        """List what options need in order to have an effect, once the method and the target are known."""
        own = options_of(type(getattr(self, method)))
        of_others = {name: other for other in ("csq", "msq", "lsq") for name in options_of(type(getattr(self, other))) if name not in own}
        fixed = "with --scheme, which fixes every layer's bits"
        anchored = not (self.csq.prune and method == "csq")
        return [
            *(Need((name,), False, f"with --method={method}", f"--method={other}") for name, other in of_others.items()),
            Need(("strength", "ramp", "weighting", "dropping", "pull"), has_budget, "without a budget", "a budget"),
            Need(("drops",), has_budget or method != "msq", "without a budget", "a budget", amounts=True),
            Need(("anchor",), anchored, "with --prune, which closes all planes of a layer"),
            Need(("keep",), scheme is None, fixed),
            Need(("activation_bits",), scheme is None or self.activation_bits in {one.activation_bits for one in scheme.values()}, fixed),
        ]


def check_subnet(budget: Any, scheme: Any, polish: bool, data: Any) -> None:
    """Raise InvalidSetting unless exactly one of budget and scheme is given, and polishing has inputs."""
    if (budget is None) == (scheme is None):
        raise InvalidSetting("Give either a budget or a scheme, to say which subnet to extract.")
    if polish and data is None:
        raise InvalidSetting("Polishing needs inputs. Give training data with --data.")
