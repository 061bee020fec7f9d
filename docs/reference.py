"""The tables of options in docs/command-line.md, from the options themselves: `python docs/reference.py`."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from anybit.cli.app import VERBS
from anybit.cli.options import SHARED, Verb
from anybit.settings import Option, options_of
from anybit.sources.preprocessing import Preprocessing

BEGIN, END = "<!-- options: written by `make reference` -->", "<!-- end of options -->"


def tables() -> str:
    """A table for each verb with options of its own, one of preprocessing, and one of what several verbs share."""
    verbs = {function.__name__: Verb.of(function, *more) for function, more in VERBS.items()}
    preprocessing = options_of(Preprocessing)
    shared = {name: [verb for verb, one in verbs.items() if _same(one.options.get(name), SHARED[name])] for name in SHARED}
    common = [dataclasses.replace(SHARED[name], doc=f"{SHARED[name].doc} ({', '.join(of)})") for name, of in shared.items()]
    parts = []
    for name, verb in verbs.items():
        own = [one for key, one in verb.options.items() if key not in preprocessing and name not in shared.get(key, ())]
        parts += [f"### {name}", _table(own)] if own else []
    of = ", ".join(f"`{name}`" for name, verb in verbs.items() if Preprocessing in verb.groups.values())
    parts += ["### Preprocessing", f"Of {of}.", _table(preprocessing.values()), "### Of several verbs", _table(common)]
    return "\n\n".join(parts)


def _same(one: Option | None, shared: Option) -> bool:
    return one is not None and one.doc == shared.doc


def _table(options: Iterable[Option]) -> str:
    rows = []
    for one in options:
        default = (
            ""
            if one.default_text in (None, "") or one.positional
            else f"`{str(one.default_text).lower() if one.kind is bool else one.default_text}`"
        )
        allowed = ", ".join(f"`{choice}`" for choice in one.choices) or one.range
        name = f"`{one.written}`" if one.command_line else f"{one.name} (Python and `--config`)"
        rows.append(f"| {name} | {default} | {allowed} | {one.doc.replace('|', chr(92) + '|')} |")
    return "\n".join(["| option | default | allowed | |", "|---|---|---|---|", *rows])


def with_tables(page: str) -> str:
    """The page with the tables as they are now."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"


PAGE = Path(__file__).parent / "command-line.md"

if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf8")), encoding="utf8")
