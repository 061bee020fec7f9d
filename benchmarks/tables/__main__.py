"""Write docs/results.md and docs/networks.md, their figures and the README's results block from the JSON in benchmarks/results.

python -m benchmarks.tables            write them
python -m benchmarks.tables --check    write nothing; fail at the first difference from the committed files, and name it
"""

import argparse
import sys

from benchmarks.tables.pages import first_difference, pages
from benchmarks.tables.shared import ROOT


def main() -> None:
    """Write the files, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed files and write nothing")
    arguments = parser.parse_args()
    generated = pages()
    if not arguments.check:
        for path, text in generated.items():
            (ROOT / path).write_text(text)
    elif difference := first_difference(ROOT, generated):
        sys.exit(f"{difference}\nEdit the page's .in.md or run the study again, then `make tables`; numbers are not edited by hand.")


if __name__ == "__main__":
    main()
