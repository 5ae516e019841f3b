"""launch/slurm.sbatch on a real SLURM with two nodes: time limit, requeue, mistakes."""

import subprocess
import sys

import pytest

from tests.helpers.disturb import FLAGS, Log
from tests.helpers.processes import PATH, ROOT, records, result
from tests.helpers.slurm import Cluster, why_not

pytestmark = pytest.mark.cluster

SCRIPT = "launch/slurm.sbatch"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if (missing := why_not()) is not None:
        pytest.skip(missing)
    with Cluster(tmp_path_factory.mktemp("slurm"), PATH) as started:
        yield started


@pytest.fixture
def project(tmp_path):
    """Return a copy of the project's directory, from which jobs are submitted."""
    for name in ("launch", "cifar", "train_ddp.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


class Job(Log):
    """A job of this project, and what it prints."""

    def __init__(self, cluster, project, *arguments):
        self.cluster, self.number = cluster, cluster.submit(*arguments, cwd=project)
        self.run_dir = project / "runs" / f"slurm-{self.number}"
        super().__init__(project / f"slurm-{self.number}.txt")

    def until_state(self, state):
        self.until(lambda: self.cluster.state(self.number) == state, state, timeout=200)


def test_two_nodes(cluster, project):
    job = Job(cluster, project, "--nodes=2", SCRIPT, *FLAGS, "--max-steps", "50")
    job.until_state("COMPLETED")
    got = result(job.run_dir)
    assert (got["world_size"], got["steps"]) == (2, 50)
    assert "2 processes on CPU (gloo), 1 thread each, on 2 hosts" in job.output()


def test_time_limit_and_requeue_lose_nothing(cluster, project):
    """Stop a job with the signal that SLURM sends before its time limit, then requeue it while it trains."""
    job = Job(cluster, project, SCRIPT, *FLAGS, "--checkpoint-steps", "5000", "--max-steps", "6000")
    job.until_line("100] loss:")
    cluster.run("scancel", "--signal=USR1", "--batch", job.number)
    job.until_line("slurm.sbatch: requeued")
    assert "Stopped by SIGUSR1 after step" in job.output()
    job.until_line("processes 1 process on", 2)
    stopped = int(job.output().split("after step ")[1].split(" of")[0].replace(",", ""))
    job.until_line(f"{stopped // 20 * 20 + 200}] loss:")
    cluster.run("scontrol", "requeue", job.number)
    job.until_state("COMPLETED")
    assert job.output().count("processes 1 process on") == 3
    assert [step for step, _ in records(job.run_dir, "train/loss")] == list(range(20, 6001, 20))
    assert result(job.run_dir)["steps"] == 6000


def test_mistake_is_not_requeued(cluster, project):
    job = Job(cluster, project, SCRIPT, "--epochs", "0")
    job.until_state("FAILED")
    assert "train_ddp.py: error: --epochs is 0: it must be at least 1" in job.output()
    assert "slurm.sbatch: requeued" not in job.output()


def test_srun_of_several_tasks_is_refused_once(cluster, tmp_path):
    """Each task would train alone. One task is a single process; tests/unit/test_environment.py has other cases."""
    flags = ("--device", "cpu", "--dataset", "synthetic", "--max-steps", "1", "--wandb", "disabled")
    alone = (sys.executable, "-m", "tests.helpers.small", *flags)
    with pytest.raises(subprocess.SubprocessError) as refused:
        cluster.run("srun", "--ntasks=2", *alone, cwd=tmp_path)
    assert str(refused.value).count("train_ddp.py: error: srun started 2 processes, which would train separately") == 1
    assert not (tmp_path / "runs").exists()
    assert "1 process on CPU" in cluster.run("salloc", "--ntasks=2", "srun", "--ntasks=1", *alone, cwd=tmp_path)
