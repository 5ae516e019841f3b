"""The first losses of the recipes that train on a CPU in seconds, bit for bit; tests/integration has the others."""

import sys
from types import SimpleNamespace

import pytest

from tests.helpers.golden_losses import assert_golden, losses_of, train_case


@pytest.mark.parametrize("name", ["tutorial", "wide", "net-fast"])
def test_golden_losses(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cifar.report", SimpleNamespace(write_report=lambda *_: None))
    train_case(name, tmp_path / "run")
    assert_golden(name, 1, losses_of(tmp_path / "run"))
