import re

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


def in_rooms(rooms):
    return {name: f"resblocks.{room}.{name}" for room, names in rooms.items() for name in names}


# Names that a signature shows instead of what they stand for; docs/api/types.md says what that is.
autodoc_type_aliases = in_rooms(
    {
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
    }
)

# Names that docstrings use, with their places; families of layers do not know where they were made.
PLACES = {name: f"{getattr(getattr(resblocks, name), '__module__', '')}.{name}" for name in resblocks.__all__}
PLACES |= in_rooms(
    {
        "layers": ("instance_norm", "weight_standardised", "average_downsample", "blur_downsample"),
        "attention": ("cbam",),
        "joins": ("gated",),
        "options": ("Layers", "BlockLayers"),
    }
)


def link_names(app, what, name, obj, options, lines):
    """`Residual` in a docstring leads to it, and so do `resblocks.Residual` and `resblocks.residual.Residual`."""
    for number, line in enumerate(lines):
        lines[number] = re.sub(r"(?<![`:])`((resblocks\.(?!_))?([\w.]+)(?:\(\))?)`(?!`)", as_link, line)


def as_link(found):
    text, prefix, name = found.groups()
    if name in PLACES:
        return f":py:obj:`{text} <{PLACES[name]}>`"
    return f":py:obj:`{text}`" if prefix else found[0]


def readable(app, what, name, obj, options, signature, returns):
    """Aliases inside other types by their names, and no defaults that the domain cannot read."""
    alias = re.compile(r"TypeAliasForwardRef\('([\w.]+)'\)")
    signature, returns = (text and alias.sub(r"~\1", text) for text in (signature, returns))
    return signature and signature.replace("<factory>", "..."), returns


def setup(app):
    app.connect("autodoc-process-signature", readable)
    app.connect("autodoc-process-docstring", link_names, priority=1000)  # when napoleon has read the sections
