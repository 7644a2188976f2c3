"""The program of a process with optimum-intel: a LLaVA, or a TAF student with its code beside it, as OpenVINO's models.

``python -P to_openvino.py FOLDER OUTPUT WEIGHTS`` needs optimum-intel and what that needs, which is another transformers than
cdistill's. It reads a folder that `cdistill export --code` has written and writes what ``OVModelForVisualCausalLM`` loads:
processor, embeddings, vision with adapter, language model. WEIGHTS is fp32, fp16, int8 or int4. OpenVINO's models hold what is
computed, so that a TAF student is written as the LLaVA whose classes load it. What was written is read again and asked: with
fp32 and fp16 weights its greedy replies must be the model's. The last line of the output is JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
BITS = {"int8": 8, "int4": 4}
OWN = ("model_type", "auto_map", "architectures", "taf_activation", "teacher_adapter", "teacher_hidden_size")
QUESTIONS = ("What is in the image?", "describe the scene")
TOKENS = 16


def main() -> None:
    """Convert, and compare."""
    import torch
    from optimum.exporters.openvino import export_from_model
    from optimum.intel import OVConfig, OVModelForVisualCausalLM
    from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaConfig

    folder, output, weights = sys.argv[1:]
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    prompts = [_prompt(processor, question, seed) for seed, question in enumerate(QUESTIONS)]
    wanted = [_reply(model, prompt) for prompt in prompts]
    if hasattr(model.config, "taf_activation"):
        values = {name: value for name, value in model.config.to_dict().items() if name not in OWN}
        model.config = LlavaConfig.from_dict(values)
        model.config.architectures = ["LlavaForConditionalGeneration"]
    how = OVConfig(dtype="fp32" if weights in BITS else weights)
    speaker = [processor.tokenizer, processor]
    export_from_model(model, output, task="image-text-to-text", ov_config=how, preprocessors=speaker)
    if weights in BITS:
        _pack(output, BITS[weights])
    processor.save_pretrained(output)
    served = OVModelForVisualCausalLM.from_pretrained(
        output, device="CPU", ov_config={"INFERENCE_PRECISION_HINT": "f32"}
    )
    same = [torch.equal(a, _reply(served, prompt)) for a, prompt in zip(wanted, prompts, strict=True)]
    found = {
        "same": sum(same),
        "asked": len(same),
        "openvino": version("openvino"),
        "optimum": version("optimum-intel"),
    }
    print("\n" + json.dumps(found))


def _pack(folder: str, bits: int) -> None:
    """Keep the matrices of the models in a folder in so many bits. Raises RuntimeError if they take as much room as before."""
    from optimum.intel import OVModelForVisualCausalLM, OVWeightQuantizationConfig

    whole = OVModelForVisualCausalLM.from_pretrained(folder, quantization_config=OVWeightQuantizationConfig(bits=bits))
    before = sum(path.stat().st_size for path in Path(folder).glob("*.bin"))
    with tempfile.TemporaryDirectory() as name:
        whole.save_pretrained(name)
        del whole  # its files are mapped
        for path in Path(name).iterdir():
            shutil.copy(path, folder)
    after = sum(path.stat().st_size for path in Path(folder).glob("*.bin"))
    if after > 0.6 * before:
        raise RuntimeError(f"weights of {bits} bits take {after:,} bytes, of fp32 {before:,}: nothing was packed")


def _prompt(processor: Any, question: str, seed: int) -> Any:
    import numpy as np
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    content = [{"type": "image"}, {"type": "text", "text": question}]
    if processor.chat_template is None:
        text = f"{processor.image_token}\n{question}"
    else:
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=[text], images=[image], return_tensors="pt")


def _reply(model: Any, prompt: Any) -> Any:
    return model.generate(**prompt, max_new_tokens=TOKENS, do_sample=False)[:, prompt["input_ids"].shape[1] :]


if __name__ == "__main__":
    main()
