"""SugarCrepe (Hsieh et al., 2023): which of two captions fits an image, the wrong one being as fluent as the right one.

Asked and scored as CompoDistill's authors do: greedy, both orders of the captions, the first A or B that stands alone in the
reply; a sub-type is the mean of the orders, the total the plain mean of the seven sub-types. The published replies of GPT-4V
were given to another prompt ("Output (1) or (2)"), those of BiVLC's csv are comparisons of CLIP's scores.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import MappingProxyType

from cdistill.errors import InputError
from cdistill.eval.benchmarks.base import Base, fact, template, unit
from cdistill.eval.contract import Answer, Question
from cdistill.eval.files import Record, csv_records, json_records
from cdistill.eval.replies import letter
from cdistill.eval.statistics import Tally

SUBTYPES = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
ORDERS = ("positive_first", "negative_first")


class SugarCrepe(Base):
    """SugarCrepe's questions and metrics ``add_att`` ... ``swap_obj``, each also by order, and ``mean``."""

    name = "sugarcrepe"
    title = "SugarCrepe (2023)"
    licence = "MIT; images: COCO val2017"
    download = (
        "github.com/RAIVNLab/sugar-crepe: the seven files of data/ into --data; "
        "images.cocodataset.org/zips/val2017.zip: its folder val2017 is --images"
    )
    known = MappingProxyType({"subtype": SUBTYPES, "order": ("", *ORDERS), "label": ("A", "B")})
    prompt = (
        "Which caption best describes the image?\n(A) {}\n (B) {}\n"
        "Answer with the option's alphabet from the given choices directly."
    )
    counts = MappingProxyType(dict(zip(SUBTYPES, (692, 2062, 788, 1652, 1406, 666, 245), strict=True)))

    def load(self, data: Path) -> list[Question]:
        """Both orders of every pair in the files ``add_att.json`` ... ``swap_obj.json`` that are there."""
        files = {subtype: data / f"{subtype}.json" for subtype in SUBTYPES if (data / f"{subtype}.json").is_file()}
        if not files:
            raise InputError(f"{data}: has none of SugarCrepe's files, {', '.join(f'{s}.json' for s in SUBTYPES)}")
        prompt = template(data, self.prompt)
        return [
            _question(record, subtype, order, prompt)
            for subtype, path in files.items()
            for record in json_records(path)
            for order in ORDERS
        ]

    def read(self, answer: Answer) -> str | None:
        """A or B."""
        return letter(answer.reply, "AB")

    def tally(self, answers: Sequence[Answer]) -> Tally:
        """Units are images, of which several pairs may speak."""
        tally = Tally()
        orders: dict[str, dict[str, None]] = defaultdict(dict)
        for answer in answers:
            subtype, order = fact(answer, "subtype"), fact(answer, "order")
            orders[subtype][order] = None
            right = self.read(answer) == fact(answer, "label")
            tally.count(unit(answer), f"{subtype}/{order}" if order else subtype, right)
        for subtype in sorted(orders):
            given = [order for order in ORDERS if order in orders[subtype]]
            for order in given:
                tally.share(f"{subtype}/{order}")
            if given:
                tally.mean(subtype, [f"{subtype}/{order}" for order in given])
            else:
                tally.share(subtype)
        tally.mean("mean", sorted(orders))
        return tally

    def remarks(self, questions: Sequence[Question]) -> list[str]:
        """Also the orders that are missing."""
        found: dict[str, set[str]] = defaultdict(set)
        for question in questions:
            found[question.facts["subtype"]].add(question.facts["order"])
        missing = [
            f"sugarcrepe {subtype}: {order} is missing, the sub-type is that of the other order alone"
            for subtype in sorted(found)
            for order in ORDERS
            if found[subtype] - {""} and order not in found[subtype]
        ]
        return super().remarks(questions) + missing

    def recorded(self, files: Sequence[Path]) -> list[Answer]:
        """GPT-4V's replies (one JSON per sub-type and order) or the csv of BiVLC's authors (one for all sub-types)."""
        answers: dict[str, Answer] = {}
        for path in files:
            for answer in _scored(path) if path.suffix == ".csv" else _gpt4v(path):
                if answer.question.id in answers:
                    raise InputError(
                        f"{path}: {answer.question.id} is there twice; give one file for each sub-type and order"
                    )
                answers[answer.question.id] = answer
        _check_versions(answers.values())
        return list(answers.values())


def _question(record: Record, subtype: str, order: str, prompt: str = SugarCrepe.prompt, item: str = "") -> Question:
    """The question of a record; ``order`` is empty where the captions were compared by scores."""
    right, wrong, image = record.text("caption"), record.text("negative_caption"), record.name("filename")
    item = f"{subtype}/{item or record.key}"
    first, second = (wrong, right) if order == "negative_first" else (right, wrong)
    facts = {"subtype": subtype, "order": order, "item": item, "unit": image, "label": "B" if first == wrong else "A"}
    return Question(f"{item}/{order}".rstrip("/"), prompt.format(first, second), (image,), facts=facts)


def _gpt4v(path: Path) -> list[Answer]:
    named = " ".join(path.absolute().parts[-2:])
    subtypes = [subtype for subtype in SUBTYPES if subtype in path.name]
    if len(subtypes) != 1:
        raise InputError(f"{path}: the name must hold the sub-type, one of {', '.join(SUBTYPES)}")
    records = list(json_records(path))
    order = _order(path, named, records)
    answers = []
    for record in records:
        question, reply = _question(record, subtypes[0], order), record.get("answer")
        chosen = reply.get("multiple_choice_answer") if isinstance(reply, dict) else None
        if not isinstance(chosen, str):
            raise InputError(f"{record.place}: the field answer.multiple_choice_answer is missing")
        if chosen not in (record.fields["caption"], record.fields["negative_caption"], ""):
            raise InputError(f"{record.place}: multiple_choice_answer is neither caption, {chosen!r:.60}")
        right = chosen == record.fields["caption"]
        if record.fields.get("correct") is not None and record.flag("correct") != right:
            raise InputError(
                f"{record.place}: correct says {record.fields['correct']}, multiple_choice_answer the opposite"
            )
        label, other = ("A", "B") if order == "positive_first" else ("B", "A")
        said = label if right else other if chosen == record.fields["negative_caption"] else ""
        answers.append(Answer(question, said))
    _check_ids(path, subtypes[0], {record.key for record in records})
    return answers


def _check_ids(path: Path, subtype: str, ids: set[str]) -> None:
    """Ids count from 0 on; 108 of swap_obj was taken out of the published files."""
    wanted = set(map(str, range(max((int(i) for i in ids if i.isdigit()), default=0) + 1)))
    missing = wanted - ids - ({"108"} if subtype == "swap_obj" else set())
    if missing or ids - wanted:
        raise InputError(
            f"{path}: the ids are not 0, 1, 2, ...: {min(missing or ids - wanted)!r} is {'not ' * bool(missing)}there"
        )


def _order(path: Path, named: str, records: Sequence[Record]) -> str:
    """Which caption came first: "(1)" was chosen with it, as all but a few replies show; else the name must say."""
    votes = dict.fromkeys(ORDERS, 0)
    for record in records:
        reply = record.fields.get("answer")
        said = re.findall(r"\(([12])\)", str(reply.get("free_form_answer"))) if isinstance(reply, dict) else []
        chosen = reply.get("multiple_choice_answer") if isinstance(reply, dict) else None
        if len(set(said)) == 1 and chosen in (record.fields.get("caption"), record.fields.get("negative_caption")):
            votes[ORDERS[(said[0] == "1") != (chosen == record.fields.get("caption"))]] += 1
    by_name = [order for order in ORDERS if order.replace("_", "-") in named.replace("_", "-")]
    by_votes = [order for order in ORDERS if votes[order] > 0.9 * sum(votes.values())]
    if len(by_name) == 1 and by_votes and by_name != by_votes:
        raise InputError(f"{path}: the name says {by_name[0]}, the replies say {by_votes[0]}")
    found = by_votes or by_name
    if len(found) != 1:
        raise InputError(f"{path}: the name must say positive-first or negative-first")
    return found[0]


def _scored(path: Path) -> list[Answer]:
    answers, numbers = [], dict.fromkeys(SUBTYPES, 0)
    seen: dict[tuple[str, ...], str] = {}
    for record in csv_records(path):
        subtype = f"{record.text('type')}_{record.text('subtype')}"
        if subtype not in SUBTYPES:
            raise InputError(
                f"{record.place}: type and subtype must make one of {', '.join(SUBTYPES)}, got {subtype!r}"
            )
        question = _question(record, subtype, "", item=str(numbers[subtype]))
        same = (subtype, record.text("filename"), record.text("caption"), record.text("negative_caption"))
        if same in seen:
            raise InputError(f"{record.place}: is {seen[same]} again")
        seen[same] = record.place
        numbers[subtype] += 1
        answers.append(Answer(question, "A" if record.flag("correct") else "B"))
    if not answers:
        raise InputError(f"{path}: holds no rows")
    return answers


def _check_versions(answers: Iterable[Answer]) -> None:
    """Both orders of a pair must be there, of the same captions, and scores must not be mixed with replies."""
    pairs: dict[str, dict[str, Question]] = defaultdict(dict)
    orders: dict[str, set[str]] = defaultdict(set)
    for answer in answers:
        facts = answer.question.facts
        pairs[facts["item"]][facts["order"]] = answer.question
        orders[facts["subtype"]].add(facts["order"])
    for subtype, given in orders.items():
        if "" in given and len(given) > 1:
            raise InputError(f"sugarcrepe {subtype}: replies and scores cannot be put together; score them one by one")
    for item, there in pairs.items():
        missing = orders[item.split("/")[0]] - set(there)
        if missing:
            raise InputError(
                f"sugarcrepe: {item} has no {missing.pop()} answer: files of two versions, or records lost"
            )
        if len(there) > 1 and len({frozenset(_captions(question)) for question in there.values()}) > 1:
            raise InputError(f"sugarcrepe: {item} has other captions in each order: files of two versions")


def _captions(question: Question) -> list[str]:
    return re.split(r"\n ?\([AB]\) |\nAnswer with", question.prompt)[1:3]


BENCHMARK = SugarCrepe()
