"""Prove the program on GPUs: python -m tests.gpu PART --out DIR; see tests/gpu/README.md.

right     the numbers, the command line, NCCL with one rank; nothing is timed
captured  a whole step under DDP over NCCL as a CUDA graph: the bits of the eager one, and the times of both; 2 minutes
variants  what makes speed94 faster, and what it costs in accuracy, on CIFAR-10 in $CIFAR_DATA_DIR; 5 minutes
several   a host with several GPUs: losses, images/s, hooks, ranks that are killed, frozen and stopped
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.gpu.campaign import Campaign
from tests.gpu.captured import captured
from tests.gpu.right import right
from tests.gpu.several import several
from tests.gpu.variants import variants

PARTS = {"right": right, "captured": captured, "variants": variants, "several": several}
SECONDS = {"captured": 120, "variants": 290}


def main() -> int:
    """Run a part; return the exit status, 1 if anything failed."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tests.gpu", description=__doc__, formatter_class=style)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="what stays (default: %(default)s)")
    parser.add_argument("--seconds", type=float, help="what the part may take (default: 540, or as above)")
    parser.add_argument("--only", nargs="*", default=[], help="words of the names of the checks to run, in some parts")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # nothing outside this machine
    count = torch.cuda.device_count()
    name = f"{count} x {torch.cuda.get_device_name()}" if count else "no GPU: a smoke test"
    print(f"{args.part}: {name}, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        seconds = args.seconds or SECONDS.get(args.part, 540)
        c = Campaign(args.out.resolve(), Path(work), time.perf_counter() + seconds, args.only)
        PARTS[args.part](c)
        for file in Path(work).glob("*.txt"):
            (c.out / f"{args.part}-{file.name.replace(' ', '-')}").write_text(file.read_text(errors="replace"))
    failed = [name for name, verdict in c.results.items() if verdict.startswith("FAIL")]
    found = {"device": name, "torch": torch.__version__, **c.results, "details": c.details}
    (c.out / f"{args.part}.json").write_text(json.dumps(found, indent=1))
    verdict = "PASS" if c.results and not failed else "FAIL"
    print(f"{args.part}: {verdict}, {len(failed)} of {len(c.results)} failed: {failed}", flush=True)
    return int(verdict == "FAIL")


if __name__ == "__main__":
    sys.exit(main())
