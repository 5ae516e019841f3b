"""The benchmarks' arithmetic, their peers and their command line. Nothing here is timed."""

import json

import pytest
import torch

from cifar.models import build_model
from tests.benchmarks import __main__ as command
from tests.benchmarks import peers
from tests.benchmarks.children import ContenderError, complaint, seconds_until, steady, windows
from tests.benchmarks.measure import OURS, Quantity, Race, alternate, summarize, table

METRICS = [
    {"step": 10, "train/images_per_second": 100.0},
    {"step": 20, "train/images_per_second": 50.0},
    {"step": 20, "test/accuracy": 0.55},
    {"step": 30, "train/images_per_second": 200.0},
    {"step": 30, "test/accuracy": 0.61},
]


@pytest.fixture
def race():
    times, turns = {OURS: iter([1.0, 2.0, 4.0]), "peer": iter([4.0, 4.0, 8.0])}, []

    def contender(name):
        return lambda number: turns.append((name, number)) or {"training": next(times[name])}

    quantities = (Quantity("training", "s"),)
    return Race("a race", {name: contender(name) for name in times}, quantities), turns


def test_contenders_take_turns(race):
    contest, turns = race
    alternate(contest, 3)
    assert turns == [(name, number) for number in range(3) for name in (OURS, "peer")]


def test_ratios_are_those_of_each_round(race):
    contest, _ = race
    ours, peer = summarize(contest, alternate(contest, 3))
    assert (ours.median, ours.mean, ours.min, ours.max, ours.comparison) == (2, pytest.approx(7 / 3), 1, 4, None)
    assert peer.comparison == (2, 2, 4)
    lines = list(table(contest, [ours, peer]))
    assert "2.00 x (2.00 x to 4.00 x)" in lines[2]


@pytest.mark.parametrize(("compare", "expected"), [("less", 2.0), ("more", 0.5), ("cost", -50.0), ("none", None)])
def test_what_a_comparison_means(compare, expected):
    assert Quantity("x", "s", compare).against(1.0, 2.0) == expected


def test_windows_of_a_run():
    found = windows(METRICS, global_batch_size=10)
    assert [(window.images, window.seconds) for window in found] == [(100, 1.0), (100, 2.0), (100, 0.5)]
    assert steady(found) == pytest.approx(200 / 2.5)
    reached = seconds_until(found, 0.6)
    assert (reached.step, reached.images, reached.seconds) == (30, 300, 3.5)
    with pytest.raises(ContenderError, match=r"70 % was never reached: the best was 61\.00 %"):
        seconds_until(found, 0.7)


def test_the_line_that_says_most_is_quoted():
    errors = "Traceback\n  File\nValueError: no\ntrain_ddp.py: error: a mistake\ntorchrun's page\n"
    assert complaint(errors) == "train_ddp.py: error: a mistake"
    assert complaint("Traceback\nValueError: no\nlast") == "ValueError: no"


def test_the_peer_trains_the_same_net_by_the_same_rule():
    torch.manual_seed(0)
    ours = build_model("net")
    torch.manual_seed(0)
    theirs = peers.make_net()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
    images = torch.rand(4, 3, 32, 32)
    assert torch.allclose(ours(images), theirs(images), atol=1e-6)


def test_the_peers_loop_learns_and_ends():
    torch.manual_seed(0)
    net, losses = peers.make_net(), []
    batch = torch.randn(8, 3, 32, 32), torch.arange(8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    steps = peers.train(net, [batch] * 200, optimizer, torch.device("cpu"), 100, lambda _, loss: losses.append(loss))
    assert steps == len(losses) == 100
    assert losses[-1] < 0.5 * losses[0]
    assert peers.test(net, [batch, batch], torch.device("cpu")) > 0.5


def test_the_command_measures_and_writes_json(tmp_path, monkeypatch, capsys, race):
    (tmp_path / "cifar-10-batches-py").mkdir()
    monkeypatch.setattr(command, "BENCHMARKS", {"a": lambda settings: [race[0]]})
    file = tmp_path / "numbers.json"
    assert command.main(["a", "--rounds", "2", "--data-dir", str(tmp_path), "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert record["benchmarks"]["a"][0]["runs"]["peer"] == [{"training": 4.0}, {"training": 4.0}]
    assert record["machine"]["cores"] >= 1
    assert "a: a race (2 rounds" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["nothing"], ["ddp", "--rounds", "0"], ["ddp", "--data-dir", "nowhere"]])
def test_a_mistake_is_one_line_and_status_2(argv, capsys):
    with pytest.raises(SystemExit) as left:
        command.main(argv)
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("tests.benchmarks: error: ")
    assert said.count("\n") == 1
