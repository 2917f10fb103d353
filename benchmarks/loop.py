"""What the training loop takes beside forward, backward and optimizer, as a share of a step: own CPU time, one run.

Claim: under 2 % of a step of a 135M model on a CPU (LoRA r16, 4 packs of 1,024, bf16): reading, encoding, packing,
batches, ledger, reports, progress line.

    python benchmarks/loop.py --model FOLDER
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import train_cpu


def main() -> None:
    """Run ``corefit.train`` in this process, with a clock around what it hands to torch."""
    args = common.options(
        __doc__,
        model={"type": Path, "required": True, "metavar": "FOLDER"},
        steps={"type": int, "default": 4},
        length={"type": int, "default": train_cpu.LENGTH},
    )
    import torch

    import corefit
    from corefit import session
    from corefit.engine import loop

    spent, ends = [0.0], [(0.0, 0.0)]

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*a: Any, **k: Any) -> Any:
            began = time.process_time()
            try:
                return call(*a, **k)
            finally:
                spent[0] += time.process_time() - began

        return run

    loop.nats = timed(loop.nats)
    torch.Tensor.backward = timed(torch.Tensor.backward)
    for name in ("get_total_norm", "clip_grads_with_norm_"):
        setattr(torch.nn.utils, name, timed(getattr(torch.nn.utils, name)))
    torch.optim.AdamW.step = timed(torch.optim.AdamW.step)
    report = session.Session._report

    def reported(self: Any, step: Any) -> None:
        report(self, step)
        ends.append((time.process_time(), spent[0]))

    session.Session._report = reported
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = train_cpu.write_rows(folder, 40 if args.quick else 1000)["corefit"]
        steps = 2 if args.quick else args.steps
        corefit.train(
            model=str(args.model), data=str(rows), plugin="openai", template="chatml", quantizer="none",
            out=str(folder / "run"),
            sets=[*train_cpu.settings(steps, threads=1), f"pack.max_length={args.length}"],
        )  # fmt: skip
    rows_ = [
        {"step": n + 2, "CPU s": end[0] - begin[0], "beside torch s": (end[0] - begin[0]) - (end[1] - begin[1])}
        for n, (begin, end) in enumerate(zip(ends[1:], ends[2:], strict=False))
    ]
    share = sum(row["beside torch s"] for row in rows_) / sum(row["CPU s"] for row in rows_)
    common.finish(
        args,
        (__doc__ or "").split("Claim: ")[1].partition("\n\n")[0],
        rows_,
        [common.goal("CPU time beside forward, backward, norm and optimizer, % of a step", 100 * share, most=2.0)],
        peers=("torch", "transformers", "peft"),
        repeats=len(rows_),
        does_not_show="a GPU, where the host's work runs beside the device's; one thread; the first step is left out",
    )


if __name__ == "__main__":
    main()
