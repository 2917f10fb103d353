"""XTuner's commands and flags that corefit has not: what to type instead, or why there is nothing."""

from __future__ import annotations

_LAUNCH = "`corefit launch -n GPUS ...` or torchrun starts the processes; leave it out"
_CHAT = "`corefit chat RUN` takes the template, its stops and the base from the run"
_IMAGES = "corefit trains and scores text models; there is no image model to score"

HABITS = {
    "convert pth_to_hf": "nothing to convert: a run writes RUN/adapter in PEFT's format; an old .pth becomes one by "
    "`corefit safetensors FILE.pth --config CONFIG.py --out DIR`",
    "convert merge": "`corefit merge RUN --out DIR`, or `corefit merge ADAPTER --model BASE --out DIR`",
    "convert split": "nothing to split: corefit reads weights one tensor at a time, whatever the size of the files",
    "convert": "there are `corefit merge` and `corefit safetensors`; a config becomes a recipe by `corefit import`",
    "mmbench": _IMAGES,
    "eval_refcoco": _IMAGES,
    "test": "`corefit eval RUN --choices FILE` is MMLU's accuracy by subject, `--data FILE` the loss on records",
    "preprocess arxiv": "filter the rows with a few lines of your own; `--plugin arxiv` reads abstract and title",
    "preprocess refcoco": _IMAGES,
    "preprocess": "nothing to preprocess: records are encoded as they are read; `corefit pack` does it ahead of time",
    "dist_train": "`corefit launch -n GPUS ...` with what `corefit train` takes; on several machines: torchrun",
    "version": "`corefit --version`",
    "train --deepspeed": "leave it out; `--set run.sharding=full` divides the base among GPUs. For less memory on one: "
    "the quantizer nf4, train.optimizer=paged_adamw_32bit, a smaller pack.max_length",
    "train --launcher": _LAUNCH,
    "train --local_rank": _LAUNCH,
    "train --local-rank": _LAUNCH,
    "train --auto-scale-lr": "train.lr is the rate whatever the batch; --set train.lr=RATE",
    "log-dataset --show": "leave it out: the text is shown with supervised tokens marked; --json has the ids",
    "chat --adapter": "`corefit chat ADAPTER --model BASE`, or `corefit chat RUN`",
    "chat --llava": _IMAGES,
    "chat --visual-encoder": _IMAGES,
    "chat --image": _IMAGES,
    "chat --torch-dtype": "leave it out: fp16 or bf16 follows from the base and the device",
    "chat --prompt-template": "--template NAME; a run, and what `corefit safetensors --config` made, know their own",
    "chat --stop-words": _CHAT,
    "chat --system-template": "--system TEXT",
    "chat --bits": "--quantizer nf4 (4 bit) or --quantizer int8 (8 bit)",
    "chat --bot-name": "leave it out: it changed nothing but what was printed",
    "chat --with-plugins": "corefit runs no tools in a chat",
    "chat --lagent": "corefit runs no tools in a chat",
    "chat --no-streamer": "leave it out: answers are printed as they come",
    "chat --offload-folder": "leave it out: a base that is too large for the device fits with --quantizer nf4",
    "chat --max-new-tokens": "--max-tokens N",
}
"""Command, or command and flag -> the answer."""
