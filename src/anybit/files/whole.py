"""Write a file whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from anybit.errors import AnybitError
from anybit.files.strict import in_words


@contextmanager
def whole_file(path: Path, remedy: str) -> Iterator[Path]:
    """Yield a draft beside `path` to write into. It replaces `path` when the block succeeds and is removed when it fails.

    Raises AnybitError where the disk is full or the folder is not to be written to; what was at `path` before is there still.
    """
    draft = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.unlink(missing_ok=True)  # never through a link
        try:
            yield draft
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or in_words(error)
        raise AnybitError(f"{path} cannot be written: {reason}. Nothing of it is left behind. {remedy}") from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, whatever ends the process meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_bytes(data)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
