"""launch/sweep.yaml: by launch/sweep.sh, and by W&B's own commands against a server on this machine."""

import itertools
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from tests.helpers.processes import ROOT, result, run
from tests.helpers.terminal import Terminal
from tests.helpers.wandb_server import KEY, NOWHERE, WandbServer
from tests.test_launch import PATH


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory):
    """All that train, two at a time: most of their time is start-up, and waiting."""
    parts = (agent, twice, interrupted)
    with ThreadPoolExecutor(2) as pool:
        yield {part: pool.submit(part, tmp_path_factory.mktemp(part.__name__)) for part in parts}


def sweep(cwd, grid, *flags):
    (cwd / "grid.yaml").write_text(grid)
    return run(
        [ROOT / "launch" / "sweep.sh", *flags], cwd, 240,
        PATH=PATH, CUDA_VISIBLE_DEVICES="", NPROC="1", SWEEP="grid.yaml", FOLDER="runs/sweep",
    )  # fmt: skip


GRID = """
parameters:
  lr: {values: [0.02, 1.0e+30]}
  global_batch_size: {value: 32}
command: ["${program}", --recipe=net-fast, --optimizer=sgd, --lr-scaling=none, --wandb=online, "${args}"]
"""


def twice(folder):
    """A grid with a rate that is too high, and without."""
    flags = ["--dataset", "synthetic", "--max-steps", "20", "--log-steps", "10", "--device", "cpu"]
    done = sweep(folder, GRID, *flags)
    picture = (folder / "runs" / "sweep" / "compare.png").stat().st_size
    return done, picture, sweep(folder, GRID.replace(", 1.0e+30", ""), *flags)


def test_sweep_ends_with_a_table_and_outlives_a_run_that_fails(scenarios):
    done, picture, again = scenarios[twice].result()
    assert done.returncode == 1
    assert "sweep.sh: run 2 of 2: --recipe=net-fast --optimizer=sgd --lr-scaling=none --lr=1e+30" in done.stdout
    assert "sweep.sh: failed: lr-1e+30_global_batch_size-32" in done.stdout
    table = done.stdout.split("sweep.sh: failed")[1].splitlines()[1:]
    assert table[0].split()[0] == "accuracy"
    assert table[1].split()[-1] == "lr-0.02_global_batch_size-32"
    assert table[2].endswith("lr-1e+30_global_batch_size-32 (not finished)")
    assert picture > 10_000
    assert again.returncode == 0
    assert "sweep.sh: done before" in again.stdout


def interrupted(folder):
    """Ctrl-C in the first of two runs."""
    (folder / "grid.yaml").write_text(GRID.replace(", 1.0e+30", ", 0.03"))
    begin = {"PATH": PATH, "CUDA_VISIBLE_DEVICES": "", "NPROC": "1", "SWEEP": "grid.yaml", "FOLDER": "sweep"}
    command = [ROOT / "launch" / "sweep.sh", "--dataset", "synthetic", "--log-steps", "10", "--device", "cpu"]
    with Terminal(command, folder, **begin) as terminal:
        terminal.until("100] loss:")
        terminal.type("\x03")
        return (
            terminal.end(),
            terminal.written,
            " ".join(map(str, command)),
            list(folder.glob("sweep/*/checkpoints/*.pt")),
        )


def test_ctrl_c_ends_the_sweep_and_says_how_to_go_on(scenarios):
    status, said, command, saved = scenarios[interrupted].result()
    assert status == 130
    assert "Stopped by SIGINT after step" in said
    assert f"sweep.sh: stopped; to go on: FOLDER=sweep {command}" in said
    assert "run 2 of 2" not in said
    assert len(saved) == 1


def test_sweep_refuses_what_is_no_grid(tmp_path):
    done = sweep(tmp_path, "parameters: {lr: 3}\n")
    assert done.returncode == 2
    assert done.stderr.startswith("sweep.sh: error: grid.yaml is no grid: ")
    assert done.stderr.count("\n") == 1


class SweepServer(WandbServer):
    """A W&B server with one sweep, `grid`.

    Attributes:
        sweep: its configuration, as it was uploaded.
        queue: the parameters of the runs that agents are still to start.
        members: the runs that belong to it.
    """

    def __init__(self):
        super().__init__()
        self.sweep, self.queue, self.members = {}, [], []

    def _graphql(self, operation, asked):
        if operation == "UpsertSweep":
            self.sweep = yaml.safe_load(asked["config"])
            project = {"id": "project", "name": asked["projectName"], "entity": {"id": "entity", "name": "somebody"}}
            sweep = {"name": "grid", "project": project}
            return {"data": {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}}
        if operation == "SweepWithRuns":
            sweep = {"id": "sweep", "name": "grid", "config": yaml.safe_dump(self.sweep), "runs": {"edges": []}}
            return {"data": {"project": {"sweep": sweep}}}
        if operation == "CreateAgent":
            return {"data": {"createAgent": {"agent": {"id": "agent"}}}}
        if operation == "Heartbeat":
            return {
                "data": {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(self.commands(asked))}}
            }
        if operation == "UpsertBucket" and asked["sweep"] == "grid":
            self.members.append(asked["name"])
        return super()._graphql(operation, asked)

    def commands(self, asked):
        """What an agent is to do next: nothing while its run is under way, then the next one, in the end leave."""
        if json.loads(asked["runState"]):
            return []
        if not self.queue:
            return [{"type": "exit"}]
        args = {name: {"value": value} for name, value in self.queue.pop(0).items()}
        return [{"type": "run", "run_id": f"run-{len(self.queue)}", "program": self.sweep["program"], "args": args}]


def agent(folder):
    """`wandb sweep`, and an agent that trains one run, shortened."""
    (folder / "train_ddp.py").symlink_to(ROOT / "train_ddp.py")
    (folder / "launch").symlink_to(ROOT / "launch")
    with SweepServer() as server:
        account = {**NOWHERE, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "PATH": PATH}

        def wandb(*arguments):
            done = run([sys.executable, "-m", "wandb", *arguments], folder, CUDA_VISIBLE_DEVICES="", **account)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout + done.stderr

        made = wandb("sweep", "launch/sweep.yaml")
        assert server.sweep["parameters"]["lr"]["values"] == [0.05, 0.1, 0.2]
        server.sweep["command"] += ["--dataset=synthetic", "--max-steps=20", "--run-dir=run"]
        server.queue.append({name: each["values"][0] for name, each in server.sweep["parameters"].items()})
        return made, wandb("agent", "somebody/cifar-ddp/grid"), server, result(folder / "run")


def test_wandb_makes_the_sweep_and_its_agent_trains_a_run_of_it(scenarios):
    made, said, server, trained = scenarios[agent].result()
    assert server.mistakes == []
    assert "wandb agent somebody/cifar-ddp/grid" in made
    assert "Finished Training" in said
    (name,) = server.runs
    assert name in server.members
    own = server.runs[name]
    assert (own.config["lr"]["value"], own.config["global_batch_size"]["value"]) == (0.05, 32)
    assert own.exit_code == 0
    assert own.summary["test_accuracy"] == trained["test_accuracy"]


def test_every_command_line_of_the_wandb_sweep_parses():
    """As W&B's agent makes it."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    from cifar.config import parse_args

    content = yaml.safe_load((ROOT / "launch" / "sweep.yaml").read_text())
    values = {name: each["values"] for name, each in content["parameters"].items()}
    seen = set()
    for chosen in itertools.product(*values.values()):
        given = {"args": {name: {"value": value} for name, value in zip(values, chosen, strict=True)}}
        args = create_sweep_command_args(given)["args"]
        command = [
            part for part in create_sweep_command(content["command"]) if part not in ("${env}", "${interpreter}")
        ]
        assert command[0] == "${program}"
        assert command[-1] == "${args}"
        config = parse_args([*command[1:-1], *args])
        assert config.wandb == "online"
        seen.add((config.lr, config.global_batch_size))
    assert seen == set(itertools.product(*values.values()))
    assert len(seen) == 9
