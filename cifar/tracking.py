"""The records of a run, made by rank zero: W&B, metrics.jsonl and result.json."""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, WandBTracker, on_main_process

from cifar.config import TrainConfig
from cifar.data import CLASSES, Data
from cifar.evaluation import Evaluation
from cifar.loop import LogPoint
from cifar.run import write_atomically
from cifar.runtime import Runtime

PROJECT = "cifar-ddp"
_INIT_SECONDS = 8  # a W&B server that hasn't answered by then is done without
_FINISH_SECONDS = 30  # nor does the program wait longer than this for the last upload
_WRONG_IMAGES = 32

# accelerate logs through trackers of its own kind, to which any of its others (TensorBoard, MLflow, ...) can be added.


class MetricsFile(GeneralTracker):
    """`metrics.jsonl`: a JSON object per line, with the step and the numbers logged at it."""

    name = "metrics.jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._complained = False

    @on_main_process
    def keep_until(self, step: int) -> None:
        """Drop the lines after `step`, which a resumed run is about to write again, and any that is cut short."""
        if self.path.exists():
            kept = []
            for line in self.path.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    kept += [line + "\n"] if json.loads(line)["step"] <= step else []
            write_atomically(self.path, lambda file: file.write("".join(kept).encode()))

    @property
    def tracker(self) -> Path:
        """The file."""
        return self.path

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Nothing: the run folder holds config.json."""

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        """Append the numbers among `values`. A full disk costs the line and one warning, not the run."""
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **numbers}) + "\n")
        except OSError as error:
            if not self._complained:
                print(f"WARNING: {self.path} can't be written: {error}", flush=True)
                self._complained = True


class Tracking:
    """What a run records, on every rank; only rank zero writes."""

    def __init__(self, config: TrainConfig, runtime: Runtime, run_dir: Path, data: Data, facts: dict[str, Any]) -> None:
        """Open the records. `facts` go into W&B's configuration beside `config`."""
        self._accelerator = runtime.accelerator
        self._config, self._runtime, self._data = config, runtime, data
        self.metrics = MetricsFile(run_dir / "metrics.jsonl")
        self._accelerator.trackers = [self.metrics]
        self._wandb = start_wandb(config, runtime, run_dir)
        self._started = self._wandb is not None
        if self._wandb is not None:
            self._accelerator.trackers.append(self._wandb)
            with self._surviving_wandb():
                self._wandb.store_init_configuration(config.to_json() | facts)
                _lay_out(self._wandb.tracker)

    def describe(self) -> str:
        """Where W&B's record goes, for the banner."""
        if self._wandb is None:
            return "no record"
        run = self._wandb.tracker
        if run.disabled:
            return "no record"
        return f"offline, upload with: wandb sync {Path(run.dir).parent}" if run.offline else str(run.url)

    def log_train(self, point: LogPoint) -> None:
        """Record a log point."""
        self._log(
            point.step,
            {
                "epoch": point.epoch,
                "train/loss": point.loss,
                "train/lr": point.lr,
                "train/images_per_second": point.images_per_second,
            },
        )

    def log_test(self, step: int, epoch: int, test: Evaluation) -> None:
        """Record an evaluation."""
        classes = {f"test_class/{name}": x for name, x in zip(CLASSES, test.class_accuracies(), strict=True)}
        self._log(step, {"epoch": epoch, "test/loss": test.loss, "test/accuracy": test.accuracy, **classes})

    def finish(self, step: int, result: dict[str, Any], test: Evaluation) -> None:
        """Record the end of the run in W&B: the result, the confusion matrix and the wrong images."""
        with self._surviving_wandb():
            if self._wandb is not None:
                run = self._wandb.tracker
                # The pictures first, so that the table's are the same files.
                for name, value in self._pictures(test).items():
                    run.log({name: value}, step=step)
                run.summary.update(result)

    def close(self, exit_code: int = 0) -> None:
        """Finish the W&B run; waits for its server no longer than half a minute."""
        with self._surviving_wandb():
            if self._wandb is not None:
                self._wandb.tracker.finish(exit_code=exit_code)
        if self._started:
            # What W&B would do when Python ends, but then with a traceback, should its process have been killed.
            with contextlib.suppress(Exception):
                import wandb

                wandb.teardown()

    def _log(self, step: int, values: dict[str, Any]) -> None:
        with self._surviving_wandb():
            self._accelerator.log({"trainer/step": step, **values}, step=step)

    @contextlib.contextmanager
    def _surviving_wandb(self) -> Iterator[None]:
        """Should W&B fail in the block (its process was killed, the disk is full), the run goes on without it."""
        try:
            yield
        except Exception as error:
            if self._wandb is None:
                raise
            self._runtime.say(f"WARNING: W&B's record ends here: {type(error).__name__}: {_first_line(error)}")
            self._accelerator.trackers.remove(self._wandb)
            self._wandb = None

    def _pictures(self, test: Evaluation) -> dict[str, Any]:
        """W&B's confusion matrix and most confidently wrong images, as a panel and as a table."""
        import wandb

        images = []
        table = wandb.Table(columns=["image", "index", "class", "predicted", "confidence"])
        for i in test.most_confidently_wrong(_WRONG_IMAGES):
            # Four times the size, or a dashboard shows a postage stamp.
            pixels = self._data.test.images[i].cpu().permute(1, 2, 0).numpy().repeat(4, axis=0).repeat(4, axis=1)
            truth, guess, confidence = CLASSES[test.labels[i]], CLASSES[test.predicted[i]], float(test.confidence[i])
            images.append(wandb.Image(pixels, caption=f"{truth}, taken for {guess} ({100 * confidence:.0f} %)"))
            table.add_data(images[-1], i, truth, guess, round(confidence, 4))
        matrix = wandb.plot.confusion_matrix(
            y_true=test.labels.tolist(),
            preds=test.predicted.tolist(),
            class_names=list(CLASSES),
            title="Confusion matrix",
        )
        return {
            "test/most_confidently_wrong_images": images,
            "test/most_confidently_wrong": table,
            "test/confusion_matrix": matrix,
        }


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
        runtime.say(f"WARNING: no W&B record: {error} (pip install wandb)")
        return None

    logging.getLogger("wandb").setLevel(logging.ERROR)

    def start(mode: str) -> WandBTracker:
        # Not verified here: the server's first answer, or that there is none, comes with wandb.init and its limit.
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            if config.wandb == "online":
                runtime.say("WARNING: W&B has no key (wandb login): recording offline")
            mode = "offline"
        settings = wandb.Settings(
            silent=True, console="off", init_timeout=_INIT_SECONDS, finish_timeout=_FINISH_SECONDS
        )
        tracker = WandBTracker(PROJECT, dir=str(run_dir), name=run_dir.name, mode=mode, settings=settings)
        tracker.start()
        return tracker

    try:
        # Silent before the first look at the credentials, too. A flag goes before WANDB_MODE, which "auto" follows.
        wanted = wandb.Settings(silent=True)
        if config.wandb != "auto":
            wanted.mode = config.wandb
        mode = wandb.setup(wanted).settings.mode
        before = set(run_dir.glob("wandb/run-*"))
        try:
            return start(mode)
        except Exception as error:  # no server, no answer, a refused key, ...: training matters more
            if mode != "online":
                raise
            runtime.say(f"WARNING: W&B can't be reached, recording offline: {_first_line(error)}")
            for attempt in set(run_dir.glob("wandb/run-*")) - before:
                shutil.rmtree(attempt, ignore_errors=True)  # empty, and `wandb sync` would upload it as a run
            return start("offline")
    except Exception as error:
        runtime.say(f"WARNING: no W&B record: {_first_line(error)}")
        return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _lay_out(run: Any) -> None:
    """Give every chart its axis and every column of the runs table its best or last value."""
    run.define_metric("trainer/step", hidden=True)
    run.define_metric("epoch", hidden=True)
    run.define_metric("train/*", step_metric="trainer/step")
    run.define_metric("train/loss", step_metric="trainer/step", summary="min")
    run.define_metric("train/images_per_second", step_metric="trainer/step", summary="mean")
    run.define_metric("test/*", step_metric="epoch")
    run.define_metric("test/loss", step_metric="epoch", summary="min")
    run.define_metric("test/accuracy", step_metric="epoch", summary="max")
    run.define_metric("test_class/*", step_metric="epoch", summary="last")
