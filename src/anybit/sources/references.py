"""References in text form, checked before anything is imported or loaded. Imports no torch.

Each function raises if the reference names nothing, in words that follow the option's name: "--data=nowhere.npz is not there."
"""

import ast
import difflib
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from anybit.data.options import PARTS, TEXT_SUFFIXES, suffix_of
from anybit.errors import InvalidFile, InvalidInput, InvalidSetting, MissingPackage

ZOOS = {"torchvision": "torchvision", "timm": "timm", "hf": "transformers"}
"""Prefix of `--model` -> the package that it needs."""
RANDOM = "random"
"""The value of `--weights` that draws them."""
DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a question with the nearest of `names`, after a space; "" if none is similar."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def did_you_mean_path(path: Path) -> str:
    """Return a question with an existing path that is similar to this one."""
    beside = sorted(one.name for one in path.parent.iterdir()) if path.parent.is_dir() else []
    names = [name for name in beside if not name.startswith(".") and name != path.name and _similar_stems(name, path.name)]
    question = did_you_mean(path.name, names)
    return question.replace("mean ", f"mean {path.parent}/") if question and path.parent != Path() else question


def _similar_stems(first: str, second: str) -> bool:
    """Return whether names of files are similar without their suffixes, which are often equal."""
    one, other = Path(first).stem.lower(), Path(second).stem.lower()
    one_letter = len(one) == len(other) and sum(a != b for a, b in zip(one, other, strict=True)) <= 1
    return one_letter or difflib.SequenceMatcher(None, one, other).ratio() >= 0.6


def check_file(path: str | Path) -> None:
    """Raise InvalidFile if there is no such file."""
    path = Path(path)
    if path.is_dir():
        raise InvalidFile(f"{path} is a folder. Name a file.")
    if path.exists() and not path.is_file():
        raise InvalidFile(f"{path} is a pipe or device, not a file. Name a file.")
    if not path.is_file():
        raise InvalidFile(f"{path} is not there.{did_you_mean_path(path)}")


def check_weights(path: str | Path) -> None:
    """Raise InvalidFile if there is no such file, unless the weights are random."""
    if path != RANDOM:
        check_file(path)


def check_there(path: str | Path) -> None:
    """Raise InvalidFile if there is no such file or folder."""
    if not Path(path).exists():
        raise InvalidFile(f"{path} is not there.{did_you_mean_path(Path(path))}")


def check_device(device: object) -> None:
    """Raise InvalidSetting for an unknown device name; only PyTorch knows whether this machine has it."""
    kind, separator, index = str(device).partition(":")
    numbered = not separator or (index.isascii() and index.isdigit() and len(index) < 4 and (kind != "cpu" or index == "0"))
    if kind == "meta":
        raise InvalidSetting(f"{device} is not a device that holds numbers. Write {', '.join(DEVICES[:3])} or cuda:1.")
    if kind not in DEVICES or not numbered:
        near = " Did you mean cuda?" if "gpu" in kind.lower() else did_you_mean(kind.lower(), DEVICES)
        raise InvalidSetting(f"{device} is not a device. Write {', '.join(DEVICES[:3])} or cuda:1.{near}")


def check_package(package: str, reference: str) -> None:
    """Raise MissingPackage if a package that `reference` needs is not installed."""
    if not is_installed(package):
        package = {"PIL": "pillow"}.get(package, package)
        raise MissingPackage(f"{reference} needs {package}, which is not installed: run `pip install {package}`.")


def check_packages(what: str, extra: str, *packages: str) -> None:
    """Raise MissingPackage if one of the packages of an extra, which `what` needs, is not installed."""
    lacking = next((package for package in packages if not is_installed(package)), None)
    if lacking:
        raise MissingPackage(f"{what} need {lacking}, which is not installed: run `pip install 'anybit[{extra}]'`.")


def is_installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # hidden, as in tests
        return False


def check_code(reference: str) -> None:
    """Raise InvalidSetting if `package.module:function` or `FILE.py:function` names a missing package, file or function."""
    place, separator, name = reference.rpartition(":")
    if not separator or not place or not name:
        raise InvalidSetting(f"{reference!r} cannot be read. Write package.module:function or path/to/file.py:function.")
    if is_script(place):
        if not Path(place).is_file():
            raise InvalidSetting(f"{reference}: there is no file {place}.{did_you_mean_path(Path(place))}")
        names = names_in(Path(place))
        if names and name not in names:
            raise InvalidSetting(f"{reference}: {place} has no function {name!r}.{did_you_mean(name, names)}")
    elif not is_installed(place.partition(".")[0]):
        raise InvalidSetting(f"{reference}: there is no package {place.partition('.')[0]!r}. Is it installed and the name right?")


def names_in(path: Path) -> list[str]:
    """List the names that a script defines or imports, without executing it; empty if they cannot be determined."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # reported when it is run
        return []
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            names.append(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names += [(alias.asname or alias.name).partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append(node.id)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("globals", "exec", "setattr"):
            return []
    return [] if "*" in names or "__getattr__" in names else names


def functions_in(path: Path) -> list[str]:
    """List the functions and classes that a script itself defines, except private ones."""
    try:
        nodes = ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError):
        return []
    return [node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")]


def check_model(reference: str) -> None:
    """Raise InvalidSetting or InvalidFile if `--model` names no network."""
    kind, separator, name = reference.partition(":")
    if kind in ZOOS and separator:
        check_package(ZOOS[kind], reference)
        if kind == "hf" and re.match(r"[./~]|.*/.*/", name) and not Path(name).is_dir():
            raise InvalidSetting(f"{reference}: there is no folder {name}.{did_you_mean_path(Path(name))}")
    elif separator:
        check_code(reference)
    else:
        raise InvalidSetting(f"{reference!r} names no network. {_model_meant(reference)}")


def _model_meant(reference: str) -> str:
    """Return advice on what a reference without a colon may mean."""
    path = Path(reference)
    if suffix_of(path) in (".pt", ".pth", ".safetensors", ".bin", ".ckpt"):
        return "Weights go to --weights; --model names the code that builds the network: FILE.py:function, timm:NAME or torchvision:NAME."
    if is_script(path):
        functions = [f"{reference}:{name}" for name in functions_in(path)] if path.is_file() else []
        return f"Name the function that returns it: {' or '.join(functions[:3]) or f'{reference}:function'}."
    if (path / "config.json").is_file():
        return f"Write hf:{reference} for a Hugging Face folder."
    if re.fullmatch(r"[\w.-]+", reference) and not path.exists():
        return f"Write torchvision:{reference} or timm:{reference} for a public one, or path/to/file.py:function for your own."
    return "Write package.module:function, path/to/file.py:function, timm:NAME, torchvision:NAME or hf:FOLDER."


def split_subset(reference: str) -> tuple[str, str]:
    """Split `file.npz#test` into ("file.npz", "test"), and `hf:data#test` alike. An existing path wins, since `#` may be part of a name."""
    if reference.startswith("hf:"):
        name, subset = split_subset(reference.removeprefix("hf:"))
        return f"hf:{name}", subset
    marks = [place for place, letter in enumerate(reference) if letter == PARTS]
    if not marks or Path(reference).exists():
        return reference, ""
    there = [place for place in marks if Path(reference[:place]).exists()]
    in_name = [place for place in marks if place > reference.rfind("/")]
    place = max(there, default=(in_name or [len(reference)])[0])
    return reference[:place], reference[place + 1 :]


def check_part(path: str, subset: str) -> None:
    """Raise InvalidInput if `path` exists and has no parts that `#` could name, as only .npz files and hf: data sets have."""
    if not subset or path.startswith("hf:") or not Path(path).exists() or (suffix_of(path) == ".npz" and Path(path).is_file()):
        return
    folder = f", or the folder {path}/{subset}" if (Path(path) / subset).is_dir() else ""
    raise InvalidInput(f"{path} has no parts, so #{subset} names nothing; those of .npz files do. Name {path} alone{folder}.")


def check_data(reference: str) -> None:
    """Raise InvalidInput or InvalidFile if `--data`, `--train` or `--test` names no inputs."""
    path, subset = split_subset(reference)
    check_part(path, subset)
    place = Path(path)
    if place.is_dir():
        check_package("PIL", reference)
    elif reference.startswith("hf:"):
        check_package("datasets", reference)
    elif place.is_file() and (is_of_arrays(path) or suffix_of(path) in TEXT_SUFFIXES):
        return
    elif ":" in reference:
        check_code(reference)
    else:
        there = "is no" if place.exists() else "is not there: no"
        raise InvalidInput(
            f"{path} {there} folder of images, file of arrays (.npz, .npy) or of texts ({', '.join(TEXT_SUFFIXES)}).{_data_meant(place)}"
        )


def is_of_arrays(path: str) -> bool:
    """Return whether a path names a file of arrays, by its suffix."""
    return suffix_of(path) in (".npz", ".npy")


def is_script(path: str | Path) -> bool:
    """Return whether a path names a file of Python code, by its suffix."""
    return suffix_of(path) == ".py"


def _data_meant(path: Path) -> str:
    """Return advice on what a path that names no inputs may mean, after a space."""
    if not path.is_file():
        return did_you_mean_path(path)
    if is_script(path):
        functions = [f"{path}:{name}" for name in functions_in(path)]
        return f" Name the function that returns the data: {' or '.join(functions[:3]) or f'{path}:function'}."
    return " Give it one of these suffixes if it is one."
