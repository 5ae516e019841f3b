"""On a fake GPU: no two devices in one operator, no wait in the hot loop, and no more kernels than stated."""

import contextlib
import io
from unittest.mock import patch

import pytest
import torch

from cifar.distributed.device import resolve
from cifar.distributed.environment import Launch
from cifar.recipes import config_from_recipe
from tests.helpers import fake_cuda
from tests.helpers.fake_cuda import DeviceError, FakeCuda, SyncError, forked, pretend, unsupported
from tests.helpers.launches import CEILINGS, exceeded, measure
from train_ddp import train_step


@pytest.fixture(scope="module", autouse=True)
def _torch_can_fake():
    if (reason := unsupported()) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize(("recipe", "precision"), [("tutorial", "fp32"), ("speed94", "bf16")])
def test_hot_loop_never_waits_and_launches_few_kernels(recipe, precision):
    """Loader, augmentation, step, CUDA graph, evaluation, checkpoint and resume; all recipes in the slow tier."""
    measured = measure(recipe, precision)
    assert exceeded(recipe, precision, measured) == []
    ceiling = CEILINGS[recipe]
    assert measured.step > getattr(ceiling, precision) * 0.9, "the ceiling is too high to notice more launches"


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda loss: loss.item(), "_local_scalar_dense.default waits for the device"),
        (lambda _: torch.arange(8), "arange.start makes a tensor on the CPU"),
    ],
    ids=["item", "cpu"],
)
def test_mistake_in_a_step_is_caught(mistake, message):
    def wrong_step(*arguments):
        loss = train_step(*arguments)
        mistake(loss)
        return loss

    with pytest.raises(RuntimeError, match=message):
        measure("tutorial", "fp32", wrong_step)


def on_fake_gpu(work):
    """Call `work` with the mode, in another process."""

    def pretending():
        mode = FakeCuda()
        pretend(mode)
        with mode:
            work(mode)

    forked(pretending)


WAITS = {
    "float()": lambda x: float(x),
    "if": lambda x: 1 if x > 3 else 2,
    "print": lambda x: f"{x}",
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "tensor": lambda x: torch.tensor(0.5, device=x.device),
    "copy_": lambda x: x.copy_(torch.zeros(())),
    "mask": lambda x: x.expand(3)[x.expand(3) > 0],
    "nonzero": lambda x: x.nonzero(),
    "synchronize": lambda _: torch.cuda.synchronize(),
}


def test_every_wait_in_the_hot_loop_is_refused():
    def work(mode):
        x, refused = torch.zeros((), device="cuda"), []
        for name, wait in WAITS.items():
            mode.hot = True
            with contextlib.suppress(SyncError), mode.on_host():
                wait(x)
                continue
            refused.append(name)
        assert refused == list(WAITS)
        mode.hot, before = False, mode.waits
        float(x)
        assert mode.waits == before + 1

    on_fake_gpu(work)


def test_two_devices_or_layouts_are_refused():
    def work(_):
        x, indices = torch.zeros(3, device="cuda"), torch.zeros(3, dtype=torch.int64, device="cuda")
        with pytest.raises(RuntimeError, match="device"):
            x + torch.ones(3)
        with pytest.raises(DeviceError, match="on the GPU and the CPU"):
            torch.ones(3)[indices]
        with pytest.raises(DeviceError, match="on the GPU and the CPU"):
            torch._foreach_add_([torch.zeros(())], [x.sum()])
        momentum = torch.zeros(4, 3, 2, 2, device="cuda")
        weights = momentum.contiguous(memory_format=torch.channels_last)
        with pytest.raises(DeviceError, match="strides"):
            torch._fused_sgd_([weights], [weights], [momentum], weight_decay=0, momentum=0.9, lr=0.1, dampening=0,
                              nesterov=False, maximize=False, is_first_step=False)  # fmt: skip

    on_fake_gpu(work)


def test_captured_graph_must_not_keep_values_of_the_host():
    def work(mode):
        rate, x = torch.tensor(0.1), torch.zeros(3, device="cuda")
        x * rate
        with mode.capture(), pytest.raises(SyncError, match="the graph would keep the value"):
            x * rate

    on_fake_gpu(work)


def test_tensors_that_cannot_be_updated_together_take_a_kernel_each():
    def work(mode):
        filters = [torch.zeros(4, 3, 2, 2, device="cuda") for _ in range(5)]
        others = [filter_.contiguous(memory_format=torch.channels_last) for filter_ in filters]
        mode.launches.clear()
        torch._foreach_add_(filters, 1.0)
        torch._foreach_add_(filters, others)
        assert mode.launches["_foreach_add_"] == 1 + 5

    on_fake_gpu(work)


def test_later_torch_is_tried_and_skipped_with_the_reason(monkeypatch):
    assert unsupported() is None
    monkeypatch.setattr(torch, "__version__", "99.0.0")
    assert unsupported() is None
    with patch.object(fake_cuda, "_backward", side_effect=AttributeError("_input_metadata")):
        assert unsupported() == "torch 99.0.0 differs inside: AttributeError: _input_metadata"


@pytest.mark.parametrize("cores", [0, 1])
def test_fewer_cores_than_gpus_are_a_warning(cores):
    def start(_):
        written = io.StringIO()
        with patch("cifar.distributed.device.available_cores", lambda: cores), contextlib.redirect_stdout(written):
            resolve(config_from_recipe("tutorial", device="cuda"), Launch())
        assert (f"WARNING: 1 GPUs get their kernels from {cores} CPU core(s)" in written.getvalue()) == (cores == 0)

    on_fake_gpu(start)
