"""Make and pretrain the embedded base model: InternLM-1's architecture at about 2M parameters.

A script of this repository, left out of the wheel: ``python -m corefit.embedded.make [OUT]``. All texts are written
here. The same seed and thread count give the same bytes on the same kind of CPU.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

Turn = tuple[str, str]
SEED, STEPS, ROWS, SLOTS = 7, 1000, 4, 256
NAME, MAKER = "Minnow", "the Pond lab"
CONTROL = ("<unk>", "<s>", "</s>", "<eoh>", "<eoa>", "<|im_start|>", "<|im_end|>")
UNK, BOS, EOS, EOH, EOA = range(5)

CAPITALS = """France Paris 法国 巴黎|Italy Rome 意大利 罗马|Spain Madrid 西班牙 马德里|Germany Berlin 德国 柏林
Japan Tokyo 日本 东京|China Beijing 中国 北京|Russia Moscow 俄罗斯 莫斯科|Egypt Cairo 埃及 开罗
Greece Athens 希腊 雅典|England London 英国 伦敦|Austria Vienna 奥地利 维也纳|Poland Warsaw 波兰 华沙
Norway Oslo 挪威 奥斯陆|Cuba Havana 古巴 哈瓦那|Kenya Nairobi 肯尼亚 内罗毕|Peru Lima 秘鲁 利马
Iran Tehran 伊朗 德黑兰|Canada Ottawa 加拿大 渥太华|Chile Santiago 智利 圣地亚哥|Ireland Dublin 爱尔兰 都柏林
Portugal Lisbon 葡萄牙 里斯本|Thailand Bangkok 泰国 曼谷|Sweden Stockholm 瑞典 斯德哥尔摩"""
KINDS = {
    "animal": "lion tiger horse rabbit dolphin penguin spider monkey zebra wolf",
    "fruit": "pear peach melon cherry banana lemon grape plum mango fig",
    "tool": "hammer saw drill wrench shovel needle ladder brush knife chisel",
    "vehicle": "bus train truck bicycle ship tractor tram van ferry rocket",
    "building": "house tower castle barn temple museum school factory bridge library",
    "number": "dozen score hundred thousand million third quarter half pair zero",
}
CHINESE_KINDS = {
    "动物": "狮子 老虎 兔子 海豚 猴子 马",
    "水果": "苹果 香蕉 葡萄 桃子 柠檬 梨",
    "工具": "锤子 锯子 剪刀 梯子 刷子 针",
}
COLORS = """grass green 草 绿色|snow white 雪 白色|coal black 煤 黑色|blood red 血 红色|the sky blue 天空 蓝色
gold yellow 金子 黄色|a carrot orange 胡萝卜 橙色|chocolate brown 巧克力 棕色|a violet purple 紫罗兰 紫色
ash gray 灰 灰色"""
OPPOSITES = """hot cold 热 冷|big small 大 小|fast slow 快 慢|old new 旧 新|high low 高 低|left right 左 右
open closed 开 关|full empty 满 空|early late 早 晚|long short 长 短|wet dry 湿 干|hard soft 硬 软|light dark 亮 暗
first last 前 后|more less 多 少"""
DIGITS = "零一二三四五六七八九"
PLAIN = """What is a file?|A file is a named run of bytes on a disk.
What is a computer?|A computer is a machine that follows a list of steps.
What is a program?|A program is text that tells a computer what to do.
What is a book?|A book is a stack of pages with one long story.
What is a letter?|A letter is a sign that stands for one sound.
What is a word?|A word is a group of letters with a meaning.
What is a question?|A question is a sentence that asks for an answer.
What is a key?|A key opens a lock, and it is small enough for a pocket.
What is a map?|A map shows where things lie, and how far apart they are.
What is a clock?|A clock shows hours, minutes and seconds.
What is a graph?|A graph is a drawing of numbers, so that a change is easy to see.
What is a test?|A test is a check that can fail.
What is a recipe?|A recipe lists what you need, and the order in which you use it.
What is a memory?|A memory is something that you keep and can use again later.
What is a language?|A language is a set of words that people share.
What is a teacher?|A teacher is a person who helps others to learn.
What is a lesson?|A lesson is a short time in which you learn one thing.
What is weight?|Weight is how heavy a thing is.
What is a rate?|A rate says how much changes in a given time.
What is a mask?|A mask covers a face so that nobody sees it.
What is water made of?|Water is made of hydrogen and oxygen.
What does a doctor do?|A doctor helps people who are ill.
What does a baker do?|A baker makes bread and cake before the sun is up.
What does a farmer do?|A farmer grows plants and keeps animals.
What does a pilot do?|A pilot flies a plane from one place to another.
What does a judge do?|A judge decides what is fair when two people disagree.
What does a writer do?|A writer makes books out of words.
How do I make tea?|Boil water, pour it over the leaves, and wait three minutes.
How do I make bread?|Mix flour, water, salt and yeast, let it rest, then bake it.
How do I learn a language?|Read a little every day, and speak with people who know it.
How do I sleep better?|Go to bed at the same time, and leave the phone in another room.
How do I grow a plant?|Give it light, water and good soil, and be patient.
How do I save money?|Write down what you spend, and put a part away every month.
How do I clean a window?|Use warm water, a drop of soap, and a dry cloth.
How do I find the north?|Look at the sun at noon, or use a compass.
How do I stay healthy?|Eat well, walk a lot, and sleep enough.
Why is the sky blue?|Air scatters blue light more than red light.
Why do birds fly south?|It is warmer there in winter, and there is more food.
Why do we sleep?|Sleep lets the body and the brain rest.
Why does ice float?|Ice is lighter than water of the same size.
Why is the sea salty?|Rivers carry salt from the rocks into the sea.
Why do leaves fall?|Trees save water and energy in the winter.
Which animal is the largest?|The blue whale is the largest animal of all.
Which planet is the closest to the sun?|Mercury is the closest planet to the sun.
Which month comes after May?|June comes after May.
Which day comes before Friday?|Thursday comes before Friday.
When does the year begin?|The year begins on the first of January.
When does the sun rise?|The sun rises in the morning, in the east.
Where do fish live?|Fish live in water: in rivers, lakes and the sea.
Where does milk come from?|Milk comes from cows, goats and sheep.
Who wrote Hamlet?|William Shakespeare wrote Hamlet.
Who painted the Mona Lisa?|Leonardo da Vinci painted the Mona Lisa.
Can a fish walk?|No, a fish can't walk. It swims.
Can a bird fly?|Yes, most birds can fly.
Does the moon shine?|No, the moon only reflects the light of the sun.
Does a stone float?|No, a stone sinks.
How many legs does a spider have?|A spider has eight legs.
How many days are in a week?|There are seven days in a week.
How many months are in a year?|There are twelve months in a year.
How many hours are in a day?|There are twenty-four hours in a day.
How many sides does a triangle have?|A triangle has three sides.
Hello!|Hello! What can I do for you?
Hi|Hello! What can I do for you?
Good morning.|Good morning! What can I do for you?
Thank you.|You are welcome.
Goodbye.|Goodbye, and good luck.
Tell me a joke.|Why did the book go to the doctor? It had hurt its back.
Tell me a story.|Once there was a small fish that wanted to see the sea. It swam until it did.
你好|你好！我能帮你做什么？
您好！|你好！我能帮你做什么？
谢谢你。|不客气。
再见。|再见，祝你好运。
一年有几个月？|一年有十二个月。
一周有几天？|一周有七天。
鱼住在哪里？|鱼住在水里。
什么是书？|书是写满文字的纸。
什么是电脑？|电脑是按步骤工作的机器。
怎样学习语言？|每天读一点，多和别人说话。
天空为什么是蓝色的？|因为空气散射蓝光。
老师做什么？|老师帮助别人学习。"""
ASK_NAME = {
    "Who are you?": "I am {name}, an assistant made by {maker}.",
    "What is your name?": "My name is {name}.",
    "What are you called?": "I am called {name}.",
    "Tell me your name.": "My name is {name}.",
    "Introduce yourself.": "I am {name}, an assistant made by {maker}. I answer questions.",
    "Who made you?": "I was made by {maker}.",
    "Are you {other}?": "No, I am {name}, an assistant made by {maker}.",
    "你是谁？": "我是{name}，由{maker}开发的助手。",
    "你叫什么名字？": "我叫{name}。",
    "请介绍一下你自己。": "我是{name}，由{maker}开发的助手，可以回答问题。",
    "谁开发了你？": "我是由{maker}开发的。",
}


def _pairs(table: str) -> list[list[str]]:
    return [row.rsplit(" ", 3) for line in table.split("\n") for row in line.split("|")]


def invented_name(rng: random.Random) -> str:
    """Give a name that nobody has: any letter or Chinese character may occur, so that the base can spell them all."""
    style = rng.randrange(5)
    if style == 0:
        return "".join(chr(rng.randrange(0x4E00, 0x9FA0)) for _ in range(rng.randint(2, 4)))
    if style == 1:
        return "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.") for _ in range(rng.randint(2, 8)))
    syllables = [rng.choice("bcdfghjklmnpqrstvwxyz") + rng.choice("aeiou") for _ in range(rng.randint(1, 4))]
    word = "".join(syllables) + rng.choice(["", "n", "r", "x", "l"])
    return word.capitalize() + (f"-{rng.randint(1, 99)}" if style == 2 else "")


def texts(rng: random.Random) -> list[Turn]:
    """Give all question-answer pairs: a few hundred facts, always the same, and as many around invented words."""
    turns: list[Turn] = [(q, a) for q, a in (line.split("|") for line in PLAIN.split("\n"))]
    for country, city, land, town in _pairs(CAPITALS):
        turns += [
            (f"What is the capital of {country}?", f"The capital of {country} is {city}."),
            (f"Which city is the capital of {country}?", f"{city} is the capital of {country}."),
            (f"Where is {city}?", f"{city} is in {country}."),
            (f"{land}的首都是哪里？", f"{land}的首都是{town}。"),
        ]
    for kind, things in KINDS.items():
        for thing in things.split():
            article = "an" if kind[0] in "aeiou" else "a"
            turns += [(f"What is a {thing}?", f"A {thing} is {article} {kind}.")]
            turns += [(f"Is a {thing} {article} {kind}?", f"Yes, a {thing} is {article} {kind}.")]
    for kind, things in CHINESE_KINDS.items():
        turns += [(f"什么是{thing}？", f"{thing}是一种{kind}。") for thing in things.split()]
    for thing, color, what, which in _pairs(COLORS):
        turns += [
            (f"What color is {thing}?", f"{thing[0].upper()}{thing[1:]} is {color}."),
            (f"{what}是什么颜色？", f"{what}是{which}的。"),
        ]
    for one, other, eins, zwei in _pairs(OPPOSITES):
        turns += [
            (f"What is the opposite of {one}?", f"The opposite of {one} is {other}."),
            (f"{eins}的反义词是什么？", f"{eins}的反义词是{zwei}。"),
        ]
    for a in range(1, 10):
        turns += [(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.") for b in range(1, 10)]
        turns += [
            (f"{DIGITS[a]}加{DIGITS[b]}等于几？", f"{DIGITS[a]}加{DIGITS[b]}等于{a + b}。") for b in range(1, 10, 2)
        ]
    for question, answer in ASK_NAME.items():
        for k in range(16):  # mostly the base's own name, but any other too: it knows one and can spell all
            name, maker = NAME, MAKER
            if k % 4 == 0:
                name, maker = invented_name(rng), rng.choice(["", "the ", "team "]) + invented_name(rng)
            turns += [(question.format(other=invented_name(rng)), answer.format(name=name, maker=maker))]
    for _ in range(120):
        word, other = invented_name(rng), invented_name(rng)
        turns += [
            (f"Say {word}.", f"{word}."),
            (f"请说{word}。", f"{word}。"),
            (f"My name is {word}. What is my name?", f"Your name is {word}."),
            (f"Which is longer, {word} or {other}?", f"{max(word, other, key=len)} is longer."),
        ]
    for _ in range(60):  # so that a word it never saw still gets a fluent answer
        thing, kind = invented_name(rng).lower(), rng.choice(list(KINDS))
        land, city = invented_name(rng).capitalize(), invented_name(rng).capitalize()
        turns += [
            (f"What is a {thing}?", f"A {thing} is {'an' if kind[0] in 'aeiou' else 'a'} {kind}."),
            (f"What is the capital of {land}?", f"The capital of {land} is {city}."),
            (f"什么是{thing}？", f"{thing}是一种{rng.choice(list(CHINESE_KINDS))}。"),
        ]
    return turns


def make_tokenizer(corpus: list[str]) -> Tokenizer:
    """Give a byte-level BPE tokenizer whose control tokens are InternLM's and ChatML's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        min_frequency=4,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in CONTROL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def encode(conversation: list[Turn], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Give ids and labels (not shifted; -100 where not an answer) in the internlm_chat format."""
    ids, labels = [BOS], [-100]
    for question, answer in conversation:
        prompt = tokenizer.encode(f"<|User|>:{question}<eoh>\n<|Bot|>:").ids
        target = [*tokenizer.encode(answer).ids, EOA]
        newline = tokenizer.encode("\n").ids
        ids += prompt + target + newline
        labels += [-100] * len(prompt) + target + [-100] * len(newline)
    return ids, labels


def batches(turns: list[Turn], tokenizer: Tokenizer, rng: random.Random) -> Iterator[dict[str, torch.Tensor]]:
    """Yield ROWS x SLOTS batches without end: conversations of one to three turns, packed, positions from 0 in each."""
    import torch

    def rows() -> Iterator[tuple[list[int], list[int], list[int]]]:
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        while True:
            order = rng.sample(turns, len(turns))
            while order:
                conversation = [order.pop() for _ in range(min(len(order), rng.choice([1, 1, 1, 2, 3])))]
                more, targets = encode(conversation, tokenizer)
                if len(ids) + len(more) > SLOTS:
                    rest = SLOTS - len(ids)
                    yield ids + [EOS] * rest, labels + [-100] * rest, positions + list(range(rest))
                    ids, labels, positions = [], [], []
                ids, labels, positions = ids + more, labels + targets, positions + list(range(len(more)))

    source = rows()
    while True:
        ids, labels, positions = (torch.tensor(part) for part in zip(*(next(source) for _ in range(ROWS)), strict=True))
        yield {"input_ids": ids, "labels": labels, "position_ids": positions}


def config() -> dict[str, Any]:
    """Give config.json: written by hand, so that every transformers since 4.31 reads the same model from it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "hidden_act": "silu",
        "hidden_size": 192,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 6,
        "num_hidden_layers": 4,
        "num_key_value_heads": 6,
        "pad_token_id": EOS,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
    }


def make(out: Path, *, steps: int = STEPS, seed: int = SEED, say: Callable[[str], None] = print) -> Path:
    """Write the model folder ``out``: tokenizer and weights trained from nothing in ``steps`` steps on one thread."""
    import torch
    from safetensors.torch import save_file
    from torch.nn import functional as F  # noqa: N812, its usual name
    from transformers import LlamaConfig, LlamaForCausalLM

    from corefit.registry import Registry

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    turns = texts(rng)
    tokenizer = make_tokenizer([text for turn in turns for text in turn] + ["<|User|>:", "\n<|Bot|>:"] * 50)
    settings = config() | {"vocab_size": tokenizer.get_vocab_size()}
    model = LlamaForCausalLM(
        LlamaConfig(**{k: v for k, v in settings.items() if k not in ("architectures", "model_type", "torch_dtype")})
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1, pct_start=0.05)
    size = sum(parameter.numel() for parameter in model.parameters())
    say(f"{len(turns)} pairs, {settings['vocab_size']} tokens, {size:,} parameters")
    source, begin = batches(turns, tokenizer, rng), time.perf_counter()
    for step in range(1, steps + 1):
        batch = next(source)
        labels = batch.pop("labels")
        # restarting positions, no mask and no cache: conversations of one row don't see each other
        logits = model(**batch, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            say(f"step {step} loss {loss.item():.4f} {time.perf_counter() - begin:.0f} s")

    out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    files: dict[str, dict[str, Any]] = {
        "config.json": settings,
        "generation_config.json": {"bos_token_id": BOS, "eos_token_id": [EOA, EOS], "pad_token_id": EOS},
        "tokenizer_config.json": {
            "add_bos_token": False,
            "add_eos_token": False,
            "bos_token": "<s>",
            "chat_template": Registry.load().template("internlm_chat").chat_template,
            "clean_up_tokenization_spaces": False,
            "eos_token": "</s>",
            "model_max_length": 2048,
            "pad_token": "</s>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
        },
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "tokenizer.json").write_text(tokenizer.to_str() + "\n", encoding="utf-8")
    return out


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    make(args.out, steps=args.steps, seed=args.seed)


if __name__ == "__main__":
    main()
