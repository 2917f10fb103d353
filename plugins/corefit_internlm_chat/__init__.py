"""The chat format of InternLM-Chat 7B and 20B."""

from __future__ import annotations

from collections.abc import Iterator

from corefit import PromptTemplate


def corefit_prompt_templates() -> Iterator[PromptTemplate]:
    """Yield ``internlm_chat``."""
    yield PromptTemplate.from_strings(
        name="internlm_chat",
        summary="InternLM-Chat: <|User|>:...<eoh> <|Bot|>:...<eoa>, one BOS",
        system="<|System|>:{content}\n",
        user="<|User|>:{content}<eoh>\n<|Bot|>:",
        assistant="<|Bot|>:",
        suffix="<eoa>",
        separator="\n",
        control=("<eoh>", "<eoa>"),
        bos="first",
        source="XTuner v0.1.23, PROMPT_TEMPLATE.internlm_chat",
    )
