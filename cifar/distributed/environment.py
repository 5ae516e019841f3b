"""The environment that the launcher set: plain `python`, torchrun or accelerate launch; others are refused."""

import os
import re
from dataclasses import dataclass

import psutil

from cifar.distributed.process import process_id
from cifar.errors import UserError

# Set by torchrun, and by accelerate launch, for each process.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Where torchrun expects a worker's error, below a directory that each agent makes for itself (mkdtemp; torch 2.14).
_ERROR_FILE = re.compile(r"(.+)/attempt_\d+/\d+/error\.json")
_ADVICE = (
    "set all of them, as torchrun and `accelerate launch --config_file launch/accelerate.yaml` do, "
    "or unset them to train in one process"
)

# Launchers whose processes torchrun's variables do not connect: how many they started, and the index of this one. In a
# SLURM allocation or batch script SLURM_NTASKS is set, but not SLURM_STEP_NUM_TASKS (SLURM 22.05).
_OTHERS = (
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("mpirun", "PMI_SIZE", "PMI_RANK"),
)

# What `accelerate launch` can be configured for, and the values besides "no", "0" and "" that this program follows.
_ACCELERATE = {
    "ACCELERATE_USE_FSDP": ("false",),
    "ACCELERATE_USE_DEEPSPEED": ("false",),
    "ACCELERATE_USE_MEGATRON_LM": ("false",),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false",),
    "ACCELERATE_DYNAMO_BACKEND": (),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1",),
    "ACCELERATE_MIXED_PRECISION": ("bf16", "fp16"),
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
        """Read torchrun's variables; without any of them, describe a single process or that of another launcher.

        Raises:
            UserError: some are missing, or they make no sense together.
        """
        if missing := _missing():
            _, copies, index = _other_launcher()
            if copies > 1 or len(missing) == len(_TORCHRUN):
                return cls(rank=index, local_rank=index, world_size=copies, local_world_size=copies)
            given = ", ".join(name for name in _TORCHRUN if name in os.environ)
            raise UserError(f"the environment has {given}, but not {', '.join(missing)}: {_ADVICE}")
        try:
            launch = cls(
                rank=_integer("RANK"),
                local_rank=_integer("LOCAL_RANK"),
                world_size=_integer("WORLD_SIZE"),
                local_world_size=_integer("LOCAL_WORLD_SIZE"),
                host=_integer("GROUP_RANK"),
                hosts=_integer("GROUP_WORLD_SIZE", 1),
                elastic="TORCHELASTIC_RUN_ID" in os.environ,
                restarts_left=_integer("TORCHELASTIC_MAX_RESTARTS") - _integer("TORCHELASTIC_RESTART_COUNT"),
            )
            possible = 0 <= launch.rank < launch.world_size and 0 <= _integer("MASTER_PORT") < 1 << 16
            possible = possible and 0 <= launch.local_rank < launch.local_world_size <= launch.world_size
        except ValueError:  # not an integer
            possible = False
        if not possible:
            values = ", ".join(f"{name}={os.environ[name]}" for name in _TORCHRUN)
            raise UserError(f"these variables contradict each other: {values}: {_ADVICE}")
        return launch

    def check(self) -> None:
        """Refuse what would train otherwise than its launcher was asked to.

        Raises:
            UserError: several processes would train separately, or accelerate was configured for what is not done here.
        """
        launcher, copies, _ = _other_launcher()
        # A torchrun that may restart can be the first or the last of 1 to N hosts.
        single_host = self.elastic and self.hosts == 1 and _integer("TORCHELASTIC_MAX_RESTARTS") == 0
        if copies > 1 and (single_host or _missing()):
            raise UserError(
                f"{launcher} started {copies} processes, which would train separately: use `torchrun "
                f"--nproc_per_node=N train_ddp.py` on one host, launch/multi_node.sh on several, "
                f"`sbatch launch/slurm.sbatch` under SLURM, or `{launcher} -n 1` for one process"
            )
        values = {name: os.environ[name] for name in _ACCELERATE if name in os.environ}
        ignored = [f"{k}={v}" for k, v in values.items() if v.lower() not in ("no", "0", "", *_ACCELERATE[k])]
        if ignored:
            raise UserError(
                f"accelerate's configuration sets {', '.join(ignored)}, which would be ignored: use "
                f"launch/accelerate.yaml, and the flags --compile, --global-batch-size and --precision"
            )

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


def is_rank_zero() -> bool:
    """Return whether this process is rank zero, the one that prints and writes."""
    return _place().rank == 0


def is_local_rank_zero() -> bool:
    """Return whether this process is the one of its host that prints before the ranks have met."""
    return _place().local_rank == 0


def _place() -> Launch:
    """Return the launch; a process whose place is unknown, because of a broken environment, speaks for itself."""
    try:
        return Launch.from_environment()
    except UserError:
        return Launch()


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


def interface_advice(text: str) -> str:
    """Return which variable names the network interface that an error of gloo or NCCL complains of, or nothing."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = os.environ.get(name)
        if value and name[:4] in text.upper() and (value in text or "socket interface" in text):
            return f" ({name}={value} in the environment: correct or unset it)"
    return ""


def _missing() -> list[str]:
    return [name for name in _TORCHRUN if name not in os.environ]


def _other_launcher() -> tuple[str, int, int]:
    """Return the launcher other than torchrun that started several processes, their number, and this one's index."""
    for name, size, rank in _OTHERS:
        count = os.environ.get(size, "")
        # In the shell of `srun --pty`, the user starts the processes.
        if count.isdecimal() and int(count) > 1 and "SLURM_PTY_PORT" not in os.environ:
            return name, int(count), _integer(rank)
    return "python", 1, 0


def _integer(name: str, default: int = 0) -> int:
    return int(os.environ.get(name, default))
