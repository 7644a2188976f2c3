"""Tiny models to export, and what two conversations with images are to them."""

import random

import numpy as np
import torch
from builtin_models import VISION, llava, text_config
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, SiglipVisionConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cdistill.builtin.dataset import ASSISTANT, EOS, NUM_VISUAL_TOKENS, USER, build_tokenizer
from cdistill.builtin.render import render, to_image
from cdistill.builtin.scenes import sample_scene
from cdistill.data.samples import IMAGE_TOKEN
from cdistill.models import compose
from cdistill.models.load import load_model

TEACHER = {"hidden_size": 64, "num_attention_heads": 4}
QUESTIONS = ("how many ring ?", "is there a green circle ?")


def images():
    for seed in (1, 2, 3):
        yield render(sample_scene(random.Random(seed)), np.random.default_rng(seed))


def chats():
    """Messages of two conversations, the first with two images in one question, the second with two questions about one."""
    first, second, third = ({"type": "image", "image": to_image(pixels)} for pixels in images())
    words = [{"type": "text", "text": question} for question in QUESTIONS]
    return [
        [{"role": "user", "content": [first, second, words[0]]}],
        [
            {"role": "user", "content": [third, words[0]]},
            {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
            {"role": "user", "content": [words[1]]},
        ],
    ]


def batch():
    """What `chats` are to the model, made without a processor: padded on the left, pixels of 8 bits."""
    image = " ".join([IMAGE_TOKEN] * NUM_VISUAL_TOKENS)
    texts = (
        f"{USER} {image} {image} {QUESTIONS[0]} {ASSISTANT}",
        f"{USER} {image} {QUESTIONS[0]} {ASSISTANT} two {EOS} {USER} {QUESTIONS[1]} {ASSISTANT}",
    )
    vocabulary = build_tokenizer().get_vocab()
    rows = [[vocabulary[word] for word in text.split()] for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([[vocabulary["<pad>"]] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    pixels = np.stack([np.asarray(to_image(p), dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1.0 for p in images()])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.from_numpy(pixels)}


def text_chats():
    return [[{"role": "user", "content": "r1 c1 red ring " + question}] for question in ("what ?", QUESTIONS[1])]


def text_batch():
    chats = [f"{USER} {chat[0]['content']} {ASSISTANT}" for chat in text_chats()]
    return dict(build_tokenizer()(chats, return_tensors="pt", padding=True, padding_side="left"))


def taf_student(*, width=64, activation="linear", seed=7):
    """A TAF student of width 32 whose map is far from what its random start was."""
    torch.manual_seed(seed)
    teacher = llava(**(TEACHER | {"hidden_size": width}))
    vision, text = SiglipVisionConfig(**VISION), text_config()
    image_token_id = build_tokenizer().convert_tokens_to_ids(IMAGE_TOKEN)
    student = compose(
        vision,
        text,
        image_token_id=image_token_id,
        image_seq_length=NUM_VISUAL_TOKENS,
        teacher=teacher,
        taf_activation=activation,
    )
    for p in student.model.multi_modal_projector.parameters():
        nn.init.normal_(p, std=0.3)
    return student.eval()


def save(model, folder):
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def add_lora(base, folder, targets=("q_proj", "v_proj", "map")):
    """A LoRA adapter that changes a model, in a folder; returns the model with it, not merged."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), init_lora_weights=False)
    adapted = get_peft_model(load_model(base), config)
    adapted.save_pretrained(folder)
    return adapted.eval()


def qwen2_vl(folder):
    """A model of a family that is no composition of ours, with the processor files transformers gives it."""
    tokenizer = build_tokenizer()
    marks = ("image_pad", "video_pad", "vision_start", "vision_end")
    tokenizer.add_special_tokens({"extra_special_tokens": [f"<|{mark}|>" for mark in marks]})
    ids = dict(zip(marks, tokenizer.convert_tokens_to_ids([f"<|{mark}|>" for mark in marks]), strict=True))
    text = text_config(vocab_size=len(tokenizer)).to_dict()
    text = {name: value for name, value in text.items() if name not in ("model_type", "layer_types", "architectures")}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = Qwen2VLConfig(
        text_config=text | {"rope_parameters": rope},
        vision_config={"depth": 2, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2, "patch_size": 8},
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )
    torch.manual_seed(5)
    model = Qwen2VLForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = Qwen2VLImageProcessorPil(patch_size=8, min_pixels=256, max_pixels=4096)
    processor.save_pretrained(folder)
    pixels = processor(to_image(next(images())), return_tensors="pt")
    count = int(pixels["image_grid_thw"].prod()) // 4
    ids = [3, ids["vision_start"], *[ids["image_pad"]] * count, ids["vision_end"], 10, 4]
    inputs = {"input_ids": torch.tensor([ids]), "mm_token_type_ids": torch.tensor([ids]) == config.image_token_id}
    return model, inputs | {"mm_token_type_ids": inputs["mm_token_type_ids"].int()} | dict(pixels)
