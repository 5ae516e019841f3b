"""launch/warm_torchrun.py: forked ranks are to torchrun, and to themselves, what started ones are."""

import importlib.util
import json
import os
import signal
import sys
from multiprocessing import Pipe

import psutil
import pytest
import torch
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

from tests.helpers.forking import fork, wait
from tests.helpers.processes import ROOT, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has subreapers")

SPEC = importlib.util.spec_from_file_location("warm_torchrun", ROOT / "launch" / "warm_torchrun.py")
warm_torchrun = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(warm_torchrun)

SCRIPT = """
import json, os, sys, time
facts = [sys.argv[1:], os.environ["RANK"], os.getppid(), os.getsid(0) == os.getpid(), __name__, "torch" in sys.modules]
os.write(1, json.dumps(facts).encode())
time.sleep(float(sys.argv[1]))
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def server(monkeypatch):
    """Let this process be torchrun's agent; yield the process ID of its fork server."""
    monkeypatch.setattr(SubprocessHandler, "_popen", SubprocessHandler._popen)  # restores it
    agent, (connection, requests) = os.getpid(), Pipe()

    def work():
        connection.close()
        try:
            warm_torchrun.run_script(warm_torchrun.serve(agent, requests))
        except SystemExit as end:
            os._exit(end.code)

    pid = fork(work)
    requests.close()
    warm_torchrun.fork_ranks(connection)
    yield pid
    connection.close()
    assert wait(pid) in (0, -signal.SIGKILL), "it ends with its agent"


@pytest.fixture
def start(tmp_path):
    script, output = tmp_path / "script.py", tmp_path / "stdout.txt"
    script.write_text(SCRIPT)

    def start(*flags):
        handler = SubprocessHandler(
            sys.executable, ("-u", str(script), *flags), {"RANK": "7"}, str(output), "", 0, None
        )
        return handler, lambda: json.loads(output.read_text())

    return start


def test_rank_is_forked_and_a_child_of_the_agent(server, start):
    for _ in range(2):
        handler, facts = start("0", "3")
        assert handler.proc.wait(20) == 3
        assert facts() == [["0", "3"], "7", os.getpid(), True, "__main__", True]
    handler, _ = start("60", "0")
    assert handler.proc.poll() is None
    assert psutil.Process(handler.proc.pid).name() == "rank 7"
    handler.close(signal.SIGKILL)
    assert handler.proc.wait(20) == -signal.SIGKILL


@pytest.mark.parametrize("reason", ["the server is gone", "CUDA"])
def test_rank_starts_cold_if_it_cannot_be_forked(reason, monkeypatch, request, start, capfd):
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: reason == "CUDA")
    server = request.getfixturevalue("server")
    if reason != "CUDA":
        os.kill(server, signal.SIGKILL)
    for _ in range(2):
        handler, facts = start("0", "3")
        assert handler.proc.wait(20) == 3
        assert facts() == [["0", "3"], "7", os.getpid(), True, "__main__", False]
    assert capfd.readouterr().err == "warm_torchrun.py: no rank can be forked: they start cold\n"


PRELOAD = """
import os, runpy, sys, threading
import torch, torch.distributed.run
asked = []
torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = lambda: asked.append("CUDA")
threads = torch.get_num_threads()
preload = runpy.run_path("launch/warm_torchrun.py")["preload"]
flags = sys.argv[1:]
preload(flags)
assert not asked, asked
assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1
assert torch.get_num_threads() == threads
before = set(sys.modules)
torch.cuda.is_available, torch.cuda.device_count = lambda: False, lambda: 0
from cifar.datasets import synthetic
synthetic.make_synthetic = None
import cifar.run, train_ddp
def after_step(run):
    imported = set(sys.modules) - before - {"train_ddp"}
    os.write(1, f"{len(imported)} modules: {sorted(imported)}".encode())
    os._exit(0)
cifar.run.Run.after_step = after_step
train_ddp.main(flags)
"""


def test_fork_server_imports_all_and_has_no_threads_and_no_cuda(tmp_path):
    flags = ["--dataset", "synthetic", "--device", "cpu", "--wandb", "offline", "--run-dir", str(tmp_path / "run")]
    output = run([sys.executable, "-c", PRELOAD, *flags], ROOT)
    assert output.returncode == 0, output.stderr
    assert int(output.stdout.splitlines()[-1].partition(" modules")[0]) < 9, output.stdout
