"""Configurations, processors and documented token layouts of the model families; see family_models.py for what uses them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

PAD, BOS, EOS = 0, 1, 2
WORDS = 30

_NAMED = {
    "image_token": "<image>",
    "video_token": "<video>",
    "context_image_token": "<IMG_CONTEXT>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "qwen_image_token": "<|image_pad|>",
    "qwen_video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
} | {f"tile_{r}_{c}": f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)}
_TOKENS = ["<pad>", "<s>", "</s>", "<unk>", *_NAMED.values(), *(f"w{i}" for i in range(WORDS))]
ID = {token: i for i, token in enumerate(_TOKENS)}
VOCABULARY = len(_TOKENS)

PATCH, SIDE = 4, 8  # of the CLIP-like towers: 2 x 2 patches
_SMALL = {"image_size": SIDE, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, 2 * SIDE]]

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Family:
    """How to build one family's models and lay out its batches; in layouts ``v`` is a visual token and ``t`` is not."""

    config: Callable[[Any], Any]  # of the text configuration
    model: str  # class name in transformers
    text: str  # class name of the text configuration
    processor: Callable[[], Any]
    images: dict[Size, str]  # what an image of this size becomes
    several: dict[Size, str] | None = None  # the same where a sample holds several images
    placeholder: str = "<image>"
    video: Callable[[torch.Generator], tuple[str, dict[str, torch.Tensor]]] | None = None  # text and tensors
    video_layout: str = ""
    tiled: tuple[str, ...] = ()  # tensors whose second dimension is padded to the longest of the batch
    every_sample: bool = False  # whether those have an entry for samples without images, too
    text_options: tuple[tuple[str, Any], ...] = ()
    layer_types: tuple[str, ...] = ()  # of hybrid text models, repeated over the layers

    def attention_layers(self, layers: int) -> tuple[int, ...]:
        """Layers with softmax attention among the first ``layers``."""
        kinds = self.layer_types or ("full_attention",)
        return tuple(i for i in range(layers) if kinds[i % len(kinds)] == "full_attention")


def tokenizer(**named: str) -> PreTrainedTokenizerFast:
    """Words w0, w1, ... and the marks of all families."""
    words = Tokenizer(models.WordLevel(dict(ID), unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(_NAMED.values()),
        **({"extra_special_tokens": named} if named else {}),
    )


def _named(*names: str) -> dict[str, str]:
    return {name: _NAMED[name] for name in names}


def _siglip() -> Any:
    return transformers.SiglipVisionConfig(**_SMALL, patch_size=PATCH, num_attention_heads=2, vision_use_head=False)


def _llava(text: Any) -> Any:
    return transformers.LlavaConfig(
        vision_config=_siglip(),
        text_config=text,
        image_token_index=ID["<image>"],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )


def _llava_next(text: Any) -> Any:
    return transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**_SMALL, patch_size=PATCH, num_attention_heads=2),
        text_config=text,
        image_token_index=ID["<image>"],
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS,
    )


def _llava_onevision(text: Any) -> Any:
    return transformers.LlavaOnevisionConfig(
        vision_config=_siglip(),
        text_config=text,
        image_token_index=ID["<image>"],
        video_token_index=ID["<video>"],
        image_grid_pinpoints=PINPOINTS,
    )


def _internvl(text: Any) -> Any:
    vision = transformers.InternVLVisionConfig(**_SMALL, patch_size=2, num_attention_heads=2)
    return transformers.InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=ID["<IMG_CONTEXT>"],
        image_seq_length=4,
        tie_word_embeddings=False,
    )


def _idefics(name: str) -> Callable[[Any], Any]:
    def config(text: Any) -> Any:
        vision = getattr(transformers, f"{name}VisionConfig")(**_SMALL, patch_size=2, num_attention_heads=2)
        return getattr(transformers, f"{name}Config")(
            vision_config=vision, text_config=text, image_token_id=ID["<image>"], scale_factor=2, pad_token_id=PAD
        )

    return config


def _qwen_vl(name: str, **vision: Any) -> Callable[[Any], Any]:
    def config(text: Any) -> Any:
        make = getattr(transformers, f"{name}Config")
        return make(
            text_config=text.to_dict(),
            vision_config={
                "depth": 1,
                "num_heads": 2,
                "patch_size": PATCH,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "initializer_range": 0.25,
                **{key: text.hidden_size if value is None else value for key, value in vision.items()},
            },
            image_token_id=ID["<|image_pad|>"],
            video_token_id=ID["<|video_pad|>"],
            vision_start_token_id=ID["<|vision_start|>"],
            vision_end_token_id=ID["<|vision_end|>"],
        )

    return config


def _processor(name: str, images: Any, words: Any, **options: Any) -> Any:
    """The processor of this class name for images and text: video processors need torchvision."""

    class WithoutVideos(getattr(transformers, f"{name}Processor")):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
            """Accept that there is no video processor."""

    return WithoutVideos(images, words, **options)


def _llava_processor() -> Any:
    images = LlavaImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    words = tokenizer(**_named("image_token"))
    return transformers.LlavaProcessor(images, words, patch_size=PATCH, vision_feature_select_strategy="full")


def _llava_next_processor() -> Any:
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    return transformers.LlavaNextProcessor(
        LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=PINPOINTS),
        tokenizer(**_named("image_token")),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _llava_onevision_processor() -> Any:
    images = LlavaOnevisionImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS)
    return _processor(
        "LlavaOnevision",
        images,
        tokenizer(**_named("image_token", "video_token")),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
    )


def _internvl_processor() -> Any:
    images = GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=3)
    words = tokenizer(**_named("context_image_token", "start_image_token", "end_image_token", "video_token"))
    return _processor("InternVL", images, words, image_seq_length=4)


def _idefics3_processor() -> Any:
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    return transformers.Idefics3Processor(images, tokenizer(), image_seq_len=4)


def _qwen_processor(name: str) -> Callable[[], Any]:
    def processor() -> Any:
        images = Qwen2VLImageProcessorPil(
            patch_size=PATCH,
            merge_size=2,
            temporal_patch_size=2,
            size={"shortest_edge": SIDE * SIDE, "longest_edge": 64 * SIDE * SIDE},
        )
        return _processor(name, images, tokenizer())

    return processor


# Videos are laid out here.


def _frames(generator: torch.Generator, count: int) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=generator)


def _llava_onevision_video(generator: torch.Generator) -> tuple[str, dict[str, torch.Tensor]]:
    # a frame of 2 x 2 patches is pooled to one token; one newline ends the video
    return "<video>" * 4, {"pixel_values_videos": _frames(generator, 3)[None]}


def _internvl_video(generator: torch.Generator) -> tuple[str, dict[str, torch.Tensor]]:
    text = "\n".join(f"Frame{i}: <img>{'<IMG_CONTEXT>' * 4}</img>" for i in (1, 2))
    return text, {"pixel_values": _frames(generator, 2)}


def _idefics_video(generator: torch.Generator) -> tuple[str, dict[str, torch.Tensor]]:
    fake = "<fake_token_around_image>"
    text = "".join(f"Frame from 00:0{i}: {fake}<global-img>{'<image>' * 4}{fake}\n" for i in (0, 1))
    pixels = _frames(generator, 2)[None]
    return text, {"pixel_values": pixels, "pixel_attention_mask": torch.ones(1, 2, SIDE, SIDE, dtype=torch.long)}


def _qwen_patches(generator: torch.Generator) -> dict[str, torch.Tensor]:
    grid = torch.tensor([[2, 4, 4]])
    patches = torch.randn(int(grid.prod()), 3 * 2 * PATCH * PATCH, generator=generator)
    return {"pixel_values_videos": patches, "video_grid_thw": grid}


def _qwen2_video(generator: torch.Generator) -> tuple[str, dict[str, torch.Tensor]]:
    return f"<|vision_start|>{'<|video_pad|>' * 8}<|vision_end|>", _qwen_patches(generator)


def _qwen3_video(generator: torch.Generator) -> tuple[str, dict[str, torch.Tensor]]:
    frame = f"<|vision_start|>{'<|video_pad|>' * 4}<|vision_end|>"
    return f"<0.3 seconds>{frame}<1.3 seconds>{frame}", _qwen_patches(generator)


# An image twice as wide as high becomes 2 x 4 patches; one of half the width is padded to a square, whose patches that
# hold padding alone are left out again: 4 x 2. One newline ends each row, and 2 x 2 patches of the whole image precede.
_ANYRES = {(8, 16): "v" * (2 * 4 + 2 + 4), (20, 10): "v" * (4 * 2 + 4 + 4)}
# Images are enlarged to 16 pixels and cut into tiles of 8 x 8 (4 tokens each, after two marks), then the whole image.
_TILE = "tt" + "v" * 4
_IDEFICS_IMAGES = {(4, 8): 2 * _TILE + _TILE + "t", (8, 8): 4 * _TILE + _TILE + "t"}
_IDEFICS: dict[str, Any] = {
    "text": "LlamaConfig",
    "images": _IDEFICS_IMAGES,
    "processor": _idefics3_processor,
    "tiled": ("pixel_values", "pixel_attention_mask"),
    "every_sample": True,
}
_QWEN_IMAGES = {(16, 24): "t" + "v" * 6 + "t", (16, 16): "t" + "v" * 4 + "t"}
_QWEN: dict[str, Any] = {
    "images": _QWEN_IMAGES,
    "placeholder": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": _qwen2_video,
    "video_layout": "t" + "v" * 8 + "t",
}
# A video's frames are marked one by one, each after its time.
_QWEN3: dict[str, Any] = _QWEN | {"video": _qwen3_video, "video_layout": 2 * ("ttt" + "v" * 4 + "t")}
_LLAVA: dict[str, Any] = {
    "config": _llava,
    "model": "LlavaForConditionalGeneration",
    "processor": _llava_processor,
    "images": {(8, 8): "v" * 4, (8, 16): "v" * 4},
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}

FAMILIES: dict[str, Family] = {
    "llava_llama": Family(**_LLAVA, text="LlamaConfig"),
    "llava_qwen2": Family(**_LLAVA, text="Qwen2Config"),
    "llava_qwen3": Family(**_LLAVA, text="Qwen3Config"),
    "llava_next": Family(
        _llava_next,
        "LlavaNextForConditionalGeneration",
        "LlamaConfig",
        _llava_next_processor,
        _ANYRES,
        tiled=("pixel_values",),
    ),
    "llava_onevision": Family(
        _llava_onevision,
        "LlavaOnevisionForConditionalGeneration",
        "Qwen2Config",
        _llava_onevision_processor,
        _ANYRES,
        # among others, an image is not cut into tiles: 2 x 2 patches and a newline
        several=dict.fromkeys(_ANYRES, "v" * 5),
        video=_llava_onevision_video,
        video_layout="v" * 4,
        tiled=("pixel_values",),
    ),
    "internvl": Family(
        _internvl,
        "InternVLForConditionalGeneration",
        "Qwen2Config",
        _internvl_processor,
        # tiles of 8 x 8 pixels become 4 tokens; where there are several, the whole image follows
        {(8, 16): "t" + "v" * 4 * (2 + 1) + "t", (8, 8): "t" + "v" * 4 + "t"},
        placeholder="<IMG_CONTEXT>",
        video=_internvl_video,
        video_layout=2 * ("t" + "t" + "v" * 4 + "t"),
    ),
    "idefics3": Family(config=_idefics("Idefics3"), model="Idefics3ForConditionalGeneration", **_IDEFICS),
    "smolvlm": Family(
        config=_idefics("SmolVLM"),
        model="SmolVLMForConditionalGeneration",
        **_IDEFICS,
        video=_idefics_video,
        video_layout=2 * ("ttt" + _TILE + "t"),
    ),
    "qwen2_vl": Family(
        _qwen_vl("Qwen2VL", embed_dim=32, hidden_size=None),
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLTextConfig",
        _qwen_processor("Qwen2VL"),
        **_QWEN,
        text_options=(("rope_parameters", _MROPE),),
    ),
    "qwen2_5_vl": Family(
        _qwen_vl(
            "Qwen2_5_VL",
            hidden_size=32,
            intermediate_size=32,
            out_hidden_size=None,
            window_size=16,
            fullatt_block_indexes=[0],
        ),
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLTextConfig",
        _qwen_processor("Qwen2_5_VL"),
        **_QWEN,
        text_options=(("rope_parameters", _MROPE),),
    ),
    "qwen3_vl": Family(
        _qwen_vl(
            "Qwen3VL",
            hidden_size=32,
            intermediate_size=32,
            out_hidden_size=None,
            num_position_embeddings=16,
            deepstack_visual_indexes=[0],
        ),
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLTextConfig",
        _qwen_processor("Qwen3VL"),
        **_QWEN3,
        text_options=(
            ("head_dim", 16),
            ("rope_parameters", _MROPE | {"mrope_section": [4, 2, 2], "mrope_interleaved": True}),
        ),
    ),
    # hybrid text models: not every layer has an attention matrix
    "llava_lfm2": Family(
        **_LLAVA, text="Lfm2Config", layer_types=("conv", "full_attention", "full_attention", "conv", "full_attention")
    ),
    "qwen3_5": Family(
        _qwen_vl("Qwen3_5", hidden_size=32, intermediate_size=32, out_hidden_size=None, num_position_embeddings=16),
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5TextConfig",
        _qwen_processor("Qwen3VL"),
        **_QWEN3,
        text_options=(
            ("head_dim", 16),
            ("rope_parameters", _MROPE | {"mrope_section": [4, 2, 2], "mrope_interleaved": True}),
            ("partial_rotary_factor", 1.0),
            ("linear_key_head_dim", 16),
            ("linear_value_head_dim", 16),
            ("linear_num_key_heads", 2),
            ("linear_num_value_heads", 2),
        ),
        layer_types=("linear_attention", "full_attention", "full_attention"),
    ),
}
