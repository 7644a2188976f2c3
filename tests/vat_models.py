"""Tiny random Llava models and padded batches for the tests of visual attention alignment."""

import torch
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from cdistill.vat import SliceRecorder, token_regions

IMAGE, VOCABULARY, PATCHES = 60, 64, 4
STUDENT_LAYERS, TEACHER_LAYERS = 4, 7


def tiny_llava(seed, family, layers, width, heads, kv_heads, **options):
    """A random Llava whose attention is far from uniform; SigLIP of 4 patches."""
    text = {"qwen2": Qwen2Config, "llama": LlamaConfig}[family](
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        initializer_range=0.25,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config).eval()


def student_and_teacher(family="qwen2", teacher_heads=4, **options):
    student = tiny_llava(0, family, STUDENT_LAYERS, 32, 2, 1, **options)
    return student, tiny_llava(1, family, TEACHER_LAYERS, 16 * teacher_heads, teacher_heads, teacher_heads // 2)


def draw_batch(seed, padding="right"):
    """Four samples: one image, none, two images, and one image with a short answer; padded to the longest."""
    generator = torch.Generator().manual_seed(seed)

    def words(n):
        return torch.randint(3, IMAGE, (n,), generator=generator).tolist()

    image = [IMAGE] * PATCHES
    prompts = [words(2) + image + words(3), words(6), words(1) + image + words(2) + image + words(3), image + words(2)]
    samples = [(prompt, words(n)) for prompt, n in zip(prompts, (4, 3, 5, 1), strict=True)]
    longest = max(len(prompt) + len(answer) for prompt, answer in samples)
    ids, labels, mask = [], [], []
    for prompt, answer in samples:
        gap = longest - len(prompt) - len(answer)
        left, right = (gap, 0) if padding == "left" else (0, gap)
        ids.append([0] * left + prompt + answer + [0] * right)
        labels.append([-100] * (left + len(prompt)) + answer + [-100] * right)
        mask.append([0] * left + [1] * (longest - gap) + [0] * right)
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "attention_mask": torch.tensor(mask),
        "pixel_values": torch.randn(4, 3, 8, 8, generator=generator),
    }


def inputs(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def regions_of(batch, rows="answer"):
    return token_regions(
        batch["input_ids"], batch["labels"], batch["attention_mask"], visual_token_ids=IMAGE, rows=rows
    )


def vat_loss(student, teacher, batch, vat):
    """L_vat by the hook."""
    regions = vat.regions(batch["input_ids"], batch["labels"], batch["attention_mask"], visual_token_ids=IMAGE)
    targets = vat.teacher(regions, batch["attention_mask"])
    with torch.no_grad():
        teacher(**inputs(batch), cdistill_vat=targets)
    alignment = vat.student(regions, targets.targets, batch["attention_mask"])
    student(**inputs(batch), cdistill_vat=alignment)
    return alignment


def gradients(model):
    """Gradients that are not zero, by parameter."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def record_everything(model, batch, **forward):
    """The recorder of layer 1, after a pass of the model."""
    recorder = SliceRecorder([1], regions_of(batch), key_mask=batch["attention_mask"], impl="torch")
    model(**(inputs(batch) | forward), cdistill_vat=recorder)
    return recorder
