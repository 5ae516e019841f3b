"""A GPU without kernels: fake tensors that say cuda:0, on a machine that needs no GPU and no driver.

Operators compute shapes, dtypes, strides and devices, and no numbers. What a real GPU refuses (tensors on two devices)
is refused, and what makes the host wait for it is counted, or refused where it must not happen. `pretend` changes
torch.cuda for good, so it belongs in a process of its own: see `forked`.
"""

import contextlib
import os
import pickle
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.helpers.forking import fork, wait

T = TypeVar("T")

PROVEN = (2, 15)  # the last version of torch on which all of this has run; a later one may have moved what it relies on

# Operators that allocate or describe, besides the views.
_NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh",
              "device", "layout"}  # fmt: skip
# Their results have a size or a value that only the device knows.
_WAITS = {"nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "unique_consecutive", "bincount",
          "repeat_interleave", "_linalg_check_errors", "linalg_eigh", "_linalg_eigh"}  # fmt: skip
_UNMODELED = {"_fused_sgd_", "_amp_foreach_non_finite_check_and_unscale_", "_amp_update_scale_"}  # no fake kernels


class SyncError(Exception):
    """The hot loop makes the host wait for the device, or works on the CPU."""


class DeviceError(Exception):
    """An operator that a real GPU refuses: tensors on several devices, or layouts that its kernel mixes up."""


class FakeCuda(FakeTensorMode):
    """A FakeTensorMode with one GPU.

    Attributes:
        hot: whether to refuse what waits for the device, and new tensors on the CPU.
        capturing: whether a CUDA graph is being captured; then the values of CPU tensors would be frozen, too.
        launches: kernels launched so far, by operator: one for each that is not a view, which is about right.
        waits: times that the host has waited for the device.
    """

    avoid_device_init = True  # as without a GPU, although torch.cuda says that there is one

    def __init__(self) -> None:
        super().__init__()
        self.hot = self.capturing = False
        self.launches: Counter[str] = Counter()
        self.waits = 0
        self._on_host = self._inside = False

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

    @contextlib.contextmanager
    def on_host(self) -> Iterator[None]:
        """Allow new tensors on the CPU, but no waiting, in this part of the hot loop."""
        self._on_host = True
        try:
            yield
        finally:
            self._on_host = False

    def wait(self, reason: str) -> None:
        """Count that the host waits for the device.

        Raises:
            SyncError: this is the hot loop.
        """
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
        on_cuda = any(tensor.is_cuda for tensor in tensors)
        _check_lists(name, args)
        if _waits(name, tensors, args, kwargs):
            self.wait(str(func))
        if name == "_local_scalar_dense":
            return self._value(func, types, args, kwargs)
        if name in _UNMODELED:
            _check_unmodeled(name, tensors, args)
            result = args[0] if name == "_amp_update_scale_" else None
        else:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        if name in ("convolution", "convolution_backward"):
            result = _cudnn_layout(result, tensors)
        results = _tensors(result)
        on_cpu = [tensor for tensor in results if not tensor.is_cuda]
        if on_cuda and on_cpu and name not in ("_to_copy", "copy_"):
            raise DeviceError(f"{func} of tensors on the GPU and the CPU")
        if self.capturing and on_cuda and not all(tensor.is_cuda for tensor in tensors):
            raise SyncError(f"{func}: the graph would keep the value that a tensor on the CPU has now")
        if self.hot and not self._on_host and any(all(new is not old for old in tensors) for new in on_cpu):
            raise SyncError(f"{func} makes a tensor on the CPU")
        is_view = func.is_view or torch.Tag.inplace_view in func.tags
        if (on_cuda or len(on_cpu) < len(results)) and not is_view and name not in _NO_KERNEL:
            self.launches[name] += _kernels(name, args)
        return result

    def _value(self, func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return the number in a tensor of one element, if the host knows it, or else a plausible one."""
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except DataDependentOutputException:
            return {torch.bool: True}.get(args[0].dtype, 0.0 if args[0].is_floating_point() else 1)


def _tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _waits(name: str, tensors: list[Tensor], args: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether the host waits for the device in this operator."""
    devices = {tensor.device.type for tensor in tensors}
    if name == "_to_copy":  # non_blocking or not: only memory that is pinned would make a difference
        target = kwargs.get("device")
        return target is not None and {*devices, torch.device(target).type} >= {"cpu", "cuda"}
    if name == "copy_":
        return devices >= {"cpu", "cuda"}
    if "cuda" not in devices:
        return False
    if name in ("index", "index_put_"):
        if name == "index_put_" and args[2].numel() == 1:
            return False  # torch fills by the mask
        return any(index.dtype == torch.bool or not index.is_cuda for index in args[1] if index is not None)
    return name in _WAITS or name == "_local_scalar_dense"


def _cudnn_layout(result: Any, tensors: list[Tensor]) -> Any:
    """Return the results of a convolution in the layout that cuDNN gives them; without a driver, torch expects none."""
    if not any(tensor.is_cuda and tensor.ndim == 4 and _is_channels_last(tensor) for tensor in tensors):
        return result

    def convert(value: Any) -> Any:
        is_image = isinstance(value, Tensor) and value.ndim == 4
        return value.contiguous(memory_format=torch.channels_last) if is_image else value

    return tree_map(convert, result)


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _check_lists(name: str, args: Any) -> None:
    """Check that lists of tensors, of which a fake kernel takes each by itself, are on one device.

    Raises:
        DeviceError: they are not.
    """
    if (
        name.startswith("_foreach_")
        and len({x.device for arg in args if isinstance(arg, list) for x in _tensors(arg)}) > 1
    ):
        raise DeviceError(f"{name} of tensors on the GPU and the CPU")


def _check_unmodeled(name: str, tensors: list[Tensor], args: Any) -> None:
    """Check what the kernel of an operator without a fake one checks.

    Raises:
        DeviceError: it would refuse these tensors.
    """
    if len({tensor.device for tensor in tensors if tensor.ndim}) > 1:
        raise DeviceError(f"{name} of tensors on the GPU and the CPU")
    if name == "_fused_sgd_":  # parameters, gradients, momentum
        for together in zip(*(list_ for list_ in args[:3] if list_), strict=True):
            if len(set(map(_strides, together))) > 1:
                raise DeviceError(f"{name} of tensors with strides {[tensor.stride() for tensor in together]}")


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return tuple(stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)


def _kernels(name: str, args: Any) -> int:
    """Return how many kernels an operator launches: one, or one per tensor if `_foreach_` cannot take them together."""
    if not name.startswith("_foreach_"):
        return 1
    lists = [arg for arg in args if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor)]
    together = all(
        len({tensor.dtype for tensor in tensors}) == 1 and len(set(map(_strides, tensors))) == 1
        for tensors in zip(*lists, strict=True)
    )
    return 1 if together and len({tensor.dtype for tensor in lists[0]}) == 1 else len(lists[0])


def pretend(mode: FakeCuda) -> None:
    """Have torch behave as with one GPU, which is `mode`, in the rest of this process."""
    import torch._dynamo  # while it is imported, it looks at the real torch.cuda

    class Stream:
        """A stream in which nothing is ever in flight."""

        def wait_stream(self, other: "Stream") -> None:
            """Do nothing: the device would wait, not the host."""

        def synchronize(self) -> None:
            """Wait for the device."""
            mode.wait("Stream.synchronize")

    class Graph:
        """A captured graph."""

        def replay(self) -> None:
            """Launch it."""
            mode.launches["replay"] += 1

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

    def backward(loss: Tensor) -> None:
        _backward(loss, mode)

    torch.Tensor.backward = backward  # type: ignore[assignment,method-assign]
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


def _backward(loss: Tensor, mode: FakeCuda) -> None:
    """Do what Tensor.backward does: its engine asks the driver for the current stream of each GPU."""
    assert loss.grad_fn is not None
    needed: Counter[Any] = Counter()  # gradients that a node still waits for
    found = [loss.grad_fn]
    for node in found:
        for following, _ in node.next_functions:
            if following is not None:
                if following not in needed:
                    found.append(following)
                needed[following] += 1
    gradients: dict[Any, list[Tensor | None]] = {node: [None] * len(node._input_metadata) for node in found}
    ready = [loss.grad_fn]
    with torch.no_grad():
        gradients[loss.grad_fn][0] = torch.ones_like(loss)
        while ready:
            node = ready.pop()
            outputs = _call(node, gradients.pop(node), mode)
            for (following, place), gradient in zip(node.next_functions, outputs, strict=True):
                if following is None:
                    continue
                if gradient is not None:
                    expected, sums = following._input_metadata[place], gradients[following]
                    if gradient.shape != expected.shape:
                        gradient = gradient.sum_to_size(expected.shape)
                    if gradient.dtype != expected.dtype:
                        gradient = gradient.to(expected.dtype)
                    before = sums[place]
                    sums[place] = gradient if before is None else before + gradient
                needed[following] -= 1
                if not needed[following]:
                    ready.append(following)


def _call(node: Any, gradients: list[Any], mode: FakeCuda) -> tuple[Tensor | None, ...]:
    """Return the gradients of the inputs of a node of the graph; a parameter's node adds to `.grad` instead."""
    if all(gradient is None for gradient in gradients):
        return (None,) * len(node.next_functions)
    if hasattr(node, "variable"):
        leaf, gradient = node.variable, gradients[0]
        if leaf.grad is not None:
            leaf.grad += gradient
        else:
            leaf.grad = gradient if _strides(leaf) == _strides(gradient) else torch.empty_like(leaf).copy_(gradient)
        return ()
    copies = mode.launches["clone"]
    outputs = node(*gradients)
    if "CudnnBatchNorm" in node.name():  # copies what the engine says will not be needed again
        mode.launches["clone"] = copies
    return outputs if isinstance(outputs, tuple) else (outputs,)


def forked(work: Callable[[], T]) -> T:
    """Return what `work` returns in a copy of this process.

    Raises:
        RuntimeError: it failed; the text is its traceback.
    """
    import torch._dynamo  # noqa: F401 - takes seconds, and optimizers import it: once for all copies

    reader, writer = os.pipe()

    def answer() -> None:
        try:
            result: Any = (True, work())
        except Exception:
            result = (False, traceback.format_exc())
        with open(writer, "wb") as pipe:
            pickle.dump(result, pipe)

    child = fork(answer, seconds=240)
    os.close(writer)
    with open(reader, "rb") as pipe:
        received = pipe.read()
    status = wait(child)
    if not received:
        raise RuntimeError(f"no answer from the copy of this process, whose status is {status}")
    succeeded, result = pickle.loads(received)
    if not succeeded:
        raise RuntimeError(result)
    return result


def unsupported() -> str | None:
    """Return why the program cannot run on a fake GPU here; None if it can.

    On versions of torch that are known to work nothing is tried: an error there is ours.
    """
    if torch.cuda.is_available():
        return "this host has a real GPU, which tests/gpu uses"
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    if version <= PROVEN:
        return None
    try:
        forked(_probe)
    except RuntimeError as error:
        return f"torch {torch.__version__} differs inside: {str(error).strip().splitlines()[-1]}"
    return None


def _probe() -> None:
    """Use all that this file relies on, and nothing of the program's."""
    mode = FakeCuda()
    pretend(mode)
    with mode:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10))
        model.to("cuda").to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
        scaler = torch.amp.GradScaler("cuda")
        with torch.autocast("cuda", torch.float16):
            logits = model(torch.empty(2, 3, 3, 3, device="cuda"))
        labels = torch.empty(2, dtype=torch.int64, device="cuda")
        loss = nn.functional.cross_entropy(logits.float(), labels, label_smoothing=0.1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.load_state_dict(optimizer.state_dict())
        launched = mode.launches["convolution"], mode.launches["convolution_backward"], mode.launches["_fused_sgd_"]
        if not (loss.is_cuda and launched == (1, 1, 1)):
            raise RuntimeError(f"loss on {loss.device}, {dict(mode.launches)}")
        waits = mode.waits
        loss.item()
        if mode.waits != waits + 1:
            raise RuntimeError(f"{mode.waits - waits} waits for one .item()")
