"""launch/kubernetes.yaml and launch/skypilot.yaml: their own commands, as these engines run them on two nodes.

The engines are not here: a node is a network namespace with the names and the variables that its engine gives it.
"""

import shlex
import signal
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import yaml

from cifar.checkpoint import checkpoints
from tests.helpers.comparing import numbers
from tests.helpers.disturb import FLAGS, Started
from tests.helpers.hosts import ADDRESSES
from tests.helpers.processes import PATH, ROOT, kill_tree, torchrun

PROCESSES = "2"  # on each node, instead of four GPUs
# Appended to the flags in the files: the last value of a flag counts.
SMALL = [*FLAGS, "--model", "net", "--precision", "fp32", "--local-batch-size", "4", "--max-steps", "400"]


def kubernetes_documents():
    documents = list(yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["TrainingRuntime", "TrainJob"], "refused in another order"
    return documents


def kubernetes():
    """Return what concerns a TrainJob, one of whose pods gets SIGTERM."""
    runtime, job = kubernetes_documents()
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod, trainer = node["template"]["spec"]["template"]["spec"], job["spec"]["trainer"]
    # As Trainer's plugin for torch sets them.
    variables = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": PROCESSES, "PET_MASTER_PORT": "29500",
                 "PET_MASTER_ADDR": "cifar-ddp-node-0-0.cifar-ddp"}  # fmt: skip
    own = {each["name"]: each["value"] for each in trainer["env"] if "value" in each}
    return SimpleNamespace(
        command="exec " + shlex.join([*trainer["command"], *trainer["args"]]),  # for bash
        volume=pod["containers"][0]["volumeMounts"][0]["mountPath"],  # the directory that the nodes share
        variables=lambda rank, addresses: {**own, **variables, "PET_NODE_RANK": str(rank)},
        preempt=lambda node: node.process.send_signal(signal.SIGTERM),
        seconds=pod["terminationGracePeriodSeconds"],  # in which both nodes end
        statuses=[1, 1],
        message="Stopped by SIGTERM after step {step} of 400",  # of the run that ends, with its last checkpoint
    )


def skypilot():
    """Return what concerns a managed job, one of whose machines is gone without a signal."""
    task = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())
    variables = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": PROCESSES}
    return SimpleNamespace(
        command=task["run"],
        volume=next(iter(task["file_mounts"])),
        variables=lambda rank, addresses: {
            **variables, "SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NODE_IPS": "\n".join(addresses)
        },
        preempt=lambda node: kill_tree(node.agent),
        seconds=60,
        statuses=[1, -signal.SIGKILL],
        message="another process of this run is gone",
    )  # fmt: skip


@contextmanager
def nodes(engine, hosts, addresses, folder):
    """Run the engine's command on two new nodes, in `folder`, which is also their volume. The first has rank 0."""
    command = f"{engine.command} {shlex.join(SMALL)}".replace(f"{engine.volume}/", f"{folder}/")
    names = [f"cifar-ddp-node-0-{rank}" for rank in range(2)]  # as Trainer and JobSet name pods
    lines = [f"{address} {name} {name}.cifar-ddp\n" for address, name in zip(addresses, names, strict=True)]
    (folder / "names").write_text("".join(["127.0.0.1 localhost\n", *lines]))
    with ExitStack() as started:
        pair = []
        for rank, address in enumerate(addresses):
            script = f"mount --bind names /etc/hosts; hostname {names[rank]}; {command}"
            line = hosts.on(ADDRESSES.index(address), "unshare", "--mount", "--uts", "bash", "-ec", script)
            variables = {"PATH": PATH, "CUDA_VISIBLE_DEVICES": "", **engine.variables(rank, addresses)}
            pair.append(started.enter_context(Started(line, folder / f"node-{rank}.txt", **variables)))
        yield pair


@cache
def undisturbed(*flags):
    """Train with these flags on one host, and return the numbers."""
    with TemporaryDirectory() as folder:
        torchrun(4, *flags, *SMALL, "--run-dir", "run", cwd=Path(folder))
        return numbers(Path(folder) / "run")


@pytest.mark.cluster
@pytest.mark.timeout(900)  # eight torchruns, some of which start together
@pytest.mark.parametrize("engine", [kubernetes(), skypilot()], ids=["kubernetes", "skypilot"])
def test_run_continues_on_other_nodes(engine, hosts, tmp_path):
    for name in ("train_ddp.py", "launch"):  # in the working directory of the image, or in SkyPilot's workdir
        (tmp_path / name).symlink_to(ROOT / name)
    run_dir, *flags = shlex.split(engine.command.partition("--run-dir=")[2].replace("--autoresume", ""))
    run_dir = tmp_path / Path(run_dir).relative_to(engine.volume)

    with nodes(engine, hosts, ADDRESSES, tmp_path) as pair:
        pair[0].until_line("    40] loss:", timeout=200)
        engine.preempt(pair[1])
        assert [node.end(engine.seconds) for node in pair] == engine.statuses
        step = next(iter(checkpoints(run_dir)))
        assert engine.message.format(step=step) in pair[0].output()

    for addresses, message in ((ADDRESSES[::-1], f"resumes   after step {step} of 400"), (ADDRESSES, "has finished")):
        with nodes(engine, hosts, addresses, tmp_path) as pair:
            statuses = [node.process.wait(200) for node in pair]
            output = pair[0].output() + pair[1].output()
            assert statuses == [0, 0], output
            assert message in output
    assert numbers(run_dir) == undisturbed(*flags)


def test_kubernetes_knows_every_field():
    """Its models drop the fields that they do not know."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    for document in kubernetes_documents():
        model = getattr(models, f"TrainerV1alpha1{document['kind']}")
        assert model.from_dict(document).to_dict() == document
