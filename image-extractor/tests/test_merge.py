"""Merging data sets: nothing lost, nothing twice, provenance kept; splitting one that exists."""

import json
import re

import numpy as np
import pytest
import tables
from conftest import all_images, decompressed, extract, other_production, real_file
from test_extract import assert_same

from image_extractor import cli, layout
from image_extractor.errors import DataError
from image_extractor.look import validate
from image_extractor.merging import merge


@pytest.mark.parametrize(
    ("storage", "compression"), [("mapped", "gzip"), ("all", "gzip"), ("mapped", "blosc-lz4")]
)
def test_a_merged_data_set_has_the_events_and_runs_of_all(storage, compression, tmp_path):
    """Two inputs overlap; one has an incomplete file and its whole, i.e. two rows of Runs."""
    options = dict(storage_mode=storage, compression=compression)
    cut = tmp_path / "cut.simtel.gz"
    raw = real_file("sst").read_bytes()
    cut.write_bytes(raw[: len(raw) // 2])
    extract(cut, tmp_path / "a.h5", **options)
    n_cut = len(all_images(tmp_path / "a.h5"))
    extract("sst", tmp_path / "a.h5", 20, **options)
    extract("sst", tmp_path / "b.h5", **options)
    extract("sst", tmp_path / "whole.h5", **options)
    counts = merge([tmp_path / "a.h5", tmp_path / "b.h5"], tmp_path / "o.h5", command="a command")
    assert counts == [(20, 0, 0), (31, 20, 0)]
    assert validate(tmp_path / "o.h5") == []
    assert_same(all_images(tmp_path / "o.h5"), all_images(tmp_path / "whole.h5"))
    with layout.open_layout(tmp_path / "o.h5") as h5:
        runs, index = layout.runs_table(h5), layout.index_table(h5)
        attrs = layout.check_schema(h5)
    assert runs["file"].tolist() == [b"cut.simtel.gz", *[real_file("sst").name.encode()] * 2]
    assert runs["events_written"].tolist() == [n_cut, 20 - n_cut, 11]
    assert runs["duplicates"].tolist() == [0, n_cut, 20]
    assert np.bincount(index["source"]).tolist() == runs["events_written"].tolist()
    assert json.loads(attrs["merged_from"]) == ["a.h5", "b.h5"]
    assert attrs["merge_command"] == "a command"


def test_events_of_productions_with_equal_numbers_are_both_kept(tmp_path):
    raw = decompressed(real_file("proton"))
    (tmp_path / "g.simtel").write_bytes(other_production(raw, primary=0))
    extract("proton", tmp_path / "p.h5")
    extract(tmp_path / "g.simtel", tmp_path / "g.h5")
    counts = merge([tmp_path / "p.h5", tmp_path / "g.h5"], tmp_path / "o.h5")
    assert counts == [(6, 0, 0), (6, 0, 6)]
    with layout.open_layout(tmp_path / "o.h5") as h5:
        assert np.bincount(layout.index_table(h5)["primary_id"])[[0, 101]].tolist() == [6, 6]
    assert validate(tmp_path / "o.h5") == []
    extract("proton", tmp_path / "o.h5")  # what was merged is known, also when appending
    with layout.open_layout(tmp_path / "o.h5") as h5:
        assert len(layout.index_table(h5)) == 12


def test_merging_one_data_set_splits_it(tmp_path):
    extract("sst", tmp_path / "a.h5")
    words = ["merge", str(tmp_path / "a.h5"), "--output", str(tmp_path / "o.h5"), "--shuffle"]
    words += ["--split", "--split-fractions", "Training=0.5,Test=0.5", "--seed", "3"]
    assert cli.main(words) == 0
    assert validate(tmp_path / "o.h5") == []
    assert_same(all_images(tmp_path / "o.h5"), all_images(tmp_path / "a.h5"))
    extract("sst", tmp_path / "b.h5", shuffle=True, split={"Training": 0.5, "Test": 0.5}, seed=3)
    assert list(all_images(tmp_path / "o.h5")) == list(all_images(tmp_path / "b.h5"))
    assert cli.main(words) == 1  # the output exists
    assert cli.main([*words, "--overwrite"]) == 0


def test_inputs_that_do_not_fit_are_refused(tmp_path, capsys):
    names = ("sst", "other", "array", "split", "none")
    paths = dict(zip(names, (tmp_path / f"{n}.h5" for n in names), strict=True))
    extract("sst", paths["sst"], 3)
    extract("sst", paths["other"], 3, dtype="int32")
    extract("proton", paths["array"], 3)
    extract("sst", paths["split"], 3, split={"A": 0.5, "B": 0.5})
    extract("sst", paths["none"], 3, compression="none")
    for name, words in (
        ("other", r"other settings than .*sst\.h5 \(\[image\] dtype = int32, not uint16\)"),
        ("array", r"another array than .*sst\.h5: telescope 1 is a LSTCam, not a DigiCam"),
        ("split", r"was split into several tables"),
        ("none", r"compression = none, not gzip"),
    ):
        with pytest.raises(DataError, match=words):
            merge([paths["sst"], paths[name]], tmp_path / "o.h5")
    with tables.open_file(str(paths["sst"]), "a") as h5:
        h5.root.Tel_Table.cols.tel_x[0] += 1
    for command in ("merge", "export"):
        assert cli.main([command, str(paths["sst"]), "--output", str(tmp_path / "o.h5")]) == 1
        message = rf"sst\.h5: cannot be {command}e?d, .*/Tel_Table: differs"
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "o.h5").exists()
    assert not list(tmp_path.glob(".*"))
