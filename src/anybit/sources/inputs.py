"""The references of `--data`, turned into samples."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, SubsetRandomSampler, default_collate

from anybit.data.options import TEXT_SUFFIXES, parse_columns
from anybit.data.samples import ArrayDataset, NamedArrays, Samples
from anybit.data.texts import read_rows
from anybit.errors import InvalidFile, InvalidInput, InvalidSetting, naming
from anybit.files.strict import in_words
from anybit.sources.callables import call_user_function, import_optional, load_callable
from anybit.sources.models import huggingface, is_transformers
from anybit.sources.preprocessing import Preprocessing
from anybit.sources.references import check_data

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}


def load_data(reference: str, preprocessing: Preprocessing = Preprocessing(), workers: int = 0, model: nn.Module | None = None) -> Samples:
    """Load the samples that `reference` names: an image folder, `file.npy`, `file.npz` or `file.npz#test`, texts, or a function returning a
    data set or loader. Texts are tokenized by the tokenizer of `model`, and arrays may have the names of its inputs."""
    path, _, subset = reference.partition("#")
    if path.endswith((".npz", ".npy")):
        if preprocessing.size or preprocessing.resize:
            raise InvalidSetting("--size and --resize apply to image folders; pictures in arrays are used as they are.")
        x, y = _read_arrays(Path(path), subset, model)
        mean, std = preprocessing.mean, preprocessing.std
        arrays = NamedArrays(x, y, mean, std) if isinstance(x, dict) else ArrayDataset(x, y, mean, std)
        return _read_by(model, Samples(arrays, y is not None, workers))
    if Path(path).is_dir():
        dataset = ImageFolder(Path(path), preprocessing)
        return _read_by(model, Samples(dataset, dataset.labelled, workers))
    if reference.startswith("hf:") or (path.endswith(TEXT_SUFFIXES) and Path(path).is_file()):
        return _texts(reference, preprocessing, workers, model)
    if ":" not in reference:
        with naming("--data"):
            check_data(reference)
    dataset = call_user_function(load_callable(reference, "--data"), f"--data {reference}")
    return as_samples(dataset, workers, model)


def _texts(reference: str, preprocessing: Preprocessing, workers: int, model: nn.Module | None) -> Samples:
    """Load the samples of a file of texts or of a Hugging Face data set."""
    if not is_transformers(model):
        raise InvalidSetting(
            f"--data {reference} holds texts, which the tokenizer of a Hugging Face model reads: give --model hf:FOLDER. For another "
            "network give a function that returns a data set of tokens."
        )
    place, _, subset = reference.partition("#")
    texts = huggingface("texts", f"--data {reference}")
    if place.startswith("hf:"):
        import_optional("datasets", "datasets", f"--data {reference}")
        rows = texts.hub_rows(place[3:], subset, parse_columns(preprocessing.columns))
    else:
        rows = read_rows(Path(place), preprocessing.columns)
    return texts.text_samples(model, rows, reference, preprocessing.length, preprocessing.stride, workers)


def _read_by(model: nn.Module | None, samples: Samples) -> Samples:
    """Give the samples the reader of a Hugging Face model, which has several outputs."""
    if samples.reader is not None or not is_transformers(model):
        return samples
    return replace(samples, reader=huggingface("texts", "the model").reader_of(model))


def as_samples(data: Any, workers: int = 0, model: nn.Module | None = None) -> Samples:
    """Turn data at hand into samples: Samples, a DataLoader, a data set, a tensor or array, or (x, y).

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
    if isinstance(data, Mapping) and data and all(isinstance(array, (torch.Tensor, np.ndarray)) for array in data.values()):
        arrays = {name: _array(array) if isinstance(array, torch.Tensor) else array for name, array in data.items()}
        return Samples(NamedArrays(arrays, y := arrays.pop("labels", None)), y is not None, workers)
    if isinstance(data, (torch.Tensor, np.ndarray)):
        data = (data, None)
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], (torch.Tensor, np.ndarray)):
        x, y = (_array(array) if isinstance(array, torch.Tensor) else array for array in data)
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
    """Return whether an item, or a batch, is an input with its label: a pair, or a dict with `labels` as transformers' collators make
    them."""
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


Arrays = np.ndarray | dict[str, np.ndarray]
LABELS = ("y", "labels", "label")


def _read_arrays(path: Path, subset: str, model: nn.Module | None) -> tuple[Arrays, np.ndarray | None]:
    """Read (x, y) of a .npy or .npz file; x is one array, or several by the names of the network's inputs."""
    if not path.is_file():
        raise InvalidInput(f"There is no file {path}.")
    taken = _inputs_of(model)
    try:
        with open(path, "rb") as file:
            stored = np.load(file, allow_pickle=False)
            if isinstance(stored, np.ndarray):
                return stored, None
            names = list(stored)
            arrays = {name: stored[key] for name, key in _keys(names, subset, taken).items()}
    except Exception as error:
        raise InvalidFile(f"{path} cannot be read as arrays: {in_words(error)}") from error
    y = next((arrays.pop(name) for name in LABELS if name in arrays), None)
    if not arrays:
        also = f", nor one of the network's inputs ({', '.join(taken)})" if taken else ""
        part = f"_{subset}" if subset else ""
        raise InvalidInput(f"{path} has no array x{part}{also}; it holds {', '.join(names)}. Write {path.name}#test for x_test.")
    lengths = {len(array) for array in (*arrays.values(), *(() if y is None else (y,)))}
    if len(lengths) > 1:
        counts = ", ".join(f"{len(array)} {name}" for name, array in arrays.items())
        raise InvalidInput(f"{path} holds {counts}" + ("" if y is None else f" and {len(y)} labels") + ". Give as many of each.")
    if set(arrays) == {"x"}:
        return arrays["x"], None if y is None else y.reshape(-1)
    return arrays, y


def _keys(stored: Sequence[str], subset: str, taken: Sequence[str]) -> dict[str, str]:
    """Return name -> key of the arrays of a subset that are read: x, or what the network takes by its name, and labels."""
    for suffix in [f"_{subset}"] if subset else ["", "_train"]:
        keys = {key.removesuffix(suffix): key for key in stored if key.endswith(suffix)}
        inputs = [name for name in taken if name in keys] or [name for name in ("x",) if name in keys]
        if "x" in keys and (len(inputs) == 1 or "x" not in inputs):
            inputs = ["x"]
        if inputs:
            return {name: keys[name] for name in (*inputs, *LABELS) if name in keys}
    return {}


def _inputs_of(model: nn.Module | None) -> list[str]:
    """Return the names of what the network's forward takes, labels left out."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = {} if model is None else inspect.signature(model.forward).parameters
    return [name for name, one in parameters.items() if one.kind in kinds and name not in LABELS]


class ImageFolder(Dataset):
    """Pictures in one folder (unlabelled) or one folder a class. Integer folder names are class numbers, others are numbered in order."""

    def __init__(self, root: Path, preprocessing: Preprocessing):
        import_optional("PIL.Image", "pillow", f"The folder of images {root}")
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
    """Read one picture as float [3, H, W]: RGB, resized, cropped, scaled to 0..1, normalized."""
    from PIL import Image

    try:
        picture = Image.open(path).convert("RGB")
    except Exception as error:  # broken files raise SyntaxError and struct.error too, and too large ones an error of PIL's own
        raise InvalidInput(f"{path} cannot be read as a picture: {in_words(error)}. Remove or replace it.") from error
    resampling = getattr(Image.Resampling, preprocessing.interpolation.upper())
    if preprocessing.resize:
        share = preprocessing.resize / min(picture.size)
        picture = picture.resize((round(picture.width * share), round(picture.height * share)), resampling)
        if preprocessing.size:
            left, top = (picture.width - preprocessing.size) // 2, (picture.height - preprocessing.size) // 2
            picture = picture.crop((left, top, left + preprocessing.size, top + preprocessing.size))
    elif preprocessing.size:
        picture = picture.resize((preprocessing.size, preprocessing.size), resampling)
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    if preprocessing.mean is not None:
        x = x - torch.tensor(preprocessing.mean)[:, None, None]
    if preprocessing.std is not None:
        x = x / torch.tensor(preprocessing.std)[:, None, None]
    return x.contiguous()


def samples_from(data: Any, workers: int, preprocessing: Preprocessing = Preprocessing(), model: nn.Module | None = None) -> Samples:
    return load_data(data, preprocessing, workers, model) if isinstance(data, str) else as_samples(data, workers, model)
