"""Matplotlib with its default settings: whatever the user's are, charts look the same and can be drawn."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from accelerate.utils import patch_environment

# Importing matplotlib fails if MPLBACKEND names a backend that it cannot find, such as a notebook's, or if a
# matplotlibrc is not text. (One in the current directory is read nevertheless.) Others import matplotlib from here.
with patch_environment(MPLBACKEND="agg", MATPLOTLIBRC=os.devnull):
    import matplotlib
    from matplotlib.axes import Axes as Axes
    from matplotlib.colors import LinearSegmentedColormap as LinearSegmentedColormap
    from matplotlib.figure import Figure as Figure  # no pyplot: nothing here needs a window or global state
    from matplotlib.ticker import EngFormatter as EngFormatter


@contextlib.contextmanager
def default_style(changes: Any = ()) -> Iterator[None]:
    """Draw with matplotlib's own defaults and these `changes`, by name; then restore the user's settings."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["text.parse_math"] = False  # names of runs and classes may contain dollar signs
        matplotlib.rcParams.update(changes)
        yield
