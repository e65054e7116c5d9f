"""Look at a data set: describe it, check it, draw an event.

Reads   an HDF5 file written by image_extractor.py.
Writes  a PNG file (plot).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import tables

from . import layout
from .cuts import event_keys
from .errors import DataError
from .transaction import write_whole


def inspect(path: str | Path) -> str:
    """Describe a data set as text: parameters, runs, telescopes, events, configuration."""
    with layout.open_layout(path) as h5:
        attrs = layout.check_schema(h5)
        runs, telescopes = layout.runs_table(h5), layout.tel_table(h5)
        lines = [
            f"{path}: {attrs['schema']} {attrs['schema_version']}, "
            f"{Path(path).stat().st_size / 1e6:.1f} MB"
        ]
        shown = (
            "mode",
            "storage_mode",
            "channels",
            "dim_order",
            "scale_factor",
            "charge_unit_pe",
            "time_unit_samples",
            "compression",
            "energy_bin_source",
            "cuts_source",
            "split",
            "shuffle_seed",
            "created_utc",
            "modified_utc",
            "code_version",
            "ctapipe_version",
            "eventio_version",
        )
        lines += ["", "Parameters"]
        lines += [f"  {name:18} {attrs[name]}" for name in shown if str(attrs.get(name, ""))]
        lines += ["", f"Runs ({len(runs)} files)"]
        for run in runs:
            note = (
                ""
                if run["complete"]
                else f"  INCOMPLETE: {run['problem'].decode('utf-8', 'replace')}"
            )
            lines.append(
                f"  run {run['run_number']:<8} {run['file'].decode('utf-8', 'replace')}: "
                f"{run['events_written']} of {run['events_read']} events{note}"
            )
        lines += ["", f"Telescopes ({len(telescopes)})"]
        for kind in dict.fromkeys(zip(telescopes["tel_type"], telescopes["camera"], strict=True)):
            chosen = telescopes[
                (telescopes["tel_type"] == kind[0]) & (telescopes["camera"] == kind[1])
            ]
            _, _, camera = layout.camera_pixels(h5, kind[1].decode())
            lines.append(
                f"  {len(chosen):3} {kind[0].decode()} {camera['name']}: "
                f"{camera['n_pixels']} pixels, mapped by "
                f"{camera['mapping']} to "
                f"{' x '.join(map(str, json.loads(camera['image_shape'])))}; "
                f"ids {_ids(chosen['tel_id'])}"
            )
        lines += ["", "Events"]
        for table in layout.event_tables(h5):
            lines.append(
                f"  {table._v_pathname}: {table.nrows} events{_energy_range(table)}{_labels(table)}"
                f"{_shared(h5, table, attrs)}"
            )
            lines += _image_counts(table, telescopes)
        lines += ["", "Configuration", *(f"  {line}" for line in str(attrs["config"]).splitlines())]
    return "\n".join(lines)


def _ids(values: np.ndarray) -> str:
    """List ids, consecutive ones as a-b."""
    parts: list[list[int]] = []
    for value in values.tolist():
        if parts and value == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], value]
        else:
            parts.append([value, value])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


def _energy_range(table: tables.Table) -> str:
    group = table._v_parent._v_attrs
    if "min_energy" not in group:
        return ""
    return f", {10**group.min_energy:.3g} to {10**group.max_energy:.3g} {group.units}"


def _labels(table: tables.Table) -> str:
    if not table.nrows or table.chunkshape[0] == 1:
        return ""
    labels, counts = np.unique(table.col("gamma_hadron_label"), return_counts=True)
    return ", label " + ", ".join(f"{k}: {n}" for k, n in zip(labels, counts, strict=True))


def _shared(h5: tables.File, table: tables.Table, attrs: dict[str, Any]) -> str:
    """Say how many events of a part have their shower in another part, too."""
    index, part = layout.index_table(h5), json.loads(str(attrs["parts"])).index(table.name)
    is_here = (index["group"] == layout.group_number(table)) & (index["part"] == part)
    n = int(shared_showers(index["shower"], index["part"])[is_here].sum())
    return f"; {n} have their shower in another part, too" if n else ""


def _image_counts(table: tables.Table, telescopes: np.ndarray) -> list[str]:
    if "tel_map" not in table.colnames:
        tel_ids = telescopes["tel_id"].tolist()
        return (
            [
                f"    columns T{tel_ids[0]} .. T{tel_ids[-1]}: "
                f"{table.coldtypes[f'T{tel_ids[0]}'].base}"
            ]
            if tel_ids
            else []
        )
    counts: dict[bytes, int] = {}
    dtype = shape = None
    per_slot = (table.col("tel_map") >= 0).sum(axis=0)
    for row, n in zip(telescopes, per_slot.tolist(), strict=True):
        node = getattr(table._v_parent, f"T{row['tel_id']}")
        counts[row["tel_type"]] = counts.get(row["tel_type"], 0) + n
        dtype, shape = node.dtype, node.shape[1:]
    listed = ", ".join(f"{n} {k.decode()}" for k, n in counts.items() if n)
    return [f"    images: {listed or 'none'} ({dtype}, e.g. {' x '.join(map(str, shape or ()))})"]


def validate(path: str | Path) -> list[str]:
    """Check a data set; return its problems, one line each.

    Every node must have its checksum, every event its own. Each image must belong to exactly one
    event, each event be unique and in the index; no shower may be in two parts of a split, unless
    it was asked for; bins and labels must be in range, energies finite and in their bin, runs and
    counts consistent.
    """
    with layout.open_layout(path) as h5:
        problems = _guarded("the file", lambda: _check_nodes(h5))
        needed = ("/: ", *(f"{n}: " for n in (layout.TEL_TABLE, layout.RUNS, layout.INDEX)))
        if not any(p.startswith(needed) for p in problems):
            problems += _guarded("the file", lambda: _check_events(h5))
    return list(dict.fromkeys(problems))


def damaged_nodes(path: str | Path) -> list[str]:
    """Compare every node, but not every event, with its checksum; return problems as `validate`."""
    with layout.open_layout(path) as h5:
        return _guarded("the file", lambda: _check_nodes(h5))


def _guarded(what: str, check: Callable[[], list[str]]) -> list[str]:
    """Run a check; an error while reading means damage."""
    try:
        return check()
    # PyTables has no error type of its own for damaged files: almost any error occurs.
    except MemoryError:
        raise  # says nothing about the file
    except Exception as error:
        return [f"{what}: cannot be read ({type(error).__name__}), so the file is damaged"]


def _check_nodes(h5: tables.File) -> list[str]:
    found = []
    for node in h5.walk_nodes("/"):
        path = node._v_pathname

        def differs(node: tables.Node = node, path: str = path) -> list[str]:
            is_same = int(node._v_attrs[layout.CHECKSUM]) == layout.node_checksum(node)
            return [] if is_same else [f"{path}: differs from its checksum, so it was changed"]

        found += _guarded(path, differs)
    return found


def _check_events(h5: tables.File) -> list[str]:
    problems: list[str] = []
    attrs = layout.check_schema(h5)
    is_mapped = attrs["storage_mode"] == "mapped"
    telescopes, runs, index = layout.tel_table(h5), layout.runs_table(h5), layout.index_table(h5)
    edges = json.loads(str(attrs["energy_bin_edges_tev"]))
    parts = json.loads(str(attrs["parts"]))
    used: dict[str, dict[int, list[np.ndarray]]] = {}
    showers, part_of, n_events = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], 0
    for table in layout.event_tables(h5):
        where = table._v_pathname
        group = used.setdefault(table._v_parent._v_pathname, {})
        number = layout.group_number(table)
        part = parts.index(table.name)
        entries = index[(index["group"] == number) & (index["part"] == part)]
        n_events += int(table.nrows)
        if len(entries) != table.nrows:
            problems.append(
                f"{where}: its {table.nrows} events are not the same as the {len(entries)} that "
                f"{layout.INDEX} lists for it"
            )
            continue  # a damaged length may be any
        for start in range(0, int(table.nrows), _batch(table)):
            rows = table.read(start, start + _batch(table))
            showers.append(layout.shower_keys(rows))
            part_of.append(np.full(len(rows), part))
            problems += _check_rows(where, rows, table, attrs, edges)
            listed = entries[start : start + len(rows)]
            if not (event_keys(rows) == event_keys(listed)).all():
                problems.append(
                    f"{where}: its events are not the same as those that {layout.INDEX} lists"
                )
            problems += _check_checksums(h5, where, rows, listed, telescopes)
            if is_mapped:
                for slot, tel_id in enumerate(telescopes["tel_id"].tolist()):
                    indices = rows["tel_map"][:, slot]
                    group.setdefault(tel_id, []).append(indices[indices >= 0])
            else:
                problems += _check_blank(where, rows, telescopes)
    if is_mapped:
        problems += _check_indices(h5, used)
    if np.unique(index[["run_number", "event_number", "identity"]]).size != len(index):
        problems.append("an event occurs twice")
    if not np.array_equal(
        np.bincount(index["source"], minlength=len(runs)), runs["events_written"]
    ):
        problems.append(f"{layout.RUNS}: its counts are not those of {layout.INDEX}")
    if int(runs["events_written"].sum()) != n_events:
        problems.append(
            f"{layout.RUNS}: counts {runs['events_written'].sum()} events, but the tables have "
            f"{n_events}"
        )
    by = json.loads(str(attrs.get("split", "{}"))).get("by")
    if by == "shower":
        shared = shared_showers(np.concatenate(showers), np.concatenate(part_of))
        if shared.any():
            problems.append(
                f"the split: {int(shared.sum())} events have their shower in another part, too, so "
                "that the parts are not independent"
            )
    return problems


def shared_showers(showers: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Which events have their shower in another part, too.

    Parameters
    ----------
    showers : (n,) uint64 array
    parts : (n,) int array

    Returns
    -------
    (n,) bool array
    """
    _, shower = np.unique(showers, return_inverse=True)
    pairs = np.unique(np.stack([shower, parts]), axis=1)
    return np.bincount(pairs[0], minlength=1)[shower] > 1


def _check_checksums(
    h5: tables.File, where: str, rows: np.ndarray, listed: np.ndarray, telescopes: np.ndarray
) -> list[str]:
    """Compare each event and its images with its checksum in the index."""
    tel_ids, group = telescopes["tel_id"].tolist(), where.rpartition("/")[0]
    is_mapped = "tel_map" in (rows.dtype.names or ())
    found, damaged = [], 0
    for row, expected in zip(rows, listed["checksum"].tolist(), strict=True):
        images = []
        for slot in np.flatnonzero(row["tel_map"] >= 0 if is_mapped else row["trig_list"]).tolist():
            name = f"T{tel_ids[slot]}"
            try:
                image = (
                    h5.get_node(f"{group}/{name}")[row["tel_map"][slot]] if is_mapped else row[name]
                )
            except (tables.HDF5ExtError, IndexError):
                found.append(f"{group}/{name}: cannot be read, so the file is damaged")
                break
            images.append((slot, image))
        else:
            damaged += layout.event_checksum(row, images) != expected
    if damaged:
        found.append(f"{where}: {damaged} events differ from their checksums, so they were changed")
    return found


def _batch(table: tables.Table) -> int:
    return max(1, layout.BATCH_BYTES // 4 // table.rowsize)


def _check_rows(
    where: str, rows: np.ndarray, table: tables.Table, attrs: dict[str, Any], edges: list[float]
) -> list[str]:
    found = []
    energy = rows["mc_energy"]
    if not (np.isfinite(energy) & (energy > 0)).all():
        found.append(f"{where}: a true energy is not a positive number")
    if not (np.abs(rows["alt"]) <= np.pi / 2 + 1e-6).all():
        found.append(f"{where}: an altitude is above 90 degrees")
    for name in ("core_x", "core_y", "az"):
        if not np.isfinite(rows[name]).all():
            found.append(f"{where}: {name} is not finite")
    if "energy_reconstruction_bin_label" in table.colnames:
        label = rows["energy_reconstruction_bin_label"]
        expected = np.searchsorted(edges, energy, side="right") - 1
        if not (label == expected).all():
            found.append(f"{where}: an energy bin label does not fit the true energy")
    else:
        number = int(table._v_parent._v_name[1:])
        low, high = edges[number : number + 2]
        value = (
            energy if attrs["energy_bin_source"] == "mc_energy" else rows["reconstructed_energy"]
        )
        if not ((value >= low * (1 - 1e-9)) & (value < high * (1 + 1e-9))).all():
            found.append(f"{where}: an event's energy is outside its bin, {low:g} to {high:g} TeV")
    return found


def _check_blank(where: str, rows: np.ndarray, telescopes: np.ndarray) -> list[str]:
    found = []
    for slot, tel_id in enumerate(telescopes["tel_id"].tolist()):
        blank = rows["trig_list"][:, slot] == 0
        if rows[f"T{tel_id}"][blank].any():
            found.append(f"{where}: T{tel_id} is not blank in an event in which it did not trigger")
    if not (rows["trig_list"] <= 1).all() or not rows["trig_list"].any(axis=1).all():
        found.append(f"{where}: an event has no image, or a value in trig_list is neither 0 nor 1")
    return found


def _check_indices(h5: tables.File, used: dict[str, dict[int, list[np.ndarray]]]) -> list[str]:
    found = []
    for group, by_telescope in used.items():
        for tel_id, pieces in by_telescope.items():
            node = h5.get_node(f"{group.rstrip('/')}/T{tel_id}")
            indices = np.concatenate(pieces)
            if indices.size != node.nrows or not (np.sort(indices) == np.arange(node.nrows)).all():
                found.append(
                    f"{node._v_pathname}: its {node.nrows} images do not match the "
                    f"{indices.size} entries in tel_map one to one"
                )
    return found


def plot(
    path: str | Path,
    output: str | Path,
    event: int | None = None,
    run: int | None = None,
    max_images: int = 4,
) -> str:
    """Draw an event: per image, the charges in the camera, the stored image and the peak times.

    All charges share one colour scale, from 0 to the largest charge drawn; it follows the square
    root of the charge, so that faint images are visible beside bright ones. Peak times have one
    scale per row, because they count samples from the start of that telescope's read-out.

    Parameters
    ----------
    event, run : int, optional
        Numbers of the event. Default: the event with the largest total charge among the first
        200.
    max_images : int
        The brightest images are drawn, at most this many.

    Returns
    -------
    str
        A line that says what was drawn.

    Raises
    ------
    DataError
        If the event is not in the file or the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    from .gallery import BRIGHT_SIGMA, noise_rms

    with layout.open_layout(path) as h5:
        attrs = layout.check_schema(h5)
        table, row = _find(h5, path, event, run)
        values = table.read(row, row + 1)[[n for n in table.colnames if n[:1] != "T"]][0]
        images = layout.event_images(h5, table, row)
        images = {t: _unscaled(_channels_first(i, attrs), attrs) for t, i in images.items()}
        charges = {t: i[0] * float(attrs["charge_unit_pe"]) for t, i in images.items()}
        chosen = sorted(images, key=lambda t: -float(charges[t].sum()))[:max_images]
        has_time = "time" in json.loads(str(attrs["channels"]))
        telescopes = {int(t["tel_id"]): t for t in layout.tel_table(h5)}
        cameras = {t: layout.camera_pixels(h5, telescopes[t]["camera"].decode()) for t in chosen}
    in_pixels = {
        t: _per_pixel(charges[t], matrix, len(pixels)) for t, (pixels, matrix, _) in cameras.items()
    }
    drawn_charges = [v for t in chosen for v in (charges[t], in_pixels[t])]
    norm = PowerNorm(0.5, 0.0, max(1.0, *(float(v.max()) for v in drawn_charges)))
    n_columns = 3 if has_time else 2
    figure = Figure(figsize=(4.6 * n_columns, 4.0 * len(chosen) + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(chosen), n_columns, squeeze=False)
    for line, tel_id in zip(axes, chosen, strict=True):
        pixels, _, camera = cameras[tel_id]
        charge = charges[tel_id]
        name = f"T{tel_id} {telescopes[tel_id]['tel_type'].decode()} {camera['name']}"
        _camera_axes(line[0], pixels, in_pixels[tel_id], norm, f"{name}: camera")
        _picture_axes(line[1], charge, norm, f"stored image ({camera['mapping']})", "charge (p.e.)")
        if has_time:
            bright = charge > BRIGHT_SIGMA * noise_rms(in_pixels[tel_id])
            samples = images[tel_id][1] * float(attrs["time_unit_samples"])
            time = np.where(bright, samples, np.nan)
            shown = _picture_axes(
                line[2], time, None, "peak times of bright cells", "time (samples)"
            )
            if shown is not None:
                figure.colorbar(shown, ax=line[2], label="time (samples)")
    is_vector = charges[chosen[0]].ndim == 1
    figure.colorbar(
        ScalarMappable(norm, "viridis"),
        ax=axes[:, 0 if is_vector else 1],
        label="charge per pixel or cell (p.e.)",
        aspect=50,
    )
    particle = {0: "gamma", 101: "proton"}.get(
        int(values["primary_id"]), f"particle {values['primary_id']}"
    )
    title = (
        f"run {values['run_number']} event {values['event_number']}: {particle}, "
        f"{values['mc_energy']:.3g} TeV, {len(images)} images"
    )
    figure.suptitle(title)
    drawn = BytesIO()
    figure.savefig(drawn, format=Path(output).suffix[1:] or "png", dpi=90)
    write_whole(Path(output), drawn.getvalue())
    return f"{title}; {len(chosen)} of them drawn to {output}"


def draw_gallery(path: str | Path, *arguments: Any) -> str:
    """Call `gallery.gallery`, for the commands, which reach files through this module."""
    from .gallery import gallery

    return gallery(path, *arguments)


def _channels_first(image: np.ndarray, attrs: dict[str, Any]) -> np.ndarray:
    return image if attrs["dim_order"] == "channels_first" else np.moveaxis(image, -1, 0)


def _unscaled(image: np.ndarray, attrs: dict[str, Any]) -> np.ndarray:
    """Undo scale_factor in (channel, x, y); vectors (channel, pixel) are not scaled."""
    scale = int(attrs["scale_factor"])
    return image[:, ::scale, ::scale] if image.ndim == 3 else image


def _find(
    h5: tables.File, path: str | Path, event: int | None, run: int | None
) -> tuple[tables.Table, int]:
    best: tuple[float, tables.Table, int] | None = None
    looked = 0
    for table in layout.event_tables(h5):
        for row in range(int(table.nrows)):
            if event is not None or run is not None:
                values = table.read(row, row + 1)
                if event in (None, int(values["event_number"][0])) and run in (
                    None,
                    int(values["run_number"][0]),
                ):
                    return table, row
                continue
            if looked >= 200:
                break
            looked += 1
            images = layout.event_images(h5, table, row)
            attrs = layout.check_schema(h5)
            total = sum(float(_channels_first(i, attrs)[0].sum()) for i in images.values())
            if best is None or total > best[0]:
                best = (total, table, row)
    if best is None:
        wanted = f"event {event}" if event is not None else "event"
        of_run = f" of run {run}" if run is not None else ""
        raise DataError(
            f"{path}: has no {wanted}{of_run}. See its runs with: image-extractor inspect {path}"
        )
    return best[1], best[2]


def _per_pixel(charge: np.ndarray, matrix: np.ndarray, n_pixels: int) -> np.ndarray:
    """Charge of each pixel, derived from the cells it was mapped to.

    Exact if each cell belongs to one pixel. If pixels share cells the charges are smoothed; a
    constant charge stays constant.
    """
    flat = charge.reshape(-1)
    cell, pixel, weight = matrix["cell"], matrix["pixel"], matrix["weight"].astype(float)
    in_cell = np.bincount(cell, weight, flat.size)
    total = np.bincount(pixel, weight * flat[cell], n_pixels)
    norm = np.bincount(pixel, weight * in_cell[cell], n_pixels)
    return np.divide(total, norm, out=np.zeros(n_pixels), where=norm > 0)


def _camera_axes(ax: Any, pixels: np.ndarray, values: np.ndarray, norm: Any, title: str) -> None:
    from matplotlib.collections import PolyCollection

    from .mapping import lattice_neighbors

    x, y = pixels["x"], pixels["y"]
    spacing, turn = _lattice(x, y)
    if lattice_neighbors(x, y) == 6:
        # The corners of a hexagon lie between the directions of its neighbours.
        angles, radius = turn + np.radians(30 + 60 * np.arange(6)), spacing / np.sqrt(3)
    else:
        angles, radius = np.radians(45 + 90 * np.arange(4)), spacing / np.sqrt(2)
    corners = np.stack(
        [x[:, None] + radius * np.cos(angles), y[:, None] + radius * np.sin(angles)], -1
    )
    ax.add_collection(
        PolyCollection(
            list(corners),
            array=values,
            cmap="viridis",
            norm=norm,
            edgecolors="face",
            linewidths=0.1,
        )
    )
    ax.set_aspect("equal")
    ax.autoscale_view()
    ax.set(title=title, xlabel="x (m)", ylabel="y (m)")


def _lattice(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Pixel spacing and, for a hexagonal lattice, the direction of a neighbour (rad)."""
    few = slice(0, 300)
    dx, dy = x[:, None] - x[None, few], y[:, None] - y[None, few]
    distance = np.hypot(dx, dy)
    spacing = float(np.median(np.where(distance > 0, distance, np.inf).min(axis=0)))
    near = (distance > 0) & (distance < 1.25 * spacing)
    return spacing, float(np.angle(np.mean(np.exp(6j * np.arctan2(dy[near], dx[near]))))) / 6


def _picture_axes(ax: Any, values: np.ndarray, norm: Any, title: str, label: str) -> Any:
    """Draw an image and return it for its colour bar; a vector is drawn as a curve, without one."""
    if values.ndim == 1:
        ax.plot(values, ".-", lw=0.5, ms=2)  # dots: a single bright pixel would be a thin line
        ax.set(title=title, xlabel="pixel", ylabel=label)
        if norm is not None:
            ax.set_ylim(top=1.05 * norm.vmax)
        return None
    ax.set(title=title, xlabel="first axis (cells)", ylabel="second axis (cells)")
    # The first axis is x: transposed and with the origin below, it has the camera's orientation.
    return ax.imshow(values.T, origin="lower", cmap="viridis", norm=norm, interpolation="nearest")
