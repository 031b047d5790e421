"""A recorded group as an animated GIF."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from d1lit.report.markup import visible
from d1lit.report.recording import END, Recording, one_line, shown_at, state_at

BACKGROUND, INK, FAINT, BLOCK = "#ffffff", "#1b1f24", "#57606a", "#8c959f"
MASKED, NEW, EDITED = "#d8dee4", "#bc4c00", "#0550ae"
SHADES = ("#fde0c5", "#facba6", "#d7e3a8", "#a6d8b0", "#7fcdbb")
"""From least to most confident; dark ink can be read on each."""
FONT_SIZE, PAD, ROW_HEIGHT, MARGIN = 14, 3, 22, 12
MOST_WIDTH = 460
"""Of one rollout's column."""
COLUMNS = 2
"""Rollouts side by side; more go below."""


def write_gif(recording: Recording, file: Path, seconds_per_step: float = 0.25, most_rollouts: int = 4) -> None:
    """One frame a step, the last one held for two seconds.

    Args:
        recording: one prompt's rollouts.
        file: where it goes.
        seconds_per_step: how long a frame stands.
        most_rollouts: how many are drawn.
    """
    font = ImageFont.load_default(FONT_SIZE)
    rollouts = recording["rollouts"][:most_rollouts]
    layouts = [_layout(rollout, recording["block_length"], font) for rollout in rollouts]
    cell = (max(w for _, w, _ in layouts) + MARGIN, max(h for _, _, h in layouts) + ROW_HEIGHT + MARGIN)
    places = [
        (MARGIN + n % COLUMNS * cell[0], ROW_HEIGHT + MARGIN + n // COLUMNS * cell[1]) for n in range(len(layouts))
    ]
    size = (places[-1 if len(places) < COLUMNS else COLUMNS - 1][0] + cell[0], places[-1][1] + cell[1])
    columns = list(zip(rollouts, layouts, places, strict=True))
    frames = [_frame(recording, columns, step, size, font) for step in range(-1, recording["steps"])]
    durations = [round(1000 * seconds_per_step)] * (len(frames) - 1) + [2000]
    palette = [frame.quantize(colors=64, dither=Image.Dither.NONE) for frame in frames]
    palette[0].save(file, "GIF", save_all=True, append_images=palette[1:], duration=durations, loop=0, optimize=True)


Box = tuple[int, int, int]
Layout = tuple[list[list[Box]], int, int]


def _layout(rollout: Mapping[str, Any], block_length: int, font: Any) -> Layout:
    """Left, top and width of every token, block by block; and the width and height of it all."""
    blocks: list[list[Box]] = []
    top, widest = 0, 200
    tokens = rollout["tokens"]
    for start in range(0, len(tokens), block_length):
        boxes: list[Box] = []
        left = PAD
        top += PAD
        for token in tokens[start : start + block_length]:
            texts = [token["text"], *(shown or "" for _, shown in token["events"])]
            wide = max(10, *(round(font.getlength(_shown(t))) for t in texts)) + 2 * PAD
            if left + wide > MOST_WIDTH and left > PAD:
                left, top = PAD, top + ROW_HEIGHT
            boxes.append((left, top, wide))
            left += wide + 2
            widest = max(widest, left + PAD)
        blocks.append(boxes)
        top += ROW_HEIGHT + PAD + 4
    return blocks, widest, top


def _shown(text: str) -> str:
    """What the built-in font can draw."""
    text = visible(one_line(text)).replace("⏎", "\\n").replace("⇥", "\\t").replace(END, "¶")
    return text.encode("latin-1", "replace").decode("latin-1")


def _frame(recording: Recording, columns: list[Any], step: int, size: tuple[int, int], font: Any) -> Image.Image:
    image = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, 8), _shown(f"row {recording['index']}   step {step + 1} of {recording['steps']}"), INK, font)
    last = step == recording["steps"] - 1
    for number, (rollout, (blocks, width, _), (x, y)) in enumerate(columns):
        reward = f"rollout {number + 1}" + (f"   reward {rollout['reward']:.3g}" if last else "")
        draw.text((x, y), reward, FAINT, font)
        tokens = iter(rollout["tokens"])
        y += ROW_HEIGHT
        for boxes in blocks:
            draw.rectangle((x, y + boxes[0][1] - PAD, x + width, y + boxes[-1][1] + ROW_HEIGHT), outline=BLOCK)
            for box, token in zip(boxes, tokens, strict=False):  # boxes first: no token is taken that has none
                _draw_token(draw, token, step, (x + box[0], y + box[1], box[2]), font)
    return image


def _draw_token(draw: ImageDraw.ImageDraw, token: Mapping[str, Any], step: int, box: Box, font: Any) -> None:
    left, top, width = box
    edges = (left, top, left + width, top + ROW_HEIGHT - PAD - 1)
    state = state_at(token, step)
    if state in ("masked", "remasked", "unreached"):
        draw.rectangle(
            edges, fill=MASKED if state != "unreached" else BACKGROUND, outline=NEW if state == "remasked" else None
        )
        return
    shade = BACKGROUND if token["shade"] is None or token["end"] else SHADES[token["shade"]]
    draw.rectangle(edges, fill=shade, outline={"new": NEW, "edited": EDITED}.get(state))
    draw.text((left + PAD, top + 1), _shown(shown_at(token, step) or ""), FAINT if token["end"] else INK, font)
