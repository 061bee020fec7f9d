"""Weights that libraries publish: whether those of a named network are stored here or can be fetched, known before anything is imported."""

import os
import re
import socket
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit
from urllib.request import getproxies

from anybit.errors import InvalidSetting
from anybit.sources.references import RANDOM, is_installed

PATIENCE = 0.5
"""Seconds for which a name server is waited for; one that takes longer is left to the download itself."""
REMEDY = f"Give a file with --weights=FILE, or draw random ones to inspect layers, sizes and speed with --weights={RANDOM}."


def check_published(reference: str, weights: str | None = None) -> None:
    """Raise InvalidSetting if a network of timm, torchvision or the hub needs files that are certainly neither here nor to be had."""
    kind, _, name = reference.partition(":")
    if kind == "hf":
        stored = Path(name).is_dir() or bool(os.environ.get("HF_HUB_OFFLINE")) or (_hub() / f"models--{name.replace('/', '--')}").exists()
        place, host, remedy = _hub(), _hub_host(), "Name a folder that holds the model: hf:FOLDER."
    elif kind in ("timm", "torchvision") and weights is None and _defines(kind, name.partition(".")[0]):
        stored = any(_checkpoints().glob("*.*")) or (kind == "timm" and any(_hub().glob("models--*")))
        place, host, remedy = _hub() if kind == "timm" else _checkpoints(), "download.pytorch.org", REMEDY
        host = _hub_host() if kind == "timm" else host
    else:
        return
    if not stored and not _may_answer(host):
        raise InvalidSetting(f"--model={reference}: its weights are not in {place}, and {host} cannot be reached. {remedy}")


def _defines(library: str, name: str) -> bool:
    """Return whether the library's sources define a network of this name; the library itself suggests the nearest of an unknown one."""
    spec = find_spec(library) if is_installed(library) else None
    definition = re.compile(rf"^def {re.escape(name.lower())}\(".encode(), re.M)
    folders = [Path(place) / "models" for place in (spec.submodule_search_locations if spec else None) or []]
    return any(definition.search(path.read_bytes()) for folder in folders for path in folder.rglob("*.py"))


def _caches() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _checkpoints() -> Path:
    """Return the folder in which torch keeps downloaded weights."""
    return Path(os.environ.get("TORCH_HOME") or _caches() / "torch") / "hub" / "checkpoints"


def _hub() -> Path:
    """Return the folder in which the Hugging Face hub keeps downloaded models."""
    home = Path(os.environ.get("HF_HOME") or _caches() / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or home / "hub")


def _hub_host() -> str:
    return urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname or ""


def _may_answer(host: str) -> bool:
    """Return False if the host's name is refused at once; True in doubt, or if a proxy resolves it."""
    if getproxies().keys() & {"http", "https", "all"}:
        return True
    refused: list[OSError] = []

    def resolve() -> None:
        try:
            socket.getaddrinfo(host, 443)
        except OSError as error:
            refused.append(error)

    question = Thread(target=resolve, daemon=True)
    question.start()
    question.join(PATIENCE)
    return not refused
