"""Recorded answers in their published forms, built again from what was right in them; figures as published."""

import csv
import json
from pathlib import Path

PUBLISHED = json.loads((Path(__file__).parent / "published_answers.json").read_text())
COMPARISONS = ("text_score_i0", "text_score_i1", "image_score_c0", "image_score_c1")

GPT4V = {  # right with the positive caption first, with the negative one first, of so many
    "add_att": (604, 666, 692),
    "add_obj": (1859, 1918, 2062),
    "replace_att": (734, 740, 788),
    "replace_obj": (1578, 1604, 1652),
    "replace_rel": (1240, 1298, 1406),
    "swap_att": (607, 593, 666),
    "swap_obj": (211, 198, 246),
}
SUGARCREPE_VIT = {
    "add_obj": 77.21,
    "add_att": 68.79,
    "replace_obj": 90.92,
    "replace_att": 80.08,
    "replace_rel": 69.20,
    "swap_obj": 61.38,
    "swap_att": 63.96,
    "mean": 73.08,
}
BIVLC = {
    "ViT-B-32": (84.32, 89.50, 69.21, 82.82, 75.83, 52.40, 49.06),
    "CLIP_COCO": (89.06, 91.75, 72.79, 90.86, 82.75, 63.89, 60.96),
    "CLIP_TROHN-Text": (93.25, 83.87, 71.05, 90.59, 78.18, 62.19, 57.48),
    "CLIP_TROHN-Img": (92.12, 95.33, 81.45, 90.15, 88.54, 71.84, 69.25),
}


def gpt4v_records(order, subtype):
    """The records of a file of GPT-4V's replies, by id."""
    records = {}
    for i, said in enumerate(PUBLISHED["gpt4v"][f"{order}-first-{subtype}"]):
        right, wrong = f"the right one of {i} ", f"a wrong one of {i}"
        first = {"positive": right, "negative": wrong}[order]
        chosen = {"1": right, "0": wrong, "-": ""}[said]
        free = "Neither of these, a caption lies" if said == "-" else f"Output ({1 if chosen == first else 2})."
        records[str(i)] = {
            "answer": {"free_form_answer": free, "multiple_choice_answer": chosen},
            "caption": right,
            "negative_caption": wrong,
            "filename": f"{i // 2:012d}.jpg",
            "correct": said == "1",
        }
    return records


def write_gpt4v(folder, order, subtype, records=None, **extra):
    path = folder / f"{order}-first" / f"gpt4v-{subtype}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps((gpt4v_records(order, subtype) if records is None else records) | extra, indent=4))
    return path


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    return path


def bivlc_rows(model):
    rows = []
    for subtype, digits in PUBLISHED["bivlc_csv"][model].items():
        for i, digit in enumerate(digits):
            right = [bool(int(digit, 16) >> bit & 1) for bit in range(4)]
            captions = {"image": f"<PIL {i}>", "caption": f"{subtype} {i}", "negative_caption": f"not {i}"}
            kind = dict(zip(("type", "subtype"), subtype.split("_"), strict=True))
            scores = dict(zip(COMPARISONS, right, strict=True))
            scores |= {"text_score": all(right[:2]), "image_score": all(right[2:]), "group_score": all(right)}
            rows.append(captions | {"negative_image": f"<PIL {i} n>"} | kind | scores)
    return rows


def sugarcrepe_rows(model):
    return [
        {
            "filename": f"{i // 2:012d}.jpg",
            "caption": f"{subtype} {i}",
            "negative_caption": f"not {subtype} {i}",
            **dict(zip(("type", "subtype"), subtype.split("_"), strict=True)),
            "correct": right,
        }
        for subtype, digits in PUBLISHED["sugarcrepe_csv"][model].items()
        for i, right in enumerate(bin(int(digits, 16))[3:])
    ]


def write_winoground(path, scores):
    """``scores``: (groups, 2, 2), captions before images."""
    lines = [
        json.dumps({"label": f"{g}_c{c}_i{i}", "score": scores[g][c][i]})
        for g in range(len(scores))
        for c in (0, 1)
        for i in (0, 1)
    ]
    path.write_text("\n".join(lines))
    return path
