"""What started this process: a plain `python`, torchrun, accelerate launch or mpirun."""

import os
import socket
from dataclasses import dataclass

import psutil

from cifar.errors import UserError


@dataclass(frozen=True)
class Launch:
    """What the launcher says it started.

    Attributes:
        rank, local_rank, world_size, local_world_size: of this process, among all and among its host's.
        host, hosts: index of the host in this round (torchrun's group rank), and how many there are.
        elastic: whether torchrun's agent watches over this process and starts it again when one of them fails.
        restarts_left: how often it will still do so.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    host: int = 0
    hosts: int = 1
    elastic: bool = False
    restarts_left: int = 0

    @classmethod
    def from_environment(cls) -> "Launch":
        """Read the launcher's variables; without any, this is one process on its own."""
        sizes = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
        world_size = int(next((os.environ[name] for name in sizes if name in os.environ), 1))
        restarts = (int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("MAX_RESTARTS", "RESTART_COUNT"))
        return cls(
            rank=int(os.environ.get("RANK", 0)),
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            world_size=world_size,
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
            host=int(os.environ.get("GROUP_RANK", 0)),
            hosts=int(os.environ.get("GROUP_WORLD_SIZE", 1)),
            elastic="TORCHELASTIC_RUN_ID" in os.environ,
            restarts_left=next(restarts) - next(restarts),
        )

    def check(self) -> None:
        """Refuse a launch that asked for several processes and started one.

        `accelerate launch --cpu --num_processes 2` starts a single process and sets no WORLD_SIZE; all it leaves
        of the wish is the address at which the processes were to meet (accelerate 1.15).

        Raises:
            UserError: this is such a launch.
        """
        by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
        if by_accelerate and "WORLD_SIZE" not in os.environ and self.world_size == 1:
            raise UserError(
                "accelerate launch was asked for several processes and started only this one: "
                "use `accelerate launch --config_file launch/accelerate.yaml --num_processes N train_ddp.py`, "
                "or `torchrun --nproc_per_node=N train_ddp.py`"
            )

    @property
    def agent_pid(self) -> int | None:
        """The process of torchrun's agent, which is this one's parent; None without torchrun."""
        return os.getppid() if self.elastic else None

    @staticmethod
    def store() -> tuple[tuple[str, int], bool]:
        """Host and port of the store at which the ranks met, and whether rank zero's process holds it."""
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), not by_agent

    def agent(self) -> str | None:
        """A name for torchrun's agent on this host: one and the same as long as it lives, and no other's ever."""
        if self.agent_pid is None:
            return None
        # Process ids come round again; with the second of its start, this is one process.
        started = psutil.Process(self.agent_pid).create_time()
        return f"{socket.gethostname()}:{self.agent_pid}:{started:.2f}"


def is_rank_zero() -> bool:
    """Return whether this process is rank zero, the one that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def threads_per_process(local_world_size: int) -> int:
    """CPU threads for each of a host's processes: the user's OMP_NUM_THREADS, else cores / processes.

    torchrun sets OMP_NUM_THREADS to 1 when it is unset, so that a 1 says nothing of what the user wants.
    """
    wanted = int(os.environ.get("OMP_NUM_THREADS", 1))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return wanted if wanted > 1 else max(1, cores // local_world_size)
