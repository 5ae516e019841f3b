"""The README's commands: what they start is there, and the flags they give it are its own.

That they do what the README says is for the tests of each part; this one finds a command that was renamed.
"""

import importlib.util
import json
import re
import shlex

import pytest

from cifar.config import TrainConfig, parse_args
from tests.processes import ROOT

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
LINES = [line.split("#")[0] for block in BLOCKS for line in block.splitlines()]
FOUND = [*LINES, *re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.S))]
STARTS = ("python ", "torchrun ", "launch/", "accelerate launch ", "sbatch ", "NPROC=")
COMMANDS = sorted({part.strip() for line in FOUND for part in line.split("&&") if part.strip().startswith(STARTS)})


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
        parse_args(flags)
