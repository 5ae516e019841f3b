"""Real torchrun runs that are killed, signalled and frozen: nothing is lost. tests/cluster has hosts that leave."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from cifar.checkpoint import checkpoint_path, checkpoints, load_checkpoint
from cifar.distributed.preemption import _GRACE_SECONDS
from tests.helpers.disturb import FLAGS, Watched, send
from tests.helpers.processes import ROOT, left_of
from tests.helpers.soak import soak

pytestmark = pytest.mark.slow

TWO = ["--standalone", "--nproc_per_node=2"]
# Number of ranks, restarts, who is signalled (torchrun, the last rank, or all ranks), and whether restarts are warm.
STOPS = (
    *((2, 3, "rank", False), (2, 0, "rank", False), (1, 3, "ranks", True), (2, 3, "torchrun", False)),
    *((2, 3, "rank", True), (2, 3, "torchrun", True)),
)


@contextmanager
def training(folder, *flags, launcher=TWO, script=(str(ROOT / "train_ddp.py"),), warm=False):
    """Yield a run that trains until it is disturbed; kill what is left of it at the end."""
    run_dir = folder / "run"
    with Watched(run_dir, [*FLAGS, *flags, "--run-dir", str(run_dir)], launcher, script=script, warm=warm) as run:
        run.until_step(20)
        yield run


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory):
    """Run them two at a time: most of their time is waiting, for processes to start or for a frozen one."""
    with ThreadPoolExecutor(2) as pool:
        running = {warm: pool.submit(short_soak, tmp_path_factory.mktemp("soak"), warm) for warm in (False, True)}
        alone = killed_under_an_endless_step
        running[alone] = pool.submit(alone, tmp_path_factory.mktemp("killed"))
        stops = {case: pool.submit(stopped, tmp_path_factory.mktemp("stopped"), *case) for case in STOPS}
        yield running | stops


def short_soak(folder, warm):
    """Disturb three ranks SOAK_DISTURBANCES times; by hand: python -m tests.helpers.soak."""
    seed = 33 if warm else 1  # what the test asserts is among the first three disturbances
    return soak(folder, int(os.environ.get("SOAK_DISTURBANCES", 3)), seed, seconds=600, ranks=3, warm=warm)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_run_disturbed_at_random_equals_the_undisturbed_one(scenarios, warm):
    kinds = {each.kind for each in scenarios[warm].result()["disturbances"]}
    assert kinds >= ({"freeze", "kill torchrun"} if warm else {"freeze", "damage", "held GIL"})


def stopped(folder, processes, restarts, whom, warm):
    """Send a signal."""
    launcher = ["--standalone", f"--nproc_per_node={processes}", f"--max-restarts={restarts}"]
    with training(folder, "--max-steps", "20000", launcher=launcher, warm=warm) as run:
        ranks = run.ranks()
        for process in {"torchrun": [run.agent], "rank": ranks[-1:], "ranks": ranks}[whom]:
            send(process, signal.SIGTERM if whom == "torchrun" else signal.SIGUSR1)
        late = left_of(ranks, 10)
        status = run.end(20)
        return run.run_dir, run.output(), status, late


@pytest.mark.parametrize("case", STOPS, ids=str)
def test_stopped_run_is_not_finished_and_not_restarted(scenarios, case):
    """Status 0 would mean finished, and torchrun restarts after any other, unless it is asked to stop, too."""
    run_dir, text, status, late = scenarios[case].result()
    assert status == 1, "torchrun's for every failure"
    assert late == []
    assert text.count("\ndataset   synthetic: ") == 1, "one banner: no restart"
    (line,) = [line for line in text.splitlines() if "Stopped by" in line]
    step = line.split("after step ")[1].split(" of")[0]
    name = "SIGTERM" if case[2] == "torchrun" else "SIGUSR1"
    assert line == f"Stopped by {name} after step {step} of 20,000; to continue: --resume {run_dir}"
    newest = next(iter(checkpoints(run_dir)))
    assert newest == int(step.replace(",", ""))
    assert load_checkpoint(checkpoint_path(run_dir, newest))["state"]["step"] == newest
    assert "quitting" not in text
    assert "Traceback" not in text.split(line)[0], "torchrun's own follows"


def killed_under_an_endless_step(folder):
    """Kill rank one while rank zero's step waits for it without an end, as NCCL's kernels would."""
    driver = folder / "driver.py"
    driver.write_text(
        "import time, train_ddp\n"
        "from cifar.run import Run\n"
        "after_step = Run.after_step\n"
        "def wait(run):\n"
        "    while run.state.step == 40 and run.runtime.is_main:\n"
        "        time.sleep(1)\n"
        "    return after_step(run)\n"
        "Run.after_step = wait\n"
        "train_ddp.main()\n"
    )
    with training(folder, "--max-steps", "60", script=[str(driver)]) as run:
        ranks = run.ranks()
        time.sleep(1)
        send(ranks[1], signal.SIGKILL)
        began = time.monotonic()
        late = left_of(ranks, 30)
        return run.end(20), run.output(), late, time.monotonic() - began


def test_rank_does_not_wait_for_a_killed_one(scenarios):
    status, text, late, seconds = scenarios[killed_under_an_endless_step].result()
    assert status == 1
    assert late == []
    assert seconds < _GRACE_SECONDS / 2
    last = "SIGTERM, and another process of this run is gone: quitting\n"
    assert text.count(last) == 1
    assert "Traceback" not in text.split(last)[0]
