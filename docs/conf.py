"""Sphinx: Markdown pages, one a task. Build: python -m sphinx -W --keep-going -b html docs docs/_build."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))  # for reference.py

import reference

from fastvid.version import __version__

project = "fastvid"
author = "the fastvid authors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"fastvid {release}"
exclude_patterns = ["_build", "_generated", "benchmarks.md"]  # the last: tables that benchmarks/report.py draws
smartquotes = False  # flags have two dashes
html_show_copyright = False
autodoc_typehints = "none"  # the table of arguments has them
autodoc_member_order = "bysource"


def files_of_the_repository(app: Sphinx, page: str, source: list[str]) -> None:
    """Links to files outside of docs/ become downloads; on GitHub they work as they are."""
    source[0] = re.sub(r"\]\((\.\./[^)#\s]+)\)", r"](<path:\1>)", source[0])


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", reference.write)
    app.connect("source-read", files_of_the_repository)
