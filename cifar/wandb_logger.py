"""The W&B run: started whatever W&B's state, readable without touching the dashboard."""

import contextlib
import logging
import os
import shutil
import threading
import uuid
from pathlib import Path
from typing import Any

import psutil
from accelerate.tracking import WandBTracker

from cifar.config import TrainConfig
from cifar.data import Data
from cifar.distributed.runtime import Runtime
from cifar.evaluation import Evaluation
from cifar.files import write_atomically

PROJECT = "cifar-ddp"
STEP_AXIS = "trainer/step"  # what the charts of training are drawn over
_INIT_SECONDS = 8  # a W&B server that hasn't answered by then is done without
_FINISH_SECONDS = 30  # nor does the program wait longer than this for the last upload
_HURRY_SECONDS = 4  # or than this where it has been told to stop, or has failed: torchrun is waiting for it
_FLUSH_SECONDS = 1  # what W&B keeps in memory between two writes to its file; by default 15
_WRONG_IMAGES = 32


def start_wandb(config: TrainConfig, runtime: Runtime, run_dir: Path) -> WandBTracker | None:
    """One W&B run, on rank zero; whatever goes wrong costs one warning and leaves an offline record, if any.

    Returns:
        The tracker, or None where there is nothing to record with; on other ranks always None.
    """
    if config.wandb == "disabled" or not runtime.is_main:
        return None
    # W&B takes these two from the environment only. Pictures in tables wait for their upload in its data folder,
    # by default in the home folder: here they are part of the run. Its error reports to a server that doesn't answer
    # make the program wait 12 seconds at its end.
    os.environ["WANDB_DATA_DIR"] = str(run_dir.resolve() / "wandb")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
    except ImportError as error:
        runtime.print0(f"WARNING: no W&B record: {error} (pip install wandb)")
        return None

    logging.getLogger("wandb").setLevel(logging.ERROR)

    def start(mode: str) -> WandBTracker:
        # Not verified here: the server's first answer, or that there is none, comes with wandb.init and its limit.
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            if config.wandb == "online":
                runtime.print0("WARNING: W&B has no key (wandb login): recording offline")
            mode = "offline"
        settings = wandb.Settings(
            silent=True, console="off", init_timeout=_INIT_SECONDS, finish_timeout=_FINISH_SECONDS
        )
        if hasattr(settings, "x_transaction_log_flush_interval"):
            settings.x_transaction_log_flush_interval = _FLUSH_SECONDS
        resume = {"resume": "allow"} if mode == "online" else {}  # W&B can't resume without its server: see replay
        tracker = WandBTracker(
            PROJECT, dir=str(run_dir), name=run_dir.name, id=own_id, mode=mode, settings=settings, **resume
        )
        tracker.start()
        return tracker

    try:
        # Silent before the first look at the credentials, too. A flag goes before WANDB_MODE, which "auto" follows.
        wanted = wandb.Settings(silent=True)
        if config.wandb != "auto":
            wanted.mode = config.wandb
        setup = wandb.setup(wanted).settings
        mode = setup.mode
        own_id = None if mode == "disabled" else _run_id(run_dir, setup.run_id or uuid.uuid4().hex[:8])
        before = set(run_dir.glob("wandb/run-*"))
        try:
            return start(mode)
        except Exception as error:  # no server, no answer, a refused key, ...: training matters more
            if mode != "online":
                raise
            runtime.print0(f"WARNING: W&B can't be reached, recording offline: {first_line(error)}")
            for attempt in set(run_dir.glob("wandb/run-*")) - before:
                shutil.rmtree(attempt, ignore_errors=True)  # empty, and `wandb sync` would upload it as a run
            end_wandb(kill=True)  # it would hold the run's id
            wandb.setup(wanted)
            return start("offline")
    except Exception as error:
        runtime.print0(f"WARNING: no W&B record: {first_line(error)}")
        return None


def _run_id(run_dir: Path, fresh: str) -> str:
    """The id of this folder's W&B run: one and the same over restarts and resumes, `fresh` for a new run."""
    path = run_dir / "wandb" / "id.txt"
    with contextlib.suppress(OSError):
        if own := path.read_text().strip():
            return own
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, lambda file: file.write(f"{fresh}\n".encode()))
    return fresh


def replay(run: Any, rows: list[dict[str, Any]], run_dir: Path) -> None:
    """Give W&B what a resumed run has recorded before, as far as W&B hasn't got it.

    A server that was reached again says where its record ends, and W&B passes over steps before that. An offline
    record can't be continued, so each one is complete from the first step, and `wandb sync` needs the last one only;
    those before it move to wandb/superseded/.

    Args:
        rows: the lines of metrics.jsonl up to the step at which the run goes on, in order.
    """
    for row in rows:
        if row["step"] >= run.step:
            numbers = {name: value for name, value in row.items() if name != "step"}
            run.log({STEP_AXIS: row["step"], **numbers}, step=row["step"])
    if run.offline and not run.disabled:
        current, superseded = Path(run.dir).parent, run_dir / "wandb" / "superseded"
        for old in (run_dir / "wandb").glob("offline-run-*"):
            if old.name != current.name:
                superseded.mkdir(exist_ok=True)
                old.rename(superseded / old.name)


def finish(run: Any, exit_code: int, preempting: bool) -> None:
    """End W&B's record. If the program is in a hurry, an upload that a server holds up is left to `wandb sync`.

    Args:
        exit_code: of the run; with any but 0, the program is in a hurry.
        preempting: the run was told to stop, and is to be resumed.
    """
    failures = []

    def end() -> None:
        try:
            if preempting:
                run.mark_preempting()
            run.finish(exit_code=exit_code)
        except Exception as error:
            failures.append(error)

    ending = threading.Thread(target=end, name="wandb-finish", daemon=True)
    ending.start()
    ending.join(_HURRY_SECONDS if exit_code else None)
    if ending.is_alive():
        end_wandb(kill=True)  # all is in the file by now (_FLUSH_SECONDS)
    elif failures:
        raise failures[0]


def end_wandb(kill: bool = False) -> None:
    """End W&B's process; with `kill` at once, for it would go on trying to reach its server.

    It would end with Python anyhow, but with a traceback, should it have been killed.
    """
    import wandb

    if kill:
        for process in psutil.Process().children():
            if process.name().startswith("wandb-core"):
                process.kill()
    with contextlib.suppress(Exception, SystemExit):  # W&B exits Python with its process's status
        wandb.teardown()


def define_metrics(run: Any) -> None:
    """Give every chart its axis and every column of the runs table its best or last value."""
    run.define_metric(STEP_AXIS, hidden=True)
    run.define_metric("epoch", hidden=True)
    run.define_metric("train/*", step_metric=STEP_AXIS)
    run.define_metric("train/loss", step_metric=STEP_AXIS, summary="min")
    run.define_metric("train/images_per_second", step_metric=STEP_AXIS, summary="mean")
    run.define_metric("test/*", step_metric="epoch")
    run.define_metric("test/loss", step_metric="epoch", summary="min")
    run.define_metric("test/accuracy", step_metric="epoch", summary="max")
    run.define_metric("test_class/*", step_metric="epoch", summary="last")


def pictures(data: Data, test: Evaluation) -> dict[str, Any]:
    """W&B's confusion matrix and most confidently wrong images, as a panel and as a table."""
    import wandb

    images = []
    table = wandb.Table(columns=["image", "index", "class", "predicted", "confidence"])
    for i in test.most_confidently_wrong(_WRONG_IMAGES):
        # Four times the size, or a dashboard shows a postage stamp.
        pixels = data.test.dataset.images[i].cpu().permute(1, 2, 0).numpy().repeat(4, axis=0).repeat(4, axis=1)
        truth, guess, confidence = (
            test.classes[test.labels[i]],
            test.classes[test.predicted[i]],
            float(test.confidence[i]),
        )
        images.append(wandb.Image(pixels, caption=f"{truth}, taken for {guess} ({100 * confidence:.0f} %)"))
        table.add_data(images[-1], i, truth, guess, round(confidence, 4))
    matrix = wandb.plot.confusion_matrix(
        y_true=test.labels.tolist(),
        preds=test.predicted.tolist(),
        class_names=list(test.classes),
        title="Confusion matrix",
    )
    return {
        "test/most_confidently_wrong_images": images,
        "test/most_confidently_wrong": table,
        "test/confusion_matrix": matrix,
    }


def first_line(error: Exception) -> str:
    """What an error says, or is, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
