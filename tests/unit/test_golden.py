"""The first losses of the recipes that train on a CPU in seconds, bit for bit; tests/integration has the others."""

import pytest

from tests.helpers.comparing import write_no_report
from tests.helpers.golden_losses import assert_golden, losses_of, train_case


@pytest.mark.parametrize("name", ["tutorial", "wide", "net-fast"])
def test_golden_losses(name, tmp_path, monkeypatch):
    write_no_report(monkeypatch)
    train_case(name, tmp_path / "run")
    assert_golden(name, 1, losses_of(tmp_path / "run"))
