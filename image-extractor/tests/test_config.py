"""The configuration: defaults, every wrong key and value reported, old spellings, energy bins."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_extractor import config
from image_extractor.config import (
    SCHEMA,
    ConfigError,
    as_text,
    checked,
    differences,
    load_config,
    parse_config,
)
from image_extractor.settings import Cut, EnergyBins, Settings


def load(tmp_path, text):
    path = tmp_path / "settings.config"
    path.write_text(text)
    return load_config(path)


def test_an_empty_file_gives_the_defaults(tmp_path):
    settings = load(tmp_path, "")
    assert settings == Settings()
    historic = dict(
        mode="gh_class",
        storage_mode="all",
        use_pkl_dict=True,
        image_mode="PIXELS_3C",
        scale_factor=2,
        dtype="uint16",
        dim_order="channels_last",
    )
    assert {name: getattr(settings, name) for name in historic} == historic
    assert (settings.type_mode, settings.time_unit) == ("ALL", 0.01)  # historically SCT and 1
    assert settings.energy_bins == EnergyBins("TeV", "log10", -1.0, 1.0, 0.5)
    assert settings.energy_recon_bins.count() == 80
    assert settings.preselection_cuts["MC_Offset"] == Cut(("MCxoff", "MCyoff"), 0.0, 3.0)


def test_the_written_default_is_valid_and_has_every_key(tmp_path):
    text = as_text()
    assert load(tmp_path, text) == Settings()
    keys = [line for line in text.splitlines() if " = " in line and not line.startswith("#")]
    assert len(keys) == len(SCHEMA)


OTHER = Settings(
    mode="energy_recon",
    storage_mode="mapped",
    use_pkl_dict=False,
    image_mode="PIXELS_TIMING_2C",
    scale_factor=1,
    dtype="float32",
    dim_order="channels_first",
    time_unit=1.0,
    mapping="none, LST: rebin",
    derotate=True,
    type_mode="LST+5-12",
    types="MSTN-*: MST, 7: SST",
    energy_bins=EnergyBins("GeV", "linear", 0.0, 30.0, 10.0),
    preselection_cuts={
        name: Cut((name, "dES"), None, 1.5) for name in Settings().preselection_cuts
    },
    gamma_only=False,
    energy_recon_bins=EnergyBins("MeV", "linear", 1.0, 3.0, 0.1),
    min_telescopes=3,
    min_intensity=0.1,
    max_leakage=0.25,
    picture_threshold=7.5,
    boundary_threshold=1e-3,
)


@pytest.mark.parametrize("comments", [True, False])
def test_what_is_written_is_read_back(comments):
    """Every setting differs from its default."""
    text = as_text(OTHER, comments)
    assert parse_config(text, "text") == OTHER
    assert comments == ("#" in text)
    assert len(differences(OTHER, Settings())) == len(SCHEMA)


def test_differences_name_key_and_both_values():
    ours = Settings(energy_recon_bins=EnergyBins(min=-1.0, max=2.0, bin_size=0.05), dtype="int32")
    assert differences(ours, Settings()) == [
        "[image] dtype = int32, not uint16",
        "[energy_recon][bins] min = -1.0, not -2.0",
    ]
    assert differences(ours, ours) == []


def test_settings_made_in_python_are_checked_as_data():
    """Numbers of NumPy and whole numbers are accepted; a cut that is left out is open."""
    numbers = EnergyBins(min=np.int64(-1), max=np.float32(1), bin_size=1)
    given = Settings(scale_factor=np.int64(3), energy_bins=numbers, preselection_cuts={})
    made = checked(given)
    assert (made.scale_factor, made.energy_bins) == (3, EnergyBins(bin_size=1.0))
    assert repr(made.energy_bins) == repr(EnergyBins(bin_size=1.0))  # all are floats
    assert made.preselection_cuts["MC_Offset"] == Cut(("MCxoff", "MCyoff"), None, None)
    assert checked(made) == made
    for name, value in (("mode", None), ("scale_factor", 1.5), ("type_mode", " ")):
        with pytest.raises(ConfigError, match=rf"^settings: .*= ?{value}: not a valid value"):
            checked(Settings(**{name: value}))


WRONG = """\
mode = gh
storage_mod = all
[image]
scale_factor = 0
dtype = int64
mode = 3C
dim_order = channels_first
dim_ordering = channels_last
mapping = axial, LST: shifting
[telescope]
type_mode = SST, SCT
types = LST
[energy_bins]
bin_size = 0.3
units = erg
[cuts]
x = 1
[preselection_cuts]
MSCW = 3
MSCL = 2, 1
dES = a, None
[image_cuts]
max_leakage = 1.5
min_intensity = nan
[energy_recon]
[[bins]]
min = x
"""


def test_every_wrong_key_and_value_is_reported_in_one_line(tmp_path):
    """Each line says what is wrong and where, what was expected and what to do."""
    expected = (
        "storage_mod: unknown key, perhaps storage_mode. Correct its name.",
        "cuts: unknown section",
        "mode = gh: not a valid value (expected gh_class | energy_recon). Correct it;",
        "[image] scale_factor = 0: not a valid value (expected whole number >= 1)",
        "[image] dtype = int64",
        "[image] mode = 3C",
        "[image] dim_ordering = channels_last: given as channels_first under another name",
        "[image] mapping = axial, LST: shifting",
        "[telescope] type_mode = SST, SCT",
        "[telescope] types = LST: not a valid value (expected TELESCOPES: TYPE",
        "[energy_bins] units = erg: not a valid value (expected eV | MeV | GeV | TeV)",
        "[preselection_cuts] MSCW = 3",
        "[preselection_cuts] MSCL = 2, 1",
        "[preselection_cuts] dES = a, None",
        "[image_cuts] max_leakage = 1.5: not a valid value (expected number from 0 to 1)",
        "[image_cuts] min_intensity = nan",
        "[energy_recon][bins] min = x: not a valid value (expected number)",
        "bin_size = 0.3: does not divide",
    )
    with pytest.raises(ConfigError) as error:
        load(tmp_path, WRONG)
    lines = str(error.value).splitlines()
    for words in expected:
        assert sum(words in line for line in lines) == 1, words
    assert len(lines) == len(expected)
    assert all(line.startswith(str(tmp_path)) and line.endswith(".") for line in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image = 3\n", "image: unknown key"),
        ("[mode]\nx = 1\n", "mode: unknown section"),
        ("mode = None\n", "mode = None: not a valid value"),
        ("[image\nmode = x\n", "Invalid line"),
        ("mode = gh_class\nmode = gh_class\n", "Duplicate keyword"),
    ],
)
def test_a_wrong_structure_is_reported_in_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(tmp_path, text)
    assert "\n" not in str(error.value)


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


def test_a_cut_without_columns_keeps_its_own(tmp_path):
    cuts = load(tmp_path, "[preselection_cuts]\nMC_Offset = None, 2\n").preselection_cuts
    assert cuts["MC_Offset"] == Cut(("MCxoff", "MCyoff"), None, 2.0)


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


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration"):
        load_config(tmp_path / "absent.config")
    (tmp_path / "binary.config").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        load_config(tmp_path / "binary.config")


def test_the_command_writes_checks_and_prints(tmp_path, capsys):
    path = tmp_path / "new.config"
    assert config.main([str(path), "--mode", "config"]) == 0
    assert config.main([str(path), "--mode", "val"]) == 0
    assert config.main([str(path), "--mode", "config"]) == 2  # an existing file is not replaced
    path.write_text("mode = x\n")
    assert config.main([str(path)]) == 2
    assert "mode = x" in capsys.readouterr().err
    assert config.main([str(path), "--mode", "config", "--overwrite"]) == 0
    assert load_config(path) == Settings()
    assert config.main([str(tmp_path / "absent" / "c.config"), "--mode", "config"]) == 1
    assert "cannot be written (No such file or directory)" in capsys.readouterr().err
    assert config.main(["--mode", "spec"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(SCHEMA)


@pytest.mark.parametrize("how", [[config.__file__], ["-m", "image_extractor.config"]])
def test_the_module_runs_as_a_file_and_as_a_module(how, tmp_path):
    for mode, answer in (("config", "written"), ("val", "valid")):
        words = [sys.executable, *how, str(tmp_path / "c.config"), "--mode", mode]
        done = subprocess.run(words, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"{tmp_path / 'c.config'}: {answer}\n"
    assert load_config(tmp_path / "c.config") == Settings()
