"""The scorer of the built-in task, against models whose answers are known and against transformers' greedy decoding."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from builtin_models import llava, text_config
from torch import nn
from transformers import Qwen2ForCausalLM

from cdistill.builtin import questions
from cdistill.builtin.dataset import Collator, build_tokenizer
from cdistill.builtin.scorer import FAMILIES, batches, evaluate, held_out_questions, predict, standard_error_of_mean
from cdistill.data.samples import IMAGE_TOKEN
from cdistill.eval import command

TOKENIZER = build_tokenizer()
EOS = TOKENIZER.eos_token_id
VOCABULARY = TOKENIZER.get_vocab()


class Oracle(nn.Module):
    """A "language model" that is told what it will say: `answer` maps a question's tokens to the answer's."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.weight, self.dtype = answer, nn.Parameter(torch.zeros(1)), torch.float32
        self.config = SimpleNamespace(vision_config=None)

    def model(self, input_ids, attention_mask, pixel_values=None, use_cache=False):
        hidden = torch.zeros(*input_ids.shape, len(TOKENIZER))
        colon = VOCABULARY["ASSISTANT:"]
        for b, ids in enumerate(input_ids.tolist()):
            start = ids.index(colon)
            words = TOKENIZER.convert_ids_to_tokens([i for i in ids[:start] if i != VOCABULARY[IMAGE_TOKEN]][1:])
            for i, word in enumerate(self.answer(" ".join(words))):
                hidden[b, start + i, VOCABULARY[word]] = 1.0
        return SimpleNamespace(last_hidden_state=hidden)

    def get_output_embeddings(self):
        return nn.Identity()


def truth(n, seed=0):
    """Question -> answer words, from the datasets that `evaluate` must draw."""
    known = {}
    for subtype in (*questions.RECOGNITION, *questions.COMPOSITIONAL):
        data = held_out_questions(subtype, n=n, seed=seed)
        for item in (data[i] for i in range(n)):
            ids = [i for i in item["input_ids"].tolist() if i != VOCABULARY[IMAGE_TOKEN]]
            words = TOKENIZER.convert_ids_to_tokens(ids)
            cut = words.index("ASSISTANT:")
            known.setdefault(" ".join(words[1:cut]), []).append(words[cut + 1 : -1])
    return known


def test_a_model_that_is_always_right_scores_one_and_a_constant_one_its_share():
    known = truth(40)
    asked = {question: answers[0] for question, answers in known.items() if len(set(map(tuple, answers))) == 1}
    unclear = len(known) - len(asked)  # the same words about different scenes
    result = evaluate(Oracle(lambda question: asked.get(question, ["<unk>"])), n=40)
    assert result["compositional"]["avg"] > 1 - (unclear + 1) / 40
    assert set(result["compositional"]) == {*questions.COMPOSITIONAL, "avg"}
    assert set(result["recognition"]) == {*questions.RECOGNITION, "avg"}
    always_a = evaluate(Oracle(lambda question: ["A"]), n=40)
    for subtype in questions.COMPOSITIONAL:
        data = held_out_questions(subtype, n=40)
        share = sum(int(data[i]["labels"][-2]) == VOCABULARY["A"] for i in range(40)) / 40
        assert always_a["compositional"][subtype] == share
        assert always_a["constant_answer"]["compositional"][subtype] == max(share, 1 - share)
    assert always_a["recognition"] == {"colour": 0.0, "existence": 0.0, "count": 0.0, "avg": 0.0}


def test_standard_errors_and_averages():
    result = evaluate(Oracle(lambda question: ["A"]), n=30, seed=3)
    for family, subtypes in FAMILIES.items():
        accuracy, error = result[family], result["standard_error"][family]
        for subtype in subtypes:
            p = accuracy[subtype]
            assert error[subtype] == pytest.approx(math.sqrt(p * (1 - p) / 30))
        assert accuracy["avg"] == pytest.approx(sum(accuracy[s] for s in subtypes) / len(subtypes))
        assert error["avg"] == pytest.approx(math.sqrt(sum(error[s] ** 2 for s in subtypes)) / len(subtypes))
    assert (result["n"], result["seed"]) == (30, 3)


def test_standard_error_of_the_mean_is_what_repeated_measurements_show():
    rng = torch.Generator().manual_seed(0)
    p, n = torch.tensor([0.5, 0.7, 0.9, 0.95]), 200
    measured = torch.binomial(torch.full((4000, 4), float(n)), p.expand(4000, 4), generator=rng) / n
    predicted = standard_error_of_mean([math.sqrt(q * (1 - q) / n) for q in p.tolist()])
    assert measured.mean(1).std().item() == pytest.approx(predicted, rel=0.06)


def test_a_prediction_is_right_exactly_when_greedy_decoding_says_so():
    torch.manual_seed(0)
    model, compared = llava(), 0
    for subtype in ("location", "count"):
        data = held_out_questions(subtype, n=6)
        for i in range(6):
            item = data[i]
            # the answer greedy decoding gives, as the label of a second question about the same image
            cut = int((item["labels"] != -100).int().argmax())
            said = model.generate(
                input_ids=item["input_ids"][None, :cut],
                attention_mask=torch.ones(1, cut, dtype=torch.long),
                pixel_values=item["pixel_values"][None],
                max_new_tokens=2,
                do_sample=False,
                eos_token_id=None,
            )[0, cut:]
            if EOS in said:
                continue
            compared += 1
            own = {**item, "input_ids": torch.cat((item["input_ids"][:cut], said, torch.tensor([EOS])))}
            own["labels"] = torch.full_like(own["input_ids"], -100)
            own["labels"][cut:] = own["input_ids"][cut:]
            ((predicted, right),) = predict(model, Collator(TOKENIZER.pad_token_id)([own]), eos_token_id=EOS)
            assert predicted == right == said.tolist()
            ((predicted, right),) = predict(model, Collator(TOKENIZER.pad_token_id)([item]), eos_token_id=EOS)
            assert predicted[0] == said[0]
            assert (predicted == right) == (said[: len(right)].tolist() == right)
    assert compared >= 6


def test_batching_and_padding_change_no_prediction():
    torch.manual_seed(1)
    model = llava()
    for subtype in ("add_att", "existence", "location"):
        data = held_out_questions(subtype, n=7, seed=2)
        one = [p for batch in batches(data, 1) for p in predict(model, batch, eos_token_id=EOS)]
        many = [p for batch in batches(data, 5) for p in predict(model, batch, eos_token_id=EOS)]
        assert one == many
        assert len(one) == 7
    mixed = [held_out_questions(s, n=1)[0] for s in ("swap_att", "count", "location")]
    collate = Collator(TOKENIZER.pad_token_id)
    together = predict(model, collate(mixed), eos_token_id=EOS)
    assert together == [predict(model, collate([item]), eos_token_id=EOS)[0] for item in mixed]


def test_evaluation_repeats_and_follows_its_seed():
    torch.manual_seed(2)
    model = llava().train()
    first, again, other = (evaluate(model, n=5, seed=s) for s in (0, 0, 1))
    assert first == again
    assert other != first
    assert model.training
    assert not torch.equal(
        held_out_questions("count", n=1)[0]["pixel_values"], held_out_questions("count", n=1, seed=1)[0]["pixel_values"]
    )


def test_no_two_kinds_of_questions_share_their_scenes():
    images = [
        held_out_questions(s, n=1, seed=seed)[0]["pixel_values"] for s in ("count", "existence") for seed in (0, 1)
    ]
    assert all((a - b).abs().max() > 0.5 for i, a in enumerate(images) for b in images[:i])


def test_text_bases_read_the_scene():
    torch.manual_seed(3)
    base = Qwen2ForCausalLM(text_config())
    result = evaluate(base, n=3, modality="text")
    assert 0 <= result["compositional"]["avg"] <= 1
    assert "pixel_values" not in held_out_questions("swap_obj", n=1, modality="text")[0]
    with pytest.raises(ValueError, match="modality must be text"):
        evaluate(base, n=3)


@pytest.mark.parametrize(
    ("wrong", "message"), [({"n": 0}, "n must be"), ({"n": 3, "batch_size": 0}, "batch_size must be")]
)
def test_impossible_sizes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        evaluate(llava(), **wrong)


def test_command_evaluates_a_folder_and_the_last_stage_of_a_run(tmp_path, capsys):
    import argparse

    torch.manual_seed(4)
    model = llava()
    model.save_pretrained(tmp_path / "run" / "10-sft")
    TOKENIZER.save_pretrained(tmp_path / "run" / "10-sft")
    (tmp_path / "run" / "9-dft").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    file = tmp_path / "result.json"
    options = parser.parse_args([str(tmp_path / "run"), "--n", "4", "--seed", "5", "--json", str(file)])
    assert command.main(options) == 0
    assert json.loads(file.read_text()) == evaluate(model, n=4, seed=5)
    printed = capsys.readouterr().out
    assert all(subtype in printed for subtypes in FAMILIES.values() for subtype in subtypes)
    for wrong in (["nowhere"], [str(tmp_path / "run" / "10-sft"), "--json", str(tmp_path / "missing" / "x.json")]):
        with pytest.raises(ValueError, match="there is no folder"):
            command.main(parser.parse_args(wrong))
