"""Matplotlib with its default settings: whatever the user's are, charts look the same and can be drawn."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from accelerate.utils import patch_environment

# Importing matplotlib fails if MPLBACKEND names a backend that it cannot find, such as a notebook's, or if a
# matplotlibrc is not text. (One in the current directory is read nevertheless.) Others import matplotlib from here.
with patch_environment(MPLBACKEND="agg", MATPLOTLIBRC=os.devnull):
    import matplotlib
    from matplotlib.axes import Axes as Axes
    from matplotlib.colors import LinearSegmentedColormap as LinearSegmentedColormap
    from matplotlib.figure import Figure as Figure  # no pyplot: nothing here needs a window or global state
    from matplotlib.font_manager import FontProperties, findfont, get_font, get_font_names
    from matplotlib.ticker import EngFormatter as EngFormatter
    from matplotlib.ticker import LogLocator as LogLocator

logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # not of fonts without a normal weight

# Fonts for what matplotlib's own, DejaVu Sans, lacks, such as Chinese names of classes: of Debian, Windows and macOS.
_FALLBACK_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic"),
    *("PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Arial Unicode MS"),
)


@contextlib.contextmanager
def default_style(changes: Any = ()) -> Iterator[None]:
    """Draw with matplotlib's own defaults and these `changes`, by name; then restore the user's settings."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as boxes
        matplotlib.rcdefaults()
        matplotlib.rcParams["text.parse_math"] = False  # names of runs and classes may contain dollar signs
        installed = set(get_font_names())
        matplotlib.rcParams["font.family"] = ["sans-serif", *(name for name in _FALLBACK_FONTS if name in installed)]
        matplotlib.rcParams.update(changes)
        yield


def drawable(classes: Sequence[str]) -> tuple[str, ...]:
    """Return the names of classes, or "class 3" for the label 3 if no font of `default_style` has the characters."""
    fonts = [get_font(findfont(FontProperties(family=[family]))) for family in matplotlib.rcParams["font.family"]]
    names = []
    for label, name in enumerate(classes):
        has_all = all(any(font.get_char_index(ord(character)) for font in fonts) for character in name)
        names.append(name if has_all else f"class {label}")
    return tuple(names)
