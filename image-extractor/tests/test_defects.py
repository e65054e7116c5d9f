"""The twelve defects of the historic tool: what it did, in miniature, and that we do not."""

import pickle

import numpy as np
import pytest
import tables
from conftest import PACKAGE, all_images, extract, real_file, stored

from image_extractor import cli, layout
from image_extractor.config import EnergyBins, load_config
from image_extractor.cuts import load_cuts
from image_extractor.errors import DataError, UsageError
from image_extractor.instrument import describe_array
from image_extractor.simtel import SimtelFile

SST = (
    "[telescope]\ntype_mode = "
    "SST\n[energy_bins]\nmin=-2\nmax=2\nbin_size=4\n[image]\nscale_factor = 1\n"
)


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.config").write_text("storage_mode = mapped\n" + SST)
    (tmp_path / "d.pkl").write_bytes(pickle.dumps({(102, 301): (0, 0.5)}))
    return str(real_file("sst"))


@pytest.mark.parametrize(
    "words", [["--bins_cuts_dict", "d.pkl"], ["--bins_cuts_dict_file", "d.pkl"], ["d.pkl"]]
)
def test_1_both_flags_and_the_positional_give_the_dictionary(files, words):
    assert cli.main([files, "o.h5", "c.config", *words]) == 0
    assert list(all_images("o.h5")) == [(102, 301)]


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


@pytest.mark.parametrize("name", ["dim_order", "dim_ordering"])
def test_3_one_setting_for_the_channel_axis(tmp_path, name):
    (tmp_path / "c.config").write_text(f"[image]\n{name} = channels_first\n")
    assert load_config(tmp_path / "c.config").dim_order == "channels_first"


def test_4_a_bad_configuration_stops_with_exit_code_2(files, tmp_path, capsys):
    (tmp_path / "c.config").write_text("mode = gh\n[image]\nscale = 3\n")
    assert cli.main([files, "o.h5", "c.config"]) == 2
    errors = capsys.readouterr().err
    assert "mode = gh" in errors
    assert "[image] scale: unknown key" in errors
    assert not (tmp_path / "o.h5").exists()


def test_5_bright_charges_saturate_and_are_counted(tmp_path, dl1):
    charges = np.concatenate([c for _, images, _ in dl1("proton")[0] for c, _ in images.values()])
    right = stored(charges)
    historic = right.astype(np.int64).astype(np.int16)  # into an EArray of i2
    assert (historic < 0).any()
    report = extract("proton", tmp_path / "o.h5", dtype="int16")
    images = np.concatenate(
        [i[..., 0].ravel() for _, p in all_images(tmp_path / "o.h5").values() for i in p.values()]
    )
    assert images.min() == 0
    assert images.max() == 32767
    assert report.saturated_pixels == (right > 32767).sum() == (images == 32767).sum() > 0


def test_6_untriggered_telescopes_energy_recon_and_channels_first_work(tmp_path):
    for name, options in {
        "a": dict(storage_mode="all"),
        "b": dict(storage_mode="all", dim_order="channels_first"),
        "c": dict(storage_mode="all", mode="energy_recon"),
        "d": dict(storage_mode="mapped", mode="energy_recon", dim_order="channels_first"),
    }.items():
        assert extract("sst", tmp_path / f"{name}.h5", max_events=4, **options).events_written == 4
        with layout.open_layout(tmp_path / f"{name}.h5") as h5:
            table = next(t for t in layout.event_tables(h5) if t.nrows)
            row = table[0]
            if "trig_list" in table.colnames:
                assert 0 < row["trig_list"].sum() < 70
                blank = int(np.flatnonzero(row["trig_list"] == 0)[0])
                assert not row[f"T{h5.root.Tel_Table[blank]['tel_id']}"].any()


def test_7_telescopes_are_told_apart_by_their_description():
    with SimtelFile(real_file("gamma")) as simtel:
        telescopes = describe_array(simtel)
    by_pixels = {
        t for t, d in telescopes.items() if d.camera.n_pixels == 1855
    }  # the historic rule for LST
    lst = {t for t, d in telescopes.items() if d.camera.telescope_type == "LST"}
    assert lst == {1, 2, 3, 4}
    assert len(by_pixels) == 28


def test_8_no_energy_bin_is_lost_and_no_bin_of_the_dictionary_is_unknown(tmp_path):
    bins = EnergyBins(min=-2.0, max=0.3, bin_size=0.1)
    assert int((bins.max - bins.min) / bins.bin_size) == 22  # historic
    assert bins.count() == 23
    with pytest.raises(UsageError, match="has energy bin 4, the configuration has 4"):
        extract("sst", tmp_path / "o.h5", bins_cuts_dict={(102, 301): (4, 1.0)})


def test_9_shuffling_is_seeded_and_splitting_loses_nothing(tmp_path):
    rows = 31
    historic = [int(rows * 0.9), int(rows * 0.1)]
    assert sum(historic) == 30
    orders = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        extract(
            "sst",
            tmp_path / f"{name}.h5",
            shuffle=True,
            seed=seed,
            energy_bins=EnergyBins(min=-2, max=2, bin_size=4),
        )
        orders.append(list(all_images(tmp_path / f"{name}.h5")))
    assert orders[0] == orders[1] != orders[2]
    extract(
        "sst",
        tmp_path / "d.h5",
        split={"Training": 0.9, "Validation": 0.1, "Test": 0.0},
        energy_bins=EnergyBins(min=-2, max=2, bin_size=4),
    )
    with tables.open_file(str(tmp_path / "d.h5")) as h5:
        parts = {t.name: int(t.nrows) for t in layout.event_tables(h5)}
    assert parts == {"Events_Training": 28, "Events_Validation": 3, "Events_Test": 0}


def test_10_high_ids_compression_and_whole_files(tmp_path):
    extract("sst", tmp_path / "o.h5")
    with tables.open_file(str(tmp_path / "o.h5")) as h5:
        assert h5.root.Tel_Table.coltypes["tel_id"] == "uint16"
        assert h5.root.E1.T1.filters.complevel > 0
    assert np.array([300]).astype(np.uint8)[0] == 44  # historic
    extract("sst", tmp_path / "plain.h5", compression="none")
    assert (tmp_path / "o.h5").stat().st_size < 0.6 * (tmp_path / "plain.h5").stat().st_size
    # A crash leaves no half file: test_extract.py, kill -9.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.h5", "plain.h5"]


def test_11_files_of_another_array_are_refused_by_name(tmp_path):
    extract("sst", tmp_path / "o.h5")
    with pytest.raises(
        DataError, match=r"proton_run202.*another array than the output's: telescope 1 is a LSTCam"
    ):
        extract("proton", tmp_path / "o.h5")
    assert len(all_images(tmp_path / "o.h5")) == 31


def test_12_loading_a_dictionary_runs_no_code(tmp_path):
    evil = b"cbuiltins\nexec\n(S'open(\"" + str(tmp_path / "ran").encode() + b'", "w")\'\ntR.'
    (tmp_path / "evil.pkl").write_bytes(evil)
    with pytest.raises(DataError, match="exec, which is no plain data"):
        load_cuts(tmp_path / "evil.pkl")
    assert not (tmp_path / "ran").exists()
    pickle.loads(evil)  # historic
    assert (tmp_path / "ran").exists()
    assert len(load_cuts(PACKAGE / "aux" / "bins_cuts_dict.json")) > 0
