"""What the fair level needs: a share of samples without images, and choices judged by log-likelihood."""

import math
import re

import torch
from builtin_models import llava

from cdistill.builtin.dataset import ASSISTANT, BuiltinDataset, Collator, build_tokenizer
from cdistill.builtin.questions import CHOICES
from cdistill.builtin.scorer import FAMILIES, batches, held_out_questions
from cdistill.builtin.task import BuiltinTask
from cdistill.data.samples import IGNORE_INDEX, IMAGE_TOKEN
from cdistill.eval.builtin_task import Exam

TOKENIZER = build_tokenizer()


def test_a_share_of_samples_is_written_out_and_asks_of_everything():
    task = BuiltinTask(turns=3, subtypes=("colour", "existence", "count"), text=0.3)
    data = BuiltinDataset(task, size=400, seed=16, tokenizer=TOKENIZER, grounding=True)
    written, captions = 0, {True: 0, False: 0}
    for i in range(len(data)):
        item = data[i]
        shown = "pixel_values" in item
        assert (
            shown
            == data.has_image(i)
            == bool((item["input_ids"] == TOKENIZER.convert_tokens_to_ids(IMAGE_TOKEN)).any())
        )
        written += not shown
        captions[shown] += "which caption fits" in TOKENIZER.decode(item["input_ids"])
        if not shown:
            scene, _, _ = TOKENIZER.decode(item["input_ids"]).partition(ASSISTANT)
            assert len(item["places"]) == len(re.findall(r"r\d c\d", scene)) > 0
            assert data.messages(i)[0]["content"][0]["type"] == "text"
    assert abs(written / 400 - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 400)
    assert captions[True] == 0 and captions[False] > 0.8 * written
    batch = Collator(TOKENIZER.pad_token_id)([data[i] for i in range(40)])
    assert len(batch["pixel_values"]) == sum(data.has_image(i) for i in range(40)) < 40


def test_choices_are_judged_by_log_likelihood_alone():
    torch.manual_seed(0)
    model = llava().double().eval()  # which seldom says A or B by itself
    both = Exam(n=5, seed=2).evaluate_both(model)
    for family, subtypes in FAMILIES.items():
        for subtype in subtypes:
            data = held_out_questions(subtype, n=5, seed=2)
            vocabulary, right = data.tokenizer.get_vocab(), 0
            for batch in batches(data, 1):
                place = int((batch["labels"][0] != IGNORE_INDEX).nonzero()[0])
                inputs = {
                    n: x[:, :place] if n != "pixel_values" else x.double() for n, x in batch.items() if n != "labels"
                }
                with torch.no_grad():
                    likely = model(**inputs).logits[0, -1].log_softmax(-1)
                best = max(CHOICES[subtype], key=lambda word: float(likely[vocabulary[word]]))
                right += vocabulary[best] == int(batch["labels"][0, place])
            assert both["choice"][family][subtype] == right / 5
    assert both["choice"]["compositional"]["avg"] > both["greedy"]["compositional"]["avg"]
