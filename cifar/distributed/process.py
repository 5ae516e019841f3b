"""The identity of a process, which its number alone is not, and of its host."""

import os
import socket
from pathlib import Path

import psutil

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def host_id() -> str:
    """Return an ID that processes share if they run on one host and, on Linux, in one container.

    Pods on one machine may have GPUs of their own, each counted from zero: they are hosts of their own. Those in the
    machine's network have its name, too, but not its namespace of process IDs.
    """
    if not _BOOT.exists():
        return socket.gethostname()
    namespaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "pid")]
    return ":".join([socket.gethostname(), _BOOT.read_text().strip(), *namespaces])


def process_id(pid: int) -> str:
    """Return an ID of the process `pid` that no other process has, on this host or another, before or after.

    On Linux it is made of what no clock, host name or disk can change: the boot, the namespace of process IDs (the
    container), the process ID and the ticks from the boot to the start of the process. psutil's create_time moves when
    the clock is set, but not on other systems, which record the time itself.

    Raises:
        OSError, psutil.Error: there is no such process.
    """
    if not _BOOT.exists():
        return f"{pid}:{psutil.Process(pid).create_time()}"
    start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]  # the name before ")" may hold spaces
    return f"{_BOOT.read_text().strip()}:{os.readlink('/proc/self/ns/pid')}:{pid}:{start}"


def is_running(pid: int, own_id: str) -> bool:
    """Return whether a process `pid` with the `process_id` `own_id` runs on this host; a zombie has ended."""
    try:
        return process_id(pid) == own_id and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False
