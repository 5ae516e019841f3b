"""Resume: from any step to the same bits; changes are printed; what cannot continue is refused."""

import dataclasses
import json
import re
import shutil
import signal

import pytest
from torch import nn

import train_ddp
from cifar.checkpoint import checkpoint_path, checkpoints, load_checkpoint, save_checkpoint
from cifar.compare import read_run
from cifar.datasets import DATASETS
from cifar.distributed.preemption import StopAgreement
from cifar.errors import StoppedError, UserError
from cifar.models import MODELS
from cifar.models.net import Net
from tests.helpers.checkpoints import flip_bit
from tests.helpers.comparing import make_runs_tiny, numbers, same, tiny_dataset, traces
from tests.helpers.processes import records, result

# Ten steps an epoch, with augmentation, a schedule and accumulation; log points after 3, 6, 9 and 10 of them.
RUN = ["--dataset", "synthetic", "--device", "cpu", "--wandb", "disabled", "--recipe", "wide", "--model", "net",
       "--local-batch-size", "10", "--global-batch-size", "20", "--epochs", "2", "--log-steps", "3",
       "--checkpoint-steps", "4", "--keep-checkpoints", "30"]  # fmt: skip
LAST = 20
# The same with Muon, label smoothing, alternating flips, cutout and test-time augmentation.
MUON = [*RUN, "--recipe", "speed94", "--lr", "0.1", "--cutout", "8"]

pytestmark = pytest.mark.usefixtures("tiny_runs")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the directory of a run that was never stopped."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patched:
        make_runs_tiny(patched)
        train_ddp.main([*RUN, "--run-dir", str(run_dir)])
    return run_dir


@pytest.fixture
def run_dir(undisturbed, tmp_path):
    """Return a copy of the finished run."""
    return shutil.copytree(undisturbed, tmp_path / "run")


def killed(run_dir, after):
    """Make a finished run look as if it had been killed after the checkpoint of step `after`."""
    for step, path in checkpoints(run_dir).items():
        if step > after:
            path.unlink()
    (run_dir / "result.json").unlink()
    return run_dir


def resume(run_dir, *flags):
    train_ddp.main(["--resume", str(run_dir), *map(str, flags)])


def assert_same_run(run_dir, undisturbed):
    mine, theirs = (load_checkpoint(checkpoint_path(run, LAST))["state"] for run in (run_dir, undisturbed))
    assert same(mine, theirs)
    assert numbers(run_dir) == numbers(undisturbed)
    mine, theirs = result(run_dir), result(undisturbed)
    clock = {"train_seconds", "first_step_seconds", "images_per_second", "checkpoint_seconds"}
    assert {k: v for k, v in mine.items() if k not in clock} == {k: v for k, v in theirs.items() if k not in clock}


class Asked(StopAgreement):
    """The process is asked to stop in its first step."""

    def after_step(self):
        self._request.name = "SIGTERM"
        return super().after_step()


@pytest.mark.parametrize("flags", [RUN, pytest.param(MUON, marks=pytest.mark.slow)], ids=["sgd", "muon"])
def test_stopped_after_every_step(tmp_path, monkeypatch, flags, capsys):
    """Each process trains a step; also of random layers, which must draw the same."""
    monkeypatch.setitem(MODELS, "net", lambda classes: nn.Sequential(nn.Dropout(0.1), Net(classes)))
    undisturbed, run_dir = tmp_path / "undisturbed", tmp_path / "run"
    train_ddp.main([*flags, "--run-dir", str(undisturbed)])
    monkeypatch.setattr("cifar.run.StopAgreement", Asked)
    with pytest.raises(StoppedError) as stopped:
        train_ddp.main([*flags, "--run-dir", str(run_dir)])
    assert str(stopped.value) == f"Stopped by SIGTERM after step 1 of {LAST}; to continue: --resume {run_dir}"
    assert stopped.value.status == 128 + signal.SIGTERM
    assert capsys.readouterr().out.endswith(f"\n{stopped.value}\n")
    for step in range(2, LAST):
        with pytest.raises(StoppedError, match=f"after step {step} of {LAST};"):
            resume(run_dir)
        assert max(checkpoints(run_dir)) == step
        assert not (run_dir / "result.json").exists()
    resume(run_dir)  # asked to stop after its last step, a run has finished
    assert_same_run(run_dir, undisturbed)


def test_damaged_files_cost_one_warning_each(undisturbed, run_dir, capsys):
    newest = checkpoint_path(killed(run_dir, after=12), 12)
    flip_bit(newest)
    for name in ("result.json", "launch.json"):
        (run_dir / name).write_text("[]")  # records without sense do not matter
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    later = next(i for i, line in enumerate(lines) if json.loads(line)["step"] > 12)
    damaged = [b'{"step": 6, "x": "\xff"}\n', b"3\n", bytes(512) + b"\n"]
    path.write_bytes(b"".join([*damaged, *lines[: later + 1]])[:-9])
    resume(run_dir)
    text = capsys.readouterr().out
    of_checkpoint, of_metrics = re.findall("^WARNING: (?:skipping|damaged).*", text, re.M)
    assert of_checkpoint.startswith(f"WARNING: skipping corrupt checkpoint {newest}: ")
    assert of_metrics == f"WARNING: damaged lines left out of {path}: 4 of {later + 4}"
    assert re.search(rf"^resumes +after step 10 of {LAST}$", text, re.M)
    assert_same_run(run_dir, undisturbed)


def test_one_command_begins_a_run_continues_it_and_says_that_it_has_finished(undisturbed, tmp_path, capsys):
    run_dir = tmp_path / "run"
    command = [*RUN, "--run-dir", str(run_dir), "--autoresume"]
    train_ddp.main(command)
    for after, words in ((LAST, f"after step {LAST}"), (12, "after step 12"), (0, "from the start")):
        killed(run_dir, after)
        train_ddp.main(command)
        text = capsys.readouterr().out
        assert re.search(f"^resumes +{words}", text, re.M)
        assert changed(text) == []
        assert_same_run(run_dir, undisturbed)
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.name != ".lock"}
    train_ddp.main(command)  # without an error
    assert capsys.readouterr().out == f"the run in {run_dir} has finished\n"
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.name != ".lock"} == before
    with pytest.raises(UserError, match="that run has finished"):
        resume(run_dir)
    edit_facts(run_dir, world_size=2)
    train_ddp.main([*command, "--epochs", "3"])
    assert changed(capsys.readouterr().out) == ["--epochs 2 -> 3, world size 2 -> 1"]
    resume(killed(run_dir, after=28))
    assert changed(capsys.readouterr().out) == []
    assert result(run_dir)["steps"] == 30


def changed(text):
    return [line.removeprefix("changed").strip() for line in text.splitlines() if line.startswith("changed")]


def test_unused_flags_of_an_earlier_version_do_not_matter(undisturbed, run_dir):
    edit(killed(run_dir, after=12), small_share=0.0, small_size=24)
    resume(run_dir)
    assert_same_run(run_dir, undisturbed)


@pytest.mark.parametrize("recorded", [True, False])
def test_where_a_run_was_trained_is_recorded(run_dir, recorded):
    """Each start that has trained a part of it, also if an earlier version began it and recorded only the last one."""
    starts, before = [{"step": 0, "world_size": 8, "device": "cuda"}], {"world_size": 8, "device": "cuda"}
    edit_facts(run_dir, **(before | {"starts": starts if recorded else None}))
    resume(killed(run_dir, after=12))
    assert result(run_dir)["trained_on"] == "8 processes on cuda, then 1 process on cpu"
    (run_dir / "result.json").unlink()
    resume(run_dir)  # trains nothing
    assert read_run(run_dir).cells["processes"] == "8, 1"
    resume(killed(run_dir, after=0))
    assert result(run_dir)["trained_on"] == "1 process on cpu"


def test_running_losses_of_two_ranks_continue_in_one(undisturbed, run_dir):
    """Step 8 is between log points. Each of two ranks has the sum of its own losses; their mean is the run's."""
    path = checkpoint_path(killed(run_dir, after=8), 8)
    saved = load_checkpoint(path)
    (loss,) = saved["state"]["running_loss"]
    assert loss > 0
    save_checkpoint(path, saved | {"state": saved["state"] | {"running_loss": [2 * loss, 0.0]}})
    resume(run_dir)
    assert_same_run(run_dir, undisturbed)


@pytest.mark.parametrize(("before", "after"), [(4, 8), (8, 4)])
def test_other_micro_batches_give_the_same_losses(tmp_path, capsys, before, after):
    """On a CPU, up to 4 images are contiguous and more are channels-last; momentum has to follow."""
    flags = [*RUN, "--global-batch-size", "8", "--epochs", "1", "--local-batch-size", str(before),
             "--lr-scaling", "none", "--warmup-epochs", "0"]  # fmt: skip
    train_ddp.main([*flags, "--run-dir", str(tmp_path / "whole")])
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    resume(killed(tmp_path / "resumed", after=8), "--local-batch-size", after)
    assert changed(capsys.readouterr().out) == [f"--local-batch-size {before} -> {after}"]
    whole, resumed = (records(tmp_path / name, "train/loss") for name in ("whole", "resumed"))
    # 1e-7 apart; 5e-5 with the momentum in the layout of the checkpoint.
    assert resumed == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in whole]


def test_best_checkpoint_stays_over_a_resume(tmp_path, monkeypatch):
    right, evaluate = iter([50, 120, 60, 40, 50, 110]), train_ddp.evaluate

    def evaluate_falsely(*arguments):
        test = evaluate(*arguments)
        predicted = test.labels.clone()
        predicted[next(right) :] += 1
        return dataclasses.replace(test, predicted=predicted % 10)

    monkeypatch.setattr("train_ddp.evaluate", evaluate_falsely)
    run_dir = tmp_path / "run"
    train_ddp.main([*RUN, "--run-dir", str(run_dir), "--epochs", "4", "--keep-checkpoints", "2"])
    assert sorted(checkpoints(run_dir)) == [20, 36, 40]
    resume(run_dir, "--epochs", 6)
    assert sorted(checkpoints(run_dir)) == [20, 56, 60]
    assert (result(run_dir)["best_step"], result(run_dir)["best_accuracy"]) == (20, 0.6)
    assert result(run_dir)["test_accuracy"] == 0.55


def edit(run_dir, **changes):
    """Change the recorded configuration."""
    config = json.loads((run_dir / "config.json").read_text())["config"]
    edit_facts(run_dir, config=config | changes)


def edit_facts(run_dir, **changes):
    """Change what config.json holds; None removes an entry."""
    facts = json.loads((run_dir / "config.json").read_text()) | changes
    facts = {name: value for name, value in facts.items() if value is not None}
    (run_dir / "config.json").write_text(json.dumps(facts))


def cut_checkpoints(run_dir):
    for path in checkpoints(run_dir).values():
        path.write_bytes(path.read_bytes()[:-1])


def mismatch(name, value, own):
    """Return a configuration that conflicts with the checkpoint, and the words that refuse it."""
    words = f"its config.json says --{name} {value}, but its checkpoint step-00000020.pt was trained with {own}"
    return pytest.param(lambda run_dir: edit(run_dir, **{name: value}), words, id=name)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        mismatch("lr", 0.5, 0.05),
        mismatch("seed", 3, 0),
        mismatch("model", "net-wide", "net"),
        mismatch("schedule", "constant", "cosine"),
        (lambda run_dir: edit(run_dir, lr="0.05"), "config.json"),
        (lambda run_dir: edit(run_dir, epochs=None), "config.json"),
        (lambda run_dir: edit(run_dir, optimizer="adam"), "config.json: optimizer is 'adam', which is not of type"),
        (lambda run_dir: edit(run_dir, small_share=0.5), "another version of cifar-ddp: .*'small_share'"),
        (lambda run_dir: edit_facts(run_dir, dataset=None), "config.json"),
        (lambda run_dir: edit_facts(run_dir, world_size=None), "config.json"),
        (lambda run_dir: edit(run_dir, max_steps=11), "is at step 20 already, beyond 11: raise --epochs or --max-"),
        (cut_checkpoints, ".*".join(f"step-{step:08d}.pt" for step in (20, 16, 12, 10, 8, 4))),
        (lambda run_dir: edit(run_dir, dataset="mine"), "that run trains on synthetic, but the dataset here is mine"),
        (lambda _: DATASETS.update(synthetic=DATASETS["other classes"]), "class names"),
        (shutil.rmtree, "there is no run to continue"),
        (lambda _: None, "has finished, with step 20 of 20; raise --epochs or --max-steps"),
        (
            lambda run_dir: shutil.rmtree(run_dir / "checkpoints"),
            "has finished, with step 20 of 20, and its checkpoints are gone",
        ),
    ],
)
def test_run_that_cannot_continue(run_dir, monkeypatch, spoil, words):
    """One line says why, and nothing in the directory changes."""
    monkeypatch.setitem(DATASETS, "mine", lambda _: tiny_dataset())
    monkeypatch.setitem(DATASETS, "other classes", lambda _: tiny_dataset(classes=tuple("abcdefghij")))
    monkeypatch.setitem(DATASETS, "synthetic", DATASETS["synthetic"])
    spoil(run_dir)
    before = traces(run_dir)
    with pytest.raises(UserError, match=words) as mistake:
        resume(run_dir)
    assert "\n" not in str(mistake.value)
    assert traces(run_dir) == before
