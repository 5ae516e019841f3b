"""Profile a few training steps of each rank: a trace for Perfetto, and the most expensive operations."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from cifar.distributed.environment import quiet_profiler
from cifar.distributed.runtime import Runtime

FIRST, LAST = 10, 20  # steps of this process, from 1; in those before, kernels are loaded and chosen
_ROWS = 10
_SHAPES = 60  # characters of the input shapes that are printed


class StepProfiler:
    """torch.profiler over steps 10 to 20 of this process, or to its last one if that is earlier.

    Each rank writes `trace-rankN.json`, and rank zero prints its most expensive operations, with the shapes of their
    inputs, and on a GPU its most expensive kernels.
    """

    def __init__(self, runtime: Runtime, run_dir: Path) -> None:
        """Start counting steps; see `after_step`. On other hosts than rank zero's, `run_dir` is created if need be."""
        self._runtime, self._path = runtime, run_dir / f"trace-rank{runtime.rank}.json"
        quiet_profiler()
        self._on_gpu = runtime.device.type == "cuda"
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])],
            schedule=schedule(skip_first=FIRST - 1, wait=0, warmup=1, active=LAST - FIRST + 1, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self._running, self._written = True, False
        self._profile.start()
        self._profile.step()  # the trace names step 1 ProfilerStep#1, not #0

    def after_step(self, last: bool) -> None:
        """Note the end of a training step; after the last one to be profiled, or the `last` of all, write the trace."""
        if last:
            self.close()
        elif self._running:
            self._profile.step()

    def close(self) -> None:
        """Stop profiling, and write the steps so far if that has not been done."""
        if self._running:
            self._running = False
            self._profile.stop()
            if not self._written:
                self._runtime.print0(f"no profile: training ended before step {FIRST} of this process")

    def _write(self, finished: profile) -> None:
        self._written = True
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            finished.export_chrome_trace(str(self._path))
        except (OSError, RuntimeError) as error:  # torch's own writer raises the latter
            print(f"WARNING: rank {self._runtime.rank} cannot write {self._path}: {error}", flush=True)
        if not self._runtime.is_main:
            return
        events = list(finished.key_averages(group_by_input_shape=True))
        tables = {"operations": [event for event in events if event.device_type == DeviceType.CPU]}
        if self._on_gpu:
            tables["kernels"] = [event for event in events if event.device_type == DeviceType.CUDA]
        for name, rows in tables.items():
            for line in table(name, rows, "device" if self._on_gpu else "cpu"):
                self._runtime.print0(line)
        self._runtime.print0(f"every step and rank: {self._path.with_name('trace-rank*.json')}, at ui.perfetto.dev")


def table(name: str, events: Iterable[Any], where: str) -> list[str]:
    """Return the ten of torch's averaged `events` that took the longest themselves, as lines of a table.

    Args:
        name: of the events, "operations" or "kernels".
        where: "cpu" or "device", whose time counts.
    """

    def microseconds(event: Any) -> float:
        return getattr(event, f"self_{where}_time_total")

    events = [event for event in events if not event.key.startswith("ProfilerStep")]
    total = sum(map(microseconds, events)) or 1.0
    lines = [f"The most expensive {name} of steps {FIRST} to {LAST}, without what they call:"]
    for event in sorted(events, key=microseconds, reverse=True)[:_ROWS]:
        shapes = str([shape for shape in event.input_shapes or [] if shape])
        shapes = "" if shapes == "[]" else shapes if len(shapes) <= _SHAPES else f"{shapes[: _SHAPES - 3]}..."
        share, time = 100 * microseconds(event) / total, microseconds(event) / 1000
        lines.append(f"{share:5.1f} %{time:10.2f} ms{event.count:7,} x  {event.key}  {shapes}".rstrip())
    return lines
