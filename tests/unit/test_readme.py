"""The README's commands, each of which a test runs, and its examples, followed to the letter."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from cifar.config import TrainConfig, parse_args
from tests.helpers.processes import ROOT, clean_environment, result, run

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
LINES = [line.split("#")[0] for block in BLOCKS for line in block.splitlines()]
FOUND = [*LINES, *re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.S))]
STARTS = (
    "python ", "torchrun ", "launch/", "accelerate launch -", "sbatch ", "NPROC=", "wandb ", "pytest", "pip ", "kill ",
)  # fmt: skip
COMMANDS = sorted({part.strip() for line in FOUND for part in line.split("&&") if part.strip().startswith(STARTS)})

RESTART, WORLD = "tests/distributed/test_restart.py", "tests/distributed/test_world_size.py"
# What runs a command, as it is or with flags that make it short: a file, and in it a test or a line. The first match.
RUN_BY = {
    r"pip install": (".ci/run", "pip install -q -e '.[test]' && pytest"),
    r"pytest -m cluster": (".ci/run", "pytest -m cluster"),
    r"pytest": (".ci/run", "pip install -q -e '.[test]' && pytest"),
    r"(NPROC=2 )?launch/local.sh": ("tests/test_launch.py", "local_starts_as_many_processes_as_it_is_told"),
    r"launch/sweep.sh": ("tests/test_sweep.py", "sweep_ends_with_a_table_and_outlives_a_run_that_fails"),
    r"launch/multi_node.sh .* 1:4": ("tests/distributed/test_hosts.py", "a_run_survives_a_host_that_is_cut_off"),
    r"launch/multi_node.sh": ("tests/distributed/test_hosts.py", "two_hosts_train_as_one_host_with_two_processes"),
    r"(sbatch .*)?launch/slurm.sbatch": ("tests/distributed/test_slurm.py", "two_nodes"),
    r".*launch/accelerate.yaml": (WORLD, "accelerate_launch_trains_the_same_as_torchrun"),
    r"torchrun .*--max-restarts": (RESTART, "a_run_that_is_disturbed_at_random_ends_as_the_undisturbed_one"),
    r"torchrun .*-m cifar.explain": ("tests/distributed/test_ranks.py", "explain_shows_that_ranks_agree"),
    r"torchrun .*train_ddp.py": (WORLD, "the_loss_curve_is_that_of_one_process"),
    r"python train_ddp.py --evaluate": (WORLD, "a_checkpoint_has_the_same_accuracy_at_seven_processes"),
    r"python train_ddp.py --resume": (WORLD, "resume_with_another_world_size_keeps_the_global_batch"),
    r"python train_ddp.py --help": ("tests/test_config.py", "help_lists_every_flag_of_the_design"),
    r"python train_ddp.py": ("tests/test_readme.py", "the_examples_of_how_to_change_it"),
    r"python -m pdb train_ddp.py": ("tests/test_readme.py", "a_debugger_stops_where_it_is_told"),
    r"python -m cifar.compare": ("tests/test_compare.py", "draws_a_picture_with_a_colour_for_each"),
    r"python -m cifar.explain": ("tests/test_explain.py", "it_shows_every_link"),
    r"python -m cifar.predict": ("tests/test_predict.py", "the_command_line_says_when_the_net_learned_from"),
    r"python -m tests.benchmarks.scale": ("tests/test_scale.py", "the_command_writes_table_json_and_plot"),
    r"python -m tests.benchmarks.slow_link": ("tests/distributed/test_hosts.py", "the_slow_link_benchmark"),
    r"python -m tests.benchmarks": ("tests/test_benchmarks.py", "the_command_measures_and_writes_json"),
    r"python -m tests.helpers.soak": (RESTART, "a_run_that_is_disturbed_at_random_ends_as"),
    r"kill -9": ("tests/test_wandb_resume.py", "a_run_that_torchrun_restarts_is_one_run_without_gaps"),
    r"kill -STOP": (RESTART, "a_frozen_rank_ends_the_run_within_the_timeout_and_is_named"),
    r"kill -USR1": (RESTART, "a_signal_to_one_rank_stops_all_after_the_same_step_with_a_checkpoint"),
    r"wandb login": ("tests/test_tracking.py", "auto_is_online_after_wandb_login"),
    r"wandb sync": ("tests/test_wandb_resume.py", "sync_uploads_a_resumed_offline_run_whole"),
    r"wandb leet run": ("tests/test_tracking.py", "wandbs_terminal_dashboard_shows_an_offline_run"),
    r"wandb sweep": ("tests/test_sweep.py", "wandb_makes_the_sweep_and_its_agent_trains_a_run"),
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
    if words[0] in ("python", "torchrun") and "-m" in words and words[words.index("-m") + 1] != "pdb":
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
    file, what = next(test for pattern, test in RUN_BY.items() if re.match(pattern, command))
    line = what if file == ".ci/run" else f"def test_{what}"
    assert f"\n{line}" in (ROOT / file).read_text()


def test_the_program_says_what_the_troubleshooting_is_listed_by():
    sources = [*(ROOT / "cifar").rglob("*.py"), ROOT / "train_ddp.py", *(ROOT / "launch").iterdir()]
    # Texts as one piece each, and without what surrounds them in a shell script.
    text = "".join(re.sub(r'"\n +f?"', "", path.read_text()) for path in sources)
    messages = re.findall(r"^\| `([^`]+)` \|", TEXT.split("## When something goes wrong")[1], re.M)
    assert len(messages) > 10
    for message in messages:
        parts = re.split(r"\.\.\.|[\d.:]*\d|\bHOST\b|\bnan\b|: error|: No space left on device|\(s\)", message)
        for part in parts:
            assert part.strip(" :()") in text, f"{message}: nothing says {part!r}"


def test_a_debugger_stops_where_it_is_told(tmp_path):
    lines = (ROOT / "train_ddp.py").read_text().splitlines()
    (number,) = (k for k, line in enumerate(lines, 1) if "loop.train_epoch(" in line)
    flags = ["--dataset", "synthetic", "--device", "cpu", "--wandb", "disabled", "--run-dir", "run"]
    done = subprocess.run(
        [sys.executable, "-m", "pdb", ROOT / "train_ddp.py", *flags],
        cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=120,
        input=f"b {number}\nc\np (config.recipe, runtime.world_size)\nq\n",
    )  # fmt: skip
    assert "('tutorial', 1)" in done.stdout, done.stdout + done.stderr


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
