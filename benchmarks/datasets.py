"""The data sets behind the scores, read from the cache that ``make data`` fills."""

from __future__ import annotations

import bz2
import gzip
import html
import re
import struct
import wave
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks import data

if TYPE_CHECKING:
    from PIL import Image, ImageFont

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]

FASHION = "usr/share/datasets/fashion-mnist"
FASHION_CLASSES = 10
FASHION_MEAN, FASHION_STD = 0.2860, 0.3530
VALIDATION_IMAGES = 5_000

# -- Fashion-MNIST -------------------------------------------------------------------------------


class Labelled(NamedTuple):
    """``images[N,1,28,28]``, normalised, and ``labels[N]``."""

    images: Floats
    labels: Ints


def read_idx(file: Path) -> Bytes:
    """An array in the IDX format of the MNIST family, gzipped."""
    with gzip.open(file, "rb") as stream:
        zero, kind, rank = struct.unpack(">HBB", stream.read(4))
        if zero != 0 or kind != 8:
            raise data.DataError(f"{file} is no IDX file of bytes")
        shape = struct.unpack(f">{rank}I", stream.read(4 * rank))
        return np.frombuffer(stream.read(), np.uint8).reshape(shape)


def fashion_mnist(split: Literal["train", "validation", "test"]) -> Labelled:
    """Fashion-MNIST; ``validation`` is the last 5,000 images of the official training set."""
    folder = data.path("dataset-fashion-mnist", FASHION)
    prefix = "t10k" if split == "test" else "train"
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
    part = {"train": slice(None, -VALIDATION_IMAGES), "validation": slice(-VALIDATION_IMAGES, None)}
    chosen = part.get(split, slice(None))
    scaled = (images[chosen, None].astype(np.float32) / 255 - FASHION_MEAN) / FASHION_STD
    return Labelled(scaled.astype(np.float32), labels[chosen].astype(np.int64))


# -- Wikipedia and word similarity ---------------------------------------------------------------

GENSIM = "gensim/test/test_data"
DUMP = f"{GENSIM}/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
PAGE = re.compile(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", re.DOTALL)
# Wiki markup, in the order in which it is taken away: (pattern, what stays, how often).
MARKUP: tuple[tuple[re.Pattern[str], str, int], ...] = (
    (re.compile(r"<!--.*?-->", re.DOTALL), "", 1),
    (re.compile(r"<ref[^>]*/>|<ref.*?</ref>|<math.*?</math>", re.DOTALL), "", 1),
    (re.compile(r"\{\{[^{}]*\}\}"), "", 6),
    (re.compile(r"\{\|.*?\|\}", re.DOTALL), "", 1),
    (re.compile(r"\[\[(?:File|Image|Category):[^\[\]]*(?:\[\[[^\[\]]*\]\][^\[\]]*)*\]\]"), "", 2),
    (re.compile(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]"), r"\1", 1),
    (re.compile(r"\[https?://\S+ ?([^\]]*)\]"), r"\1", 1),
    (re.compile(r"'{2,}"), "", 1),
    (re.compile(r"<[^>]+>"), "", 1),
    (re.compile(r"^[=*#:;|!].*$", re.MULTILINE), "", 1),
    (re.compile(r"\n{2,}"), "\n", 1),
)


class Article(NamedTuple):
    """A Wikipedia article as plain text."""

    title: str
    text: str


def plain_text(markup: str) -> str:
    """Wiki markup without templates, tables, links, headings and lists."""
    for pattern, stays, times in MARKUP:
        for _ in range(times):
            markup = pattern.sub(stays, markup)
    return html.unescape(markup.strip())


def read_articles(dump: Path) -> Iterator[Article]:
    """The articles of a MediaWiki dump, without redirects."""
    with bz2.open(dump, "rt", encoding="utf-8") as stream:
        pages = PAGE.findall(stream.read())
    for title, body in pages:
        markup = html.unescape(body)
        if not markup[:20].lower().startswith("#redirect"):
            yield Article(html.unescape(title), plain_text(markup))


@cache
def wikipedia() -> tuple[Article, ...]:
    """About a hundred English Wikipedia articles, in the order of the dump."""
    return tuple(read_articles(data.path("gensim", DUMP)))


class Rated(NamedTuple):
    """Two words and how similar people find them, 0 to 10."""

    first: str
    second: str
    rating: float


def wordsim353() -> list[Rated]:
    """WordSim-353 (Finkelstein et al., 2002)."""
    lines = data.path("gensim", f"{GENSIM}/wordsim353.tsv").read_text("utf-8").splitlines()
    rows = (line.split("\t") for line in lines if line and not line.startswith("#"))
    return [Rated(first, second, float(rating)) for first, second, rating in rows]


# -- speech --------------------------------------------------------------------------------------

RATE_HZ = 16_000
SPEECH = "usr/share/pocketsphinx/test/data"


def read_wave(file: Path) -> Floats:
    """A 16-bit mono recording at 16 kHz, scaled to -1..1."""
    with wave.open(str(file)) as stream:
        if (stream.getframerate(), stream.getnchannels(), stream.getsampwidth()) != (RATE_HZ, 1, 2):
            raise data.DataError(f"{file} is not 16-bit mono at {RATE_HZ} Hz")
        samples = np.frombuffer(stream.readframes(stream.getnframes()), "<i2")
    return samples.astype(np.float32) / np.float32(32768)


def recordings(name: Literal["librivox", "cards"]) -> list[Floats]:
    """Five utterances read from "Sense and Sensibility", or five people who name playing cards."""
    folder = data.path("pocketsphinx-testdata", f"{SPEECH}/{name}")
    return [read_wave(file) for file in sorted(folder.glob("*.wav"))]


# -- photographs and fonts -----------------------------------------------------------------------

PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png"),
    *("coins.png", "moon.png", "motorcycle_left.png", "motorcycle_right.png", "retina.jpg", "rocket.jpg"),
)
#: none of them shows what one of ``PHOTOGRAPHS`` shows
OTHER_PHOTOGRAPHS = (
    ("matplotlib", "matplotlib/mpl-data/sample_data/grace_hopper.jpg"),
    ("scikit-image", "skimage/data/grass.png"),
    ("scikit-image", "skimage/data/gravel.png"),
    ("scikit-image", "skimage/data/hubble_deep_field.jpg"),
    ("scikit-image", "skimage/data/ihc.png"),
)
FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSans-Bold", "DejaVuSansMono", "STIXGeneral")


def photographs() -> list[Image.Image]:
    """The sample images of scikit-image that show one clear thing, as RGB."""
    from PIL import Image

    folder = data.path("scikit-image", "skimage/data")
    return [Image.open(folder / name).convert("RGB") for name in PHOTOGRAPHS]


def other_photographs() -> list[Image.Image]:
    """Images for calibration, as RGB."""
    from PIL import Image

    return [Image.open(data.path(package, member)).convert("RGB") for package, member in OTHER_PHOTOGRAPHS]


@cache
def font(name: str, size_px: int) -> ImageFont.FreeTypeFont:
    """One of ``FONTS`` at a size in pixels."""
    from PIL import ImageFont

    return ImageFont.truetype(data.path("matplotlib", f"matplotlib/mpl-data/fonts/ttf/{name}.ttf"), size_px)
