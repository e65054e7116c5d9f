"""The configuration: every key, every bad value named, old spellings, whole bins."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_extractor import config
from image_extractor.config import (
    SCHEMA,
    ConfigError,
    EnergyBins,
    Settings,
    as_text,
    load_config,
)


def load(tmp_path, text):
    path = tmp_path / "settings.config"
    path.write_text(text)
    return load_config(path)


def test_an_empty_file_gives_the_historic_defaults(tmp_path):
    settings = load(tmp_path, "")
    assert settings == Settings()
    assert (settings.mode, settings.storage_mode, settings.use_pkl_dict) == (
        "gh_class",
        "all",
        True,
    )
    assert (settings.image_mode, settings.scale_factor) == ("PIXELS_3C", 2)
    assert (settings.dtype, settings.dim_order, settings.type_mode) == (
        "uint16",
        "channels_last",
        "SCT",
    )
    assert settings.energy_bins == EnergyBins("TeV", "log10", -1.0, 1.0, 0.5)
    assert settings.energy_recon_bins.count() == 80
    cut = settings.preselection_cuts["MC_Offset"]
    assert (cut.columns, cut.low, cut.high) == (("MCxoff", "MCyoff"), 0.0, 3.0)


def test_the_written_default_is_valid_and_says_every_key(tmp_path):
    text = as_text()
    assert load(tmp_path, text) == Settings()
    assert sum(" = " in line and not line.startswith("#") for line in text.splitlines()) == len(
        SCHEMA
    )


def test_every_bad_key_and_value_is_named(tmp_path):
    with pytest.raises(ConfigError) as error:
        load(
            tmp_path,
            "mode = gh\nstorage_mod = all\n[image]\nscale_factor "
            "= 0\ndtype = int64\nmode = 3C\n"
            "[telescope]\ntype_mode = SST, SCT\n[energy_bins]\nbin_size "
            "= 0.3\nunits = erg\n[cuts]\nx = 1\n"
            "[preselection_cuts]\nMSCW = 3\nMSCL = 2, 1\ndES = a, "
            "None\n[energy_recon]\n[[bins]]\nmin = x\n",
        )
    lines = str(error.value).splitlines()
    for words in (
        "storage_mod: unknown key, perhaps storage_mode",
        "cuts: unknown section",
        "mode = gh:",
        "[image] scale_factor = 0",
        "[image] dtype = int64",
        "[image] mode = 3C",
        "[telescope] type_mode = SST, SCT",
        "[energy_bins] units = erg",
        "[preselection_cuts] MSCW = 3",
        "[preselection_cuts] MSCL = 2, 1",
        "[preselection_cuts] dES = a, None",
        "[energy_recon][bins] min = x",
        "bin_size = 0.3: does not divide",
    ):
        assert sum(words in line for line in lines) == 1, words
    assert len(lines) == 13


def test_dim_ordering_and_dim_order_are_one_setting(tmp_path):
    assert load(tmp_path, "[image]\ndim_ordering = channels_first\n").dim_order == "channels_first"
    assert load(tmp_path, "[image]\ndim_order = channels_first\n").dim_order == "channels_first"
    with pytest.raises(ConfigError, match="dim_order"):
        load(tmp_path, "[image]\ndim_order = channels_first\ndim_ordering = channels_last\n")


def test_cuts_may_have_parentheses(tmp_path):
    cuts = load(
        tmp_path, "[preselection_cuts]\nMSCW = (-1.0, 2.5)\nMC_Offset = (MCxoff, MCyoff, 0, 1)\n"
    ).preselection_cuts
    assert (cuts["MSCW"].low, cuts["MSCW"].high) == (-1.0, 2.5)
    assert cuts["MC_Offset"].columns == ("MCxoff", "MCyoff")


@given(
    st.integers(-30, 30),
    st.integers(1, 60),
    st.sampled_from([0.05, 0.1, 0.2, 0.25, 0.3, 0.5, 0.7, 1.0]),
)
def test_no_bin_is_lost_to_rounding(start, n, size):
    bins = EnergyBins(min=start * 0.1, max=start * 0.1 + n * size, bin_size=size)
    assert bins.problems() == []
    assert bins.count() == n
    edges = bins.edges()
    assert len(edges) == n + 1
    assert edges[-1] == bins.max


@pytest.mark.parametrize(
    ("units", "scale", "low", "high", "expected"),
    [
        ("TeV", "log10", -1, 1, [0.1, 10]),
        ("GeV", "log10", 2, 4, [0.1, 10]),
        ("GeV", "linear", 100, 300, [0.1, 0.3]),
        ("MeV", "linear", 1e5, 2e5, [0.1, 0.2]),
        ("eV", "log10", 12, 13, [1, 10]),
    ],
)
def test_units_and_scales(units, scale, low, high, expected):
    bins = EnergyBins(units, scale, low, high, high - low)
    assert bins.edges_tev() == pytest.approx(expected)


def test_broken_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration"):
        load_config(tmp_path / "absent.config")
    with pytest.raises(ConfigError, match=r"settings\.config"):
        load(tmp_path, "[image\nmode = x\n")
    (tmp_path / "binary.config").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        load_config(tmp_path / "binary.config")


def test_command_writes_checks_and_prints(tmp_path, capsys):
    path = tmp_path / "new.config"
    assert config.main([str(path), "--mode", "config"]) == 0
    assert config.main([str(path), "--mode", "val"]) == 0
    assert config.main([str(path), "--mode", "config"]) == 2  # never replaces unasked
    path.write_text("mode = x\n")
    assert config.main([str(path)]) == 2
    assert "mode = x" in capsys.readouterr().err
    assert config.main(["--mode", "spec"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(SCHEMA)


def test_the_module_runs_as_a_file(tmp_path):
    done = subprocess.run(
        [sys.executable, config.__file__, str(tmp_path / "c.config"), "--mode", "config"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert load_config(tmp_path / "c.config") == Settings()
