"""Documents drawn at random, written out here line by line, against PyYAML and against what was drawn."""

import random

import pytest
import yaml

from cdistill.data.strict_yaml import dump, load, switch

LEAVES = (1, 0, -7, 2.5, True, False, None, "word", "two words", "")


def draw(rng, depth=0):
    """A mapping of mappings, lists and leaves."""
    kinds = ["leaf"] * 3 + (["mapping", "list"] if depth < 3 else [])
    result = {}
    for i in range(rng.randint(1, 4)):
        kind = rng.choice(kinds)
        leaf, below = rng.choice(LEAVES), draw(rng, depth + 1) if kind != "leaf" else None
        result[f"k{depth}{i}"] = {"leaf": leaf, "mapping": below, "list": [leaf, below]}[kind]
    return result


def lines_of(values, path="", indent=0):
    """(line, path of the mapping it is in, its key), one key a line; lists are written in one line."""
    for key, value in values.items():
        start = " " * indent + f"{key}:"
        if isinstance(value, dict):
            yield start, path, key
            yield from lines_of(value, f"{path}{key}.", indent + 2)
        else:
            text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
            yield f"{start} {text}", path, key


@pytest.mark.parametrize("seed", range(20))
def test_a_key_that_stands_twice_is_refused_wherever_it_is(seed):
    rng = random.Random(seed)
    values = draw(rng)
    lines = list(lines_of(values))
    text = "\n".join(line for line, _, _ in lines)
    assert load(text, "f.yaml") == values == yaml.safe_load(text)
    at = rng.randrange(len(lines))
    line, path, key = lines[at]
    indent = len(line) - len(line.lstrip())
    end = at + 1  # behind all that stands below the key
    while end < len(lines) and len(lines[end][0]) - len(lines[end][0].lstrip()) > indent:
        end += 1
    written = rng.choice([key, f'"{key}"', f"'{key}'"])
    doubled = [line for line, _, _ in lines]
    doubled.insert(end, f"{' ' * indent}{written}: {rng.choice(['1', '{a: 1}', '[]'])}")
    with pytest.raises(ValueError) as error:
        load("\n".join(doubled), "f.yaml")
    expected = f"f.yaml, line {end + 1}: {path}{key} is given twice (first in line {at + 1}): leave one of them out"
    assert str(error.value) == expected


def containers(value):
    yield id(value)
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, dict | list):
            yield from containers(item)


@pytest.mark.parametrize("seed", range(10))
def test_aliases_and_merge_keys_give_values_of_their_own(seed):
    rng = random.Random(seed)
    a, b, own = (draw(rng) for _ in range(3))
    text = (
        f"a: &a {yaml.safe_dump(a, default_flow_style=True, width=10_000).strip()}\n"
        f"b: &b {yaml.safe_dump(b, default_flow_style=True, width=10_000).strip()}\n"
        f"c: *a\nd: [*a, *b, *a]\ne: {{<<: *a, more: *b}}\nf:\n  <<: [*b, *a]\n"
        + "".join(f"  {line}\n" for line, _, _ in lines_of(own))
    )
    found = load(text, "f.yaml")
    assert found == yaml.safe_load(text)
    seen = list(containers(found))
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-3", 0.001), ("1E+2", 100.0), ("-2.5e-4", -0.00025), ("1.", 1.0), (".5", 0.5), ("1_000", 1000)),
        *(("0", 0), ("-0", 0), ("+3", 3), ("010", "010"), ("0x1f", "0x1f"), ("0o17", "0o17"), ("1:30", "1:30")),
        *(("2024-01-01", "2024-01-01"), ("true", True), ("True", True), ("NULL", None), ("~", None), ("", None)),
        *(("no", "no"), ("Off", "Off"), ("yes", "yes"), ("y", "y"), ("'1'", "1"), ("1e", "1e"), (".inf", float("inf"))),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = load(f"a: {text}", "f")["a"]
    assert found == value and (type(found) is type(value) or isinstance(found, str))


def test_switches_are_words_without_quotes():
    found = load("{a: no, b: 'no', c: [On], d: yes, e: off, f: 0}", "f")
    assert [switch(found[key]) for key in "abdef"] == [False, "no", True, False, 0] and switch(found["c"][0]) is True
    assert found == {"a": "no", "b": "no", "c": ["On"], "d": "yes", "e": "off", "f": 0}


def test_keys_are_strings_as_written():
    found = load("{000: a, on: b, 1: c, 1e3: d, null: e, '<<': f}", "f")
    assert found == {"000": "a", "on": "b", "1": "c", "1e3": "d", "null": "e", "<<": "f"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, &b {c: *b}]", "f: a[1].c is an alias of what it stands in"),
        ("a: 1\nb: !!python/object/apply:os.system ['x']", "f is not valid YAML: the tag tag:yaml.org,2002:python/"),
        ("a: !!int '010'", "f is not valid YAML: the tag tag:yaml.org,2002:int makes no plain value"),
        ("a: 1\n? [b]\n: 2", "f, line 2: a key of the document is a list or a mapping: keys are words"),
        ("a: {<<: 3}", "f: a.<< must be an alias of a mapping, or a list of such"),
        ("a: &a {b: 1}\nc: {<<: *a, <<: *a}", "f, line 2: c.<< is given twice (first in line 2)"),
        ("a: 1\n---\nb: 2", "f is not valid YAML: expected a single document"),
        ("a: {b: [1\nc: 2}", "f is not valid YAML: while parsing a flow sequence"),
        ("[" * 5000, "f is not valid YAML: it nests too deeply"),
        ("a: \x00", "f is not valid YAML: unacceptable character"),
        (
            "".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}' if i else '1'] * 12)}]\n" for i in range(9)),
            "f, line 1: its aliases make more than 100,000 values of it",
        ),
    ],
)
def test_what_is_refused_is_told_in_one_line(text, message):
    with pytest.raises(ValueError) as error:
        load(text, "f")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_what_is_dumped_is_read_back_here_and_elsewhere():
    words = [
        "1e-3",
        "010",
        "1:30",
        "no",
        "Off",
        "2024-01-01",
        "1_000",
        "~",
        "",
        "<<",
        "=",
        "0x1f",
        "1e3",
        "a: b",
        "# c",
    ]
    words += ["12e03", ".inf", "é", "\U0001f600", "a\nb", " lead", "true", "null", "-", "'", "0o7", "1."]
    numbers = [1e-5, 1e22, 0.1, -3, True, None, 1.0, float("inf"), 5e-324, 10**20]
    values = {"words": words, "numbers": numbers, "keys": {word: word for word in words}}
    for found in (load(dump(values), "f"), yaml.safe_load(dump(values))):
        assert found == values and list(map(type, found["numbers"])) == list(map(type, numbers))
