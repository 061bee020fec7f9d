"""Write a file or a folder completely or not at all: as a draft of its own beside the target, moved there when it is done.

A draft is locked while its process lives, which distinguishes leftovers of killed processes from drafts that another process is writing.
Nothing else beside the target is touched, whatever its name.
"""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from anybit.errors import AnybitError, InvalidSetting

NAME_BYTES, PATH_BYTES = 255, 3800
"""The longest name of a file, and the longest path of an output: systems allow 4,096, of which its drafts and files need some."""
OLD = "old"
"""Name of the replaced file or folder while it is in the draft's folder."""


def is_draft(name: str, of: str) -> bool:
    """Return whether `name` is a name that drafts of the file or folder `of` get."""
    return re.fullmatch(re.escape(_stem(of)) + r"\.[0-9a-f]{16}\.anybit", name) is not None


def _stem(name: str) -> str:
    return "." + name.encode()[:200].decode(errors="ignore")  # file systems allow 255 bytes


@contextmanager
def drafts_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path` for its draft, locked, and removed with its contents afterwards.

    Drafts of `path` left by killed processes are removed first; one with a replaced file only if something exists in its place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(path)
    lock = None
    try:
        while lock is None:
            folder = path.parent / f"{_stem(path.name)}.{secrets.token_hex(8)}.anybit"
            folder.mkdir()
            lock = os.open(folder, os.O_RDONLY)
            with suppress(OSError):  # on a file system without locks, no draft counts as abandoned
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():  # another process removed it as abandoned before it was locked
                os.close(lock)
                lock = None
        yield folder
    finally:
        if path.exists() or not (folder / OLD).exists():  # otherwise the replaced folder could not be restored
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _remove_left_behind(path: Path) -> None:
    with suppress(OSError):  # a folder that can be written to but not listed
        for draft in [one for one in path.parent.iterdir() if is_draft(one.name, path.name) and not one.is_symlink()]:
            with suppress(OSError), _locked(draft):
                if path.exists() or not (draft / OLD).exists():
                    shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder. Raises OSError if another process holds the lock."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


_claims: ContextVar[frozenset[Path]] = ContextVar("claims", default=frozenset())


@contextmanager
def claimed(path: Path, option: str) -> Iterator[None]:
    """Keep a file or folder, the user's value of `option`, for the work in the block, which may claim it again.

    Raises InvalidSetting if another process, or another thread, works on it. Where nothing can be locked, nothing is claimed.
    """
    try:
        whole = path.resolve()
        made = next((folder for folder in reversed(whole.parents) if not folder.exists()), None)
        place = whole.parent / f"{_stem(whole.name)}.{'0' * 16}.anybit"  # a draft: one that a killed process left is removed later
        lock = None if whole in _claims.get() else _lock_of(place)
    except BlockingIOError as error:
        raise InvalidSetting(f"Another process or thread is writing {path}. Wait until it is done, or choose another {option}.") from error
    except (OSError, ValueError, RuntimeError):
        lock = None
    if lock is None:
        yield
        return
    token = _claims.set(_claims.get() | {whole})
    try:
        yield
    finally:
        _claims.reset(token)
        with suppress(OSError):
            place.rmdir()
            for folder in whole.parents if made is not None else ():  # made for the claim, and still empty
                folder.rmdir()
                if folder == made:
                    break
        os.close(lock)


def _lock_of(place: Path) -> int:
    """Make and lock a folder; returns its descriptor. Raises BlockingIOError if another process has locked it."""
    while True:
        place.mkdir(parents=True, exist_ok=True)
        lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if place.exists() and os.stat(place).st_ino == os.fstat(lock).st_ino:  # else its last owner removed it meanwhile
                return lock
        except OSError:
            os.close(lock)
            raise
        os.close(lock)


@contextmanager
def whole_file(path: Path, remedy: str) -> Iterator[Path]:
    """Yield a draft of `path` to write into. It replaces `path` when the block succeeds and is removed when it fails.

    Raises AnybitError if the disk is full or the folder is not writable; the previous file at `path` is left unchanged. Of several writers,
    the last one's file remains.
    """
    from safetensors import SafetensorError  # commands check paths before importing heavy packages

    try:
        with drafts_folder(path) as folder:
            yield folder / path.name
            (folder / path.name).replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or _words(error)
        raise AnybitError(f"{path} cannot be written: {reason}. No part of it is left behind. {remedy}") from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically: it is complete or absent, whatever ends the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        draft.write_bytes(data)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def check_place(path: Path, option: str) -> None:
    """Raise InvalidSetting if nothing can be written at `path`, the user's value of `option`. Called before long work."""
    try:
        text = os.fspath(path)
        os.fsencode(text).decode()
        if path.is_symlink() and not path.exists():
            raise InvalidSetting(f"{path} is a broken link. Choose another {option}.")
        whole = path.resolve()
        _check_length(whole, path, option)
        if Path.cwd().is_relative_to(whole):
            raise InvalidSetting(f"{path} is the current folder, or contains it. Name a new one inside: {option}={path / 'run'}.")
        above = next(folder for folder in (whole, *whole.parents) if folder.exists())
    except InvalidSetting:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or _words(error)
        raise InvalidSetting(f"{str(path)!r} cannot be written: {reason}. Choose another {option}.") from error
    if above != whole and not above.is_dir():
        raise InvalidSetting(f"{path} cannot be written: {above} is not a folder. Choose another {option}.")
    folder = above if above != whole else whole.parent
    trial = folder / f".{secrets.token_hex(8)}.anybit"
    try:
        os.mkdir(trial)  # permissions alone do not tell, as on /proc
    except OSError as error:
        raise InvalidSetting(f"{path} cannot be written: {folder} accepts no files ({error.strerror}). Choose another {option}.") from error
    finally:
        with suppress(OSError):
            os.rmdir(trial)


def _check_length(whole: Path, path: Path, option: str) -> None:
    """Raise InvalidSetting if the path, or a name in it, is longer than systems allow, with the files that will be inside."""
    longest, length = max((len(os.fsencode(part)) for part in whole.parts), default=0), len(os.fsencode(whole))
    if longest > NAME_BYTES:
        raise InvalidSetting(
            f"{str(path)[:60]!r}... has a name of {longest} bytes; at most {NAME_BYTES} are possible. Choose another {option}."
        )
    if length > PATH_BYTES:
        raise InvalidSetting(f"{str(path)[:60]!r}... is {length} bytes long; at most {PATH_BYTES} are possible. Choose another {option}.")


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
