"""Settings of the documentation: `sphinx-build -W docs build/site` builds it, warnings being errors."""

import os
import sys
from pathlib import Path

from moefast import __version__

# Notebooks call the command that was installed beside this interpreter.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"

project = "moefast"
author = "the developers of moefast"
copyright = "the developers of moefast, BSD 3-clause"
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_click",
    "sphinx_copybutton",
]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4

# Notebooks are Markdown files that are run whenever the site is built; a cell that fails ends the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_execution_in_temp = True
nb_merge_streams = True

# Copying a block of the command line must not copy what it answered.
copybutton_exclude = ".linenos, .gp, .go"

autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_param = False
napoleon_use_rtype = False

exclude_patterns = ["**/.ipynb_checkpoints"]
html_theme = "furo"
html_title = "moefast"
html_show_sphinx = False
