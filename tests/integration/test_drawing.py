"""Charts do not depend on the user's matplotlib settings, which can even break its import."""

import sys

import pytest
from PIL import Image

from tests.helpers.processes import run
from tests.unit.test_compare import make

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("environment", "matplotlibrc"),
    [
        ({"MPLBACKEND": "module://matplotlib_inline.backend_inline"}, "figure.facecolor: black\ntext.usetex: True\n"),
        ({"MPLBACKEND": "nonsense", "MATPLOTLIBRC": "broken"}, None),
    ],
)
def test_settings_that_break_matplotlib_do_not_matter(tmp_path, environment, matplotlibrc):
    """In a new process, as matplotlib reads them when it is imported."""
    make(tmp_path, "a", [0.5])
    (tmp_path / "broken").write_bytes(b"\xff")
    if matplotlibrc is not None:
        (tmp_path / "matplotlibrc").write_text(matplotlibrc)
    code = "import cifar.records.report, cifar.compare; cifar.compare.main(['a'])"
    done = run([sys.executable, "-c", code], tmp_path, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert Image.open(tmp_path / "compare.png").convert("RGB").getpixel((0, 0)) == (255, 255, 255)
