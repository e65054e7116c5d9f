"""Inspect, validate, plot."""

import multiprocessing
import os
import re
import shutil
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import tables
from conftest import all_images, decompressed, extract, other_production, real_file

from image_extractor import cli, look
from image_extractor.errors import DataError
from image_extractor.gallery import BRIGHT_SIGMA, noise_rms
from image_extractor.settings import EnergyBins


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    path = tmp_path_factory.mktemp("look") / "o.h5"
    extract("proton", path)
    return path


def test_inspect_describes_a_data_set(data_set, capsys):
    assert cli.main(["inspect", str(data_set)]) == 0
    text = capsys.readouterr().out
    for words in (
        "run ",
        "6 of 6 events",
        "4 LST LSTCam: 1855 pixels, mapped by axial to 55 x 55; ids 1-4",
        " MST FlashCam: 1764 pixels, mapped by axial to ",
        "label 101:",
        "ctapipe_version",
        "type_mode = ALL",
    ):
        assert words in text


def test_inspect_counts_the_images_of_each_part(tmp_path, caplog):
    one_bin = EnergyBins(min=-2, max=2, bin_size=4)
    split = {"A": 0.6, "B": 0.3, "C": 0.1}
    extract("proton", tmp_path / "o.h5", split=split, energy_bins=one_bin)
    text = look.inspect(tmp_path / "o.h5")
    counts = {}
    with tables.open_file(str(tmp_path / "o.h5")) as h5:
        for part in split:
            table = h5.get_node(f"/E0/Events_{part}")
            counts[part] = int((table.col("tel_map") >= 0).sum())
            after = text.partition(f"/E0/Events_{part}: ")[2].splitlines()[1]
            assert sum(map(int, re.findall(r"(\d+) (?:LST|MST|SST)", after))) == counts[part]
    with tables.open_file(str(tmp_path / "o.h5")) as h5:
        assert sum(counts.values()) == sum(int(node.nrows) for node in h5.walk_nodes("/", "EArray"))
    assert counts["C"] == 0
    assert "Events_C has no event: there are only 6 events, of 3 showers." in caplog.text


def test_a_picture_that_cannot_be_written_is_reported_in_one_line(data_set, tmp_path, capsys):
    output = tmp_path / "none" / "p.png"
    assert cli.main(["plot", str(data_set), "--output", str(output)]) == 1
    err = capsys.readouterr().err
    assert err == (
        f"{output}: cannot be written (No such file or directory). "
        "Check its folder, the permissions and the free space.\n"
    )


def test_a_failed_picture_leaves_the_old_one(data_set, tmp_path, monkeypatch):
    (tmp_path / "p.png").write_text("old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", _half_a_picture)
    with pytest.raises(OSError, match="No space"):
        look.plot(data_set, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


def _half_a_picture(_, file, **__):
    """Write like matplotlib, to a path or an open file, and fail half-way."""
    with file if hasattr(file, "write") else Path(file).open("wb") as f:
        f.write(b"half")
    raise OSError(28, "No space left on device")


def damage(path, how):
    with tables.open_file(str(path), "a") as h5:
        how(h5.root)


def _set(table, row, column, value):
    def how(root):
        node = root._v_file.get_node(table)
        values = node.read(row, row + 1)
        values[column] = value
        node.modify_rows(row, row + 1, rows=values)

    return how


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (_set("/E2/Events", 0, "mc_energy", -1.0), "not a positive number"),
        (_set("/E2/Events", 0, "mc_energy", 50.0), "outside its bin"),
        (_set("/E2/Events", 0, "alt", 3.0), "above 90 degrees"),
        (_set("/E2/Events", 0, "core_x", np.nan), "core_x is not finite"),
        (_set("/E2/Events", 0, "tel_map", -1), "do not match"),
        (_set("/E2/Events", 0, "tel_map", 7), "do not match"),
        (_set("/E2/Events", 0, "event_number", 1), "not the same"),
        (lambda root: root.E2.Events.remove_rows(0, 1), "counts 6 events, but the tables have 5"),
        (lambda root: root.E2.T5.truncate(0), "do not match"),
    ],
)
def test_validate_finds_damage(data_set, tmp_path, how, message):
    assert look.validate(data_set) == []
    path = tmp_path / "damaged.h5"
    shutil.copy(data_set, path)
    damage(path, how)
    problems = look.validate(path)
    assert any(message in p for p in problems), problems


def test_validate_reads_every_image(data_set, tmp_path):
    """One byte in a compressed chunk is damaged; all tables can be read."""
    path = tmp_path / "flipped.h5"
    content = bytearray(data_set.read_bytes())
    with tables.open_file(str(data_set)) as h5:
        node = max(h5.walk_nodes("/", "EArray"), key=lambda n: n.size_on_disk)
        name, chunk = node._v_pathname, node.chunk_info((0,) * node.ndim)
    content[chunk.offset + chunk.size // 2] ^= 0xFF
    path.write_bytes(content)
    assert look.validate(path) == [f"{name}: cannot be read, so the file is damaged"]


def content(path):
    """Everything in a file: node -> attributes, type, data."""
    found = {}
    with tables.open_file(str(path)) as h5:
        for node in h5.walk_nodes("/"):
            names = node._v_attrs._f_list("all")
            found[node._v_pathname] = [(n, str(node._v_attrs[n])) for n in sorted(names)]
            if isinstance(node, tables.Leaf):
                data = node.read()
                found[node._v_pathname] += [str(data.dtype.descr), data.shape, data.tobytes()]
    return found


def verdict(path):
    """What validate says of a file, and its content if that is valid; runs in another process."""
    try:
        problems = look.validate(path)
        return problems, None if problems else content(path)
    except DataError as error:
        return [str(error)], None


@pytest.mark.parametrize("storage", ["mapped", "all"])
def test_altered_files_are_not_valid_unless_nothing_in_them_differs(storage, tmp_path):
    """Single bits, bytes and blocks anywhere in the file; a crash of HDF5 is a verdict, too."""
    path, bad = tmp_path / "o.h5", tmp_path / "bad.h5"
    one_bin = EnergyBins(min=-2, max=2, bin_size=4)
    split = {"A": 0.5, "B": 0.5}
    extract("proton", path, storage_mode=storage, max_events=2, split=split, energy_bins=one_bin)
    whole, expected = path.read_bytes(), content(path)
    rng = np.random.default_rng(3)
    n_valid, pool = 0, None
    for n in range(30):
        pool = pool or ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        altered, place = bytearray(whole), int(rng.integers(len(whole)))
        if n % 2:  # HDF5's own structures are mostly in the first and last part of the file
            place = place % 20_000 if n % 4 == 1 else len(whole) - 1 - place % 20_000
        altered[place : place + (1, 8)[n % 3 == 0]] = rng.bytes((1, 8)[n % 3 == 0])
        bad.write_bytes(altered[: len(whole) - (n == 20)])
        try:
            problems, found = pool.submit(verdict, bad).result(timeout=100)
        except BrokenProcessPool:
            pool = None
            continue
        assert problems or found == expected, (n, place)
        assert all("\n" not in p for p in problems)
        n_valid += not problems
    if pool:  # not if the last file crashed its process
        pool.shutdown()
    assert 0 < n_valid < 27


def test_a_crash_of_hdf5_is_reported_in_one_line(data_set, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_answer", _crash)
    assert cli.main(["validate", str(data_set)]) == 1
    assert capsys.readouterr().err == (
        f"{data_set}: damaged, so that HDF5 cannot read it (it crashed). Extract the data again.\n"
    )


def test_nothing_is_appended_to_a_damaged_file(data_set, tmp_path, capsys):
    path, config = tmp_path / "o.h5", tmp_path / "c.config"
    shutil.copy(data_set, path)
    damage(path, _set("/Tel_Table", 0, "tel_x", 5.0))
    before = path.read_bytes()
    config.write_text("storage_mode = mapped\n")
    assert cli.main([str(real_file("proton")), str(path), str(config)]) == 1
    err = capsys.readouterr().err
    assert "because of damage: /Tel_Table: differs from its checksum" in err
    assert path.read_bytes() == before


def _crash(*_):
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_damaged_file_is_reported_in_one_line(data_set, tmp_path, capsys):
    path = tmp_path / "cut.h5"
    path.write_bytes(data_set.read_bytes()[:-2000])
    assert cli.main(["inspect", str(path)]) == 1
    capsys.readouterr()
    assert cli.main(["validate", str(path)]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert str(path) in err


def test_validate_finds_an_image_of_a_telescope_that_did_not_trigger(tmp_path):
    extract("proton", tmp_path / "o.h5", storage_mode="all", compression="none")
    assert look.validate(tmp_path / "o.h5") == []
    event = next(iter(all_images(tmp_path / "o.h5").values()))
    absent = next(t for t in range(1, 20) if t not in event[1])
    with tables.open_file(str(tmp_path / "o.h5"), "a") as h5:
        node = next(
            h5.get_node(f"/E{i}/Events") for i in range(4) if h5.get_node(f"/E{i}/Events").nrows
        )
        rows = node.read(0, 1)
        rows[f"T{absent}"][0, 3, 3, 0] = 1
        node.modify_rows(0, 1, rows=rows)
    assert any(f"T{absent} is not blank" in p for p in look.validate(tmp_path / "o.h5"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_mode": "PIXELS_1C", "dim_order": "channels_first"},
        {"mapping": "none"},
        {"storage_mode": "all", "scale_factor": 2},
    ],
)
def test_plot_draws_a_picture(options, tmp_path):
    from PIL import Image

    extract("sst", tmp_path / "o.h5", max_events=5, **options)
    line = look.plot(tmp_path / "o.h5", tmp_path / "p.png", max_images=2)
    assert "gamma" in line
    picture = np.asarray(Image.open(tmp_path / "p.png").convert("L"))
    assert picture.shape[0] > 400
    assert np.unique(picture).size > 30  # not blank
    look.plot(tmp_path / "o.h5", tmp_path / "q.png", event=301, run=102)
    with pytest.raises(DataError, match="has no event 5 of run 7"):
        look.plot(tmp_path / "o.h5", tmp_path / "r.png", event=5, run=7)
    assert not (tmp_path / "r.png").exists()


def test_all_charges_of_a_picture_share_one_scale(data_set, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda f, *_, **__: drawn.extend(f.axes)
    )
    look.plot(data_set, tmp_path / "p.png")
    shown = [
        picture
        for ax in drawn
        if ax.get_title().endswith(("camera", "(axial)"))
        for picture in [*ax.images, *ax.collections]
    ]
    assert len(shown) == 8
    assert {p.get_clim() for p in shown} == {(0.0, max(p.get_array().max() for p in shown))}


def test_the_camera_panel_shows_the_true_charges(tmp_path, dl1):
    """The charges derived from the stored image are those of the pixels."""
    from image_extractor import layout

    extract("sst", tmp_path / "o.h5", dtype="uint32", mapping="oversampling")
    event_id, images, _ = dl1("sst")[0][3]
    found = all_images(tmp_path / "o.h5")[102, event_id][1]
    with layout.open_layout(tmp_path / "o.h5") as h5:
        _, matrix, _ = layout.camera_pixels(h5, h5.root.Tel_Table[0]["camera"].decode())
    for tel_id, (charge, _) in images.items():
        read_back = look._per_pixel(found[tel_id][..., 0] / 100, matrix, 1296)
        np.testing.assert_allclose(read_back, np.clip(charge, 0, None), atol=0.021)


@pytest.mark.parametrize("cut", [False, True])
def test_bright_pixels_are_told_by_the_noise(cut):
    rng = np.random.default_rng(0)
    for rms in (0.3, 2.0):
        charge = rng.normal(0, rms, 4000)
        charge[:150] += 50 * rms
        noise = noise_rms(np.clip(charge, 0, None) if cut else charge)
        assert 0.9 < noise / rms < 1.25
        bright = charge > BRIGHT_SIGMA * noise
        assert bright[:150].all()
        assert not bright[150:].any()


def test_a_gallery_has_a_row_of_each_class_and_type(tmp_path, capsys):
    (tmp_path / "g.simtel").write_bytes(other_production(decompressed(real_file("proton")), 0))
    extract("proton", tmp_path / "o.h5")
    extract(tmp_path / "g.simtel", tmp_path / "o.h5")
    with tables.open_file(str(tmp_path / "o.h5")) as h5:
        n_types = len(h5.root.Metadata.Cameras._v_children)
    words = ["gallery", str(tmp_path / "o.h5"), "--output", str(tmp_path / "g.png")]
    assert cli.main([*words, "--columns", "2"]) == 0
    n = 2 * n_types
    assert f"{2 * n} images of {n} classes and types drawn to" in capsys.readouterr().out
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main([*words, "--part", "Test"]) == 1
    assert "has no part 'Test'" in capsys.readouterr().err
