"""After a restart by torchrun, a launch finds the run that it began."""

import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cifar.config import TrainConfig, read_config
from cifar.files import write_json
from cifar.resume import find_own_run


def launched(agent, local_rank=0, others=()):
    """Return the parts of a runtime that `find_own_run` uses."""
    return SimpleNamespace(
        launch=SimpleNamespace(agent=lambda: agent), local_rank=local_rank, gather=lambda own: [*others, own]
    )


@pytest.fixture
def agent():
    """The ID of a torchrun agent that has just started."""
    return f"host:1234:{time.time():.2f}"


def begin(run_dir, *launchers, **config):
    """Create the files of a run of `launchers` that a restart reads."""
    run_dir.mkdir(parents=True)
    write_json(run_dir / "config.json", {"config": TrainConfig(run_dir=run_dir, **config).to_json()})
    write_json(run_dir / "launch.json", {"host": "host", "pid": 1, "launchers": list(launchers)})
    return run_dir


def test_restart_finds_the_run_of_its_agent(tmp_path, monkeypatch, agent):
    monkeypatch.chdir(tmp_path)
    begin(Path("runs/a"), "other:1234:5.00")
    Path("runs/b").mkdir()  # no run at all
    Path("runs/file").touch()
    own = begin(Path("runs/c"), "other:1:5.00", agent, epochs=7)
    found = find_own_run(TrainConfig(epochs=1), launched(agent))
    assert found == read_config(own)
    assert (found.resume, found.epochs) == (own, 7)


@pytest.mark.parametrize("flag", ["run_dir", "resume"])
def test_restart_looks_only_into_a_named_directory(tmp_path, monkeypatch, agent, flag):
    monkeypatch.chdir(tmp_path)
    begin(Path("runs/a"), agent)  # not the named one
    own = begin(tmp_path / "elsewhere", agent, epochs=7)
    named = TrainConfig(**{flag: own})
    assert find_own_run(named, launched(agent)) == read_config(own)
    another = begin(tmp_path / "another", "host:99:5.00")
    named = TrainConfig(**{flag: another})
    assert find_own_run(named, launched(agent)) is named
    named = TrainConfig(**{flag: tmp_path / "new"})
    assert find_own_run(named, launched(agent)) is named


def test_runs_of_other_agents_are_not_continued(tmp_path, monkeypatch, agent):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig()
    assert find_own_run(config, launched(agent)) is config  # there isn't even a runs/
    host, pid, started = agent.split(":")
    same_pid_earlier = f"{host}:{pid}:{float(started) - 60:.2f}"
    for number, other in enumerate((same_pid_earlier, f"other:{pid}:{started}", f"{host}:99:{started}")):
        begin(Path(f"runs/{number}"), other)
    begin(Path("runs/no launcher"))
    assert find_own_run(config, launched(agent)) is config
    assert find_own_run(config, launched(None)) is config  # not started by torchrun


def test_all_ranks_continue_the_run_that_any_host_found(tmp_path, monkeypatch, agent):
    monkeypatch.chdir(tmp_path)
    own = begin(Path("runs/a"), agent)
    config = TrainConfig()
    # Only local rank zero looks; hosts that do not share rank zero's disk learn of the run from the others.
    assert find_own_run(config, launched(agent, local_rank=1)) is config
    theirs = read_config(own)
    shutil.rmtree("runs")
    assert find_own_run(config, launched(agent, others=[None, theirs])) is theirs
