"""The environment that the launcher set: plain `python`, torchrun or accelerate launch; others are refused."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import psutil

from cifar.distributed.cpu import available_cores
from cifar.errors import UserError

# Set by torchrun, and by accelerate launch, for each process.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Where torchrun expects a worker's error, below a directory that each agent makes for itself (mkdtemp; torch 2.14).
_ERROR_FILE = re.compile(r"(.+)/attempt_\d+/\d+/error\.json")
_ADVICE = "to train in one process, or start several with `torchrun --nproc_per_node=N train_ddp.py`"

# Launchers whose processes torchrun's variables do not connect: how many they started, and the index of this one. In a
# SLURM allocation or batch script SLURM_NTASKS is set, but not SLURM_STEP_NUM_TASKS (SLURM 22.05).
_OTHERS = (
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("mpirun", "PMI_SIZE", "PMI_RANK"),
)

# What `accelerate launch` can be configured for, but this program does not do: the default, and what to do instead.
_DDP = "this program trains with DistributedDataParallel: use launch/accelerate.yaml"
_ACCELERATE = {
    "ACCELERATE_USE_FSDP": ("false", _DDP),
    "ACCELERATE_USE_DEEPSPEED": ("false", _DDP),
    "ACCELERATE_USE_MEGATRON_LM": ("false", _DDP),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false", _DDP),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "only --compile compiles the model: set it to no"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "only --global-batch-size decides the accumulation: set it to 1"),
}


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
        """Read the launcher's variables; without any, describe a single process.

        Raises:
            UserError: some are missing, or they make no sense together.
        """
        if missing := _missing():
            _, world_size, rank = _other_launcher()
            if world_size > 1 or len(missing) == len(_TORCHRUN):
                return cls(rank=rank, local_rank=rank, world_size=world_size, local_world_size=world_size)
            if "ACCELERATE_MIXED_PRECISION" in os.environ and "RANK" in missing:
                # `accelerate launch --cpu --num_processes 2` sets only the address (accelerate 1.15).
                raise UserError(
                    "accelerate launch was asked for several processes and started only this one: "
                    "use `accelerate launch --config_file launch/accelerate.yaml --num_processes N train_ddp.py`, "
                    "or `torchrun --nproc_per_node=N train_ddp.py`"
                )
            given = ", ".join(name for name in _TORCHRUN if name in os.environ)
            lacking, unset = ", ".join(missing), f"unset {given} {_ADVICE}"
            raise UserError(f"the environment has {given}, but not {lacking}: set that, too, or {unset}")
        rank, world_size, local_rank, local_world_size = map(_integer, _TORCHRUN[:4])
        if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
            values = ", ".join(f"{name}={os.environ[name]}" for name in _TORCHRUN[:4])
            raise UserError(f"these variables contradict each other: {values}: unset them {_ADVICE}")
        if not 0 <= _integer("MASTER_PORT") < 1 << 16:
            raise UserError(f"MASTER_PORT={os.environ['MASTER_PORT']} is not a port: correct it")
        return cls(
            rank=rank,
            local_rank=local_rank,
            world_size=world_size,
            local_world_size=local_world_size,
            host=_integer("GROUP_RANK", 0),
            hosts=_integer("GROUP_WORLD_SIZE", 1),
            elastic="TORCHELASTIC_RUN_ID" in os.environ,
            restarts_left=_integer("TORCHELASTIC_MAX_RESTARTS", 0) - _integer("TORCHELASTIC_RESTART_COUNT", 0),
        )

    def check(self) -> None:
        """Refuse what would train otherwise than its launcher was asked to.

        Raises:
            UserError: several processes would train separately, or accelerate was configured for what is not done here.
        """
        launcher, copies, _ = _other_launcher()
        if copies > 1 and _missing():
            raise UserError(
                f"{launcher} started {copies} processes, which would train separately: use `torchrun "
                f"--nproc_per_node=N train_ddp.py` on one host, launch/multi_node.sh on several, "
                f"`sbatch launch/slurm.sbatch` under SLURM, or `{launcher} -n 1` for one process"
            )
        # A torchrun that may restart can be the first or the last of 1 to N hosts.
        if copies > 1 and self.elastic and self.hosts == 1 and _integer("TORCHELASTIC_MAX_RESTARTS", 0) == 0:
            raise UserError(
                f"{launcher} started torchrun {copies} times, which would train separately: tell torchrun of the other "
                f"hosts, as launch/slurm.sbatch and launch/multi_node.sh do, or use `{launcher} -n 1`"
            )
        for name, (default, reason) in _ACCELERATE.items():
            value = os.environ.get(name, default)
            if value.lower() not in (default, "0", "no", ""):
                raise UserError(f"accelerate's configuration sets {name}={value}, but {reason}")

    @staticmethod
    def identify(number: int) -> str | None:
        """Return an ID for run `number` of this process that no other start of torchrun has, only its restarts.

        It begins with the directory of the agent's logs. Each call of torchrun, elastic_launch or notebook_launcher
        makes a new one. Without it, the result is None: outside of torchrun, or with `--log-dir /dev/null`. A restart
        repeats the same program, so its runs have the same numbers.
        """
        match = _ERROR_FILE.fullmatch(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
        return f"{match[1]}#{number}" if match else None

    def agent(self) -> tuple[int, str] | None:
        """Return the PID and the `process_id` of torchrun's agent; None without torchrun, or if it cannot be found.

        It is the nearest ancestor that was not started with this process's variables; scripts may be in between.
        """
        name = "TORCHELASTIC_ERROR_FILE"
        try:
            for ancestor in psutil.Process().parents() if self.elastic else []:
                if ancestor.environ().get(name) != os.environ.get(name):
                    return ancestor.pid, process_id(ancestor.pid)
        except (OSError, psutil.Error):  # another user's process
            pass
        return None

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


def is_running(pid: int, own_id: str) -> bool:
    """Return whether a process `pid` with the `process_id` `own_id` runs on this host; a zombie has ended."""
    try:
        return process_id(pid) == own_id and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False


def is_rank_zero() -> bool:
    """Return whether this process is rank zero, the one that prints and writes.

    A process whose place is unknown, because of a broken environment, speaks for itself.
    """
    try:
        return Launch.from_environment().rank == 0
    except UserError:
        return True


def is_local_rank_zero() -> bool:
    """Return whether this process is the one of its host that prints before the ranks have met."""
    try:
        return Launch.from_environment().local_rank == 0
    except UserError:
        return True


def accelerate_fields() -> dict[str, str]:
    """Return the fields of a TrainConfig, `precision` and `device`, that accelerate's configuration decides.

    Raises:
        UserError: the precision is fp8, or unknown.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", "bf16", "fp16"):
        raise UserError(f"ACCELERATE_MIXED_PRECISION={precision} is not supported: use no, bf16 or fp16")
    fields = {} if precision == "no" else {"precision": precision}
    return fields | ({"device": "cpu"} if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1") else {})


def prepare_nccl() -> None:
    """Set up NCCL, unless the user has. To be called before the process group is made.

    After a failed collective, its watchdog would wait a minute for debugging dumps, and leave a key in torchrun's store
    by which the next start's ranks are killed (torch 2.11 to 2.14). With NVLS, the sums of switches, ranks do not start
    on some rented parts of a host (NCCL 2.29, NVIDIA/nccl#2077), and sums have other bits from call to call
    (NVIDIA/nccl#1497).
    """
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    os.environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "500")


def quiet_profiler() -> None:
    """Keep torch's profiler from printing its progress, and an error where there is no GPU. To be called before it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def chosen_threads() -> int | None:
    """Return the number of CPU threads that the user has chosen by OMP_NUM_THREADS, or None.

    A 1 does not count: torchrun sets it when the user did not set any.
    """
    outermost = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list has a number for each level
    return int(outermost) if outermost.isdecimal() and int(outermost) > 1 else None


def threads_per_process(local_world_size: int) -> int:
    """Return the number of CPU threads for each process of a host: the chosen one, else usable cores / processes."""
    return chosen_threads() or max(1, available_cores() // local_world_size)


def _missing() -> list[str]:
    return [name for name in _TORCHRUN if name not in os.environ]


def _other_launcher() -> tuple[str, int, int]:
    """Return the launcher other than torchrun that started several processes, their number, and this one's index."""
    for name, size, rank in _OTHERS:
        count = os.environ.get(size, "")
        # In the shell of `srun --pty`, the user starts the processes.
        if count.isdecimal() and int(count) > 1 and "SLURM_PTY_PORT" not in os.environ:
            return name, int(count), _integer(rank, 0)
    return "python", 1, 0


def _integer(name: str, default: int | None = None) -> int:
    value = os.environ.get(name, default)
    try:
        return int(value)  # type: ignore[arg-type]
    except ValueError:
        raise UserError(
            f"{name} is {value!r} in the environment, which is not an integer: correct or unset it"
        ) from None
