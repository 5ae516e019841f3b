"""Start the program as users do: as a process, or as several under torchrun."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # with this Python first


def clean_environment(**extra: str) -> dict[str, str]:
    """Return this environment without the variables of a launcher or of a W&B account."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ACCELERATE_", "TORCHELASTIC_", "SLURM_", "OMPI_",
            "PMI_", "PMIX_", "MV2_", "WANDB_", "OMP_NUM_THREADS")  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {"NETRC": os.devnull, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | extra


def rank_variables(rank: int, world_size: int, port: int = 29500, alone: bool = False) -> dict[str, str]:
    """Return the variables with which a launcher starts rank `rank` of `world_size`, on one host or `alone` on one."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    if alone:
        place |= {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    return {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def run(
    command: Sequence[object], cwd: Path, timeout: float = 240, status: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `command`, which must end with `status`, and return its output as text, with standard error apart."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env=clean_environment(**environment), capture_output=True, text=True, timeout=timeout,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == status, f"status {done.returncode}: {done.stdout}{done.stderr}"
    return done


def train(*flags: object, cwd: Path, processes: int = 1, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run `python train_ddp.py FLAGS` or, with several processes, `torchrun`; on the CPU and without W&B by default."""
    if processes > 1:
        return torchrun(processes, *flags, cwd=cwd, **how)
    return run([sys.executable, ROOT / "train_ddp.py", *_with_defaults(flags)], cwd, **how)


def torchrun(
    processes: int, *flags: object, cwd: Path, script: Sequence[object] = (ROOT / "train_ddp.py",), **how: Any
) -> subprocess.CompletedProcess[str]:
    """Run `torchrun --nproc_per_node=PROCESSES train_ddp.py FLAGS`; on the CPU and without W&B by default."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return run([*launcher, *script, *_with_defaults(flags)], cwd, **how)


def _with_defaults(flags: Sequence[object]) -> list[str]:
    given = [str(flag) for flag in flags]
    defaults = {"--wandb": "disabled", "--device": "cpu"}
    return given + [part for name, value in defaults.items() if name not in given for part in (name, value)]


def left_of(processes: Iterable[psutil.Process], timeout: float) -> list[psutil.Process]:
    """Return those of `processes` that still run after `timeout` seconds.

    A zombie has ended, but psutil.wait_procs waits until its parent has read its status, which init may do late.
    """
    end = time.monotonic() + timeout
    while (left := [process for process in processes if _runs(process)]) and time.monotonic() < end:
        time.sleep(0.02)
    return left


def kill_tree(process: psutil.Process) -> None:
    """Kill a process and all that it has started, such as torchrun's ranks, which have sessions of their own."""
    with contextlib.suppress(psutil.Error):
        for each in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.Error):
                each.kill()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def records(run_dir: Path, name: str) -> list[tuple[int, Any]]:
    """Return (step, value) of every record of `name` in a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[name]) for line in lines if name in line]


def result(run_dir: Path) -> dict[str, Any]:
    """Return a run's result.json."""
    return json.loads((run_dir / "result.json").read_text())
