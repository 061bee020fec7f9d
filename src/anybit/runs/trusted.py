"""Runs that this user's own anybit wrote, whose model references may be loaded."""

import fcntl
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from anybit.environment import own_folder
from anybit.errors import InvalidFile
from anybit.files.strict import json_text, read_json, sha256_of
from anybit.files.whole import write_whole


def _trusted_runs() -> Path | None:
    """Return the file of the list; None if the user has no home."""
    home = own_folder("XDG_STATE_HOME", ".local/state")
    return None if home is None else home / "runs.json"


def trust(folder: Path, file: str = "scheme.json") -> None:
    """List the run as one of this user's own, by the hash of the file that names its model, so that its reference may be loaded.

    The run is already written: a list that cannot be written causes a warning, not an error.
    """
    listing = _trusted_runs()
    if listing is None:
        warnings.warn(
            f"{folder} is not listed as your own run (you have no home folder, and XDG_STATE_HOME is not set): name its model when you "
            "load it.",
            stacklevel=2,
        )
        return
    try:
        listing.parent.mkdir(parents=True, exist_ok=True)
        digest = sha256_of(folder / file)
        with _one_at_a_time(listing.with_suffix(".lock")):
            known = _known_runs(listing)
            if digest not in known:
                write_whole(listing, json_text([*known, digest], indent=1).encode())
    except (OSError, InvalidFile) as error:
        warnings.warn(
            f"{folder} is not listed as your own run ({error}): name its model when you load it, or repair {listing}.", stacklevel=2
        )


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Wait until no other process is inside; without file locks, all enter."""
    with open(lock, "w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_trusted(folder: Path, file: str = "scheme.json") -> bool:
    """Return whether this user's own run wrote the folder's current scheme file (or another that names its model)."""
    listing = _trusted_runs()
    return listing is not None and sha256_of(folder / file) in _known_runs(listing)


def _known_runs(listing: Path) -> list[str]:
    """Return the hashes in the user's list; empty without a list."""
    if not listing.is_file():
        return []
    known = read_json(listing)
    if not isinstance(known, list) or not all(isinstance(digest, str) for digest in known):
        raise InvalidFile(f"{listing} is not a list of hashes. Remove it; your runs then need --model, as foreign ones do.")
    return known
