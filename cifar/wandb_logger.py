"""The W&B run: one for all restarts, online or offline; a failure of W&B never fails the training."""

import contextlib
import logging
import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from accelerate.tracking import WandBTracker

from cifar.config import TrainConfig
from cifar.data import Data
from cifar.distributed.runtime import Runtime
from cifar.errors import first_line
from cifar.evaluation import Evaluation
from cifar.files import write_atomically

PROJECT = "cifar-ddp"
STEP_AXIS = "trainer/step"  # x axis of the training charts
_INIT_SECONDS = 8  # give up on the W&B server and go offline
_FINISH_SECONDS = 30  # for the last upload of a finished run
_STOP_SECONDS = 4  # for that of a run that stops or fails: torchrun kills it after 30 s
_FLUSH_SECONDS = 1  # interval between W&B's writes to its file; the default, 15, would lose a killed run's last steps
_WRONG_IMAGES = 32
_MANY_CLASSES = 100  # more get neither a chart each nor a confusion matrix: W&B draws tables of up to 10,000 rows


def start_wandb(config: TrainConfig, runtime: Runtime, run_dir: Path) -> WandBTracker | None:
    """Start the W&B run on rank zero, or continue that of a resumed run.

    Each failure costs one warning. Without a key or a reachable server the run is recorded offline.

    Returns:
        The tracker; None on other ranks, with `--wandb disabled`, or if W&B does not work at all.
    """
    if config.wandb == "disabled" or not runtime.is_main:
        return None
    # W&B reads both from the environment only. Images in tables are staged in the data directory, by default in the
    # home directory. Error reports to a silent server would delay the exit by 12 seconds.
    os.environ.setdefault("WANDB_DATA_DIR", _data_dir(run_dir))
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
    except ImportError as error:
        runtime.print0(f"WARNING: no W&B record: {error} (pip install wandb)")
        return None
    logging.getLogger("wandb").setLevel(logging.ERROR)

    def start(mode: str) -> WandBTracker:
        # verify=False: wandb.init contacts the server anyway, and within its timeout.
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            if config.wandb == "online":
                runtime.print0("WARNING: W&B has no key (wandb login): recording offline")
            mode = "offline"
        ours: dict[str, Any] = {
            "silent": True, "console": "off", "init_timeout": _INIT_SECONDS, "finish_timeout": _FINISH_SECONDS,
            "finish_timeout_raises": True,
        }  # fmt: skip
        # wandb.init prefers settings to variables: leave those to the user that a variable sets.
        settings = wandb.Settings(**{k: v for k, v in ours.items() if f"WANDB_{k.upper()}" not in os.environ})
        if hasattr(settings, "x_transaction_log_flush_interval"):  # no public setting
            settings.x_transaction_log_flush_interval = _FLUSH_SECONDS
        # Offline, "allow" would make `wandb sync` shift the steps that an earlier record has, too (seen with 0.31).
        resume = {"resume": setup.resume or "allow"} if mode == "online" else {}
        tracker = WandBTracker(
            setup.project or PROJECT, dir=os.environ.get("WANDB_DIR") or str(run_dir),
            name=setup.run_name or run_dir.name, id=run_id, mode=mode, settings=settings, **resume,
        )  # fmt: skip
        tracker.start()
        if new and tracker.tracker.starting_step > 0:
            runtime.print0(
                f"WARNING: W&B's run {run_id} already holds another run, up to step "
                f"{tracker.tracker.starting_step - 1:,}: for a record of its own, unset WANDB_RUN_ID"
            )
        return tracker

    try:
        wanted = wandb.Settings(silent=True)
        if config.wandb != "auto":
            wanted.mode = config.wandb  # else WANDB_MODE, by default online
        setup = wandb.setup(wanted).settings
        mode = setup.mode
        new = not _id_file(run_dir).exists()
        run_id = None if mode == "disabled" else _run_id(run_dir, setup.run_id or uuid.uuid4().hex[:8])
        try:
            return start(mode)
        except Exception as error:  # no server, a refused key, ...
            if mode != "online":
                raise
            runtime.print0(f"WARNING: W&B cannot be reached, recording offline: {first_line(error)}")
            stop_wandb()  # the failed run would keep the ID in use
            wandb.setup(wanted)
            return start("offline")
    except Exception as error:
        runtime.print0(f"WARNING: no W&B record: {first_line(error)}")
        return None


def _run_id(run_dir: Path, default: str) -> str:
    """Return the ID of the run directory's W&B run, the same after every restart; `default` for a new run."""
    path = _id_file(run_dir)
    with contextlib.suppress(OSError):
        if recorded := path.read_text().strip():
            return recorded
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, lambda file: file.write(f"{default}\n".encode()))
    return default


def _data_dir(run_dir: Path) -> str:
    return str(run_dir.resolve() / "wandb")


def _id_file(run_dir: Path) -> Path:
    return run_dir / "wandb" / "id.txt"


def charted(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out the accuracies of the classes if they are too many for a chart each; metrics.jsonl has them."""
    others = {name: value for name, value in values.items() if not name.startswith("test_class/")}
    return others if len(values) - len(others) > _MANY_CLASSES else values


def replay(run: Any, records: list[dict[str, Any]]) -> None:
    """Log the steps of earlier starts that W&B lacks.

    Online, the server says at which step its record ends. An offline record cannot be continued, so each one is
    complete from the first step and replaces those before it, which get a name that `wandb sync` ignores.

    Args:
        records: the lines of metrics.jsonl before the step at which the run continues, in order.
    """
    for record in records:
        if record["step"] >= run.starting_step:
            values = {name: value for name, value in charted(record).items() if name != "step"}
            run.log({STEP_AXIS: record["step"], **values}, step=record["step"])
    if run.offline and not run.disabled:
        own = Path(run.dir).parent
        for old in own.parent.glob(f"offline-run-*-{run.id}"):
            if old.name != own.name:
                old.rename(old.with_name(f"superseded-{old.name}"))


def finish(run: Any, exit_code: int, preempting: bool) -> None:
    """Finish the W&B run: upload the rest, mark its end.

    Args:
        exit_code: of the program; if it is not 0, the upload may take `_STOP_SECONDS` only.
        preempting: the run was told to stop and can be resumed. In a sweep, that is the end of its trial: W&B would
            start a preempted one again, from step 0 in another directory.

    Raises:
        TimeoutError: the server did not answer in time. The file on disk is complete.
    """
    # finish_timeout is fixed at wandb.init, and 4 s are too few for the pictures of a finished run.
    expired = threading.Event()

    def kill_service() -> None:
        expired.set()
        for process in psutil.Process().children():
            if process.name().startswith("wandb-core"):
                process.kill()

    timer = threading.Timer(_STOP_SECONDS, kill_service)
    if exit_code:
        timer.start()
    try:
        if preempting and run.sweep_id is None:
            run.mark_preempting()
        run.finish(exit_code=exit_code)
    except Exception as error:
        if expired.is_set():
            raise TimeoutError(f"no answer from the server in {_STOP_SECONDS} s") from error
        raise
    finally:
        timer.cancel()


def stop_wandb(run_dir: Path | None = None) -> None:
    """Stop W&B's service. Python's exit would do the same, but with a traceback if the service was killed.

    Args:
        run_dir: of the run that is over; the next one in this process has its own data directory.
    """
    import wandb

    if run_dir is not None and os.environ.get("WANDB_DATA_DIR") == _data_dir(run_dir):
        del os.environ["WANDB_DATA_DIR"]
    with contextlib.suppress(Exception, SystemExit):  # W&B exits with the status of its service
        wandb.teardown()


def define_metrics(run: Any) -> None:
    """Declare the x axis of every chart, and the summary of every metric: best, mean or last value."""
    run.define_metric(STEP_AXIS, hidden=True)
    run.define_metric("epoch", hidden=True)
    run.define_metric("train/*", step_metric=STEP_AXIS)
    run.define_metric("train/loss", step_metric=STEP_AXIS, summary="min")
    run.define_metric("train/images_per_second", step_metric=STEP_AXIS, summary="mean")
    run.define_metric("test/*", step_metric="epoch")
    run.define_metric("test/loss", step_metric="epoch", summary="min")
    run.define_metric("test/accuracy", step_metric="epoch", summary="max")
    run.define_metric("test_class/*", step_metric="epoch", summary="last")


_LOG_MODEL = ("end", "checkpoint", "true", "1")  # values of WANDB_LOG_MODEL by which the best checkpoint is logged


def check_log_model(print0: Callable[[str], None]) -> None:
    """Warn of a WANDB_LOG_MODEL whose documented effect is not what will happen."""
    value = os.environ.get("WANDB_LOG_MODEL", "false")
    if value.lower() == "checkpoint":
        print0(
            "WARNING: WANDB_LOG_MODEL=checkpoint: only the best checkpoint is logged, at the end of the run, as by end"
        )
    elif value.lower() not in (*_LOG_MODEL, "false", "0", ""):
        print0(f"WARNING: WANDB_LOG_MODEL={value} is none of end, true, checkpoint and false: no model is logged")


def log_model(run: Any, best: Path, metadata: dict[str, Any]) -> None:
    """Log the checkpoint `best` as a model artifact, if WANDB_LOG_MODEL is "end", as for Hugging Face's Trainer.

    A run that was killed afterwards and continued logs it again: online, W&B recognizes the file by its digest and
    keeps one version; offline, the new record replaces the old one.
    """
    import wandb

    if os.environ.get("WANDB_LOG_MODEL", "false").lower() in _LOG_MODEL:
        artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata=metadata)
        artifact.add_file(str(best))
        run.log_artifact(artifact, aliases=["best", "latest"])


def pictures(data: Data, test: Evaluation) -> dict[str, Any]:
    """Return the most confidently wrong images, as a panel and as a table, and the confusion matrix, for W&B."""
    import wandb

    images: list[Any] = []
    table = wandb.Table(columns=["image", "index", "class", "predicted", "confidence"])
    for i in test.most_confidently_wrong(_WRONG_IMAGES):
        # Enlarged four times: dashboards do not scale up.
        pixels = data.test.dataset.images[i].cpu().permute(1, 2, 0).numpy().repeat(4, axis=0).repeat(4, axis=1)
        label, predicted = test.classes[test.labels[i]], test.classes[test.predicted[i]]
        confidence = float(test.confidence[i])
        images.append(wandb.Image(pixels, caption=f"{label}, predicted {predicted} ({100 * confidence:.0f} %)"))
        table.add_data(images[-1], i, label, predicted, round(confidence, 4))
    panels: dict[str, Any] = {"test/most_confidently_wrong_images": images, "test/most_confidently_wrong": table}
    if len(test.classes) <= _MANY_CLASSES:
        panels["test/confusion_matrix"] = wandb.plot.confusion_matrix(
            y_true=test.labels.tolist(),
            preds=test.predicted.tolist(),
            class_names=list(test.classes),
            title="Confusion matrix",
        )
    return panels
