"""Networks of timm and torchvision by their names there, with published weights, none, or random ones."""

import importlib
import inspect
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from torch import Tensor, nn

from anybit.errors import InvalidSetting
from anybit.files.strict import in_words
from anybit.progress import tell
from anybit.sources.callables import import_optional
from anybit.sources.published import REMEDY
from anybit.sources.references import RANDOM, did_you_mean

PATIENCE = 10.0
"""Seconds that a server may take to respond."""
MEMORY = 60.0
"""Seconds for which a server's availability is remembered."""


@dataclass(frozen=True)
class Library:
    """A library of networks: a function of (name, whether with published weights), whether it has a name, and its names."""

    make: Callable[[str, bool], Any]
    has: Callable[[str], bool]
    names: Callable[[], list[str]]


def library_model(library: str, name: str, weights: str | None) -> nn.Module:
    """Return the network `name` of timm or torchvision, with its published weights unless `weights` are given.

    Raises MissingPackage if the library cannot be imported, and InvalidSetting if it has no such network, or its weights cannot be
    downloaded.
    """
    reference = f"--model={library}:{name}"
    source = LIBRARIES[library](reference)
    if not source.has(name):
        raise InvalidSetting(f"{reference}: {library} has no network of this name.{did_you_mean(name, source.names())}")
    if weights == RANDOM:
        return randomly_initialized(lambda: source.make(name, False), reference)
    if weights is not None:
        return source.make(name, False)
    try:
        with short_timeouts():
            return source.make(name, True)
    except Exception as error:
        raise InvalidSetting(f"{reference}: its weights cannot be downloaded ({in_words(error).rstrip('.')}). {REMEDY}") from error


def _timm(reference: str) -> Library:
    timm = import_optional("timm", "timm", reference)
    return Library(lambda name, pretrained: timm.create_model(name, pretrained=pretrained), timm.is_model, timm.list_models)


def _torchvision(reference: str) -> Library:
    models = import_optional("torchvision.models", "torchvision", reference)

    def make(name: str, pretrained: bool) -> Any:
        if pretrained:
            return models.get_model(name, weights="DEFAULT")
        return models.get_model(name, weights=None, **_no_backbone(models, name))

    return Library(make, lambda name: name.lower() in models.list_models(), models.list_models)


def _no_backbone(models: Any, name: str) -> dict[str, None]:
    """Return the option of detectors and segmenters that disables downloading the backbone's weights."""
    return {"weights_backbone": None} if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters else {}


LIBRARIES = {"timm": _timm, "torchvision": _torchvision}
"""Name -> the library, imported when requested."""


@torch.no_grad()
def randomly_initialized(make: Callable[[], nn.Module], reference: str) -> nn.Module:
    """Return a network with random weights from a fixed seed, and report it; constant tensors (norms, zeros, scales of layers) are
    perturbed.

    Layers, sizes and speed are those of the trained network; its outputs mean nothing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if (
                tensor.is_floating_point()
                and tensor.numel()
                and _is_constant(tensor)
                and (key.endswith(STATISTICS) or tensor.requires_grad)
            ):
                tensor.add_(torch.rand_like(tensor) * 0.2 if key.endswith("running_var") else torch.randn_like(tensor) * 0.1)
    tell("note", note=f"{reference}: {DRAWN}")
    return model


STATISTICS = ("running_mean", "running_var")
DRAWN = "weights are random, so layers, sizes and speed are right but accuracy means nothing"


def _is_constant(tensor: Tensor) -> bool:
    return bool((tensor == tensor.flatten()[0]).all())


# Servers that do not respond


@contextmanager
def short_timeouts(place: str | None = None) -> Iterator[None]:
    """Give up after PATIENCE if a server does not respond, and ask none repeatedly; earlier downloads are still used.

    No server is asked for a `place` that is a folder.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(before or PATIENCE)
    try:
        asked = place is None or not Path(place).is_dir()
        with _offline() if asked and not _hub_answers(int(time.monotonic() // MEMORY)) else nullcontext():
            yield
    finally:
        socket.setdefaulttimeout(before)


@cache
def _hub_answers(when: int) -> bool:
    """Return whether the hub of timm and transformers responds, tested once in MEMORY seconds; True if it is not asked."""
    constants = _hub_constants()
    if constants is None or constants.HF_HUB_OFFLINE or not re.match("https?://", constants.ENDPOINT):
        return True
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=PATIENCE).close()
    except HTTPError:
        return True
    except OSError:
        return False
    return True


@contextmanager
def _offline() -> Iterator[None]:
    constants = _hub_constants()
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def _hub_constants() -> Any:
    try:
        return importlib.import_module("huggingface_hub.constants")
    except ImportError:
        return None
