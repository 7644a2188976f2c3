"""LLaVA-like models in plain torch and float64, over the weights of a checkpoint by their published names."""

import math

import torch
from torch.nn.functional import conv2d, gelu, layer_norm, linear, silu


class Plain:
    """Weights by name, under a beginning."""

    def __init__(self, weights, beginning=""):
        self.weights, self.beginning = weights, beginning

    def __call__(self, name):
        return self.weights[self.beginning + name].double()

    def has(self, name):
        return self.beginning + name in self.weights

    def below(self, name):
        return Plain(self.weights, f"{self.beginning}{name}.")

    def linear(self, x):
        return linear(x, self("weight"), self("bias") if self.has("bias") else None)


def attention(q, k, v, causal):
    """(H, T, d) each; keys and values may have fewer heads."""
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -math.inf)
    return scores.softmax(-1) @ v


def heads(x, count):
    return x.view(x.shape[0], count, -1).transpose(0, 1)


def joined(x):
    return x.transpose(0, 1).flatten(1)


def vision_states(tower, config, pixels):
    """Hidden states of CLIP (with a class token) or SigLIP of one image (3, H, W), the input's first."""
    at = tower.below("embeddings")
    bias = at("patch_embedding.bias") if at.has("patch_embedding.bias") else None
    x = conv2d(pixels.double()[None], at("patch_embedding.weight"), bias, stride=config["patch_size"])[0].flatten(1).T
    if at.has("class_embedding"):
        x = torch.cat((at("class_embedding")[None], x))
    x = x + at("position_embedding.weight")

    def norm(x, of):
        return layer_norm(x, x.shape[-1:], of("weight"), of("bias"), config["layer_norm_eps"])

    if tower.has("pre_layrnorm.weight"):
        x = norm(x, tower.below("pre_layrnorm"))
    states = [x]
    for i in range(config["num_hidden_layers"]):
        layer = tower.below(f"encoder.layers.{i}")
        y = norm(x, layer.below("layer_norm1"))
        q, k, v = (heads(layer.below(f"self_attn.{n}_proj").linear(y), config["num_attention_heads"]) for n in "qkv")
        x = x + layer.below("self_attn.out_proj").linear(joined(attention(q, k, v, False)))
        y = layer.below("mlp.fc1").linear(norm(x, layer.below("layer_norm2")))
        y = y * torch.sigmoid(1.702 * y) if config["hidden_act"] == "quick_gelu" else gelu(y, approximate="tanh")
        x = x + layer.below("mlp.fc2").linear(y)
        states.append(x)
    return states


def rotated(x, theta, factor=1.0):
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[1]).double() / factor, theta ** (-torch.arange(half).double() / half))
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin), -1)


def language_states(model, config, x):
    """Llama, Mistral and Qwen2: (T, d) embeddings to normed hidden states."""

    def norm(x, weight):
        return x * (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * weight

    for i in range(config["num_hidden_layers"]):
        layer = model.below(f"layers.{i}")
        y = norm(x, layer("input_layernorm.weight"))
        counts = {
            "q": config["num_attention_heads"],
            "k": config["num_key_value_heads"],
            "v": config["num_key_value_heads"],
        }
        q, k, v = (heads(layer.below(f"self_attn.{n}_proj").linear(y), counts[n]) for n in "qkv")
        q, k = (rotated(part, config["rope_theta"], config.get("rope_factor", 1.0)) for part in (q, k))
        x = x + layer.below("self_attn.o_proj").linear(joined(attention(q, k, v, True)))
        y = norm(x, layer("post_attention_layernorm.weight"))
        y = silu(layer.below("mlp.gate_proj").linear(y)) * layer.below("mlp.up_proj").linear(y)
        x = x + layer.below("mlp.down_proj").linear(y)
    return norm(x, model("norm.weight"))


def mlp(projector, x):
    """Layers 0 and 2 of nn.Sequential(Linear, GELU, Linear)."""
    return projector.below("2").linear(gelu(projector.below("0").linear(x)))


def logits(model, head, config, parts):
    """Logits (T, vocabulary) of one sequence: ids, and (V, d) visual tokens in between."""
    embeddings = model("embed_tokens.weight")
    x = torch.cat([embeddings[part] if part.dtype == torch.long else part for part in parts])
    return linear(language_states(model, config, x), head("weight"))
