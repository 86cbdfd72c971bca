"""Sphinx: the documentation is Markdown, one page a task. Build: sphinx-build -W docs docs/_build."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for the generated reference

from fastvid.version import __version__

project = "fastvid"
author = "the fastvid authors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"fastvid {release}"
exclude_patterns = ["_build"]
nitpicky = False
autodoc_typehints = "signature"
suppress_warnings = ["myst.xref_missing"] if False else []
