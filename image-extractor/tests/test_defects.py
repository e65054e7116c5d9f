"""Of the historic tool's twelve defects those that no other test looks at, by their numbers.

1 and 4: test_cli.py; 3 and 8: test_config.py; 5, 6 and 11: test_extract.py; 12: test_cuts.py.
"""

import tables
from conftest import all_images, extract, real_file

from image_extractor.config import EnergyBins
from image_extractor.cuts import load_cuts
from image_extractor.instrument import describe_array
from image_extractor.simtel import SimtelFile


def test_2_cuts_and_bins_come_from_the_config(tmp_path):
    from test_cuts import columns, write_root

    from image_extractor.prepare_cuts_dict import main

    write_root(tmp_path / "a.root", columns(2000))
    (tmp_path / "c.config").write_text(
        "[preselection_cuts]\nMSCW = -0.5, 0.5\n[energy_bins]\nmin=0\nmax=1\nbin_size=0.25\n"
    )
    assert main([str(tmp_path / "a.root"), str(tmp_path / "wide.json")]) == 0
    assert (
        main(
            [
                str(tmp_path / "a.root"),
                str(tmp_path / "narrow.json"),
                "--config",
                str(tmp_path / "c.config"),
            ]
        )
        == 0
    )
    wide, narrow = load_cuts(tmp_path / "wide.json"), load_cuts(tmp_path / "narrow.json")
    assert 0 < len(narrow) < len(wide) / 2
    assert set(narrow.bins) == {0, 1, 2, 3}
    assert narrow.energies.min() >= 1  # the historic script's constants begin at 0.1 TeV


def test_7_telescopes_are_told_apart_by_their_description():
    with SimtelFile(real_file("gamma")) as simtel:
        telescopes = describe_array(simtel)
    # The historic rule for LST:
    by_pixels = {t for t, d in telescopes.items() if d.camera.n_pixels == 1855}
    lst = {t for t, d in telescopes.items() if d.camera.telescope_type == "LST"}
    assert lst == {1, 2, 3, 4}
    assert len(by_pixels) == 28


def test_9_the_seed_chooses_the_order(tmp_path):
    orders = []
    for seed in (1, 2):
        path = tmp_path / f"{seed}.h5"
        one_bin = EnergyBins(min=-2, max=2, bin_size=4)
        extract("sst", path, shuffle=True, seed=seed, energy_bins=one_bin)
        orders.append(list(all_images(path)))
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_10_telescope_ids_have_two_bytes_and_images_are_compressed(tmp_path):
    extract("sst", tmp_path / "o.h5")
    with tables.open_file(str(tmp_path / "o.h5")) as h5:
        assert h5.root.Tel_Table.coltypes["tel_id"] == "uint16"
        images = [node for node in h5.walk_nodes("/", "EArray") if node.nrows]
        plain = sum(node.size_in_memory for node in images)
        assert sum(node.size_on_disk for node in images) < 0.6 * plain
