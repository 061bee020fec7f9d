"""What `--model` and `--data` name: references turned into networks and samples.

A model reference is code that runs: `package.module:function`, `path/to/file.py:function`, `timm:NAME`, `torchvision:NAME`; or a Hugging
Face model, whose files are data: `hf:FOLDER`, `hf:NAME`. A data reference is a folder of images, a `.npz` file, texts (`.tsv`, `.csv`,
`.jsonl`, `.txt`, `hf:NAME`), or a function that returns a data set.
"""

import importlib
import importlib.util
import inspect
import math
import os
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, SubsetRandomSampler, default_collate

from anybit.batches import ArrayDataset, Samples
from anybit.errors import AnybitError, InvalidFile, InvalidInput, InvalidSetting, MissingPackage, SchemeMismatch
from anybit.files import in_words, read_settings
from anybit.layers import unwrapped
from anybit.texts import SUFFIXES, parse_columns, read_rows

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
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


def changed(recorded: Preprocessing, given: Preprocessing) -> Preprocessing:
    """What a run recorded, with what is now given otherwise than by default in its place."""
    defaults = Preprocessing()
    return replace(recorded, **{f.name: value for f in fields(given) if (value := getattr(given, f.name)) != getattr(defaults, f.name)})


def absolute(reference: str) -> str:
    """A reference that can be followed from another working folder: paths of scripts, arrays and folders made absolute."""
    place, separator, name = reference.rpartition(":")
    if place.endswith(".py"):
        return f"{Path(place).resolve()}{separator}{name}"
    if reference.startswith("hf:"):
        return f"hf:{Path(reference[3:]).resolve()}" if Path(reference[3:]).is_dir() else reference
    path, _, part = reference.partition("#")
    return str(Path(path).resolve()) + (f"#{part}" if part else "") if Path(path).exists() else reference


def load_model(reference: str, weights: str | None = None, task: str | None = None) -> nn.Module:
    """The network that `reference` names, in evaluation mode, with the state dict of `weights` (.safetensors, .pt, .pth) if given.

    `task` chooses the head of a Hugging Face model; None takes the one that it was saved with.
    """
    kind, _, name = reference.partition(":")
    make = {"timm": _from_timm, "torchvision": _from_torchvision}.get(kind)
    if kind == "hf":
        model = _huggingface(f"--model {reference}").load(name, task)
    else:
        function = (lambda: make(name, weights is None)) if make else load_callable(reference, "--model")
        model = _called(function, f"--model {reference}")
    if not isinstance(model, nn.Module):
        raise InvalidSetting(f"--model {reference} returned a {type(model).__name__}, not a torch.nn.Module.")
    model = covered(model)
    if weights:
        load_weights(model, Path(weights))
    return model.eval()


def _huggingface(what: str) -> Any:
    """The module of Hugging Face models, whose package is optional; `what` needs it."""
    _optional("transformers", "transformers", what)
    return importlib.import_module("anybit.huggingface")


def covered(model: nn.Module) -> nn.Module:
    """The network itself, out of what wraps it; where it is one of transformers' an adapted copy, whose attention anybit covers."""
    model = unwrapped(model)
    if not is_transformers(model) or "scores" in {name.rpartition(".")[2] for name, _ in model.named_modules()}:
        return model
    return _huggingface(f"A {type(model).__name__}").adapted(model)


def is_transformers(model: Any) -> bool:
    """Whether `model` is one of transformers' models; that package is not imported to know it."""
    package = sys.modules.get("transformers")
    return package is not None and isinstance(model, package.PreTrainedModel)


def completed(preprocessing: Preprocessing, model: nn.Module) -> Preprocessing:
    """The preprocessing, or where none was given the one that a Hugging Face model's own files state for pictures."""
    if preprocessing != Preprocessing() or not is_transformers(model):
        return preprocessing
    return Preprocessing(**_huggingface("the model").picture_settings(model))


def _from_timm(name: str, pretrained: bool) -> nn.Module:
    return _optional("timm", "timm", f"--model timm:{name}").create_model(name, pretrained=pretrained)


def _from_torchvision(name: str, pretrained: bool) -> nn.Module:
    return _optional("torchvision.models", "torchvision", f"--model torchvision:{name}").get_model(
        name, weights="DEFAULT" if pretrained else None
    )


def _called(function: Callable, what: str) -> Any:
    """What the user's function returns; whatever it raises becomes one error that names it."""
    try:
        return function()
    except AnybitError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise InvalidSetting(f"{what} failed with {type(error).__name__}: {said}. It is called without arguments.") from error


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict strictly; raises SchemeMismatch naming the first keys that differ. Nothing in the file is executed."""
    if not path.is_file():
        raise InvalidFile(f"Weights file {path} is not there.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            _check_archive(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InvalidFile(f"Weights file {path} cannot be read as a state dict: {in_words(error)}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise InvalidFile(f"Weights file {path} holds a {type(state).__name__}, not a state dict of tensors.")
    own = model.state_dict()
    # Counters of batches seen play no part in a trained network, and some files leave them out.
    lacking = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    surplus = [key for key in state if key not in own]
    shapes = [key for key in state if key in own and tuple(state[key].shape) != tuple(own[key].shape)]
    if lacking or surplus or shapes:
        parts = [
            f"{what} {', '.join(key[:200] for key in keys[:3])}"
            for what, keys in (("lack", lacking), ("have besides", surplus), ("differ in shape at", shapes))
            if keys
        ]
        raise SchemeMismatch(f"The weights in {path.name} do not match the model: they {'; '.join(parts)}. Check --model and --weights.")
    try:
        model.load_state_dict(state, strict=False)
    except (RuntimeError, TypeError, NotImplementedError) as error:  # sparse or quantized tensors, or storage that is not there
        raise InvalidFile(f"Weights file {path} does not fit the model: {in_words(error)}") from error


def _check_archive(path: Path) -> None:
    """Raise ValueError where an archive would unpack to more than its own size."""
    if not zipfile.is_zipfile(path):  # as torch before 1.6 saved
        return
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in archive.infolist()):
            raise ValueError("its entries are compressed, which torch.save does not do; save it again, as .safetensors at best")


def load_callable(reference: str, option: str) -> Callable:
    """The function that `package.module:function` or `path/to/file.py:function` names."""
    place, separator, name = reference.rpartition(":")
    if not separator or not place or not name:
        raise InvalidSetting(f"{option} {reference!r} cannot be read. Write package.module:function or path/to/file.py:function.")
    try:
        module = _import_file(Path(place), option) if place.endswith(".py") else importlib.import_module(place)
    except ImportError as error:
        raise InvalidSetting(f"{option} {reference}: {error}. Is the package installed and the name right?") from error
    except AnybitError:
        raise
    except Exception as error:
        raise InvalidSetting(
            f"{option} {reference}: running {place} failed with {type(error).__name__}: {error}. Repair the script."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InvalidSetting(f"{option} {reference}: {place} has no function {name!r}.")
    return function


def _import_file(path: Path, option: str):
    if not path.is_file():
        raise InvalidSetting(f"{option}: there is no file {path}.")
    name = f"anybit_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickled workers look their module up
    sys.path.insert(0, str(path.parent.resolve()))
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # as a script that is run, it leaves nothing beside itself
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = writes
        sys.path.remove(str(path.parent.resolve()))
    return module


def _optional(module: str, package: str, what: str):
    """The module of a package that is one of anybit's extras; `what` needs it."""
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:  # torchvision raises RuntimeError beside another build of torch
        why = " ".join(str(error).split())
        raise MissingPackage(f"{what} needs {package}, which does not import ({why}): run `pip install {package}`.") from error


def load_data(reference: str, preprocessing: Preprocessing = Preprocessing(), workers: int = 0, model: nn.Module | None = None) -> Samples:
    """The samples that `reference` names: an image folder, `file.npz` or `file.npz#test`, texts, or a function returning a data set or
    loader. Texts are tokenized by the tokenizer of `model`."""
    path, _, part = reference.partition("#")
    if path.endswith(".npz"):
        x, y = _read_npz(Path(path), part)
        if preprocessing.size or preprocessing.resize:
            raise InvalidSetting("--size and --resize apply to image folders; the pictures of a .npz are used as they are.")
        return Samples(ArrayDataset(x, y, preprocessing.mean, preprocessing.std), y is not None, workers)
    if Path(path).is_dir():
        dataset = ImageFolder(Path(path), preprocessing)
        return _read_by(model, Samples(dataset, dataset.labelled, workers))
    if reference.startswith("hf:") or (path.endswith(SUFFIXES) and Path(path).is_file()):
        return _texts(reference, preprocessing, workers, model)
    if ":" not in reference:
        raise InvalidInput(f"--data {reference}: there is no such folder, .npz file or file of texts ({', '.join(SUFFIXES)}).")
    dataset = _called(load_callable(reference, "--data"), f"--data {reference}")
    return as_samples(dataset, workers, model)


def _texts(reference: str, preprocessing: Preprocessing, workers: int, model: nn.Module | None) -> Samples:
    """The samples of a file of texts or of a Hugging Face data set."""
    if not is_transformers(model):
        raise InvalidSetting(
            f"--data {reference} holds texts, which the tokenizer of a Hugging Face model reads: give --model hf:FOLDER. For another "
            "network give a function that returns a data set of tokens."
        )
    place, _, part = reference.partition("#")
    made = _huggingface(f"--data {reference}")
    if place.startswith("hf:"):
        _optional("datasets", "datasets", f"--data {reference}")
        rows = made.hub_rows(place[3:], part, parse_columns(preprocessing.columns))
    else:
        rows = read_rows(Path(place), preprocessing.columns)
    return made.text_samples(model, rows, reference, preprocessing.length, preprocessing.stride, workers)


def _read_by(model: nn.Module | None, samples: Samples) -> Samples:
    """The samples with the reader of a Hugging Face model, whose outputs are many."""
    if samples.reader is not None or not is_transformers(model):
        return samples
    return replace(samples, reader=_huggingface("the model").reader_of(model))


def as_samples(data: Any, workers: int = 0, model: nn.Module | None = None) -> Samples:
    """Samples from what a user has at hand: Samples, a DataLoader, a data set, a tensor or array, or (x, y).

    Outputs are read as the head of `model` asks for, where it is a Hugging Face model. Of a DataLoader, its data set, its collate_fn and
    how it loads are taken; which samples, in what order, how many at once is drawn here.
    """
    if isinstance(data, Sequence) and len(data) and isinstance(data[0], str):
        raise InvalidInput("Texts as they are cannot be used: write them to a file (--data texts.tsv), or give tokens.")
    return _read_by(model, _as_samples(data, workers))


def _as_samples(data: Any, workers: int) -> Samples:
    if isinstance(data, Samples):
        return data
    if isinstance(data, DataLoader):
        return _samples_of_loader(data, workers)
    if isinstance(data, (torch.Tensor, np.ndarray)):
        data = (data, None)
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], (torch.Tensor, np.ndarray)):
        x, y = (_array(part) if isinstance(part, torch.Tensor) else part for part in data)
        return Samples(ArrayDataset(x, y), y is not None, workers)
    if not (isinstance(data, (Dataset, Sequence)) and hasattr(data, "__len__")):
        raise InvalidInput(f"Data of type {type(data).__name__} cannot be used. Give a data set with a length, a loader, or arrays (x, y).")
    if len(data) == 0:
        raise InvalidInput("The data set is empty.")
    return Samples(data, _has_labels(data[0]), workers)


def _array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().resolve_conj()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()  # numpy has no bfloat16; every value of it is a float32


def _has_labels(item: Any) -> bool:
    """Whether an item, or a batch, is an input with its label: a pair, or a dict with `labels` as transformers' collators make them."""
    return "labels" in item if isinstance(item, Mapping) else isinstance(item, (tuple, list)) and len(item) > 1


def _samples_of_loader(loader: DataLoader, workers: int) -> Samples:
    if loader.batch_sampler is None:
        raise InvalidInput("The loader does not batch (batch_size=None). Give a data set whose items are single samples.")
    sampler = loader.sampler
    dataset = Subset(loader.dataset, list(sampler.indices)) if isinstance(sampler, SubsetRandomSampler) else loader.dataset
    loading = {name: getattr(loader, name) for name in ("worker_init_fn", "multiprocessing_context", "timeout")}
    samples = replace(_as_samples(dataset, workers or loader.num_workers), loading=loading)
    if loader.collate_fn is default_collate:
        return samples
    first = loader.collate_fn([dataset[0]])
    return replace(samples, dataset=dataset, labelled=_has_labels(first), collate=loader.collate_fn)


def _read_npz(path: Path, part: str) -> tuple[np.ndarray, np.ndarray | None]:
    if not path.is_file():
        raise InvalidInput(f"There is no file {path}.")
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            names = list(arrays)
            suffix = f"_{part}" if part else next((s for s in ("", "_train") if f"x{s}" in names), "")
            if f"x{suffix}" not in names:
                raise InvalidInput(f"{path} has no array x{suffix}; it holds {', '.join(names)}. Write {path.name}#test for x_test.")
            x = arrays[f"x{suffix}"]
            y = arrays[f"y{suffix}"] if f"y{suffix}" in names else None
    except InvalidInput:
        raise
    except Exception as error:
        raise InvalidFile(f"{path} cannot be read as .npz arrays: {in_words(error)}") from error
    if y is not None and len(x) != len(y):
        raise InvalidInput(f"{path} holds {len(x)} inputs but {len(y)} labels.")
    return x, None if y is None else y.reshape(-1)


class ImageFolder(Dataset):
    """Pictures in one folder (unlabelled) or one folder a class. Integer folder names are class numbers, others are numbered in order."""

    def __init__(self, root: Path, preprocessing: Preprocessing):
        _optional("PIL.Image", "pillow", f"The folder of images {root}")
        self.preprocessing = preprocessing
        files = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise InvalidInput(f"Folder {root} holds no pictures ({', '.join(sorted(IMAGE_SUFFIXES))}).")
        classes = sorted({path.parent.name for path in files if path.parent != root})
        numbers = (
            {name: int(name) for name in classes} if all(name.isdigit() for name in classes) else {c: i for i, c in enumerate(classes)}
        )
        self.labelled = bool(classes) and all(path.parent != root for path in files)
        self.items = [(path, numbers.get(path.parent.name, -1)) for path in files]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int):
        path, label = self.items[index]
        picture = read_image(path, self.preprocessing)
        return (picture, label) if self.labelled else picture


def read_image(path: Path, preprocessing: Preprocessing) -> torch.Tensor:
    """One picture as float [3, H, W]: RGB, resized, cropped, scaled to 0..1, normalized."""
    from PIL import Image

    try:
        picture = Image.open(path).convert("RGB")
    except Exception as error:  # broken files raise SyntaxError and struct.error too, and too large ones an error of PIL's own
        raise InvalidInput(f"{path} cannot be read as a picture: {in_words(error)}. Remove or replace it.") from error
    how = getattr(Image.Resampling, preprocessing.interpolation.upper())
    if preprocessing.resize:
        share = preprocessing.resize / min(picture.size)
        picture = picture.resize((round(picture.width * share), round(picture.height * share)), how)
        if preprocessing.size:
            left, top = (picture.width - preprocessing.size) // 2, (picture.height - preprocessing.size) // 2
            picture = picture.crop((left, top, left + preprocessing.size, top + preprocessing.size))
    elif preprocessing.size:
        picture = picture.resize((preprocessing.size, preprocessing.size), how)
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    if preprocessing.mean is not None:
        x = x - torch.tensor(preprocessing.mean)[:, None, None]
    if preprocessing.std is not None:
        x = x / torch.tensor(preprocessing.std)[:, None, None]
    return x.contiguous()


def code_of(function: Callable) -> str:
    """What tells a function from another: where it is from and what it says. What else it holds (a closure, arguments bound to it, an
    object's state) cannot be read: such a function is like no other, nor like itself in another process."""
    if not isinstance(function, FunctionType) or function.__closure__:
        return f"{os.getpid()} {id(function)} {getattr(function, '__qualname__', type(function).__qualname__)}"
    code = function.__code__
    constants = [constant for constant in code.co_consts if not isinstance(constant, CodeType)]
    told = [function.__module__, function.__defaults__, function.__kwdefaults__, code.co_code.hex(), code.co_names, constants]
    try:
        told.append(inspect.getsource(function))
    except (OSError, TypeError):
        told.append(function.__qualname__)
    return repr(told)
