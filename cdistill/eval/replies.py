"""What a reply says: letters, yes or no, short answers, each by its benchmark's own rule."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache


def letter(reply: str, letters: str) -> str | None:
    """The first of these letters that stands alone in a reply, whatever its case: "a cat" reads as A."""
    found = re.search(rf"\b([{letters}])\b", reply.upper())
    return found[1] if found else None


def first_word(reply: str, words: Sequence[str]) -> str | None:
    """The first of these words in a reply, whatever its case."""
    found = re.search(rf"\b({'|'.join(words)})\b", reply, re.IGNORECASE)
    return found[1].lower() if found else None


def yes_unless_no(reply: str) -> str:
    """POPE's rule, which R-Bench took over: of what stands before the first full stop, without commas, split at single spaces;
    "no" if "No", "not" or "no" is one of the words, else "yes" ("NO", "no!", "doesn't" and an empty reply are "yes").
    """
    words = reply.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def yes_or_no_at_start(reply: str) -> str | None:
    """MME's rule: the whole reply or, of a longer one, what its first four characters hold; "yes" is looked for first."""
    said = reply.lower().strip()
    return next((word for word in ("yes", "no") if word in said[:4]), None)


# Contractions that the VQA evaluation restores where one apostrophe is missing, as in "couldnt've" and "couldn'tve".
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't
'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
you'd've you'll you're you've
"""
_RESTORED = {
    whole[:at] + whole[at + 1 :]: whole
    for whole in _CONTRACTIONS.split()
    for at, mark in enumerate(whole)
    if mark == "'"
} | {"somebody'd": "somebodyd"}  # as it stands there
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


@lru_cache(maxsize=1 << 16)  # ten people say much the same
def short_answer(text: str, *, words_first: bool = False) -> str:
    """An answer as the VQA evaluation (Antol et al., 2015) compares it.

    Punctuation goes: it leaves a space behind unless a space is beside it anywhere in the text, or the text has a comma between
    digits. Full stops go unless a digit follows. Then lower case, digits for the numbers to ten, no articles, and apostrophes
    put back into contractions. With ``words_first`` commas and question marks go before, and "'s" is cut off as a word, as the
    evaluation of TextVQA does (Singh et al., 2019), through which LLaVA's authors also send answers to VQAv2 and VizWiz.
    """
    text = re.sub(r"[\n\t]", " ", text).strip()
    if words_first:
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    comma = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        bare = comma or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if bare else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned)
    words = [_DIGITS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(_RESTORED.get(word, word) for word in words if word not in ("a", "an", "the"))


def agreement(answer: str, people: Sequence[str]) -> float:
    """Accuracy of an answer among those of (ten) people, 0..1: min(n / 3, 1) of the others who say the same, averaged over
    leaving each of them out. All are compared as they are.
    """
    same, n = sum(each == answer for each in people), len(people)
    return (same * min((same - 1) / 3.0, 1.0) + (n - same) * min(same / 3.0, 1.0)) / n if same else 0.0
