"""Two machines, as network namespaces of this one: c10d and static rendezvous, what SLURM sets, one that fails."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli import environment
from test_ranks import killed, same, small_run, together  # noqa: F401, a fixture among them

pytestmark = pytest.mark.full
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hosts() -> Iterator[list[tuple[str, str]]]:
    """Give name and address of two namespaces that a cable joins; nothing else is reached from them."""
    if not shutil.which("ip") or os.geteuid():
        pytest.skip("needs root and the command ip, for network namespaces")
    tag = uuid.uuid4().hex[:6]
    found = [(f"corefit-{tag}-{i}", f"10.231.7.{i}") for i in (1, 2)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        ip("netns", "add", found[0][0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made here: {error.stderr.decode().strip()}")
    try:
        ip("netns", "add", found[1][0])
        ip("link", "add", "cable0", "netns", found[0][0], "type", "veth", "peer", "cable0", "netns", found[1][0])
        for name, address in found:
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable0")
            ip("-n", name, "link", "set", "cable0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield found
    finally:
        for name, _ in found:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def start(
    hosts: list[tuple[str, str]], words: list[str], cwd: Path, *, hidden: Path | None = None, **more: str
) -> list[subprocess.Popen[bytes]]:
    """Start a command on both; the second doesn't see what is in the folder ``hidden``. ``more``: of the environment.

    In both ``{n}`` is a host's number from 0, ``{me}`` its address, ``{first}`` that of the first.
    """
    processes = []
    for n, (name, address) in enumerate(hosts):
        names = {"{n}": str(n), "{me}": address, "{first}": hosts[0][1], "{is_first}": str(n == 0)}

        def fill(text: str, names: dict[str, str] = names) -> str:
            for name, value in names.items():
                text = text.replace(name, value)
            return text

        env = environment({"GLOO_SOCKET_IFNAME": "cable0", **{key: fill(value) for key, value in more.items()}})
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
        apart = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {hidden} && exec "$@"', "sh"]
        command = ["ip", "netns", "exec", name, *apart * (n == 1 and hidden is not None)]
        command += map(fill, words)
        with (cwd / f"host{n}.txt").open("ab") as out:
            processes.append(subprocess.Popen(command, cwd=cwd, env=env, stdout=out, stderr=out))
    return processes


def ended(processes: list[subprocess.Popen[bytes]], cwd: Path, *, within: int = 100) -> list[int]:
    """Wait for processes; give their exit codes."""
    try:
        return [process.wait(within) for process in processes]
    except subprocess.TimeoutExpired:
        pytest.fail("".join((cwd / f"host{n}.txt").read_text("utf-8") for n in (0, 1)))
    finally:
        for process in processes:
            process.kill()
            process.wait()


TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--local-addr", "{me}"),
    *("--rdzv-backend", "c10d", "--rdzv-endpoint", "{first}:29500", "--rdzv-id", "run-1"),
    *("--rdzv-conf", "is_host={is_first}"),  # torchrun knows itself by its host's name, which both have here
]


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_hosts_are_one_process(
    sharding: str,
    hosts: list[tuple[str, str]],
    flags: list[str],
    tmp_path: Path,
) -> None:
    assert together(1, ["--out", "one", *flags], tmp_path) == [0]
    words = [*TORCHRUN, "-m", "corefit", "train", "--out", "two", *flags, f"run.sharding={sharding}"]
    assert ended(start(hosts, words, tmp_path), tmp_path) == [0, 0], (tmp_path / "host0.txt").read_text("utf-8")
    same(tmp_path / "one", tmp_path / "two")


def test_a_process_killed_on_one_host_ends_both_which_go_on(
    hosts: list[tuple[str, str]],
    flags: list[str],
    tmp_path: Path,
) -> None:
    more = ["train.epochs=4", "checkpoint.every_steps=2", "run.sharding=full"]
    train = ["-m", "corefit", "train", "--out", "run", *flags, *more]
    processes = start(hosts, [*TORCHRUN, *train], tmp_path)
    killed(processes[1], tmp_path / "run", signal.SIGKILL)
    began = time.monotonic()
    assert ended(processes, tmp_path) == [1, 1]
    assert time.monotonic() - began < 30
    processes = start(hosts, [*TORCHRUN, *train[:3], "--resume", *train[3:]], tmp_path)
    assert ended(processes, tmp_path) == [0, 0], (tmp_path / "host0.txt").read_text("utf-8")
    assert "resume: from step" in (tmp_path / "host0.txt").read_text("utf-8")


def test_torchrun_restarts_both_hosts_by_itself(
    hosts: list[tuple[str, str]],
    flags: list[str],
    tmp_path: Path,
) -> None:
    more = ["train.epochs=4", "checkpoint.every_steps=2", "run.sharding=full"]
    words = [*TORCHRUN, "--max-restarts", "2", "-m", "corefit", "train", "--out", "run", *flags, *more]
    processes = start(hosts, words, tmp_path)
    killed(processes[1], tmp_path / "run", signal.SIGKILL)
    assert ended(processes, tmp_path) == [0, 0], (tmp_path / "host0.txt").read_text("utf-8")
    assert "resume: from step" in (tmp_path / "host0.txt").read_text("utf-8")


def test_hosts_without_a_shared_file_system_train_and_say_what_a_resume_needs(
    hosts: list[tuple[str, str]],
    flags: list[str],
    tmp_path: Path,
) -> None:
    train = [*TORCHRUN, "-m", "corefit", "train"]
    words = ["--out", "run", *flags, "train.max_steps=4"]
    assert ended(start(hosts, [*train, *words], tmp_path, hidden=tmp_path), tmp_path) == [0, 0]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    again = start(hosts, [*train, "--resume", *words[:-1], "train.max_steps=6"], tmp_path, hidden=tmp_path)
    assert ended(again, tmp_path) == [1, 1]
    told = "rank 1: error: rank 0 goes on from step 4, here it is 0: "
    assert told in (tmp_path / "host1.txt").read_text("utf-8")


def test_the_line_for_slurm_starts_a_run_in_the_environment_that_srun_makes(
    hosts: list[tuple[str, str]],
    flags: list[str],
    tmp_path: Path,
) -> None:
    line = next(line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if line.startswith("srun "))
    program, dash_c, command = shlex.split(line, comments=True)[-3:]
    assert (program, dash_c) == ("bash", "-c")
    words = command.replace("--nproc-per-node 8", "--nproc-per-node 1").replace("RECIPE --out RUN", "$FLAGS --out run")
    slurm = dict(SLURM_NNODES="2", SLURM_NODEID="{n}", SLURM_LAUNCH_NODE_IPADDR=hosts[0][1], FLAGS=" ".join(flags))
    processes = start(hosts, [program, dash_c, words], tmp_path, **slurm)
    assert ended(processes, tmp_path) == [0, 0], (tmp_path / "host0.txt").read_text("utf-8")
    assert "ranks: 2, each with its share" in (tmp_path / "host0.txt").read_text("utf-8")
