"""What the user may say of data, and its grammar: tasks, augmentations of pictures, columns of texts. Imports no torch."""

from typing import Literal, get_args

from anybit.errors import InvalidSetting

TaskName = Literal["classification", "regression", "embedding", "question-answering", "language-model"]
TASK_NAMES = get_args(TaskName)
ROLES = {
    "text": ("sentence", "text", "sentence1", "premise"),
    "pair": ("sentence2", "hypothesis", "pair", "text_pair"),
    "label": ("label", "score"),
    "question": ("question",),
    "context": ("context",),
    "answers": ("answers",),
}
"""What a column is for, and the names that it is found by where the user names none."""


def parse_augmentations(text: str) -> list[tuple[str, int]]:
    """[("flip", 0), ("crop", 4)] of "flip,crop4"."""
    found = []
    for part in filter(None, text.split(",")):
        if part == "flip":
            found.append(("flip", 0))
        elif part.startswith("crop") and part[4:].isdigit():
            found.append(("crop", int(part[4:])))
        else:
            raise InvalidSetting(f"augment {part!r} is unknown. Write flip, crop4 (shifts by up to 4 pixels), or both with a comma.")
    return found


def parse_columns(text: str | None) -> dict[str, str | int]:
    """role -> column's name, or its number."""
    found: dict[str, str | int] = {}
    for part in text.split(",") if text else ():
        role, separator, column = part.partition("=")
        if not separator or role not in ROLES or not column:
            raise InvalidSetting(f"--columns {text!r} cannot be read. Write roles ({', '.join(ROLES)}): text=sentence,label=label.")
        if role in found:
            raise InvalidSetting(f"--columns {text!r} names the {role} twice.")
        found[role] = int(column) if column.isascii() and column.isdigit() else column
    return found
