"""The command line: `anybit VERB`."""

import warnings
from collections.abc import Callable
from typing import Annotated

import typer

from anybit import __version__
from anybit.cli.export import bench, export, profile, verify
from anybit.cli.help import VerbCommand, Verbs, examples_of, summary_of
from anybit.cli.options import Verb
from anybit.cli.roads import allocate, calibrate, evaluate, extract, grow, inspect, search, train
from anybit.cli.runs import cache, diff, explain, report
from anybit.cli.work import Outcome, as_command
from anybit.errors import printable

app = typer.Typer(
    cls=Verbs, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Turn a trained PyTorch network into a low-bit, mixed-precision one.",
    epilog=" $ anybit calibrate --model torchvision:resnet18 --data images/ --budget 4bit --output runs/mine",
)  # fmt: skip
TELLING = ("config", "log", "verbose", "quiet", "as_json")
VERBS: dict[Callable[..., Outcome | None], tuple[str, ...]] = {
    **dict.fromkeys((calibrate, allocate, grow, train, search, extract, evaluate), ("threads", *TELLING)),
    report: (),
    export: TELLING,
    verify: ("threads", *TELLING),
    bench: TELLING,
    profile: TELLING,
    inspect: ("threads", *TELLING),
    **dict.fromkeys((diff, explain, cache), ("as_json",)),
}
"""verb -> its common options."""
GROUPS = {
    "From a trained network": (inspect, calibrate, allocate, evaluate),
    "With training data": (grow, train, search, extract),
    "Files that run": (export, verify, bench, profile),
    "Finished runs": (report, explain, diff, cache),
}
"""Groups of verbs in `anybit --help`."""

for verb, more in VERBS.items():
    command = as_command(verb, *more)
    hidden = sum(one.rare and one.command_line for one in Verb.of(verb, *more).options.values())
    panel = next(name for name, verbs in GROUPS.items() if verb in verbs)
    app.command(cls=VerbCommand, help=summary_of(verb), epilog=examples_of(verb, hidden), rich_help_panel=panel)(command)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print anybit's version.")] = False) -> None:
    if version:
        print(f"anybit {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the `anybit` command."""
    warnings.formatwarning = lambda message, *where, **line: f"warning: {printable(' '.join(str(message).split()))}\n"
    app()
