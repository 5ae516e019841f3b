"""Run train_ddp.py several times in one process, so that all runs but the first find a warm device.

    python -m tests.gpu.repeat --runs 5 --out results.jsonl --recipe speed94 --precision bf16 --cuda-graph

The k-th run has --seed k. One line per run: accuracy, seconds of training, seconds of the whole call of main().
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path

from train_ddp import main


def repeat() -> None:
    """Train, print and record each run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args, flags = parser.parse_known_args()
    for seed in range(args.runs):
        with tempfile.TemporaryDirectory() as directory:
            run_dir = Path(directory) / "run"
            began = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                main([*flags, "--wandb", "disabled", "--seed", str(seed), "--run-dir", str(run_dir)])
            seconds = time.perf_counter() - began
            result = json.loads((run_dir / "result.json").read_text())
        views = result["test_accuracy_tta"]
        print(
            f"{' '.join(flags)} --seed {seed}: {100 * result['test_accuracy']:.2f} %"
            + (f", {100 * views:.2f} % with views" if views else "")
            + f", {result['train_seconds']:.2f} s of training, {seconds:.1f} s in main()",
            flush=True,
        )
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps({"flags": flags, "seed": seed, "main_seconds": seconds, **result}) + "\n")


if __name__ == "__main__":
    repeat()
