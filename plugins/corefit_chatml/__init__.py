"""ChatML, the chat format of many models."""

from __future__ import annotations

from collections.abc import Iterator

from corefit import PromptTemplate


def corefit_prompt_templates() -> Iterator[PromptTemplate]:
    """Yield ``chatml``."""
    yield PromptTemplate.from_strings(
        name="chatml",
        summary="ChatML: <|im_start|>role, text, <|im_end|>; no BOS",
        system="<|im_start|>system\n{content}<|im_end|>\n",
        user="<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
        assistant="<|im_start|>assistant\n",
        suffix="<|im_end|>",
        separator="\n",
        control=("<|im_start|>", "<|im_end|>"),
        source="OpenAI's ChatML, as Qwen and InternLM2 write it",
    )
