"""A tokenizer of transformers as llama.cpp has it, or the reason why llama.cpp would cut texts otherwise."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType

from cdistill.errors import InputError

_SPACE = "▁"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_AFTER_DIGITS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# What llama.cpp calls ways to cut a text before byte-level BPE, by the patterns in tokenizer.json.
_PATTERNS = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_AFTER_DIGITS}": "qwen2",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_AFTER_DIGITS}": "llama-bpe",
}
_KEEPS_WHOLE_WORDS = ("llama-bpe",)  # a word of the vocabulary is taken before merges are looked at
_UNKNOWN = "words that the tokenizer lacks become other {} tokens in llama.cpp, and only spaces part words there"


@dataclass(frozen=True)
class Vocabulary:
    """Fields of a GGUF file that make llama.cpp's tokenizer the same, and what is to be known about it."""

    model: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    pre: str = "default"
    space_prefix: bool = False
    one_space: bool = False  # several spaces are one, those at both ends none
    prompt_space: bool = False  # only a prompt's beginning has the space before it, which the chat template must write
    remarks: tuple[str, ...] = ()


def make_vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """llama.cpp's form of a tokenizer, with as many tokens as the embedding has rows.

    A word-level tokenizer of words between spaces is one of type ``t5`` (unigram) whose pieces are whole words; byte-level BPE
    is ``gpt2``, BPE over characters with a space mark and bytes ``llama``.

    Raises:
        ValueError: there is no fast tokenizer, or llama.cpp has none that cuts texts as this one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"model: {type(tokenizer).__name__} has no tokenizer.json, from which the vocabulary is made")
    values = json.loads(backend.to_str())
    added = {token["id"]: token for token in values["added_tokens"]}
    kind = values["model"]["type"]
    if kind == "WordLevel":
        result = _words(values, added)
    elif kind == "BPE" and values["model"].get("byte_fallback"):
        result = _characters(values, added)
    elif kind == "BPE":
        result = _bytes(values, added)
    else:
        raise _refuse("model.type", kind, "BPE and WordLevel are written for llama.cpp")
    known = len(result.tokens)
    if known > rows:
        raise InputError(f"model: the tokenizer has {known} tokens, the embedding {rows} rows")
    result.tokens.extend(f"[UNUSED{i}]" for i in range(known, rows))
    result.types.extend([TokenType.UNUSED] * (rows - known))
    if result.scores is not None:
        result.scores.extend([0.0] * (rows - known))
    return result


def _refuse(field: str, value: Any, why: str) -> InputError:
    shown = value.get("type") if isinstance(value, Mapping) else value
    return InputError(f"model: tokenizer.json: {field} {shown}: {why}")


def _by_id(values: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]]) -> tuple[list[str], list[int]]:
    """Tokens in the order of their numbers, and which kind each is: gaps are unused."""
    names = {number: name for name, number in values["model"]["vocab"].items()}
    names |= {number: token["content"] for number, token in added.items()}
    tokens = [names.get(i, f"[UNUSED{i}]") for i in range(max(names) + 1)]
    types = [int(TokenType.NORMAL if i in names else TokenType.UNUSED) for i in range(len(tokens))]
    for number, token in added.items():
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise _refuse("added_tokens", token["content"], "llama.cpp knows no lstrip, rstrip or single_word")
        types[number] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    return tokens, types


def _words(values: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]]) -> Vocabulary:
    if (values["pre_tokenizer"] or {}).get("type") != "WhitespaceSplit":
        raise _refuse("pre_tokenizer", values["pre_tokenizer"], "of words, llama.cpp has those between spaces")
    if values["normalizer"] is not None:
        raise _refuse("normalizer", values["normalizer"], "llama.cpp takes words as they are")
    unknown = values["model"]["unk_token"]
    tokens, types = _by_id(values, added)
    broken = [name for name, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL and _SPACE in name]
    if broken:
        raise _refuse("model.vocab", broken[0], f"llama.cpp takes {_SPACE} for a space")
    for i, kind in enumerate(types):
        if tokens[i] == unknown:
            types[i] = TokenType.UNKNOWN
        elif kind == TokenType.NORMAL:
            tokens[i] = _SPACE + tokens[i]
    remarks = (_UNKNOWN.format(unknown),)
    return Vocabulary("t5", tokens, types, [0.0] * len(tokens), space_prefix=True, one_space=True, remarks=remarks)


def _bytes(values: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]]) -> Vocabulary:
    if values["normalizer"] not in (None, {"type": "NFC"}):
        raise _refuse("normalizer", values["normalizer"], "llama.cpp's byte-level BPE has none")
    pre = _cut(values["pre_tokenizer"])
    if bool(values["model"].get("ignore_merges")) != (pre in _KEEPS_WHOLE_WORDS):
        raise _refuse(
            "model.ignore_merges", values["model"].get("ignore_merges"), f"llama.cpp's {pre} has it otherwise"
        )
    tokens, types = _by_id(values, added)
    remarks = (
        () if values["normalizer"] is None else ("llama.cpp does not normalise texts (NFC) as the tokenizer does",)
    )
    return Vocabulary("gpt2", tokens, types, merges=_merges(values), pre=pre, remarks=remarks)


def _merges(values: Mapping[str, Any]) -> list[str]:
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in values["model"]["merges"]]
    return [" ".join(pair) for pair in pairs]


def _cut(pre_tokenizer: Mapping[str, Any] | None) -> str:
    """What llama.cpp calls a way to cut texts before byte-level BPE."""
    why = "llama.cpp cuts texts otherwise; written are those of GPT-2, SmolLM, Llama 3 and Qwen 2"
    steps = [pre_tokenizer] if pre_tokenizer is not None else []
    if pre_tokenizer is not None and pre_tokenizer["type"] == "Sequence":
        steps = list(pre_tokenizer["pretokenizers"])
    kinds = [step["type"] for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise _refuse("pre_tokenizer", pre_tokenizer, why)
    own = bool(steps[-1].get("use_regex", True))
    if kinds == ["ByteLevel"] and own:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and own:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not own and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
        pattern = steps[0]["pattern"].get("Regex")
        if pattern in _PATTERNS:
            return _PATTERNS[pattern]
    raise _refuse("pre_tokenizer", pre_tokenizer, why)


_PREPENDED = [
    {"type": "Prepend", "prepend": _SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
]
# Before which texts a space is put: whether llama.cpp does so, whether the chat template must, and what is to be known.
_SPACED: dict[str, tuple[bool, bool, tuple[str, ...]]] = {
    "every": (True, False, ()),
    "always": (True, False, ("texts that begin with a space get another in llama.cpp",)),
    "first": (False, True, ("llama.cpp puts no space before a text of /completion; the chat template puts it",)),
    "never": (False, False, ()),
}


def _spaced(values: Mapping[str, Any]) -> tuple[bool, bool, tuple[str, ...]]:
    normalizer, cut = values["normalizer"], values["pre_tokenizer"]
    if normalizer == {"type": "Sequence", "normalizers": _PREPENDED} and cut is None:
        return _SPACED["every"]
    if normalizer is None and cut is not None and cut["type"] == "Metaspace" and cut["replacement"] == _SPACE:
        if not cut["split"] and cut["prepend_scheme"] in _SPACED:
            return _SPACED[cut["prepend_scheme"]]
        raise _refuse("pre_tokenizer", cut, "llama.cpp's llama does not cut texts at spaces")
    raise _refuse("normalizer", normalizer, f"llama.cpp's llama puts {_SPACE} for every space and changes nothing else")


def _characters(values: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]]) -> Vocabulary:
    """SentencePiece's BPE: the better of two pairs is that whose product has the higher score, here minus the rank."""
    prefix, prompt, remarks = _spaced(values)
    tokens, types = _by_id(values, added)
    vocabulary, scores = values["model"]["vocab"], [0.0] * len(tokens)
    last = -1
    for rank, pair in enumerate(merge.split(" ") for merge in _merges(values)):
        number = vocabulary["".join(pair)]
        if scores[number] == 0.0:
            scores[number], last = -float(rank + 1), number
        elif number != last:
            raise _refuse("model.merges", " ".join(pair), "llama.cpp ranks what is made, not the pairs")
    for i, name in enumerate(tokens):
        if name == values["model"]["unk_token"]:
            types[i] = TokenType.UNKNOWN
        elif i not in added and len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            types[i] = TokenType.BYTE
    return Vocabulary("llama", tokens, types, scores, space_prefix=prefix, prompt_space=prompt, remarks=remarks)


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, tokenizer: Any, stops: Sequence[int]) -> None:
    """Put a vocabulary, its special tokens and those that end a reply into a file's fields.

    Raises:
        ValueError: there are more stop tokens than llama.cpp has fields for.
    """
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    writer.add_remove_extra_whitespaces(vocabulary.one_space)
    begun = list(tokenizer("a")["input_ids"]), tokenizer.bos_token_id, tokenizer.eos_token_id
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_add_bos_token(begun[1] is not None and begun[0][:1] == [begun[1]])
    writer.add_add_eos_token(begun[2] is not None and begun[0][-1:] == [begun[2]])
    for number, add in zip(
        stops, (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), strict=False
    ):
        add(number)
    if len(stops) > 3:
        raise InputError(f"model: generation_config.eos_token_id has {len(stops)} tokens, llama.cpp takes 3")
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
