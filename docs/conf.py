import resblocks

project = "resblocks"
author = "resblocks developers"
copyright = author
release = version = resblocks.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"resblocks {release}"

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False  # a forward is described by the Shape of its class
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "show-inheritance": True}
python_use_unqualified_type_names = True
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# Types of other packages are shown, not linked: a build reads nothing from the network. Nor are private bases, type
# variables and aliases of ours.
nitpick_ignore_regex = [("py:.*", r"(?!resblocks\.).*"), ("py:class", r"resblocks\..*\.(_\w+|T|Draws)")]
