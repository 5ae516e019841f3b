"""launch/warm_torchrun.py: forked ranks are to torchrun, and to themselves, what started ones are."""

import importlib.util
import json
import logging
import os
import sys

import pytest
import torch

from tests.helpers.forking import fork, wait
from tests.helpers.processes import ROOT, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has subreapers")

SCRIPT = """
import json, os, psutil, sys
rank, agent = psutil.Process(), psutil.Process().parent()
facts = [sys.argv[2:], agent.pid, os.getsid(0) == rank.pid, __name__, rank.name() == "rank 0", "torch" in sys.modules]
with open("facts.txt", "a") as file:
    print(json.dumps(facts), file=file)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    if sys.argv[1] == "no server":
        [server] = [child for child in agent.children() if child.name() == "fork server"]
        server.kill()
    sys.exit(3)
"""


@pytest.mark.parametrize(
    ("case", "forked"),
    [("", [True, True]), ("no server", [True, False]), ("CUDA", [False, False]), ("redirected", [False, False])],
)
def test_rank_is_forked_if_it_can_be(case, forked, monkeypatch, tmp_path, capfd):
    """It is a child of the agent, leads a session and has its own exit status; it fails once and is restarted."""
    spec = importlib.util.spec_from_file_location("warm_torchrun", ROOT / "launch" / "warm_torchrun.py")
    warm_torchrun = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(warm_torchrun)
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: case == "CUDA")
    monkeypatch.setattr(warm_torchrun, "_ANSWER_SECONDS", 10 if forked[0] else 0.3)
    redirects = ["--redirects=3"] if case == "redirected" else []
    flags = ["--standalone", "--nproc_per_node=1", "--max-restarts=1", *redirects, "script.py", case, "--flag"]
    monkeypatch.setattr(sys, "argv", ["warm_torchrun.py", *flags])

    def work():
        torchrun_log.addHandler(logging.StreamHandler(os.fdopen(2, "w")))
        try:
            warm_torchrun.main()
        except SystemExit as end:
            os._exit(end.code)

    torchrun_log = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    agent = fork(work)
    assert wait(agent) == 0
    facts = [json.loads(line) for line in (tmp_path / "facts.txt").read_text().splitlines()]
    assert facts == [[["--flag"], agent, True, "__main__", warm, warm] for warm in forked]
    assert "failed (exitcode: 3) local_rank: 0" in capfd.readouterr().err


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
import cifar.datasets, cifar.run, train_ddp
load = cifar.datasets.DATASETS["synthetic"]
images = load(cifar.cli.parse_args(flags)).train[0]
assert load(cifar.cli.parse_args([*flags, "--data-dir", "other"])).train[0] is not images
def after_step(run):
    assert run.data.train.dataset.images.data_ptr() == images.data_ptr(), "the images are not shared"
    imported = set(sys.modules) - before - {"train_ddp"}
    os.write(1, f"{len(imported)} modules: {sorted(imported)}".encode())
    os._exit(0)
cifar.run.Run.after_step = after_step
train_ddp.main(flags)
"""


def test_fork_server_imports_all_and_has_no_threads_and_no_cuda(tmp_path):
    flags = ["--dataset", "synthetic", "--device", "cpu", "--wandb", "offline", "--run-dir", str(tmp_path / "run")]
    output = run([sys.executable, "-c", PRELOAD, *flags], ROOT)
    assert int(output.stdout.splitlines()[-1].partition(" modules")[0]) < 9, output.stdout
