"""Continue a run: find it, check that it may continue, restore its newest valid checkpoint."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar.checkpoint import load_model, newest_checkpoint
from cifar.config import MAY_CHANGE, TrainConfig, differences, flag, read_config
from cifar.data import Data
from cifar.distributed.runtime import Runtime
from cifar.errors import StoppedError, UserError
from cifar.files import read_json
from cifar.run_dir import owners
from cifar.train_state import TrainState


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


def find_own_run(config: TrainConfig, runtime: Runtime) -> TrainConfig:
    """Return the configuration of the run that this launch began before a restart, or else `config`.

    torchrun starts the same command line again after a rank has failed or a host has come or gone. A run is recognized
    by `Runtime.launch_id`. (TORCHELASTIC_RUN_ID is not unique before torch 2.14, and the restart count of a returning
    host begins at zero.)

    Raises:
        UserError: the configuration of that run is damaged.
    """
    own = None  # read where it is found: the other hosts may not share the directory
    with runtime.fail_together():
        if runtime.launch_id is not None and runtime.local_rank == 0:
            named = config.resume or config.run_dir
            for run_dir in [named] if named is not None else Path("runs").glob("*"):
                # Without a configuration, it was killed before it began.
                if runtime.launch_id in owners(run_dir) and (run_dir / "config.json").exists():
                    own = read_config(run_dir)
    found = [own for own in runtime.gather(own) if own is not None]
    # Where the data are, and by which credentials they are downloaded, each host knows best.
    return dataclasses.replace(found[0], data_dir=config.data_dir, data_url=config.data_url) if found else config


def restore(config: TrainConfig, runtime: Runtime, data: Data, state: TrainState, own: bool) -> Resumed:
    """Restore `state` from the newest valid checkpoint of `config.resume`. Collective; only rank zero reads files.

    Args:
        own: whether this launch began the run, so that starting it again is no mistake.

    Raises:
        UserError: the run cannot continue with this configuration, or has finished.
        StoppedError: the run has finished and is this launch's own.
    """
    found = None
    with runtime.fail_together():
        if runtime.is_main:
            found = _find(config, runtime, data, own)
    found = runtime.from_main(found)
    for reason in found.corrupt:
        runtime.print0(f"WARNING: skipping corrupt checkpoint {reason}")
    if found.finished and own:
        raise StoppedError(f"the run in {config.resume} has finished", status=0)
    if found.checkpoint is not None:
        with runtime.fail_together():
            load_model(state.model, found.content, config.model, found.checkpoint)
        losses = found.content["state"]["running_loss"]
        # One sum per rank. With another number of ranks, their mean gives the same average.
        loss = losses[runtime.rank] if len(losses) == runtime.world_size else sum(losses) / len(losses)
        state.load_state_dict(found.content["state"] | {"running_loss": loss})
    return found


def _find(config: TrainConfig, runtime: Runtime, data: Data, own: bool) -> Resumed:
    run_dir, plan = config.resume, data.plan
    assert run_dir is not None
    found, corrupt = newest_checkpoint(run_dir)
    before, facts = read_config(run_dir), read_json(run_dir / "config.json")
    for fact in ("dataset", "world_size"):
        if fact not in facts:
            raise UserError(f"--resume {run_dir}: its config.json lacks {fact!r}, so the run cannot continue")
    if facts["dataset"] != data.name:
        raise UserError(
            f"--resume {run_dir}: that run trains on {facts['dataset']}, but the dataset here is {data.name}: "
            f"see --data-dir"
        )
    changes = [f"{flag(name)} {old} -> {new}" for name, new, old in differences(config, before)]
    if facts["world_size"] != runtime.world_size:
        changes.append(f"world size {facts['world_size']} -> {runtime.world_size}")

    last, recorded_steps = plan.last_step(config), _recorded_steps(run_dir)
    path, content = found or (None, {})
    if path is None:
        finished = recorded_steps >= last
    else:
        for name, saved, recorded in differences(TrainConfig.from_json(content["config"]), before):
            if name not in MAY_CHANGE | {"run_dir"}:
                raise UserError(
                    f"--resume {run_dir}: its config.json says {flag(name)} {recorded}, but its checkpoint {path.name} "
                    f"was trained with {saved}: restore {saved}, or start a new run without --resume"
                )
        if tuple(content["classes"]) != data.classes:
            raise UserError(f"--resume {run_dir}: the class names of {path.name} are not those of the dataset here")
        step = content["state"]["step"]
        if step > last:
            raise UserError(
                f"--resume {run_dir}: that run is at step {step:,} already, beyond {last:,}: raise --epochs or "
                f"--max-steps"
            )
        finished = step == last and recorded_steps >= last
    recorded, decoder = facts.get("images"), facts.get("decoder", "")
    if isinstance(recorded, dict):  # earlier versions recorded none
        for split, now in data.fingerprint.items():
            if recorded.get(split) != now:
                changed = decoder not in ("", data.decoder)
                decoders = f", decoded by {decoder} and now by {data.decoder}" if changed else ""
                raise UserError(
                    f"--resume {run_dir}: the {split} images have changed since that run began, from "
                    f"{recorded.get(split)} to {now}{decoders}: restore them, or start a new run without --resume"
                )
    if finished and not own:
        raise UserError(
            f"--resume {run_dir}: that run has finished, with step {recorded_steps:,} of {last:,}"
            + ("; raise --epochs or --max-steps to continue it" if path else ", and its checkpoints are gone")
        )
    return Resumed(path, tuple(changes), content, tuple(corrupt), finished)


def _recorded_steps(run_dir: Path) -> int:
    # A run can be killed between its last checkpoint and its result.json: then only the result is left to do.
    try:
        return int(read_json(run_dir / "result.json")["steps"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return 0
