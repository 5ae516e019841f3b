"""bf16 and torch.compile, in a process of their own: accelerate's precision is set once for each process."""

import sys

import pytest

from tests.helpers.processes import run

SCRIPT = """
import torch
from cifar.batch_plan import BatchPlan
from cifar.config import TrainConfig
from cifar.loop import TrainState, train_step
from cifar.models import build_model
from cifar.optim import build_optimizer
from cifar.distributed.runtime import Runtime

def trained(compile):
    torch.manual_seed(0)
    net = build_model("net")
    names = list(net.state_dict())
    model = runtime.wrap(net, compile)
    assert list(net.state_dict()) == names, "a compiled net's checkpoint must fit the plain one"
    dtypes = set()
    if not compile:
        net.conv1.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    state = TrainState(net, build_optimizer(net, config), runtime.scaler)
    draws = torch.Generator().manual_seed(0)
    for _ in range(5):
        batch = torch.rand(8, 3, 32, 32, generator=draws), torch.randint(0, 10, (8,), generator=draws)
        train_step(model, iter([batch]), state, config, plan, runtime)
    assert model(batch[0]).dtype == torch.float32, "losses are computed in fp32"
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}, "weights stay fp32"
    return torch.cat([parameter.flatten() for parameter in net.parameters()]).detach(), dtypes

config = TrainConfig(device="cpu", precision=PRECISION, local_batch_size=8, lr=0.05)
plan = BatchPlan.make(config, 1, 50_000)
runtime = Runtime(config)
"""


def run_script(precision, script, tmp_path):
    text = SCRIPT.replace("PRECISION", repr(precision)) + script
    output = run([sys.executable, "-c", text], tmp_path)
    assert output.returncode == 0, output.stderr
    return output


def test_bf16_runs_the_net_in_bf16_and_keeps_the_weights_in_fp32(tmp_path):
    run_script("bf16", "_, dtypes = trained(compile=False)\nassert dtypes == {torch.bfloat16}, dtypes", tmp_path)


def test_a_compiled_net_trains_the_same(tmp_path):
    script = """
try:
    compiled, _ = trained(compile=True)
except Exception as error:
    if "compiler" not in str(error).lower(): raise
    print("NO COMPILER"); raise SystemExit
plain, _ = trained(compile=False)
assert torch.allclose(plain, compiled, atol=1e-5)
"""
    if "NO COMPILER" in run_script("fp32", script, tmp_path).stdout:
        pytest.skip("torch.compile found no C++ compiler here")
