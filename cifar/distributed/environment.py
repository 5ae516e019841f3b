"""The environment that the launcher set: plain `python`, torchrun, accelerate launch or mpirun."""

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from cifar.distributed.cpu import available_cores
from cifar.errors import UserError


@dataclass(frozen=True)
class Launch:
    """This process's place among those that the launcher started.

    Attributes:
        rank: index of this process among all processes.
        local_rank: index among the processes of this host.
        world_size: number of processes.
        local_world_size: number of processes on this host.
        host: index of this host (torchrun's group rank); may change when the run restarts.
        hosts: number of hosts.
        elastic: whether torchrun started this process and supervises it.
        restarts_left: how many more failures torchrun's agent on this host answers with a restart.
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
        """Read the launcher's variables; without any, describe a single process."""
        sizes = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
        world_size = next((int(os.environ[name]) for name in sizes if name in os.environ), 1)
        return cls(
            rank=_integer("RANK", 0),
            local_rank=_integer("LOCAL_RANK", 0),
            world_size=world_size,
            local_world_size=_integer("LOCAL_WORLD_SIZE", world_size),
            host=_integer("GROUP_RANK", 0),
            hosts=_integer("GROUP_WORLD_SIZE", 1),
            elastic="TORCHELASTIC_RUN_ID" in os.environ,
            restarts_left=_integer("TORCHELASTIC_MAX_RESTARTS", 0) - _integer("TORCHELASTIC_RESTART_COUNT", 0),
        )

    def check(self) -> None:
        """Refuse a launch that requested several processes but started one.

        `accelerate launch --cpu --num_processes 2` starts a single process without WORLD_SIZE. Only the rendezvous
        address shows that two were requested (accelerate 1.15).

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
        """Return the process ID of torchrun's agent; None without torchrun, or once the agent has died and been reaped.

        torchrun makes each worker the leader of a session. That may be a script which runs this process.
        """
        try:
            return psutil.Process(os.getsid(0)).ppid() if self.elastic else None
        except psutil.NoSuchProcess:
            return None

    def agent(self) -> str | None:
        """Return a unique ID for this host's torchrun agent, stable for its lifetime; None without torchrun."""
        pid = self.agent_pid
        return process_id(pid) if pid is not None else None

    @staticmethod
    def store() -> tuple[tuple[str, int], bool]:
        """Return (host, port) of the rendezvous store, and whether rank zero's process serves it, not the launcher."""
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), not by_agent


def process_id(pid: int) -> str:
    """Return an ID of the process `pid` that no other process has, on this host or another, before or after.

    On Linux it is made of what no clock, host name or disk can change: the boot, the namespace of process IDs (the
    container), the process ID and the ticks from the boot to the start of the process. psutil's create_time moves when
    the clock is set, but not on other systems, which record the time itself.

    Raises:
        OSError, psutil.Error: there is no such process.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():
        return f"{pid}:{psutil.Process(pid).create_time()}"
    start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]  # the name before ")" may hold spaces
    return f"{boot.read_text().strip()}:{os.readlink('/proc/self/ns/pid')}:{pid}:{start}"


def is_rank_zero() -> bool:
    """Return whether this process is rank zero, the one that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def quiet_nccl_watchdog() -> None:
    """Keep NCCL's watchdog from collecting debugging dumps after a failed collective, unless the user asks for them.

    It would wait a minute for them, and leave a key in torchrun's store by which the next start's ranks are killed
    (torch 2.11 to 2.14). To be called before the process group is made.
    """
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    os.environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "500")


def threads_per_process(local_world_size: int) -> int:
    """Return the number of CPU threads for each process of a host: OMP_NUM_THREADS, else usable cores / processes.

    An OMP_NUM_THREADS of 1 does not count: torchrun sets it when the user did not set any.
    """
    wanted = _integer("OMP_NUM_THREADS", 1)
    return wanted if wanted > 1 else max(1, available_cores() // local_world_size)


def _integer(name: str, default: int) -> int:
    return int(os.environ.get(name, default))
