"""The cuts of real files in tests/data: that they are small and unchanged; bins of real MAPS."""

import numpy as np
from astropy.io import fits
from cut_real_files import BY_LINE, LINES, MAPS, MAPS_CUT, PLAIN, SPECTRA, SPECTRUM_CUT


def test_cuts_hold_the_numbers_of_the_whole_files(shared_manga):
    with fits.open(shared_manga / MAPS) as whole, fits.open(MAPS_CUT) as cut:
        assert [hdu.name for hdu in cut] == ["PRIMARY", *PLAIN, *BY_LINE]
        free = {"CHECKSUM", "DATASUM", "HISTORY", "NAXIS3"} | {f"C{i:02d}" for i in range(1, 23)}
        for hdu in cut:
            cards, wanted = hdu.header, whole[hdu.name].header
            for key in {*cards, *wanted} - free:
                assert cards[key] == wanted[key], (hdu.name, key)
        for name in PLAIN:
            np.testing.assert_array_equal(cut[name].data, whole[name].data)
        for name in BY_LINE:
            assert list(cut[name].header["C??"].values()) == list(LINES)
            of_whole = list(whole[name].header["C??"].values())
            for line, values in zip(LINES, cut[name].data, strict=True):
                np.testing.assert_array_equal(values, whole[name].data[of_whole.index(line)])
    with fits.open(shared_manga / SPECTRA) as whole, fits.open(SPECTRUM_CUT) as cut:
        for hdu in cut[1:]:
            np.testing.assert_array_equal(hdu.data[0], whole[hdu.name].data[0])


def test_cuts_are_small():
    assert sum(path.stat().st_size for path in MAPS_CUT.parent.iterdir()) < 300_000
