"""Export a model for other software: python -m cifar.export CHECKPOINT [--format pt2|onnx|safetensors] [--out FILE]"""

import io
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cifar.checkpoint import checkpoint_file
from cifar.command import exit_on_error, parse_flags
from cifar.data import normalize
from cifar.errors import UserError, first_line
from cifar.files import write_atomically
from cifar.predict import build_trained_model
from cifar.records.console import SYNTHETIC_WARNING

_PRIVATE = ("data_dir", "data_url", "run_dir", "resume", "evaluate")  # directories of the training machine


@dataclass(frozen=True)
class Export:
    """Write a program from images, uint8 [n, 3, size, size], to class scores (logits), float32 [n, classes].

    The images are normalized in it. Its metadata name the classes; cifar/README.md tells how to load it.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A checkpoint of train_ddp.py, runs/NAME/checkpoints/step-NNNNNNNN.pt, or a run, for its best one."""
    format: Literal["pt2", "onnx", "safetensors"] = "pt2"
    """pt2: a program for torch. onnx: for ONNX Runtime and others. safetensors: no program, only the weights."""
    out: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(default: beside the checkpoint)")] = None
    """The file to write; its name ends in .pt2, .onnx or .safetensors. An existing file is replaced."""


class Classifier(nn.Module):
    """A model with the normalization of its images, in eval mode and without gradients, as evaluation runs it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval().requires_grad_(False)  # else the scores of the program would require gradients, too

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores (logits), float32 [n, classes], of `images`, uint8 [n, 3, size, size]."""
        return self.model(normalize(images))


def _metadata(content: dict[str, Any]) -> dict[str, str]:
    """Return the metadata of every format: `classes` and `config` are JSON texts, without paths and the URL."""
    config = {name: value for name, value in content["config"].items() if name not in _PRIVATE}
    return {
        "format_version": "1",
        "model": config["model"],
        "dataset": content["dataset"],
        "image_size": str(content["image_size"]),
        "classes": json.dumps(content["classes"]),
        "config": json.dumps(config),
    }


def _to_pt2(model: nn.Module, metadata: dict[str, str]) -> bytes:
    file = io.BytesIO()
    torch.export.save(_trace(model, metadata), file, extra_files=metadata)
    return file.getvalue()


def _to_onnx(model: nn.Module, metadata: dict[str, str]) -> bytes:
    try:
        import onnxscript  # noqa: F401  # torch itself would import it, and with it onnx, only after tracing

        program = torch.onnx.export(
            _trace(model, metadata), input_names=["images"], output_names=["scores"],
            dynamic_shapes={"images": {0: "n"}}, dynamo=True, verbose=False,
        )  # fmt: skip
    except ImportError as error:
        raise UserError(f"--format onnx: {first_line(error)}: pip install -e '.[export]'") from error
    assert program is not None
    program.model.metadata_props.update(metadata)
    return program.model_proto.SerializeToString()


def _to_safetensors(model: nn.Module, metadata: dict[str, str]) -> bytes:
    return save_safetensors(model.state_dict(), metadata)


def _trace(model: nn.Module, metadata: dict[str, str]) -> ExportedProgram:
    size = int(metadata["image_size"])
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)  # of one image, the number would be taken for a constant
    return torch.export.export(Classifier(model), (images,), dynamic_shapes={"images": {0: Dim("n")}})


# A function from a model and its metadata to the content of the file, for each --format.
FORMATS: dict[str, Callable[[nn.Module, dict[str, str]], bytes]] = {
    "pt2": _to_pt2,
    "onnx": _to_onnx,
    "safetensors": _to_safetensors,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Write the file, and print a line about it."""
    asked = parse_flags(Export, argv, prog="python -m cifar.export")
    suffix = f".{asked.format}"
    checkpoint = checkpoint_file(asked.checkpoint)
    out = asked.out or checkpoint.with_suffix(suffix)
    if out.suffix != suffix or out == checkpoint:  # a slip must not replace a checkpoint
        raise UserError(f"the model cannot be exported to {out}: name another file with --out, ending in {suffix}")
    model, content = build_trained_model(checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporters warn of deprecations in torch itself
        exported = FORMATS[asked.format](model, _metadata(content))
    try:
        write_atomically(out, lambda file: file.write(exported))
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): name another file with --out") from error
    name, classes = content["config"]["model"], content["classes"]
    print(f"{out}: {name}, {len(classes)} classes of {content['dataset']}, {len(exported) / 1e6:.1f} MB")
    if content["dataset"] == "synthetic":
        print(SYNTHETIC_WARNING, file=sys.stderr)


if __name__ == "__main__":
    with exit_on_error("cifar.export"):
        main()
