"""Profile a few training steps of each rank: a trace for Perfetto, and the most expensive operations."""

from collections.abc import Callable
from pathlib import Path

from torch.profiler import profile, schedule

from cifar.distributed.environment import quiet_profiler

FIRST, LAST = 10, 20  # steps of this process, from 1; in those before, kernels are loaded and chosen
_ROWS = 10
_SHAPES = 60  # characters


class StepProfiler:
    """torch.profiler over steps 10 to 20 of this process, or to its last one if that is earlier.

    Each rank writes `trace-rankN.json`, and rank zero prints torch's table of its most expensive operations.
    """

    def __init__(self, run_dir: Path, rank: int, on_gpu: bool, print_line: Callable[[str], None]) -> None:
        """Start counting steps. On other hosts than rank zero's, `run_dir` is created if need be."""
        self._path, self._print = run_dir / f"trace-rank{rank}.json", print_line
        self._order = f"self_{'device' if on_gpu else 'cpu'}_time_total"
        quiet_profiler()
        self._profile = profile(
            schedule=schedule(skip_first=FIRST - 1, wait=0, warmup=1, active=LAST - FIRST + 1, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self._running = True
        self._profile.start()
        self._profile.step()  # the trace names step 1 ProfilerStep#1, not #0

    def after_step(self, last: bool) -> None:
        """Note the end of a training step; after the `last` of all, write the trace if that has not been done."""
        if last:
            self.close()
        elif self._running:
            self._profile.step()

    def close(self) -> None:
        """Stop profiling, and write the steps so far if that has not been done."""
        if self._running:
            self._running = False
            self._profile.stop()

    def _write(self, finished: profile) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(self._path))
        operations = finished.key_averages(group_by_input_shape=True)
        table = operations.table(sort_by=self._order, row_limit=_ROWS, max_shapes_column_width=_SHAPES)
        self._print(f"The most expensive operations of steps {FIRST} to {LAST}:\n{table}")
        self._print(f"every step and rank: {self._path.with_name('trace-rank*.json')}, at ui.perfetto.dev")
