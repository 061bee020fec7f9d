"""Generate all files of the docs in memory, to write them or to compare them with the committed ones."""

import re
from itertools import zip_longest
from pathlib import Path

from benchmarks.tables import calibrate, commands, exports, grow, texts, train_once, zoo
from benchmarks.tables.figures import figures
from benchmarks.tables.readme import readme_section
from benchmarks.tables.shared import ROOT

SECTIONS = {
    name: section for tables in (calibrate, grow, train_once, texts, exports, commands, zoo) for name, section in tables.SECTIONS.items()
}

TEMPLATES = ("results", "networks")
"""Pages of the docs with generated sections: docs/NAME.in.md becomes docs/NAME.md."""


def pages() -> dict[Path, str]:
    """Fill in tables and figures; return file, relative to the repository -> text."""
    docs, readme = Path("docs"), (ROOT / "README.md").read_text()
    filled = {docs / f"{name}.md": with_sections((ROOT / docs / f"{name}.in.md").read_text()) for name in TEMPLATES}
    filled[Path("README.md")] = with_headline(readme, readme_section())
    return filled | {docs / name: text for name, text in figures().items()}


def with_sections(template: str) -> str:
    """Replace each `<!-- NAME -->` by a section."""
    names = re.findall(r"<!-- ([A-Z]+) -->", template)
    if unknown := sorted(set(names) - set(SECTIONS)):
        raise ValueError(
            f"A page names sections that benchmarks/tables does not generate: {', '.join(unknown)}. Correct the name in docs/*.in.md."
        )
    return re.sub(r"<!-- ([A-Z]+) -->", lambda place: SECTIONS[place[1]](), template)


def with_headline(readme: str, section: str) -> str:
    """Insert the section between the README's two markers."""
    before, rest = readme.split("<!-- results -->")
    after = rest.split("<!-- /results -->")[1]
    return f"{before}<!-- results -->\n\n{section}\n\n<!-- /results -->{after}"


def first_difference(root: Path, generated: dict[Path, str]) -> str | None:
    """Name the first line in which a committed file differs from the generated one; None if all are equal."""
    for path, text in generated.items():
        committed = (root / path).read_text() if (root / path).is_file() else ""
        for number, (old, new) in enumerate(zip_longest(committed.split("\n"), text.split("\n")), 1):
            if old != new:
                return f"{path}, line {number}, differs from the JSON.\n  committed: {shown(old)}\n  from JSON: {shown(new)}"
    return None


def shown(line: str | None) -> str:
    return "(the file ends before)" if line is None else line
