"""A SLURM cluster on one machine: a controller and two nodes, each in its own network namespace (see hosts.py).

Needs root, iproute2 and Debian's slurmctld, slurmd, slurm-client and munge, or their equivalents.
"""

import os
import secrets
import shutil
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

from tests.helpers import hosts
from tests.helpers.disturb import Log
from tests.helpers.hosts import ADDRESSES, Hosts
from tests.helpers.processes import clean_environment

NODES = ("n1", "n2")
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")


def why_not() -> str | None:
    """Return what is missing for `Cluster`, or None."""
    path = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"
    missing = [program for program in _PROGRAMS if shutil.which(program, path=path) is None]
    return f"SLURM is not installed: no {', '.join(missing)}" if missing else hosts.why_not()


class Cluster:
    """A controller with node n1 on host 0, and node n2 on host 1; a context manager."""

    def __init__(self, folder: Path, path: str) -> None:
        self.folder, self.hosts = folder, Hosts()
        self._conf = folder / "slurm.conf"
        path = f"{path}{os.pathsep}/usr/sbin"
        self._environment = clean_environment(PATH=path, SLURM_CONF=str(self._conf), CUDA_VISIBLE_DEVICES="")
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Cluster":
        self.hosts.__enter__()
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(subprocess.SubprocessError):
            self.run("scancel", "--user=root")
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        self.hosts.__exit__()

    def run(self, *command: object, cwd: Path | None = None) -> str:
        """Run `command` on host 0 and return its standard output."""
        line = self.hosts.on(0, *command)
        done = subprocess.run(line, cwd=cwd, env=self._environment, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise subprocess.SubprocessError(f"{command}: {done.stderr}")
        return done.stdout.strip()

    def submit(self, *arguments: object, cwd: Path) -> str:
        """Submit a job and return its number."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd)

    def state(self, job: str) -> str:
        """Return the state of a job, such as RUNNING, PENDING or COMPLETED."""
        fields = dict(field.split("=", 1) for field in self.run("scontrol", "show", "job", job).split() if "=" in field)
        return fields["JobState"]

    def _start(self) -> None:
        folder, host = self.folder, socket.gethostname()
        for name in ("state", "spool-n1", "spool-n2"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        lines = {
            "ClusterName": "test",
            "SlurmctldHost": f"{host}({ADDRESSES[0]})",
            "SlurmUser": "root",
            "AuthType": "auth/munge",
            # A requeued job waits until its old credential expires, by default 120 s.
            "AuthInfo": f"socket={folder}/munge.socket,cred_expire=5",
            "CredType": "cred/munge",
            "StateSaveLocation": f"{folder}/state",
            "SlurmdSpoolDir": f"{folder}/spool-%n",
            "SlurmctldPidFile": f"{folder}/slurmctld.pid",
            "SlurmdPidFile": f"{folder}/slurmd-%n.pid",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU",
            "SchedulerParameters": "sched_interval=1,bf_interval=1",
            "MpiDefault": "none",
            "KillWait": "5",
        }
        text = [f"{name}={value}" for name, value in lines.items()]
        for node, address in zip(NODES, ADDRESSES, strict=True):
            text.append(f"NodeName={node} NodeHostname={host} NodeAddr={address} CPUs=1 State=UNKNOWN")
        text.append("PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
        self._conf.write_text("\n".join(text) + "\n")

        files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._daemon(["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files])
        log = Log(folder / "daemons.txt")
        log.until((folder / "munge.socket").exists, "munge", 30)
        self._daemon(self.hosts.on(0, "slurmctld", "-D"))
        for number, node in enumerate(NODES):
            self._daemon(self.hosts.on(number, "slurmd", "-D", "-N", node))
        log.until(lambda: self._idle() == list(NODES), "SLURM", 30)

    def _idle(self) -> list[str]:
        try:
            return sorted(self.run("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N").split())
        except subprocess.SubprocessError:
            return []

    def _daemon(self, command: list[str]) -> None:
        with (self.folder / "daemons.txt").open("ab") as output:
            daemon = subprocess.Popen(
                command, env=self._environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        self._daemons.append(daemon)
