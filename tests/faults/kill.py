"""Runs killed with SIGKILL at random instants and resumed until they are done: is the result the straight run's?

    python tests/faults/kill.py [--instants 50] [--seed 0] [--out benchmarks/results/kill.json]

For none and nf4, AdamW and 8-bit AdamW: every second instant is a moment of a run's time, from its first line to its
last; the others are before or in the middle of a system call that changes the run folder, so that most lie inside a
save. A resumed run is killed again with a chance of 0.3. A kill that comes after the end doesn't count.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.extend(str(Path(__file__).resolve().parents[2] / name) for name in ("tests", "benchmarks"))

import torch
from runs import WIDE, Lab, outcome, phase, wide_model, write_rows
from safetensors.torch import load_file
from zygote import Zygote, build, unable

ROOT = Path(__file__).resolve().parents[2]
MATRIX = [(quantizer, optimizer) for quantizer in ("none", "nf4") for optimizer in ("adamw", "adamw_8bit")]
MICRO_BATCH = {"none": 2, "nf4": 1}
AGAIN = 0.3
"""The chance that a resumed run is killed too."""


@dataclass
class Instant:
    """One run that was killed, perhaps more than once, and finished."""

    phases: list[str] = field(default_factory=list)
    """Where each kill came."""
    differs: list[str] = field(default_factory=list)
    """What is not as in the straight run."""


def lab_of(zygote: Zygote, folder: Path, quantizer: str, optimizer: str, rows: int = 60) -> Lab:
    """Give a lab for runs of this kind."""
    folder.mkdir()
    sets = [*WIDE, f"train.optimizer={optimizer}", f"train.micro_batch={MICRO_BATCH[quantizer]}"]
    return Lab(zygote, folder, wide_model(folder / "model"), write_rows(folder / "rows.jsonl", rows), sets, quantizer)


def campaign(lab: Lab, instants: int, seed: int) -> Iterator[Instant]:
    """Yield what became of each instant."""
    straight = lab.new()
    done = lab.run(straight)
    assert done.code == 0, done.output
    expected, calls = outcome(straight), len(lab.trace(straight))
    states_are_as_named(straight, lab.sets)
    rng = random.Random(seed)
    for i in range(instants):
        share = (i // 2 + rng.random()) / ((instants + 1) // 2)  # spread evenly
        yield instant(lab, expected, rng, share, done.seconds, calls, at_call=bool(i % 2))


def instant(
    lab: Lab, expected: dict[str, Any], rng: random.Random, share: float, seconds: float, calls: int, *, at_call: bool
) -> Instant:
    """Kill a run when about ``share`` of it is over, resume it until it is done, and compare."""
    found, run = Instant(), lab.new()
    while not found.phases:
        if kill(lab, run, rng, share, seconds, calls, at_call, found):
            break
        run, share = lab.new(), rng.random()
    while rng.random() < AGAIN and kill(lab, run, rng, rng.random(), seconds, calls, rng.random() < 0.5, found):
        pass
    done = lab.run(run)
    if done.code:
        found.differs.append(f"exit code {done.code}: {done.said}")
    else:
        result = outcome(run)
        found.differs += [what for what in expected if result[what] != expected[what]]
    return found


def kill(
    lab: Lab, run: Path, rng: random.Random, share: float, seconds: float, calls: int, at_call: bool, found: Instant
) -> bool:
    """Start or continue a run and kill it; False: it ended before."""
    if at_call:
        done = lab.run(run, at=1 + int(share * calls), do=rng.choice(["kill", "torn"]))
    else:
        done = lab.run(run, kill_after=share * seconds)
    if done.code == -9:
        found.phases.append(phase(lab.trace(run), at_call=at_call))
    elif done.code:
        found.differs.append(f"exit code {done.code}: {done.said}")
    return done.code == -9


def states_are_as_named(run: Path, sets: list[str]) -> None:
    """Assert that 8-bit states are uint8, and that every matrix is large enough for that."""
    folder = max((run / "checkpoints").glob("step-*"))
    weights, state = (load_file(folder / f"{name}.safetensors") for name in ("trainable", "optimizer"))
    assert len(weights) == 28
    assert min(weight.numel() for weight in weights.values()) >= 4096
    moments = ("state1", "state2") if "train.optimizer=adamw_8bit" in sets else ("exp_avg", "exp_avg_sq")
    dtype = torch.uint8 if "state1" in moments else torch.float32
    assert {state[f"{name}/{moment}"].dtype for name in weights for moment in moments} == {dtype}


def main() -> int:
    """Run the whole matrix; print a table and write the result."""
    from common import machine, show, versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instants", type=int, default=50, help="of each kind (default 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", default=ROOT / "benchmarks" / "results" / "kill.json")
    args = parser.parse_args()
    if why := unable():
        print(f"skipped: {why}")
        return 0
    began, rows, wrong = time.monotonic(), [], []
    with tempfile.TemporaryDirectory() as name, Zygote(build(Path(name))) as zygote:
        folder = Path(name).resolve()
        for number, (quantizer, optimizer) in enumerate(MATRIX):
            lab = lab_of(zygote, folder / f"{quantizer}-{optimizer}", quantizer, optimizer)
            found = []
            for one in campaign(lab, args.instants, args.seed + number):
                found.append(one)
                print(
                    f"{quantizer} {optimizer} {len(found)}: {' '.join(one.phases)} {one.differs or 'equal'}", flush=True
                )
            phases = Counter(phase for one in found for phase in one.phases)
            rows.append(
                {"quantizer": quantizer, "optimizer": optimizer, "instants": len(found)}
                | {"equal": sum(not one.differs for one in found), "kills": sum(phases.values())}
                | {f"in {phase}": phases[phase] for phase in ("loading", "step", "save", "end")}
            )
            wrong += [f"{quantizer} {optimizer}: {one.phases}: {one.differs}" for one in found if one.differs]
    equal, instants = (sum(row[key] for row in rows) for key in ("equal", "instants"))
    result = {
        "claim": "a run killed at random instants and resumed until it is done ends as the straight run does: "
        "adapter, metrics, samples and ledger",
        "command": f"python tests/faults/kill.py --instants {args.instants} --seed {args.seed}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions("torch", "transformers", "peft", "bitsandbytes", "safetensors"),
        "seconds": round(time.monotonic() - began),
        "equal": f"{equal} of {instants}",
        "rows": rows,
        "wrong": wrong,
        "does not show": "other sizes, GPUs, several threads; kills while Python imports, when nothing is written",
    }
    show(rows)
    print(f"equal: {result['equal']}")
    args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(equal != instants)


if __name__ == "__main__":
    sys.exit(main())
