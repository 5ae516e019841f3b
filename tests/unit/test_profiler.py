"""--profile: which steps are in the traces, and what is printed."""

import json

import pytest

import train_ddp
from tests.helpers.processes import train

FLAGS = ["--dataset", "synthetic", "--device", "cpu", "--wandb", "disabled", "--log-steps", "100"]


def steps(path) -> list[int]:
    """Return the steps in a trace, in order."""
    events = json.loads(path.read_text())["traceEvents"]
    marks = [event for event in events if event.get("name", "").startswith("ProfilerStep#") and event["ph"] == "X"]
    numbers = {int(mark["name"].partition("#")[2]): mark["ts"] for mark in marks}
    return sorted(numbers, key=lambda step: numbers[step])


def profiled(tmp_path, *flags):
    """Train with --profile; return the path of the trace."""
    train_ddp.main([*FLAGS, "--profile", "--run-dir", str(tmp_path / "run"), *flags])
    return tmp_path / "run" / "trace-rank0.json"


def test_steps_10_to_20_are_in_the_trace(tiny_runs, tmp_path, capsys):
    """And not the test after the last step."""
    trace = profiled(tmp_path, "--max-steps", "20")
    assert list(trace.parent.glob("trace-*")) == [trace]
    assert steps(trace) == list(range(10, 21))
    events = json.loads(trace.read_text())["traceEvents"]
    shapes = [event["args"]["Input Dims"] for event in events if event.get("name") == "aten::cross_entropy_loss"]
    assert [shape[0] for shape in shapes] == [[4, 10]] * 11
    out = capsys.readouterr().out
    assert out.count("The most expensive operations of steps 10 to 20:") == 1
    assert any("conv" in line and "[[4, " in line for line in out.splitlines()), "a batch of 4 images"


def test_a_resumed_run_counts_its_own_steps_and_nothing_is_profiled_without_the_flag(tiny_runs, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("cifar.run.StepProfiler", None)
        train_ddp.main([*FLAGS, "--run-dir", str(tmp_path / "run"), "--max-steps", "5"])
    train_ddp.main(["--resume", str(tmp_path / "run"), "--profile", "--max-steps", "17"])
    assert steps(tmp_path / "run" / "trace-rank0.json") == [10, 11, 12]


@pytest.mark.slow
def test_each_rank_writes_its_trace(tmp_path):
    flags = "--dataset synthetic --max-steps 25 --profile --run-dir run"
    done = train(*flags.split(), cwd=tmp_path, processes=2)
    assert done.stdout.count("The most expensive operations") == 1
    assert "USDT" not in done.stderr
    assert "gpuGetDeviceCount" not in done.stderr
    for rank in (0, 1):
        path = tmp_path / "run" / f"trace-rank{rank}.json"
        assert steps(path) == list(range(10, 21))
        assert "gloo:all_reduce" in path.read_text()
