"""Draw a label map as a PNG: north up and east left, with legend, scale bar and compass.

Reads   a label map and its coverage, both (y, x).
Writes  one PNG, with Pillow: processing draws one or two per galaxy, and importing matplotlib takes
        longer than processing the labels.

    >>> write_label_png(path, labels, "BPT", covered, "S/N > 3")
"""

from __future__ import annotations

from pathlib import Path

import utils

import numpy as np

import hsi_proc_fns
from labels import CLASS_COLOURS, MASKED_COLOUR, TASK_TITLES, class_names, label_classes

HATCH_GREY = 154
BAR_SPAXELS = 10
"""Length of the scale bar: 5 arcsec in spaxels of 0.5 arcsec (Law et al. 2016, AJ 152, 83)."""


def write_label_png(
    path: Path, labels: np.ndarray, label_task: str, covered: np.ndarray, note: str = ""
) -> None:
    """Draw a label map; the metallicity is shown in six classes.

    Parameters
    ----------
    labels : (y, x)
        BPT classes (-1 without a label) or 12+log(O/H) (NaN without a label).
    covered : (y, x) bool
        Spaxels with a measurement; hatched where they have no label. Other spaxels in the field of
        view (`hsi_proc_fns.field_of_view`) are masked ones and grey.
    note : str
        Second line of the title: how the labels were made (calibration, signal-to-noise cut).
    """
    from PIL import Image, ImageDraw, ImageFont

    classes, names = label_classes(labels, label_task), class_names(label_task)
    colours = CLASS_COLOURS[label_task, len(names)]
    ny, nx = labels.shape
    zoom, margin, top = max(4, 420 // max(ny, nx)), 12, 56
    right = nx * zoom + 2 * margin
    size = (right + 178, max(ny * zoom, 24 * (len(names) + 3)) + top + 44)
    hatch = np.full((size[1], size[0], 3), 255, np.uint8)
    hatch[np.add(*np.indices(size[::-1])) % 8 == 0] = HATCH_GREY

    def enlarged(mask: np.ndarray) -> Image.Image:
        """Mask of the whole picture, from a mask (y, x) of the map."""
        whole = Image.new("L", size)
        small = Image.fromarray(mask[::-1].astype(np.uint8) * 255)
        whole.paste(small.resize((nx * zoom, ny * zoom), Image.Resampling.NEAREST), (margin, top))
        return whole

    image, hatched = Image.new("RGB", size, "white"), Image.fromarray(hatch)
    masked = ~covered & hsi_proc_fns.field_of_view(covered)
    image.paste(hatched, mask=enlarged(covered))
    image.paste(MASKED_COLOUR, mask=enlarged(masked))
    for k, colour in enumerate(colours):
        image.paste(colour, mask=enlarged(classes == k))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    labelled = utils.counted(int((classes >= 0).sum()), "labelled spaxel")
    draw.text((margin, 8), f"{path.stem}   {TASK_TITLES[label_task]}   {labelled}", "black", font)
    draw.text((margin, 30), note, "black", ImageFont.load_default(13))
    entries: list[tuple[str, str | None]] = list(zip(names, colours, strict=True))
    if label_task == "logOH":
        entries.reverse()  # high above low
    entries += [("no label", None), *([("masked", MASKED_COLOUR)] if masked.any() else [])]
    for i, (name, fill) in enumerate(entries):
        box = (right, top + 24 * i, right + 16, top + 24 * i + 16)
        image.paste(fill or hatched.crop(box), box)
        draw.rectangle(box, None, "black")
        draw.text((right + 24, box[1] - 1), name, "black", font)
    low, bar = size[1] - 14, BAR_SPAXELS * zoom
    draw.line((margin, low, margin + bar, low), "black", 3)
    draw.text((margin, low - 22), '5"', "black", font)
    corner = right - margin - 4
    draw.line((corner - 20, low, corner, low, corner, low - 20), "black", 2)
    draw.text((corner - 34, low - 9), "E", "black", font)
    draw.text((corner - 5, low - 38), "N", "black", font)
    with utils.atomic_path(path) as part:
        image.save(part)
