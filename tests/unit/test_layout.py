"""The layout: imports point one way, and only some files read the command line and the environment."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [ROOT / "train_ddp.py", *(ROOT / "cifar").rglob("*.py")]
}


def imported(path: Path) -> set[str]:
    """Return the modules of this program that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & FILES.keys()


IMPORTS = {module: imported(path) - {module} for module, path in FILES.items()}


def test_no_import_cycle():
    """Not under TYPE_CHECKING nor within functions either."""
    TopologicalSorter(IMPORTS).prepare()


@pytest.mark.parametrize(
    ("prefix", "allowed"),
    [
        ("cifar.models", ("cifar.models",)),
        ("cifar.datasets",
         ("cifar.datasets", "cifar.errors", "cifar.files", "cifar.pictures", "cifar.distributed", "cifar.config")),
        ("cifar.pictures", ("cifar.errors",)),
        ("cifar.distributed", ("cifar.distributed", "cifar.config", "cifar.errors")),
        ("cifar.records", ("cifar.records", "cifar.batch_plan", "cifar.checkpoint", "cifar.config", "cifar.distributed",
                           "cifar.errors", "cifar.evaluation", "cifar.files", "cifar.optim")),
        ("cifar.config", ("cifar.errors", "cifar.files")),
    ],
)  # fmt: skip
def test_lower_floors_import_nothing_above(prefix, allowed):
    for module, names in IMPORTS.items():
        if module.startswith(prefix):
            assert all(name.startswith(allowed) for name in names - {"cifar"}), (module, names)


def test_only_explain_imports_the_script():
    assert {module for module, names in IMPORTS.items() if "train_ddp" in names} == {"cifar.explain"}


def files_that_mention(words: str) -> set[str]:
    return {module for module, path in FILES.items() if re.search(words, path.read_text())}


def test_only_these_read_the_environment_and_the_command_line():
    readers = files_that_mention(r"\bos\.(environ|getenv)|from os import")
    assert readers <= {"cifar.cli", "cifar.distributed.environment", "cifar.records.wandb_logger"}
    assert files_that_mention(r"\bsys\.argv|\btyro\.cli\b|\bargparse\b") == {"cifar.cli", "cifar.command"}
