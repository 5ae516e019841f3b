"""launch/multi_node.sh on two hosts that have addresses, a cable between them and nothing else in common."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from cifar.datasets.cifar10 import FOLDER
from tests.helpers.disturb import FLAGS
from tests.helpers.hosts import ADDRESSES, Hosts, why_not
from tests.helpers.processes import ROOT, clean_environment, records, result, torchrun

pytestmark = pytest.mark.cluster
# A rate at which rounding, which differs with the order of summation, doesn't grow.
MODEST = ["--lr", "0.0002", "--lr-scaling", "none", "--global-batch-size", "8", "--local-batch-size", "4"]
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture
def hosts():
    if (missing := why_not()) is not None:
        pytest.skip(missing)
    with Hosts() as made:
        yield made


class Started:
    """`launch/multi_node.sh` on one host, with its output in a file."""

    def __init__(self, hosts: Hosts, host: int, nodes: str, *flags: object, cwd: Path, root: Path = ROOT) -> None:
        self.log = cwd / f"host-{host}.txt"
        command = hosts.on(host, root / "launch" / "multi_node.sh", ADDRESSES[0], nodes, *flags)
        environment = clean_environment(PATH=PATH, CUDA_VISIBLE_DEVICES="")
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )

    def said(self) -> str:
        return self.log.read_text()

    def until(self, text: str, timeout: float = 90) -> None:
        """Wait until `text` has been printed."""
        began = time.monotonic()
        while text not in self.said():
            assert time.monotonic() - began < timeout, f"no {text!r} within {timeout} s:\n{self.said()[-3000:]}"
            assert self.process.poll() is None, f"it ended without {text!r}:\n{self.said()[-3000:]}"
            time.sleep(0.1)

    def end(self, timeout: float = 120) -> int:
        return self.process.wait(timeout)

    def kill(self) -> None:
        with_children = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        for process in with_children:
            process.kill()
        self.process.kill()
        self.process.wait()


@contextmanager
def on_both(hosts, nodes, *flags, cwd, root=ROOT, **each):
    """The same command on both hosts; `each` names folders that are a host's own."""
    started = []
    try:
        for host in (0, 1):
            own = [part for name, folders in each.items() for part in (f"--{name.replace('_', '-')}", folders[host])]
            started.append(Started(hosts, host, nodes, *flags, *own, cwd=cwd, root=root))
        yield started
    finally:
        for one in started:
            one.kill()


def test_two_hosts_train_as_one_host_with_two_processes(hosts, tmp_path):
    flags = [*FLAGS, *MODEST, "--max-steps", "100"]
    with on_both(hosts, "2", *flags, "--run-dir", tmp_path / "two", cwd=tmp_path) as both:
        assert [one.end() for one in both] == [0, 0], both[0].said()
        assert "2 processes on CPU (gloo), 1 thread each, on 2 hosts" in both[0].said()
        assert "loss:" not in both[1].said(), "one voice"
    done = torchrun(2, *flags, "--run-dir", tmp_path / "one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert dict(records(tmp_path / "two", "train/loss")) == pytest.approx(
        dict(records(tmp_path / "one", "train/loss")), abs=1e-4
    )
    assert result(tmp_path / "two")["test_correct"] == pytest.approx(result(tmp_path / "one")["test_correct"], abs=5)


def test_a_run_survives_a_host_that_is_cut_off_and_comes_back(hosts, tmp_path):
    flags = [*FLAGS, *MODEST, "--max-steps", "6000", "--timeout", "8", "--run-dir", tmp_path / "run"]
    with on_both(hosts, "1:2", *flags, cwd=tmp_path) as both:
        both[0].until("2 processes on CPU")
        both[0].until("   100] loss:")
        hosts.cut()
        both[0].until("changed     world size 2 -> 1")
        assert "4 local x 1 process x 2 accumulated = 8 global" in both[0].said()
        hosts.mend()
        both[0].until("changed     world size 1 -> 2")
        assert [one.end() for one in both] == [0, 0], both[0].said()
    steps = [step for step, _ in records(tmp_path / "run", "train/loss")]
    assert steps == sorted(set(steps)), "no step is missing or recorded twice"
    assert result(tmp_path / "run")["steps"] == 6000


@pytest.mark.parametrize("shared", [True, False], ids=["shared folder", "a folder each"])
def test_who_downloads(hosts, real_data, tmp_path, shared):
    """One host where the folder is shared; each its own otherwise."""
    served = tmp_path / "served"
    served.mkdir()
    packed = served / "packed.tar.gz"
    with tarfile.open(packed, "w:gz", compresslevel=0) as tar:
        tar.add(real_data / FOLDER, FOLDER)
    url = f"http://{ADDRESSES[0]}:8000/packed.tar.gz"
    root = tmp_path / "root"  # the program, but for the archive that it expects
    shutil.copytree(ROOT / "launch", root / "launch")
    (root / "train_ddp.py").write_text(
        "import dataclasses, runpy\n"
        "import cifar.datasets.cifar10 as it\n"
        f"new = dict(size={packed.stat().st_size}, sha256={hashlib.sha256(packed.read_bytes()).hexdigest()!r})\n"
        f"it.ARCHIVE = dataclasses.replace(it.ARCHIVE, **new, urls=({url!r},))\n"
        f"runpy.run_path({str(ROOT / 'train_ddp.py')!r}, run_name='__main__')\n"
    )
    log = tmp_path / "server.txt"
    with log.open("w") as output:
        command = hosts.on(0, sys.executable, "-um", "http.server", "--bind", ADDRESSES[0], "8000")
        server = subprocess.Popen(command, cwd=served, stdout=output, stderr=subprocess.STDOUT)
    folders = [tmp_path / "data", tmp_path / ("data" if shared else "data of host 1")]
    flags = ["--device", "cpu", "--wandb", "disabled", "--dataset", "cifar10", "--max-steps", "2", "--run-dir", "run"]
    try:
        with on_both(hosts, "2", *flags, cwd=tmp_path, root=root, data_dir=folders) as both:
            assert [one.end() for one in both] == [0, 0], both[0].said()
            assert "50,000 training, 10,000 test" in both[0].said()
    finally:
        server.kill()
        server.wait()
    assert log.read_text().count("GET /packed.tar.gz") == (1 if shared else 2)


def test_the_slow_link_benchmark(monkeypatch, capsys):
    """Its rates are real: 62,006 gradients of 32 bits take 0.2 s at 10 Mbit/s."""
    from tests.benchmarks import slow_link

    if (missing := why_not()) is not None:
        pytest.skip(missing)
    monkeypatch.setattr(slow_link, "HOOKS", ("none",))
    monkeypatch.setattr(slow_link, "WARM_UP", 4)
    flags = ["--rates", "10", "--model", "net", "--batch", "4", "--steps", "8"]
    monkeypatch.setattr(sys, "argv", ["slow_link", *flags])
    slow_link.main()
    unlimited, slow = (
        float(line.split("|")[2].split()[0].replace(",", "")) for line in capsys.readouterr().out.splitlines()[-2:]
    )
    bound = 2 * 4 / (62_006 * 32 / 10e6)  # images/s, were nothing but the link to take time
    assert slow < 1.2 * bound < unlimited
