"""launch/kubernetes.yaml and launch/skypilot.yaml: their own commands, as these engines run them on two nodes.

The engines themselves are not here. A node is a network namespace with the names and variables that its engine gives it.
"""

import os
import shlex
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml

from cifar.checkpoint import checkpoints
from tests.helpers.comparing import numbers
from tests.helpers.disturb import FLAGS, Started
from tests.helpers.hosts import ADDRESSES, Hosts, why_not
from tests.helpers.processes import ROOT, kill_tree, torchrun

PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
PROCESSES = "2"  # of each node, instead of four GPUs
# Added to the flags in the files, and instead of some: the last one counts.
SMALL = [*FLAGS, "--model", "net", "--precision", "fp32", "--local-batch-size", "4", "--max-steps", "1000"]


@dataclass(frozen=True)
class Engine:
    """What a file of launch/ says, and what its engine does with it."""

    command: str  # for bash
    volume: str  # the directory that all nodes share
    variables: Callable[[int, list[str]], dict[str, str]]  # of a node, from its rank and the addresses of all
    names: str  # a node's /etc/hosts, with its rank, its own address and the first node's
    preempt: Callable[[Started], None]
    seconds: int  # in which all nodes end then
    statuses: list[int]
    message: str  # of the run that ends, with the step of its last checkpoint


def kubernetes() -> Engine:
    """Return a TrainJob: a pod gets SIGTERM."""
    runtime, job = kubernetes_documents()
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod, trainer = node["template"]["spec"]["template"]["spec"], job["spec"]["trainer"]
    name = f"{job['metadata']['name']}-{node['name']}-0"

    def variables(rank: int, addresses: list[str]) -> dict[str, str]:
        torch_plugin = {"NNODES": str(len(addresses)), "NPROC_PER_NODE": PROCESSES, "NODE_RANK": str(rank),
                        "MASTER_ADDR": f"{name}-0.{job['metadata']['name']}", "MASTER_PORT": "29500"}  # fmt: skip
        own = {each["name"]: each["value"] for each in trainer["env"] if "value" in each}
        return {f"PET_{key}": value for key, value in torch_plugin.items()} | own

    return Engine(
        command="exec " + shlex.join([*trainer["command"], *trainer["args"]]),
        volume=pod["containers"][0]["volumeMounts"][0]["mountPath"],
        variables=variables,
        names=f"{{own}} {name}-{{rank}}\n{{first}} {name}-0.{job['metadata']['name']}",
        preempt=lambda pod: pod.process.send_signal(signal.SIGTERM),
        seconds=pod["terminationGracePeriodSeconds"],
        statuses=[1, 1],
        message="Stopped by SIGTERM after step {step} of 1,000",
    )


def skypilot() -> Engine:
    """Return a managed job: a machine is gone, without a signal."""
    task = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())

    def variables(rank: int, addresses: list[str]) -> dict[str, str]:
        values = {"NODE_RANK": str(rank), "NODE_IPS": "\n".join(addresses), "NUM_NODES": str(len(addresses)),
                  "NUM_GPUS_PER_NODE": PROCESSES}  # fmt: skip
        return {f"SKYPILOT_{key}": value for key, value in values.items()}

    (volume,) = task["file_mounts"]
    return Engine(
        command=task["run"],
        volume=volume,
        variables=variables,
        names="127.0.1.1 node-{rank}",  # in the images of Debian and Ubuntu
        preempt=lambda node: kill_tree(node.agent),
        seconds=60,
        statuses=[1, -signal.SIGKILL],
        message="another process of this run is gone",
    )


def kubernetes_documents():
    """Return the TrainingRuntime and the TrainJob, in this order, as the one must exist before the other."""
    documents = list(yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["TrainingRuntime", "TrainJob"]
    return documents


@contextmanager
def nodes(engine, hosts, addresses, folder):
    """Run the engine's command on two new nodes, with `folder` as their volume; rank 0 has the first address."""
    for name in ("train_ddp.py", "launch"):  # the working directory of the image, or SkyPilot's workdir
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(ROOT / name)
    command = f"{engine.command} {shlex.join(SMALL)}".replace(f"{engine.volume}/", f"{folder}/")
    with ExitStack() as started:
        pair = []
        for rank, address in enumerate(addresses):
            names = folder / f"names-{rank}"
            host_name = engine.names.format(rank=rank, own=address, first=addresses[0])
            names.write_text(f"127.0.0.1 localhost\n{host_name}\n")
            script = f"mount --bind {names} /etc/hosts; hostname {host_name.split()[1]}; {command}"
            line = hosts.on(ADDRESSES.index(address), "unshare", "--mount", "--uts", "bash", "-ec", script)
            variables = {"PATH": PATH, "CUDA_VISIBLE_DEVICES": "", **engine.variables(rank, addresses)}
            pair.append(Started(line, folder / f"node-{rank}.txt", **variables))
            started.callback(pair[-1].kill)
        yield pair


@pytest.fixture
def hosts():
    if (missing := why_not()) is not None:
        pytest.skip(missing)
    with Hosts() as two:
        yield two


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return a function that trains with these flags on one host, without a stop, and returns the numbers."""

    @cache
    def train(*flags):
        folder = tmp_path_factory.mktemp("undisturbed")
        done = torchrun(4, *flags, *SMALL, "--run-dir", folder / "run", cwd=folder)
        assert done.returncode == 0, done.stderr
        return numbers(folder / "run")

    return train


@pytest.mark.cluster
@pytest.mark.parametrize("engine", [kubernetes, skypilot])
def test_run_continues_on_other_nodes(engine, hosts, undisturbed, tmp_path):
    engine = engine()
    run_dir, *flags = shlex.split(engine.command.partition("--run-dir=")[2].replace("--autoresume", ""))
    run_dir = tmp_path / Path(run_dir).relative_to(engine.volume)

    with nodes(engine, hosts, list(ADDRESSES), tmp_path) as pair:
        pair[0].until_line("   100] loss:")
        engine.preempt(pair[1])
        assert [node.end(engine.seconds) for node in pair] == engine.statuses
        step = next(iter(checkpoints(run_dir)))
        assert engine.message.format(step=f"{step:,}") in pair[0].output()

    with nodes(engine, hosts, list(reversed(ADDRESSES)), tmp_path) as pair:
        assert [node.process.wait(120) for node in pair] == [0, 0], pair[0].output() + pair[1].output()
        assert f"resumes   after step {step:,} of 1,000" in pair[0].output() + pair[1].output()
    assert numbers(run_dir) == undisturbed(*flags)

    with nodes(engine, hosts, list(ADDRESSES), tmp_path) as pair:
        assert [node.process.wait(120) for node in pair] == [0, 0], pair[0].output() + pair[1].output()
        assert "has finished" in pair[0].output() + pair[1].output()


def test_kubernetes_knows_every_field():
    """Its models ignore unknown fields: none may be lost on the way through them."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    for document in kubernetes_documents():
        model = getattr(models, f"TrainerV1alpha1{document['kind']}")
        assert model.from_dict(document).to_dict() == document
