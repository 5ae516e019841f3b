"""The environment that the launcher set: plain `python`, torchrun, accelerate launch, or an engine's own."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import psutil

from cifar.distributed.process import process_id
from cifar.errors import UserError

# Set for each process by torchrun and by accelerate launch. Engines that start the processes themselves may leave out
# the last one (pyxis, Azure ML), or the last two (PyTorchJob).
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# Where torchrun expects a worker's error, below a directory that each agent makes for itself (mkdtemp; torch 2.14).
_ERROR_FILE = re.compile(r"(.+)/attempt_\d+/\d+/error\.json")

# Launchers whose processes torchrun's variables do not connect: how many they started, and the index of this one. In a
# SLURM allocation or batch script SLURM_NTASKS is set, but not SLURM_STEP_NUM_TASKS (SLURM 22.05).
_OTHER_LAUNCHERS = (
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("mpirun", "PMI_SIZE", "PMI_RANK"),
)

# What `accelerate launch` can be configured for, each as ACCELERATE_...; and the values that this program follows.
_ACCELERATE = (
    *("USE_FSDP", "USE_DEEPSPEED", "USE_MEGATRON_LM", "USE_PARALLELISM_CONFIG"),
    *("DYNAMO_BACKEND", "GRADIENT_ACCUMULATION_STEPS", "MIXED_PRECISION"),
)
_FOLLOWED = ("", "no", "0", "1", "false", "bf16", "fp16")


@dataclass(frozen=True)
class Launch:
    """This process's place among those that the launcher started."""

    rank: int = 0  # index of this process among all processes
    local_rank: int = 0  # index among the processes of this host
    world_size: int = 1  # number of processes
    local_world_size: int = 1  # number of processes on this host
    host: int = 0  # index of this host (torchrun's group rank); may change when the run restarts
    hosts: int = 1  # number of hosts
    finds_host: bool = False  # whether the ranks find out which of them share a host, as the launcher did not say
    elastic: bool = False  # whether torchrun started this process and supervises it
    restarts_left: int = 0  # how many more failures torchrun's agent on this host answers with a restart

    @classmethod
    def from_environment(cls) -> "Launch":
        """Return the place that torchrun's variables give; without any of them, a single process or another launcher's.

        If they do not say which ranks share a host, this is the first or only one of its host until `settle`. A
        UserError names them if others are missing, or if they contradict each other.
        """
        given = os.environ.keys() & set(_VARIABLES)
        # SageMaker's launcher names a rendezvous for the single process of a single host, too.
        is_sagemakers = given == {"MASTER_ADDR", "MASTER_PORT"} and "," not in os.environ.get("SM_HOSTS", ",")
        if not given or is_sagemakers:
            return _other_launcher()[1]
        try:
            local_rank = _integer("LOCAL_RANK", 0)
            launch = cls(
                rank=_integer("RANK"),
                local_rank=local_rank,
                world_size=_integer("WORLD_SIZE"),
                local_world_size=_integer("LOCAL_WORLD_SIZE", local_rank + 1),
                host=_integer("GROUP_RANK", 0),
                hosts=_integer("GROUP_WORLD_SIZE", 1),
                finds_host=not {"LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= given,
                elastic="TORCHELASTIC_RUN_ID" in os.environ,
                restarts_left=_integer("TORCHELASTIC_MAX_RESTARTS", 0) - _integer("TORCHELASTIC_RESTART_COUNT", 0),
            )
            possible = 0 <= launch.rank < launch.world_size and 0 <= _integer("MASTER_PORT") < 1 << 16
            possible = possible and 0 <= launch.local_rank < launch.local_world_size <= launch.world_size
            possible = possible and "MASTER_ADDR" in os.environ
        except (KeyError, ValueError):  # not set, or not an integer
            possible = False
        if not possible:
            values = ", ".join(f"{name}={os.environ.get(name, '(unset)')}" for name in _VARIABLES)
            raise UserError(
                f"torchrun's variables are incomplete or contradict each other: {values}: set the first four or all, "
                f"as torchrun and `accelerate launch --config_file launch/accelerate.yaml` do, or unset them to train "
                f"in one process"
            )
        return launch

    def settle(self, host_ids: Sequence[str]) -> "Launch":
        """Return this place with the host that it has by the `host_ids` of all ranks, and set torchrun's variables.

        accelerate reads them, too. What the launcher has set counts; a UserError names a contradiction.
        """
        local_ranks = [rank for rank, host_id in enumerate(host_ids) if host_id == host_ids[self.rank]]
        hosts = list(dict.fromkeys(host_ids))
        found = {"LOCAL_RANK": local_ranks.index(self.rank), "LOCAL_WORLD_SIZE": len(local_ranks)}
        found |= {"GROUP_RANK": hosts.index(host_ids[self.rank]), "GROUP_WORLD_SIZE": len(hosts)}
        for name, value in found.items():
            os.environ.setdefault(name, str(value))
        return replace(Launch.from_environment(), finds_host=True)

    def check(self) -> None:
        """Refuse what would train otherwise than its launcher was asked to, by a UserError."""
        launcher, separate = _other_launcher()
        # A torchrun that may restart can be the first or the last of 1 to N hosts.
        is_alone = self.elastic and self.hosts == 1 and _integer("TORCHELASTIC_MAX_RESTARTS", 0) == 0
        if separate.world_size > 1 and (is_alone or "RANK" not in os.environ):
            raise UserError(
                f"{launcher} started {separate.world_size} processes, which would train separately: use `torchrun "
                f"--nproc_per_node=N train_ddp.py` on one host, launch/multi_node.sh on several, "
                f"`sbatch launch/slurm.sbatch` under SLURM, or `{launcher} -n 1` for one process"
            )
        values = {f"ACCELERATE_{name}": os.environ.get(f"ACCELERATE_{name}", "") for name in _ACCELERATE}
        ignored = [f"{name}={value}" for name, value in values.items() if value.lower() not in _FOLLOWED]
        if ignored:
            raise UserError(
                f"accelerate's configuration sets {', '.join(ignored)}, which would be ignored: use "
                f"launch/accelerate.yaml, and the flags --compile, --global-batch-size and --precision"
            )

    @staticmethod
    def identify(number: int) -> str | None:
        """Return an ID for run `number` of this process. Restarts by torchrun have the same ID, another torchrun never.

        It begins with the directory of logs that each agent makes. None without torchrun or such a directory.
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
        return (os.environ["MASTER_ADDR"], _integer("MASTER_PORT")), not by_agent


def known_launch() -> Launch:
    """Return the launch, as if there were none of torchrun's variables if they contradict each other."""
    try:
        return Launch.from_environment()
    except UserError:
        return _other_launcher()[1]


def prepare_libraries() -> None:
    """Set up NCCL before the process group is made, unless the user has; let accelerate read OMP_NUM_THREADS.

    accelerate takes a single number: neither a list, with one for each level, nor what OpenMP ignores.
    """
    if outermost := _outermost_threads():
        os.environ["OMP_NUM_THREADS"] = outermost
    else:
        os.environ.pop("OMP_NUM_THREADS", None)
    # With NVLS, the sums of switches, ranks do not start on some rented parts of a host (NCCL 2.29, NVIDIA/nccl#2077),
    # and sums have other bits from call to call (NVIDIA/nccl#1497).
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    # After a failed collective, its watchdog would wait a minute for debugging dumps, and leave a key in torchrun's
    # store by which the next start's ranks are killed (torch 2.11 to 2.14).
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    os.environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "500")


def quiet_profiler() -> None:
    """Keep torch's profiler, which begins later, from printing its progress and an error where there is no GPU."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def chosen_threads() -> int | None:
    """Return the number of CPU threads that the user has chosen by OMP_NUM_THREADS; 1 is torchrun's, and so None."""
    threads = int(_outermost_threads() or 1)
    return threads if threads > 1 else None


def _outermost_threads() -> str:
    """Return the first number of OMP_NUM_THREADS, or nothing."""
    outermost = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return outermost if outermost.isdecimal() else ""


def interface_advice(text: str) -> str:
    """Return which variable names the network interface that an error of gloo or NCCL complains of, or nothing."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = os.environ.get(name)
        if value and name[:4] in text.upper() and (value in text or "socket interface" in text):
            return f" ({name}={value} in the environment: correct or unset it)"
    return ""


def _other_launcher() -> tuple[str, Launch]:
    """Return the launcher other than torchrun that started several processes, and the place of this one among them."""
    for name, size, rank in _OTHER_LAUNCHERS:
        copies = os.environ.get(size, "")
        # In the shell of `srun --pty`, the user starts the processes.
        if copies.isdecimal() and int(copies) > 1 and "SLURM_PTY_PORT" not in os.environ:
            index = _integer(rank, 0)
            return name, Launch(index, index, world_size=int(copies), local_world_size=int(copies))
    return "python", Launch()


def _integer(name: str, default: int | None = None) -> int:
    return int(os.environ[name] if default is None else os.environ.get(name, default))
