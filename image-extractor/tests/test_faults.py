"""A few of the mutations of faults.py, which tries hundreds."""

import faults
from conftest import real_file

from image_extractor import cli


def test_no_command_takes_damaged_data_sets_for_sound_or_crashes(tmp_path, monkeypatch):
    real_file("sst")
    for name in ("multiprocessing", "_answer"):  # faults changes these: put back at the end
        monkeypatch.setattr(cli, name, getattr(cli, name))
    counts = faults.run(tmp_path, mutations=10, seed=2)
    assert counts.total() == 20
    assert not [key for key in counts if key[1] in faults.FAULTS]
    assert counts["validate", "refused"] > 3
