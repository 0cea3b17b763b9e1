"""Words of Wikipedia rendered as images: what the text detector and the recogniser are scored on.

Rendered text on noise, no photographs: scores are comparable with each other, not with a paper's.
"""

from __future__ import annotations

import random
import re
from functools import cache
from typing import NamedTuple

import numpy as np

from benchmarks.datasets import FONTS, Bytes, Floats, font, wikipedia

WORD = re.compile(r"[A-Za-z0-9,.'-]{2,12}")
ARTICLES = 30
LINE_HEIGHT_PX = 48
LINE_COUNT = 120
LONGEST = 24
PAGE_SIDE_PX = 640
PAGE_COUNT = 6
NOISE = 12.0


class Line(NamedTuple):
    """One line of text: ``pixels[48,W,3]`` from 0 to 255."""

    text: str
    pixels: Floats


class Box(NamedTuple):
    """A rectangle in pixels, right and bottom exclusive."""

    left: int
    top: int
    right: int
    bottom: int


class Page(NamedTuple):
    """Several lines of text: ``pixels[640,640,3]`` from 0 to 255."""

    boxes: tuple[Box, ...]
    pixels: Floats


@cache
def words() -> tuple[str, ...]:
    """All words of the first articles, in order."""
    return tuple(word for article in wikipedia()[:ARTICLES] for word in WORD.findall(article.text))


def phrase(rng: random.Random) -> str:
    """One to three words that follow each other somewhere, at most 24 letters."""
    start = rng.randrange(len(words()) - 4)
    return " ".join(words()[start : start + rng.randint(1, 3)])[:LONGEST].strip()


def with_noise(image: Bytes, rng: random.Random) -> Floats:
    """An image with Gaussian noise."""
    noise = np.random.default_rng(rng.randrange(1 << 30)).normal(0, NOISE, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.float32)


def render_line(rng: random.Random) -> Line:
    """A dark phrase on a bright background, in a random font and size."""
    from PIL import Image, ImageDraw

    text = phrase(rng)
    face = font(rng.choice(FONTS), rng.randint(22, 34))
    _, top, right, bottom = face.getbbox(text)
    paper = Image.new("RGB", (int(right) + 24, LINE_HEIGHT_PX), (255 - rng.randint(0, 60),) * 3)
    ink = (rng.randint(0, 90),) * 3
    ImageDraw.Draw(paper).text((12, (LINE_HEIGHT_PX - int(bottom + top)) // 2), text, ink, face)
    return Line(text, with_noise(np.asarray(paper), rng))


@cache
def lines() -> tuple[Line, ...]:
    """120 lines, the same ones every time."""
    rng = random.Random(0)
    return tuple(render_line(rng) for _ in range(LINE_COUNT))


def render_page(rng: random.Random) -> Page:
    """Lines of different sizes below each other, not all of them starting at the left."""
    from PIL import Image, ImageDraw

    paper = Image.new("RGB", (PAGE_SIDE_PX, PAGE_SIDE_PX), (255 - rng.randint(0, 60),) * 3)
    draw = ImageDraw.Draw(paper)
    boxes = []
    top = rng.randint(10, 40)
    while True:
        text, face = phrase(rng), font(rng.choice(FONTS), rng.randint(9, 30))
        where = (rng.randint(10, 120), top)
        left, upper, right, lower = (int(edge) for edge in draw.textbbox(where, text, face))
        if lower > PAGE_SIDE_PX - 10:
            break
        draw.text(where, text, (rng.randint(0, 90),) * 3, face)
        boxes.append(Box(left, upper, min(right, PAGE_SIDE_PX), lower))
        top = lower + rng.randint(8, 40)
    return Page(tuple(boxes), with_noise(np.asarray(paper), rng))


@cache
def pages() -> tuple[Page, ...]:
    """Six pages, the same ones every time."""
    rng = random.Random(1)
    return tuple(render_page(rng) for _ in range(PAGE_COUNT))


def normalise(pixels: Floats) -> Floats:
    """``pixels[H,W,3]`` from 0 to 255 as ``image[3,H,W]`` from -1 to 1."""
    return ((pixels / 255 - 0.5) / 0.5).transpose(2, 0, 1).astype(np.float32)
