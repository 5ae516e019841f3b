"""The benchmarks without their programs: statistics, arithmetic and tables."""

import json
import os
import re
from statistics import mean

import pytest

from cifar.recipes import RECIPES
from tests.benchmarks import __main__ as command
from tests.benchmarks import reproduce, slow_link
from tests.benchmarks.measure import OURS, Comparison, Metric
from tests.benchmarks.runner import BenchmarkError, Runner, first_reaching
from tests.helpers.measuring import Finished, execute, images_per_second
from tests.helpers.processes import ROOT


def test_programs_alternate_and_ratios_are_per_round(tmp_path, monkeypatch, capsys):
    (tmp_path / "cifar-10-batches-py").mkdir()
    order, times = [], {OURS: [1.0, 2.0, 4.0], "loop": [4.0, 4.0, 8.0]}

    def program(name):
        return lambda number: order.append((number, name)) or {"training": times[name][number]}

    comparison = Comparison("a loop", {name: program(name) for name in times}, [Metric("training", "s")])
    monkeypatch.setattr(command, "BENCHMARKS", {"a": lambda runner: [comparison]})
    file = tmp_path / "numbers.json"
    assert command.main(["a", "--rounds", "3", "--data-dir", str(tmp_path), "--json", str(file)]) == 0
    assert order == [(number, name) for number in range(3) for name in times]
    assert "2.00 x (2.00 x to 4.00 x)" in capsys.readouterr().out
    assert json.loads(file.read_text())["benchmarks"]["a"][0]["runs"]["loop"][2] == {"training": 8.0}


@pytest.mark.parametrize(("compare", "expected"), [("less", 2.0), ("more", 0.5), ("cost", -50.0)])
def test_direction_of_comparison(compare, expected):
    assert Metric("x", "s", compare).against(1.0, 2.0) == expected


def test_command_has_a_limit_and_its_error_is_one_line(tmp_path):
    finished = execute(
        ["sh", "-c", "echo begun; sleep 60"], tmp_path / "log", dict(os.environ), limit=0.3, mark="begun"
    )
    assert (finished.status, finished.output) == (-1, "begun\n")
    assert finished.mark_seconds < 0.3 <= finished.seconds < 10
    with pytest.raises(BenchmarkError, match="ValueError: no luck"):
        Runner(tmp_path, tmp_path).python("-c", "raise ValueError('no luck')")


def test_throughput_and_time_to_accuracy_from_metrics(tmp_path):
    rates, tests = {10: 100.0, 20: 50.0, 30: 200.0}, {20: 0.55, 30: 0.61}
    records = [{"step": step, "train/images_per_second": rate} for step, rate in rates.items()]
    records += [{"step": step, "test/accuracy": accuracy} for step, accuracy in tests.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "result.json").write_text('{"global_batch_size": 10}')
    assert images_per_second(tmp_path) == pytest.approx(200 / 2.5)  # without the first 100 images
    assert images_per_second(tmp_path, after=15) == pytest.approx(200.0)
    assert first_reaching(tmp_path, 0.6) == (pytest.approx(3.5), 0.61)
    with pytest.raises(BenchmarkError, match=r"70 % was not reached: the best was 61\.00 %"):
        first_reaching(tmp_path, 0.7)


def test_seconds_to_an_accuracy_on_a_slow_link(tmp_path, monkeypatch, capsys):
    """PowerSGD's first 20 steps cost as much as those of `none`; a seed without the accuracy never arrives."""
    arrives, never = ({"accuracies": {"900": 0.5, "1000": accuracy, "1100": 0.7}} for accuracy in (0.62, 0.619))
    never["accuracies"]["1100"] = 0.6
    steps = {"none/0": arrives, "powersgd-4/0": arrives, "powersgd-4/1": never, "local-8/0": never}
    steps |= {"bf16/0": arrives, "bf16/1": arrives}
    cost = {"none/10": 3.0, "powersgd-4/10": 1.0}
    record = {
        "steps": {f"net-fast/{name}": found for name, found in steps.items()},
        "cost": {f"net-fast/{name}": {"seconds": seconds, "bytes": 1e6} for name, seconds in cost.items()},
    }
    (tmp_path / "slow.json").write_text(json.dumps(record))
    flags = ["--measure", "--recipes", "net-fast", "--links", "10", "--json", tmp_path / "slow.json", "--out",
             tmp_path / "slow.png", "--methods", "none", "powersgd-4", "powersgd-1", "local-8", "bf16"]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["slow_link", *map(str, flags)])
    slow_link.main()
    assert [line.split(" | ")[1:] for line in capsys.readouterr().out.splitlines()[2:]] == [
        ["1 of 1", "1,000", "1,000", "3,000 s |"],
        ["1 of 2", "1,000", "1,000", "1,040 s |"],
        ["0 of 1", "never", "never", "never |"],
        ["2 of 2", "1,000 ± 0", "not measured", "not measured |"],
    ]
    assert (tmp_path / "slow.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("published", "here", "status", "reason"),
    [
        ([60, 61, 62], [60, 61, 62], 0, "to the last image"),
        ([60, 61, 62], [62, 61, 60], 0, "within 61.00 ± 3.51 %"),
        ([60, 61, 62], [64, 64.5, 65], 0, "within 64.50 ± 3.51 %"),
        ([60, 61, 62], [64, 64.6, 65.2], 1, "outside 64.60 ± 3.51 %"),
        ([60, 61, 62], [65.9], 0, "within 65.90 ± 4.97 %"),
        ([60, 61, 62], [66, 10], 1, "outside 38.00 ± 3.93 %"),  # the runs here may fail, and don't widen the interval
        ([61], [62, 63, 64], 0, "within 63.00 ± 4.97 %"),
        ([61], [62], 1, "has no spread"),
    ],
)
def test_reproduced_or_not(tmp_path, monkeypatch, capsys, published, here, status, reason):
    def record(run_dir, seed, accuracy):
        run_dir.mkdir(parents=True)
        found = {"test_correct": round(100 * accuracy), "test_class_accuracy": [], "test_accuracy": accuracy / 100}
        found |= {"recipe": "net-fast", "seed": seed, "test_accuracy_tta": None, "train_seconds": 1.0}
        (run_dir / "result.json").write_text(json.dumps(found))

    def execute(command, *_):
        seed = command[command.index("--seed") + 1]
        record(command[-1], seed, here[seed])
        return Finished(0, "", 1.0)

    for seed, accuracy in enumerate(published):
        record(tmp_path / "records" / f"net-fast-{seed}", seed, accuracy)
    (tmp_path / "records" / "machine.json").write_text("{}")
    monkeypatch.setattr(reproduce, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(reproduce, "execute", execute)
    seeds = [] if len(here) == len(published) else ["--seeds", *map(str, range(len(here)))]
    assert command.main(["reproduce", "net-fast", "--folder", str(tmp_path / "runs"), *seeds]) == status
    lines = capsys.readouterr().out.splitlines()
    assert reason in lines[-1]
    trained = [line.split(" --wandb")[0] for line in lines if line.startswith("python")]
    line = "python train_ddp.py --recipe net-fast --seed {} --dataset cifar10"
    assert trained == [line.format(seed) for seed in range(len(here))]


@pytest.mark.parametrize(
    ("row", "message"),
    [("nope", "nope is not a row"), ("resnet18", "resnet18 has no record"), ("wide", "error: no CIFAR-10")],
)
def test_nothing_to_compare(tmp_path, monkeypatch, capsys, row, message):
    failed = Finished(2, "Traceback\ntrain_ddp.py: error: no CIFAR-10\n", 1.0)
    monkeypatch.setattr(reproduce, "execute", lambda *_: failed)
    assert command.main(["reproduce", row, "--folder", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("guide", "digits"), [("README.md", 1), ("tests/benchmarks/README.md", 2)])
def test_guides_have_the_means_of_the_records(guide, digits):
    results = (ROOT / guide).read_text().split("## Results")[1]
    shown = dict(re.findall(r"^\| `([\w-]+)` \|[^%\n]*?([\d.]+) % \|", results, re.M))
    means = {row: [reproduce.accuracy(run) for run in reproduce.published(row).values()] for row in RECIPES}
    assert shown == {row: f"{mean(values):.{digits}f}" for row, values in means.items() if values}
