import inspect
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

from torch import nn

import resblocks

project = "resblocks"
author = "resblocks developers"
copyright = author
release = version = resblocks.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"resblocks {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False  # a forward is described by the Shape of its class
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 140
add_module_names = False
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

# Types of other packages are shown, not linked: a build reads nothing from the network. Nor are private bases, type
# variables and aliases of ours.
nitpick_ignore_regex = [("py:.*", r"(?!resblocks\.).*"), ("py:class", r"resblocks\..*\.(_\w+|T|Draws)")]

# Names that a signature shows instead of what they stand for; docs/api/types.md says what that is.
autodoc_type_aliases = {
    name: f"resblocks.{room}.{name}"
    for room, names in {
        "layers": ("Layer", "Family", "Stride"),
        "protocol": ("Block",),
        "stems": ("Stem",),
        "init": ("Draw",),
        "residual": ("Checkpoint", "Where"),
        "dense_plan": ("Memory",),
        "lesions": ("Part", "Evaluate"),
        "landscape": ("Direction",),
        "interop.weights": ("Source", "Publisher", "Vocabulary"),
        "interop.kernels": ("FirstConv", "Inflate"),
    }.items()
    for name in names
}

# What the reference has an entry for: by its path, and by its name where users import it from `resblocks` itself.
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("api/*.md")}
ENTRIES = {
    f"resblocks.{room}.{name}": name
    for room, page in PAGES.items()
    for name in re.findall(r"^\.\. (?:auto\w+|py:\w+):: (\w+)$", page, re.MULTILINE)
}
OF_THE_PACKAGE = {name: path for path, name in ENTRIES.items() if name in resblocks.__all__}


def link_names(app, what, name, obj, options, lines):
    """`Residual` in a docstring leads to its entry; so do `resblocks.Residual` and `resblocks.residual.Residual`."""
    room = ".".join(name.split(".")[:2])
    called = obj.__init__ if inspect.isclass(obj) else obj
    own = inspect.signature(called).parameters if inspect.isfunction(called) else ()

    def linked(found):
        text, word = found.groups()
        path = OF_THE_PACKAGE.get(word.removeprefix("resblocks."), word if word.startswith("resblocks.") else None)
        path = f"{room}.{word}" if f"{room}.{word}" in ENTRIES else path
        return found[0] if path is None or word in own or "._" in word else f":py:obj:`{text} <{path}>`"

    lines[:] = [re.sub(r"(?<![`:])`(([\w.]+)(?:\(\))?)`(?!`)", linked, line) for line in lines]


def say_fields(app, what, name, obj, options, lines):
    """What the fields of a dataclass say of themselves, as its parameters."""
    entries = fields(obj) if is_dataclass(obj) else ()
    said = [f":param {entry.name}: {entry.metadata['help']}" for entry in entries if "help" in entry.metadata]
    at = next((number for number, line in enumerate(lines) if line.startswith(":raises")), len(lines))
    lines[at:at] = said


def readable(app, what, name, obj, options, signature, returns):
    """Aliases inside other types by their names, no defaults that the domain cannot read, no `nn.Module.__init__`."""
    alias = re.compile(r"TypeAliasForwardRef\('([\w.]+)'\)")
    signature, returns = (text and alias.sub(r"~\1", text) for text in (signature, returns))
    if what == "class" and obj.__init__ is nn.Module.__init__:
        signature = "()"
    return signature and signature.replace("<factory>", "..."), returns


def setup(app):
    app.connect("autodoc-process-signature", readable)
    for process in (say_fields, link_names):
        app.connect("autodoc-process-docstring", process, priority=1000)  # when napoleon has read the sections
