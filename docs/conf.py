"""The manual: ``make docs`` builds it into docs/build/, without a network."""

import re
from pathlib import Path

from latex2mathml.converter import convert

HERE = Path(__file__).parent
NOTEBOOKS = HERE / "notebooks"

project = "minGPT prefix-tuning"
author = "the minGPT prefix-tuning sandbox"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "sphinx_copybutton",
]
exclude_patterns = ["build"]
templates_path = ["_templates"]

html_theme = "furo"
html_title = project
html_show_sphinx = False
html_show_copyright = False
smartquotes = False  # they would change the dashes and quotes of commands
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are shown as they were run; make notebooks runs them
suppress_warnings = ["mystnb.unknown_mime_type"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "ignore-module-all": True}
napoleon_custom_sections = [("Keys", "params_style")]
napoleon_use_ivar = True
html_math_renderer = "mathml"


def copy_notebooks() -> None:
    """Sphinx reads only what is in this folder; links from a notebook to a page of the manual are those of the copy."""
    NOTEBOOKS.mkdir(exist_ok=True)
    for notebook in (HERE.parent / "notebooks").glob("*.ipynb"):
        content = re.sub(r"\]\(\.\./docs/", "](/", notebook.read_text(encoding="utf-8"))
        target = NOTEBOOKS / notebook.name
        if not target.exists() or target.read_text(encoding="utf-8") != content:
            target.write_text(content, encoding="utf-8")


def link_notebooks(app, docname, source) -> None:
    """A page links to the repository's notebooks, so that GitHub finds them; in the manual to their copies."""
    source[0] = re.sub(r"\]\((?:\.\./)+notebooks/", "](/notebooks/", source[0])


def visit_math(translator, node) -> None:
    """MathML, which browsers show without a script or a font of ours."""
    from docutils.nodes import SkipNode, math_block

    display = "block" if isinstance(node, math_block) else "inline"
    translator.body.append(convert(node.astext(), display=display))
    raise SkipNode


def keep_colon(app, what, name, obj, options, lines) -> None:
    """Napoleon takes what stands before the first colon of an attribute's docstring for its type."""
    if what in ("attribute", "data", "property") and lines:
        lines[:] = "\n".join(lines).replace(": ", " \N{EN DASH} ", 1).split("\n")


def setup(app) -> None:
    copy_notebooks()
    app.connect("source-read", link_notebooks)
    app.connect("autodoc-process-docstring", keep_colon, priority=100)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
