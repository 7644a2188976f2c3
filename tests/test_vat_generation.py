"""Slices of tokens as they are generated, against the attention matrices of transformers' eager generation."""

import copy

import pytest
import torch
from family_models import build, draw
from vat_models import inputs

from cdistill.vat import GenerationRecorder, SliceRecorder, attention_layers, installed, token_regions, visual_token_ids

WRITTEN = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def prompts(name, padding="left"):
    """A model, four prompts without labels, and their visual tokens."""
    model, batch = build(name, 0), draw(name, 4, padding)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    regions = token_regions(ids, None, mask, visual_token_ids=visual_token_ids(model), rows="all")
    return model, {key: value for key, value in inputs(batch).items() if key != "labels"}, regions.cols


def recorder_of(model, batch, cols, **options):
    given = {"prompt": batch["input_ids"].shape[1], "key_mask": batch["attention_mask"]}
    return GenerationRecorder(attention_layers(model), cols, **given | options)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llava_qwen2", "qwen2_5_vl", "smolvlm", "qwen3_5"])
def test_each_generated_token_has_its_slice(name, cache):
    model, batch, cols = prompts(name)
    recorder = recorder_of(model, batch, cols)
    with installed(model):
        tokens = model.generate(**batch, **WRITTEN, cdistill_vat=recorder, cache_implementation=cache)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    wanted = eager.generate(**batch, **WRITTEN, return_dict_in_generate=True, output_attentions=True)
    assert torch.equal(tokens, wanted.sequences)
    matrices = {layer: i for i, layer in enumerate(attention_layers(model))}  # none of layers without softmax
    index = cols.clamp(min=0).long()
    for layer, found in recorder.slices.items():
        for i, step in enumerate(wanted.attentions):
            last = step[matrices[layer]][:, :, -1].mean(1)
            torch.testing.assert_close(
                found[:, i], last.gather(1, index).masked_fill(cols < 0, 0.0), rtol=1e-4, atol=1e-6
            )


def test_a_prompt_in_chunks_and_every_head():
    """Only the queries that predict a token are rows, however the prompt is cut."""
    model, batch, cols = prompts("llava_qwen2")
    recorders = []
    with installed(model):
        for options in ({}, {"prefill_chunk_size": 6}):
            recorders.append(recorder_of(model, batch, cols, heads="each"))
            model.generate(**batch, **WRITTEN, **options, cdistill_vat=recorders[-1])
    for whole, cut in zip(*(r.slices.values() for r in recorders), strict=True):
        assert whole.shape == (4, model.config.text_config.num_attention_heads, 5, cols.shape[1])
        torch.testing.assert_close(whole, cut, rtol=1e-4, atol=1e-6)


def test_what_a_recorder_of_generation_refuses():
    model, batch, cols = prompts("llava_qwen2")
    with pytest.raises(ValueError, match="not used by the model: \\['cdistill_vat'\\]"):
        model.generate(**batch, **WRITTEN, cdistill_vat=recorder_of(model, batch, cols))  # not installed
    with installed(model):
        with pytest.raises(ValueError, match="generate without beams"):
            model.generate(**batch, **WRITTEN, num_beams=2, cdistill_vat=recorder_of(model, batch, cols))
        recorder = recorder_of(model, batch, cols)
        model.generate(**batch, **WRITTEN, cdistill_vat=recorder)
        with pytest.raises(ValueError, match="serves one call that begins with an empty cache"):
            model.generate(**batch, **WRITTEN, cdistill_vat=recorder)
        whole = SliceRecorder(
            [1], token_regions(batch["input_ids"], None, None, visual_token_ids=2, rows="all"), key_mask=None
        )
        with pytest.raises(
            ValueError, match="cdistill_vat of generate must be a GenerationRecorder, got SliceRecorder"
        ):
            model.generate(**batch, **WRITTEN, cdistill_vat=whole)
        with pytest.raises(ValueError, match="key_mask of the recorder must be the attention_mask"):
            model.generate(**batch, **WRITTEN, cdistill_vat=recorder_of(model, batch, cols, key_mask=None))
        with pytest.raises(ValueError, match="were not recorded"):
            recorder_of(model, batch, cols).slices  # noqa: B018
    with pytest.raises(ValueError, match=r"key_mask must be \(B, T\) = \(4, 7\)"):
        recorder_of(model, batch, cols, prompt=7)
