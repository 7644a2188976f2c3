"""Every causal and image-text family of transformers with the hook: exact or refused, as docs/families.md says."""

from pathlib import Path

import pytest
import torch
from family_sweep import FAMILIES, HEADER, build, draw, result_of, run, same
from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel, __version__

from cdistill.vat import install, installed

PAGE = Path(__file__).parent.parent / "docs" / "families.md"


@pytest.fixture(scope="module")
def table():
    text = PAGE.read_text()
    header = HEADER.format(version=__version__)
    assert text.startswith(header)
    return dict(line.strip("| ").split(" | ", 1) for line in text.removeprefix(header).splitlines())


def test_the_page_has_every_family(table):
    assert list(table) == FAMILIES
    kinds = [result.split(":")[0].split(";")[0] for result in table.values()]
    assert set(kinds) == {"exact", "refused", "not run"}
    assert kinds.count("exact") >= 195


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_or_refused(family, table):
    result = result_of(family)  # raises where a model computes something else
    if result.startswith("not run"):
        assert table[family].startswith("not run")  # why depends on the packages beside transformers
    else:
        assert result == table[family]


# Models that ask what their implementation is called: for sparse masks, and to leave out queries of layers with shared keys.
@pytest.mark.parametrize("family", ["deepseek_v32", "minimax_m3_vl", "mistral_large4", "gemma4_text"])
def test_what_depends_on_the_implementations_name_stays(family):
    model = build(family, kv_heads=1 if family in ("minimax_m3_vl", "gemma4_text") else 2)
    batch = draw(model)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}

    def results():
        with torch.no_grad():
            kept = [model(**batch, logits_to_keep=keep).logits for keep in (0, 1, 3)]
            kept.append(model.generate(input_ids=batch["input_ids"], **options))
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        trained = run(model, batch)
        model.gradient_checkpointing_disable()
        model.eval()
        return kept, trained

    kept, trained = results()
    with installed(model):
        kept_with, trained_with = results()
    assert all(map(torch.equal, kept, kept_with))
    assert same(trained, trained_with)


def test_encoder_decoders_are_refused():
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 64,
    }
    parts = BertConfig(**shape), BertConfig(**shape, is_decoder=True, add_cross_attention=True)
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*parts))
    with pytest.raises(ValueError, match="EncoderDecoderModel is an encoder-decoder") as refused:
        install(model)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("llama4_text", "chunked attention"),
        ("mllama", "sees images by cross-attention"),
        ("hrm_text", "several times in a pass"),
    ],
)
def test_families_refused_at_install(family, reason):
    model = build(family, kv_heads=2)
    before = model.config.get_text_config()._attn_implementation
    with pytest.raises(ValueError, match=reason) as refused:
        install(model)
    assert "\n" not in str(refused.value)
    assert model.config.get_text_config()._attn_implementation == before
