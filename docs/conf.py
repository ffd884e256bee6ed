"""Sphinx configuration of the documentation: `make docs` builds it into docs/_build. It needs no network."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = "DiaBlo"
author = "the authors of diablo-peft"
copyright = "the authors of diablo-peft, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "DiaBlo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_sphinx = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_class_signature = "separated"
autodoc_inherit_docstrings = False
autodoc_default_options: dict[str, Any] = {"exclude-members": "__init__, __new__"}
napoleon_numpy_docstring = False
default_role = "code"


def plain_markup(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Read two habits of transformers' docstrings: [`Name`] for a link, and an example below `Example:`."""
    lines[:] = [re.sub(r"\[(`[^`]+`)\]", r"\1", line) for line in lines]
    lines[:] = ["Example::" if line == "Example:" else line for line in lines]


def link_to_the_answers(app: Any, name: str, source: list[str]) -> None:
    """Let the registration link to the page of these docs instead of the file it names."""
    if name == "evidence":
        source[0] = source[0].replace("(../results/evidence/evidence.md)", "(evidence_answers.md)")


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", plain_markup, priority=400)  # before napoleon
    app.connect("source-read", link_to_the_answers)
