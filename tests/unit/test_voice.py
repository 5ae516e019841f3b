"""How the program ends: one line, once, and a status that says which way."""

import sys

import pytest

from cifar.cli import exit_on_error
from cifar.errors import StoppedError, TrainingDivergedError, UserError
from tests.helpers.processes import run


@pytest.mark.parametrize(("error", "status"), [(UserError("oh"), 2), (TrainingDivergedError("no"), 1)])
def test_a_mistake_is_one_line_and_a_status(error, status, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as done, exit_on_error("prog"):
        raise error
    assert done.value.code == status
    assert capsys.readouterr().err == f"prog: error: {error}\n"


def test_other_ranks_leave_the_line_to_rank_zero_and_give_it_time(capsys, monkeypatch):
    waits = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("time.sleep", waits.append)
    with pytest.raises(SystemExit) as done, exit_on_error("prog"):
        raise UserError("oh")
    assert done.value.code == 2
    assert capsys.readouterr().err == ""
    assert waits, "a launcher ends rank zero as soon as another rank has left"


def test_a_program_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), exit_on_error("prog"):
        print(1 / 0)


def test_a_stop_is_no_mistake(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as done, exit_on_error("prog"):
        raise StoppedError("Stopped by SIGTERM", 143)
    assert done.value.code == 143
    assert capsys.readouterr() == ("Stopped by SIGTERM\n", "")


def test_an_interruption_before_training_leaves_no_traceback(capsys):
    with pytest.raises(SystemExit) as done, exit_on_error("prog"):
        raise KeyboardInterrupt
    assert done.value.code == 130
    assert capsys.readouterr() == ("", "")


LOST = [
    "[../gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:39657. This is typically caused by",
    "[../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete",
]


def test_a_lost_process_is_one_line_of_rank_zeros(tmp_path):
    script = "import sys\nfrom cifar.cli import exit_on_error\nwith exit_on_error('prog'):\n    raise RuntimeError(sys.argv[1])"
    for text, reason in zip(LOST, ("Connection closed by peer", "Timed out waiting 5000ms"), strict=True):
        done = run([sys.executable, "-c", script, text], tmp_path, RANK="0")
        assert done.returncode == 1
        assert done.stderr == (
            f"prog: error: another process of this run is gone or doesn't answer ({reason}); the launcher's report "
            f"says which\n"
        )
    silent = run([sys.executable, "-c", script, LOST[0]], tmp_path, RANK="1")
    assert (silent.returncode, silent.stderr) == (1, "")
    for text, environment in (("shapes differ", {"RANK": "0"}), (LOST[0], {})):
        assert "Traceback" in run([sys.executable, "-c", script, text], tmp_path, **environment).stderr
