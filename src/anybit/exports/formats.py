"""The export formats, one row per format, read without importing its writer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from anybit.errors import InvalidSetting
from anybit.files.whole import check_place
from anybit.sources.references import check_packages


@dataclass(frozen=True)
class Format:
    """An export format, and the functions that write and check it, as "module:function".

    name     as on the command line, `--name TARGET`
    target   kind of target in words: FILE or FOLDER
    accepts  whether an exported path has this format
    export   function of (run, target, model=, overwrite=, and `options`);   verify  of (run, target, model=, data=, samples=, metric=,
             workers=)
    options  option of the command line -> keyword of `export`;   without  why the format lacks the other formats' options
    table    function of `reports.terminal` that prints the result of export;   verdict  the same for verify
    cached   whether both take `cache`, which keeps the graph that they share
    packages  that it needs, from the extra `extra`;   taken  raises if a target may not be written
    """

    name: str
    target: str
    accepts: Callable[[Path], bool]
    export: str
    verify: str
    options: Mapping[str, str]
    without: str
    table: str
    verdict: str
    extra: str
    packages: tuple[str, ...] = ()
    taken: Callable[[Path, bool], None] = lambda path, overwrite: None
    cached: bool = False

    def check_installed(self) -> None:
        """Raise MissingPackage if its packages are not installed."""
        check_packages("Exported files", self.extra, *self.packages)

    def run_export(self, run: str | Path, target: str | Path, options: Mapping[str, Any], **common: Any) -> dict[str, Any]:
        """Write `run` to `target`; `options` have their names on the command line."""
        self.check_installed()
        self.taken(Path(target), common.get("overwrite", False))
        own = {self.options[name]: value for name, value in options.items() if name in self.options}
        return _function(self.export)(run, target, **own, **self._common(common))

    def run_verify(self, run: str | Path, target: str | Path, **common: Any) -> dict[str, Any]:
        """Check `target` against `run`."""
        self.check_installed()
        return _function(self.verify)(run, target, **self._common(common))

    def _common(self, common: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in common.items() if self.cached or name != "cache"}


def _function(place: str) -> Callable[..., dict[str, Any]]:
    module, name = place.split(":")
    return getattr(import_module(module), name)


def check_new_file(path: Path, overwrite: bool) -> None:
    """Raise InvalidSetting if the file exists and may not be overwritten."""
    check_place(path, "--onnx")
    if path.is_dir():
        raise InvalidSetting(f"{path} is a folder. Name a file with --onnx.")
    if path.exists() and not overwrite:
        raise InvalidSetting(f"{path} exists. Choose another --onnx, or give --overwrite.")


FORMATS = (
    Format(
        name="onnx",
        target="FILE",
        accepts=lambda path: not path.is_dir(),
        export="anybit.exports.verbs:export",
        verify="anybit.exports.verbs:verify",
        options={"tables": "tables", "weight-only": "weight_only", "data": "data"},
        without="an ONNX file always packs them",
        table="print_file",
        verdict="print_verdict",
        extra="onnx",
        packages=("onnx", "onnx_ir", "onnxruntime", "onnxscript"),
        taken=check_new_file,
        cached=True,
    ),
    Format(
        name="compressed-tensors",
        target="FOLDER",
        accepts=Path.is_dir,
        export="anybit.exports.compressed_tensors:export_folder",
        verify="anybit.exports.compressed_tensors:verify_folder",
        options={"pack-embeddings": "embeddings"},
        without="compressed-tensors folders have no such option",
        table="print_folder",
        verdict="print_folder_verdict",
        extra="compressed-tensors",
    ),
)


def chosen_format(targets: Mapping[str, Path | None], options: Mapping[str, Any]) -> tuple[Format, Path]:
    """Return the one format that has a target. Raises InvalidSetting if none or several do, or if it lacks one of `options`."""
    named = [(one, target) for one in FORMATS if (target := targets.get(one.name)) is not None]
    if len(named) != 1:
        raise InvalidSetting(f"Name what to write: {', or '.join(f'--{one.name} {one.target}' for one in FORMATS)}.")
    chosen, target = named[0]
    for other in FORMATS:
        if other is not chosen and any(options.get(name) for name in other.options):
            *names, last = (f"--{name}" for name in other.options)
            written = f"{', '.join(names)} and {last} belong" if names else f"{last} belongs"
            raise InvalidSetting(f"{written} to --{other.name}; {chosen.without}.")
    return chosen, target


def onnx_format() -> Format:
    """Return the format of ONNX files."""
    return FORMATS[0]


def format_of(exported: Path) -> Format:
    """Return the format of an exported file or folder."""
    return next(one for one in FORMATS if one.accepts(exported))
