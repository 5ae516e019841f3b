"""The records of a run, made by rank zero: W&B, metrics.jsonl and result.json."""

import json
import logging
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, WandBTracker, on_main_process

from cifar.config import TrainConfig
from cifar.data import CLASSES, Data
from cifar.evaluation import Evaluation
from cifar.loop import LogPoint
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
        """Drop the lines after `step`, which a resumed run is about to write again."""
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if json.loads(line)["step"] <= step]
            self.path.write_text("".join(line + "\n" for line in lines))

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
        if self._wandb is not None:
            self._accelerator.trackers.append(self._wandb)
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
        """Record the end of the run: the result, and W&B's confusion matrix and table of wrong images."""
        if self._wandb is not None and self._runtime.is_main:
            import wandb

            run = self._wandb.tracker
            run.log(
                {
                    "test/confusion_matrix": wandb.plot.confusion_matrix(
                        y_true=test.labels.tolist(), preds=test.predicted.tolist(), class_names=list(CLASSES)
                    ),
                    "test/most_confidently_wrong": self._wrong_images(test),
                },
                step=step,
            )
            run.summary.update(result)

    def close(self, exit_code: int = 0) -> None:
        """Finish the W&B run; waits for its server no longer than half a minute."""
        if self._wandb is not None and self._runtime.is_main:
            self._wandb.tracker.finish(exit_code=exit_code)

    def _log(self, step: int, values: dict[str, Any]) -> None:
        self._accelerator.log({"trainer/step": step, **values}, step=step)

    def _wrong_images(self, test: Evaluation) -> Any:
        import wandb

        table = wandb.Table(columns=["image", "index", "class", "predicted", "confidence"])
        for i in test.most_confidently_wrong(_WRONG_IMAGES):
            # Four times the size, or a dashboard shows a postage stamp.
            pixels = self._data.test.images[i].cpu().permute(1, 2, 0).numpy().repeat(4, axis=0).repeat(4, axis=1)
            truth, guess = CLASSES[test.labels[i]], CLASSES[test.predicted[i]]
            caption = f"{truth}, taken for {guess}"
            table.add_data(wandb.Image(pixels, caption=caption), i, truth, guess, round(float(test.confidence[i]), 4))
        return table


def start_wandb(config: TrainConfig, runtime: Runtime, run_dir: Path) -> WandBTracker | None:
    """One W&B run, on rank zero; whatever goes wrong costs one warning and leaves an offline record, if any.

    Returns:
        The tracker, or None where there is nothing to record with; on other ranks always None.
    """
    if config.wandb == "disabled" or not runtime.is_main:
        return None
    try:
        import wandb
    except ImportError as error:
        runtime.say(f"WARNING: no W&B record: {error} (pip install wandb)")
        return None

    logging.getLogger("wandb").setLevel(logging.ERROR)
    settings = {"silent": True, "console": "off", "init_timeout": _INIT_SECONDS, "finish_timeout": _FINISH_SECONDS}

    def start(mode: str | None) -> WandBTracker:
        tracker = WandBTracker(
            PROJECT, dir=str(run_dir), name=run_dir.name, mode=mode, settings=wandb.Settings(**settings)
        )
        tracker.start()
        return tracker

    try:
        wandb.setup(wandb.Settings(silent=True))  # silent before the first look at the credentials, too
        mode = wandb.setup().settings.mode if config.wandb == "auto" else config.wandb
        if mode == "online" and not wandb.login(prompt=False):
            if config.wandb == "online":
                runtime.say("WARNING: W&B has no key (wandb login): recording offline")
            mode = "offline"
        try:
            return start(mode)
        except Exception as error:  # no server, no answer, a refused key, ...: training matters more
            if mode != "online":
                raise
            runtime.say(f"WARNING: W&B can't be reached, recording offline: {str(error).splitlines()[0]}")
            return start("offline")
    except Exception as error:
        runtime.say(f"WARNING: no W&B record: {error}")
        return None


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
