"""The twelve defects of the historic tool: where each is tested, and those not tested elsewhere.

 1  the option --bins_cuts_dict of the README was called otherwise in the code      test_cli.py
 2  cuts and bins were constants in the script, not those of the configuration      here
 3  dim_order and dim_ordering were two names of one setting                        test_config.py
 4  values of the configuration that are not valid were ignored                     test_cli.py
 5  charges above 327.67 or 655.35 p.e. overflowed                                  test_extract.py
 6  storage_mode all, energy_recon and channels_first crashed                       test_extract.py
 7  telescopes were identified by their number of pixels, so only SCT worked        here
 8  an energy bin could be lost to rounding; extra bins in a dictionary crashed     test_config.py,
                                                                                    test_cli.py
 9  shuffling had no seed; splitting lost rows                                      here,
                                                                                    test_extract.py
10  telescope ids overflowed above 255; no compression; crashes left half a file    here,
                                                                                    test_extract.py
11  the array layout of the first file was used for all                             test_extract.py
12  loading a pickle could run code                                                 test_cuts.py
"""

import tables
from conftest import all_images, extract, real_file
from test_cuts import columns, write_root

from image_extractor.cuts import load_cuts
from image_extractor.instrument import describe_array
from image_extractor.prepare_cuts_dict import main
from image_extractor.settings import EnergyBins
from image_extractor.simtel import SimtelFile


def test_cuts_and_bins_come_from_the_configuration(tmp_path):
    """Defect 2."""
    source, config = tmp_path / "a.root", tmp_path / "c.config"
    write_root(source, columns(2000))
    config.write_text(
        "[preselection_cuts]\nMSCW = -0.5, 0.5\n[energy_bins]\nmin=0\nmax=1\nbin_size=0.25\n"
    )
    assert main([str(source), str(tmp_path / "wide.json")]) == 0
    assert main([str(source), str(tmp_path / "narrow.json"), "--config", str(config)]) == 0
    wide, narrow = load_cuts(tmp_path / "wide.json"), load_cuts(tmp_path / "narrow.json")
    assert 0 < len(narrow) < len(wide) / 2
    assert set(narrow.bins) == {0, 1, 2, 3}
    assert narrow.energies.min() >= 1  # the historic script's constants begin at 0.1 TeV


def test_telescopes_are_identified_by_their_description():
    """Defect 7. LSTCam and NectarCam both have 1855 pixels."""
    with SimtelFile(real_file("gamma")) as simtel:
        telescopes = describe_array(simtel)
    by_pixels = {t for t, d in telescopes.items() if d.camera.n_pixels == 1855}
    lst = {t for t, d in telescopes.items() if d.camera.telescope_type == "LST"}
    assert lst == {1, 2, 3, 4}
    assert len(by_pixels) == 28


def test_the_seed_determines_the_order(tmp_path):
    """Defect 9."""
    orders = []
    for seed in (1, 2):
        path = tmp_path / f"{seed}.h5"
        one_bin = EnergyBins(min=-2, max=2, bin_size=4)
        extract("sst", path, shuffle=True, seed=seed, energy_bins=one_bin)
        orders.append(list(all_images(path)))
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_telescope_ids_have_two_bytes_and_images_are_compressed(tmp_path):
    """Defect 10."""
    extract("sst", tmp_path / "o.h5")
    with tables.open_file(str(tmp_path / "o.h5")) as h5:
        assert h5.root.Tel_Table.coltypes["tel_id"] == "uint16"
        images = [node for node in h5.walk_nodes("/", "EArray") if node.nrows]
        plain = sum(node.size_in_memory for node in images)
        assert sum(node.size_on_disk for node in images) < 0.6 * plain
