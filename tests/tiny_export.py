"""A LoRA adapter whose effect shows, on a tiny base, and what an export is told about it."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import CONTROL
from transformers import AutoModelForCausalLM

from corefit.data.tokenizer import Tokenizer
from corefit.engine.adapter import AdapterSpec, attach_adapter
from corefit.engine.export import Provenance
from corefit.engine.model import model_fingerprint

IDS = torch.randint(10, 500, (1, 40), generator=torch.Generator().manual_seed(3))
JINJA = "{{ bos_token }}{% for m in messages %}{{ m['content'] + '<eoa>' }}{% endfor %}"


def load(folder: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def facts(base: Path, *, jinja: str | None = JINJA, **more: str) -> Provenance:
    return Provenance(
        base=str(base),
        base_folder=base,
        fingerprint=model_fingerprint(str(base)),
        tokenizer_files=Tokenizer.load(base).files(),
        template="internlm_chat",
        chat_template=jinja,
        stop=("<eoa>",),
        stop_ids=(3 + CONTROL.index("<eoa>"),),
        supervise="last",
        **{"quantizer": "nf4", **more},
    )


def adapted(base: Path, **spec):
    model = attach_adapter(load(base), AdapterSpec(**{"r": 4, "alpha": 8, "dropout": 0.0, **spec}), seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.1)
    return model.eval()
