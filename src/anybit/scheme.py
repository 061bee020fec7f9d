"""Precision and Scheme: immutable values with a human grammar.

    Precision    W4A8 | W4 (activations float) | A8 (an operation without weights) | W0 (pruned: no codes) | float

Quantities:

    bits    the mean number of stored weight bits over the weights of all quantized layers, including kept ones
            (a layer kept float counts 32, a pruned layer 0); scales, biases and headers are excluded
    bytes   of model.safetensors in total; a percentage is of the float32 weights' file
    BOPs    multiply-accumulates of one sample times weight bits times activation bits (float counts 32)
"""

import difflib
import fnmatch
import math
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from anybit.errors import InvalidSetting, SchemeMismatch
from anybit.numerics.bits import check_bits
from anybit.settings import Text

FLOAT_BITS = 32


def check_positive(value: float, what: str) -> float:
    """Return `value`. Raises InvalidSetting unless it is a finite number above zero."""
    if not 0 < value < math.inf:
        raise InvalidSetting(f"{what} {value} must be a finite number above zero.")
    return value


@dataclass(frozen=True)
class Precision:
    """Bits of one layer's weights (0, 2..8) and input activations (2..8); None means float. `Precision.parse("W4A8")` reads its text."""

    weight_bits: int | None = None
    activation_bits: int | None = None

    def __post_init__(self):
        if self.weight_bits is not None and not (type(self.weight_bits) is int and self.weight_bits == 0):
            check_bits(self.weight_bits, "weight bit-width")
        if self.activation_bits is not None:
            check_bits(self.activation_bits, "activation bit-width")

    @classmethod
    def parse(cls, text: str) -> "Precision":
        """Parse "W4A8", "W4", "A8", "W0" or "float"."""
        if text == "float":
            return cls()
        match = re.fullmatch(r"(?:W([0-9]{1,3}))?(?:A([0-9]{1,3}))?", text) if isinstance(text, str) else None
        if not text or not match:
            raise InvalidSetting(f"Precision {reprlib.repr(text)} cannot be read. Write W4A8, W4 (activations float), A8, W0 or float.")
        return cls(*(None if group is None else int(group) for group in match.groups()))

    def __str__(self) -> str:
        weights = "" if self.weight_bits is None else f"W{self.weight_bits}"
        activations = "" if self.activation_bits is None else f"A{self.activation_bits}"
        return weights + activations or "float"

    @property
    def stored_weight_bits(self) -> int:
        """Return the bits that each weight counts in a budget: 32 if it stays float."""
        return FLOAT_BITS if self.weight_bits is None else self.weight_bits


FLOAT = Precision()
LAYERS = "is not a mapping of layers to precisions. Write anybit.Scheme.parse({'fc': 'W4A8', ...})"


@dataclass(frozen=True)
class Scheme(Mapping[str, Precision]):
    """An immutable mapping of layer name -> precision, in the model's order."""

    layers: Mapping[str, Precision] = field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.layers, Mapping) or not all(isinstance(one, Precision) for one in self.layers.values()):
            raise InvalidSetting(f"{reprlib.repr(self.layers)} {LAYERS}.")
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))

    def __reduce__(self):
        return Scheme, (dict(self.layers),)

    @classmethod
    def uniform(cls, names: Iterable[str], precision: Precision | str) -> "Scheme":
        """Return the scheme with the same precision in every layer of `names`."""
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise InvalidSetting(f"{reprlib.repr(names)} is not a list of layers. Write anybit.Scheme.uniform(['fc'], 'W4A8').")
        if isinstance(precision, str):
            precision = Precision.parse(precision)
        return cls(dict.fromkeys(names, precision))

    @classmethod
    def parse(cls, layers: Mapping[str, str]) -> "Scheme":
        """Parse a JSON object of layer name -> precision."""
        if not isinstance(layers, Mapping):
            raise InvalidSetting(f"{reprlib.repr(layers)} {LAYERS}.")
        return cls({name: Precision.parse(text) for name, text in layers.items()})

    def to_json(self) -> dict[str, str]:
        """Return a JSON object that `parse` reads back."""
        return {name: str(precision) for name, precision in self.layers.items()}

    def replace(self, changes: Mapping[str, Precision]) -> "Scheme":
        """Return this scheme with the precisions of some layers changed."""
        self.check_names(changes)
        return Scheme({**self.layers, **changes})

    def check_names(self, names: Iterable[str]) -> None:
        """Raise SchemeMismatch, with near matches, if a name is not one of this scheme's layers."""
        check_names(names, self.layers, "The model")

    def __str__(self) -> str:
        return "{" + ", ".join(f"{name}: {precision}" for name, precision in self.layers.items()) + "}"

    def __getitem__(self, name: str) -> Precision:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __hash__(self) -> int:
        return hash(frozenset(self.layers.items()))


def check_names(names: Iterable[str], known: Iterable[str], who: str) -> None:
    """Raise SchemeMismatch naming each of `names` that is not in `known`, with its nearest match."""
    known = list(known)
    unknown = [name for name in names if name not in set(known)]
    if not unknown:
        return
    parts = []
    for name in unknown[:5]:
        near = difflib.get_close_matches(name, known, n=1)
        parts.append(f"{name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    raise SchemeMismatch(f"{who} has no quantizable layer {', '.join(parts)}{more}. `anybit inspect` lists the names.")


def parsed_keep(keep: Mapping[str, Precision | str]) -> dict[str, Precision]:
    """Parse the precisions of shell patterns on layer names if they are text."""
    return {pattern: Precision.parse(p) if isinstance(p, str) else p for pattern, p in keep.items()}


def parse_keep(items: Sequence[str]) -> dict[str, Precision]:
    """Parse texts like "head=W8A8" into shell pattern -> precision."""
    keep: dict[str, Precision] = {}
    for item in items:
        pattern, separator, precision = item.rpartition("=")
        if not separator or not pattern:
            raise InvalidSetting(f"--keep={item!r} cannot be read. Write PATTERN=W8A8 or PATTERN=float.")
        if pattern in keep:
            raise InvalidSetting(f"--keep={item!r}: {pattern} is also kept at {keep[pattern]}. Give each pattern once.")
        keep[pattern] = Precision.parse(precision)
    return keep


def parse_bits(text: str) -> tuple[int | None, ...]:
    """Parse "4,8,float" into bit-widths; None for float."""
    return tuple(None if part == "float" else int(part) for part in text.split(","))


def bits_text(bits: Iterable[int | None]) -> str:
    """Write bit-widths in the form that `parse_bits` reads."""
    return ",".join("float" if one is None else str(one) for one in bits)


PRECISION = Text(Precision.parse)
KEEP = Text(parse_keep, lambda keep: [f"{pattern}={precision}" for pattern, precision in keep.items()] or None)


def parse_weight_bits(text: str) -> tuple[int, ...]:
    """Parse "4,8" into bit-widths."""
    if "float" in text.split(","):
        raise InvalidSetting("float is not a bit-width of weights. Name 2 to 8, and keep layers float with --keep='LAYER=float'.")
    return tuple(int(part) for part in text.split(","))


WEIGHT_BITS = Text(parse_weight_bits, bits_text, "bit-widths with commas: 2,3,4,6,8")
BITS = Text(parse_bits, bits_text, "bit-widths with commas: 2,3,4,6,8")


def match_patterns(patterns: Mapping[str, Precision], names: Iterable[str]) -> dict[str, Precision]:
    """Return layer name -> precision for shell `patterns` on whole names. A later pattern wins. Raises InvalidSetting if one matches
    nothing, or only layers that later ones match."""
    names = list(names)
    fixed: dict[str, Precision] = {}
    winners: dict[str, str] = {}
    for pattern, precision in patterns.items():
        matched = fnmatch.filter(names, pattern)
        if not matched:
            near = difflib.get_close_matches(pattern, names, n=3)
            hint = f" Near matches: {', '.join(near)}." if near else ""
            raise InvalidSetting(f"--keep='{pattern}={precision}' matches no quantizable layer.{hint} `anybit inspect` lists the names.")
        fixed.update(dict.fromkeys(matched, precision))
        winners.update(dict.fromkeys(matched, pattern))
    for pattern in patterns.keys() - set(winners.values()):
        later = winners[fnmatch.filter(names, pattern)[0]]
        raise InvalidSetting(
            f"--keep='{pattern}={patterns[pattern]}' has no effect, since --keep='{later}={patterns[later]}' comes later and matches the "
            "same layers. Put it last, or leave it out."
        )
    return {name: fixed[name] for name in names if name in fixed}


def check_choices(scheme: Mapping[str, Precision], choices: Mapping[str, Sequence[Precision]]) -> None:
    """Raise SchemeMismatch if the scheme names an unknown layer, or a precision that was not trained."""
    Scheme({name: options[0] for name, options in choices.items()}).check_names(scheme)
    for name, precision in scheme.items():
        if precision not in choices[name]:
            trained = ", ".join(str(option) for option in choices[name])
            raise SchemeMismatch(f"{name} was not trained at {precision}. Choose from {trained}, or train again with those --bits.")


def check_whole(scheme: Scheme, choices: Mapping[str, Sequence[Precision]]) -> None:
    """Raise SchemeMismatch if the scheme omits a layer, names an unknown one, or has a precision that was not trained."""
    check_choices(scheme, choices)
    lacking = [name for name in choices if name not in scheme]
    if lacking:
        raise SchemeMismatch(f"The scheme names {len(scheme)} of {len(choices)} layers; {lacking[0]!r} is missing. Name every layer.")
