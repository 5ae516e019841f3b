"""Two hosts on one machine: network namespaces with an address each, joined by a virtual cable.

Needs Linux, root and iproute2. Changes nothing outside these namespaces, and deletes them at the end.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress

ADDRESSES = ("10.77.0.1", "10.77.0.2")
IPV6_ADDRESSES = ("fd77::1", "fd77::2")


def why_not() -> str | None:
    """Return what is missing for `Hosts`, or None."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        return "network namespaces need root and iproute2"
    try:
        with Hosts():
            return None
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"


class Hosts:
    """Two hosts, 0 and 1; a context manager."""

    def __init__(self) -> None:
        self.names = [f"cifar-{os.getpid()}-{host}" for host in (0, 1)]

    def __enter__(self) -> "Hosts":
        try:
            for name in self.names:
                _ip("netns", "add", name)
            first, second = self.names
            cable = ("link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", second)
            _ip("-netns", first, *cable)
            for name, address, ipv6_address in zip(self.names, ADDRESSES, IPV6_ADDRESSES, strict=True):
                _ip("-netns", name, "address", "add", f"{address}/24", "dev", "cable")
                _ip("-netns", name, "address", "add", f"{ipv6_address}/64", "dev", "cable", "nodad")
                _ip("-netns", name, "link", "set", "lo", "up")
                _ip("-netns", name, "link", "set", "cable", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", name)

    def on(self, host: int, *command: object) -> list[str]:
        """Return the command line that runs `command` on `host`."""
        # `ip netns exec` would mount a new /sys, without the control groups that SLURM needs.
        return ["nsenter", f"--net=/run/netns/{self.names[host]}", *map(str, command)]

    def cut(self) -> None:
        """Unplug the cable from host 1."""
        _ip("-netns", self.names[1], "link", "set", "cable", "down")

    def mend(self) -> None:
        """Plug the cable in again."""
        _ip("-netns", self.names[1], "link", "set", "cable", "up")

    def slow_down(self, megabits: float) -> None:
        """Limit the cable to a rate in Mbit/s each way (token bucket of 64 KiB)."""
        for host in (0, 1):
            shape = ("qdisc", "replace", "dev", "cable", "root", "tbf", "rate", f"{megabits}mbit")
            _run(self.on(host, "tc", *shape, "burst", "64kb", "latency", "100ms"))


def _ip(*arguments: str) -> None:
    _run(["ip", *arguments])


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
