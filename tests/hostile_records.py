"""Records that nobody should write and somebody will: the same for the same seed, none with a line break inside."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator

LIMIT = 100_000
"""Bytes of a record that the tests allow; a few are longer."""
CONTROL = [
    "<|im_start|>",
    "<|im_end|>",
    "<eoh>",
    "<eoa>",
    "<s>",
    "</s>",
    "<unk>",
    "<|User|>:",
    "<|Bot|>:",
    "<|System|>:",
]
MARKERS = ["### Human: ", "### Assistant: ", "### Human:", "### Assistant:", "#### Human: ", "```", "````py\n", "###"]
WORDS = [
    *(
        "word",
        "é",
        "你好",
        "🦜",
        "\U0010ffff",
        "\ufeff",
        "\u202e",
        "\u2028",
        "\0",
        "\x1b[2J",
        "\x7f",
        "\x85",
        " ",
        "\n",
    ),
    *("\t", "\\", '"', "'", "{{ 7*7 }}", "{% raise %}", "%s%n", "../..", "corefit0x", "", "<b>", ":i", "i", "a" * 300),
]
ODD_VALUES: list[Callable[[random.Random], object]] = [
    lambda r: None,
    lambda r: r.choice([True, False]),
    lambda r: r.choice([0, -1, 2**63, -(2**64), 10**300, 10**4000]),
    lambda r: r.choice([0.0, -0.0, 1e308, 5e-324, 1e999, -1e999]),
    lambda r: text(r),
    lambda r: [],
    lambda r: {},
    lambda r: [text(r), None, [], {}, 1],
    lambda r: {text(r): text(r), "role": None, "text": [], "content": {}},
    lambda r: nested(r.randrange(2, 60)),
    lambda r: [{}] * r.randrange(1, 20),
]


def text(r: random.Random) -> str:
    return "".join(r.choice(r.choice([CONTROL, MARKERS, WORDS, WORDS])) for _ in range(r.randrange(8)))


def nested(depth: int) -> object:
    value: object = 1
    for i in range(depth):
        value = [value] if i % 2 else {"replies": value}
    return value


# ------------------------------------------------------------------------------------------ records as they should be


def guanaco(r: random.Random) -> dict[str, object]:
    return {"text": "".join(f"### {('Human', 'Assistant')[k % 2]}: {text(r)}" for k in range(r.randrange(1, 7)))}


def node(r: random.Random, depth: int = 0) -> dict[str, object]:
    made: dict[str, object] = {
        "text": text(r),
        "role": ("prompter", "assistant")[depth % 2],
        "message_id": f"m{r.random()}",
    }
    if r.random() < 0.3:
        made["rank"] = r.choice([None, 0, 1, 2])
    if r.random() < 0.1:
        made[r.choice(["deleted", "review_result"])] = r.choice([True, False, None])
    made["replies"] = [node(r, depth + 1) for _ in range(r.choice([0, 1, 1, 2, 3]) if depth < 4 else 0)]
    return made


def tree(r: random.Random) -> dict[str, object]:
    return {"message_tree_id": f"t{r.random()}", "prompt": node(r), "tree_state": "ready_for_export"}


def messages(r: random.Random) -> dict[str, object]:
    said = [{"role": ("user", "assistant")[k % 2], "content": text(r)} for k in range(r.randrange(1, 7))]
    return {"messages": said, "language": "en"}


def flat() -> Callable[[random.Random], dict[str, object]]:
    """Give what makes messages of a flat file: whole threads, and ids that clash, lack a parent or run in circles."""
    said = [("first", "prompter")]

    def message(r: random.Random) -> dict[str, object]:
        parent, role = r.choice(said[-20:])
        name = r.choice(said)[0] if r.random() < 0.03 else f"m{len(said)}"
        if r.random() < 0.2:
            parent, role = r.choice(
                [(None, "assistant"), ("", "assistant"), ("nobody", "prompter"), (name, "prompter")]
            )
        said.append((name, "prompter" if role == "assistant" else "assistant"))
        return {"message_id": name, "parent_id": parent, "text": text(r) or "x", "role": said[-1][1]}

    return message


# -------------------------------------------------------------------------------------------------- what breaks them


def replace_somewhere(r: random.Random, value: object) -> object:
    """Put something odd in the place of a value, however deep it lies; sometimes take a key away, or add one."""
    if isinstance(value, dict) and value and r.random() < 0.85:
        key = r.choice(list(value))
        rest = {k: v for k, v in value.items() if k != key}
        return rest if r.random() < 0.1 else {**value, key: replace_somewhere(r, value[key])}
    if isinstance(value, list) and value and r.random() < 0.85:
        i = r.randrange(len(value))
        return [*value[:i], replace_somewhere(r, value[i]), *value[i + 1 :]]
    return r.choice(ODD_VALUES)(r)


def written(r: random.Random, record: object) -> bytes:
    return json.dumps(record, ensure_ascii=r.random() < 0.5).encode("utf-8", "surrogatepass")


def bytes_changed(r: random.Random, raw: bytes) -> bytes:
    at, odd = (
        r.randrange(len(raw) + 1),
        bytes([r.choice([0, 9, 13, 34, 44, 58, 91, 92, 93, 123, 125, 127, 128, 192, 255])]),
    )
    return r.choice(
        [raw[:at], raw[at:], raw[:at] + odd + raw[at:], raw[:at] + odd + raw[at + 1 :], raw[:at] + raw[at + 1 :]]
    )


ENCODINGS: list[Callable[[str], bytes]] = [
    lambda s: s.encode("utf-16"),
    lambda s: s.encode("utf-16-be"),
    lambda s: s.encode("utf-32"),
    lambda s: s.encode("latin-1", "replace"),
    lambda s: s.encode("cp1252", "replace"),
    lambda s: s.encode("gb18030"),
    lambda s: s.encode("utf-7"),
    lambda s: s.encode("utf-8-sig"),
    lambda s: s.encode().replace(b"e", b"\xc1\xa5"),  # overlong
    lambda s: s.encode().replace(b"e", b"\xe0\x81\xa5"),
    lambda s: s.encode().replace(b"e", b"\xed\xa0\xbd\xed\xb8\x80"),  # surrogates, as Java writes them
    lambda s: s.encode().replace(b"e", b"\xf4\x90\x80\x80"),  # beyond the last character
]
NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "-0", "01", "+1", ".5", "1.", "0x10", "1_000",
           "9" * 4300, "9" * 4301, "-" + "9" * 4301, "1" + "0" * 5000 + ".5", "٣", "nan", "null", "tru"]  # fmt: skip
SURROGATES = [
    r"\ud83d",
    r"\ude00",
    r"\ude00\ud83d",
    r"\ud83d\ud83d\ude00",
    r"\ud83d\ude00",
    r"\\ud83d",
    r"\uDFFF",
    r"\u12",
    r"\x41",
]
TOP = [
    *(
        b"null",
        b"true",
        b"12",
        b'"text"',
        b"{}",
        b"[]",
        b"[{}]",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b'"',
        b"\\",
        b"//",
    ),
    *(b"#", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xef\xbb\xbf{}", b"\x1f\x8b\x08", b"PK\x03\x04", b"\x80\x04\x95"),
    *(b"{}{}", b"{} {}", b"{'text': 'x'}", b'{"text": "x",}', b'{"text" "x"}', b'{"text": "a\tb"}', b"{1: 2}", b"a,b"),
]


def hostile(seed: int, n: int, valid: Callable[[random.Random], dict[str, object]] | None = None) -> Iterator[bytes]:
    """Give ``n`` lines without their ends, about two in five of them good records, and blank ones beside these.

    ``valid`` makes a record that is then broken; None: of all formats but flat messages.
    """
    r = random.Random(seed)
    for number in range(n):
        record = (valid or r.choice([guanaco, tree, messages]))(r)
        raw = written(r, record)
        kind = r.randrange(20)
        if kind < 5:
            pass
        elif kind < 11:
            for _ in range(r.randrange(1, 4)):
                record = replace_somewhere(r, record)
            raw = written(r, record)
        elif kind < 13:
            raw = raw[: number % (len(raw) + 1)]
        elif kind == 13:
            for _ in range(r.randrange(1, 4)):
                raw = bytes_changed(r, raw)
        elif kind == 14:
            raw = r.choice(ENCODINGS)(raw.decode("utf-8", "replace"))
        elif kind == 15:
            raw = json.dumps({**record, "x": "HERE"}).replace('"HERE"', r.choice(NUMBERS)).encode()
        elif kind == 16:
            raw = json.dumps(record).replace("e", r.choice(SURROGATES), r.choice([1, -1])).encode()
        elif kind == 17:
            depth = r.choice([10, 400, 498, 499, 500, 501, 1000, 20_000])
            inside, key = (
                r.choice([("[", "]"), ('{"replies":[', "]}"), ('{"a":', "}")]),
                r.choice(["text", "prompt", "x"]),
            )
            raw = f'{{"{key}": {inside[0] * depth}1{inside[1] * depth}}}'.encode()
        elif kind == 18:
            raw = r.choice(TOP) if r.random() < 0.7 else bytes(r.randrange(256) for _ in range(r.randrange(40)))
        else:
            half = raw[1:-1]
            raw = r.choice([
                b"{" + half + b"," + half + b"}", raw + raw, raw + b" \x00", b" \t" + raw + b"\r", raw + b"\r",
                b'{"text": "' + b"x" * r.choice([LIMIT - 12, LIMIT + 1]) + b'"}', b" \t ", b"", b"\r", b"\x0b\x0c",
            ])  # fmt: skip
        yield raw.replace(b"\n", b" ")
