"""The tests of ``tests/gpu`` on a machine without a GPU, on one that is emulated: ``tests/emulated_gpu`` says how."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.full
ROOT = Path(__file__).resolve().parents[2]
MISSING = {
    "paged memory, and 8-bit optimizers, are bitsandbytes' CUDA library's": ["pages_its_optimizer", "adamw_8bit"],
    "int8 is too, and what its Python makes of it overflows in fp16": ["int8"],
    "two runs of a model of 150M parameters take five minutes here; benchmarks/LOG.md has what they allocated": [
        "what_the_gpu_allocates"
    ],
}
"""What the emulation lacks: why -> parts of the names of tests."""


@pytest.mark.skipif(torch.cuda.is_available() or not shutil.which("g++"), reason="has a GPU, or no g++")
def test_what_needs_a_gpu_passes_on_an_emulated_one(tmp_path: Path) -> None:
    folder = ROOT / "tests" / "emulated_gpu"
    library = tmp_path / "cuda.so"
    code = "import sys, pathlib, emulated_gpu; emulated_gpu.build(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, library], check=True, env={**os.environ, "PYTHONPATH": str(folder)})
    environment = {**os.environ, "PYTHONPATH": str(folder), "EMULATED_GPU": str(library), "OMP_NUM_THREADS": "1"}
    environment["EMULATED_GPUS"] = "2"
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    left_out = " or ".join(name for names in MISSING.values() for name in names)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "-k", f"not ({left_out})", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    assert "skipped" not in done.stdout, done.stdout[-2_000:]
