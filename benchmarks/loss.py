"""The chunked loss beside plain cross entropy: 2,048 rows, a vocabulary of 103,168, hidden 1,024, a frozen head.

Claim: at most 15 % of the plain loss's extra memory, not slower, and equal within 1e-6 (fp32).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import numpy as np

ROWS, HIDDEN, VOCABULARY = 2048, 1024, 103_168


def child(kind: str, dtype: str, out: str, rows: int, vocabulary: int, repeats: int) -> None:
    """Make loss and gradient in a process of its own; print seconds and extra peak MB, save both."""
    import torch
    import torch.nn.functional as F

    from corefit.engine.loss import CHUNK, Head, LinearCrossEntropy

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.empty(rows, HIDDEN, dtype=getattr(torch, dtype)).normal_(generator=generator)
    weight = torch.empty(vocabulary, HIDDEN, dtype=hidden.dtype).normal_(std=HIDDEN**-0.5, generator=generator)
    targets = torch.randint(vocabulary, (rows,), generator=generator)

    def peak() -> float:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6

    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, seconds = peak(), []
    for _ in range(repeats):
        states = hidden.clone().requires_grad_()
        began = time.process_time()
        if kind == "chunked":
            loss = LinearCrossEntropy.apply(states, targets, *Head(weight), hidden.dtype, CHUNK, True)
        else:
            loss = F.cross_entropy(F.linear(states, weight).float(), targets, reduction="sum")
        (loss / rows).backward()
        seconds.append(time.process_time() - began)
        found, gradient = float(loss.detach()) / rows, states.grad
        del loss
    assert gradient is not None
    np.save(out, np.append(gradient.double().numpy().ravel(), found))
    print(json.dumps({"seconds": min(seconds), "MB": peak() - before}))


def main() -> None:
    """Measure each in processes of their own, in turn."""
    if len(sys.argv) > 1 and sys.argv[1] == "child":
        return child(*sys.argv[2:5], *map(int, sys.argv[5:]))
    args = common.options(__doc__, rounds={"type": int, "default": 3})
    sizes = ("256", "8192") if args.quick else (str(ROWS), str(VOCABULARY))
    seen: dict[tuple[str, str], list[dict[str, float]]] = {}
    found: dict[tuple[str, str], np.ndarray] = {}
    with tempfile.TemporaryDirectory() as place:
        for _ in range(1 if args.quick else args.rounds):
            for dtype in ("float32", "bfloat16"):
                for kind in ("plain", "chunked"):
                    command = [sys.executable, __file__, "child", kind, dtype, f"{place}/found.npy", *sizes, "2"]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    seen.setdefault((kind, dtype), []).append(json.loads(done.stdout))
                    found[kind, dtype] = np.load(f"{place}/found.npy")
    rows, goals = [], []
    for dtype in ("float32", "bfloat16"):
        middle = {
            kind: {key: statistics.median(run[key] for run in seen[kind, dtype]) for key in ("seconds", "MB")}
            for kind in ("plain", "chunked")
        }
        rows += [{"loss": kind, "format": dtype, **middle[kind]} for kind in middle]
        ours, plain = found["chunked", dtype], found["plain", dtype]
        away = float(max(abs(ours[-1] / plain[-1] - 1), np.abs(ours - plain)[:-1].max() / np.abs(plain[:-1]).max()))
        memory, time_ = (middle["chunked"][key] / middle["plain"][key] for key in ("MB", "seconds"))
        goals += [
            common.goal(f"{dtype}: extra memory, times the plain loss's", memory, most=0.15),
            common.goal(f"{dtype}: CPU seconds, times the plain loss's", time_, most=1.0),
        ]
        if dtype == "float32":
            goals.append(common.goal("float32: loss and gradient, relative difference", away, most=1e-6))
    common.finish(
        args,
        (__doc__ or "").split("Claim: ")[1].strip(),
        rows,
        goals,
        peers=("torch",),
        n={"rows": int(sizes[0]), "vocabulary": int(sizes[1]), "hidden": HIDDEN},
        repeats=args.rounds,
        does_not_show="a GPU, several threads, other sizes; every row is supervised here, which favours the plain loss",
    )


if __name__ == "__main__":
    main()
