"""Students for llama.cpp, and whether its server and transformers answer the same requests alike."""

import json
import urllib.request

import torch
from builtin_models import TOKENIZER
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from cdistill.data.samples import IMAGE_TOKEN
from cdistill.models import compose

TOKENS = 6
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs,", "isn't", "it?", "They'LL", "say", "12345"]
WORDS += ["times:", "naïve", "café", "日本語", "été", "🙂"]
SMALL = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}


@torch.no_grad()
def expected(model, processor, messages):
    """Reply and log-probabilities of its tokens by transformers, greedy, without the end token."""
    processor.tokenizer.padding_side = "left"
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    made = model.generate(
        **inputs, max_new_tokens=TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    ids = made.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return ids, [torch.log_softmax(logits[0].float(), -1) for logits in made.logits], inputs["input_ids"].shape[1]


def assert_answers_alike(model, processor, server, messages, *, tolerance):
    """The same tokens greedily, and their log-probabilities and those of the likeliest others within a tolerance."""
    ids, scores, length = expected(model, processor, messages)
    answer = server.chat(messages, tokens=TOKENS, logprobs=True, top_logprobs=20)
    assert answer["usage"]["prompt_tokens"] == length
    tokens = answer["logprobs"]["content"]
    assert [token["id"] for token in tokens] == ids
    for token, score in zip(tokens, scores, strict=True):
        for other in token["top_logprobs"]:
            assert abs(other["logprob"] - score[other["id"]]) < tolerance * (1 - score[other["id"]])


def token_ids(llama_cpp, text):
    """Tokens of a text by llama.cpp, special ones among them, without those that begin or end every text."""
    asked = {"content": text, "add_special": False, "parse_special": True}
    request = urllib.request.Request(f"{llama_cpp.server.listening_address}/tokenize", json.dumps(asked).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
        return json.load(answer)["tokens"]


def random_student(text, vision, layer, tokenizer=TOKENIZER):
    """A LLaVA none of whose weights is 0 or 1, with an encoder that makes a difference."""
    torch.manual_seed(2)
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    model = compose(vision, text, image_token_id=image_token).eval()
    model.config.vision_feature_layer = layer
    model.model.multi_modal_projector = LlavaMultiModalProjector(model.config)  # as wide as these layers
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
        for weight in (*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()):
            weight.add_(torch.randn_like(weight) * 0.2)
        for layer in model.model.vision_tower.encoder.layers if hasattr(model.model.vision_tower, "encoder") else ():
            layer.mlp.fc2.weight.mul_(10.0)  # of an activation that is nearly the right one much is seen
    return model


def byte_level(cut, *, ascii_alone=False, ignore_merges=False, normalizer=None):
    """A byte-level BPE tokenizer that was trained on a few words, with a way to cut texts.

    With ``ascii_alone`` every token is a whole character: what llama.cpp's server makes of parts it tells as one token.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizers.ByteLevel(add_prefix_space=False), normalizer
    tokenizer.decoder = decoders.ByteLevel()
    letters = [*map(chr, range(33, 127)), "Ġ", "Ċ"] if ascii_alone else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "</s>", "<image>"],
        initial_alphabet=letters,
        show_progress=False,
    )
    words = [word for word in WORDS if word.isascii() or not ascii_alone]
    tokenizer.train_from_iterator([" ".join(words) + " 123 12345"] * 3, trainer)
    tokenizer.pre_tokenizer = cut  # merges across its cuts are there, and must not be used
    return tokenizer
