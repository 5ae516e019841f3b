"""After a restart by torchrun, a launch finds the run that it began."""

import contextlib
import dataclasses
import itertools
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import train_ddp
from cifar.config import TrainConfig, read_config
from cifar.distributed import runtime
from cifar.errors import UserError
from cifar.files import write_json
from cifar.records.run_dir import check_unused
from cifar.resume import find_own_run
from cifar.run import Run
from tests.helpers.comparing import make_runs_tiny
from tests.helpers.processes import result

FLAGS = "--device cpu --dataset synthetic --wandb disabled --local-batch-size 20 --max-steps 2 --checkpoint-steps 1"


AGENT = "/tmp/torchelastic_91g9quuh/none_s_5_4rlf#1"  # the ID of the first run of a torchrun


def find(config, agent=AGENT, local_rank=0, others=()):
    """Return what `find_own_run` returns on a rank; `others` have found those configurations."""
    launch = SimpleNamespace(launch_id=agent, local_rank=local_rank, gather=lambda own: [*others, own])
    launch.fail_together = contextlib.nullcontext
    return find_own_run(config, launch)


def begin(name, *launchers, **config):
    """Create the files of a run of `launchers` that a restart reads."""
    run_dir = Path(name)
    run_dir.mkdir(parents=True)
    write_json(run_dir / "config.json", {"config": TrainConfig(run_dir=run_dir, **config).to_json()})
    write_json(run_dir / "launch.json", {"host": "host", "pid": 1, "launchers": list(launchers)})
    return run_dir


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_restart_finds_the_run_of_its_agent():
    begin("runs/a", "other")
    Path("runs/b").mkdir()  # no run at all
    Path("runs/file").touch()
    Path("runs/unreadable/launch.json").mkdir(parents=True)  # root may read any file, but no directory
    own = begin("runs/c", "other", AGENT, epochs=7)
    for path in (own, *own.iterdir()):
        os.utime(path, (0, 0))  # a file server's clock, or a copy, may give any time
    found = find(TrainConfig(epochs=1))
    assert found == read_config(own)
    assert (found.resume, found.epochs) == (own, 7)


@pytest.mark.parametrize("flag", ["run_dir", "resume"])
def test_restart_looks_only_into_a_named_directory(flag):
    begin("runs/a", AGENT)  # not the named one
    own = begin("elsewhere", AGENT, epochs=7)
    assert find(TrainConfig(**{flag: own})) == read_config(own)
    for other in (begin("another", "other"), Path("new")):
        named = TrainConfig(**{flag: other})
        assert find(named) is named


def test_runs_of_other_agents_are_not_continued():
    config = TrainConfig()
    assert find(config) is config  # there isn't even a runs/
    begin("runs/other", f"{AGENT}0", AGENT[:-1], AGENT.replace("#1", "#2"))
    begin("runs/no launcher")
    assert find(config) is config
    assert find(config, agent=None) is config  # not started by torchrun


def test_all_ranks_continue_the_run_that_any_host_found():
    own = begin("runs/a", AGENT)
    config = TrainConfig(data_dir=Path("/scratch"), data_url="https://me:password@host/a")
    # Only local rank zero looks; hosts that do not share rank zero's disk learn of the run from the others.
    assert find(config, local_rank=1) is config
    theirs = read_config(own)
    shutil.rmtree("runs")
    expected = dataclasses.replace(theirs, data_dir=config.data_dir, data_url=config.data_url)
    assert find(config, others=[None, theirs]) == expected


def test_own_run_that_was_killed_before_it_began_is_begun_again():
    (begin("run", AGENT) / "config.json").unlink()
    named = TrainConfig(run_dir=Path("run"))
    assert find(named) is named
    check_unused(Path("run"))


def test_damaged_own_run_is_an_error_and_not_a_new_run():
    (begin("runs/a", AGENT) / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"--resume runs/a: there is no run to continue"):
        find(TrainConfig())


def test_loop_over_seeds_goes_on_where_a_restart_interrupted_it(monkeypatch, capsys):
    make_runs_tiny(monkeypatch)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/a/none_b/attempt_0/0/error.json")
    finish, crashed = Run.finish, []

    def crash_once(run):
        if run.config.seed == 1 and not crashed:
            crashed.append(run.dir)
            raise ZeroDivisionError
        finish(run)

    def program():
        monkeypatch.setattr(runtime, "_numbers", itertools.count(1))  # as in a new process
        for seed in range(3):
            train_ddp.main([*FLAGS.split(), "--seed", str(seed)])

    monkeypatch.setattr(Run, "finish", crash_once)
    with pytest.raises(ZeroDivisionError):
        program()
    capsys.readouterr()
    program()
    runs = sorted(Path("runs").iterdir())
    assert [result(run_dir)["seed"] for run_dir in runs] == [0, 1, 2]
    assert crashed == [runs[1]]
    assert capsys.readouterr().out.startswith(f"the run in {runs[0]} has finished\n")
