"""Continue a run: find it, check that it may continue, restore its newest valid checkpoint."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar.checkpoint import DamagedCheckpointError, TrainState, checkpoints, load_checkpoint, load_weights
from cifar.config import MAY_CHANGE, TrainConfig, differences, flag, read_config
from cifar.data import Data
from cifar.distributed.runtime import Runtime
from cifar.errors import StoppedError, UserError
from cifar.files import read_json
from cifar.records.run_dir import owners


@dataclass(frozen=True)
class Resumed:
    """The point at which a run continues.

    Attributes:
        checkpoint: the file that was restored; None if the run ended before its first checkpoint and starts again.
        changes: the differences from the run's last start, in words.
        content: what the file holds.
        corrupt: why newer checkpoints were skipped, one line each.
        finished: whether the run has finished.
    """

    checkpoint: Path | None
    changes: tuple[str, ...]
    content: dict[str, Any]
    corrupt: tuple[str, ...]
    finished: bool

    def describe(self, step: int, last: int) -> dict[str, str]:
        """Return the lines of the banner about where and how the run continues, by their names."""
        place = f"after step {step:,} of {last:,}" if self.checkpoint else "from the start: it has no checkpoint yet"
        return {"resumes": place} | ({"changed": ", ".join(self.changes)} if self.changes else {})


def find_own_run(config: TrainConfig, runtime: Runtime) -> TrainConfig:
    """Return the configuration of the run that this launch began before a restart, or else `config`.

    torchrun starts the same command line again after a rank has failed or a host has come or gone. A run is recognized
    by `Runtime.launch_id`. (TORCHELASTIC_RUN_ID is not unique before torch 2.14, and the restart count of a returning
    host begins at zero.)
    """
    recorded = None  # read where it is found: the other hosts may not share the directory
    with runtime.fail_together():
        if runtime.launch_id is not None and runtime.local_rank == 0:
            named = config.resume or config.run_dir
            for run_dir in [named] if named is not None else Path("runs").glob("*"):
                # Without a configuration, it was killed before it began.
                if runtime.launch_id in owners(run_dir) and (run_dir / "config.json").exists():
                    recorded = read_config(run_dir)
    hosts = [on_host for on_host in runtime.gather(recorded) if on_host is not None]
    # Where the data are, and by which credentials they are downloaded, each host knows best.
    return dataclasses.replace(hosts[0], data_dir=config.data_dir, data_url=config.data_url) if hosts else config


def restore(config: TrainConfig, runtime: Runtime, data: Data, state: TrainState, is_repeated: bool) -> Resumed:
    """Restore `state` from the newest valid checkpoint of `config.resume`. Collective; only rank zero reads files.

    Args:
        is_repeated: whether the same command may have begun the run, so that it is no mistake if the run has finished.

    Raises:
        UserError: the run cannot continue with this configuration, or has finished.
        StoppedError: the run has finished and `is_repeated`.
    """
    resumed = None
    with runtime.fail_together():
        if runtime.is_main:
            resumed = _find(config, data, is_repeated)
    resumed = runtime.from_main(resumed)
    for reason in resumed.corrupt:
        runtime.print0(f"WARNING: skipping corrupt checkpoint {reason}")
    if resumed.finished and is_repeated:
        raise StoppedError(f"the run in {config.resume} has finished", status=0)
    if resumed.checkpoint is not None:
        with runtime.fail_together():
            load_weights(state.model, resumed.content, config.model, resumed.checkpoint)
        if state.load_state_dict(resumed.content["state"], runtime.rank, runtime.world_size):
            resumed = dataclasses.replace(resumed, changes=(*resumed.changes, "PowerSGD begins again"))
    return resumed


def _find(config: TrainConfig, data: Data, is_repeated: bool) -> Resumed:
    """Return the point at which the run in `config.resume` continues, after all checks."""
    run_dir, plan = config.resume, data.plan
    assert run_dir is not None
    newest, corrupt = newest_checkpoint(run_dir)
    before, facts = read_config(run_dir), read_json(run_dir / "config.json")
    _check_dataset(run_dir, facts, data)
    path, content = newest or (None, {})
    last, recorded_steps = plan.last_step(config), _recorded_steps(run_dir)
    finished = recorded_steps >= last
    if path is not None:
        _check_checkpoint(run_dir, path, content, before, data)
        step = content["state"]["step"]
        if step > last:
            raise UserError(
                f"--resume {run_dir}: that run is at step {step:,} already, beyond {last:,}: raise --epochs or "
                f"--max-steps"
            )
        finished = finished and step == last
    _check_images(run_dir, facts, data)
    if finished and not is_repeated:
        raise UserError(
            f"--resume {run_dir}: that run has finished, with step {recorded_steps:,} of {last:,}"
            + ("; raise --epochs or --max-steps to continue it" if path else ", and its checkpoints are gone")
        )
    return Resumed(path, tuple(_changes(config, before, facts, plan.world_size)), content, tuple(corrupt), finished)


def newest_checkpoint(run_dir: Path) -> tuple[tuple[Path, dict[str, Any]] | None, list[str]]:
    """Return path and content of the newest valid checkpoint, and "PATH: REASON" for each newer, corrupt one.

    The first is None if the run has no checkpoints.
    """
    corrupt: list[str] = []
    for path in checkpoints(run_dir).values():
        try:
            return (path, load_checkpoint(path)), corrupt
        except DamagedCheckpointError as error:
            corrupt.append(str(error))
    if corrupt:
        raise UserError(f"--resume {run_dir}: no checkpoint there is valid; {'; '.join(corrupt)}")
    return None, corrupt


def _check_dataset(run_dir: Path, facts: dict[str, Any], data: Data) -> None:
    """Check that the dataset here has the name that config.json records."""
    for fact in ("dataset", "world_size"):
        if fact not in facts:
            raise UserError(f"--resume {run_dir}: its config.json lacks {fact!r}, so the run cannot continue")
    if facts["dataset"] != data.name:
        raise UserError(
            f"--resume {run_dir}: that run trains on {facts['dataset']}, but the dataset here is {data.name}: "
            f"see --data-dir"
        )


def _check_images(run_dir: Path, facts: dict[str, Any], data: Data) -> None:
    """Check that the images here have the fingerprint that config.json records."""
    images, decoder = facts.get("images"), facts.get("decoder", "")
    if not isinstance(images, dict):  # earlier versions recorded none
        return
    for split, now in data.fingerprint.items():
        if images.get(split) != now:
            has_changed = decoder not in ("", data.decoder)
            decoders = f", decoded by {decoder} and now by {data.decoder}" if has_changed else ""
            raise UserError(
                f"--resume {run_dir}: the {split} images have changed since that run began, from "
                f"{images.get(split)} to {now}{decoders}: restore them, or start a new run without --resume"
            )


def _check_checkpoint(run_dir: Path, path: Path, content: dict[str, Any], before: TrainConfig, data: Data) -> None:
    """Check that a checkpoint is of the run whose config.json is `before`, and of the classes of the dataset here."""
    for name, saved, recorded in differences(TrainConfig.from_json(content["config"]), before):
        if name not in MAY_CHANGE | {"run_dir"}:
            raise UserError(
                f"--resume {run_dir}: its config.json says {flag(name)} {recorded}, but its checkpoint {path.name} "
                f"was trained with {saved}: restore {saved}, or start a new run without --resume"
            )
    if tuple(content["classes"]) != data.classes:
        raise UserError(f"--resume {run_dir}: the class names of {path.name} are not those of the dataset here")


def _changes(config: TrainConfig, before: TrainConfig, facts: dict[str, Any], world_size: int) -> list[str]:
    """Return the differences from the run's last start, in words."""
    before = dataclasses.replace(before, autoresume=config.autoresume)
    changes = [f"{flag(name)} {old} -> {new}" for name, new, old in differences(config, before)]
    if facts["world_size"] != world_size:
        changes.append(f"world size {facts['world_size']} -> {world_size}")
    return changes


def _recorded_steps(run_dir: Path) -> int:
    """Return the steps of result.json. Without one, a run that was killed after its last step is not finished."""
    try:
        return int(read_json(run_dir / "result.json")["steps"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return 0
