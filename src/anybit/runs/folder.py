"""The run folder: a fresh draft, moved into place atomically."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from anybit.errors import AnybitError, InvalidFile, InvalidSetting, some
from anybit.files.whole import OLD, check_place, drafts_folder, is_draft
from anybit.runs.names import CHECKPOINT, DRAFT_OF_CHECKPOINT, REPORT, RUN_FILES, SCHEME, SUPERNET, SUPERNET_JSON
from anybit.sources.references import did_you_mean_path

FORMAT_VERSION = 1


def free_checkpoint(folder: Path, overwrite: bool, first: bool = True) -> Path:
    """Return the path of a training's checkpoint in `folder`, once that is free; with `overwrite` the `first` process starts again."""
    check_free(folder, overwrite, unfinished=True)
    if overwrite and first:
        (folder / CHECKPOINT).unlink(missing_ok=True)
    return folder / CHECKPOINT


@contextmanager
def new_folder(
    path: Path, overwrite: bool = False, check: Callable[[Path, bool], None] | None = None, remedy: str | None = None
) -> Iterator[Path]:
    """Yield a fresh folder to write into, moved to `path` when the block succeeds and removed when it fails.

    `check` raises if `path` is taken; the default is `check_free`.
    """
    from safetensors import SafetensorError

    check = check or check_free
    check(path, overwrite)
    try:
        with drafts_folder(path) as folder:
            draft = folder / "new"
            draft.mkdir()
            yield draft
            try:
                check(path, overwrite)
            except InvalidSetting as error:
                raise InvalidSetting(f"Another process wrote {path} meanwhile. {error}") from error
            _open_as_others(draft)
            _put_in_place(draft, path, folder / OLD)
    except (OSError, SafetensorError) as error:
        remedy = remedy or "Make room, or choose another --output; finished results are kept, and the same command continues."
        raise AnybitError(f"{path} cannot be written: {error}. Nothing is left there. {remedy}") from error


def _open_as_others(folder: Path) -> None:
    """Give the files in a folder the default permissions, since safetensors makes its files readable only by their owner."""
    example = folder.with_name("example")
    example.touch()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(example.stat().st_mode & 0o777)


def _put_in_place(draft: Path, path: Path, old: Path) -> None:
    """Move the draft to `path`; an old run is removed only once the new one is in its place, and restored otherwise."""
    try:
        if path.exists():
            path.rename(old)
        draft.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)


def is_run(path: Path) -> bool:
    """Return whether the folder contains only files that anybit writes: a run, or several with their common report."""
    if not path.is_dir() or path.is_symlink():
        return False
    items = list(path.iterdir())
    known = all(item.name in RUN_FILES if item.is_file() else _is_left_draft(item) or is_run(item) for item in items)
    return known and any(item.name == "report.json" for item in items)


def _is_left_draft(path: Path) -> bool:
    """Return whether a killed process left `path`, or another is writing it: a draft of a run's file."""
    return path.is_dir() and any(is_draft(path.name, name) for name in RUN_FILES)


def runs_in(path: Path) -> list[Path]:
    """Return the run folders inside one that holds several; none if `path` is a run itself."""
    return [] if (path / "scheme.json").is_file() else sorted(child.parent for child in path.glob("*/scheme.json"))


def check_folder(path: Path) -> None:
    """Raise InvalidFile if `path` is not a folder written by anybit."""
    if not path.exists() and ":" in path.name:
        raise InvalidFile(f"{path} is not there. Name a run folder; `calibrate` and `evaluate` take a network, as --model={path}.")
    if not path.exists():
        raise InvalidFile(f"{path} is not there.{did_you_mean_path(path)}")
    if not path.is_dir():
        raise InvalidFile(f"{path} is a file. Name the folder of a run.")
    if not any((path / name).is_file() for name in (SCHEME, SUPERNET_JSON, REPORT)) and not runs_in(path):
        raise InvalidFile(f"{path} is not a run folder: it has neither {SCHEME} nor {SUPERNET_JSON}.")


def check_one(path: Path) -> None:
    """Raise InvalidFile if `path` is not a folder written by anybit, or contains several runs."""
    check_folder(path)
    if several := runs_in(path):
        raise InvalidFile(f"{path} holds several runs: {', '.join(run.name for run in several)}. Name one of them: {several[0]}.")


def check_run(path: Path) -> None:
    """Raise InvalidFile unless `path` holds exactly one run."""
    check_one(path)
    if not (path / SCHEME).is_file() and (path / SUPERNET).is_file():
        raise InvalidFile(
            f"{path} holds a supernet, which has no scheme of its own. Extract a subnet: `anybit extract {path} --budget=3bit`."
        )


def check_supernet(path: Path) -> None:
    """Raise InvalidFile if `path` holds no supernet."""
    check_folder(path)
    if not (path / SUPERNET_JSON).is_file():
        raise InvalidFile(f"{path} is a run, not a supernet: it has no {SUPERNET_JSON}. Train one with `anybit train`.")


def _taken(path: Path) -> str:
    """Say what a place holds that is no run folder, and what to do."""
    names = {item.name for item in path.iterdir()} if path.is_dir() else set()
    state = "an unfinished training" if CHECKPOINT in names else "a run" if REPORT in names else ""
    others = sorted(names - RUN_FILES - {CHECKPOINT, DRAFT_OF_CHECKPOINT})
    if state and others:
        return f"holds {state} and other files ({some(others)}). Move these away, or choose another --output."
    return "exists and is not a run folder of anybit, or holds other files. Choose another --output."


def check_free(path: Path, overwrite: bool = False, unfinished: bool = False) -> None:
    """Raise InvalidSetting if `path` is taken: by a run that may not be overwritten, or by anything else.

    An interrupted training leaves only its checkpoint there, which is free for the training that continues it (`unfinished`).
    """
    check_place(path, "--output")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if path.is_dir() and all(item.name in (CHECKPOINT, DRAFT_OF_CHECKPOINT) or _is_left_draft(item) for item in path.iterdir()):
        if unfinished or overwrite:
            return
        raise InvalidSetting(f"{path} holds an unfinished training. Continue it with the same verb, or give --overwrite.")
    if path.is_symlink():
        raise InvalidSetting(f"{path} is a symbolic link to {path.resolve()}. Name that place itself with --output.")
    if not is_run(path):
        raise InvalidSetting(f"{path} {_taken(path)}")
    if not overwrite:
        raise InvalidSetting(f"{path} holds a finished run. Choose another --output, or give --overwrite.")
