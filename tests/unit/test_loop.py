"""The loop: one process through whole programs, to the numbers the tutorial's own loop gives, and exactly again."""

import copy
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train_ddp
from cifar.checkpoint import checkpoint_path, load_checkpoint
from cifar.config import TrainConfig
from cifar.errors import TrainingDivergedError, UserError
from cifar.models import build_model
from cifar.optim import build_optimizer
from cifar.train_state import TrainState
from tests.helpers.comparing import numbers, same, wait_for_checkpoints
from tests.helpers.processes import records, result

HERE = ["--dataset", "synthetic", "--device", "cpu", "--wandb", "disabled"]
# Everything that could go wrong on the way: augmentation, accumulation, a schedule, checkpoints between log points.
SHORT = [*HERE, "--recipe", "wide", "--model", "net", "--local-batch-size", "50", "--global-batch-size", "100",
         "--lr-scaling", "none", "--epochs", "2", "--max-steps", "60", "--log-steps", "7",
         "--checkpoint-steps", "10", "--keep-checkpoints", "9"]  # fmt: skip


def shrink(patched):
    """A tenth of the images: 50 steps an epoch at these batches."""
    patched.setattr("cifar.datasets.synthetic.TRAIN_SIZE", 5_000)
    patched.setattr("cifar.datasets.synthetic.TEST_SIZE", 1_000)


@pytest.fixture
def small(monkeypatch):
    shrink(monkeypatch)


def test_net_is_the_tutorials():
    net = build_model("net")
    shapes = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    assert shapes == {
        "conv1.weight": (6, 3, 5, 5), "conv1.bias": (6,), "conv2.weight": (16, 6, 5, 5), "conv2.bias": (16,),
        "fc1.weight": (120, 400), "fc1.bias": (120,), "fc2.weight": (84, 120), "fc2.bias": (84,),
        "fc3.weight": (10, 84), "fc3.bias": (10,),
    }  # fmt: skip
    assert sum(parameter.numel() for parameter in net.parameters()) == 62_006


class TutorialNet(nn.Module):
    """The tutorial's layers, written down a second time."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


def test_the_program_is_the_tutorials_loop(tmp_path, synthetic):
    train_ddp.main([*HERE, "--run-dir", str(tmp_path / "run"), "--max-steps", "60", "--log-steps", "20"])
    torch.manual_seed(0)
    net = TutorialNet()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    sampler = train_ddp.data.BatchedDistributedSampler(synthetic.train, 0, 1, 4, seed=0)
    running, losses = 0.0, []
    for i, rows in enumerate(sampler):
        images = (synthetic.train.images[rows] / 255 - 0.5) / 0.5
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), synthetic.train.labels[rows])
        loss.backward()
        optimizer.step()
        running += loss.item()
        if i % 20 == 19:
            losses.append((i + 1, running / 20))
            running = 0.0
        if i == 59:
            break
    for (step, ours), (theirs_step, theirs) in zip(records(tmp_path / "run", "train/loss"), losses, strict=True):
        assert step == theirs_step
        assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patched:
        wait_for_checkpoints(patched)
        shrink(patched)
        train_ddp.main([*SHORT, "--run-dir", str(folder)])
    return folder


def test_a_run_is_a_folder_with_its_records(undisturbed):
    names = {path.name for path in undisturbed.iterdir()}
    assert names == {
        "config.json",
        "launch.json",
        ".lock",
        "metrics.jsonl",
        "result.json",
        "report.png",
        "index.html",
        "checkpoints",
    }
    got = result(undisturbed)
    assert got["steps"] == 60
    assert (got["recipe"], got["model"], got["dataset"], got["epochs"]) == ("wide", "net", "synthetic", 2)
    assert (got["world_size"], got["local_batch_size"], got["global_batch_size"]) == (1, 50, 100)
    assert (got["seed"], got["precision"], got["device"], got["test_total"]) == (0, "fp32", "cpu", 1_000)
    assert got["test_accuracy"] == got["test_correct"] / 1_000
    assert got["train_seconds"] > 0
    assert got["images_per_second"] == pytest.approx(6_000 / got["train_seconds"])
    assert math.isfinite(got["test_loss"])
    assert records(undisturbed, "test/accuracy")[-1] == (60, got["test_accuracy"])
    config = json.loads((undisturbed / "config.json").read_text())["config"]
    assert (config["global_batch_size"], config["lr"], config["run_dir"]) == (100, 0.05, str(undisturbed))


def test_log_points_are_within_the_epoch_and_cover_all_of_it(undisturbed):
    steps = [step for step, _ in records(undisturbed, "train/loss")]
    assert steps == [*range(7, 50, 7), 50, 57, 60]


def test_checkpoints_come_at_their_steps_and_at_epoch_ends(undisturbed):
    names = sorted(path.name for path in (undisturbed / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}.pt" for step in range(10, 61, 10)]


def test_the_recorded_lr_is_the_schedules(undisturbed):
    for step, lr in records(undisturbed, "train/lr"):
        assert lr == pytest.approx(0.05 * min(1, step / 50) * (1 + math.cos(math.pi * (step - 1) / 100)) / 2)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("step", [50, 20])
def test_resuming_after_any_checkpoint_changes_nothing(undisturbed, tmp_path, monkeypatch, step):
    """At an epoch's end, and in the middle of an epoch, of a log window and of an accumulation."""
    wait_for_checkpoints(monkeypatch)
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    for path in (folder / "checkpoints").iterdir():
        if path.name > checkpoint_path(folder, step).name:
            path.unlink()
    (folder / "result.json").unlink()
    train_ddp.main(["--resume", str(folder)])
    for later in range(step + 10, 61, 10):
        mine, theirs = (load_checkpoint(checkpoint_path(run, later))["state"] for run in (folder, undisturbed))
        assert same(mine, theirs), f"step {later} differs"
    assert numbers(folder) == numbers(undisturbed)
    assert result(folder)["test_loss"] == result(undisturbed)["test_loss"]


@pytest.mark.usefixtures("small")
def test_a_run_with_muon_and_test_time_augmentation_resumes_exactly(tmp_path, capsys):
    flags = [*HERE, "--recipe", "speed94", "--model", "net", "--cutout", "8", "--local-batch-size", "50",
             "--global-batch-size", "100", "--max-steps", "20",
             "--checkpoint-steps", "10", "--epochs", "2"]  # fmt: skip
    train_ddp.main([*flags, "--run-dir", str(tmp_path / "whole")])
    said = capsys.readouterr().out
    whole = result(tmp_path / "whole")
    assert f"with test-time augmentation: {100 * whole['test_accuracy_tta']:.2f} %, without: " in said
    assert whole["tta"] == "crop"
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    checkpoint_path(tmp_path / "again", 20).unlink()
    (tmp_path / "again" / "result.json").unlink()
    train_ddp.main(["--resume", str(tmp_path / "again")])
    mine, theirs = (load_checkpoint(checkpoint_path(tmp_path / name, 20))["state"] for name in ("again", "whole"))
    assert same(mine, theirs)
    assert len(mine["optimizer"]["param_groups"]) == 3
    assert result(tmp_path / "again")["test_accuracy_tta"] == whole["test_accuracy_tta"]


@pytest.mark.usefixtures("small")
def test_a_damaged_newest_checkpoint_is_passed_over(undisturbed, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    newest = checkpoint_path(folder, 60)
    raw = bytearray(newest.read_bytes())
    raw[len(raw) // 2] ^= 1
    newest.write_bytes(raw)
    train_ddp.main(["--resume", str(folder)])
    said = capsys.readouterr().out
    assert "WARNING" in said
    assert newest.name in said
    assert numbers(folder) == numbers(undisturbed)


def test_a_finished_run_is_not_resumed(undisturbed):
    with pytest.raises(UserError, match=r"finished.*--epochs"):
        train_ddp.main(["--resume", str(undisturbed)])


def test_a_run_with_data_of_another_name_is_not_resumed(undisturbed, tmp_path, real_data):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    config = json.loads((folder / "config.json").read_text())
    config["config"] |= {"dataset": "auto", "epochs": 3}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"synthetic.*cifar10"):
        train_ddp.main(["--resume", str(folder), "--data-dir", str(real_data)])


def test_an_infinite_loss_stops_at_the_log_point_and_names_what_helps(tmp_path):
    folder = tmp_path / "run"
    flags = [*HERE, "--run-dir", str(folder), "--local-batch-size", "100", "--log-steps", "10", "--lr-scaling", "none",
             "--checkpoint-steps", "1", "--max-steps", "100", "--lr", "50"]  # fmt: skip
    with pytest.raises(TrainingDivergedError) as stopped:
        train_ddp.main(flags)
    text = str(stopped.value)
    assert "lr 50" in text
    assert "step " in text
    assert "\n" not in text
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    assert str(newest) in text
    weights = load_checkpoint(newest)["state"]["net"]
    assert not (folder / "result.json").exists()
    assert weights.keys() == build_model("net").state_dict().keys()


def test_max_steps_ends_early_with_records_as_usual(tmp_path, capsys):
    folder = tmp_path / "run"
    train_ddp.main([*HERE, "--run-dir", str(folder), "--max-steps", "30", "--local-batch-size", "50"])
    said = capsys.readouterr().out
    assert "[1,    30] loss: " in said
    assert "Finished Training" in said
    assert "Accuracy of the network on the 10000 test images: " in said
    assert "Accuracy for class: plane is " in said
    assert said.count("WARNING") == 2, "the stand-in is named at the start and beside the accuracy"
    assert result(folder)["steps"] == 30
    assert (folder / "report.png").exists()


@pytest.mark.usefixtures("small")
def test_the_losses_of_two_seeds_differ_and_of_one_agree(tmp_path):
    def curve(name, seed):
        flags = ["--max-steps", "5", "--log-steps", "1", "--seed", seed, "--run-dir", str(tmp_path / name)]
        train_ddp.main([*HERE, "--recipe", "wide", "--model", "net", *flags])
        return records(tmp_path / name, "train/loss")

    first = curve("a", "1")
    assert curve("b", "1") == first
    assert curve("c", "2") != first


def test_momentum_is_loaded_into_the_layout_of_its_parameter():
    """As when a run begun with batches of 4 on a CPU, in the plain layout, goes on with larger ones or on a GPU."""

    def state(layout):
        torch.manual_seed(0)
        net = build_model("net").to(memory_format=layout)
        config = TrainConfig(lr=0.1)
        return TrainState(net, build_optimizer(net, config), torch.amp.GradScaler("cpu", enabled=False))

    def update(own):
        for parameter in own.net.parameters():
            parameter.grad = torch.sin(parameter.detach() * 100)
        own.optimizer.step()
        return torch.cat([parameter.detach().flatten() for parameter in own.net.parameters()])

    plain, last = state(torch.contiguous_format), state(torch.channels_last)
    update(plain)
    last.load_state_dict(copy.deepcopy(plain.state_dict()))
    for parameter, own in last.optimizer.state.items():
        assert own["momentum_buffer"].stride() == parameter.stride()
    assert torch.allclose(update(last), update(plain), atol=1e-6)
