"""Folders of images: their files, classes, and reading."""

import math
import os
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from anybit.errors import InvalidInput, InvalidSetting, some
from anybit.files.cache import digest_of_files
from anybit.files.contents import contents_of
from anybit.files.strict import in_words
from anybit.progress import tell
from anybit.sources.callables import import_optional
from anybit.sources.preprocessing import Preprocessing

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
DIGITS = 9
"""Digits of the largest class number."""
PIXELS = 2**25
"""Limit for a resized image: a file of a few bytes can claim a strip that becomes gigabytes."""


class ImageFolder(Dataset):
    """Images in one folder (unlabelled) or one folder per class, numbered by `class_numbers`; in RGB, or in grey with one channel."""

    def __init__(self, root: Path, preprocessing: Preprocessing, channels: int = 3):
        import_optional("PIL.Image", "pillow", f"The folder of images {root}")
        _check_channels(preprocessing, channels)
        _check_size(preprocessing)
        self.preprocessing, self.channels = preprocessing, channels
        tree = Tree.of(root)
        files = tree.images
        if not files:
            raise InvalidInput(f"Folder {root} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
        folders = _class_folders(root, files)
        numbers = class_numbers(folders, preprocessing.classes, root)
        self.unlabelled = _stray_in_words(root, files)
        self.labelled = not self.unlabelled and files[0].parent != root
        self.notes = tree.notes(preprocessing.classes) if self.labelled else []
        if self.labelled and preprocessing.classes is None and _are_mixed(folders):
            self.notes.append(_mixed_in_words(folders))
        self.items = [(path, numbers[path.parent.name] if self.labelled else -1) for path in files]

    def __len__(self) -> int:
        return len(self.items)

    @property
    def sample_bytes(self) -> int:
        """Return the bytes of an image of `--size`; 0 if each has its own size."""
        return 4 * self.channels * (self.preprocessing.size or 0) ** 2

    def contents_digest(self) -> str:
        """Return a SHA-256 over the files, their classes and the preprocessing."""
        files = digest_of_files([path for path, _ in self.items])
        return contents_of([files, [label for _, label in self.items], self.preprocessing, self.channels])

    def __getitem__(self, index: int):
        path, label = self.items[index]
        image = read_image(path, self.preprocessing, self.channels)
        return (image, label) if self.labelled else image


def _stray_in_words(root: Path, files: Iterable[Path]) -> str:
    """Write which images lie beside folders with images, so that no folder is one class; "" if there are none."""
    folders = {path.parent for path in files}
    outer = {parent for folder in folders for parent in folder.parents if parent in folders}
    if not outer:
        return ""
    images = [str(path.relative_to(root)) for path in files if path.parent in outer]
    inner = sorted({folder.name for folder in folders if not outer.isdisjoint(folder.parents)})
    what = "an image lies" if len(images) == 1 else "images lie"
    return f"{what} beside the class folders {some(inner)}, {some(images)}: move {'it' if len(images) == 1 else 'them'} away"


def _check_channels(preprocessing: Preprocessing, channels: int) -> None:
    """Raise InvalidSetting unless mean and deviation have one number for all channels of an image, or for each."""
    for name in ("mean", "std"):
        values = getattr(preprocessing, name)
        if values is not None and len(values) not in (1, channels):
            read_as, remedy = ("RGB", "Give 3, or one for all") if channels == 3 else ("grey for this network", "Give one")
            raise InvalidSetting(f"--{name} has {len(values)} numbers, and images in folders are read as {read_as}. {remedy}.")


def _check_size(preprocessing: Preprocessing) -> None:
    """Raise InvalidSetting if every resized image would exceed PIXELS."""
    for name in ("size", "resize"):
        side = getattr(preprocessing, name) or 0
        if side**2 > PIXELS:
            raise InvalidSetting(
                f"--{name}={side} makes images of {side} x {side} pixels, {12 * side**2 / 2**30:.1f} GiB each. Give at most "
                f"{math.isqrt(PIXELS)}."
            )


@dataclass
class Tree:
    """The files and folders below a folder of images, links followed.

    images  files of images, sorted
    bare    folders without images below them
    hidden  folders whose name begins with a dot, which are not read: checkpoints of notebooks, thumbnails
    """

    root: Path
    images: list[Path] = field(default_factory=list)
    bare: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)

    @classmethod
    def of(cls, root: Path) -> "Tree":
        tree = cls(root)
        tree._read(root, {})
        tree.images.sort()
        return tree

    def _read(self, folder: Path, above: dict[Path, Path]) -> None:
        """Add what lies below `folder`; `above` are the real paths of the folders that hold it. Raises InvalidInput for a folder that
        cannot be read, a link to a folder above it, which would never end, and a broken link, which may have been a class."""
        own = folder.resolve()
        if own in above:
            raise InvalidInput(f"{folder} is a link to {above[own]}, the folder that holds it. Remove it.")
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise InvalidInput(f"The folder {folder} cannot be read: {in_words(error)}. Make it readable, or move it away.") from error
        count, bare = len(self.images), len(self.bare)
        for entry in entries:
            path, hidden = folder / entry.name, entry.name.startswith(".")
            if entry.is_symlink() and not path.exists():
                if not hidden:
                    raise InvalidInput(f"{path} is a link to {os.readlink(path)}, which is not there. Repair or remove it.")
            elif entry.is_dir():
                self.hidden.append(path) if hidden else self._read(path, above | {own: folder})
            elif path.suffix.lower() in IMAGE_SUFFIXES and entry.is_file():  # a pipe would never end
                self.images.append(path)
        if len(self.images) == count:
            self.bare[bare:] = [folder]

    def notes(self, classes: Collection[str] | None) -> list[str]:
        """Write which folders are no classes, although others beside images may expect them to be."""
        names = sorted({path.name for path in self.bare} - set(classes or ()))
        notes = [f"folders below {self.root} without images are no classes: {some(names)}. --classes names all classes"] if names else []
        hidden = sorted(str(path.relative_to(self.root)) for path in self.hidden)
        return notes + ([f"hidden folders below {self.root} are not read: {some(hidden)}"] if hidden else [])


def _class_folders(root: Path, files: Iterable[Path]) -> set[str]:
    """Return the names of the folders with images, except `root`. Raises InvalidInput if two have the same name, or are the same."""
    folders = sorted({path.parent for path in files} - {root})
    names: dict[str, Path] = {}
    places: dict[Path, Path] = {}
    for folder in folders:
        if names.setdefault(folder.name, folder) != folder:
            raise InvalidInput(
                f"{root} holds two image folders with the same name, {names[folder.name]} and {folder}. A folder is a class: name the one "
                "that contains the class folders, or give each class one folder."
            )
        if (other := places.setdefault(folder.resolve(), folder)) != folder:
            raise InvalidInput(f"{other} and {folder} are the same folder by a link, so its images have two classes. Remove one.")
    return set(names)


def class_numbers(names: Collection[str], classes: Collection[str] | None, root: Path) -> dict[str, int]:
    """Return class folder -> number: its index in `classes`; without them, the integer that is its name, or its index in sorted order."""
    if classes is not None:
        known = {name: number for number, name in enumerate(classes)}
        if unknown := sorted(set(names) - set(known)):
            raise InvalidInput(
                f"{root} has folders of unknown classes, {some(unknown)}, beside {some(list(known))}. Name all classes in "
                "the order of their numbers: --classes=A,B,C."
            )
        return known
    if _are_numbers(names):
        numbers = {name: int(name) for name in names}
        if len(set(numbers.values())) < len(numbers):
            raise InvalidInput(f"{root} has several class folders with the same number ({some(sorted(names))}). Use each number once.")
        return numbers
    return {name: number for number, name in enumerate(sorted(names))}


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _are_numbers(names: Collection[str]) -> bool:
    """Return whether folders are named by class numbers. Raises InvalidInput if one of these is beyond any number of classes."""
    if not all(map(_is_number, names)):
        return False
    if large := next((name for name in sorted(names) if len(name.lstrip("0")) > DIGITS), None):
        raise InvalidInput(f"The class folder {large:.40} names a class number beyond {10**DIGITS - 1}. Name it by its class number.")
    return True


def _are_mixed(names: Collection[str]) -> bool:
    """Return whether some folders are named by numbers and others are not: the numbers are then part of the names."""
    return any(map(_is_number, names)) and not all(map(_is_number, names))


def _mixed_in_words(names: Collection[str]) -> str:
    first = ", ".join(f"{name} is {number}" for number, name in list(enumerate(sorted(names)))[:4])
    return f"some class folders are numbers and some names, so all are numbered in sorted order: {first}. --classes sets it"


def common_classes(references: Iterable[Any]) -> tuple[str, ...] | None:
    """Return the names of the class folders in all these image folders, sorted: one numbering for data and test data.

    None if there are none, or if folders are named by their class numbers.
    """
    roots = [Path(reference) for reference in references if isinstance(reference, str) and Path(reference).is_dir()]
    folders = {root: _class_folders(root, Tree.of(root).images) for root in roots}
    names = set().union(*folders.values())
    if _are_numbers(names):
        return None
    if numbered := [root for root, own in folders.items() if own and all(map(_is_number, own))]:
        other = next(root for root in roots if root not in numbered)
        raise InvalidInput(
            f"The class folders of {numbered[0]} are numbers, and those of {other} also names ({some(sorted(folders[other]))}). Name them "
            "alike, or name all classes in the order of their numbers: --classes=A,B,C."
        )
    if _are_mixed(names):
        tell("note", note=_mixed_in_words(names))
    return tuple(sorted(names))


def read_image(path: Path, preprocessing: Preprocessing, channels: int = 3) -> torch.Tensor:
    """Read one image as float [channels, H, W]: upright, RGB or grey, resized, cropped, scaled to 0..1, normalized."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = Image.open(path)
            image = _as_8_bits(ImageOps.exif_transpose(file), file.format).convert("RGB" if channels == 3 else "L")
    except InvalidInput as error:
        raise InvalidInput(f"{path} {error}") from error
    except Exception as error:  # broken files also raise SyntaxError and struct.error, and too large ones PIL's own error
        raise InvalidInput(f"{path} cannot be read as an image: {in_words(error)}. Remove or replace it.") from error
    image = _resized(image, preprocessing, path)
    x = torch.from_numpy(np.array(image).reshape(image.height, image.width, channels)).permute(2, 0, 1).float() / 255
    if preprocessing.mean is not None:
        x = x - torch.tensor(preprocessing.mean)[:, None, None]
    if preprocessing.std is not None:
        x = x / torch.tensor(preprocessing.std)[:, None, None]
    return x.contiguous()


def _resized(image: Any, preprocessing: Preprocessing, path: Path) -> Any:
    from PIL import Image

    resampling = getattr(Image.Resampling, preprocessing.interpolation.upper())
    if preprocessing.resize:
        share = preprocessing.resize / min(image.size)
        sides = round(image.width * share), round(image.height * share)
        if sides[0] * sides[1] > PIXELS:
            raise InvalidInput(
                f"{path} is {image.width} x {image.height} pixels and would be {sides[0]} x {sides[1]} with a short side of "
                f"{preprocessing.resize}. Crop or remove it, or give --size without --resize."
            )
        image = image.resize(sides, resampling)
        if preprocessing.size:
            left, top = (image.width - preprocessing.size) // 2, (image.height - preprocessing.size) // 2
            image = image.crop((left, top, left + preprocessing.size, top + preprocessing.size))
    elif preprocessing.size:
        image = image.resize((preprocessing.size, preprocessing.size), resampling)
    return image


def _as_8_bits(image: Any, file_format: str | None) -> Any:
    """Scale an image with one 16-bit or float channel to 8 bits, which Pillow would clip to 0..255. Floats are from 0 to 1."""
    from PIL import Image

    if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        return image
    values = np.asarray(image)
    if image.mode == "F":
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise InvalidInput(
                f"holds floats from {values.min():g} to {values.max():g}, but those of an image are from 0 to 1. Scale them, or give "
                "arrays."
            )
        return Image.fromarray(np.round(values * 255).astype(np.uint8))
    if image.mode == "I" and file_format == "TIFF":  # elsewhere, this is how Pillow represents 16 bits
        raise InvalidInput(
            f"holds 32-bit integers from {values.min()} to {values.max()}, whose white level is unknown. Save it with 8 or 16 bits."
        )
    return Image.fromarray(np.round(values / 257).astype(np.uint8))
