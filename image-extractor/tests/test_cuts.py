"""Dictionaries of bins and cuts: making, writing and reading them; only plain data are accepted."""

import json
import os
import pickle

import numpy as np
import pytest
import uproot

from image_extractor import prepare_cuts_dict
from image_extractor.cuts import ROW, CutsTable, bin_indices, cuts_writer, load_cuts
from image_extractor.errors import DataError
from image_extractor.settings import EnergyBins, Settings


def columns(n, seed=0, run=77, first=0):
    rng = np.random.default_rng(seed)
    return {
        "MSCW": rng.normal(0, 1.5, n),
        "MSCL": rng.normal(0, 2, n),
        "EChi2S": rng.exponential(1, n) - 0.1,
        "ErecS": 10 ** rng.uniform(-2, 1.5, n),
        "EmissionHeight": rng.uniform(0, 60, n).astype(np.float32),
        "MCxoff": rng.normal(0, 1.5, n),
        "MCyoff": rng.normal(0, 1.5, n),
        "NImages": rng.integers(0, 8, n).astype(np.int32),
        "dES": rng.uniform(-0.1, 1, n),
        "runNumber": np.full(n, run, np.int32),
        "eventNumber": np.arange(first, first + n, dtype=np.int32),
    }


def write_root(path, data, tree="data"):
    with uproot.recreate(path) as f:
        f.mktree(tree, {k: v.dtype for k, v in data.items()})
        f[tree].extend(data)


def by_hand(data, edges):
    """Cuts and bins as in the historic loop over events."""
    expected = {}
    for i in range(len(data["ErecS"])):
        offset = (data["MCxoff"][i] ** 2 + data["MCyoff"][i] ** 2) ** 0.5
        if not (
            -2 <= data["MSCW"][i] < 2
            and -2 <= data["MSCL"][i] < 5
            and data["EChi2S"][i] >= 0
            and data["ErecS"][i] >= 0
            and 0 <= data["EmissionHeight"][i] < 50
            and offset < 3
            and data["NImages"][i] >= 3
            and data["dES"][i] >= 0
        ):
            continue
        for b in range(len(edges) - 1):
            if edges[b] <= data["ErecS"][i] < edges[b + 1]:
                expected[int(data["runNumber"][i]), int(data["eventNumber"][i])] = (
                    b,
                    float(data["ErecS"][i]),
                )
    return expected


@pytest.mark.parametrize("suffix", [".pkl", ".json", ".h5"])
def test_default_cuts_and_bins_equal_those_of_the_historic_loop(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(prepare_cuts_dict, "ROWS_PER_SLICE", 700)  # several slices per file
    first, second = columns(3000, 1), columns(2000, 2, run=78)
    write_root(tmp_path / "a.mscw.root", first)
    write_root(tmp_path / "b.mscw.root", second)
    out = tmp_path / f"cuts{suffix}"
    counts = prepare_cuts_dict.prepare(
        [tmp_path / "a.mscw.root", tmp_path / "b.mscw.root"], out, Settings()
    )
    edges = [10**-1.0, 10**-0.5, 1.0, 10**0.5, 10.0]
    expected = by_hand(first, edges) | by_hand(second, edges)
    table = load_cuts(out)
    assert len(table) == counts["passed"] == len(expected) > 500
    assert {k: table.get(*k) for k in expected} == expected
    assert counts["events"] == 5000
    assert sum(counts["bins"]) == counts["passed"]


def test_the_pickle_is_a_plain_dict_as_historically(tmp_path):
    data = columns(500, 3)
    write_root(tmp_path / "a.root", data)
    prepare_cuts_dict.prepare([tmp_path / "a.root"], tmp_path / "c.pkl", Settings())
    loaded = pickle.loads((tmp_path / "c.pkl").read_bytes())
    assert loaded == by_hand(data, Settings().energy_bins.edges_tev())
    assert all(
        type(k) is tuple and type(v) is tuple and type(v[1]) is float for k, v in loaded.items()
    )


def test_bins_are_half_open():
    edges = [0.1, 0.31, 1.0, 10.0]
    energies = np.array([0.0999, 0.1, 0.3099, 0.31, 1.0, 9.999, 10.0, np.nan, -1])
    assert bin_indices(energies, edges).tolist() == [-1, 0, 0, 1, 2, 2, -1, -1, -1]


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({(1, 2): (0, 1.0), (1, 3): Evil()}))
    with pytest.raises(DataError, match="mkdir, which is not plain data"):
        load_cuts(tmp_path / "evil.pkl")
    assert not (tmp_path / "ran").exists()
    for thing in (np.float64(1.0), EnergyBins(), {1, 2}.__class__, np.arange(3)):
        (tmp_path / "object.pkl").write_bytes(pickle.dumps({(1, 2): (0, thing)}))
        with pytest.raises(DataError, match="refused"):
            load_cuts(tmp_path / "object.pkl")


def test_a_pickle_with_numbers_of_numpy_says_how_to_convert_them(tmp_path):
    path = tmp_path / "d.pkl"
    path.write_bytes(pickle.dumps({(np.int64(7), 1): (0, np.float64(2.5))}))
    with pytest.raises(DataError, match=r"Convert NumPy's .* \{\(int\(r\), int\(e\)\): "):
        load_cuts(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_of_all_protocols_are_read(tmp_path, protocol):
    (tmp_path / "c.pkl").write_bytes(
        pickle.dumps({(31964, 408): (2, 0.5), (31964, 409): (0, 0.2)}, protocol)
    )
    table = load_cuts(tmp_path / "c.pkl")
    assert (table.get(31964, 408), table.get(31964, 409), table.get(31964, 410)) == (
        (2, 0.5),
        (0, 0.2),
        None,
    )
    assert table.get(31964, -5) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04",
        pickle.dumps([1]),
        pickle.dumps({1: 2}),
        pickle.dumps({(1, 2): "ab"}),
        pickle.dumps({(1, 2.5): (0, 1.0)}),
        b"text",
        b"{",
        b'{"format": "other"}',
        b'{"format": "bins-cuts-dict", "events": [[1, 2]]}',
        pickle.dumps({(1, 2): (-1, 1.0)}),
        pickle.dumps({(-1, 2): (1, 1.0)}),
    ],
)
def test_unusable_dictionaries_are_named(tmp_path, content):
    path = tmp_path / "bad.pkl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.pkl"):
        load_cuts(path)


def test_an_event_listed_twice_is_refused(tmp_path):
    write_root(tmp_path / "a.root", columns(3000, 1))
    write_root(
        tmp_path / "b.root", {name: values[:200] for name, values in columns(3000, 1).items()}
    )
    with pytest.raises(DataError, match="twice"):
        prepare_cuts_dict.prepare(
            [tmp_path / "a.root", tmp_path / "b.root"], tmp_path / "c.pkl", Settings()
        )
    assert not list(tmp_path.glob("*c.pkl*"))
    rows = np.zeros(2, ROW)
    with pytest.raises(DataError, match="twice"):
        CutsTable(rows)


def test_json_has_one_line_per_event(tmp_path):
    with cuts_writer(tmp_path / "c.json", {"cuts": {}}) as write:
        write(np.array([(5, 1, 0, 0.25)], ROW))
        write(np.array([(4, 1, 2, 3.5)], ROW))
    text = (tmp_path / "c.json").read_text()
    assert "  [5, 1, 0, 0.25],\n  [4, 1, 2, 3.5]\n" in text
    assert json.loads(text)["events"] == [[5, 1, 0, 0.25], [4, 1, 2, 3.5]]


@pytest.mark.parametrize("suffix", [".pkl", ".json", ".h5"])
def test_a_dictionary_may_be_empty_and_appears_whole_or_not_at_all(tmp_path, suffix):
    path = tmp_path / f"c{suffix}"
    with cuts_writer(path, {"cuts": {}}) as write:
        write(np.zeros(0, ROW))
    assert len(load_cuts(path)) == 0
    before = path.read_bytes()

    def fill_the_disk():
        with cuts_writer(path, {"cuts": {}}) as write:
            write(np.ones(1, ROW))
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fill_the_disk()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_command_and_its_errors(tmp_path, capsys):
    write_root(tmp_path / "a.mscw.root", columns(1000, 4))

    def run(source, output, *options):
        words = [str(tmp_path / source), str(tmp_path / output), *map(str, options)]
        return prepare_cuts_dict.main(words), capsys.readouterr()

    code, printed = run("*.root", "c.pkl")
    assert code == 0
    assert "events pass all cuts" in printed.out
    data = columns(10)
    del data["MCxoff"]
    write_root(tmp_path / "data.root", data)
    write_root(tmp_path / "other.root", columns(10), tree="events")
    (tmp_path / "text.root").write_text("not a ROOT file")
    (tmp_path / "cut.root").write_bytes((tmp_path / "a.mscw.root").read_bytes()[:3000])
    for source, output, expected, message in (
        ("a.*", "c.pkl", 2, "c.pkl: exists already"),
        ("none*.root", "d.pkl", 2, "none*.root: no such file"),
        ("data.root", "d.pkl", 1, "data.root: no branch MCxoff"),
        ("other.root", "d.pkl", 1, "other.root: no tree 'data'"),
        ("text.root", "d.pkl", 1, "text.root: cannot be read as a ROOT file"),
        ("cut.root", "d.pkl", 1, "cut.root: cannot be read as a ROOT file"),
        ("a.*", "d.txt", 1, "d.txt: not a valid name"),
        ("a.*", "absent/d.pkl", 1, "absent/d.pkl: cannot be written (No such file"),
    ):
        code, printed = run(source, output)
        assert (code, len(printed.err.splitlines())) == (expected, 1)
        assert message in printed.err
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".pkl", *[".root"] * 5]
    config = tmp_path / "open.config"
    config.write_text("[preselection_cuts]\nMC_Offset = None, None\n")
    assert run("data.root", "d.pkl", "--config", config)[0] == 0
