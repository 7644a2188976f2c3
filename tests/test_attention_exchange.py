"""A student with its teacher's attention, against attention matrices that are changed in float64, token by token."""

from contextlib import contextmanager

import pytest
import torch
from attention_cases import family_pair, float64_attention, in_float64, inputs_alone, questions, readings, visual_places
from family_table import EOS, FAMILIES
from transformers import AttentionInterface, AttentionMaskInterface
from vat_oracle import KeepFloat64

from cdistill.attention.exchange import AsStudent, Exchanged, both_installed, exchange
from cdistill.attention.models import Reading
from cdistill.vat import attention_layers

CHANGED = "changed_in_float64"


@contextmanager
def changed_attention(rule):
    """Eager attention whose matrices (B, H, T, T) ``rule`` changes, given the module's layer."""

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if attention_mask is not None:
            scores = scores + attention_mask
        p = scores.softmax(-1)
        if getattr(module, "layer_idx", None) is not None and attention_mask is not None:
            p = rule(module.layer_idx, p)
        return (p @ value).transpose(1, 2).contiguous(), p

    AttentionInterface.register(CHANGED, attention)
    AttentionMaskInterface.register(CHANGED, AttentionMaskInterface()["eager"])
    try:
        yield
    finally:
        AttentionInterface._global_mapping.pop(CHANGED)
        AttentionMaskInterface._global_mapping.pop(CHANGED)


def changed_logits(models, family, reading, what, rows):
    """Logits (T, V) of the student in float64, its matrices changed in ``rows`` as the definition reads."""
    maps, _ = float64_attention(models.teacher, reading)
    maps = dict(zip(attention_layers(models.teacher.model), maps, strict=True))
    visual = torch.tensor(visual_places(family, reading))
    windows = {match.student: match.teachers for match in what.matches}

    def rule(layer, p):
        if layer not in windows:
            return p
        target = torch.stack([maps[i] for i in windows[layer]]).mean(0)
        p = p.clone()
        for head in range(p.shape[1]) if what.heads is None else what.heads:
            theirs = target[head] if what.each else target.mean(0)
            for row in rows:
                own = p[0, head, row]
                own[visual] = (1 - what.share) * own[visual] + what.share * theirs[row, visual]
                p[0, head, row] = own / own.sum()
        return p

    with torch.no_grad(), KeepFloat64(), changed_attention(rule):
        model = in_float64(models.students[0].model, CHANGED)
        return model(**inputs_alone(models.students[0], reading, torch.float64), use_cache=False).logits[0]


CASES = [(family, ("each", "mean", "1,2")[i % 3], 0.5 if i % 2 else 1.0) for i, family in enumerate(FAMILIES)]


@pytest.mark.parametrize(("family", "heads", "share"), CASES)
def test_scored_and_written_answers_are_those_of_matrices_changed_in_float64(family, heads, share):
    models = family_pair(family)
    what = exchange(models, 0, span="all", share=share, heads=heads)
    changed, plain = Exchanged(models, 0, what), AsStudent(models, 0)
    asked = readings(models, family)
    with both_installed(models):
        found = changed.log_likelihoods(asked)
    expected = []
    for reading in asked:
        logits = changed_logits(models, family, reading, what, [place - 1 for place in reading.answers])
        chances = logits.log_softmax(-1)
        expected.append(sum(float(chances[place - 1, reading.tokens[place]]) for place in reading.answers))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert min(abs(a - b) for a, b in zip(found, plain.log_likelihoods(asked), strict=True)) > 1e-3

    written = [models.read(of, images)[0] for of, images in questions(family, "generate")]
    with both_installed(models):
        said = changed.generate(written)
    for reading, reply in zip(written, said, strict=True):
        tokens = list(reading.ids)
        for _ in range(2):
            so_far = Reading(**{**vars(reading), "ids": tokens})
            rows = range(len(reading.ids) - 1, len(tokens))
            tokens.append(
                int(changed_logits(models, family, extended(models, reading, so_far), what, rows)[-1].argmax())
            )
            if tokens[-1] == EOS:
                break
        assert reply.text == models.teacher.prompts.reply(tokens[len(reading.ids) :])


def extended(models, reading, so_far):
    """The reading with the types of its new tokens."""
    new = len(so_far.ids) - len(reading.ids)
    types = {name: of + [0] * new for name, of in reading.types.items()}
    return Reading(**{**vars(so_far), "types": types})
