"""The part "fast": the step times of every recipe, eager, captured and compiled; where the device's time goes."""

import os
import subprocess

from tests.gpu.campaign import MODULE, Campaign
from tests.helpers.processes import ROOT


def fast(c: Campaign) -> None:
    """Time the steps."""
    seconds = c.left(500) - 20
    command = [*MODULE, "tests.gpu.timings", f"--seconds={seconds:.0f}", f"--json={c.out / 'timings.json'}"]
    with (c.out / "timings-errors.txt").open("w") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=errors, env=os.environ | c.threads()
        )
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if "FAILED" in line:
                c.results[line[:44].strip()] = f"FAIL {line[44:].strip()}"
    c.say("timings", "PASS" if process.wait() == 0 else f"FAIL status {process.returncode}")
