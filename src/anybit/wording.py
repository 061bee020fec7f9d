"""Messages in the reader's terms: flags on the command line, keywords in Python.

Keep it float: --keep 'head=float'.      Keep it float: keep={'head': 'float'}.
Choose another --output.                 Choose another folder=.
"""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from anybit.errors import AnybitError

OTHERWISE = {"train": "data", "output": "folder", "block": "blocks"}
"""Flag -> the keyword in Python, if different."""
MAPPINGS = ("keep", "outputs")
"""Keywords whose value is a dictionary: NAME=VALUE."""
SWITCHES = ("overwrite", "polish", "tables", "weight_only", "half", "prune", "from_scratch", "tune_scales", "pack_embeddings")
PREPROCESSING = ("mean", "std", "size", "resize", "interpolation", "classes", "columns", "length", "stride")
"""Keywords of Preprocessing, which functions take as a whole."""
ALWAYS_VALUED = ("device", "method")
WORDS = ("random", "light")
"""Values that look like words of a sentence."""

_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z-]*[a-z])(?: ('(?:[^'\\]|\\.)*'|[\w./:,%=*\[\]{}<>-]*[\w%*\]])(?!\w))?")
"""A flag, and the word after it."""
_VALUE = re.compile(rf"'.*'|.*([/:=%\d]|\w[.,]\w).*|[A-Z][A-Z,]*|{'|'.join(WORDS)}")
"""Such a word if it is a value, not the next word of the sentence."""
_COMMAND = re.compile(r"\banybit ([a-z]+)((?: (?!--)[\w./:-]+)?)((?: --[a-z][a-z-]+(?: [\w./:%]*[/:%\dA-Z][\w/:%]*)?)+)")
_SIZE = re.compile(r"([\d.]+) ?([kMGT]?)B")
_PIP = ("force-reinstall", "index-url")

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
    return _FLAG.sub(lambda match: _keyword(match, known), _COMMAND.sub(_call, message))


def _call(match: re.Match[str]) -> str:
    verb, place, flags = match.groups()
    keywords = {flag[1]: _keyword(flag, ()) for flag in _FLAG.finditer(flags)}
    saved = keywords.pop("output", "").removeprefix("folder=")
    arguments = [*([repr(place.strip())] if place else []), *(f"{one}..." if one.endswith("=") else one for one in keywords.values())]
    return f"anybit.{verb}({', '.join(arguments)}){f'.save({saved})' if saved else ''}"


def _keyword(match: re.Match[str], known: Collection[str]) -> str:
    """Write one flag as a keyword with its value; unchanged if it belongs to another program."""
    flag, word = match[1], match[2]
    if flag in _PIP:
        return match[0]
    is_value = word is not None and (flag in ALWAYS_VALUED or _VALUE.fullmatch(word) is not None)
    rest = f" {word}" if word is not None and not is_value else ""
    if flag == "per-tensor":
        return f"per_channel=False{rest}"
    if flag.startswith("no-"):
        return f"{flag.removeprefix('no-').replace('-', '_')}=False{rest}"
    name = flag.replace("-", "_")
    if name not in known:
        name = OTHERWISE.get(flag, name)
    if name in SWITCHES:
        return f"{name}=True{rest}"
    written = f"{name}={_literal(name, word.strip(chr(39))) if is_value else ''}"
    return f"{f'Preprocessing({written})' if name in PREPROCESSING and name not in known else written}{rest}"


def _literal(name: str, value: str) -> str:
    if name in MAPPINGS:
        key, _, amount = value.partition("=")
        return f"{{{key!r}: {amount or '1.0'}}}" if name == "outputs" else f"{{{key!r}: {amount or 'W8A8'!r}}}"
    if name == "memory" and (size := _SIZE.fullmatch(value)):
        return str(round(float(size[1]) * 1000 ** " kMGT".index(size[2] or " ")))
    if re.fullmatch(r"-?\d+(\.\d+)?", value):
        return value
    return repr(tuple(value.split(","))) if name == "classes" else repr(value)
