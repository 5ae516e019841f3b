"""The W&B run: one for all restarts, online or offline; a failure of W&B never fails the training."""

import contextlib
import functools
import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from cifar.config import TrainConfig
from cifar.errors import first_line
from cifar.evaluation import Evaluation
from cifar.files import write_atomically

_PROJECT = "cifar-ddp"
_SETTINGS = {
    "silent": True,
    "console": "off",
    "init_timeout": 8,  # seconds; then offline
    "finish_timeout": 15,  # seconds, for the last upload: torchrun kills a run 30 s after it was told to stop
    "finish_timeout_raises": True,
    # Not public. Seconds between writes to W&B's file; the default, 15, would lose a killed run's last steps.
    "x_transaction_log_flush_interval": 1,
}
_WRONG_IMAGES = 32
_MANY_CLASSES = 100  # more get neither a chart each nor a confusion matrix: W&B draws tables of up to 10,000 rows


def _never_fails(method: Callable[..., None]) -> Callable[..., None]:
    """Let an exception in a method of WandbRun cost one warning and end the record; the method then does nothing."""

    @functools.wraps(method)
    def guarded(self: "WandbRun", *args: Any, **kwargs: Any) -> None:
        try:
            if self.is_recording:
                method(self, *args, **kwargs)
        except Exception as error:  # no package, no server, a killed service, a full disk
            self.is_recording = False
            reason = f"{type(error).__name__}: {first_line(error)}"
            self._print(f"WARNING: W&B's record is incomplete, metrics.jsonl is not: {reason}")

    return guarded


class WandbRun:
    """The W&B run of a run directory, a tracker for accelerate. No method raises."""

    name = "wandb"

    def __init__(self, run_dir: Path, is_recording: bool, print_line: Callable[[str], None]) -> None:
        """Do nothing yet, nor ever unless `is_recording`, which becomes False after a failure of W&B."""
        self.is_recording = is_recording
        self._run_dir, self._print = run_dir, print_line
        self._run: Any = None
        self._has_own_data_dir = False

    @_never_fails
    def start(self, config: TrainConfig, facts: dict[str, Any], recorded: list[dict[str, Any]]) -> None:
        """Start the W&B run, or continue that of a resumed run; offline without a key or a reachable server.

        Its configuration is `config` and `facts`; `recorded` are the records of earlier starts, in order.
        """
        # W&B reads these from the environment only. Tables of images wait for their upload in the data directory, by
        # default in the home directory. Error reports to a silent server would delay the exit by 12 seconds.
        self._has_own_data_dir = "WANDB_DATA_DIR" not in os.environ
        os.environ.setdefault("WANDB_DATA_DIR", str(self._run_dir.resolve() / "wandb"))
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        logging.getLogger("wandb").setLevel(logging.ERROR)
        wanted = wandb.Settings(silent=True)
        if config.wandb != "auto":
            wanted.mode = config.wandb  # else WANDB_MODE, by default online
        elif os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):  # of Hugging Face's Trainer
            wanted.mode = "disabled"
        mode = wandb.setup(wanted).settings.mode
        if mode == "disabled":
            self.is_recording = False
            return
        try:
            # verify=False: wandb.init contacts the server anyway, and within its timeout.
            if mode == "online" and not wandb.login(prompt=False, verify=False):
                if config.wandb == "online":
                    self._print("WARNING: W&B has no key (wandb login): recording offline")
                mode = "offline"
            self._run = self._init(mode)
        except Exception as error:  # no server, a refused key, ...
            if mode != "online":
                raise
            self._print(f"WARNING: W&B cannot be reached, recording offline: {first_line(error)}")
            _stop_service()  # the failed run would keep the ID in use
            self._run = self._init("offline")
        self._run.config.update(config.to_json() | facts, allow_val_change=True)
        self._define_metrics()
        self._replay(recorded)

    def _init(self, mode: Any) -> Any:
        """Return the W&B run in `mode`; its ID is in the run directory, the same after every restart."""
        import wandb

        setup = wandb.setup().settings
        id_file = self._run_dir / "wandb" / "id.txt"
        if not id_file.exists():
            id_file.parent.mkdir(exist_ok=True)
            new_id = setup.run_id or uuid.uuid4().hex[:8]
            write_atomically(id_file, lambda file: file.write(f"{new_id}\n".encode()))
        settings = wandb.Settings()
        for name, value in _SETTINGS.items():  # wandb.init would prefer them to the user's variables
            if hasattr(settings, name) and f"WANDB_{name.upper()}" not in os.environ:
                setattr(settings, name, value)
        return wandb.init(
            project=setup.project or _PROJECT, dir=os.environ.get("WANDB_DIR") or str(self._run_dir),
            name=setup.run_name or self._run_dir.name, id=id_file.read_text().strip(), mode=mode, settings=settings,
            # Offline, "allow" would make `wandb sync` shift the steps that an earlier record has, too (seen with 0.31).
            resume=(setup.resume or "allow") if mode == "online" else None,
        )  # fmt: skip

    def _define_metrics(self) -> None:
        """Let the test's charts run over epochs, and the highest accuracy count, as in a sweep's search."""
        define = self._run.define_metric
        define("epoch", hidden=True)
        define("test/*", step_metric="epoch")
        define("test/accuracy", step_metric="epoch", summary="max")
        define("test_class/*", step_metric="epoch")

    def _replay(self, recorded: list[dict[str, Any]]) -> None:
        """Log the steps of earlier starts that W&B lacks; online, the server says at which step its record ends.

        An offline record cannot be continued, so each one is complete from the first step and replaces those before it,
        which get a name that `wandb sync` ignores.
        """
        for record in recorded:
            if record["step"] >= self._run.starting_step:
                self._send(record, record["step"])
        if self._run.offline:
            own = Path(self._run.dir).parent
            for old in own.parent.glob(f"offline-run-*-{self._run.id}"):
                if old.name != own.name:
                    old.rename(old.with_name(f"superseded-{old.name}"))

    def describe(self) -> str:
        """Return where the record is: a URL, the command that uploads it, or "no record"."""
        if not self.is_recording:
            return "no record"
        run = self._run
        return f"offline, upload with: wandb sync {Path(run.dir).parent}" if run.offline else str(run.url)

    @_never_fails
    def log(self, values: dict[str, Any], step: int) -> None:
        """Log the metrics of a step."""
        self._send(values, step)

    def _send(self, values: dict[str, Any], step: int) -> None:
        classes = [name for name in values if name.startswith("test_class/")]
        left_out = {"step", *classes} if len(classes) > _MANY_CLASSES else {"step"}
        charted = {name: value for name, value in values.items() if name not in left_out}
        self._run.log(charted, step=step)

    @_never_fails
    def log_result(self, step: int, result: dict[str, Any], test: Evaluation, images: Tensor, best: Path) -> None:
        """Log the result, confusion matrix, wrong images and, if asked for, the model; see `Tracking.finish`."""
        run = self._run
        run.summary.update(result)  # before the pictures, which may fail
        run.log(_pictures(images, test), step=max(step, run.step))  # a resumed run may be beyond `step` already
        log_model = os.environ.get("WANDB_LOG_MODEL", "false").lower()  # of Hugging Face's Trainer
        if log_model == "checkpoint":
            self._print("WARNING: WANDB_LOG_MODEL=checkpoint counts as end: W&B gets the best checkpoint only")
        if log_model in ("end", "checkpoint", "true", "1"):
            # After a kill and a restart once more: W&B then keeps one version online, and the newest record offline.
            run.log_model(best, name=f"model-{run.id}", aliases=["best", "latest"])

    def close(self, exit_code: int, preempting: bool) -> None:
        """Finish the W&B run and stop W&B's service. `preempting`: the run was told to stop and can be resumed."""
        self._finish(exit_code, preempting)
        if self._run is not None:
            _stop_service()
        if self._has_own_data_dir:  # the next run in this process has another
            del os.environ["WANDB_DATA_DIR"]

    @_never_fails
    def _finish(self, exit_code: int, preempting: bool) -> None:
        # In a sweep, a stop ends the trial: W&B would start a preempted one again, from step 0 in another directory.
        if preempting and self._run.sweep_id is None:
            self._run.mark_preempting()
        self._run.finish(exit_code=exit_code)


def _stop_service() -> None:
    """Stop W&B's service. Python's exit would do the same, but with a traceback if the service was killed."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):  # W&B exits with the status of its service
        wandb.teardown()


def _pictures(images: Tensor, test: Evaluation) -> dict[str, Any]:
    """Return a table of the most confidently wrong of `images`, and the confusion matrix."""
    import wandb

    table = wandb.Table(columns=["image", "index", "class", "predicted", "confidence"])
    for i in test.most_confidently_wrong(_WRONG_IMAGES):
        # Enlarged four times: dashboards do not scale up.
        pixels = images[i].cpu().permute(1, 2, 0).numpy().repeat(4, axis=0).repeat(4, axis=1)
        label, predicted = test.classes[test.labels[i]], test.classes[test.predicted[i]]
        table.add_data(wandb.Image(pixels), i, label, predicted, round(float(test.confidence[i]), 4))
    pictures: dict[str, Any] = {"test/most_confidently_wrong": table}
    if len(test.classes) <= _MANY_CLASSES:
        pictures["test/confusion_matrix"] = wandb.plot.confusion_matrix(
            y_true=test.labels.tolist(), preds=test.predicted.tolist(), class_names=list(test.classes),
            title="Confusion matrix",
        )  # fmt: skip
    return pictures
