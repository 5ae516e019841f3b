"""Print the exact losses of a recipe's first steps as JSON: python -m tests.helpers.golden_losses RECIPE STEPS [FLAGS]

Under torchrun, rank 0 prints. The images are the synthetic dataset's; the test set is cut to 100 images, as the
losses are the training's.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import cifar.datasets.synthetic as synthetic
import train_ddp
from tests.helpers.processes import records


def main(recipe: str, steps: str, *flags: str) -> None:
    """Train for `steps` steps and print a loss for each."""
    synthetic.TEST_SIZE = 100
    folder = os.environ.get("GOLDEN_DIR") or tempfile.mkdtemp()
    run_dir = Path(folder) / "run"
    train_ddp.main([
        "--dataset", "synthetic", "--device", "cpu", "--wandb", "disabled", "--run-dir", str(run_dir),
        "--recipe", recipe, "--max-steps", steps, "--log-steps", "1", "--tta", "none", *flags,
    ])  # fmt: skip
    if os.environ.get("RANK", "0") == "0":
        print("LOSSES", json.dumps([loss for _, loss in records(run_dir, "train/loss")]))


if __name__ == "__main__":
    main(*sys.argv[1:])
