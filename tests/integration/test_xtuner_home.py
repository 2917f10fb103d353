"""XTuner's users at home: their folders, their edited configuration, their commands, through the real command line."""

from __future__ import annotations

import json
import re
import shlex
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import corefit
from safetensors.torch import load_file
from tiny_internlm import write_internlm
from xtuner_configs import V0_1_9, V0_1_23, edited

from corefit.report import objects

RANK = 4


def rows(first: int, last: int) -> str:
    talk = "### Human: What is {0}?### Assistant: It is number {0}.### Human: Sure?### Assistant: Yes, {0}."
    return "".join(json.dumps({"text": talk.format(i)}) + "\n" for i in range(first, last))


def at_home(home: Path, text: str = V0_1_23, *changes: tuple[str, str]) -> Path:
    """Write what they have: pickled shards with an index, a data folder, a configuration, copied and edited."""
    base = write_internlm(home / "internlm-chat-7b", "internlm", dtype="float16")
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = [f"pytorch_model-0000{n}-of-00003.bin" for n in (1, 2, 3)]
    where = {tensor: names[i * 3 // len(tensors)] for i, tensor in enumerate(tensors)}
    for name in names:
        torch.save({t: tensors[t] for t in tensors if where[t] == name}, base / name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index), "utf-8")
    data = home / "openassistant-guanaco"
    data.mkdir()
    (data / "openassistant_best_replies_train.jsonl").write_text(rows(0, 40), "utf-8")
    (data / "openassistant_best_replies_eval.jsonl").write_text(rows(40, 50), "utf-8")
    edits = [
        ("'internlm/internlm-chat-7b'", "'./internlm-chat-7b'"),
        ("'timdettmers/openassistant-guanaco'", "'./openassistant-guanaco'"),
        ("max_length = 2048", "max_length = 128"),
        ("accumulative_counts = 16\n", "accumulative_counts = 2\n"),
        ("max_epochs = 3", "max_epochs = 1"),
        ("r=64", f"r={RANK}"),
    ]
    config = home / "internlm_chat_7b_qlora_oasst1_e3_copy.py"
    config.write_text(edited(text, *edits, *changes), "utf-8")
    return config


@pytest.mark.parametrize(
    ("text", "out"),
    [(V0_1_9, "--work-dir w"), (V0_1_23, "")],
    ids=["v0.1.9", "v0.1.23"],
)
def test_their_model_folder_their_data_folder_and_their_configuration_train(
    tmp_path: Path, text: str, out: str
) -> None:  # noqa: E501
    config = at_home(tmp_path, text)
    first = corefit("train", config.name, cwd=tmp_path)
    assert first.returncode == 2 and "weights only as pickle" in first.stderr and "Traceback" not in first.stderr
    line = first.stderr.strip().rpartition("corefit safetensors ")[2]
    assert corefit("safetensors", *shlex.split(line), cwd=tmp_path).returncode == 0
    made = shlex.split(line)[-1]
    steps = ("--set", "train.max_steps=1", "sample.max_tokens=2", "run.threads=1")
    done = corefit("train", config.name, "--model", made, *out.split(), *steps, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / (out.removeprefix("--work-dir ") or "runs/internlm_chat_7b_qlora_oasst1_e3_copy-1")
    (step,) = [line for line in objects(run / "metrics.jsonl") if "loss" in line]
    assert step["step"] == 1 and step["loss"] > 0 and step["packs"] == 2
    lines = done.stdout.splitlines()
    assert lines[0].endswith(f"on {tmp_path / 'openassistant-guanaco'}")
    notes = [line for line in lines if re.match(rf"{config.name}:\d+: ", line)]
    assert notes and lines[1 : 1 + len(notes)] == notes, "what was not taken over is said as it starts"
    assert any("trust_remote_code = True: left out" in note for note in notes)
    ledger = json.loads((run / "ledger.json").read_text("utf-8"))
    assert ledger["balanced"]
    data = [Path(fact["path"]).name for fact in json.loads((run / "run.json").read_text("utf-8"))["data"]]
    assert data == ["openassistant_best_replies_train.jsonl", "openassistant_best_replies_eval.jsonl"]
    again = corefit("train", config.name, "--model", made, "--resume", *out.split(), *steps, cwd=tmp_path)
    assert again.returncode == 0 and "is complete: nothing to do" in again.stdout
    prompts = {line["prompt"] for line in objects(run / "samples.jsonl")}
    assert prompts == {"请给我介绍五个上海的景点", "Please tell me five scenic spots in Shanghai"}


def test_import_prints_a_recipe_that_trains_the_same(tmp_path: Path) -> None:
    config = at_home(tmp_path)
    done = corefit("import", config.name, cwd=tmp_path)
    assert done.returncode == 0 and "left out" in done.stderr and "left out" not in done.stdout
    (tmp_path / "recipe.toml").write_text(done.stdout, "utf-8")
    tokenizer = ("--tokenizer", "internlm-chat-7b", "--json")
    ours = corefit("inspect", "recipe.toml", *tokenizer, cwd=tmp_path)
    theirs = corefit("inspect", config.name, *tokenizer, cwd=tmp_path)
    assert ours.returncode == 0 and ours.stdout == theirs.stdout and len(ours.stdout.splitlines()) == 40
    assert "left out" in theirs.stderr
    short = corefit("log-dataset", config.name, *tokenizer, "--cfg-options", "max_length=40", cwd=tmp_path)
    longest = max(len(json.loads(line)["input_ids"]) for line in short.stdout.splitlines())
    assert short.returncode == 0 and longest <= 40 < len(json.loads(ours.stdout.splitlines()[0])["input_ids"])


def test_import_of_what_cant_be_known_prints_the_rest_and_exits_2(tmp_path: Path) -> None:
    config = tmp_path / "c.py"
    config.write_text(edited(V0_1_23, ("lr = 2e-4", "lr = schedule()")), "utf-8")
    done = corefit("import", "c.py", cwd=tmp_path)
    assert done.returncode == 2 and "max_length = 2048" in done.stdout and "\nlr =" not in done.stdout
    assert "corefit: error: c.py:" in done.stderr and "`schedule()`, which is never run" in done.stderr
    for arguments in (["import", "nothing.py"], ["import", "c.py", "--cfg-options", "lrr=1"]):
        refused = corefit(*arguments, cwd=tmp_path)
        assert refused.returncode == 2 and refused.stdout == "" and len(refused.stderr.splitlines()) == 1


def test_planted_code_is_not_run_by_any_command(tmp_path: Path) -> None:
    at_home(
        tmp_path, V0_1_23, ("load_from = None", "load_from = None\nimport os\nos.system('touch ran')\nopen('ran', 'w')")
    )
    name = "internlm_chat_7b_qlora_oasst1_e3_copy.py"
    for verb, *more in (["train", "--dry-run"], ["import"], ["inspect", "--tokenizer", "internlm-chat-7b"]):
        done = corefit(verb, name, *more, cwd=tmp_path)
        assert "`os.system('touch ran')`: not run" in done.stdout + done.stderr
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------------------ habits


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("convert pth_to_hf c.py iter_500.pth out", "corefit convert pth_to_hf: nothing to convert"),
        ("convert merge base adapter out", "corefit convert merge: `corefit merge RUN --out DIR`"),
        ("convert split src dst", "corefit convert split: nothing to split"),
        ("mmbench model --data-path x", "corefit mmbench: corefit trains and scores text models"),
        ("eval_refcoco model", "corefit eval_refcoco: "),
        ("preprocess arxiv a b", "corefit preprocess arxiv: "),
        ("test c.py --checkpoint x.pth", "corefit test: `corefit eval RUN --choices FILE`"),
        ("dist_train c.py", "corefit dist_train: `corefit launch -n GPUS ...` with what"),
        (
            "train c.py --deepspeed deepspeed_zero2",
            "corefit train --deepspeed: leave it out; `--set run.sharding=full` divides the base among GPUs",
        ),
        (
            "train c.py --deepspeed=deepspeed_zero3",
            "corefit train --deepspeed: leave it out; `--set run.sharding=full` divides the base among GPUs",
        ),
        ("train c.py --launcher pytorch", "corefit train --launcher: `corefit launch -n GPUS ...`"),
        ("log-dataset c.py --show masked_text", "corefit log-dataset --show: leave it out"),
        ("chat model --prompt-template internlm_chat", "corefit chat --prompt-template: --template NAME; a run, and"),
        ("chat model --bits 4", "corefit chat --bits: --quantizer nf4 (4 bit)"),
    ],
)
def test_old_commands_and_flags_are_answered_in_one_line(tmp_path: Path, command: str, answer: str) -> None:
    (tmp_path / "c.py").write_text(V0_1_23, "utf-8")
    done = corefit(*command.split(), cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"corefit: error: {answer}") and len(done.stderr.splitlines()) == 1


def test_an_unknown_verb_is_still_answered_with_the_nearest(tmp_path: Path) -> None:
    done = corefit("trian", cwd=tmp_path)
    assert done.returncode == 2 and "did you mean 'train'?" in done.stderr


def test_several_processes_are_refused_with_the_variable_that_asked_for_them(tmp_path: Path) -> None:
    (tmp_path / "c.py").write_text(V0_1_23, "utf-8")
    done = corefit("train", "c.py", cwd=tmp_path, env={"NPROC_PER_NODE": "2"})
    assert done.returncode == 2 and "corefit: rank 0: error: " in done.stderr  # it launched
    one = corefit("train", "c.py", "--model", "nowhere/at/all", cwd=tmp_path, env={"NPROC_PER_NODE": "1"})
    assert "NPROC_PER_NODE" not in one.stderr and "openassistant-guanaco: no such" in one.stderr


def test_list_dataset_format_and_check_custom_dataset(tmp_path: Path) -> None:
    config = at_home(tmp_path)
    formats = corefit("list-dataset-format", cwd=tmp_path)
    assert formats.returncode == 0 and "oasst1  " in formats.stdout
    assert corefit("formats", "oasst", cwd=tmp_path).stdout.startswith("oasst1  ")
    checked = corefit("check-custom-dataset", config.name, "--tokenizer", "internlm-chat-7b", cwd=tmp_path)
    assert checked.returncode == 0 and "\n--- " in checked.stdout and "ledger:" in checked.stdout


# ------------------------------------------------------------------------------------------------------- checkpoints


class HistoryBuffer:
    """Stands for what mmengine's message hub pickles: an object of a class of its own, with arrays."""

    def __init__(self) -> None:
        self._log_history, self._count_history = np.arange(9.0), np.ones(9, dtype=np.int64)


def checkpoint(path: Path, rank: int = RANK) -> dict[str, torch.Tensor]:
    """Write a .pth as XTuner did: LoRA weights among everything else that mmengine saves; gives the weights."""
    sizes = {"q_proj": (64, 64), "down_proj": (96, 64), "gate_proj": (64, 96)}
    weights: OrderedDict[str, torch.Tensor] = OrderedDict()
    for layer in range(2):
        for name, (ins, outs) in sizes.items():
            part = "self_attn" if name == "q_proj" else "mlp"
            at = f"llm.base_model.model.model.layers.{layer}.{part}.{name}"
            weights[f"{at}.lora_A.default.weight"] = torch.randn(rank, ins)
            weights[f"{at}.lora_B.default.weight"] = torch.randn(outs, rank)
    whole = {
        "meta": {"cfg": V0_1_23, "seed": 7, "epoch": 3, "iter": 500, "experiment_name": "e", "time": "20240101_000000"},
        "state_dict": weights,
        "message_hub": {"log_scalars": OrderedDict({"train/loss": HistoryBuffer()}), "runtime_info": OrderedDict(), "resumed_keys": OrderedDict()},  # noqa: E501
        "optimizer": {
            "state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.randn(4, 64), "exp_avg_sq": torch.randn(4, 64)}},
            "param_groups": [{"lr": 2e-4, "betas": (0.9, 0.999), "params": [0]}],
            "loss_scaler": {"scale": 65536.0},
        },
        "param_schedulers": [{"last_step": 5, "_global_step": 6}],
    }  # fmt: skip
    torch.save(whole, path)
    return weights


def test_a_checkpoint_of_theirs_becomes_an_adapter_to_train_on(tmp_path: Path) -> None:
    config = at_home(tmp_path)
    weights = checkpoint(tmp_path / "epoch_3.pth")
    assert corefit("safetensors", "internlm-chat-7b", cwd=tmp_path).returncode == 0
    plain = corefit("safetensors", "epoch_3.pth", "--out", "plain", cwd=tmp_path)
    assert plain.returncode == 0 and "epoch_3.pth: LoRA weights; with --config CONFIG" in plain.stdout
    done = corefit("safetensors", "epoch_3.pth", "--config", config.name, "--out", "old", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "test_xtuner_home.HistoryBuffer" in done.stdout and "the weights are those under 'state_dict'" in done.stdout
    made = load_file(tmp_path / "old" / "adapter_model.safetensors")
    assert {f"llm.{name.replace('.weight', '.default.weight')}": 0 for name in made}.keys() == weights.keys()
    assert all(torch.equal(made[n[4:].replace(".default", "")], t) for n, t in weights.items())
    facts = json.loads((tmp_path / "old" / "adapter_config.json").read_text("utf-8"))
    assert (facts["r"], facts["lora_alpha"], facts["lora_dropout"]) == (RANK, 16, 0.1)
    assert facts["target_modules"] == ["down_proj", "gate_proj", "q_proj"] and facts["modules_to_save"] is None
    said = corefit("chat", "old", "--prompt", "hi", "--max-tokens", "2", cwd=tmp_path)  # its base is where it was
    assert said.returncode == 0, said.stderr
    merged = corefit("merge", "old", "--out", "merged", cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr
    assert json.loads((tmp_path / "merged" / "corefit.json").read_text("utf-8"))["template"] == "internlm_chat"
    assert "<|User|>:" in (tmp_path / "merged" / "chat_template.jinja").read_text("utf-8")
    other = corefit("merge", "old", "--template", "vicuna", "--out", "other", cwd=tmp_path)
    assert other.returncode == 0 and "USER: " in (tmp_path / "other" / "chat_template.jinja").read_text("utf-8")
    sets = ("train.max_steps=1", "train.lr=1e-9", "sample.max_tokens=2", "run.threads=1", "val.share=0")
    text = config.read_text("utf-8").replace("load_from = None", "load_from = 'epoch_3.pth'")
    config.write_text(text, "utf-8")
    asked = corefit("train", config.name, cwd=tmp_path)
    assert asked.returncode == 2
    assert (
        "`corefit safetensors epoch_3.pth --config internlm_chat_7b_qlora_oasst1_e3_copy.py --out DIR`" in asked.stderr
    )
    run = corefit("train", config.name, "--set", "adapter.start=old", *sets, "--out", "run", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    after = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert after.keys() == made.keys() and all((after[name] - made[name]).abs().max() < 1e-6 for name in made)


def test_another_rank_or_other_weights_are_refused(tmp_path: Path) -> None:
    config = at_home(tmp_path)
    checkpoint(tmp_path / "a.pth", rank=8)
    done = corefit("safetensors", "a.pth", "--config", config.name, "--out", "old", cwd=tmp_path)
    assert done.returncode == 2 and "a.pth: its rank is 8, the configuration says 4" in done.stderr
    torch.save({"state_dict": {"llm.model.norm.weight": torch.ones(3)}}, tmp_path / "b.pth")
    done = corefit("safetensors", "b.pth", "--config", config.name, "--out", "old", cwd=tmp_path)
    assert done.returncode == 2 and "b.pth: llm.model.norm.weight: not of a LoRA adapter" in done.stderr
    assert not (tmp_path / "old").exists()
    done = corefit("safetensors", "a.pth", "--config", config.name, cwd=tmp_path)
    assert done.returncode == 2 and "--out DIR names it" in done.stderr
