"""Results that outlive the process: a run that was killed and is repeated reuses the results that it had finished.

    cache = Cache(folder).keyed(weights, data, code, machine)        everything that all results depend on
    stage = cache.keyed("sensitivity", base)                         what the results of one stage also depend on
    value = stage("conv1 W4", make, read)                            computed and stored, or read from the cache

A result is a JSON record and tensors. It is stored atomically in its own file, named by the SHA-256 of all that it depends on; the file
begins with the SHA-256 of its other bytes. An unreadable file causes a warning, and the result is computed again. Nothing in it is
executed. Whether a result is computed or cached, the caller gets the value of `read`, so both end with the same bytes.
"""

import hashlib
import json
import os
import re
import stat
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from anybit.environment import own_folder
from anybit.errors import AnybitError, InvalidFile, InvalidSetting
from anybit.files.strict import json_text, parse_json, sha256_of
from anybit.files.whole import write_whole
from anybit.progress import tell

Value = TypeVar("Value")
RECORD = "record"
DIGEST_BYTES = 32
KEY_NAME = re.compile(r"[0-9a-f]{64}")
DRAFT = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]+\.tmp")
RECENT = 5 * 10**9
"""Nanoseconds within which a file may change again without a new modification time."""
LIMIT = 10 * 10**9
"""Most bytes of stored results; beyond them, the least recently used are removed."""


@dataclass(frozen=True)
class Entry:
    """A stored result: a JSON record, and tensors."""

    record: Any = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Cache:
    """Results that depend on `key`, stored in `folder` (None: not stored). `counts` are of results "made", "recalled" and "damaged"."""

    folder: Path | None = None
    key: str = ""
    counts: Counter = field(default_factory=Counter, compare=False)

    def keyed(self, *what: Any) -> "Cache":
        """Return the same cache, for results that also depend on `what` (any JSON values)."""
        return replace(self, key=hashlib.sha256(json.dumps([self.key, *what], sort_keys=True).encode()).hexdigest())

    def __call__(self, name: str, make: Callable[[], Entry], read: Callable[[Entry], Value]) -> Value:
        """Return the value that `read` makes of the result `name`, which is computed by `make` unless it is stored.

        `read` raises ValueError, KeyError, TypeError or RuntimeError if the result is invalid.
        """
        path = None if self.folder is None else self._path(name)
        if path is not None and path.is_file():
            try:
                value = read(_read(path))
                os.utime(path)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
                self.counts["damaged"] += 1
                warnings.warn(f"{path}, the stored result of {name}, is damaged ({_words(error)}): it is computed again.", stacklevel=2)
            else:
                self.counts["recalled"] += 1
                tell("recalled", result=name)
                return value
        entry = make()
        entry = replace(entry, record=json.loads(json.dumps(entry.record)))  # as it will be read back
        self.counts["made"] += 1
        if path is not None:
            self._keep(path, name, entry)
        return read(entry)

    def value(self, name: str, make: Callable[[], Any], read: Callable[[Any], Value] = lambda value: value) -> Value:
        """Return the cached value for a result that is JSON, without tensors."""
        return self(name, lambda: Entry(make()), lambda entry: read(entry.record))

    def forget(self, name: str) -> None:
        """Remove the result called `name` if it is stored."""
        if self.folder is not None:
            _removed(self._path(name))

    def _path(self, name: str) -> Path:
        assert self.folder is not None, "a cache without a folder has no files"
        key = self.keyed(name).key
        return self.folder / key[:2] / key

    def _keep(self, path: Path, name: str, entry: Entry) -> None:
        """Store a result; a full disk costs a warning, not the run. Numbers that JSON cannot represent are computed again."""
        try:
            with suppress(AnybitError):
                write_whole(path, _serialized(name, entry))
        except OSError as error:
            if not self.counts["unwritable"]:
                reason = f"{path.parent} cannot be written to ({error.strerror})"
                warnings.warn(f"{reason}: the run continues, but its results are not stored.", stacklevel=3)
            self.counts["unwritable"] += 1


def _serialized(name: str, entry: Entry) -> bytes:
    record = np.frombuffer(json_text({"name": name, "value": entry.record}).encode(), np.uint8)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in entry.tensors.items()}
    data = safetensors.torch.save({RECORD: torch.from_numpy(record.copy()), **{f"={key}": tensor for key, tensor in tensors.items()}})
    return hashlib.sha256(data).digest() + data


def _read(path: Path) -> Entry:
    """Read an entry. Raises InvalidFile if the file's bytes have changed."""
    data = path.read_bytes()
    if hashlib.sha256(data[DIGEST_BYTES:]).digest() != data[:DIGEST_BYTES]:
        raise InvalidFile(f"{len(data)} bytes whose SHA-256 differs from the stored one")
    try:
        tensors = safetensors.torch.load(data[DIGEST_BYTES:])  # no pickle: a JSON header, and numbers
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise InvalidFile(f"no tensors: {error}") from error
    record = parse_json(tensors.pop(RECORD).numpy().tobytes(), "its record")
    return Entry(record["value"], {key.removeprefix("="): tensor for key, tensor in tensors.items()})


def _words(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def results_folder() -> Path | None:
    """Return the folder of stored results; None if the user has no home folder."""
    home = own_folder("XDG_CACHE_HOME", ".cache")
    return None if home is None else home / "results"


def open_cache(cache: str | Path | bool) -> Cache:
    """Return the cache in this folder, in the user's cache directory (True), or one that stores nothing (False)."""
    if isinstance(cache, bool):
        return Cache(results_folder() if cache else None)
    if not isinstance(cache, (str, os.PathLike)):
        raise InvalidSetting(f"cache={cache!r:.60} is not a folder. Give one, True for the user's cache, or False for none.")
    return Cache(Path(cache))


def report_and_trim(cache: Cache) -> None:
    """Report the reused results, and trim the cache to its limit."""
    if cache.counts["recalled"]:
        computed = cache.counts["made"]
        tell("note", note=f"{cache.counts['recalled']} results reused from the cache, {computed} computed")
    if cache.folder is not None:
        trim_cache(cache.folder, LIMIT)


def digest_of_files(files: Sequence[Path]) -> str:
    """Return the SHA-256 over the contents of files, cached by names, sizes and times, so that unchanged files are read once."""

    def read() -> str:
        whole = hashlib.sha256()
        for path in files:
            whole.update(bytes.fromhex(sha256_of(path)))
        return whole.hexdigest()

    states = [(str(path.resolve()), path.stat()) for path in files]
    if time.time_ns() - max((max(one.st_mtime_ns, one.st_ctime_ns) for _, one in states), default=0) < RECENT:
        return read()
    listing = [[path, one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns] for path, one in states]
    return Cache(results_folder()).keyed("files", listing).value("contents of files", read, str)


@dataclass(frozen=True)
class CachedFile:
    """The file of a stored result, and its last use in seconds since 1970."""

    path: Path
    bytes: int
    used: float


def entries(folder: Path) -> list[CachedFile]:
    """Return the stored results, least recently used first."""
    files = [CachedFile(path, status.st_size, status.st_mtime) for path, status in _files(folder, KEY_NAME)]
    return sorted(files, key=lambda entry: (entry.used, entry.path))


def trim_cache(folder: Path, limit: int) -> int:
    """Remove the least recently used results until `limit` bytes are left, and leftovers of killed processes; return the bytes removed."""
    removed = 0
    for path, status in _files(folder, DRAFT):
        if time.time() - status.st_mtime > 3600 and _removed(path):  # no process still writes an older one
            removed += status.st_size
    files = entries(folder)
    total = sum(entry.bytes for entry in files)
    for entry in files:
        if total <= limit or not _removed(entry.path):
            break
        total -= entry.bytes
        removed += entry.bytes
    return removed


def _removed(path: Path) -> bool:
    """Remove a file; failure costs a warning, not the run."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"{path} cannot be removed ({error.strerror}): the cache stays as large as it is.", stacklevel=3)
        return False
    return True


def remove_damaged(folder: Path) -> dict[Path, str]:
    """Remove the results whose bytes have changed; returns file -> its fault."""
    damaged = {}
    for entry in entries(folder):
        try:
            _read(entry.path)
        except FileNotFoundError:  # another process has trimmed it
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            if _removed(entry.path):
                damaged[entry.path] = _words(error)
    return damaged


def _files(folder: Path, name: re.Pattern) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield only files whose names a cache uses."""
    for path in folder.glob("??/*"):
        try:  # another process may have trimmed it
            status = path.lstat()
        except OSError:
            continue
        if name.fullmatch(path.name) and stat.S_ISREG(status.st_mode):
            yield path, status


def cache_summary(trim: int | None = None, check: bool = False) -> dict[str, Any]:
    """Describe the user's cache directory, after trimming it to `trim` bytes and removing damaged results on request."""
    folder = results_folder()
    if folder is None:
        raise InvalidSetting("There is no cache: you have no home folder, and XDG_CACHE_HOME is not set.")
    removed = 0 if trim is None else trim_cache(folder, trim)
    damaged = {str(path): reason for path, reason in remove_damaged(folder).items()} if check else {}
    sizes = [entry.bytes for entry in entries(folder)]
    summary = {"folder": str(folder), "results": len(sizes), "bytes": sum(sizes), "limit": LIMIT}
    return {**summary, "removed_bytes": removed, "damaged": damaged}
