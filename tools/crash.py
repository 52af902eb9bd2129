"""Commands that are ended, or whose disk fails, at any moment: run again they give the same, and leave nothing over.

    python tools/crash.py [--quick] [PART OF "COMMAND:CAMPAIGN" ...]

Each command is a process of its own, a fork of one that has imported loopscope. A campaign does one thing to it again
and again, runs the command once more, and compares with an undisturbed run: arrays, weights bit for bit, names of
files. `--quick` does each a few times. Prints how often a campaign was tried, how often the command met it before its
end, and what was wrong; ends with 1 if anything was.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from crash_campaigns import Campaign, Child, Command, full, read_only
from fault_folders import SWEEP
from fault_inputs import ANALYZE, DEMO, tiny
from loopscope.models.architecture import Architecture
from loopscope.models.checkpoints.native import save_checkpoint
from loopscope.models.native.transformer import LoopedTransformer

CAMPAIGNS: dict[str, Callable[[Campaign], tuple[int, int]]] = {
    "killed at each operation": Campaign.kills,
    "disk full from an operation on": functools.partial(Campaign.failing, fail=full),
    "disk of so many pages": Campaign.small_disk,
    "read-only from an operation on": functools.partial(Campaign.failing, fail=read_only),
    "read-only folder": Campaign.forbidden,
    "killed at random": Campaign.random_kills,
    "a worker killed at random": Campaign.random_worker_kills,
    "a signal at random": Campaign.signals,
    "two signals at random": Campaign.two_signals,
    "two processes": Campaign.together,
}
OF_WORKERS = ("killed at random", "a worker killed at random", "a signal at random", "two signals at random")


def commands(folder: Path) -> list[Command]:
    model = tiny(folder / "model")
    (folder / "t.txt").write_text("one two three four five six seven eight\n\n" * 20)
    training = {
        "architecture": SWEEP["base"]["architecture"] | {"vocab_size": 300}, "steps": 4, "batch_size": 2,
        "data": {"train": "t.txt", "test": "t.txt"}, "context": 8, "log_every": 1, "checkpoint_every": 2,
        "evaluation": {"recurrences": [1], "every": 2},
    }  # fmt: skip
    (folder / "train.json").write_text(json.dumps(training))
    (folder / "sweep.json").write_text(json.dumps(SWEEP))
    text = ["--text", "one two", "three", "four five six", "--batch-size", "1", "--threads", "1"]
    analyze = ["analyze", str(model), *ANALYZE, *text]
    moving, turning = folder / "moving", _turning(folder / "turning")
    arguments = ["--recurrences", "8", "--horizon", "32", "--device", "cpu", "--no-report", "--skip", "heads", *text]
    code, said = Child(["analyze", str(turning), *arguments, "--out", str(moving)]).end()
    assert code == 0, said
    control = ["control", str(moving), "--model", str(turning), "--no-report", "--eta", "0.5"]
    sweep = ["experiment", "training", str(folder / "sweep.json"), "--engine"]
    processes = ["processes", "--workers", "2"]

    def given(name: str, arguments: list[str], times: int = 50, workers: int = 0) -> Command:
        return Command(name, lambda out: [*arguments, "--out", str(out)], times, workers)

    return [
        given("analyze", analyze),
        given("train", ["train", str(folder / "train.json"), "--threads", "1"]),
        given("sweep", [*sweep, "serial"]),
        given("control", control),
        given("analyze, two workers", [*analyze, "--engine", *processes], workers=2),
        given("sweep, two workers", [*sweep, *processes], times=12, workers=2),
    ]


def _turning(folder: Path) -> Path:
    """A model of which some tokens orbit."""
    architecture = Architecture(
        vocab_size=1024, width=16, heads=2, kv_heads=2, head_dim=8, mlp_width=32, prelude=1, recurrent=2, coda=1,
        recurrences=4, injection="linear", norm_placement="branch-in-out", loop_norm="recurrence",
        state_init="embeddings",
    )  # fmt: skip
    save_checkpoint(folder, LoopedTransformer(architecture).initialize(0, 0.6), (DEMO / "tokenizer.json").read_text())
    return folder


def main(arguments: list[str]) -> int:
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    quick = "--quick" in arguments
    asked = [each for each in arguments if not each.startswith("--")]
    wrong = 0
    # Open to the user that the read-only folders are tried as.
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        (folder := Path(place) / "inputs").mkdir()
        print(f"{'command':21s} {'campaign':31s} {'tried':>5s} {'met':>5s} {'wrong':>5s}")
        for command in commands(folder):
            (own := Path(place) / command.name).mkdir()
            names = [
                name
                for name in CAMPAIGNS
                if (name in OF_WORKERS if command.workers else name != "a worker killed at random")
                and (not asked or any(each in f"{command.name}:{name}" for each in asked))
            ]
            if not names:
                continue
            campaign = Campaign(command, own, quick)
            for name in names:
                campaign.wrong = 0
                tried, met = CAMPAIGNS[name](campaign)
                wrong += campaign.wrong
                print(f"{command.name:21s} {name:31s} {tried:5d} {met:5d} {campaign.wrong:5d}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
