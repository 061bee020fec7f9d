"""The options of data and their grammar: tasks, augmentations of images, columns of texts. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from anybit.errors import InvalidSetting
from anybit.settings import Text

TaskName = Literal[
    "classification", "regression", "embedding", "question-answering", "language-model", "masked-language-model", "sequence-to-sequence",
    "token-classification", "multi-label", "segmentation", "detection",
]  # fmt: skip
TASK_NAMES = get_args(TaskName)
TEXT_SUFFIXES = (".tsv", ".csv", ".jsonl", ".txt")
PARTS = "#"
"""Separates a file from the part of it to read, as in x.npz#test; it may also be in a file's own name."""
ROLES = {
    "text": ("sentence", "text", "sentence1", "premise"),
    "pair": ("sentence2", "hypothesis", "pair", "text_pair"),
    "label": ("label", "score"),
    "question": ("question",),
    "context": ("context",),
    "answers": ("answers",),
}
"""Roles of columns, and the column names that stand for each by default."""


def suffix_of(path: str | Path) -> str:
    """Return the suffix of a file's name in lower case; that of a file that is literally called d.npz#test is .npz."""
    name = Path(path).name
    return Path(name).suffix.partition(PARTS)[0].lower()


def parse_outputs(items: Sequence[str]) -> dict[str, float]:
    """Parse texts like "boxes" or "boxes=0.5" into name or index of an output -> weight."""
    outputs = {}
    for item in items:
        name, separator, weight = item.rpartition("=") if "=" in item else (item, "", "")
        if name in outputs:
            raise InvalidSetting(f"--outputs={item!r}: {name} is given twice. Give each output once.")
        try:
            outputs[name] = float(weight) if separator else 1.0
        except ValueError:
            name = ""
        if not name:
            raise InvalidSetting(f"--outputs={item!r} cannot be read. Write NAME or NAME=WEIGHT: boxes, boxes=0.5, 0.")
    return outputs


OUTPUTS = Text(parse_outputs, lambda outputs: [f"{name}={weight:g}" for name, weight in outputs.items()] or None)


def parse_augmentations(text: str) -> list[tuple[str, int]]:
    """Parse "flip,crop4" into [("flip", 0), ("crop", 4)]; "none", or nothing, into []."""
    augmentations = []
    for name in filter(None, () if text == "none" else text.split(",")):
        if name == "flip":
            augmentations.append(("flip", 0))
        elif name.startswith("crop") and name[4:].isdigit():
            augmentations.append(("crop", int(name[4:])))
        else:
            raise InvalidSetting(f"augment {name!r} is unknown. Write flip, crop4 (shifts by up to 4 pixels), both with a comma, or none.")
    return augmentations


def parse_columns(text: str | None) -> dict[str, str | int]:
    """Parse "text=sentence,label=2" into role -> name or index of a column."""
    columns: dict[str, str | int] = {}
    for assignment in text.split(",") if text else ():
        role, separator, column = assignment.partition("=")
        if not separator or role not in ROLES or not column:
            raise InvalidSetting(f"--columns={text!r} cannot be read. Write roles ({', '.join(ROLES)}): text=sentence,label=label.")
        if role in columns:
            raise InvalidSetting(f"--columns={text!r} names the {role} twice.")
        columns[role] = int(column) if column.isascii() and column.isdigit() else column
    return columns
