"""launch/slurm.sbatch on a real SLURM: two nodes, a job asked to stop ahead of its time limit, one requeued."""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.helpers.disturb import FLAGS
from tests.helpers.processes import ROOT, records, result
from tests.helpers.slurm import Cluster, why_not

pytestmark = pytest.mark.cluster
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
SCRIPT = "launch/slurm.sbatch"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if (missing := why_not()) is not None:
        pytest.skip(missing)
    with Cluster(tmp_path_factory.mktemp("slurm"), PATH) as made:
        yield made


@pytest.fixture
def project(tmp_path):
    """A folder to submit from, which is this project's."""
    for name in ("launch", "cifar", "train_ddp.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def said(project, job):
    with suppress(FileNotFoundError):
        return (project / f"slurm-{job}.txt").read_text()
    return ""


def wait(reached, what, timeout=120):
    began = time.monotonic()
    while not reached():
        assert time.monotonic() - began < timeout, f"{what}: not within {timeout} s"
        time.sleep(0.3)


def test_two_nodes(cluster, project):
    job = cluster.submit("--nodes=2", SCRIPT, *FLAGS, "--max-steps", "50", cwd=project)
    wait(lambda: cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), "the end")
    assert cluster.state(job) == "COMPLETED", said(project, job)
    got = result(project / "runs" / f"slurm-{job}")
    assert (got["world_size"], got["steps"]) == (2, 50)
    assert "2 processes on CPU (gloo), 1 thread each, on 2 hosts" in said(project, job)


def test_nothing_is_lost_when_a_job_is_stopped_or_requeued(cluster, project):
    """Asked to stop as ahead of the time limit, and the next time taken away, in the middle."""
    job = cluster.submit(SCRIPT, *FLAGS, "--checkpoint-steps", "5000", "--max-steps", "9000", cwd=project)
    run_dir = project / "runs" / f"slurm-{job}"

    def trained(step):
        wait(lambda: f"{step}] loss:" in said(project, job), f"step {step}: {said(project, job)[-2000:]}")

    trained(100)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    wait(lambda: "back into the queue" in said(project, job), "the requeue")
    assert "Stopped by SIGUSR1 after step" in said(project, job)
    wait(lambda: said(project, job).count("processes   ") == 2, f"the second start: {said(project, job)[-2000:]}")
    stopped = int(said(project, job).split("after step ")[1].split(" of")[0].replace(",", ""))
    trained(stopped // 20 * 20 + 200)
    cluster.run("scontrol", "requeue", job)
    wait(lambda: cluster.state(job) == "COMPLETED", f"the end: {said(project, job)[-2000:]}")
    assert said(project, job).count("processes   ") == 3
    steps = [step for step, _ in records(run_dir, "train/loss")]
    assert steps == list(range(20, 9001, 20)), "each log point once"
    assert result(run_dir)["steps"] == 9000


def test_a_mistake_ends_the_job_for_good(cluster, project):
    job = cluster.submit(SCRIPT, "--epochs", "0", cwd=project)
    wait(lambda: cluster.state(job) == "FAILED", "the end")
    assert said(project, job).count("train_ddp.py: error: --epochs is 0: it must be at least 1") >= 1
    assert "back into the queue" not in said(project, job)
