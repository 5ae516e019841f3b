"""Prove the program on one GPU: python -m tests.gpu right|fast|learns --out DIR; see tests/gpu/README.md.

right   the numbers, the command line, several ranks on the GPU, NCCL with one rank; nothing is timed
fast    the step times of every recipe, eager, captured and compiled; where the device's time goes
learns  the accuracy and the seconds of every recipe on CIFAR-10 in $CIFAR_DATA_DIR
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--dataset", "synthetic", "--wandb", "disabled", "--log-steps", "50"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
TRAIN = [sys.executable, "train_ddp.py"]
MODULE = [sys.executable, "-m"]


@dataclass
class Campaign:
    """What one part has found; every line is printed when it is known."""

    out: Path
    work: Path
    deadline: float
    began: float = field(default_factory=time.perf_counter)
    results: dict[str, str] = field(default_factory=dict)

    def say(self, name: str, verdict: str) -> None:
        """Print and keep a result: it passed if it begins with PASS or with a number."""
        self.results[name] = verdict
        print(f"[{time.perf_counter() - self.began:3.0f} s] {name:18} {verdict}", flush=True)

    def left(self, at_most: float) -> float:
        """Return the seconds that a command may take."""
        return max(1.0, min(at_most, self.deadline - time.perf_counter()))

    def run(self, name: str, command: Sequence[str], at_most: float = 150) -> tuple[int, str]:
        """Return status and output of a command, which has a file of its own in `out`; -1 if it took too long."""
        # In a session of its own: ranks that a killed launcher left would hold the GPU.
        process = subprocess.Popen(
            [str(word) for word in command], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            output, status = process.communicate(timeout=self.left(at_most))[0], process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, status = process.communicate()[0], -1
        (self.work / f"{name}.txt").write_text(output)
        return status, output

    def expect(
        self,
        name: str,
        command: Sequence[str],
        status: int = 0,
        pattern: str = "Finished Training",
        at_most: float = 150,
    ) -> str:
        """Run a command that must end with `status` and print `pattern`, without a complaint of torch's."""
        got, output = self.run(name, command, at_most)
        found = re.search(pattern, output)
        verdict = "PASS"
        if got != status:
            verdict = f"FAIL status {got}, expected {status}" if got != -1 else "FAIL took too long"
        elif found is None:
            verdict = f"FAIL no {pattern!r}"
        elif "destroy_process_group() was not called" in output:
            verdict = "FAIL torch complains that the group was left open"
        self.say(name, verdict)
        if verdict != "PASS":
            print("".join(f"      | {line}\n" for line in output.splitlines()[-12:]), end="", flush=True)
        return output

    def last_loss(self, run: str) -> float:
        """Return the last training loss of a run in `work`."""
        lines = (self.work / run / "metrics.jsonl").read_text().splitlines()
        return [row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row][-1]


def right(c: Campaign) -> None:
    """Check numbers, command line, ranks and NCCL, beside each other."""
    gpu = torch.cuda.is_available()

    def trained(name: str, *flags: str, command: Sequence[str] = TRAIN, **expected: object) -> Callable[[], str]:
        full = [*command, *QUICK, "--run-dir", c.work / name, *flags]
        return lambda: c.expect(name, full, **expected)  # type: ignore[arg-type]

    def moves() -> None:
        trained("cpu", "--device", "cpu", "--max-steps", "100", pattern="1 process on CPU")()
        for name, device, steps in (("cpu to gpu", "cuda" if gpu else "cpu", "300"), ("gpu to cpu", "cpu", "350")):
            resume = ["--resume", c.work / "cpu", "--device", device, "--max-steps", steps]
            c.expect(name, [*TRAIN, *resume], pattern="changed .*--device" if gpu else "resume")
        checkpoint = c.work / "cpu" / "checkpoints" / "step-00000350.pt"
        c.expect(
            "evaluate", [*TRAIN, "--dataset", "synthetic", "--evaluate", checkpoint], pattern="Accuracy of the network"
        )

    def graphs() -> None:
        trained("graph", "--max-steps", "600", "--cuda-graph")()
        c.expect("graph goes on", [*TRAIN, "--resume", c.work / "graph", "--max-steps", "700"], pattern="resume")

    one = [*TORCHRUN, "--nproc_per_node=1", "train_ddp.py"]

    def nccl() -> None:
        trained("nccl", "--max-steps", "100", command=one)()
        trained("nccl graph", "--max-steps", "100", "--cuda-graph", command=one)()
        trained("nccl", "--max-steps", "100", command=one, status=1, pattern="error: ")()
        trained(
            "nccl diverged", "--lr", "1e9", "--max-steps", "100", command=one, status=1, pattern="the loss became"
        )()

    shared = ["-m", "tests.gpu.shared_gpu"]
    wide = ["--recipe", "wide", "--lr-scaling", "none", "--local-batch-size", "64", "--global-batch-size", "256",
            "--max-steps", "60", "--log-steps", "60"]  # fmt: skip

    def ranks() -> None:
        for n in (1, 2, 4):
            trained(f"ranks {n}", *wide, command=[*TORCHRUN, f"--nproc_per_node={n}", *shared])()
        losses = [c.last_loss(f"ranks {n}") for n in (1, 2, 4)]
        same = max(losses) - min(losses) < 0.002
        c.say("losses at 1, 2, 4", f"{'PASS' if same else 'FAIL'} {losses}")

    def hooks() -> None:
        for hook in ("fp16", "bf16", "powersgd"):
            trained(f"hook {hook}", *wide, "--comm-hook", hook, command=[*TORCHRUN, "--nproc_per_node=2", *shared])()

    def pytest() -> None:
        files = [f"tests/unit/test_{name}.py" for name in ("cuda_graph", "optim", "augment", "train_step", "precision")]
        c.expect("pytest", [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files], pattern="passed")

    def checks() -> None:
        _, output = c.run("checks", [sys.executable, "-m", "tests.gpu.checks"], at_most=300)
        for verdict, name, said in re.findall(r"^(PASS|FAIL)  (.*?) \(\d+ s\): (.*)$", output, re.M):
            c.say(name, f"{verdict} {said}")
        if not re.search(r"^\d+ failed", output, re.M):
            c.say("checks", f"FAIL did not finish: {output[-300:]}")

    jobs: list[Callable[[], object]] = [checks, nccl, ranks, hooks, moves, graphs, pytest, lambda: disturbed(c)]
    if gpu:
        jobs += [
            lambda: c.expect(
                "nccl hooks", [*TORCHRUN, "--nproc_per_node=1", "-m", "tests.gpu.nccl_one_rank"], pattern="buckets fit"
            ),
            lambda: c.expect(
                "too many ranks", [*TORCHRUN, "--nproc_per_node=2", "train_ddp.py", *QUICK], 1, "which has 1 GPU"
            ),
        ]
    jobs += [
        trained("auto", "--max-steps", "200", pattern="1 process on NVIDIA" if gpu else "1 process on"),
        trained("fp16", "--recipe", "wide", "--precision", "fp16", "--max-steps", "200"),
        trained("fp16 muon", "--recipe", "net-fast", "--precision", "fp16", "--max-steps", "100"),
        trained("compile", "--recipe", "speed94", "--precision", "bf16", "--compile", "--max-steps", "30"),
        trained("compile graph", "--recipe", "speed94", "--compile", "--cuda-graph", "--max-steps", "30"),
        lambda: c.expect("explain", [sys.executable, "-m", "cifar.explain", *QUICK[:2]], pattern="(?i)zero_grad"),
    ]  # fmt: skip
    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(job) for job in jobs]:
            try:
                future.result()
            except Exception as error:
                c.say(f"{type(error).__name__}", f"FAIL {error}")


def disturbed(c: Campaign) -> None:
    """Kill, freeze and stop a rank, with tensors on the GPU."""
    long = ["--recipe", "wide", "--dataset", "synthetic", "--wandb", "disabled", "--log-steps", "100",
            "--checkpoint-steps", "100"]  # fmt: skip

    def start(name: str, *flags: str, restarts: int = 0) -> subprocess.Popen[str]:
        command = [*TORCHRUN, "--nproc_per_node=2", f"--max-restarts={restarts}", "-m", "tests.gpu.shared_gpu"]
        file = (c.work / f"{name}.txt").open("w")
        full = [*command, *long, "--run-dir", str(c.work / name), *flags]
        process = subprocess.Popen(full, cwd=ROOT, text=True, stdout=file, stderr=file, start_new_session=True)
        until(lambda: any((c.work / name / "checkpoints").glob("step-*")) or process.poll() is not None)
        return process

    def until(condition: Callable[[], bool]) -> None:
        limit = time.perf_counter() + c.left(90)
        while not condition() and time.perf_counter() < limit:
            time.sleep(0.2)

    def last_rank(process: subprocess.Popen[str]) -> psutil.Process:
        return psutil.Process(process.pid).children()[-1]

    words = {"killed": "resume", "frozen": "sent no heartbeat", "stopped": "Stopped by SIGTERM after"}
    for name, word in words.items():
        flags = [
            "--max-steps",
            "1000" if name == "killed" else "20000",
            "--timeout",
            "12" if name == "frozen" else "600",
        ]
        process = start(name, *flags, restarts=int(name == "killed"))
        began = time.perf_counter()
        try:
            rank = last_rank(process)
            {"killed": rank.kill, "frozen": rank.suspend, "stopped": rank.terminate}[name]()
            until(lambda p=process: p.poll() is not None)  # type: ignore[misc]
            output = (c.work / f"{name}.txt").read_text()
            passed = word in output and (name != "killed" or "Finished Training" in output)
            c.say(name, f"{'PASS' if passed else 'FAIL'} over after {time.perf_counter() - began:.0f} s")
        except (IndexError, psutil.Error) as error:
            c.say(name, f"FAIL {error!r}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            if not c.results.get(name, "").startswith("PASS"):
                print((c.work / f"{name}.txt").read_text()[-1500:], flush=True)


def fast(c: Campaign) -> None:
    """Time the steps."""
    seconds = c.left(500) - 20
    command = [*MODULE, "tests.gpu.timings", f"--seconds={seconds:.0f}", f"--json={c.out / 'timings.json'}"]
    with (c.out / "timings-errors.txt").open("w") as errors:
        process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if "FAILED" in line:
                c.results[line[:44].strip()] = f"FAIL {line[44:].strip()}"
    c.say("timings", "PASS" if process.wait() == 0 else f"FAIL status {process.returncode}")


# Recipe and flags, runs, least accuracy in percent of each run.
LEARNS = {
    "speed94": ("speed94 --precision bf16 --cuda-graph", 10, 93.4),
    "net-fast": ("net-fast --cuda-graph", 3, 60.0),
    "tutorial": ("tutorial --cuda-graph", 1, 54.0),
    "wide": ("wide --precision bf16 --cuda-graph", 1, 77.0),
    "resnet18": ("resnet18 --precision bf16 --cuda-graph", 1, 94.0),
    "speed96": ("speed96 --precision bf16 --cuda-graph", 1, 95.6),
}


def learns(c: Campaign) -> None:
    """Train every recipe: speed94 alone, from a cold start and warm, then the others beside each other."""
    graph = torch.cuda.is_available()
    data = ["--dataset", "cifar10"]

    def repeat(name: str, at_most: float) -> None:
        flags, runs, least = LEARNS[name]
        words = [word for word in flags.split() if graph or word != "--cuda-graph"]
        out = c.out / f"{name}.jsonl"
        command = [*MODULE, "tests.gpu.repeat", f"--runs={runs}", f"--out={out}", "--recipe", *words, *data]
        status, output = c.run(name, command, at_most)
        rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        values = [100 * (row["test_accuracy_tta"] or row["test_accuracy"]) for row in rows]
        passed = status == 0 and len(rows) == runs and min(values, default=0) >= least
        seconds = [round(row["train_seconds"], 2) for row in rows]
        mean = sum(values) / max(1, len(values))
        found = f"mean {mean:.2f} %, least {min(values, default=0):.2f} (at least {least}) of {len(rows)} runs"
        c.say(name, f"{'PASS' if passed else 'FAIL'} {found}; seconds {seconds}")
        if status:
            print(output[-1500:], flush=True)

    flags = [word for word in LEARNS["speed94"][0].split() if graph or word != "--cuda-graph"]
    began = time.perf_counter()
    output = c.expect(
        "cold start", [*TRAIN, "--recipe", *flags, *data, "--wandb", "disabled", "--run-dir", c.work / "cold"]
    )
    c.say("cold start seconds", f"{time.perf_counter() - began:.1f} s of wall clock")
    print(output[-2500:], flush=True)
    repeat("speed94", 150)
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda name: repeat(name, 400), [name for name in LEARNS if name != "speed94"]))


def main() -> int:
    """Run a part; return the exit status, 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("right", "fast", "learns"))
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--seconds", type=float, default=540, help="what the part may take (default: 540)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # nothing outside this machine
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: a smoke test"
    print(f"{args.part}: {name}, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as work:
        c = Campaign(args.out.resolve(), Path(work), time.perf_counter() + args.seconds)
        {"right": right, "fast": fast, "learns": learns}[args.part](c)
        for file in Path(work).glob("*.txt"):
            (c.out / f"{args.part}-{file.name.replace(' ', '-')}").write_text(file.read_text())
    failed = [name for name, verdict in c.results.items() if verdict.startswith("FAIL")]
    (c.out / f"{args.part}.json").write_text(
        json.dumps({"device": name, "torch": torch.__version__, **c.results}, indent=1)
    )
    verdict = "PASS" if not failed else "FAIL"
    print(f"{args.part}: {verdict}, {len(failed)} of {len(c.results)} failed: {failed}", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
