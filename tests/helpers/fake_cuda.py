"""A GPU without kernels: fake tensors that say cuda:0, on a machine that needs no GPU and no driver.

Operators compute shapes, dtypes, strides and devices, and no numbers. What a real GPU refuses (tensors on two devices)
is refused, and what makes the host wait for it is counted, or refused in the hot loop.
"""

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._pytree import tree_leaves

from tests.helpers.forking import fork, wait

PROVEN = (2, 15)  # all of this relies on the insides of torch, and has run up to this version
needs_fake_gpu = pytest.mark.skipif(
    torch.cuda.is_available() or tuple(map(int, torch.__version__.split(".")[:2])) > PROVEN,
    reason=f"the fake GPU is for hosts without a GPU, and for torch up to {PROVEN}",
)

# Their results have a size or a value that only the device knows.
_WAITS = {"nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "unique_consecutive", "bincount",
          "repeat_interleave", "_linalg_check_errors", "linalg_eigh", "_linalg_eigh",
          "_local_scalar_dense"}  # fmt: skip
_COPIES = {"_to_copy", "copy_"}
_UNMODELED = {"_fused_sgd_", "_amp_foreach_non_finite_check_and_unscale_", "_amp_update_scale_"}  # no fake kernels


class SyncError(Exception):
    """The host would wait for the device in the hot loop, or a graph would keep a value of the host."""


class DeviceError(Exception):
    """An operator that a real GPU refuses: tensors on several devices, or layouts that its kernel mixes up."""


class FakeCuda(FakeTensorMode):
    """A FakeTensorMode with one GPU.

    Attributes:
        hot: whether to refuse what waits for the device.
        capturing: whether a CUDA graph is being captured; then the values of CPU tensors would be frozen, too.
        waits: times that the host has waited for the device.
        replays: times that a captured graph was launched.
    """

    avoid_device_init = True  # as without a GPU, although torch.cuda says that there is one

    def __init__(self) -> None:
        super().__init__()
        self.hot = self.capturing = False
        self.waits = self.replays = 0
        self._inside = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "FakeCuda":
        return self  # torch copies a state dict, whose tensors refer to their mode

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Capture a CUDA graph."""
        before = self.hot
        self.hot = self.capturing = True
        try:
            yield
        finally:
            self.hot, self.capturing = before, False

    def wait(self, reason: str) -> None:
        """Count that the host waits for the device; raise SyncError in the hot loop."""
        if self.hot:
            raise SyncError(f"{reason} waits for the device")
        self.waits += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator; those that it is made of are part of it."""
        if self._inside:
            return super().__torch_dispatch__(func, types, args, kwargs)
        self._inside = True
        try:
            return self._run(func, types, args, kwargs or {})
        finally:
            self._inside = False

    def _run(self, func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.split("::")[1]
        tensors = _tensors(args, kwargs)
        _check_devices(name, args, tensors)
        if _waits(name, tensors, args, kwargs):
            self.wait(str(func))
        if name == "_fused_sgd_":
            _check_layouts(*args[:3])
        if self.capturing and len({tensor.is_cuda for tensor in tensors}) > 1:
            raise SyncError(f"{func}: the graph would keep the value that a tensor on the CPU has now")
        if name in _UNMODELED:
            return args[0] if name == "_amp_update_scale_" else None
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except DataDependentOutputException:  # a number that only the device knows: a plausible one
            return {torch.bool: True}.get(args[0].dtype, 0.0 if args[0].is_floating_point() else 1)


def _tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _waits(name: str, tensors: list[Tensor], args: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether the host waits for the device in this operator."""
    devices = {tensor.device.type for tensor in tensors}
    if name == "_to_copy" and kwargs.get("device") is not None:
        devices.add(torch.device(kwargs["device"]).type)
    if name in _COPIES:  # non_blocking or not: only memory that is pinned would make a difference
        return len(devices) > 1
    if name == "index_put_" and args[2].numel() == 1:
        return False  # torch fills by the mask
    if name in ("index", "index_put_"):
        return "cuda" in devices and any(index.dtype == torch.bool for index in args[1] if index is not None)
    return "cuda" in devices and name in _WAITS


def _check_devices(name: str, args: Any, tensors: list[Tensor]) -> None:
    """Refuse tensors on two devices: only numbers on the CPU may take part, and not in lists of tensors."""
    listed = [leaf for arg in args if isinstance(arg, list) for leaf in _tensors(arg)]
    devices = {tensor.device.type for tensor in [*listed, *(tensor for tensor in tensors if tensor.ndim)]}
    if len(devices) > 1 and name not in _COPIES:
        raise DeviceError(f"{name} of tensors on the GPU and the CPU")


def _check_layouts(parameters: list[Tensor], gradients: list[Tensor], momentum: list[Tensor]) -> None:
    """Refuse what the fused update, which reads each tensor as a flat row, would apply to the wrong elements."""
    for tensors in zip(parameters, gradients, momentum or parameters, strict=True):
        if len(set(map(_strides, tensors))) > 1:
            raise DeviceError(f"_fused_sgd_ of tensors with strides {[tensor.stride() for tensor in tensors]}")


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return tuple(stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)


def on_fake_gpu(work: Callable[[FakeCuda], object]) -> None:
    """Call `work` in a copy of this process, in which torch has one GPU; an AssertionError if it fails there."""
    import torch._dynamo  # noqa: F401 - takes seconds, and looks at the real torch.cuda: once for all copies

    def pretend_and_work() -> None:
        mode = FakeCuda()
        _pretend(mode)
        with mode:
            work(mode)

    assert wait(fork(pretend_and_work, seconds=240)) == 0, "failed on a fake GPU: see the traceback"


def _pretend(mode: FakeCuda) -> None:
    """Have torch behave as with one GPU, which is `mode`, in the rest of this process."""

    class Stream:
        def wait_stream(self, other: "Stream") -> None:
            pass  # the device would wait, not the host

    class Graph:
        def replay(self) -> None:
            mode.replays += 1

    def to_string(tensor: Any, **options: Any) -> Any:
        if tensor.is_cuda:
            mode.wait("printing a tensor")
        return real_to_string(tensor, **options)

    cuda: Any = torch.cuda
    strings: Any = torch._tensor_str
    fakes: Any = fake_tensor
    real_to_string, strings._str = strings._str, to_string
    fakes.init_gpu_context = lambda device: None  # torch 2.11 takes this host's word that there is a GPU
    cuda.is_available, cuda.is_initialized, cuda.is_bf16_supported = lambda: True, lambda: False, lambda *_, **__: True
    cuda.device_count, cuda.current_device, cuda.set_device = lambda: 1, lambda: 0, lambda _: None
    cuda.synchronize = lambda device=None: mode.wait("torch.cuda.synchronize")
    cuda.is_current_stream_capturing = lambda: mode.capturing
    cuda.Stream, cuda.CUDAGraph, cuda.current_stream = Stream, Graph, lambda device=None: Stream()
    cuda.stream, cuda.graph = lambda _: contextlib.nullcontext(), lambda _, stream=None: mode.capture()
    nn.Module._apply = _apply  # type: ignore[method-assign]
    torch.Tensor.backward = _backward  # type: ignore[assignment,method-assign]
    # Copying a learning rate that is a tensor asks for its address.
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")


def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Do what nn.Module._apply does, which cannot exchange fake tensors in place."""
    for owner in module.modules() if recurse else [module]:
        for tensor in (*owner._parameters.values(), *owner._buffers.values()):
            if tensor is not None:
                with torch.no_grad():
                    moved: Any = fn(tensor)
                tensor.data = moved
                tensor.fake_device, tensor.constant = moved.fake_device, None  # type: ignore[attr-defined]
    return module


@torch.no_grad()
def _backward(loss: Tensor) -> None:
    """Do what Tensor.backward does, whose engine asks the driver for the current stream of each GPU."""
    awaited: Counter[Any] = Counter()  # gradients that a node still waits for
    nodes: list[Any] = [loss.grad_fn]
    for node in nodes:
        for following, _ in node.next_functions:
            if following is not None:
                if following not in awaited:
                    nodes.append(following)
                awaited[following] += 1
    gradients: dict[Any, list[Tensor | None]] = {node: [None] * len(node._input_metadata) for node in nodes}
    gradients[loss.grad_fn][0] = torch.ones_like(loss)
    ready: list[Any] = [loss.grad_fn]
    while ready:
        node = ready.pop()
        outputs = _call(node, gradients.pop(node))
        for (following, place), gradient in zip(node.next_functions, outputs, strict=True):
            if following is None:
                continue
            if gradient is not None:
                expected, sums = following._input_metadata[place], gradients[following]
                gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)
                before = sums[place]
                sums[place] = gradient if before is None else before + gradient
            awaited[following] -= 1
            if not awaited[following]:
                ready.append(following)


def _call(node: Any, gradients: list[Any]) -> tuple[Tensor | None, ...]:
    """Return the gradients of the inputs of a node of the graph; a parameter's node adds to `.grad` instead."""
    if all(gradient is None for gradient in gradients):
        return (None,) * len(node.next_functions)
    if not hasattr(node, "variable"):
        outputs = node(*gradients)
        return outputs if isinstance(outputs, tuple) else (outputs,)
    leaf, gradient = node.variable, gradients[0]
    if leaf.grad is not None:
        leaf.grad += gradient
    else:
        leaf.grad = gradient if _strides(leaf) == _strides(gradient) else torch.empty_like(leaf).copy_(gradient)
    return ()
