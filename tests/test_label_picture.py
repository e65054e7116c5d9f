"""Pictures of label maps: hatching, grey, white sky, scale bar and note, pixel by pixel."""

import numpy as np
import pytest
from PIL import Image

from label_picture import write_label_png
from labels import CLASS_COLOURS, LABEL_NONE, label_classes

GREY = 0xBD
"""Of masked spaxels, in all three channels."""


def drawn(path, labels, task, covered, note=""):
    """Pixels (row, column, RGB) of the picture of a label map."""
    write_label_png(path, labels, task, covered, note)
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_unlabelled_spaxels_are_hatched_and_masked_ones_grey(tmp_path):
    labels = np.full((40, 42), np.nan, np.float32)
    labels[30:35, 5:12] = 8.5
    covered = np.zeros(labels.shape, bool)
    covered[2:38, 2:40] = True
    covered[10:14, 20:25] = False  # a star
    path = tmp_path / "1-1.png"
    pixels = drawn(path, labels, "logOH", covered, "O3N2-M13, S/N > 3")
    zoom, left, top = 10, 12, 56
    spaxels = pixels[top : top + 40 * zoom, left : left + 42 * zoom]
    spaxels = spaxels.reshape(40, zoom, 42, zoom, 3).swapaxes(1, 2)[::-1]  # north is up
    colour = tuple(bytes.fromhex(CLASS_COLOURS["logOH", 6][3][1:]))
    assert (spaxels[30:35, 5:12] == colour).all()
    assert (spaxels[10:14, 20:25] == GREY).all()
    assert (spaxels[~(covered | (label_classes(labels, "logOH") >= 0))][0] == 255).all()
    unlabelled = spaxels[20, 10]
    assert (unlabelled == 255).any()
    assert (unlabelled != 255).any()
    assert (unlabelled != GREY).all()  # lines, of another grey than masked spaxels
    bar = (pixels[-14, : left + 42 * zoom // 2] == 0).all(axis=-1)
    assert bar.sum() == pytest.approx(10 * zoom, abs=2)  # 5 arcsec
    changed = np.argwhere((drawn(path, labels, "logOH", covered) != pixels).any(axis=-1))
    assert changed.size
    assert changed[:, 0].max() < top  # the note stands above the map


def test_a_dead_fibre_at_the_edge_is_grey_and_the_sky_white(tmp_path):
    y, x = np.indices((33, 33))
    hexagon = (np.abs(x - 16) + np.abs(y - 16) / 2 <= 15) & (np.abs(y - 16) <= 12)
    covered = hexagon & (np.hypot(y - 22, x - 28) > 4)  # a bite off a slanted edge
    labels = np.where(covered, 0, LABEL_NONE)
    pixels = drawn(tmp_path / "1-1.png", labels, "BPT", covered)
    centres = 12 * np.arange(33) + 6  # 12 pixels per spaxel
    spaxels = pixels[56 + centres[::-1, None], 12 + centres]
    assert (spaxels[hexagon & ~covered] == GREY).all()
    assert (spaxels[~hexagon] == 255).all()


@pytest.mark.parametrize("task", ["BPT", "logOH"])
def test_a_map_without_labels_can_be_drawn(tmp_path, task):
    labels = np.full((1, 1), LABEL_NONE if task == "BPT" else np.nan)
    pixels = drawn(tmp_path / "1-1.png", labels, task, np.zeros((1, 1), bool))
    assert min(pixels.shape[:2]) > 100
