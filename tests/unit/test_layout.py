"""The layout: imports point one way, and only some files read the command line and the environment."""

import ast
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
    left = {module: set(names) for module, names in IMPORTS.items()}
    while leaves := {module for module, names in left.items() if not names}:
        left = {module: names - leaves for module, names in left.items() if module not in leaves}
    assert left == {}


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


def files_that_mention(*names: str) -> set[str]:
    """Return the modules that import one of `names`, or that use one as an attribute of a module."""

    def mentioned(node: ast.AST) -> set[str]:
        if isinstance(node, ast.Attribute):
            return {f"{getattr(node.value, 'id', '')}.{node.attr}"}
        if isinstance(node, ast.Import):
            return {alias.name for alias in node.names}
        return {f"{node.module}"} if isinstance(node, ast.ImportFrom) else set()

    trees = {module: ast.walk(ast.parse(path.read_text())) for module, path in FILES.items()}
    return {module for module, nodes in trees.items() if any(mentioned(node) & set(names) for node in nodes)}


def test_only_these_read_the_environment_and_the_command_line():
    readers = files_that_mention("os.environ", "os.getenv", "os.environb")
    assert readers <= {"cifar.cli", "cifar.distributed.environment", "cifar.records.wandb_logger"}
    assert files_that_mention("sys.argv", "tyro.cli", "argparse") == {"cifar.cli", "cifar.command"}
