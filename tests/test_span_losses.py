"""KD across vocabularies against its definition in float64, outcome by outcome, and against TRL's GOLD."""

import ast
import importlib.util
import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conversation_cases import byte_level_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cdistill.choices import KDConfig
from cdistill.data.tokens import Vocabularies, vocabularies
from cdistill.models.logits import AfterHead
from cdistill.ops.reference import linear_distillation
from cdistill.train import span_losses as module
from cdistill.train.span_losses import Head, Side, span_losses

VS, VT, HS, HT = 30, 41, 8, 12
#                 span 1 | 2: one token each | 3: two and three | none | 4: the student's alone | 5: two and one
SPANS = torch.tensor([1, 1, 2, 3, 3, 0, 4, 5, 5])
THEIRS = torch.tensor([1, 2, 3, 3, 3, 0, 0, 5])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_NUMBERS", {"cpu": 200})


def matched(seed=0):
    """Some tokens that both have, in each context, tokens of the samples among them."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {c: torch.stack([torch.randperm(v, generator=generator)[:18] for v in (VS, VT)]) for c in (0, 1, -1)}
    spaces = [torch.rand(v, generator=generator) < 0.5 for v in (VS, VT)]
    return Vocabularies(VS, VT, pairs, *spaces)


def drawn(padding=3, spans=(SPANS, THEIRS), sizes=(VS, VT), scale=1.0):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    def side(span, width, size):
        labels = torch.randint(size, span.shape, generator=generator)
        return Side(draw(len(span), width), labels, span)

    ours, theirs = side(spans[0], HS, sizes[0]), side(spans[1], HT, sizes[1])
    head = Head(draw(sizes[0] + padding, HS), draw(sizes[0] + padding), AfterHead(1.3, 20.0), sizes[0])
    return ours, head, theirs, Head(draw(sizes[1] + padding, HT), None, AfterHead(), sizes[1])


def log_probabilities(side, head, temperature):
    logits = head.after(F.linear(side.hidden, head.weight, head.bias))[:, : head.size]
    return (logits / temperature).log_softmax(1)


def distance(p, q, kd):
    """Divergence of two dictionaries of probabilities by outcome."""
    total = 0.0
    for outcome in p:
        a, b = p[outcome], q[outcome]
        if kd.divergence == "forward_kl":
            total = total + (b * (b.log() - a.log()) if b > 0 else 0.0)
        elif kd.divergence == "reverse_kl":
            total = total + (a * (a.log() - b.log()) if a > 0 else 0.0)
        else:
            m = kd.beta * b + (1 - kd.beta) * a
            total = total + (kd.beta * b * (b / m).log() if b > 0 else 0.0)
            total = total + ((1 - kd.beta) * a * (a / m).log() if a > 0 else 0.0)
    return total


def sorted_distance(p, q):
    p, q = (sorted(x, key=lambda y: -y.item()) for x in (p, q))
    zero = torch.zeros((), dtype=torch.float64)
    p, q = p + [zero] * (len(q) - len(p)), q + [zero] * (len(p) - len(q))
    return sum(((a - b).abs() for a, b in zip(p, q, strict=True)), zero)


def of_span(rows, tokens, kd, vocabularies):
    """What a span costs: of either side the log-probabilities (n, V) at its positions and its tokens."""
    if kd.alignment == "uld":
        both = [
            x[-1].exp() * math.prod(x[i, t].exp() for i, t in enumerate(ids[:-1]))
            for x, ids in zip(rows, tokens, strict=False)
        ]
        return sorted_distance(*(list(x) for x in both))
    spaces = (vocabularies.student_spaces, vocabularies.teacher_spaces)
    context = int(spaces[0][tokens[0][0]]) - int(spaces[1][tokens[1][0]])
    names = [{int(t): f"pair {i}" for i, t in enumerate(ids)} for ids in vocabularies.matches[context]]
    first = [ids[0] for ids in tokens]
    gone = {name[t] for name, t in zip(names, first, strict=False) if t in name}
    outcomes, alone = [], []
    for x, ids, name in zip(rows, tokens, names, strict=False):
        p = x[0].exp()
        whole = math.prod(x[i, t].exp() for i, t in enumerate(ids))
        found = {"span": whole, "else": p[ids[0]] - whole if len(ids) > 1 else p.new_zeros(())}
        rest = []
        for token in range(len(p)):
            if token == ids[0]:
                continue
            if token in name and name[token] not in gone:
                found[name[token]] = p[token]
            else:
                rest.append(p[token])
                found["else"] = found["else"] + p[token]
        outcomes.append(found)
        alone.append(rest)
        assert math.isclose(sum(x.item() for x in found.values()), 1.0)
    return distance(*outcomes, kd) + sorted_distance(*alone)


def oracle(ours, head, theirs, teacher_head, vocabularies, kd):
    p, q = (log_probabilities(*x, kd.temperature) for x in ((ours, head), (theirs, teacher_head)))
    ce = F.cross_entropy(log_probabilities(ours, head, 1.0), ours.labels, reduction="sum")
    total = p.new_zeros(())
    for span in sorted({*ours.spans.tolist()} & {*theirs.spans.tolist()} - {0}):
        at = [side.spans == span for side in (ours, theirs)]
        tokens = [side.labels[x].tolist() for side, x in zip((ours, theirs), at, strict=False)]
        total = total + of_span((p[at[0]], q[at[1]].detach()), tokens, kd, vocabularies)
    return ce, total


KDS = [
    KDConfig(alignment="merged"),
    KDConfig(alignment="merged", divergence="reverse_kl", temperature=2.0),
    KDConfig(alignment="merged", divergence="jsd", beta=0.3),
    KDConfig(alignment="uld", temperature=1.5),
]


@pytest.mark.parametrize("kd", KDS, ids=lambda kd: f"{kd.alignment}-{kd.divergence}")
@pytest.mark.parametrize("weights", [(1.0, 0.7), (0.2, 3.0)])
def test_losses_and_gradients_are_those_of_the_definition(kd, weights):
    ours, head, theirs, teacher_head = drawn()
    leaves = [x.requires_grad_() for x in (ours.hidden, head.weight, head.bias)]
    found = span_losses(ours, head, theirs, teacher_head, matched(), kd, (1.0, 0.7))
    expected = oracle(ours, head, theirs, teacher_head, matched(), kd)
    torch.testing.assert_close(tuple(found), expected)
    total = [weights[0] * x[0] + weights[1] * x[1] for x in (found, expected)]
    torch.testing.assert_close(*(torch.autograd.grad(x, leaves, retain_graph=True) for x in total))


@pytest.mark.parametrize("kd", KDS[:3], ids=lambda kd: kd.divergence)
def test_one_vocabulary_gives_plain_kd(kd):
    spans = torch.arange(1, 8)
    ours, head, theirs, teacher_head = drawn(spans=(spans, spans), sizes=(VS, VS), padding=0)
    theirs = theirs._replace(labels=ours.labels)
    pairs = torch.arange(VS).expand(2, -1)
    same = Vocabularies(VS, VS, dict.fromkeys((0, 1, -1), pairs), *(torch.zeros(VS, dtype=torch.bool),) * 2)
    leaves = [x.requires_grad_() for x in (ours.hidden, head.weight, head.bias)]
    options = {"divergence": kd.divergence, "temperature": kd.temperature, "beta": kd.beta}
    plain = linear_distillation(
        ours.hidden, head.weight, theirs.hidden, teacher_head.weight, ours.labels, student_bias=head.bias,
        student_logit_scale=1.3, student_logit_softcap=20.0, **options,
    )  # fmt: skip
    found = span_losses(ours, head, theirs, teacher_head, same, kd)
    torch.testing.assert_close(tuple(found), (plain.ce, plain.kd))
    torch.testing.assert_close(*(torch.autograd.grad(x[0] + x[1], leaves) for x in (found, plain)))


def test_half_precision_is_as_near_as_its_logits():
    """As under autocast: hidden states in bf16, heads in fp32, or all in bf16."""
    for heads in (torch.float32, torch.bfloat16):
        ours, head, theirs, teacher_head = drawn()
        sides = [side._replace(hidden=side.hidden.bfloat16()) for side in (ours, theirs)]
        both = [
            of._replace(weight=of.weight.to(heads), bias=None if of.bias is None else of.bias.to(heads))
            for of in (head, teacher_head)
        ]
        found = span_losses(sides[0], both[0], sides[1], both[1], matched(), KDS[0])
        expected = oracle(ours, head, theirs, teacher_head, matched(), KDS[0])
        torch.testing.assert_close([x.double() for x in found], list(expected), rtol=3e-2, atol=0)


def test_spans_of_one_side_alone_and_none_at_all_cost_nothing():
    ours, head, theirs, teacher_head = drawn(spans=(torch.tensor([0, 2, 2]), torch.tensor([1, 1])))
    ours.hidden.requires_grad_()
    for side in (theirs, theirs._replace(hidden=theirs.hidden[:0], labels=theirs.labels[:0], spans=theirs.spans[:0])):
        found = span_losses(ours, head, side, teacher_head, matched(), KDS[0])
        assert found.kd == 0 and not torch.autograd.grad(found.kd, ours.hidden)[0].any()
        torch.testing.assert_close(found.ce, oracle(ours, head, theirs, teacher_head, matched(), KDS[0])[0])


@cache
def trl() -> Any:
    """TRL's ULD loss out of its file: importing GOLD's trainer takes 5 s of CPU time."""
    path = importlib.util.find_spec("trl").submodule_search_locations[0] + "/experimental/gold/gold_trainer.py"
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    trainer = classes["GOLDTrainer"]
    trainer.bases, trainer.decorator_list = [], []
    trainer.body = [node for node in trainer.body if getattr(node, "name", "") == "generalized_jsd_loss"]
    names = {"torch": torch, "nn": nn, "F": F, "GOLDConfig": object}
    exec(compile(ast.Module([classes["ULDLoss"], trainer], []), path, "exec"), names)
    return names["ULDLoss"]


def of_trl(**options):
    config = {
        "uld_crossentropy_weight": 0.0, "uld_distillation_weight": 1.0, "uld_student_temperature": 1.0,
        "uld_teacher_temperature": 1.0, "uld_skip_student_eos": False, "uld_skip_teacher_eos": False,
        "use_extended_uld": True, "uld_token_merge_strategy": "bayesian", "uld_use_hybrid_loss": False,
    }  # fmt: skip
    return trl()(SimpleNamespace(**config, **options))


def test_uld_is_trls_of_merged_spans():
    """Which takes a mean over the spans of a sample, and no probability below 1e-8; ``bayesian`` puts a distribution where it
    predicts."""
    spans = torch.tensor([1, 1, 2, 3, 3, 4]), torch.tensor([1, 2, 3, 3, 3, 4])
    ends = [[3, 5, 7, 8, 12, 14], [5, 7, 9, 10, 12, 14]]
    ours, head, theirs, teacher_head = drawn(spans=spans, padding=0, scale=0.4)
    found = span_losses(ours, head, theirs, teacher_head, matched(), KDConfig(alignment="uld")).kd
    inputs = []
    for side, of, stops in zip((ours, theirs), (head, teacher_head), ends, strict=True):
        logits = F.pad(of.after(F.linear(side.hidden, of.weight, of.bias)), (0, 0, 0, 1))[None]
        labels = F.pad(side.labels, (1, 0), value=-100)[None]
        offsets = torch.tensor([[0, 0], *([a, b] for a, b in zip([0, *stops], stops, strict=False))])[None]
        inputs.append((logits, labels, labels.clamp(min=0), offsets))
    expected = of_trl()(*(x for pair in zip(*inputs, strict=True) for x in pair))
    torch.testing.assert_close(found, 4 * expected)


@pytest.mark.parametrize(("divergence", "beta"), [("forward_kl", 0), ("reverse_kl", 1), ("jsd", 0.4)])
def test_merged_is_trls_hybrid_loss_where_all_else_is_one_more_token(divergence, beta):
    """TRL leaves what is not matched out of the divergence; a token for it on both sides makes its formula ours."""
    spans = torch.arange(1, 7)
    ours, head, theirs, teacher_head = drawn(spans=(spans, spans), padding=0, scale=0.4)
    pairs = matched().matches[0]
    ours, theirs = (side._replace(labels=ids[: len(spans)]) for side, ids in zip((ours, theirs), pairs, strict=True))
    known = Vocabularies(VS, VT, {0: pairs}, *(torch.zeros(v, dtype=torch.bool) for v in (VS, VT)))
    kd = KDConfig(alignment="merged", divergence=divergence, **({"beta": beta} if divergence == "jsd" else {}))
    found = span_losses(ours, head, theirs, teacher_head, known, kd).kd
    of = of_trl(beta=beta, uld_hybrid_matched_weight=1.0, uld_hybrid_unmatched_weight=1.0)
    both = []
    for side, head_of, ids in zip((ours, theirs), (head, teacher_head), pairs, strict=True):
        p = log_probabilities(side, head_of, 1.0).exp()
        rest = 1 - p[:, ids].sum(1, keepdim=True)
        both.append(torch.cat([p, rest], 1))
    mapping = {int(t): int(s) for s, t in pairs.T.tolist()} | {VT: VS}
    of._vocab_mapping, of._teacher_matched_ids, of._student_matched_ids = mapping, set(mapping), set(mapping.values())
    of.mapping_tensor = torch.tensor([mapping.get(i, -1) for i in range(VT + 1)])
    torch.testing.assert_close(found, len(spans) * of._compute_hybrid_uld_loss(*both))


def words(*of, decoder=None):
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(("<unk>", "</s>", *of))}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<unk>")


def test_tokens_match_by_what_they_say_where_they_stand():
    """A byte-level tokenizer has words with a space and without; a word-level one knows them without, and writes it itself."""
    ours, theirs = byte_level_tokenizer(), words("How", "many", "picture", "how")
    end = ours.convert_tokens_to_ids("<|im_end|>")
    found = vocabularies(ours, theirs, ((end,), (theirs.eos_token_id,)))
    said = {
        c: {(ours.decode([a]), theirs.decode([b])) for a, b in pairs.T.tolist()} for c, pairs in found.matches.items()
    }
    # behind a word " many" is "many" for both; where the answer begins the word-level one alone means a space
    assert said[0] == {(" How", "How"), (" many", "many"), (" picture", "picture"), ("<|im_end|>", "</s>")}
    assert said[-1] == {("How", "How"), ("<|im_end|>", "</s>")}
    assert (found.student, found.teacher) == (len(ours), len(theirs))
    same = vocabularies(ours, ours).matches[0]
    assert (same[0] == same[1]).all() and len(same[0]) == len(ours)


def test_a_token_stands_for_one_other():
    """Bytes that are characters, too, say the same twice: the first is matched."""
    vocab = {part: i for i, part in enumerate(("<unk>", "</s>", "▁is", "A", "<0x41>", "B"))}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    ours = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    pairs = vocabularies(ours, byte_level_tokenizer()).matches[0].T.tolist()
    assert [a for a, b in pairs if byte_level_tokenizer().decode([b]) == "A"] == [3]
    assert len({b for _, b in pairs}) == len(pairs)


def test_tokens_that_a_head_does_not_have_are_left_out():
    """As special ones that were added to a tokenizer alone."""
    known = matched()
    cut = known.within(VS - 4, VT + 10)
    assert (cut.student, cut.teacher, len(cut.student_spaces), len(cut.teacher_spaces)) == (VS - 4, VT, VS - 4, VT)
    for context, pairs in known.matches.items():
        assert cut.matches[context].T.tolist() == [[a, b] for a, b in pairs.T.tolist() if a < VS - 4]
    assert known.within(VS, VT) is known
