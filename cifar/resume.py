"""Continuing a run: whether its folder allows it, what has changed since, and the state to go on from."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar.batch_plan import BatchPlan
from cifar.checkpoint import load_model, newest_checkpoint
from cifar.config import MAY_CHANGE, TrainConfig, differences, flag, read_config
from cifar.errors import StoppedError, UserError
from cifar.loop import TrainState
from cifar.run_dir import _launchers
from cifar.distributed.runtime import Runtime


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on.

    Attributes:
        newest: the checkpoint that was loaded; None if the run ended before it wrote any, and so begins again.
        changes: what differs from the run's last start, in words.
    """

    newest: Path | None = None
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Found:
    path: Path | None
    state: dict[str, Any]
    complaints: list[str]
    finished: bool
    changes: tuple[str, ...]


def restore(
    config: TrainConfig, runtime: Runtime, dataset: str, plan: BatchPlan, state: TrainState, own: bool
) -> Resumed:
    """Read the newest good checkpoint of `config.resume` into `state`. Collective; rank zero reads, and sends it on.

    Args:
        dataset: name of the data at hand.
        own: whether this launch began the run, so that there is no mistake in starting it once more.

    Raises:
        UserError: the run can't go on with this configuration, or has finished.
        StoppedError: the run has finished, and is this launch's own.
    """
    found = None
    with runtime.fail_together():
        if runtime.is_main:
            found = _find(config, runtime, dataset, plan, own)
    found = runtime.from_main(found)
    for complaint in found.complaints:
        runtime.print0(f"WARNING: passed over: {complaint}")
    if found.finished and own:
        raise StoppedError(f"the run in {config.resume} has finished", status=0)
    if found.path is not None:
        with runtime.fail_together():
            _load(found.path, found.state, config, runtime, plan, state)
    return Resumed(found.path, found.changes)


def _find(config: TrainConfig, runtime: Runtime, dataset: str, plan: BatchPlan, own: bool) -> _Found:
    run_dir = config.resume
    assert run_dir is not None
    found, complaints = newest_checkpoint(run_dir)
    was, facts = read_config(run_dir), json.loads((run_dir / "config.json").read_text())
    for fact in ("dataset", "world_size"):
        if fact not in facts:
            raise UserError(f"--resume {run_dir}: its config.json has lost its {fact!r}: it can't be continued")
    changes = [f"{flag(name)} {before} -> {now}" for name, now, before in differences(config, was)]
    if facts["world_size"] != runtime.world_size:
        changes.append(f"world size {facts['world_size']} -> {runtime.world_size}")
    if plan.local_batch_size != config.local_batch_size:
        changes.append(f"--local-batch-size {config.local_batch_size} -> {plan.local_batch_size}")
    if facts["dataset"] != dataset:
        raise UserError(
            f"--resume {run_dir}: that run trains on {facts['dataset']}, and the data here is {dataset}: see --data-dir"
        )
    last, ended = plan.last_step(config), _finished_steps(run_dir)
    if found is None:
        if ended >= last and not own:
            raise UserError(f"--resume {run_dir}: that run has finished, and none of its checkpoints is there")
        return _Found(None, {}, complaints, ended >= last, tuple(changes))

    path, content = found
    for name, saved, recorded in differences(TrainConfig.from_json(content["config"]), was):
        if name not in MAY_CHANGE | {"run_dir"}:
            raise UserError(
                f"--resume {run_dir}: its config.json says {flag(name)} {recorded}, and its checkpoint {path.name} "
                f"was trained with {saved}: put {saved} back, or start a new run without --resume"
            )
    step = content["state"]["step"]
    finished = step >= last and ended >= last
    if finished and not own:
        raise UserError(
            f"--resume {run_dir}: that run has finished, with step {step:,} of {last:,}; more --epochs or --max-steps "
            f"would continue it"
        )
    return _Found(path, content["state"], complaints, finished, tuple(changes))


def _finished_steps(run_dir: Path) -> int:
    # A run can be killed between its last checkpoint and its result; then only the result is left to do.
    try:
        return json.loads((run_dir / "result.json").read_text())["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _load(
    path: Path, saved: dict[str, Any], config: TrainConfig, runtime: Runtime, plan: BatchPlan, state: TrainState
) -> None:
    load_model(state.net, {"config": {"model": config.model}, "state": saved}, config.model, path)
    windows = saved["window_loss"]
    # With other ranks there is nobody to give each sum back to; their mean gives the same average.
    own = windows[runtime.rank] if len(windows) == runtime.world_size else sum(windows) / len(windows)
    # As if it were of as many micro-batches as a rank now has in a step.
    state.load_state_dict(saved | {"window_loss": own * (plan.accumulation / saved["accumulation"])})


def find_own_run(config: TrainConfig, runtime: Runtime) -> TrainConfig:
    """The configuration to go on with: that of the run which this launch has begun before, else `config`.

    torchrun starts the same command line again when a rank has failed or a host has come or gone; it is one and the
    same run then. The launch is known by torchrun's own process, which stays. (TORCHELASTIC_RUN_ID is no help: it is
    "none" in every launch that doesn't set it; nor is the restart count, which a host that returns begins at zero.)
    """
    agent = runtime.launch.agent()
    own = None
    if agent is not None and runtime.local_rank == 0:
        named = config.resume or config.run_dir
        candidates = [named] if named is not None else Path("runs").glob("*")
        began = float(agent.rsplit(":", 1)[1])
        for run_dir in candidates:
            with contextlib.suppress(OSError):
                # A folder that hasn't changed since torchrun began can't be this launch's.
                if run_dir.stat().st_mtime >= began - 1 and agent in _launchers(run_dir):
                    own = run_dir
    run_dirs = [found for found in runtime.gather(own) if found is not None]
    if not run_dirs:
        return config
    return read_config(run_dirs[0])
