"""The configuration of a run: its fields, their checks and their JSON form."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from cifar.errors import UserError, without_credentials
from cifar.files import read_json

# The range of a field: a predicate that is false for NaN, and the words for it.
_Range = tuple[Callable[[float], bool], str]
_COUNT: _Range = (lambda x: x >= 1, "at least 1")
_POSITIVE: _Range = (lambda x: 0 < x < math.inf, "a number above 0")
_FRACTION: _Range = (lambda x: 0 <= x < 1, "at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The hyperparameters of a run. `lr` is stated for the recipe's own global batch."""

    model: str = "net"
    """Model to train."""
    epochs: Annotated[int, _COUNT] = 4
    """Passes over the training images."""
    local_batch_size: Annotated[int, _COUNT] = 4
    """The most images that one process runs at once (a micro-batch)."""
    global_batch_size: Annotated[int | None, _COUNT] = None
    """Images that one optimizer step sees. More than local batch x world size accumulates gradients."""
    lr: Annotated[float, _POSITIVE] = 0.001
    """Learning rate, stated for the recipe's own global batch; see --lr-scaling."""
    lr_scaling: Literal["linear", "none"] = "linear"
    """linear: lr x global batch / the recipe's own global batch (Goyal et al. 2017). none: lr as it is."""
    optimizer: Literal["sgd", "muon"] = "sgd"
    """sgd, or muon: Muon for the convolution filters and SGD for the other parameters."""
    momentum: Annotated[float, _FRACTION] = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Use Nesterov momentum."""
    weight_decay: Annotated[float, (lambda x: 0 <= x < math.inf, "at least 0")] = 0.0
    """Weight decay of SGD."""
    bias_lr_scale: Annotated[float, _POSITIVE] = 1.0
    """Learning rate of the biases as a multiple of lr."""
    muon_lr: Annotated[float, _POSITIVE] = 0.24
    """Learning rate of Muon; it follows the same schedule as lr."""
    muon_momentum: Annotated[float, _FRACTION] = 0.6
    """Nesterov momentum of Muon."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate over the run: constant, or falling to zero along half a cosine or a straight line."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up; the schedule is multiplied by it."""
    label_smoothing: Annotated[float, _FRACTION] = 0.0
    """Share of the target probability spread evenly over all classes (Szegedy et al. 2016)."""
    augment: str = "none"
    """none; a random crop and a random horizontal flip; or a random crop and a flip in every other epoch."""
    crop_padding: Annotated[int, (lambda x: 0 <= x <= 31, "from 0 to 31")] = 4
    """Pixels by which a random crop may shift an image."""
    cutout: Annotated[int, (lambda x: 0 <= x <= 256, "from 0 to 256")] = 0
    """Side in pixels of the gray square cut out of each training image; 0 for none (DeVries & Taylor 2017)."""
    tta: Literal["none", "flip", "crop"] = "none"
    """Test-time augmentation at the end of the run: average over mirrored, and over shifted and mirrored images."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Precision of the forward and backward pass; the weights stay fp32. auto: bf16 if the device computes in it."""
    log_steps: Annotated[int, _COUNT] = 2000
    """Optimizer steps between two lines of running loss."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Recipe):
    """Train a model on CIFAR-10, in one process or in many."""

    recipe: str = "tutorial"
    """Named set of defaults; every one of them is also a flag."""
    dataset: str = "auto"
    """auto: CIFAR-10 if it is on disk or can be downloaded, else the synthetic dataset, with a warning."""
    data_dir: Path = Path("data")
    """Directory of the dataset. CIFAR-10 is read from, or downloaded into, its cifar-10-batches-py/;
    folder: pictures from its train/CLASS/ and test/CLASS/."""
    data_url: str | None = None
    """URL of the dataset's archive (cifar-10-python.tar.gz) to try before the built-in sources."""
    image_size: Annotated[int | None, (lambda x: 32 <= x <= 256, "from 32 to 256")] = None
    """Side in pixels to which --dataset folder scales its pictures."""
    max_steps: Annotated[int | None, _COUNT] = None
    """End training after this many optimizer steps; evaluation and records follow as usual."""
    seed: Annotated[int, (lambda x: 0 <= x < 2**63, "at least 0 and below 2**63")] = 0
    """Seed of the weights, the shuffling and the augmentation."""
    compile: bool = False
    """Compile the model with torch.compile."""
    cuda_graph: bool = False
    """Capture the training step as a CUDA graph and replay it; needs one process and a GPU."""
    profile: bool = False
    """Profile steps 10 to 20: trace-rankN.json in the run directory, the most expensive operations on the console."""
    comm_hook: Literal["none", "fp16", "bf16", "powersgd"] = "none"
    """Compression of the gradients in the all-reduce."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA if there is a GPU, else MPS for a single process, else the CPU."""
    run_dir: Path | None = None
    """Directory of this run; it must not hold another run."""
    autoresume: bool = False
    """Continue the run in --run-dir if there is one, else begin it. If it has finished, say so, with exit status 0."""
    resume: Path | None = None
    """Continue the run in this directory from its newest valid checkpoint, with its own configuration."""
    checkpoint_steps: Annotated[int | None, _COUNT] = None
    """Save a checkpoint every so many optimizer steps, besides the one after each epoch."""
    keep_checkpoints: Annotated[int, _COUNT] = 3
    """Number of newest checkpoints to keep, besides the one with the best test accuracy."""
    timeout: Annotated[float, (lambda x: 5 <= x <= 86_400, "from 5 seconds to a day")] = 120
    """Seconds in which a rank that hangs or freezes ends the run (torch's default is 30 minutes)."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online if a W&B key is configured, else offline; never a prompt."""
    evaluate: Path | None = None
    """Print the test accuracy of this checkpoint, or of a run's best, on its own dataset, instead of training."""

    lr_batch_size: int = 4
    """The recipe's own global batch, for which lr is stated; not a flag."""

    def check(self) -> None:
        """Check the range of every value."""
        for name, hint in get_type_hints(TrainConfig, include_extras=True).items():
            value = getattr(self, name)
            for holds, allowed in getattr(hint, "__metadata__", ()):
                if value is not None and not holds(value):
                    raise UserError(f"{flag(name)} is {value}: it must be {allowed}")
        if self.image_size is not None and self.dataset != "folder":
            raise UserError("--image-size needs --dataset folder: the images of the others have their own size")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise UserError(f"--warmup-epochs is {self.warmup_epochs:g}: it must be from 0 to --epochs, {self.epochs}")
        if self.cuda_graph and self.precision == "fp16":
            raise UserError(
                "--cuda-graph needs --precision fp32 or bf16: with fp16 the host decides at each step whether to update"
            )
        if self.comm_hook == "powersgd" and self.precision == "fp16":
            raise UserError("--comm-hook powersgd needs --precision bf16 or fp32: its error feedback keeps an overflow")
        if self.nesterov and self.momentum == 0:
            raise UserError("--nesterov needs a --momentum above 0")
        if self.autoresume and self.run_dir is None:
            raise UserError("--autoresume needs --run-dir, the directory to begin or to continue")

    def to_json(self) -> dict[str, Any]:
        """Return every field as a JSON value; paths become strings, and the URL loses its credentials."""
        fields = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}
        return fields | {"data_url": self.data_url and without_credentials(self.data_url)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "TrainConfig":
        """Return the configuration that `to_json` described."""
        paths = {k: Path(fields[k]) for k in ("data_dir", "run_dir", "resume", "evaluate") if fields.get(k)}
        fields = {name: value for name, value in fields.items() if (name, value) not in _REMOVED}
        try:
            config = cls(**(fields | paths))
        except TypeError as error:
            raise UserError(f"this configuration was written by another version of cifar-ddp: {error}") from error
        for name, hint in get_type_hints(cls).items():
            if not _is_a(value := getattr(config, name), hint):
                raise UserError(f"{name} is {value!r}, which is not of type {getattr(hint, '__name__', hint)}")
        return config


# Fields of version 0.2.0 that are no more, with the values that changed nothing.
_REMOVED = {("small_share", 0.0), ("small_size", 24)}


def _is_a(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_args(hint):  # a union
        return any(_is_a(value, part) for part in get_args(hint))
    return isinstance(value, int | float if hint is float else hint) and (hint is bool or not isinstance(value, bool))


# Flags that may change on resume, as they do not define the experiment; every other flag must match the run's own.
MAY_CHANGE = frozenset({
    "resume", "autoresume", "epochs", "max_steps", "log_steps", "checkpoint_steps", "keep_checkpoints",
    "local_batch_size", "timeout", "data_dir", "data_url", "device", "compile", "cuda_graph", "profile", "tta", "wandb",
})  # fmt: skip


def read_config(run_dir: Path) -> TrainConfig:
    """Return the configuration recorded in `run_dir`, with `resume` set to it."""
    path = run_dir / "config.json"
    try:
        return TrainConfig.from_json(read_json(path)["config"] | {"resume": str(run_dir)})
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        if run := next((above for above in run_dir.parents if (above / "config.json").exists()), None):
            raise UserError(f"--resume {run_dir} is not a run but a part of one: --resume {run}") from error
        raise UserError(f"--resume {run_dir}: there is no run to continue ({path}: {error})") from error


def differences(a: TrainConfig, b: TrainConfig) -> list[tuple[str, Any, Any]]:
    """Return (field, value in `a`, value in `b`) for every field in which the two differ, as JSON values."""
    recorded = b.to_json()
    return [(name, value, recorded[name]) for name, value in a.to_json().items() if value != recorded[name]]


def flag(field: str) -> str:
    """Return the command-line flag of a field: "--local-batch-size" for "local_batch_size"."""
    return "--" + field.replace("_", "-")
