"""Processes and devices: what is asked for, what is there, and one voice about it."""

import os
import sys
from pathlib import Path

import pytest
import torch

from cifar.config import TrainConfig
from cifar.distributed.environment import Launch, threads_per_process
from cifar.distributed.runtime import Runtime, choose_device
from cifar.errors import UserError
from tests.helpers.processes import ROOT, run


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_auto_takes_the_gpu_then_mps_then_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("auto", Launch()) == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto", Launch()) == "mps"
    assert choose_device("auto", Launch(world_size=2, local_world_size=2)) == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto", Launch()) == "cpu"


def test_more_processes_than_gpus_names_both_counts(two_gpus):
    assert choose_device("auto", Launch(world_size=8, local_world_size=2)) == "cuda"
    with pytest.raises(UserError, match=r"3 processes .* 2 GPU"):
        choose_device("auto", Launch(world_size=3, local_world_size=3))
    assert choose_device("cpu", Launch(world_size=3, local_world_size=3)) == "cpu"


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(no_gpu, device):
    with pytest.raises(UserError, match=f"--device {device}.*--device cpu"):
        choose_device(device, Launch())


def test_fp16_needs_a_gpu():
    with pytest.raises(UserError, match=r"fp16.*bf16"):
        Runtime(TrainConfig(device="cpu", precision="fp16"))


def test_the_launch_is_read_from_the_launchers_variables(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Launch.from_environment() == Launch(0, 0, 1, 1)
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert Launch.from_environment() == Launch(5, 1, 8, 4)


def test_a_launcher_that_started_fewer_than_it_was_asked_for(monkeypatch):
    # What `accelerate launch --cpu --num_processes 2` leaves in the environment of its single process.
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    Launch.from_environment().check()  # --num_processes 1 sets no address
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UserError, match="torchrun"):
        Launch.from_environment().check()


def test_threads_are_the_hosts_cores_divided(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [threads_per_process(n) for n in (1, 2, 3, 16)] == [8, 4, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torchrun's own setting, which means nothing
    assert threads_per_process(2) == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's
    assert threads_per_process(2) == 3


def test_what_torchrun_says_of_its_restarts_is_known(monkeypatch):
    for name, value in {"RUN_ID": "none", "MAX_RESTARTS": "3", "RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("GROUP_RANK", "2")
    launch = Launch.from_environment()
    assert (launch.elastic, launch.restarts_left, launch.host) == (True, 2, 2)
    assert launch.agent() == launch.agent()
    assert launch.agent_pid == os.getppid()
    assert f":{os.getppid()}:" in str(launch.agent())
    assert Launch().agent() is None


def test_one_process_has_no_process_group_and_no_wrapper(runtime):
    net = torch.nn.Linear(2, 2)
    assert runtime.wrap(net) is net
    assert not torch.distributed.is_initialized()
    assert (runtime.rank, runtime.world_size, runtime.is_main) == (0, 1, True)
    assert runtime.gather("x") == ["x"]
    assert runtime.from_main(3) == 3
    assert runtime.mean(torch.tensor(2.0)) == 2


def test_together_passes_a_mistake_on(runtime):
    with pytest.raises(UserError, match=r"^oh$"), runtime.fail_together():
        raise UserError("oh")
    with runtime.fail_together():
        pass


def test_accelerate_launch_on_the_cpu_is_refused_not_run_once(tmp_path):
    """The trap itself: accelerate starts one process for `--num_processes 2` and says nothing."""
    done = run(
        [
            Path(sys.executable).with_name("accelerate"),
            "launch",
            "--cpu",
            "--num_processes",
            "2",
            ROOT / "train_ddp.py",
            "--max-steps",
            "1",
        ],
        tmp_path,
    )
    assert "accelerate launch was asked for several processes and started only this one" in done.stderr
    assert "loss" not in done.stdout
    assert not (tmp_path / "runs").exists()
