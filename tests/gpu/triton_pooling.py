"""2 x 2 max-pooling without indices, a Triton kernel for each direction; with TRITON_INTERPRET=1, on the CPU."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024 if torch.cuda.is_available() else 2**18  # the interpreter's time is that of its calls


class TritonPool(torch.autograd.Function):
    """Pool [batch, channels, height, width]; the gradient goes to the first maximum of a window, as in torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return the maxima, [batch, channels, height // 2, width // 2], channels-last."""
        x = x.contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = x.shape
        y = x.new_empty((batch, height // 2, width // 2, channels)).permute(0, 3, 1, 2)
        _forward[(triton.cdiv(y.numel(), _BLOCK),)](x, y, y.numel(), channels, height, width, _BLOCK)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, y_grad: Tensor) -> Tensor:
        """Return the gradient of the input; the last row and column of an odd size have none."""
        (x,) = ctx.saved_tensors
        batch, channels, height, width = x.shape
        x_grad = torch.empty_like(x)
        count = batch * channels * ((height + 1) // 2) * ((width + 1) // 2)
        y_grad = y_grad.contiguous(memory_format=torch.channels_last)
        _backward[(triton.cdiv(count, _BLOCK),)](x, y_grad, x_grad, count, channels, height, width, _BLOCK)
        return x_grad


@triton.jit
def _forward(x, y, count, channels: tl.constexpr, height: tl.constexpr, width: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    window = at // channels
    row, column = window // (width // 2) % (height // 2), window % (width // 2)
    image = window // (width // 2 * (height // 2))
    corner = x + ((image * height + 2 * row) * width + 2 * column) * channels + at % channels
    upper = tl.maximum(tl.load(corner, at < count), tl.load(corner + channels, at < count))
    corner += width * channels
    lower = tl.maximum(tl.load(corner, at < count), tl.load(corner + channels, at < count))
    tl.store(y + at, tl.maximum(upper, lower), at < count)


@triton.jit
def _backward(
    x, y_grad, x_grad, count, channels: tl.constexpr, height: tl.constexpr, width: tl.constexpr, block: tl.constexpr
):
    # A window for each output, and those that hang over the edges of an odd size, whose gradients are zero.
    at = tl.program_id(0) * block + tl.arange(0, block)
    columns, rows = (width + 1) // 2, (height + 1) // 2
    channel, window = at % channels, at // channels
    row, column = window // columns % rows, window % columns
    image = window // (columns * rows)
    has_right = (at < count) & (2 * column + 1 < width)
    has_lower = (at < count) & (2 * row + 1 < height)
    whole = has_right & has_lower
    output = ((image * (height // 2) + row) * (width // 2) + column) * channels + channel
    gradient = tl.load(y_grad + output, whole, 0.0)
    right, below = channels, width * channels
    corner = ((image * height + 2 * row) * width + 2 * column) * channels + channel
    # In float32, for the interpreter compares the bits of bfloat16.
    a = tl.load(x + corner, whole).to(tl.float32)
    b = tl.load(x + corner + right, whole).to(tl.float32)
    c = tl.load(x + corner + below, whole).to(tl.float32)
    d = tl.load(x + corner + below + right, whole).to(tl.float32)
    is_a = (a >= b) & (a >= c) & (a >= d)
    is_b = (b >= c) & (b >= d) & ~is_a
    is_c = (c >= d) & ~is_a & ~is_b
    tl.store(x_grad + corner, tl.where(is_a, gradient, 0.0), at < count)
    tl.store(x_grad + corner + right, tl.where(is_b, gradient, 0.0), has_right)
    tl.store(x_grad + corner + below, tl.where(is_c, gradient, 0.0), has_lower)
    tl.store(x_grad + corner + below + right, tl.where(is_a | is_b | is_c, 0.0, gradient), whole)
