"""bf16 computes in bf16 and keeps the weights in fp32; fp16 and CUDA graphs need a GPU (tests/gpu/checks.py)."""

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

import train_ddp
from cifar.config import TrainConfig
from cifar.distributed.device import resolve
from cifar.distributed.environment import Launch
from cifar.distributed.runtime import Runtime
from cifar.errors import UserError
from cifar.models import build_model
from cifar.optim import build_optimizer
from tests.helpers.comparing import make_runs_tiny, traces
from tests.helpers.processes import result
from train_ddp import train_step


@pytest.fixture
def _other_precision():
    """Give the runtime that other tests share its state of accelerate back."""
    states = [AcceleratorState._shared_state, PartialState._shared_state]
    before = [dict(state) for state in states]
    yield
    for state, content in zip(states, before, strict=True):
        state.clear()
        state.update(content)


@pytest.mark.usefixtures("_other_precision")
def test_runs_of_one_process_have_their_own_precision(synthetic):
    """As in a notebook, where main() is called again and again; weights and losses are in fp32."""
    images, labels = synthetic.train.dataset[torch.arange(8)]
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        config = TrainConfig(device="cpu", precision=precision, local_batch_size=8)
        runtime, net = Runtime(config), build_model("net", 10)
        dtypes = set()
        net.conv1.register_forward_hook(lambda module, inputs, output, seen=dtypes: seen.add(output.dtype))
        model = runtime.prepare(net)
        loss = train_step(model, [(images, labels)], 8, build_optimizer(net, config), runtime)
        assert dtypes == {dtype}
        assert loss.dtype == model(images).dtype == torch.float32
        assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("wanted", "message"), [({"precision": "fp16"}, r"fp16.*bf16"), ({"cuda_graph": True}, "--cuda-graph needs a GPU")]
)
def test_what_the_cpu_lacks_is_named(wanted, message):
    with pytest.raises(UserError, match=message):
        resolve(TrainConfig(device="cpu", **wanted), Launch())


@pytest.mark.usefixtures("_other_precision")
def test_a_checkpoint_is_evaluated_as_its_run_was(monkeypatch, tmp_path, capsys):
    """In its precision and with its views, so that the numbers are those of result.json; test_cli.py has the flags."""
    make_runs_tiny(monkeypatch)
    flags = ["--dataset", "synthetic", "--device", "cpu", "--wandb", "disabled", "--max-steps", "2", "--lr", "0.02",
             "--local-batch-size", "10", "--precision", "bf16", "--tta", "flip"]  # fmt: skip
    train_ddp.main([*flags, "--run-dir", str(tmp_path)])
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    got, trained = result(tmp_path), capsys.readouterr().out
    before = traces(tmp_path)
    train_ddp.main(["--evaluate", str(checkpoint), "--device", "cpu"])
    text = capsys.readouterr().out
    assert "testing on synthetic in bf16" in text
    assert f"({got['test_correct']:,} of {got['test_total']:,} correct, loss {got['test_loss']:.4f})" in text
    assert f"with test-time augmentation: {100 * got['test_accuracy_tta']:.2f} %" in text
    assert text[text.index("Accuracy") :] == trained[trained.index("Accuracy") : trained.index("records, ")]
    assert traces(tmp_path) == before, "evaluating is not a run"
