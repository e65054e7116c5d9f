import utils
from utils import DataError

import h5py
import mock_cubes
import numpy as np
import pytest

import data_io
import hsi_proc_fns
import pack_cubes
from pack_cubes import Config, open_packed, packed_path, read_packed

GALAXIES = list(mock_cubes.PLATEIFUS[:3])
"""Training part of the hard split of four galaxies, and the galaxy after it."""


@pytest.fixture
def root(tmp_path):
    return mock_cubes.make_data_dir(tmp_path / "data", mock_cubes.PLATEIFUS[:4])


def test_packed_file_holds_each_usable_spectrum_once_as_normalised_by_hand(root):
    config = Config("hard", "spatial", "float32", jobs=2, data_dir=root)
    assert pack_cubes.main(config) == 0
    path = packed_path(root, "hard", "spatial", "float32")
    packed = read_packed(path)
    parts, _ = data_io.read_split(utils.split_path(root, "hard"))
    assert list(packed.rows) == [*parts["train"]["plateifu"], *parts["val"]["plateifu"]]
    with h5py.File(path) as f:
        assert f["spectra"].attrs["axes"] == "row,band"
    seen = []
    for plateifu, rows in packed.rows.items():
        cube = data_io.read_cube(utils.cube_path(root, plateifu))
        usable = hsi_proc_fns.usable_spaxels(cube.flux)
        np.testing.assert_array_equal(rows > 0, usable)
        seen += rows[usable].tolist()
        normalised = hsi_proc_fns.normalise(cube.flux, "spatial")
        np.testing.assert_array_equal(packed.spectra[rows], normalised)
        assert packed.cubes[plateifu] == cube.recipe.digest
    assert sorted(seen) == list(range(1, len(packed.spectra)))
    assert not packed.spectra[0].any()


def test_several_processes_write_the_same_file_as_one_and_only_overwrite_replaces_it(root):
    path, content, files = packed_path(root, "easy", "PCA", "float16"), [], []
    for jobs, overwrite in ((1, False), (1, False), (2, True)):
        assert (
            pack_cubes.main(Config("easy", "PCA", data_dir=root, jobs=jobs, overwrite=overwrite))
            == 0
        )
        packed = read_packed(path)
        content.append((packed.spectra.tobytes(), [r.tolist() for r in packed.rows.values()]))
        files.append(path.stat().st_ino)
    assert content[0] == content[2]
    assert files[0] == files[1] != files[2]
    with h5py.File(path) as f:
        assert f["spectra"].attrs["axes"] == "row,component"


def test_half_precision_keeps_eleven_bits(root):
    exact = open_packed(root, "hard", "global", GALAXIES, "float32").spectra
    half = open_packed(root, "hard", "global", GALAXIES, "float16").spectra
    assert half.dtype == np.float16
    assert (half != exact).any()
    np.testing.assert_allclose(half, exact, rtol=2**-11, atol=2**-24)


KEPT_OR_REBUILT = {
    "other order": (lambda root: None, GALAXIES[::-1], ""),
    "cube gone": (lambda root: utils.cube_path(root, GALAXIES[0]).unlink(), GALAXIES, ""),
    "more galaxies": (lambda root: None, mock_cubes.PLATEIFUS[:4], "lacks 8000-104 and 0 more"),
    "cube rebuilt": (
        lambda root: mock_cubes.rebuild_cube(root, GALAXIES[2], redshift=0.5),
        GALAXIES, "cube of 8000-103 and 0 more were rebuilt",
    ),
    "statistics": (
        mock_cubes.rebuild_statistics, GALAXIES, "made with another set of statistics"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", KEPT_OR_REBUILT)
def test_packed_file_is_kept_while_it_serves_and_rebuilt_when_not(root, caplog, case):
    """Cubes may be gone: perhaps only the packed file was copied to the machine with a GPU."""
    change, asked, reason = KEPT_OR_REBUILT[case]
    caplog.set_level("INFO")
    open_packed(root, "hard", "PCA", GALAXIES)
    assert "packing 3 cubes (there is no such file yet)" in caplog.text
    change(root)
    for expected in (reason, ""):
        caplog.clear()
        assert set(asked) <= set(open_packed(root, "hard", "PCA", asked).rows)
        assert ("packing" in caplog.text) == bool(expected)
        assert expected in caplog.text


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("disk full", r"float16\.h5: could not be written \(disk full\)"),
        ("too bright", r"8000-103\.h5: values up to 7e\+04 .* --packed-type float32"),
    ],
)
def test_packed_file_is_whole_or_absent(root, monkeypatch, at, message):
    real, read = pack_cubes.read_normalised, []

    def troubled_at_the_third_cube(*args):
        cube = real(*args)
        read.append(1)
        if len(read) == 3 and at == "disk full":
            raise OSError("disk full")
        cube.values[cube.usable] += 7e4 * (len(read) == 3)
        return cube

    monkeypatch.setattr(pack_cubes, "read_normalised", troubled_at_the_third_cube)
    with pytest.raises(DataError, match=message):
        open_packed(root, "hard", "spectral", GALAXIES)
    assert list((root / "processed").glob("packed/*/*")) == []


def test_damaged_packed_file_is_packed_again_and_the_log_says_why(root, caplog):
    caplog.set_level("INFO")
    packed = open_packed(root, "hard", "PCA", GALAXIES)
    whole = np.array(packed.spectra)
    packed.path.write_bytes(b"half a file")
    with pytest.raises(DataError, match=r"PCA_float16\.h5: .*pack_cubes\.py --overwrite"):
        read_packed(packed.path)
    np.testing.assert_array_equal(open_packed(root, "hard", "PCA", GALAXIES).spectra, whole)
    assert "packing 3 cubes" in caplog.text.splitlines()[-2]
    assert "PCA_float16.h5: not readable" in caplog.text


def test_command_line_reports_what_it_packed_and_what_is_missing(root, command):
    for split, code, message in (("hard", 0, "3 cubes"), ("no", 1, "create_data_splits.py")):
        words = ("--data-dir", root, "--split-dir", split, "--jobs", "1")
        found, said = command(pack_cubes.main, Config, *words)
        assert found == code
        assert message in said
        assert "Traceback" not in said
