"""What is written is read back: arbitrary TOML tables, arbitrary recipes; a key's line is the line it stands on."""

from __future__ import annotations

import dataclasses
import datetime
import tomllib
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from corefit.recipe import (
    Adapter,
    Checkpoint,
    Data,
    Model,
    Pack,
    Recipe,
    RunSettings,
    Sampling,
    Template,
    Train,
    Val,
    apply_overrides,
    parse_recipe,
    to_toml,
    toml_dumps,
)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
names = text.filter(bool)
scalars = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    text,
    st.dates(),
    st.times(),
    st.datetimes(),
    st.datetimes(timezones=st.just(datetime.timezone(datetime.timedelta(hours=-5, minutes=-30)))),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
tables = st.dictionaries(text, values, max_size=5)


@settings(max_examples=300)
@given(tables)
def test_any_table_is_read_back(table):
    assert tomllib.loads(toml_dumps(table)) == table


counts = st.integers(1, 10**9)
positive = st.floats(1e-300, 1e300)
shares = st.floats(0, 1, exclude_max=True)
paths = st.just("-") | text.map(lambda name: "/d/" + name.replace("/", "_").replace(".", "_") + "x")
lists = st.lists(names, max_size=2).map(tuple)


def maybe(strategy):
    return st.none() | strategy


recipes = st.builds(
    Recipe,
    model=st.builds(
        Model,
        base=maybe(paths.filter(lambda path: path != "-")),
        quantizer=st.just("none"),
        trust_remote_code=st.booleans(),
    ),
    adapter=st.builds(
        Adapter, kind=st.sampled_from(["lora", "none"]), r=st.integers(1, 2**16), alpha=counts,
        dropout=shares, targets=lists, modules_to_save=lists,
    ),
    data=st.lists(
        st.builds(
            Data,
            path=maybe(paths | st.lists(paths, max_size=2).map(tuple)),
            map=maybe(names),
            reader=maybe(names),
            shuffle=st.booleans(),
            ratio=maybe(positive),
            repeat=counts,
            first=maybe(counts),
            on_bad=st.sampled_from(["error", "skip"]),
            max_record_mb=st.integers(1, 2**20),
            options=tables,
        ),
        min_size=1,
        max_size=2,
    ).map(tuple),
    template=st.builds(
        Template, name=maybe(names), supervise=st.sampled_from(["all", "last", "unroll"]), options=tables
    ),
    pack=st.builds(
        Pack,
        max_length=st.integers(8, 10**6),
        algorithm=st.sampled_from(["first_fit", "first_fit_decreasing", "best_fit_decreasing"]),
        held=counts,
        overlong=st.sampled_from(["error", "drop", "truncate", "split"]),
    ),
    train=st.builds(
        Train,
        epochs=counts,
        max_steps=maybe(counts),
        packs_per_step=counts,
        precision=st.sampled_from(["auto", "fp16", "bf16", "fp32"]),
        lr=positive,
        scheduler=names,
        warmup=st.floats(0, 1),
        weight_decay=shares,
        betas=st.tuples(shares, shares),
        clip=positive,
        gradient_checkpointing=st.sampled_from(["auto", True, False]),
        seed=st.integers(0, 2**63 - 1),
    ),
    val=st.builds(
        Val, data=maybe(paths), share=shares, records=counts, every_steps=maybe(counts), patience=maybe(counts)
    ),
    sample=st.builds(Sampling, prompts=lists, every_steps=maybe(counts), max_tokens=counts),
    checkpoint=st.builds(Checkpoint, every_steps=st.integers(0, 99), every_minutes=maybe(positive), keep=counts),
    run=st.builds(RunSettings, out=maybe(paths), threads=maybe(st.integers(1, 1024)), device=names),
)  # fmt: skip


@settings(max_examples=100)
@given(recipes)
def test_any_recipe_is_read_back(recipe):
    again = parse_recipe(to_toml(recipe), name="r", base=Path("/elsewhere"))
    assert again == recipe
    assert to_toml(again) == to_toml(recipe)


@settings(max_examples=100)
@given(recipes)
def test_a_key_s_line_is_where_it_stands(recipe):
    written = to_toml(recipe)
    lines = written.split("\n")
    again = parse_recipe(written, name="r", base=Path("/"))
    assert {"train.lr", "pack.held", "data.0.shuffle"} <= set(again.origins)
    for key, place in again.origins.items():
        if ".options" not in key:
            assert lines[int(place.split(":")[1]) - 1].startswith(f"{key.rpartition('.')[2]} = ")


@settings(max_examples=60)
@given(names.filter(lambda name: name.strip()))
def test_any_text_can_be_set(name):
    quoted = toml_dumps({"x": name}).removeprefix("x = ").removesuffix("\n")
    recipe = apply_overrides(Recipe(), {"plugin": name}, [f"template.name={quoted}"])
    assert recipe.data[0].map == name and recipe.template.name == name
    assert dataclasses.replace(recipe, template=Template(), data=(Data(),)) == Recipe()
