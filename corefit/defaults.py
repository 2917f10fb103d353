"""corefit's own plugin: the jsonl reader, three quantizers, four schedulers, two reporters.

torch, transformers and numpy are imported by the functions that need them, when they are called.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from corefit.data.jsonl import fetch_jsonl, index_jsonl, read_jsonl
from corefit.page import reporter
from corefit.report import progress
from corefit.types import DatasetReader, Quantizer, Reporter, Scheduler


def corefit_dataset_readers() -> Iterable[DatasetReader]:
    """JSON lines, or one JSON list."""
    yield DatasetReader(
        name="jsonl",
        summary="JSON lines or one JSON list, also .gz",
        read=read_jsonl,
        seekable=True,
        index=index_jsonl,
        fetch=fetch_jsonl,
        bounded=True,
        example=b'{"question": "What is 1 + 1?", "answer": "2"}\n{"question": "And 2 + 2?", "answer": "4"}\n',
    )


def _nf4(compute_dtype: str) -> Any:  # noqa: ANN401, a transformers class that is imported here only
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def _int8(compute_dtype: str) -> Any:  # noqa: ANN401
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def corefit_quantizers() -> Iterable[Quantizer]:
    """As stored, 4-bit and 8-bit. Source: Dettmers et al., QLoRA (2305.14314) 3; LLM.int8() (2208.07339)."""
    yield Quantizer(name="none", summary="weights as they are stored", config=lambda compute_dtype: None)
    yield Quantizer(name="nf4", summary="4-bit NormalFloat, double quantisation (QLoRA)", config=_nf4)
    yield Quantizer(name="int8", summary="8-bit integers, outlier columns kept (LLM.int8)", config=_int8)


WSD_DECAY = 0.2
"""Share of the run that ``wsd`` decays in, at its end."""


def constant(progress: float, warmup: float) -> float:
    """Give the share of the peak rate: up in a straight line over ``warmup``, then 1.

    >>> [constant(progress, 0.5) for progress in (0.25, 0.75)]
    [0.5, 1.0]
    """
    return progress / warmup if progress < warmup else 1.0


def linear(progress: float, warmup: float) -> float:
    """Give the share of the peak rate: up over ``warmup``, then down in a straight line to 0 at the end.

    >>> [linear(progress, 0.5) for progress in (0.25, 0.75)]
    [0.5, 0.5]
    """
    return progress / warmup if progress <= warmup else (1 - progress) / (1 - warmup)


def cosine(progress: float, warmup: float) -> float:
    """Give the share of the peak rate: up over ``warmup``, then down half a cosine wave to 0 at the end.

    Source: Loshchilov and Hutter, SGDR (1608.03983) eq. 5, (1 + cos x) / 2, written as sin^2 because that form does not
    round to 0 before the end.

    >>> [round(cosine(progress, 0), 3) for progress in (0.25, 0.5, 0.75)]
    [0.854, 0.5, 0.146]
    """
    if progress <= warmup:
        return progress / warmup
    return math.sin(math.pi / 2 * (1 - progress) / (1 - warmup)) ** 2


def wsd(progress: float, warmup: float) -> float:
    """Give the share of the peak rate: up over ``warmup``, then 1, then straight down to 0 over the last fifth.

    Source: warm-up, stable, decay: Hu et al., MiniCPM (2404.06395) 4.3; straight decay over a fifth: Haegele et al.
    (2405.18392) 3. A warm-up longer than 0.8 runs into the decay: the smaller of the two counts.

    >>> [round(wsd(progress, 0.1), 3) for progress in (0.05, 0.5, 0.9)]
    [0.5, 1.0, 0.5]
    """
    return min(constant(progress, warmup), (1 - progress) / WSD_DECAY, 1.0)


def corefit_schedulers() -> Iterable[Scheduler]:
    """The four curves above."""
    yield Scheduler(name="constant", summary="the peak rate after the warm-up", factor=constant, decays=False)
    yield Scheduler(name="linear", summary="down in a straight line", factor=linear)
    yield Scheduler(name="cosine", summary="down half a cosine wave", factor=cosine)
    yield Scheduler(name="wsd", summary="the peak rate, then down over the last fifth", factor=wsd)


def corefit_reporters() -> Iterable[Reporter]:
    """The progress line and the page of a run."""
    yield Reporter(name="progress", summary="a bar on a terminal, else a line every few steps", open=progress)
    yield Reporter(name="report.html", summary="the run as a page, written while it goes on", open=reporter)
