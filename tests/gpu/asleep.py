"""Run train_ddp.py; in its first start, the last rank falls asleep in Python, where its heartbeat goes on."""

import os
import time

import torch

import train_ddp
from cifar.command import exit_on_error
from cifar.run import Run
from tests.helpers.small import shrink


class Asleep(Run):
    """A run that falls asleep after its second checkpoint."""

    def after_step(self) -> bool:
        """Sleep, if it is time."""
        last, first_start = self.runtime.world_size - 1, os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first_start and self.runtime.rank == last and self.state.step == 2 * (self.config.checkpoint_steps or 1):
            print("falls asleep", flush=True)
            time.sleep(600)
        return super().after_step()


if __name__ == "__main__":
    train_ddp.Run = Asleep  # type: ignore[misc]
    if not torch.cuda.is_available():
        shrink()
    with exit_on_error("train_ddp.py"):
        train_ddp.main()
