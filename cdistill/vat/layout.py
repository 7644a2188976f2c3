"""Where on the image, the tile or the frame each visual token lies, by family."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cdistill.errors import InputError

Box = tuple[float, float, float, float]  # left, top, right, bottom as shares of the picture
WHOLE_PICTURE: Box = (0.0, 0.0, 1.0, 1.0)
WHOLE, TILES, FRAME = "whole", "tiles", "frame"


@dataclass(frozen=True)
class Piece:
    """A grid of visual tokens in raster order.

    Attributes:
        picture: number of the image or frame of the sample.
        level: ``whole`` (the image at once), ``tiles`` (a part of it at more pixels, or all parts together), ``frame``.
        box: what the grid covers; beyond 0..1 where the processor pads.
        places: (rows, columns) of each token among the sample's visual tokens, -1 where the model drops one.
        ends: visual tokens that end the grid's rows, or several rows together, from top to bottom: image newlines.
    """

    picture: int
    level: str
    box: Box
    places: np.ndarray
    ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class Shown:
    """What a layout is made of.

    Attributes:
        config: the model's.
        processor: its processor.
        ids: the sample's tokens.
        visual: which of them are visual, (T,) bool.
        tensors: what the processor made of images or videos.
        sizes: (width, height) of each image.
    """

    config: Any
    processor: Any
    ids: Sequence[int]
    visual: np.ndarray
    tensors: Mapping[str, Any]
    sizes: Sequence[tuple[int, int]]


def layout(shown: Shown) -> list[Piece]:
    """The pieces of a sample, in the order of its tokens.

    Raises:
        ValueError: a family whose layout is not known, or tokens that it does not explain.
    """
    require_known_layout(shown.config)
    kind = shown.config.model_type
    pieces, used = LAYOUTS[kind](shown)
    count = int(shown.visual.sum())
    if used != count:
        explained = "does not explain them" if used < 0 else f"explains {used}"
        raise InputError(f"{kind} has {count} visual tokens here, and its layout {explained}")
    return pieces


def require_known_layout(config: Any) -> None:
    """Raise ValueError for a model, by its configuration, of which it is not known where its visual tokens lie."""
    if config.model_type not in LAYOUTS:
        raise InputError(
            f"where the visual tokens of {config.model_type} lie is not known, if they lie on an image at all (known: "
            f"{', '.join(LAYOUTS)})"
        )


def _grid(start: int, rows: int, columns: int, newline: int = 0) -> np.ndarray:
    return start + np.arange(rows)[:, None] * (columns + newline) + np.arange(columns)


def _side(config: Any) -> int:
    return int(config.vision_config.image_size) // int(config.vision_config.patch_size)


def _runs(shown: Shown) -> Iterator[tuple[int, int]]:
    """(first place in the text, length) of visual tokens side by side."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], shown.visual.astype(int), [0]))))
    yield from ((int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True))


def _seen(processor: Any, size: tuple[int, int]) -> Box:
    """What an image processor of the CLIP kind keeps of a picture, which it may pad to a square and crop at the centre."""
    images, (width, height) = processor.image_processor, size
    across, down = 1.0, 1.0  # sides of what is kept, in those of the picture
    if getattr(images, "do_pad", False):
        across, down = max(width, height) / width, max(width, height) / height
    if getattr(images, "do_center_crop", False):
        short = min(width * across, height * down)
        edge = getattr(images.size, "shortest_edge", None) or dict(images.size).get("shortest_edge")
        crop = dict(images.crop_size)
        if edge:
            across, down = crop["width"] * short / edge / width, crop["height"] * short / edge / height
    return (0.5 - across / 2, 0.5 - down / 2, 0.5 + across / 2, 0.5 + down / 2)


def _llava(shown: Shown) -> tuple[list[Piece], int]:
    patch, count = int(shown.config.vision_config.patch_size), int(shown.visual.sum())
    rows, columns = (pixels // patch for pixels in shown.tensors["pixel_values"].shape[-2:])  # encoders may interpolate
    each = count // max(1, len(shown.sizes))
    dropped = rows * columns - each
    if dropped not in (0, 1):  # a class token is none of the grid; of an encoder without one the first patch goes
        return [], -1
    pieces = []
    for i, size in enumerate(shown.sizes):
        places = _grid(i * each - dropped, rows, columns)
        places[0, 0] = -1 if dropped else places[0, 0]
        pieces.append(Piece(i, WHOLE, _seen(shown.processor, size), places))
    return pieces, each * len(shown.sizes)


def _llava_next(shown: Shown) -> tuple[list[Piece], int]:
    pieces, start = [], 0
    for i in range(len(shown.sizes)):
        found, start = _any_resolution(shown, i, start, None)
        pieces += found
    return pieces, start


def _llava_onevision(shown: Shown) -> tuple[list[Piece], int]:
    side, pieces, start, picture = _side(shown.config), [], 0, 0
    videos = shown.tensors.get("pixel_values_videos")
    if videos is not None:
        if shown.sizes:
            return [], -1
        pooled = math.ceil(side / 2)
        for frames in videos:
            for _ in range(len(frames)):
                pieces.append(Piece(picture, FRAME, WHOLE_PICTURE, _grid(start, pooled, pooled)))
                start, picture = start + pooled * pooled, picture + 1
            pieces[-1] = replace(pieces[-1], ends=(start,))  # a newline ends a video
            start += 1
        return pieces, start
    most = int(str(shown.config.vision_aspect_ratio).removeprefix("anyres_max_"))
    for i in range(len(shown.sizes)):
        if len(shown.sizes) > 1:  # among others, an image is not cut into tiles
            pieces.append(Piece(i, WHOLE, WHOLE_PICTURE, _grid(start, side, side), (start + side * side,)))
            start += side * side + 1
        else:
            found, start = _any_resolution(shown, i, start, most)
            pieces += found
    return pieces, start


def _any_resolution(shown: Shown, image: int, start: int, most: int | None) -> tuple[list[Piece], int]:
    """The whole image, then its tiles as one grid without their padding, a newline at the end of each row."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    side, config = _side(shown.config), shown.config
    pieces = [Piece(image, WHOLE, WHOLE_PICTURE, _grid(start, side, side))]
    start += side * side
    width, height = shown.sizes[image]
    down, across = get_anyres_image_grid_shape(
        [height, width], config.image_grid_pinpoints, config.vision_config.image_size
    )
    rows, columns = unpad_image(torch.empty(1, down * side, across * side), [height, width]).shape[1:]
    ratio = math.sqrt(rows * columns / (most * side**2)) if most else 0.0
    if ratio > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    ends = tuple(start + (row + 1) * (columns + 1) - 1 for row in range(rows))
    pieces.append(Piece(image, TILES, WHOLE_PICTURE, _grid(start, rows, columns, newline=1), ends))
    return pieces, start + rows * (columns + 1)


def _internvl(shown: Shown) -> tuple[list[Piece], int]:
    """Tiles in raster order, then the whole image where there are several; a frame of a video is a picture of one tile."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    each, images = int(shown.config.image_seq_length), shown.processor.image_processor
    side, pieces, start = math.isqrt(each), [], 0
    for picture, (_, length) in enumerate(_runs(shown)):
        tiles = length // each
        if tiles == 1:
            level = WHOLE if picture < len(shown.sizes) else FRAME
            pieces.append(Piece(picture, level, WHOLE_PICTURE, _grid(start, side, side)))
        else:
            if picture >= len(shown.sizes):
                return [], -1
            width, height = shown.sizes[picture]
            size = (images.size["height"], images.size["width"])
            across, down = get_optimal_tiled_canvas((height, width), size, images.min_patches, images.max_patches)
            if across * down + 1 != tiles:
                return [], -1
            for tile in range(across * down):
                box = _tile(tile // across, tile % across, down, across)
                pieces.append(Piece(picture, TILES, box, _grid(start + tile * each, side, side)))
            pieces.append(Piece(picture, WHOLE, WHOLE_PICTURE, _grid(start + across * down * each, side, side)))
        start += tiles * each
    return pieces, start


def _tile(row: int, column: int, rows: int, columns: int) -> Box:
    return (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)


def _idefics3(shown: Shown) -> tuple[list[Piece], int]:
    """Each tile after a mark of its row and column, then the whole image after another; so is a frame of a video."""
    tokenizer = getattr(shown.processor, "tokenizer", shown.processor)
    pieces: list[Piece] = []
    tiles: list[tuple[int, int, int]] = []
    picture = start = 0
    for first, length in _runs(shown):
        side = math.isqrt(length)
        mark = str(tokenizer.convert_ids_to_tokens(int(shown.ids[first - 1]))) if first else ""
        place = re.search(r"row_(\d+)_col_(\d+)", mark)
        if side * side != length:
            return [], -1
        if place:
            tiles.append((int(place[1]) - 1, int(place[2]) - 1, start))
        else:
            rows, columns = (1 + max((tile[i] for tile in tiles), default=0) for i in (0, 1))
            for row, column, at in tiles:
                pieces.append(Piece(picture, TILES, _tile(row, column, rows, columns), _grid(at, side, side)))
            level = WHOLE if picture < len(shown.sizes) else FRAME
            pieces.append(Piece(picture, level, WHOLE_PICTURE, _grid(start, side, side)))
            picture, tiles = picture + 1, []
        start += length
    return pieces, start if not tiles else -1


def _qwen_vl(shown: Shown) -> tuple[list[Piece], int]:
    """One grid for each image at its own resolution, and for each frame (or two, which the encoder takes as one) of a video."""
    merge = int(shown.config.vision_config.spatial_merge_size)
    ids = np.asarray(shown.ids)[shown.visual]
    left = {
        token: iter([] if grid is None else grid.tolist())
        for token, grid in (
            (shown.config.image_token_id, shown.tensors.get("image_grid_thw")),
            (shown.config.video_token_id, shown.tensors.get("video_grid_thw")),
        )
    }
    pieces, start, picture = [], 0, 0
    while start < len(ids):
        token = int(ids[start])
        grid = next(left[token], None)
        if grid is None:
            return [], -1
        frames, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
        for _ in range(frames):
            level = WHOLE if token == shown.config.image_token_id else FRAME
            pieces.append(Piece(picture, level, WHOLE_PICTURE, _grid(start, rows, columns)))
            start, picture = start + rows * columns, picture + 1
    return pieces, start


LAYOUTS: dict[str, Callable[[Shown], tuple[list[Piece], int]]] = {
    "llava": _llava,
    "cdistill_taf_llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "idefics3": _idefics3,
    "smolvlm": _idefics3,
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _qwen_vl),
}
