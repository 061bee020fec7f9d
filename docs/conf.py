"""Sphinx's settings of the documentation: `make docs` executes every notebook page and treats warnings as errors."""

import sys
from pathlib import Path

import anybit

sys.path.insert(0, str(Path(__file__).parent))
project, author, copyright = "anybit", "The anybit authors", "The anybit authors"  # noqa: A001
release = version = anybit.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc"]
exclude_patterns = ["jupyter_execute", "_build", "*.in.md"]
html_theme = "furo"
html_title = "anybit"
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
suppress_warnings = ["myst.header", "myst.xref_missing", "misc.highlighting_failure"]
"""Links into the repository, such as ../CONTRIBUTING.md, are not pages of the site; tests/test_docs.py checks them."""
nb_execution_mode = "auto"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_excludepatterns = ["command-line.md", "design.md", "results.md", "networks.md", "reliability.md"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"


def plain(app, what, name, obj, options, lines):
    """Show what follows a docstring's first paragraph as it is written: it aligns names with their meaning."""
    end = lines.index("") if "" in lines else len(lines)
    first = [line.replace("`", "``").replace("*", "\\*") for line in lines[:end]]
    rest = lines[end + 1 :]
    lines[:] = [*first, ""] + (["::", "", *(f"    {line}" for line in rest), ""] if any(line.strip() for line in rest) else [])


def setup(app):
    app.connect("autodoc-process-docstring", plain)
