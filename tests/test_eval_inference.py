"""Batched answers with shared beginnings, against transformers one sample at a time and a forward pass in float64."""

import copy
import math
from functools import wraps

import numpy as np
import pytest
import torch
from builtin_models import llava, text_config
from family_models import build
from family_table import BOS, EOS, FAMILIES, ID
from PIL import Image
from transformers import Qwen2ForCausalLM
from vat_oracle import KeepFloat64

from cdistill.builtin.dataset import build_tokenizer
from cdistill.data.samples import BadSampleError
from cdistill.eval.contract import Question
from cdistill.eval.inference import Inference, common_beginning
from cdistill.eval.prompts import Prompts
from cdistill.models.processor import build_processor

TEMPLATE = """\
{%- for message in messages -%}
    {%- if message.role == "user" -%}
        {{- "w0 " -}}
        {%- for part in message.content -%}{{- "MARK " if part.type == "image" else part.text ~ " " -}}{%- endfor -%}
        {{- "w1 " -}}
    {%- else -%}
        {%- generation -%}
            {%- for part in message.content -%}{{- part.text -}}{%- endfor -%}{{- " </s>" -}}
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}"""
HYBRID = ("llava_lfm2", "qwen3_5")
TOKENS = 6


class Case:
    """A tiny model of a family, its processor, and three questions of different lengths about each of two images."""

    def __init__(self, family, side="right", several=False):
        self.model = build(family, 0)
        self.processor = FAMILIES[family].processor()
        self.processor.chat_template = TEMPLATE.replace("MARK", FAMILIES[family].placeholder)
        self.processor.tokenizer.padding_side = side
        rng = np.random.default_rng(1)

        def words(count):
            return " ".join(f"w{i}" for i in rng.integers(2, 30, count))

        images = [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in FAMILIES[family].images]
        sets = [images, images[:1]] if several else [[image] for image in images]
        self.asked = []
        for i, shown in enumerate(sets):
            names = tuple(f"{i}/{j}" for j in range(len(shown)))
            for length in (7, 3, 5):
                said = words(1 + length // 3)
                question = Question(f"{i} {length}", words(length), names, "log_likelihood", said, TOKENS)
                self.asked.append((question, shown))
        self.prompts = Prompts(self.processor)
        self.encoded = [
            p for shown in sets for p in self.prompts.about([q for q, s in self.asked if s is shown], shown)
        ]

    def alone(self, question, images):
        """What transformers makes of the question by itself."""
        parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question.prompt}]
        chat = [{"role": "user", "content": parts}]
        return self.processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )

    def replies(self):
        """transformers' own, one by one."""
        replies = []
        for question, images in self.asked:
            inputs = self.alone(question, images)
            made = self.model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
            replies.append(made[0, inputs["input_ids"].shape[1] :].tolist())
        return replies

    def texts(self, replies, ended):
        """Of replies, without the token that ended them."""
        said = [ids[: len(ids) - end] for ids, end in zip(replies, ended, strict=True)]
        return [self.processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in said]

    def log_likelihoods(self, dtype):
        """By one unpadded forward pass each, without a cache."""
        model, sums = copy.deepcopy(self.model).to(dtype), []
        for question, images in self.asked:
            inputs = self.alone(question, images)
            said = torch.tensor([[ID[word] for word in question.continuation.split()]])
            for name, value in inputs.items():
                if name == "input_ids":
                    inputs[name] = torch.cat((value, said), 1)
                elif name in ("attention_mask", "mm_token_type_ids"):
                    inputs[name] = torch.cat((value, torch.full_like(said, int(name == "attention_mask"))), 1)
                elif value.is_floating_point():
                    inputs[name] = value.to(dtype)
            with torch.no_grad(), KeepFloat64():
                logits = model(**inputs, use_cache=False).logits[0, -said.shape[1] - 1 : -1]
            sums.append(float(logits.log_softmax(-1).gather(1, said.T).sum()))
        return torch.tensor(sums, dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_answers_in_batches_as_it_does_alone(family):
    case = Case(family, "left" if len(family) % 2 else "right", several=family == "qwen2_vl")
    expected = case.replies()
    case.model.generation_config.eos_token_id = [
        EOS,
        max(expected, key=len)[2],
    ]  # so that some replies end before others
    expected = case.replies()
    inference = Inference(case.model, case.prompts)
    assert inference.find_way() == ("padded" if family in HYBRID else "shared")
    passes = inference.passes
    replies = inference.generate(case.encoded)
    ended = [x[-1] in case.model.generation_config.eos_token_id for x in expected]
    assert [r.text for r in replies] == case.texts(expected, ended)
    assert [r.cut for r in replies] == [not end for end in ended] and True in ended
    assert [r.tokens for r in replies] == [len(x) - end for x, end in zip(expected, ended, strict=True)]
    steps = max(map(len, expected))
    assert inference.passes - passes == steps + (family not in HYBRID)  # one for all beginnings
    exact, rounded = case.log_likelihoods(torch.float64), case.log_likelihoods(torch.float32)
    ours = torch.tensor(inference.log_likelihoods(case.encoded), dtype=torch.float64)
    allowed = 2 * (rounded - exact).abs().max() + 1e-5 * exact.abs().max()
    assert (ours - exact).abs().max() <= allowed


def test_images_are_encoded_once_for_all_questions_about_them():
    case, shown = Case("llava_qwen2"), []
    case.model.model.vision_tower.register_forward_hook(lambda module, args, out: shown.append(len(out[0])))
    inference = Inference(case.model, case.prompts)
    inference._worth = 1.0  # four visual tokens are hardly worth it
    inference.log_likelihoods(case.encoded)
    assert shown == [2]
    inference.generate(case.encoded)
    assert shown == [2, 2]


def test_what_a_penalty_for_repetition_sees_is_the_prompt_without_its_padding():
    case = Case("llava_llama")
    case.model.generation_config.repetition_penalty = 1.7
    stop = max(case.replies(), key=len)[3]
    case.model.generation_config.pad_token_id, case.model.generation_config.eos_token_id = stop, [stop, EOS]
    expected = case.replies()
    for way in ("shared", "padded", "equal"):
        replies = Inference(case.model, case.prompts, way).generate(case.encoded)
        assert [r.text for r in replies] == case.texts(expected, [x[-1] in (stop, EOS) for x in expected])


def test_sampling_that_a_checkpoint_asks_for_is_not_done():
    case = Case("llava_llama")
    expected = Inference(case.model, case.prompts).generate(case.encoded)
    case.model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, num_beams=2, max_length=20)
    assert Inference(case.model, case.prompts).generate(case.encoded) == expected


def test_the_token_that_the_template_closes_answers_with_ends_a_reply():
    case = Case("llava_llama")
    replies = Inference(case.model, case.prompts).generate(case.encoded)
    first = replies[0].text.split()[1]
    case.model.generation_config.eos_token_id = None
    case.processor.chat_template = case.processor.chat_template.replace("</s>", "<s>")
    head = case.model.lm_head.weight.data
    head[[BOS, ID[first]]] = head[[ID[first], BOS]]
    inference = Inference(case.model, Prompts(case.processor))
    assert inference.stops == [BOS]
    reply = inference.generate(case.encoded)[0]
    assert (reply.text, reply.tokens, reply.cut) == (replies[0].text.split()[0], 1, False)


@pytest.mark.parametrize(("ignored", "way"), [("attention_mask", "equal"), ("position_ids", "padded")])
def test_a_model_that_ignores_what_batches_need_gets_batches_that_do_without(monkeypatch, ignored, way):
    case = Case("llava_qwen2")
    alone = Inference(case.model, case.prompts, "equal")
    expected = [(alone.generate([p])[0].text, alone.log_likelihoods([p])[0]) for p in case.encoded]
    forward = type(case.model).forward

    @wraps(forward)
    def deaf(self, *args, attention_mask=None, position_ids=None, logits_to_keep=0, **kwargs):
        known = {"attention_mask": attention_mask, "position_ids": position_ids}
        known[ignored] = None
        return forward(self, *args, logits_to_keep=logits_to_keep, **known, **kwargs)

    monkeypatch.setattr(type(case.model), "forward", deaf)
    inference = Inference(case.model, case.prompts)
    assert inference.find_way() == way
    assert [reply.text for reply in inference.generate(case.encoded)] == [text for text, _ in expected]
    assert inference.log_likelihoods(case.encoded) == pytest.approx([x for _, x in expected], abs=1e-4)


def text_prompts(questions):
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(text_config()).eval()
    prompts = Prompts(build_tokenizer())
    return model, prompts, prompts.about(questions, [])


def test_a_language_model_answers_questions_without_images():
    kinds = [("log_likelihood", "red ring"), ("probability", "yes"), ("probability", "no"), ("generate", "")]
    model, prompts, encoded = text_prompts(
        [Question(str(i), "is there a red ring", (), kind, said, 4) for i, (kind, said) in enumerate(kinds)]
    )
    inference = Inference(model, prompts)
    assert inference.find_way() == "shared"
    vocabulary = prompts.tokenizer.get_vocab()
    ids = prompts.tokenizer("USER: is there a red ring ASSISTANT:", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logs = model(ids).logits[0, -1].double().log_softmax(-1)
        red = torch.cat((ids, torch.tensor([[vocabulary["red"]]])), 1)
        after = model(red).logits[0, -1].double().log_softmax(-1)
    wanted = [logs[vocabulary["red"]] + after[vocabulary["ring"]], logs[vocabulary["yes"]], logs[vocabulary["no"]]]
    assert inference.log_likelihoods(encoded[:3]) == pytest.approx([float(x) for x in wanted], abs=1e-5)
    assert sum(math.exp(x) for x in inference.log_likelihoods(encoded[1:3])) <= 1.0
    made = model.generate(ids, do_sample=False, max_new_tokens=4)[0, ids.shape[1] :]
    assert inference.generate(encoded[3:])[0].text == prompts.tokenizer.decode(made, skip_special_tokens=True)


def test_what_greedy_decoding_begins_with_is_what_forced_tokens_say():
    model, prompts, encoded = text_prompts([Question("a", "is there a red ring", (), "log_likelihood", "red ring yes")])
    said = Inference(model, prompts).forced(encoded)[0]
    free = model.generate(torch.tensor([encoded[0].ids]), do_sample=False, max_new_tokens=3)[0, len(encoded[0].ids) :]
    assert said[0] == free[0]


def test_beginnings_are_shared_up_to_where_questions_part_but_never_within_images():
    case = Case("qwen2_vl")
    one, other = case.encoded[:2]
    assert one.ids[: one.shown] == other.ids[: one.shown] and one.ids[one.shown - 1] == ID["<|image_pad|>"]
    assert common_beginning([one, other]) == one.shown + 1  # the mark that ends an image
    assert common_beginning([one]) == len(one.ids) - 1
    assert common_beginning([one, case.encoded[3]]) == 0  # another image


def test_a_model_without_a_chat_template_is_refused():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"^model: it has no chat template.*chat_template\.jinja"):
        Prompts(tokenizer)


def test_questions_that_cannot_be_written_are_named():
    prompts = Prompts(build_tokenizer())
    with pytest.raises(ValueError, match=r"^question 'q1': "):
        prompts.about([Question("q1", "is there", (), "log_likelihood", "")], [])
    with pytest.raises(ValueError, match=r"no image processor, and question 'q2' shows an image"):
        prompts.about([Question("q2", "is there", ("a.png",))], [Image.new("RGB", (8, 8))])
    model = llava()
    seeing = Prompts(build_processor(model.config, build_tokenizer(), "model"))
    with pytest.raises(ValueError, match=r"^question 'q3': mark in the text"):
        seeing.about([Question("q3", "is <image> there", ("a.png",))], [Image.new("RGB", (8, 8))])
    assert issubclass(BadSampleError, ValueError)


def test_a_template_that_labels_cannot_be_learned_from_still_asks():
    processor = FAMILIES["llava_llama"].processor()
    processor.chat_template = (  # the generation prompt is not what stands before an answer
        "{%- for m in messages -%}{%- for part in m.content -%}{{- '<image> ' if part.type == 'image' else part.text ~ ' ' -}}"
        "{%- endfor -%}{%- endfor -%}{%- if add_generation_prompt -%}{{- 'w7 ' -}}{%- endif -%}"
    )
    prompts = Prompts(processor)
    image = Image.new("RGB", (8, 8))
    (prompt,) = prompts.about([Question("q", "w2 w3", ("a.png",), "log_likelihood", "w4 w5")], [image])
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "w2 w3"}]}]
    whole = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert prompt.ids == whole["input_ids"][0] and prompt.continuation == [ID["w4"], ID["w5"]]
