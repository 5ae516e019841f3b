"""The guides: what their commands name exists. The examples of how to change the program are in tests/integration."""

import importlib.util
import re
import shlex

import pytest

from cifar.cli import parse_args
from cifar.datasets import DATASETS
from cifar.models import MODELS
from cifar.recipes import RECIPES
from tests.helpers.processes import ROOT

GUIDES = [ROOT / name for name in ("README.md", ".github/CONTRIBUTING.md", "launch/README.md", "cifar/README.md",
                                   "tests/README.md", "tests/benchmarks/README.md")]  # fmt: skip
# Examples in the README that do not exist until they are followed, and paths that exist once a run is there.
EXAMPLES = {"mlp", "arrays", "cifar/models/mlp.py", "cifar/datasets/arrays.py"}
STARTS = ("python ", "torchrun ", "launch/", "accelerate launch ", "sbatch ", "pytest")


def commands(text: str) -> list[str]:
    """Return the commands in fenced or indented blocks and in code spans."""
    blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```|((?:^ {4}.*\n)+)", text, re.M | re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in "".join(block).splitlines()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    parts = [part.strip() for line in [*lines, *spans] for part in line.split("&&")]
    return sorted({re.sub(r"^([A-Z_]+=\S* )+", "", part) for part in parts if "..." not in part})


@pytest.fixture
def known_flags(capsys):
    """Return the flags of train_ddp.py, by --help."""
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    return set(re.findall(r"--[a-z][\w-]+", capsys.readouterr().out))


each_guide = pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.parent.name)


@each_guide
def test_commands_name_what_exists(guide, known_flags):
    found = [command for command in commands(guide.read_text()) if command.startswith(STARTS)]
    assert found
    for command in found:
        words = shlex.split(command)
        for before, word in zip(["", *words], words, strict=False):
            path = word.split("::")[0]
            if path.startswith(("cifar/", "launch/", "tests/")):
                assert (ROOT / path).exists(), command
            if before == "-m" and word.startswith(("cifar.", "tests.")):
                assert importlib.util.find_spec(word) is not None, command
            for flag, names in {"--recipe": RECIPES, "--model": MODELS, "--dataset": ("auto", *DATASETS)}.items():
                assert before != flag or word in names or word in EXAMPLES | {"NAME"}, command
        if "train_ddp.py" in words:
            flags = {word.split("=")[0] for word in words[words.index("train_ddp.py") :] if word.startswith("--")}
            assert flags <= known_flags | {"--help"}, command


@each_guide
def test_flags_and_paths_exist(guide):
    """Those in code spans and links, too, of this program or another."""
    text = guide.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (guide.parent / target).exists(), target
    for path in re.findall(r"`((?:cifar|launch|tests)/[\w./-]+)`", text):
        assert (ROOT / path).exists() or path in EXAMPLES, path
    for path in re.findall(r"`((?:unit|integration|cluster|helpers|benchmarks)/[\w./-]*)`", text):
        assert (guide.parent / path).exists(), path


def test_readme_has_at_most_200_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_messages_of_the_troubleshooting_exist():
    sources = [*(ROOT / "cifar").rglob("*.py"), *(ROOT / "launch").iterdir()]
    # Adjacent string literals as one.
    program = "".join(re.sub(r'"\n +f?"', "", path.read_text()) for path in sources)
    section = (ROOT / "README.md").read_text().split("## When something goes wrong")[1]
    messages = re.findall(r"^\| `([^`]+)` \|", section, re.M)
    assert len(messages) > 4
    for message in messages:
        for part in re.split(r"\.\.\.|[\d.:]*\d|\bHOST\b|\bnan\b|\(s\)", message):
            assert part.strip(" :()") in program, f"{message}: the program never prints {part!r}"
