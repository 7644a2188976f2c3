"""What `cdistill analyze` measures, against transformers' eager attention matrices in float64."""

import numpy as np
import pytest
import torch
from attention_cases import family_pair, float64_attention, readings, visual_places
from family_table import FAMILIES

from cdistill.attention.observation import observe
from cdistill.vat import attention_layers

CLOSE = {"rtol": 2e-4, "atol": 2e-5}


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def over_rows(function, rows):
    return float(np.mean([function(row) for row in rows]))


def entropy(p):
    p = p / p.sum()
    return float(-(p * p.log()).sum())


def expected(models, family, reading):
    """By quantity (L, C), from matrices, in the way their definitions read."""
    teacher, _ = float64_attention(models.teacher, reading)
    student, logits = float64_attention(models.students[0], reading)
    visual = visual_places(family, reading)
    text = [i for i in range(len(reading.tokens)) if i not in visual]
    rows = [place - 1 for place in reading.answers]
    heads = [None, *range(len(teacher[0]))] if len(teacher[0]) == len(student[0]) else [None]

    def of(matrix, head, row, columns):
        return (matrix.mean(0) if head is None else matrix[head])[row, columns]

    n, m = len(student), len(teacher)
    partner = [teacher[(2 * i + 1) * m // (2 * n)] for i in range(n)]
    found = {
        name: [
            [over_rows(lambda r, h=h, c=c, s=s, t=t: cosine(of(s, h, r, c), of(t, h, r, c)), rows) for h in heads]
            for s, t in zip(student, partner, strict=True)
        ]
        for name, c in (("visual", visual), ("text", text))
    }
    every = [None, *range(len(student[0]))]
    found["mass"] = [
        [over_rows(lambda r, h=h, s=s: float(of(s, h, r, visual).sum()), rows) for h in every] for s in student
    ]
    found["entropy"] = [
        [over_rows(lambda r, h=h, s=s: entropy(of(s, h, r, visual)), rows) for h in every] for s in student
    ]
    ours, theirs = (list(attention_layers(of.model)) for of in (models.students[0], models.teacher))
    similar = []
    for match in models.alignments[0].understanding:
        target = torch.stack([teacher[theirs.index(i)].mean(0) for i in match.teachers]).mean(0)
        own = student[ours.index(match.student)].mean(0)
        similar.append([cosine(own[r, visual], target[r, visual]) for r in rows])
    found["row_similarity"] = np.mean(similar, 0)
    tokens = torch.tensor(reading.tokens)
    found["probability"] = [float(logits[r].softmax(-1)[tokens[r + 1]]) for r in rows]
    return found


@pytest.mark.parametrize(("family", "heads"), [*((family, 4) for family in FAMILIES), ("llava_qwen2", 2)])
def test_every_number_is_that_of_eager_attention_in_float64(family, heads):
    models = family_pair(family, heads)
    asked = readings(models, family)
    teacher, student = observe(models, asked, probabilities=True)
    for i, reading in enumerate(asked):
        for name, value in expected(models, family, reading).items():
            np.testing.assert_allclose(student[i][name], value, err_msg=f"{family} {name}", **CLOSE)
    assert np.std([sample["visual"] for sample in student]) > 1e-3  # else a mistake would not show
    assert {"mass", "entropy", "probability"} == teacher[0].keys()
