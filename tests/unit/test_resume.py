"""Continuing a run: from any step to the same numbers; what has changed is said, what can't go on is refused."""

import dataclasses
import json
import re
import shutil
import signal

import pytest

import train_ddp
from cifar import evaluation
from cifar.checkpoint import checkpoint_path, checkpoints, load_checkpoint, newest_checkpoint, save_checkpoint
from cifar.errors import StoppedError, UserError
from tests.helpers.comparing import numbers, same, tiny_data, traces, wait_for_checkpoints
from tests.helpers.processes import records, result

# Ten steps an epoch, with augmentation, a schedule and accumulation; log points after 3, 6, 9 and 10 of them.
RUN = ["--device", "cpu", "--wandb", "disabled", "--recipe", "wide", "--model", "net", "--local-batch-size", "10",
       "--global-batch-size", "20", "--epochs", "2", "--log-steps", "3", "--checkpoint-steps", "4",
       "--keep-checkpoints", "30"]  # fmt: skip
LAST = 20


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    shrink(monkeypatch)


def shrink(monkeypatch):
    monkeypatch.setattr("cifar.data.load_data", lambda *_: tiny_data())
    monkeypatch.setattr("cifar.report.draw_report", lambda *_: None)  # most of the time of so small a run
    wait_for_checkpoints(monkeypatch)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that nothing has stopped."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patched:
        shrink(patched)
        train_ddp.main([*RUN, "--run-dir", str(folder)])
    return folder


@pytest.fixture
def folder(undisturbed, tmp_path):
    """A copy of the finished run, to be disturbed."""
    return shutil.copytree(undisturbed, tmp_path / "run")


def killed(folder, after):
    """Make of a finished run one whose process was killed before the checkpoint after that of step `after`."""
    for step, path in checkpoints(folder).items():
        if step > after:
            path.unlink()
    (folder / "result.json").unlink()
    return folder


def resume(folder, *flags):
    train_ddp.main(["--resume", str(folder), *map(str, flags)])


def assert_as_undisturbed(folder, undisturbed):
    mine, theirs = (load_checkpoint(checkpoint_path(run, LAST))["state"] for run in (folder, undisturbed))
    for part in theirs:
        assert same({part: mine[part]}, {part: theirs[part]}), f"{part} differs"
    assert numbers(folder) == numbers(undisturbed)
    mine, theirs = result(folder), result(undisturbed)
    clock = {"train_seconds", "images_per_second", "checkpoint_seconds"}
    assert {k: v for k, v in mine.items() if k not in clock} == {k: v for k, v in theirs.items() if k not in clock}


@pytest.fixture
def stop_after(monkeypatch):
    """A function: the runs to come are asked to stop after so many steps of their own."""

    def ask(count):
        class Asked:
            def __init__(self, runtime, request):
                self.request, self.steps = request, 0

            def after_step(self):
                self.steps += 1
                if self.steps == count:
                    self.request.name = "SIGTERM"
                return self.steps == count

        monkeypatch.setattr("cifar.run.StopAgreement", Asked)

    return ask


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(2, id="before any log point or checkpoint"),
        pytest.param(3, id="at a log point"),
        pytest.param(4, id="at a checkpoint"),
        pytest.param(10, id="at the end of an epoch"),
        pytest.param(17, id="within a log window of the second epoch"),
    ],
)
def test_a_run_that_is_stopped_and_resumed_is_as_if_undisturbed(undisturbed, tmp_path, stop_after, step):
    folder = tmp_path / "run"
    stop_after(step)
    with pytest.raises(StoppedError) as stopped:
        train_ddp.main([*RUN, "--run-dir", str(folder)])
    assert str(stopped.value) == f"Stopped by SIGTERM after step {step} of {LAST}; to go on: --resume {folder}"
    assert stopped.value.status == 128 + signal.SIGTERM
    assert max(checkpoints(folder)) == step
    assert not (folder / "result.json").exists()

    stop_after(None)
    resume(folder)
    assert_as_undisturbed(folder, undisturbed)


def test_a_run_that_is_stopped_after_every_single_step_is_as_if_undisturbed(undisturbed, tmp_path, stop_after):
    folder = tmp_path / "run"
    stop_after(1)
    with pytest.raises(StoppedError):
        train_ddp.main([*RUN, "--run-dir", str(folder)])
    for step in range(2, LAST):
        with pytest.raises(StoppedError, match=f"after step {step} of {LAST};"):
            resume(folder)
        assert max(checkpoints(folder)) == step
    resume(folder)  # asked to stop after the last step, a run has simply finished
    assert_as_undisturbed(folder, undisturbed)


def test_a_run_that_is_asked_to_stop_after_its_last_step_has_finished(undisturbed, tmp_path, stop_after, capsys):
    folder = tmp_path / "run"
    stop_after(LAST)
    train_ddp.main([*RUN, "--run-dir", str(folder)])
    assert "Finished Training" in capsys.readouterr().out
    assert_as_undisturbed(folder, undisturbed)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(undisturbed, folder, capsys):
    killed(folder, after=0)
    records_of_a_kill = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)[:2]
    (folder / "metrics.jsonl").write_text("".join(records_of_a_kill)[:-20])
    (folder / "checkpoints" / ".step-00000004.pt.123.tmp").write_bytes(b"half")
    resume(folder)
    assert "resumes     from the start, as no checkpoint had been written" in capsys.readouterr().out.splitlines()
    assert_as_undisturbed(folder, undisturbed)
    assert [path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")] == []


def test_a_run_that_was_killed_between_two_checkpoints_goes_on_from_the_first(undisturbed, folder, capsys):
    killed(folder, after=12)
    resume(folder)
    assert f"resumes     after step 12 of {LAST}" in capsys.readouterr().out.splitlines()
    assert_as_undisturbed(folder, undisturbed)


def test_a_run_that_was_killed_before_its_result_gets_it(undisturbed, folder):
    (folder / "result.json").unlink()
    resume(folder)
    assert_as_undisturbed(folder, undisturbed)
    steps = [step for step, _ in records(folder, "train/loss")]
    assert steps == sorted(set(steps))


def test_what_has_changed_since_the_last_start_is_said_and_recorded(folder, capsys):
    killed(folder, after=12)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"world_size": 2}))
    resume(folder, "--epochs", 3, "--log-steps", 5)
    said = capsys.readouterr().out.splitlines()
    (line,) = [line for line in said if line.startswith("changed")]
    assert sorted(line.removeprefix("changed").strip().split(", ")) == [
        "--epochs 2 -> 3", "--log-steps 3 -> 5", "world size 2 -> 1",
    ]  # fmt: skip
    assert result(folder)["steps"] == 30

    killed(folder, after=20)
    resume(folder)
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed")]
    assert result(folder)["steps"] == 30


def test_a_run_of_other_processes_goes_on_with_the_same_numbers(undisturbed, folder):
    """One process takes over what two had: as many micro-batches a step, whose losses were two sums."""
    killed(folder, after=8)
    path = checkpoint_path(folder, 8)
    saved = load_checkpoint(path)
    (window,) = saved["state"]["window_loss"]
    assert window > 0  # step 8 is within a log window
    save_checkpoint(path, saved | {"state": saved["state"] | {"window_loss": [window, 0.0], "accumulation": 1}})
    resume(folder)
    assert_as_undisturbed(folder, undisturbed)


@pytest.mark.parametrize("local", [5, 20])
def test_a_run_with_other_micro_batches_goes_on_with_the_same_losses(undisturbed, folder, capsys, local):
    killed(folder, after=8)
    resume(folder, "--local-batch-size", local)
    assert f"changed     --local-batch-size 10 -> {local}" in capsys.readouterr().out.splitlines()
    theirs = records(undisturbed, "train/loss")
    assert records(folder, "train/loss") == [(step, pytest.approx(loss, rel=1e-3)) for step, loss in theirs]


def test_the_best_checkpoint_stays_when_accuracy_falls_over_a_resume_too(tmp_path, monkeypatch):
    right, evaluate = iter([50, 120, 60, 40, 50, 110]), evaluation.evaluate

    def evaluate_falsely(*arguments):
        test = evaluate(*arguments)
        predicted = test.labels.clone()
        predicted[next(right) :] += 1
        return dataclasses.replace(test, predicted=predicted % 10)

    monkeypatch.setattr("cifar.evaluation.evaluate", evaluate_falsely)
    folder = tmp_path / "run"
    train_ddp.main([*RUN, "--run-dir", str(folder), "--epochs", "4", "--keep-checkpoints", "2"])
    assert sorted(checkpoints(folder)) == [20, 36, 40]
    resume(folder, "--epochs", 6)
    assert sorted(checkpoints(folder)) == [20, 56, 60]
    assert (result(folder)["best_step"], result(folder)["best_accuracy"]) == (20, 0.6)
    assert result(folder)["test_accuracy"] == 0.55


def refused(folder, *flags):
    """What the program says of a run that it can't resume."""
    before = traces(folder)
    with pytest.raises(UserError) as mistake:
        resume(folder, *flags)
    assert mistake.value.status == 2
    assert "\n" not in str(mistake.value)
    assert traces(folder) == before
    return str(mistake.value)


def edit(folder, **changes):
    """Change the configuration that the run has recorded."""
    facts = json.loads((folder / "config.json").read_text())
    facts["config"] |= changes
    (folder / "config.json").write_text(json.dumps(facts))


def test_what_is_no_run_is_not_resumed(tmp_path):
    assert "no run is there to continue" in refused(tmp_path)
    assert "no run is there to continue" in refused(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_resumed_with_another_net(folder):
    said = refused(folder, "--model", "net-wide")
    assert re.search(r"--model net-wide contradicts net of the run in .*/run: leave it out", said)


@pytest.mark.parametrize("changes", [{"lr": 0.5}, {"seed": 3}, {"model": "net-wide"}, {"schedule": "constant"}])
def test_a_run_whose_configuration_contradicts_its_checkpoint_is_not_resumed(folder, changes):
    killed(folder, after=12)
    (name,) = changes
    own = json.loads((folder / "config.json").read_text())["config"][name]
    edit(folder, **changes)
    said = refused(folder)
    assert f"its config.json says --{name} {changes[name]}, and its checkpoint step-00000012.pt was trained" in said
    assert f"with {own}: put {own} back" in said


@pytest.mark.parametrize("lacking", ["dataset", "world_size"])
def test_a_run_whose_configuration_is_incomplete_is_not_resumed(folder, lacking):
    facts = json.loads((folder / "config.json").read_text())
    del facts[lacking]
    (folder / "config.json").write_text(json.dumps(facts))
    assert "config.json" in refused(killed(folder, after=12))


@pytest.mark.parametrize("changes", [{"lr": "0.05"}, {"epochs": None}])
def test_a_run_whose_configuration_makes_no_sense_is_not_resumed(folder, changes):
    edit(killed(folder, after=12), **changes)
    assert "config.json" in refused(folder)


def test_a_finished_run_is_not_resumed(folder):
    said = refused(folder)
    assert f"that run has finished, with step {LAST} of {LAST}; more --epochs or --max-steps would continue it" in said


def test_a_finished_run_whose_checkpoints_were_removed_does_not_begin_again(folder):
    for path in checkpoints(folder).values():
        path.unlink()
    assert "finished" in refused(folder)


def test_records_that_make_no_sense_do_not_keep_a_run_from_going_on(undisturbed, folder):
    killed(folder, after=12)
    for name in ("result.json", "launch.json"):
        (folder / name).write_text("[]")
    resume(folder)
    assert_as_undisturbed(folder, undisturbed)


def test_a_run_with_only_damaged_checkpoints_is_not_resumed(folder):
    for path in checkpoints(killed(folder, after=12)).values():
        path.write_bytes(path.read_bytes()[:-1])
    said = refused(folder)
    assert "no good checkpoint is there" in said
    for step in (4, 8, 10, 12):
        assert checkpoint_path(folder, step).name in said


def test_a_run_is_not_resumed_with_other_data(folder, monkeypatch):
    monkeypatch.setattr("cifar.data.load_data", lambda *_: tiny_data("cifar10"))
    said = refused(killed(folder, after=12))
    assert "that run trains on synthetic, and the data here is cifar10: see --data-dir" in said


def test_a_run_that_was_refused_can_still_be_resumed(undisturbed, folder):
    """By the very next command: the refusal has freed the lock, and left the state of training as it was."""
    killed(folder, after=12)
    edit(folder, lr=0.5)
    refused(folder)
    edit(folder, lr=0.05)
    resume(folder)
    assert_as_undisturbed(folder, undisturbed)
    found, complaints = newest_checkpoint(folder)
    assert found is not None
    assert (found[0], complaints) == (checkpoint_path(folder, LAST), [])
