"""The launcher's environment."""

import os
import re
import sys
from pathlib import Path

import psutil
import pytest

from cifar.distributed.cpu import available_cores, threads_per_process
from cifar.distributed.device import choose_device
from cifar.distributed.environment import Launch, known_launch, prepare_libraries
from cifar.distributed.process import host_id, process_id
from cifar.errors import UserError
from tests.helpers.processes import ROOT, clean_environment, rank_variables, run


@pytest.fixture
def environment(monkeypatch):
    """Set variables in an environment without a launcher's."""
    for name in os.environ.keys() - clean_environment().keys() | {"OMP_NUM_THREADS"}:
        monkeypatch.delenv(name, raising=False)

    def set_all(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return set_all


BOOT = "/proc/sys/kernel/random/boot_id"


def test_plain_python_is_one_process(environment):
    launch = Launch.from_environment()
    assert launch == Launch(rank=0, local_rank=0, world_size=1, local_world_size=1, host=0, hosts=1, elastic=False)
    assert (Launch.identify(1), launch.agent()) == (None, None)


def test_torchrun(environment):
    environment(RANK=5, LOCAL_RANK=1, WORLD_SIZE=8, LOCAL_WORLD_SIZE=4, GROUP_RANK=2, GROUP_WORLD_SIZE=3)
    environment(MASTER_ADDR="10.0.0.1", MASTER_PORT=29400)
    environment(TORCHELASTIC_RUN_ID="none", TORCHELASTIC_MAX_RESTARTS=3, TORCHELASTIC_RESTART_COUNT=1)
    launch = Launch.from_environment()
    assert launch == Launch(5, 1, 8, 4, host=2, hosts=3, elastic=True, restarts_left=2)
    launch.check()
    assert known_launch().rank > 0
    assert Launch.store() == (("10.0.0.1", 29400), True)
    environment(TORCHELASTIC_USE_AGENT_STORE="True")
    assert Launch.store() == (("10.0.0.1", 29400), False)


@pytest.mark.parametrize(
    "wrong",
    [
        *(f"{name}=(unset)" for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")),
        *("RANK=2", "RANK=-1", "RANK=one", "LOCAL_RANK=-1", "LOCAL_WORLD_SIZE=1", "LOCAL_WORLD_SIZE=3"),
        *("WORLD_SIZE=0", "WORLD_SIZE=", "MASTER_PORT=http", "MASTER_PORT=65536"),
    ],
)
def test_impossible_environment_is_an_error_that_is_printed(environment, monkeypatch, wrong):
    environment(**rank_variables(1, 2) | dict([wrong.split("=")]))
    if wrong.endswith("(unset)"):
        monkeypatch.delenv(wrong.split("=")[0])
    with pytest.raises(UserError, match=rf"^torchrun's variables .*{re.escape(wrong)}[,:].*launch/accelerate.yaml"):
        Launch.from_environment()
    assert known_launch().rank == 0


def test_single_process_of_sagemaker(environment):
    environment(MASTER_ADDR="algo-1", MASTER_PORT=7777, SM_HOSTS='["algo-1"]')
    assert Launch.from_environment() == Launch()
    environment(SM_HOSTS='["algo-1","algo-2"]')
    with pytest.raises(UserError, match="variables are incomplete"):
        Launch.from_environment()


POD = {"RANK": "3", "WORLD_SIZE": "5", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400"}
HOSTS = ["b", "a", "b", "a", "a"]  # of each rank


@pytest.mark.parametrize(
    ("given", "local_rank", "local_world_size"),
    [({}, 1, 3), ({"LOCAL_RANK": "2"}, 2, 3), ({"LOCAL_WORLD_SIZE": "2"}, 1, 2)],
)
def test_ranks_find_out_which_of_them_share_a_host(monkeypatch, given, local_rank, local_world_size):
    monkeypatch.setattr(os, "environ", POD | given)
    launch = Launch.from_environment().settle(HOSTS)
    assert launch == Launch(3, local_rank, 5, local_world_size, host=1, hosts=2, finds_host=True)
    assert os.environ["LOCAL_RANK"] == str(local_rank), "accelerate reads it"


def test_local_rank_that_contradicts_the_hosts_is_refused(monkeypatch):
    monkeypatch.setattr(os, "environ", POD | {"LOCAL_RANK": "3"})
    with pytest.raises(UserError, match=r"contradict each other: .* LOCAL_RANK=3, LOCAL_WORLD_SIZE=3: set the first"):
        Launch.from_environment().settle(HOSTS)


def test_rank_that_counts_hosts_of_several_gpus_is_told_of_torchrun(monkeypatch):
    """As in PyTorchJob's pods; not where the launcher says that there is one process a host, nor with one GPU."""
    monkeypatch.setattr(os, "environ", POD.copy())
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    launch = Launch.from_environment().settle([f"pod-{rank}" for rank in range(5)])
    with pytest.raises(UserError, match=r"5 processes .* 4 GPUs: start `torchrun --nnodes \$WORLD_SIZE --node-rank"):
        choose_device("auto", launch)
    assert choose_device("cpu", launch) == "cpu"
    assert choose_device("auto", Launch.from_environment()) == "cuda"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert choose_device("auto", launch) == "cuda"


@pytest.mark.parametrize(
    ("file", "directory"),
    [
        ("/tmp/torchelastic_a/none_b/attempt_0/0/error.json", "/tmp/torchelastic_a/none_b"),
        ("logs/job/1_b/attempt_12/7/error.json", "logs/job/1_b"),  # --log-dir, --rdzv-id; restarted
        ("", None),  # --log-dir /dev/null
        ("/logs/error.json", None),  # another --logs-specs, or a scheduler's
    ],
)
def test_launch_is_known_by_the_directory_of_its_agent_and_its_number(environment, file, directory):
    environment(TORCHELASTIC_ERROR_FILE=file)
    assert Launch.identify(2) == (directory and f"{directory}#2")


def test_agent_is_the_nearest_ancestor_without_the_workers_variables():
    """Also of a worker under a script in a session."""
    show = "from cifar.distributed.environment import Launch; print(Launch(elastic=True).agent())"
    script = ["setsid", "--wait", "sh", "-c", '"$@"; true', "sh"]
    seen = run([*script, sys.executable, "-c", show], ROOT, TORCHELASTIC_ERROR_FILE="error.json").stdout
    assert seen == f"{(os.getpid(), process_id(os.getpid()))}\n"


def test_process_id_depends_on_no_clock_and_no_host_name(monkeypatch):
    before = process_id(os.getpid())
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: 0.0)  # as after a change of the clock
    monkeypatch.setattr("socket.gethostname", lambda: "renamed")
    assert process_id(os.getpid()) == before


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has /proc")
@pytest.mark.parametrize(
    ("identify", "path"),
    [
        *((lambda: process_id(os.getpid()), path) for path in (BOOT, "/proc/PID/stat", "/proc/self/ns/pid")),
        *((host_id, path) for path in (BOOT, "/proc/self/ns/pid", "/proc/self/ns/net")),
    ],
)
def test_ids_tell_boots_starts_and_containers_apart(monkeypatch, identify, path):
    path = path.replace("PID", f"{os.getpid()}")
    before = identify()
    read_text, readlink = Path.read_text, os.readlink
    earlier = "1 (a (b) c) " + " ".join(["0"] * 50)  # the name of a process may hold anything
    monkeypatch.setattr(Path, "read_text", lambda self: earlier if str(self) == path else read_text(self))
    monkeypatch.setattr(os, "readlink", lambda name: "pid:[1]" if name == path else readlink(name))
    assert identify() != before


# What the launchers set, as seen with SLURM 22.05, Open MPI 4.1 and, for PMI_, srun --mpi=pmi2; see also tests/cluster.
SRUN = {"SLURM_NTASKS": 2, "SLURM_PROCID": 1, "SLURM_STEP_ID": 0, "SLURM_STEP_NUM_TASKS": 2}
OTHERS = {
    "srun": SRUN,
    "srun with PMI": SRUN | {"PMI_RANK": 1, "PMI_SIZE": 2},
    "mpirun of Open MPI": {"OMPI_COMM_WORLD_SIZE": 2, "OMPI_COMM_WORLD_RANK": 1, "PMIX_RANK": 1},
    "mpirun of MPICH": {"PMI_SIZE": 2, "PMI_RANK": 1},
    "mpirun of MVAPICH": {"MV2_COMM_WORLD_SIZE": 2, "MV2_COMM_WORLD_RANK": 1},
}


@pytest.mark.parametrize("name", OTHERS)
def test_separate_processes_of_another_launcher_are_refused_once(environment, name):
    environment(**OTHERS[name])
    launcher = name.split()[0]
    with pytest.raises(UserError, match=f"{launcher} started 2 processes, .*torchrun .*`{launcher} -n 1`"):
        Launch.from_environment().check()
    assert known_launch().rank > 0  # the other one is
    environment(RANK=1, MASTER_ADDR="10.0.0.1")  # half of torchrun's
    with pytest.raises(UserError, match=r"^torchrun's variables are incomplete"):
        Launch.from_environment()
    assert known_launch().rank > 0
    environment(**{variable: 0 for variable in OTHERS[name] if variable.endswith(("RANK", "PROCID"))})
    assert known_launch().rank == 0


ALONE = {
    "salloc": {"SLURM_NTASKS": 2, "SLURM_NPROCS": 2},
    "sbatch": {"SLURM_NTASKS": 2, "SLURM_NPROCS": 2, "SLURM_PROCID": 0, "SLURM_LOCALID": 0},
    "srun -n 1": SRUN | {"SLURM_NTASKS": 1, "SLURM_PROCID": 0, "SLURM_STEP_NUM_TASKS": 1},
    "srun -n 2 --pty": SRUN | {"SLURM_PROCID": 0, "SLURM_PTY_PORT": 44047, "PMI_RANK": 0, "PMI_SIZE": 2},
    "mpirun -n 1": {"OMPI_COMM_WORLD_SIZE": 1, "OMPI_COMM_WORLD_RANK": 0, "PMI_SIZE": 1, "PMI_RANK": 0},
    "a leftover rank": {"OMPI_COMM_WORLD_RANK": 1, "PMI_RANK": 1, "SLURM_PROCID": 1},
}


@pytest.mark.parametrize("name", ALONE)
def test_single_process_under_another_launcher(environment, name):
    environment(**ALONE[name])
    Launch.from_environment().check()
    assert Launch.from_environment() == Launch()


def test_torchrun_under_another_launcher_knows_the_other_hosts(environment):
    environment(**SRUN, **rank_variables(1, 4), TORCHELASTIC_RUN_ID="none", GROUP_WORLD_SIZE=2)
    Launch.from_environment().check()
    assert known_launch().rank > 0
    environment(GROUP_WORLD_SIZE=1)  # each torchrun for itself
    with pytest.raises(UserError, match="srun started 2 processes, which would train separately"):
        Launch.from_environment().check()
    environment(TORCHELASTIC_MAX_RESTARTS=3)  # for example the first of --nnodes=1:2
    Launch.from_environment().check()


def test_nccl_makes_no_dumps_and_uses_no_nvls_unless_asked(monkeypatch):
    monkeypatch.setattr(os, "environ", {"TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "9000"})
    prepare_libraries()
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == os.environ["NCCL_NVLS_ENABLE"] == "0"
    assert os.environ["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"] == "9000"


@pytest.mark.parametrize(
    "ignored",
    [
        *("USE_FSDP=true", "USE_DEEPSPEED=true", "DYNAMO_BACKEND=INDUCTOR", "GRADIENT_ACCUMULATION_STEPS=4"),
        "MIXED_PRECISION=fp8",
    ],
)
def test_accelerate_configuration_that_would_be_ignored_is_refused(environment, ignored):
    environment(ACCELERATE_USE_FSDP="false", ACCELERATE_DYNAMO_BACKEND="NO", ACCELERATE_MIXED_PRECISION="bf16")
    environment(ACCELERATE_GRADIENT_ACCUMULATION_STEPS=1)
    Launch.from_environment().check()
    environment(**dict([f"ACCELERATE_{ignored}".split("=")]))
    with pytest.raises(UserError, match=f"sets ACCELERATE_{ignored}, which would be ignored: .*accelerate.yaml"):
        Launch.from_environment().check()


@pytest.mark.parametrize(
    ("group", "files", "cores"),
    [
        ("0::/", {"cpu.max": "max 100000"}, 8),
        ("0::/", {"cpu.max": "200000 100000"}, 2),
        ("0::/", {"cpu.max": "150000 100000"}, 1),  # two threads would get three quarters of a core each
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),  # a limit of the parent
        ("0::/not/mounted/here", {"cpu.max": "50000 100000"}, 1),
        ("1:name=systemd:/x\n0::/a", {"a/cpu.max": "300000 100000"}, 3),
        (None, {}, 8),
    ],
)
def test_cores_of_a_container(monkeypatch, tmp_path, group, files, cores):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name, content in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(content + "\n")
    if group is not None:
        (tmp_path / "cgroup").write_text(group + "\n")
    assert available_cores(tmp_path / "cgroup", tmp_path / "root") == cores


def test_threads_per_process(environment, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert [threads_per_process(n) for n in (2, 3, 16)] == [4, 2, 1]
    cases = (("1", 4, "1"), ("3", 3, "3"), ("3,2", 3, "3"), ("many", 4, None), ("", 4, None))
    for users, threads, left in cases:  # 1 is torchrun's default
        environment(OMP_NUM_THREADS=users)
        assert threads_per_process(2) == threads
        prepare_libraries()
        assert os.environ.get("OMP_NUM_THREADS") == left, "accelerate takes one number"
