"""What XTuner writes and trains on, followed by hand from its strings: the reference for its templates.

Source: ``template_map_fn`` and ``encode_fn`` of InternLM/xtuner at v0.1.23 and v0.1.9, but for images and truncation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

Turn = tuple[str, str, str]
"""System text (or empty), question, answer."""


def strings_of(shared: Path) -> dict[str, dict[str, object]]:
    """Give corefit's name -> XTuner's strings."""
    known = json.loads((shared / "reference/xtuner_templates.json").read_text(encoding="utf-8"))
    now, then = (known[f"xtuner_{tag}"]["PROMPT_TEMPLATE"] for tag in ("v0.1.23", "v0.1.9"))
    return now | {f"{name}@0.1.9": strings for name, strings in then.items()}


START = {"qwen_chat": (), "chatglm2": ("[gMASK]", "sop"), "chatglm3": ("[gMASK]", "sop")}
"""What stands where BOS is due, if it isn't BOS: by the class of the tokenizer that the format was made for."""


def written(
    name: str, strings: dict[str, object], turns: Sequence[Turn], *, bos: str, eos: str
) -> Iterator[tuple[str, bool]]:
    """Yield (text, is it trained on), in the pieces in which XTuner encodes it."""
    start = [(token, False) for token in START.get(name.removesuffix("@0.1.9"), (bos,))]
    if name.endswith("@0.1.9"):
        for i, (system, question, answer) in enumerate(turns):
            text = str(strings["INSTRUCTION"]).format(input=question, round=i + 1)
            yield from start
            yield (str(strings["SYSTEM"]).format(system=system) if system else "") + text, False
            yield answer, True
            yield eos, True
        return
    next_needs_bos = True
    for i, (system, question, answer) in enumerate(turns):
        text = str(strings["INSTRUCTION"]).format(input=question, round=i + 1)
        if system:
            text = str(strings["SYSTEM"]).format(system=system) + text
        if next_needs_bos:
            yield from start
        yield text, False
        yield answer + str(strings.get("SUFFIX", "")), True
        next_needs_bos = not strings.get("SUFFIX_AS_EOS", False)
        if next_needs_bos:
            yield eos, True
        yield str(strings.get("SEP", "")), False


class Encoder:
    """Ids and labels by sentencepiece, with further tokens as transformers cuts them out of a text."""

    def __init__(self, model: Path, added: dict[str, int]) -> None:
        import sentencepiece

        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        self.added = added
        cut_out = {re.escape(token) for token in added} - {re.escape(token) for token in START["chatglm2"]}
        self.pattern = re.compile("(" + "|".join(sorted(cut_out, key=len, reverse=True)) + ")")
        self.known: dict[str, list[int]] = {token: [id] for token, id in added.items()}

    def ids(self, text: str) -> list[int]:
        if text not in self.known:
            parts = [part for part in self.pattern.split(text) if part]
            found = [[self.added[part]] if part in self.added else self.processor.encode(part) for part in parts]
            self.known[text] = [id for part in found for id in part]
        return self.known[text]

    def encode(self, pieces: Iterator[tuple[str, bool]]) -> tuple[list[int], list[int]]:
        """Give ids and labels (of the same position)."""
        ids: list[int] = []
        labels: list[int] = []
        for text, trained in pieces:
            made = self.ids(text) if text else []
            ids += made
            labels += made if trained else [-100] * len(made)
        return ids, labels


# ------------------------------------------------------------------------------------------------- the map functions

JOINED = {"alpaca": ("instruction", "input"), "medical": ("instruction", "input"), "sql": ("context", "question")}
JOINED["alpaca@0.1.9"] = JOINED["alpaca"]
ONE = {
    "arxiv": ("abstract", "title"),
    "code_alpaca": ("prompt", "completion"),
    "crime_kg_assitan": ("input", "output"),
    "default": ("input", "output"),
    "law_reference": ("question", "answer"),
    "openorca": ("question", "response"),
    "stack_exchange": ("question", "response"),
    "tiny_codes": ("prompt", "response"),
}
SYSTEM_OF = {
    "alpaca@0.1.9": "alpaca",
    "arxiv": "arxiv_gentile",
    "code_alpaca": "coder",
    "colors": "colorist",
    "crime_kg_assitan": "lawyer",
    "law_reference": "lawyer",
    "medical": "medical",
    "sql": "sql",
    "tiny_codes": "coder",
}


def system_texts(shared: Path) -> dict[str, str]:
    """Give XTuner's SYSTEM_TEMPLATE."""
    known = json.loads((shared / "reference/xtuner_templates.json").read_text(encoding="utf-8"))
    return known["xtuner_v0.1.23"]["SYSTEM_TEMPLATE"]


def mapped(name: str, row: dict[str, str], systems: dict[str, str]) -> list[Turn]:
    """Give what XTuner's map function makes of a row of text, its mistakes included. Source: ``dataset_map_fns``."""
    system = systems[SYSTEM_OF[name]] if name in SYSTEM_OF else ""
    if name in JOINED:
        first, second = JOINED[name]
        answer = row["answer" if name == "sql" else "output"]
        dropped = name.startswith("alpaca") and answer == "<nooutput>"
        return [] if dropped else [(system, f"{row[first]}\n{row[second]}", answer)]
    if name == "alpaca_zh":
        return [("", f"{row['instruction_zh']}\n{row['input_zh']}", row["output_zh"])]
    if name == "colors":
        return [(system, ":".join(row["description"].split(":")[1:]).strip(), row["color"])]
    question, answer = ONE[name]
    return [(row["system_prompt"] if name == "openorca" else system, row[question], row[answer])]


def oasst1_turns(text: str) -> list[Turn]:
    """Give what XTuner's oasst1_map_fn makes of a guanaco row: split at every ``###``, paired by position."""
    said = []
    for piece in text.strip().split("###"):
        for role in ("Human:", "Assistant:"):
            if piece.strip().startswith(role):
                said.append(piece.strip().removeprefix(role).strip())
    said = said[: len(said) - len(said) % 2]
    return [("", question, answer) for question, answer in zip(said[::2], said[1::2], strict=True)]
