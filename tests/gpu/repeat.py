"""Run train_ddp.py several times in one process, so that all runs but the first find a warm device.

    python -m tests.gpu.repeat --runs 5 --out results.jsonl --recipe speed94 --precision bf16 --cuda-graph

The k-th run has --seed k. A line per run, printed and appended to `--out`: its result.json and the seconds of main().
"""

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path

import train_ddp
from tests.helpers.measuring import now
from tests.helpers.processes import result


def repeat() -> None:
    """Train, print and record each run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args, flags = parser.parse_known_args()
    for seed in range(args.runs):
        with tempfile.TemporaryDirectory() as directory:
            run_dir = Path(directory) / "run"
            began = now()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                train_ddp.main([*flags, "--wandb", "disabled", "--seed", str(seed), "--run-dir", str(run_dir)])
            row = {"flags": flags, "seed": seed, "main_seconds": now() - began, **result(run_dir)}
        shown = ("test_accuracy", "test_accuracy_tta", "train_seconds", "main_seconds")
        print(f"seed {seed}", *(f"{name} {row[name]}" for name in shown), sep=", ", flush=True)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    repeat()
