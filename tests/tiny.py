"""Makers of tiny models and tokenizers, written as Hugging Face folders on the spot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

CONTROL = ["<|im_start|>", "<|im_end|>", "<eoh>", "<eoa>"]
SIZE: dict[str, object] = dict(
    vocab_size=512,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    bos_token_id=1,
    eos_token_id=2,
)
"""Keys of config.json that all tiny models have."""
CHATML_JINJA = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tokenizer(
    folder: Path, *, texts: list[str] | None = None, vocab_size: int = 512, control: Sequence[str] = CONTROL
) -> Path:
    """Write a byte-level BPE tokenizer folder; its control tokens are InternLM's and ChatML's where none are named."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    specials = ["<unk>", "<s>", "</s>", *control]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(s, special=True, normalized=False) for s in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(
        texts or ["the quick brown fox jumps over the lazy dog. " * 3, "What is the capital of France? Paris."], trainer
    )
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "chat_template": CHATML_JINJA,
                "model_max_length": 2048,
            }
        ),
        encoding="utf-8",
    )
    return folder


def write_model(folder: Path, *, kind: str = "llama", dtype: str = "float32", seed: int = 0, **changes: object) -> Path:
    """Write a tiny random model folder with its tokenizer. ``kind``: llama, llama_bias, qwen2 or qwen3."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    write_tokenizer(folder)
    size = dict(SIZE, intermediate_size=128, tie_word_embeddings=False)
    classes = {
        "llama": (LlamaConfig, LlamaForCausalLM, {}),
        "llama_bias": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "num_key_value_heads": 4}),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    }
    config_class, model_class, more = classes[kind]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**size, **more, **changes}))
    with torch.no_grad():  # larger than the usual initialisation, so that a mistake shows in the logits
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder
