"""Small random checkpoints as projects publish them: their names, fields and files, written out here by hand."""

import json
import shutil

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast, SiglipImageProcessor
from transformers.convert_slow_tokenizer import import_protobuf

SENTENCES = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions. USER: What is this? ASSISTANT: A red ring. [INST] [/INST] Answer the questions.",
) * 2
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 1, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 512}
TEXT |= {"rope_theta": 5000.0, "tie_word_embeddings": False, "use_cache": True, "initializer_range": 0.02}
CLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
CLIP |= {"image_size": 28, "patch_size": 14, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 8}
SIGLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
SIGLIP |= {"image_size": 28, "patch_size": 7, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
CLIP_NAME, SIGLIP_NAME = "openai/clip-vit-large-patch14-28", "google/siglip-so400m-patch7-28"


def make_tokenizer(kind):
    """Byte-level; ``llama`` puts a BOS before every text and has no spare rows, ``qwen2`` neither."""
    marks = {"llama": ["<unk>", "<s>", "</s>"], "qwen2": []}[kind]
    backend = Tokenizer(models.BPE())
    split = Regex(r" ?\w+| ?[^\s\w]+|\s")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False, special_tokens=marks)
    backend.train_from_iterator(SENTENCES, trainer)
    if kind == "llama":
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
        )
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    made.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return made


class Draw:
    """Random tensors by name, all of one number format."""

    def __init__(self, seed, dtype=torch.float16):
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype
        self.made = {}

    def normal(self, name, *shape, scale=0.3, mean=0.0):
        self.made[name] = (mean + scale * torch.randn(shape, generator=self.generator)).to(self.dtype)

    def linear(self, name, outer, inner, bias=True):
        self.normal(f"{name}.weight", outer, inner)
        if bias:
            self.normal(f"{name}.bias", outer)

    def norm(self, name, width, bias=False):
        self.normal(f"{name}.weight", width, scale=0.1, mean=1.0)
        if bias:
            self.normal(f"{name}.bias", width, scale=0.1)


def draw_language(draw, rows, kind, prefix="", config=TEXT):
    """A causal language model, with ``model.`` and ``lm_head`` behind the prefix."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    wide = width // config["num_attention_heads"] * config["num_key_value_heads"]
    draw.normal(f"{prefix}model.embed_tokens.weight", rows, width)
    for i in range(config["num_hidden_layers"]):
        at = f"{prefix}model.layers.{i}"
        for name, size in (("q", width), ("k", wide), ("v", wide)):
            draw.linear(f"{at}.self_attn.{name}_proj", size, width, bias=kind == "qwen2")
        draw.linear(f"{at}.self_attn.o_proj", width, width, bias=False)
        for name in ("gate", "up"):
            draw.linear(f"{at}.mlp.{name}_proj", inner, width, bias=False)
        draw.linear(f"{at}.mlp.down_proj", width, inner, bias=False)
        draw.norm(f"{at}.input_layernorm", width)
        draw.norm(f"{at}.post_attention_layernorm", width)
    draw.norm(f"{prefix}model.norm", width)
    draw.linear(f"{prefix}lm_head", rows, width, bias=False)


def draw_tower(draw, kind, prefix, *, head=False):
    """A CLIP or SigLIP encoder, with ``embeddings``, ``encoder`` and more behind the prefix."""
    config = CLIP if kind == "clip" else SIGLIP
    width, inner, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    positions = (config["image_size"] // patch) ** 2 + (kind == "clip")
    if kind == "clip":
        draw.normal(f"{prefix}embeddings.class_embedding", width)
        draw.norm(f"{prefix}pre_layrnorm", width, bias=True)
    else:
        draw.normal(f"{prefix}embeddings.patch_embedding.bias", width)
    draw.normal(f"{prefix}embeddings.patch_embedding.weight", width, 3, patch, patch)
    draw.normal(f"{prefix}embeddings.position_embedding.weight", positions, width)
    for i in range(config["num_hidden_layers"]):
        at = f"{prefix}encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            draw.linear(f"{at}.self_attn.{name}", width, width)
        draw.linear(f"{at}.mlp.fc1", inner, width)
        draw.linear(f"{at}.mlp.fc2", width, inner)
        draw.norm(f"{at}.layer_norm1", width, bias=True)
        draw.norm(f"{at}.layer_norm2", width, bias=True)
    draw.norm(f"{prefix}post_layernorm", width, bias=True)
    if head:
        draw.normal(f"{prefix}head.probe", 1, 1, width)
        draw.normal(f"{prefix}head.attention.in_proj_weight", 3 * width, width)
        draw.normal(f"{prefix}head.attention.in_proj_bias", 3 * width)
        draw.linear(f"{prefix}head.attention.out_proj", width, width)
        draw.norm(f"{prefix}head.layernorm", width, bias=True)
        draw.linear(f"{prefix}head.mlp.fc1", inner, width)
        draw.linear(f"{prefix}head.mlp.fc2", width, inner)


def write_weights(weights, folder, form):
    """As ``safetensors`` or ``bin``, in one file or, with `` shards`` behind it, in two with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    kind, _, shards = form.partition(" ")
    suffix, stem = ("safetensors", "model") if kind == "safetensors" else ("bin", "pytorch_model")
    names = sorted(weights)
    parts = [names[::2], names[1::2]] if shards else [names]
    index = {}
    for i, part in enumerate(parts, 1):
        file = f"{stem}-{i:05}-of-{len(parts):05}.{suffix}" if shards else f"{stem}.{suffix}"
        held = {name: weights[name] for name in part}
        if suffix == "bin":
            torch.save(held, folder / file)
        else:
            save_file(held, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    if shards:
        size = sum(weight.numel() * weight.element_size() for weight in weights.values())
        write_json(folder / f"{stem}.{suffix}.index.json", {"metadata": {"total_size": size}, "weight_map": index})


def write_json(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")


def change_json(path, **values):
    write_json(path, json.loads(path.read_text()) | values)


def tower(folder, kind="clip", *, form="bin", with_text=True):
    """A vision encoder's own folder, as OpenAI's CLIP lies on the hub: a text encoder beside it, fp32, pickled."""
    config, name = (CLIP, "clip") if kind == "clip" else (SIGLIP, "siglip")
    draw = Draw(7, torch.float32)
    draw_tower(draw, kind, "vision_model.", head=kind == "siglip")
    if with_text:
        draw.normal("logit_scale")
        draw.linear("text_model.encoder.layers.0.mlp.fc1", 4, 4)
    draw.made["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    write_weights(draw.made, folder, form)
    vision = config | {"model_type": f"{name}_vision_model"}
    write_json(
        folder / "config.json",
        {"model_type": name, "vision_config": vision, "text_config": {"model_type": f"{name}_text_model"}},
    )
    size = config["image_size"]
    if kind == "clip":
        CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(
            folder
        )
    else:
        SiglipImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)
    return draw.made


def authors(
    folder, *, student=False, teacher=None, form="safetensors shards", factory="compodistill", language=None, **fields
):
    """A release of the authors, or of TinyLLaVA's factory: SigLIP with its head, and Qwen2 with spare rows or, where it is
    given, another causal language model of transformers. A student has the tower and the connector of the ``teacher`` whose
    weights are given."""
    speaker = make_tokenizer("qwen2")
    rows = len(speaker) + 3
    draw = Draw(1)
    text = TEXT | {"model_type": "qwen2", "vocab_size": rows, "_name_or_path": "Qwen/Qwen1.5-1.8B"}
    if language is None:
        draw_language(draw, rows, "qwen2", "language_model.")
    else:
        text = language.config.to_dict()
        draw.made |= {f"language_model.{name}": value.clone() for name, value in language.state_dict().items()}
    draw_tower(draw, "siglip", "vision_tower._vision_tower.vision_model.", head=True)
    width = 24 if student and teacher is None else TEXT["hidden_size"]
    draw.linear("connector._connector.0", width, SIGLIP["hidden_size"])
    draw.linear("connector._connector.2", width, width)
    if student:
        draw.linear("connector.post_connector", TEXT["hidden_size"], width)
    shared = ("vision_tower.", "connector._connector.")
    draw.made |= {name: value for name, value in (teacher or {}).items() if name.startswith(shared)}
    write_weights(draw.made, folder, form)
    values = {
        "model_type": factory,
        "architectures": ["CompoDistillForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_compodistill.CompoDistillConfig"},
        "llm_model_name_or_path": "Qwen/Qwen1.5-1.8B",
        "vision_model_name_or_path": SIGLIP_NAME,
        "vision_model_name_or_path2": "",
        "connector_type": "mlp2x_gelu",
        "text_config": text,
        "vision_config": SIGLIP | {"model_type": "siglip_vision_model", "model_name_or_path": SIGLIP_NAME},
        "vision_hidden_size": SIGLIP["hidden_size"],
        "hidden_size": TEXT["hidden_size"],
        "vocab_size": rows,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
        "image_token_index": -200,
        "image_aspect_ratio": "square",
        "tokenizer_use_fast": False,
        "torch_dtype": "float16",
        "use_cache": True,
    }
    if factory == "compodistill":
        values |= {"post_connector_use": student, "connector_hidden_size": width if student else None}
    write_json(folder / "config.json", values | fields)
    write_json(folder / "generation_config.json", {"eos_token_id": speaker.eos_token_id, "max_new_tokens": 9})
    speaker.save_pretrained(folder)
    size = SIGLIP["image_size"]
    SiglipImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)
    (folder / "modeling_compodistill.py").write_text("raise SystemExit('never run')\n")
    return draw.made


def flat(
    folder,
    *,
    kind="llava",
    language="llama",
    inside=False,
    encoder="clip",
    form="bin shards",
    newline=False,
    rows=None,
    **fields,
):
    """LLaVA and those made of its code: a language model with a vision side."""
    speaker = make_tokenizer("qwen2" if language == "qwen2" else "llama")
    rows = rows or len(speaker)
    draw = Draw(2)
    draw_language(draw, rows, language)
    draw.made["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(4).float()
    vision = CLIP if encoder == "clip" else SIGLIP
    draw.linear("model.mm_projector.0", TEXT["hidden_size"], vision["hidden_size"])
    draw.linear("model.mm_projector.2", TEXT["hidden_size"], TEXT["hidden_size"])
    if inside:
        draw_tower(draw, encoder, "model.vision_tower.vision_tower.vision_model.", head=encoder == "siglip")
    if newline:
        draw.normal("model.image_newline", TEXT["hidden_size"])
    write_weights(draw.made, folder, form)
    values = TEXT | {
        "model_type": kind,
        "architectures": ["LlavaLlamaForCausalLM"],
        "_name_or_path": "vicuna-7b-v1.5",
        "vocab_size": rows,
        "bos_token_id": speaker.bos_token_id,
        "eos_token_id": speaker.eos_token_id,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": vision["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": CLIP_NAME if encoder == "clip" else SIGLIP_NAME,
        "rope_scaling": None,
        "torch_dtype": "float16",
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
    }
    write_json(folder / "config.json", values | fields)
    write_json(
        folder / "generation_config.json",
        {"temperature": 0.9, "top_p": 0.6, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    )
    speaker.save_pretrained(folder)
    return draw.made


def projector_alone(folder, base):
    """What LLaVA keeps of its first stage, made of a whole checkpoint in ``folder``; its language model goes to ``base``."""
    weights = flat(folder)
    parts = {name: value for name, value in weights.items() if "mm_projector" in name}
    language = {name: value for name, value in weights.items() if "mm_projector" not in name and "inv_freq" not in name}
    for path in folder.glob("pytorch_model*"):
        path.unlink()
    torch.save(parts, folder / "mm_projector.bin")
    write_weights(language, base, "bin shards")
    write_json(base / "config.json", TEXT | {"model_type": "llama", "vocab_size": len(make_tokenizer("llama"))})
    for path in folder.glob("*token*"):
        shutil.move(path, base / path.name)
    return weights


def add_lora(folder, weights, form):
    """LLaVA's two files of LoRA in place of the projector alone; returns the weights with the adapter added to them."""
    parts = {f"base_model.model.{name}": value for name, value in weights.items() if "mm_projector" in name}
    torch.save(parts, folder / "non_lora_trainables.bin")
    (folder / "mm_projector.bin").unlink()
    rank, alpha = 2, 6
    adapter, merged = {}, dict(weights)
    generator = torch.Generator().manual_seed(5)
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            at = f"base_model.model.{name.removesuffix('.weight')}"
            down = torch.randn(rank, weight.shape[1], generator=generator) * 0.3
            up = torch.randn(weight.shape[0], rank, generator=generator) * 0.3
            adapter |= {f"{at}.lora_A.weight": down, f"{at}.lora_B.weight": up}
            merged[name] = (weight.float() + alpha / rank * up @ down).half()
    if form == "bin":
        torch.save(adapter, folder / "adapter_model.bin")
    else:
        save_file(adapter, folder / "adapter_model.safetensors")
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "lmsys/vicuna-7b-v1.5",
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": 0.05,
            "bias": "none",
            "fan_in_fan_out": False,
            "target_modules": ["q_proj", "down_proj"],
        },
    )
    return merged


def sentencepiece(folder, **fields):
    """A tokenizer as Vicuna has it, slow and of single characters: ``tokenizer.model`` and no ``tokenizer.json``."""
    proto = import_protobuf().ModelProto()
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback = 2, True
    proto.trainer_spec.unk_id, proto.trainer_spec.bos_id, proto.trainer_spec.eos_id = 0, 1, 2
    proto.normalizer_spec.name, proto.normalizer_spec.remove_extra_whitespaces = "identity", False
    named = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{i:02X}>", 6) for i in range(256))]
    letters = sorted({character for sentence in SENTENCES for character in sentence} - {" "})
    for i, (piece, kind) in enumerate([*named, *((letter, 1) for letter in ("▁", *letters))]):
        proto.pieces.add(piece=piece, score=-float(i), type=kind)
    for path in folder.glob("*token*"):
        path.unlink()
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    values = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "pad_token": "<unk>"}
    values |= {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "sp_model_kwargs": {},
        "model_max_length": 2048,
    }
    write_json(folder / "tokenizer_config.json", values | fields)
    return len(proto.pieces)


def slow_qwen2(folder):
    """The files of Qwen2's slow tokenizer, which the authors' release has, in place of ``tokenizer.json``."""
    made = json.loads((folder / "tokenizer.json").read_text())["model"]
    for path in folder.glob("*token*"):
        path.unlink()
    write_json(folder / "vocab.json", made["vocab"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in made["merges"]))
    marks = {len(made["vocab"]) + i: mark for i, mark in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))}
    write_json(folder / "added_tokens.json", {mark: i for i, mark in marks.items()})
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    values = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {str(i): {"content": mark, **special} for i, mark in marks.items()},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "eos_token": "<|endoftext|>",
        "unk_token": None,
    }
    write_json(folder / "tokenizer_config.json", values)
