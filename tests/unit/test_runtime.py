"""The device that is chosen, and the collectives of a single process."""

from types import SimpleNamespace

import pytest
import torch

import train_ddp
from cifar.cli import launch
from cifar.config import TrainConfig
from cifar.distributed import device
from cifar.distributed.device import choose_device, choose_precision
from cifar.distributed.environment import Launch
from cifar.distributed.runtime import Runtime
from cifar.errors import UserError
from cifar.models import build_model
from tests.helpers.comparing import make_runs_tiny


def have(monkeypatch, gpus=0, mps=False):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def test_auto_prefers_cuda_then_mps_then_cpu(monkeypatch):
    two = Launch(world_size=2, local_world_size=2)
    for gpus, mps, processes, expected in ((1, True, Launch(), "cuda"), (0, True, Launch(), "mps"),
                                           (0, True, two, "cpu"), (0, False, Launch(), "cpu")):  # fmt: skip
        have(monkeypatch, gpus, mps)
        assert choose_device("auto", processes) == expected


def test_more_processes_than_gpus_names_both_counts(monkeypatch):
    have(monkeypatch, gpus=2)
    assert choose_device("auto", Launch(world_size=8, local_world_size=2)) == "cuda"
    with pytest.raises(UserError, match=r"3 processes .* 2 GPU"):
        choose_device("auto", Launch(world_size=3, local_world_size=3))
    assert choose_device("cpu", Launch(world_size=3, local_world_size=3)) == "cpu"


@pytest.mark.parametrize("hidden", [False, True])
def test_gpus_that_torch_cannot_use_are_not_passed_over(monkeypatch, tmp_path, hidden):
    """Unless they are hidden, by CUDA_VISIBLE_DEVICES, or the CPU is asked for."""

    def init():
        raise RuntimeError("No CUDA GPUs are available" if hidden else "The NVIDIA driver is too old\nmore")

    have(monkeypatch)
    (tmp_path / "0000:01:00.0").mkdir()
    monkeypatch.setattr(device, "_DRIVER", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    assert choose_device("cpu", Launch()) == "cpu"
    if hidden:
        assert choose_device("auto", Launch()) == "cpu"
    else:
        with pytest.raises(UserError, match="GPUs that torch cannot use: The NVIDIA driver is too old; or use"):
            choose_device("auto", Launch())


@pytest.mark.parametrize("wanted", ["cuda", "mps"])
def test_missing_device(monkeypatch, wanted):
    have(monkeypatch)
    with pytest.raises(UserError, match=f"--device {wanted}.*--device cpu"):
        choose_device(wanted, Launch())


@pytest.mark.parametrize(
    ("names", "onednn", "precision"),
    [
        ("avx2", True, "fp32"),
        ("avx512_bf16", True, "bf16"),
        ("bf16 neon", True, "bf16"),
        ("amx_bf16", False, "fp32"),
        ("bf16", None, "fp32"),  # torch on a Mac, which has no oneDNN
    ],
)
def test_auto_precision_of_a_cpu(monkeypatch, names, onednn, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names.split(), True))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn is not None)
    operators = {} if onednn is None else {"_is_mkldnn_bf16_supported": lambda: onednn}
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**operators))
    assert choose_precision("auto", "cpu") == precision
    assert choose_precision("fp32", "cpu") == "fp32"


def test_auto_precision_of_a_gpu(monkeypatch):
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert choose_precision("auto", "cuda") == ("bf16" if native else "fp32")
    assert choose_precision("auto", "mps") == "fp32"


def test_one_process_has_no_process_group(runtime):
    net = torch.nn.Linear(2, 2)
    assert runtime.prepare(net) is net
    assert not torch.distributed.is_initialized()
    assert (runtime.rank, runtime.world_size, runtime.is_main) == (0, 1, True)
    assert (runtime.gather("x"), runtime.from_main(3), runtime.mean(torch.tensor(2.0))) == (["x"], 3, 2)
    with pytest.raises(UserError, match=r"^oh$"), runtime.fail_together():
        raise UserError("oh")


def test_compiler_that_does_not_work_is_named_before_anything_is_written(monkeypatch, tmp_path):
    def fail(_):
        raise RuntimeError("backend='inductor' raised:\nNo working C++ compiler found\nhint")

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    make_runs_tiny(monkeypatch)
    flags = ["--device", "cpu", "--dataset", "synthetic", "--compile", "--run-dir", str(tmp_path / "run")]
    with pytest.raises(UserError, match=r"^--compile does not work here \(No working C\+\+ compiler found\)"):
        train_ddp.main(flags)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def set_threads(monkeypatch):
    """Return a function that sets the number of threads of this process, of `cores`, and the user's choice."""
    before = torch.get_num_threads()

    def set_numbers(threads, cores=2, omp=None):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if omp is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", omp)
        monkeypatch.setattr("cifar.distributed.cpu.available_cores", lambda: cores)
        torch.set_num_threads(threads)

    yield set_numbers
    torch.set_num_threads(before)


@pytest.mark.parametrize(("threads", "cores", "expected"), [(2, 1, 1), (1, 2, 1), (2, 2, 2)])
def test_one_process_has_torchs_threads_within_the_quota(set_threads, threads, cores, expected):
    set_threads(threads, cores)
    Runtime(TrainConfig(device="cpu"))
    assert torch.get_num_threads() == expected


@pytest.mark.parametrize(
    ("model", "flags", "omp", "expected"),
    [
        ("net", [], None, 1),
        ("net", [], "1", 1),  # torchrun's
        ("net", [], "2", 2),  # the user's
        ("net", ["--local-batch-size", "5"], None, 2),
        ("net-wide", [], None, 2),
    ],
)
def test_tiny_batches_of_a_small_model_train_on_one_thread(set_threads, model, flags, omp, expected):
    """Also if the run fails, the next run of this process may need the others."""
    set_threads(2, omp=omp)
    seen = []

    def train():
        with launch(["--device", "cpu", *flags]) as (_, runtime):
            runtime.prepare(build_model(model, 10))
            seen.append(torch.get_num_threads())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert [*seen, torch.get_num_threads()] == [expected, 2]
