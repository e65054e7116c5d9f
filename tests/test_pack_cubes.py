from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import mock_cubes
import numpy as np
import pytest

import data_fns
import data_io
import hsi_proc_fns
import pack_cubes
import utils
from utils import DataError

SCRIPT = Path(pack_cubes.__file__)


@pytest.fixture
def root(tmp_path):
    return mock_cubes.make_data_dir(tmp_path)


def axes_of(path):
    with h5py.File(path) as f:
        return f["spectra"].attrs["axes"]


def test_command_packs_what_normalising_by_hand_gives(root):
    config = pack_cubes.Config("hard", root, patch_norm="spatial", packed_type="float32", jobs=2)
    assert pack_cubes.main(config) == 0
    packed = data_io.read_packed(data_io.packed_path(root, "hard", "spatial", "float32"))
    parts, _ = data_io.read_split(utils.split_path(root, "hard"))
    assert list(packed.rows) == [*parts["train"]["plateifu"], *parts["val"]["plateifu"]]
    assert axes_of(data_io.packed_path(root, "hard", "spatial", "float32")) == "row,band"
    np.testing.assert_array_equal(packed.wave, mock_cubes.wave_grid())
    for plateifu, rows in packed.rows.items():
        flux = data_io.read_cube(utils.cube_path(root, plateifu)).flux
        normed = hsi_proc_fns.normalise(flux, "spatial")
        np.testing.assert_array_equal(packed.spectra[rows], normed)


def test_several_processes_write_the_same_file(root):
    path = data_io.packed_path(root, "easy", "PCA", "float16")
    content = []
    for jobs in (1, 2):
        pack_cubes.main(
            pack_cubes.Config("easy", root, patch_norm="PCA", jobs=jobs, overwrite=True)
        )
        assert axes_of(path) == "row,component"
        packed = data_io.read_packed(path)
        content.append((packed.spectra.tobytes(), [r.tolist() for r in packed.rows.values()]))
    assert content[0] == content[1]


def test_second_run_leaves_the_file_and_overwrite_does_not(root):
    path = data_io.packed_path(root, "hard", "global", "float16")
    seen = []
    for overwrite in (False, False, True):
        pack_cubes.main(pack_cubes.Config("hard", root, overwrite=overwrite, jobs=1))
        seen.append(path.stat().st_ino)
    assert seen[0] == seen[1] != seen[2]


def test_command_line(root, tmp_path):
    words = [sys.executable, str(SCRIPT), "--data-dir", str(root)]
    done = subprocess.run(
        [*words, "--split-dir", "hard", "--jobs", "1"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "6 galaxies" in done.stderr
    done = subprocess.run(
        [*words, "--split-dir", "no"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "create_data_splits.py" in done.stderr
    assert "Traceback" not in done.stderr


def test_values_that_float16_cannot_hold_are_refused(root, tmp_path, monkeypatch):
    real = data_fns.load_normed

    def too_large(*args):
        cube = real(*args)
        cube.values[cube.usable] += 7e4
        return cube

    monkeypatch.setattr(data_fns, "load_normed", too_large)
    config = pack_cubes.Config("hard", root, patch_norm="spectral", jobs=1)
    with pytest.raises(DataError, match=r"\.h5: values up to 7e\+04 .* --packed-type float32"):
        pack_cubes.main(config)
    assert not data_io.packed_path(root, "hard", "spectral", "float16").exists()
