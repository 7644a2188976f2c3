"""Where visual tokens lie, against what a change of a part of the picture does to them when the encoder mixes no patches."""

import dataclasses

import numpy as np
import pytest
import torch
from family_models import build, draw_with_layout, processor
from family_table import FAMILIES
from PIL import Image
from transformers import Dinov2Config, LlavaConfig

from cdistill.vat import visual_token_ids
from cdistill.vat.layout import FRAME, TILES, Shown, layout

MIXING = ("out_proj", "o_proj", "proj", "projection_layer", "fc2", "down_proj", "linear_fc2")


def unmixed(family):
    """A model whose encoder's layers add nothing, so that a patch depends on its own pixels alone."""
    model = build(family, 0, 2)
    encoder = next(
        m for name, m in model.named_modules() if name.split(".")[-1] in ("vision_tower", "visual", "vision_model")
    )
    inside = next(m for m in encoder.modules() if isinstance(m, torch.nn.ModuleList))
    for name, parameter in inside.named_parameters():
        if name.split(".")[-2] in MIXING:
            parameter.data.zero_()
    return model


def embedded(model, inputs, visual):
    """(V, D) of the visual tokens."""
    seen = {}
    text = model.model.language_model if hasattr(model.model, "language_model") else model.model.text_model
    handle = text.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(found=kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen["found"][0, visual]


def covered(box, quarter):
    """Share of a box that a part of the picture covers."""
    left, top = max(box[0], quarter[0]), max(box[1], quarter[1])
    right, bottom = min(box[2], quarter[2]), min(box[3], quarter[3])
    return max(0.0, right - left) * max(0.0, bottom - top) / ((box[2] - box[0]) * (box[3] - box[1]))


def cell_boxes(piece):
    rows, columns = piece.places.shape
    left, top, right, bottom = piece.box
    width, height = (right - left) / columns, (bottom - top) / rows
    for (row, column), place in np.ndenumerate(piece.places):
        x, y = left + column * width, top + row * height
        yield place, (x, y, x + width, y + height)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_lies_where_a_change_of_the_picture_changes_it(family):
    model, process = unmixed(family), processor(family)
    ids_of_images = set(visual_token_ids(model))
    for size in FAMILIES[family].images:
        pixels = np.full((*size, 3), 90, np.uint8)

        def encoded(array):
            made = process(text=[FAMILIES[family].placeholder], images=[[Image.fromarray(array)]], return_tensors="pt")
            return {name: torch.as_tensor(value) for name, value in made.items()}

        inputs = encoded(pixels)
        visual = np.isin(inputs["input_ids"][0].numpy(), list(ids_of_images))
        shown = Shown(model.config, process, inputs["input_ids"][0].tolist(), visual, inputs, [(size[1], size[0])])
        pieces = layout(shown)
        before = embedded(model, inputs, visual)
        for x, y in ((0, 0), (1, 0), (0, 1), (1, 1)):
            changed = pixels.copy()
            height, width = size[0] // 2, size[1] // 2
            changed[y * height : (y + 1) * height, x * width : (x + 1) * width] = 250
            apart = (embedded(model, encoded(changed), visual) - before).norm(dim=1).numpy()
            quarter = (x / 2, y / 2, (x + 1) / 2, (y + 1) / 2)
            shares = {place: covered(box, quarter) for piece in pieces for place, box in cell_boxes(piece)}
            inside = [apart[place] for place, share in shares.items() if share > 0.99]
            outside = [apart[place] for place, share in shares.items() if share < 0.01]
            assert inside and outside
            assert min(inside) > 2 * max(outside), (size, x, y, inside, outside)
            newlines = set(range(len(apart))) - shares.keys()
            assert all(apart[place] < 1e-6 for place in newlines)
    assert not any(piece.level == FRAME for piece in pieces)


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.video])
def test_frames_of_videos_are_pictures_of_their_own(family):
    batch, visual = draw_with_layout(family, 0)
    model = build(family, 0, 2)
    tensors = {name: value for name, value in batch.items() if "video" in name}
    shown = Shown(model.config, processor(family), batch["input_ids"][3].tolist(), visual[3].numpy(), tensors, [])
    pieces = layout(shown)
    assert [piece.picture for piece in pieces] == list(range(len(pieces))) and {p.level for p in pieces} == {FRAME}
    places = np.concatenate([piece.places.ravel() for piece in pieces])
    assert len(set(places)) == len(places) and (places >= 0).all()
    assert len(places) == int(visual[3].sum()) - (family == "llava_onevision")  # whose newline lies nowhere


@pytest.mark.parametrize(("height", "width"), [(84, 84), (56, 84)])
def test_patches_of_an_encoder_that_interpolates_its_positions_are_those_of_the_pixels(height, width):
    """DINOv2's configuration speaks of 518 pixels, whatever its image processor makes."""
    config = LlavaConfig(vision_config=Dinov2Config(image_size=518, patch_size=14))
    count = height * width // 14**2
    tensors = {"pixel_values": torch.empty(1, 3, height, width)}
    (piece,) = layout(Shown(config, processor("llava_qwen2"), [0] * count, np.ones(count, bool), tensors, [(48, 48)]))
    assert piece.places.tolist() == np.arange(count).reshape(height // 14, width // 14).tolist()


def test_what_a_layout_does_not_explain_is_refused():
    batch, visual = draw_with_layout("internvl", 0)
    config = build("internvl", 0, 2).config
    shown = Shown(config, processor("internvl"), batch["input_ids"][0].tolist(), visual[0].numpy(), {}, [(8, 8)])
    with pytest.raises(ValueError, match="12 visual tokens"):
        layout(shown)
    config.model_type = "blip-2"
    with pytest.raises(ValueError, match=r"blip-2 lie is not known.*llava_next"):
        layout(dataclasses.replace(shown, config=config))


def test_tiles_cover_the_picture_once():
    batch, visual = draw_with_layout("internvl", 0)
    config = build("internvl", 0, 2).config
    size = next(iter(FAMILIES["internvl"].images))
    shown = Shown(config, processor("internvl"), batch["input_ids"][0].tolist(), visual[0].numpy(), {}, [size[::-1]])
    tiles = [piece.box for piece in layout(shown) if piece.level == TILES]
    assert sum((b[2] - b[0]) * (b[3] - b[1]) for b in tiles) == pytest.approx(1.0)
