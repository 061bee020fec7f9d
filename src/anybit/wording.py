"""Messages in the reader's terms: flags on the command line, keywords in Python.

Every message is written for the command line. Three forms are for this module, and in Python become:

    --overwrite                             overwrite=True                              an option
    --keep='head=float'                     keep={'head': 'float'}                      an option with its value: after "=", never a space
    `anybit extract RUN --budget=3bit`      `anybit.extract('RUN', budget='3bit')`      a command, in backquotes

tests/test_wording.py applies it to all strings of the package that name an option.
"""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from anybit.errors import AnybitError

OTHERWISE = {"train": "data", "output": "folder", "block": "blocks"}
"""Flag -> the keyword in Python, if different."""
MAPPINGS = {"keep": "'W8A8'", "outputs": "1.0"}
"""Keywords whose value is a dictionary, NAME=VALUE on the command line -> the value of a NAME alone."""
SWITCHES = ("overwrite", "polish", "tables", "weight_only", "half", "prune", "from_scratch", "tune_scales", "pack_embeddings")
STEPS = ("parallel", "sequential", "bias_tuning", "bn_tuning")
"""Switches with a --no- form."""
PREPROCESSING = ("mean", "std", "size", "resize", "interpolation", "classes", "columns", "length", "stride")
"""Keywords of Preprocessing, which functions take as a whole."""
OF_PIP = ("force-reinstall", "index-url")

_VALUE = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s`]*[^\s`.,:;)]"""
"""In quotes, or up to the next space, without the punctuation of the sentence."""
_FLAG = re.compile(rf"(?<![\w-])--(?!(?:{'|'.join(OF_PIP)})\b)([a-z][a-z-]*[a-z])(?:=({_VALUE}))?")
_COMMAND = re.compile(r"`anybit ([a-z]+)([^`]*)`")
_SIZE = re.compile(r"([\d.]+)([kMGT]?)B")

_speaks_plainly: ContextVar[bool] = ContextVar("speaks_plainly", default=False)


@contextmanager
def as_on_the_command_line() -> Iterator[None]:
    """Leave messages unchanged inside the block."""
    token = _speaks_plainly.set(True)
    try:
        yield
    finally:
        _speaks_plainly.reset(token)


@contextmanager
def as_in_python(known: Collection[str] = ()) -> Iterator[None]:
    """Turn options in errors that leave the block into keywords, `known` ones as they are; a nested block changes nothing."""
    if _speaks_plainly.get():
        yield
        return
    try:
        with as_on_the_command_line():
            yield
    except AnybitError as error:
        error.args = (in_python(str(error), known),)
        raise


def in_python(message: str, known: Collection[str] = ()) -> str:
    """Write the flags in a message as keywords, and commands as calls."""
    return _FLAG.sub(lambda flag: _keyword(flag, known), _COMMAND.sub(_call, message))


def _call(command: re.Match[str]) -> str:
    """Write a command as a call, whose result is saved if the command names an output."""
    verb, rest = command.groups()
    keywords = {flag[1]: _keyword(flag, ()) for flag in _FLAG.finditer(rest)}
    saved = keywords.pop("output", "").removeprefix("folder=")
    arguments = [repr(one) for one in _FLAG.sub("", rest).split()]
    arguments += [f"{one}..." if one.endswith("=") else one for one in keywords.values()]
    return f"`anybit.{verb}({', '.join(arguments) or '...'}){f'.save({saved})' if saved else ''}`"


def _keyword(flag: re.Match[str], known: Collection[str]) -> str:
    """Write one flag as a keyword, with its value."""
    option, value = flag.groups()
    if option == "per-tensor":
        return "per_channel=False"
    if option.startswith("no-"):
        return f"{option.removeprefix('no-').replace('-', '_')}=False"
    name = option.replace("-", "_")
    if name in SWITCHES or (name in STEPS and value is None):
        return f"{name}=True"
    if name not in known:
        name = OTHERWISE.get(option, name)
    keyword = f"{name}={'' if value is None else _literal(name, value)}"
    return f"Preprocessing({keyword})" if name in PREPROCESSING and name not in known else keyword


def _literal(name: str, text: str) -> str:
    """Write a value as in Python."""
    value = text[1:-1] if text[0] in "'\"" else text
    if name in MAPPINGS:
        key, _, amount = value.partition("=")
        return f"{{{key!r}: {(amount if name == 'outputs' else repr(amount)) if amount else MAPPINGS[name]}}}"
    if name == "memory" and (size := _SIZE.fullmatch(value)):
        return str(round(float(size[1]) * 1000 ** " kMGT".index(size[2] or " ")))
    if re.fullmatch(r"-?\d+(\.\d+)?", value):
        return value
    return repr(tuple(value.split(","))) if name == "classes" else repr(value)
