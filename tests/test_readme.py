"""The README's commands and examples: each command has a test that runs it, and the examples are followed to the letter."""

import importlib.util
import json
import re
import shlex
import shutil
import sys

import pytest

from cifar.config import TrainConfig, parse_args
from tests.processes import ROOT, result, run

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
LINES = [line.split("#")[0] for block in BLOCKS for line in block.splitlines()]
FOUND = [*LINES, *re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.S))]
STARTS = ("python ", "torchrun ", "launch/", "accelerate launch -", "sbatch ", "NPROC=")
COMMANDS = sorted({part.strip() for line in FOUND for part in line.split("&&") if part.strip().startswith(STARTS)})

# The test that runs a command, as it is or with flags that make it short; the first that matches.
RUN_BY = {
    r"(NPROC=2 )?launch/local.sh": "test_launch.py::test_local_starts_as_many_processes_as_it_is_told",
    r"launch/sweep.sh": "test_launch.py::test_sweep_ends_with_a_table_and_outlives_a_run_that_fails",
    r"launch/multi_node.sh .* 1:4": "distributed/test_hosts.py::test_a_run_survives_a_host_that_is_cut_off_and_comes_back",
    r"launch/multi_node.sh": "distributed/test_hosts.py::test_two_hosts_train_as_one_host_with_two_processes",
    r"(sbatch .*)?launch/slurm.sbatch": "distributed/test_slurm.py::test_two_nodes",
    r".*launch/accelerate.yaml": "distributed/test_world_size.py::test_accelerate_launch_trains_the_same_as_torchrun",
    r"torchrun .*--max-restarts": "distributed/test_restart.py::test_a_run_that_is_disturbed_at_random_ends_as_the_und",
    r"torchrun .*-m cifar.explain": "distributed/test_ranks.py::test_explain_shows_that_ranks_agree_after_the_all_reduce",
    r"torchrun .*train_ddp.py": "distributed/test_world_size.py::test_the_loss_curve_is_that_of_one_process",
    r"python train_ddp.py --evaluate": "distributed/test_world_size.py::test_a_checkpoint_has_one_accuracy_at_every_world_",
    r"python train_ddp.py --resume": "distributed/test_world_size.py::test_resume_with_another_world_size_keeps_the_global",
    r"python train_ddp.py --help": "test_config.py::test_help",
    r"python train_ddp.py": "test_readme.py::test_the_examples_of_how_to_change_it",
    r"python -m pdb train_ddp.py": "test_readme.py::test_a_debugger_stops_in_the_first_step",
    r"python -m cifar.compare": "test_compare.py::test_draws_a_picture_with_a_colour_for_each",
    r"python -m cifar.explain": "test_explain.py::test_it_shows_every_link",
    r"python -m cifar.predict": "test_predict.py::test_the_command_line_says_when_the_net_learned_from_the_stand_in",
    r"python -m tests.benchmarks.scale": "test_scale.py::test_the_command_writes_table_json_and_plot",
    r"python -m tests.benchmarks.slow_link": "distributed/test_hosts.py::test_the_slow_link_benchmark",
    r"python -m tests.benchmarks": "test_benchmarks.py::test_the_command_measures_and_writes_json",
    r"python -m tests.distributed.soak": "distributed/test_restart.py::test_a_run_that_is_disturbed_at_random_ends_as_the_",
}


def flags_of(command):
    """What comes after the program that trains, or None if another one is started."""
    words = shlex.split(command)
    for k, word in enumerate(words):
        if word == "train_ddp.py" or word.startswith("launch/"):
            if word == "launch/accelerate.yaml":
                continue
            positional = 2 if word == "launch/multi_node.sh" else 0
            return words[k + 1 + positional :]
    return None


def test_finds_the_commands():
    assert len(COMMANDS) > 15
    for start in STARTS:
        assert any(command.startswith(start) for command in COMMANDS), start


@pytest.mark.parametrize("command", [command for command in COMMANDS if "..." not in command])
def test_what_a_command_starts_is_there(command, tmp_path, monkeypatch):
    words = shlex.split(command)
    for word in words:
        if word.startswith("launch/"):
            assert (ROOT / word).exists(), word
    if "-m" in words and words[words.index("-m") + 1] != "pdb":
        assert importlib.util.find_spec(words[words.index("-m") + 1]) is not None
    flags = flags_of(command)
    if flags is not None and "--help" not in flags:
        run_dir = tmp_path / "runs" / "NAME"  # the one to resume
        run_dir.mkdir(parents=True)
        (run_dir / "config.json").write_text(json.dumps({"config": TrainConfig().to_json()}))
        monkeypatch.chdir(tmp_path)
        if "--recipe mlp" not in command:  # the example's
            parse_args(flags)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_test_runs_it(command):
    test = next(test for pattern, test in RUN_BY.items() if re.match(pattern, command))
    file, name = test.split("::")
    assert f"\ndef {name}" in (ROOT / "tests" / file).read_text()


def test_a_debugger_stops_in_the_first_step(tmp_path):
    """python -m pdb: one process, no process group, and the variables are there."""
    driver = tmp_path / "drive.py"
    driver.write_text(
        "import io, pdb, sys\n"
        "import cifar.loop\n"
        "commands = io.StringIO('b cifar.loop.train_step\\nc\\np config.recipe\\nq\\n')\n"
        "sys.argv = sys.argv[1:]\n"
        "debugger = pdb.Pdb(stdin=commands)\n"
        "debugger.use_rawinput = False\n"
        "debugger.run('import runpy; runpy.run_path(sys.argv[0], run_name=\"__main__\")', {'sys': sys})\n"
    )
    flags = ["--dataset", "synthetic", "--device", "cpu", "--wandb", "disabled", "--run-dir", tmp_path / "run"]
    done = run([sys.executable, driver, ROOT / "train_ddp.py", *flags], tmp_path)
    assert "loop.py" in done.stdout, done.stderr
    assert "'tutorial'" in done.stdout


@pytest.fixture
def changed(tmp_path):
    """A copy of the program, changed as the README's examples say."""
    shutil.copytree(ROOT / "cifar", tmp_path / "cifar", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train_ddp.py", tmp_path)
    examples = re.findall(r"```python\n# (\S+?)(?:: (\w+))?\n(.*?)```", TEXT, re.S)
    assert len(examples) == 5
    for path, registry, code in examples:
        place = tmp_path / path
        if not registry:
            assert not place.exists()
            place.write_text(code)
            continue
        lines = code.splitlines(keepends=True)
        before = "".join(line for line in lines if not line.startswith(" "))
        entry = "".join(line for line in lines if line.startswith(" "))
        text, times = re.subn(rf"(\n{registry}\b.*= {{\n)", lambda found, new=entry: found[1] + new, place.read_text())
        assert times == 1
        place.write_text(text.replace("\nfrom", f"\n{before}from", 1))
    return tmp_path


def test_the_examples_of_how_to_change_it(changed):
    """Followed to the letter, and with three classes instead of ten."""
    from PIL import Image

    colours = {"blue": (30, 40, 200), "green": (20, 180, 50), "red": (210, 30, 40)}
    for split, count in (("train", 40), ("test", 5)):
        for name, colour in colours.items():
            folder = changed / "pictures" / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                Image.new("RGB", (40 + k, 60), tuple(value + k for value in colour)).save(folder / f"{k}.png")
    datasets = changed / "cifar" / "datasets.py"
    text, times = re.subn(r"CLASSES = \(.*\)", 'CLASSES = ("blue", "green", "red")', datasets.read_text())
    assert times == 1
    datasets.write_text(text)
    (line,) = (line for line in LINES if "--recipe mlp" in line)
    flags = [*shlex.split(line)[2:], "--run-dir", "run", "--device", "cpu", "--wandb", "disabled"]
    done = run([sys.executable, "train_ddp.py", *flags], changed, PYTHONPATH=str(changed))
    assert done.returncode == 0, done.stderr
    got = result(changed / "run")
    assert (got["recipe"], got["model"], got["dataset"], got["test_total"]) == ("mlp", "mlp", "folder", 15)
    assert got["test_accuracy"] > 0.9
    assert "Accuracy for class: green is 100.0 %" in done.stdout
    assert (changed / "run" / "report.png").exists()
    assert (changed / "run" / "index.html").exists()
