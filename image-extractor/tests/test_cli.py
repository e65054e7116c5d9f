"""The commands as users type them: the README's examples, exit codes, messages, help."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import tables
from conftest import PACKAGE, all_images, decompressed, real_file

from image_extractor import __version__, cli
from image_extractor.config import load_config
from image_extractor.cuts import load_cuts
from image_extractor.errors import DataError
from image_extractor.look import validate
from image_extractor.simtel import ARRAY_EVENT, SYNC_MARKER
from image_extractor.transaction import write_whole

BIN = Path(sys.executable).parent


def run(*words, cwd=None):
    return subprocess.run(
        [str(w) for w in words],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore", "SLURM_CPUS_PER_TASK": "4"},
    )


def installed(name):
    path = BIN / name
    if not path.exists():
        pytest.skip(f"{name} is not installed beside this Python")
    return path


@pytest.fixture
def folder(tmp_path):
    """A folder with the files of the README's example: data, configuration, dictionary."""
    (tmp_path / "simtel").mkdir()
    shutil.copy(real_file("sst"), tmp_path / "simtel" / "a.simtel.gz")
    (tmp_path / "configuration_settings.config").write_text(
        (PACKAGE / "aux" / "test_pytables_1bin.config")
        .read_text()
        .replace("type_mode = SCT", "type_mode = SST")
    )
    shutil.copy(PACKAGE / "aux" / "bins_cuts_dict_1bin.pkl", tmp_path / "bins_cuts_dict.pkl")
    return tmp_path


def command_of_the_readme(folder, *options):
    return run(
        installed("image_extractor.py"),
        f"{folder}/simtel/*.simtel.gz",
        "./dataset.h5",
        "./configuration_settings.config",
        "./bins_cuts_dict.pkl",
        *options,
        cwd=folder,
    )


def test_the_command_of_the_readme_word_for_word(folder):
    done = command_of_the_readme(folder, "--shuffle", "--split")
    assert done.returncode == 0, done.stderr
    assert "events written" in done.stdout
    with tables.open_file(str(folder / "dataset.h5")) as h5:
        n = [
            int(h5.get_node(f"/E0/Events_{part}").nrows)
            for part in ("Training", "Validation", "Test")
        ]
    assert sum(n) == len(all_images(folder / "dataset.h5")) > 20
    assert n[2] == 0
    assert abs(n[1] - 0.1 * sum(n)) < 10  # whole showers, each used up to ten times


def test_a_truncated_file_is_reported_once(folder):
    """The parent process reports it, the workers do not."""
    raw = (folder / "simtel" / "a.simtel.gz").read_bytes()
    for name in ("a", "b"):
        (folder / "simtel" / f"{name}.simtel.gz").write_bytes(raw[: int(0.9 * len(raw))])
    done = command_of_the_readme(folder, "--jobs", "2")
    assert done.returncode == 1
    for name in ("a", "b"):
        assert done.stderr.count(f"{name}.simtel.gz: incomplete") == 1


@pytest.mark.parametrize(
    "option", [[], ["--bins_cuts_dict"], ["--bins_cuts_dict_file"], ["--bins-cuts-dict"]]
)
def test_the_dictionary_may_be_an_argument_or_an_option(folder, option, monkeypatch):
    """Defect 1 of the historic tool, see test_defects.py."""
    monkeypatch.chdir(folder)
    (folder / "d.pkl").write_bytes(pickle.dumps({(102, 301): (0, 0.5)}))
    config = "configuration_settings.config"
    options = ["--debug", "--summary", "s.json"]
    assert cli.main(["simtel/*.simtel.gz", "o.h5", config, *option, "d.pkl", *options]) == 0
    assert list(all_images(folder / "o.h5")) == [(102, 301)]
    summary = json.loads((folder / "s.json").read_text())
    assert (summary["files"], summary["events_written"], summary["images_by_type"]) == (
        1,
        1,
        {"SST": summary["images"]},
    )
    assert summary["bytes"] == (folder / "o.h5").stat().st_size


def test_a_file_without_events_is_reported(folder, monkeypatch, capsys):
    """It is an error if no other file has events."""
    monkeypatch.chdir(folder)
    whole = decompressed(folder / "simtel" / "a.simtel.gz")
    head = whole[: whole.index(SYNC_MARKER + struct.pack("<H", ARRAY_EVENT))]
    (folder / "head.simtel").write_bytes(head)
    for pattern, jobs, code, n in (
        ("head.simtel", "1", 1, 0),
        ("**/*.simtel*", "2", 0, 31),
        ("head.simtel", "1", 1, 31),
    ):
        words = [pattern, "o.h5", "configuration_settings.config", "--jobs", jobs]
        assert cli.main(words) == code
        assert capsys.readouterr().err.count("head.simtel: contains no events.") == 1
        assert validate(folder / "o.h5") == []
        assert len(all_images(folder / "o.h5")) == n


def test_exit_codes_and_messages(folder, monkeypatch, capsys):
    """Includes defect 4 of the historic tool, see test_defects.py."""
    monkeypatch.chdir(folder)
    config, source = "configuration_settings.config", "simtel/a.simtel.gz"
    (folder / "bad.config").write_text("mode = x\n[image]\nsize = 3\n")
    (folder / "none.config").write_text("[telescope]\ntype_mode = LST\n")
    (folder / "none.simtel.gz").write_bytes(b"text")
    (folder / "big.config").write_text("[image]\nscale_factor = 200\n")
    (folder / "deep.json").write_text('{"a":' * 200_000)
    cases = [
        (2, ["nothing*.gz", "o.h5", config], "no such file"),
        (2, [source, "o.h5", "absent.config"], "no such configuration"),
        (2, [source, "o.h5", "bad.config"], "[image] size: unknown key"),
        (
            2,
            [source, "o.h5", config, "bins_cuts_dict.pkl", "--bins_cuts_dict", "other.pkl"],
            "two dictionaries",
        ),
        (2, [source, "o.h5", config, "--stratify"], "--stratify needs --split"),
        (2, [source, source, config], "also an input"),
        (
            2,
            ["simtel", "o.h5", config],
            'simtel: is a folder (expected files). Give its files: "simtel/*.',
        ),
        (2, [source, "o.h5", config, "--summary", "none/s.json"], "folder that does not exist"),
        (2, [source, "o.h5", config, "--summary", "simtel"], "simtel: is a folder"),
        (1, [source, "o.h5", config, "absent.pkl"], "absent.pkl"),
        (1, [source, "o.h5", "none.config"], "no telescope 'LST' in the array (70 SST DigiCam)"),
        (1, [source, "o.h5", "big.config"], "an event with its images would take "),
        (1, [source, "o.h5", config, "deep.json"], "deep.json: not valid JSON"),
        (1, ["none.simtel.gz", "o.h5", config], "no complete simtel header"),
        (1, ["inspect", "none.simtel.gz"], "not an HDF5 file"),
        (1, ["validate", "absent.h5"], "no such file"),
        (1, ["plot", "absent.h5"], "no such file"),
    ]
    for code, words, message in cases:
        assert cli.main(words) == code, words
        captured = capsys.readouterr()
        assert message in captured.err, words
        assert "Traceback" not in captured.err
    assert not (folder / "o.h5").exists()
    for words in (
        ["x", "o.h5"],
        [source, "o.h5", config, "--colour"],
        [source, "o.h5", config, "--max_events", "0"],
        [source, "o.h5", config, "--shuffle", "--seed", "-1"],
        [source, "o.h5", config, "--jobs", "two"],
        [source, "o.h5", config, "--split-fractions", "a=0.5"],
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 2
        assert "Traceback" not in capsys.readouterr().err


def test_a_summary_that_cannot_be_written_is_reported_and_the_data_are_kept(
    folder, monkeypatch, capsys
):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Path, "write_bytes", write_half)
    words = ["simtel/*.gz", "o.h5", "configuration_settings.config", "--summary", "s.json"]
    assert cli.main([*words, "--max_events", "3"]) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == (
        "s.json: cannot be written (No space left on device). "
        "Check its folder, the permissions and the free space."
    )
    assert len(all_images(folder / "o.h5")) == 3


def write_half(path, data):
    """Stand in for Path.write_bytes on a disk that is full half-way."""
    with path.open("wb") as f:
        f.write(data[: len(data) // 2])
    raise OSError(28, "No space left on device")


def test_a_small_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "s.json").write_text("old")
    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(DataError, match=r"s\.json: cannot be written .No space"):
        write_whole(tmp_path / "s.json", b"new")
    assert (tmp_path / "s.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]


def test_small_files_may_be_links_and_devices_and_keep_their_mode(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_whole(tmp_path / "link", b"text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"text"
    (tmp_path / "file").chmod(0o600)
    write_whole(tmp_path / "file", b"other")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", b"text")
    assert os.read(pipe, 9) == b"text"
    os.close(pipe)


def test_a_dictionary_with_too_many_bins_is_refused(folder, monkeypatch, capsys):
    """Defect 8 of the historic tool, see test_defects.py."""
    monkeypatch.chdir(folder)
    (folder / "three.json").write_text(
        '{"format": "bins-cuts-dict", "events": [[102, 301, 2, 1.0]]}'
    )
    assert cli.main(["simtel/*", "o.h5", "configuration_settings.config", "three.json"]) == 2
    assert "has energy bin 2, the configuration has 1" in capsys.readouterr().err


def test_unusable_files_are_named_and_the_others_extracted(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    raw = (folder / "simtel" / "a.simtel.gz").read_bytes()
    (folder / "simtel" / "0_broken.simtel.gz").write_bytes(b"not a simtel file")
    (folder / "simtel" / "b_cut.simtel.gz").write_bytes(raw[:4_000_000])
    assert cli.main(["simtel/*.simtel.gz", "o.h5", "configuration_settings.config"]) == 1
    captured = capsys.readouterr()
    assert "0_broken.simtel.gz: left out: no complete simtel header" in captured.err
    assert "b_cut.simtel.gz: incomplete: the gzip stream is cut off" in captured.err
    assert "3 (1 incomplete, 1 left out)" in captured.out
    assert len(all_images(folder / "o.h5")) > 20
    with tables.open_file(str(folder / "o.h5")) as h5:
        runs = h5.root.Metadata.Runs.read()
        assert runs["complete"].tolist() == [1, 0]
        assert b"cut off" in runs["problem"][1]


def test_image_extractor_without_a_command_says_which_there_are(capsys):
    for words, code, message in (
        (["--help"], 0, "validate  check a data set"),
        (["--version"], 0, f"image-extractor {__version__}"),
        ([], 2, "no command (expected extract, inspect, plot, gallery, validate, "),
        (["insepct", "o.h5"], 2, "'insepct' is not a command (expected extract, inspect,"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.commands(words)
        assert stop.value.code == code
        captured = capsys.readouterr()
        assert message in (captured.err if code else captured.out), words
    assert cli.commands(["validate", "absent.h5"]) == 1
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"image_extractor.py {__version__}\n"


def test_jobs_are_limited_by_the_cores_and_this_is_said(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    asked = []
    monkeypatch.setattr(
        "image_extractor.image_extractor.ImageExtractor.process_files",
        lambda self, files, max_events, jobs, *_: asked.append(jobs) or [],
    )
    words = ["simtel/*", "o.h5", "configuration_settings.config", "--jobs", "3"]
    for cores in (1, 2, 3, 8):
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", str(cores))
        cli.main(words)
        assert (f"of the {cores} cores" in capsys.readouterr().err) == (cores < 8)
    assert asked == [1, 1, 2, 3]


def test_that_no_event_was_written_is_an_error_and_said(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    config = "configuration_settings.config"
    (folder / "d.json").write_text('{"format": "bins-cuts-dict", "events": [[7, 1, 0, 1.0]]}')
    assert cli.main(["simtel/*", "o.h5", config, "d.json"]) == 1
    err = capsys.readouterr().err
    assert "No event was written, because none passed: 31 not in the dictionary." in err
    for _ in range(2):  # a repeated command adds nothing, which is not an error
        assert cli.main(["simtel/*", "p.h5", config, "--max_events", "2"]) == 0


def test_help_needs_no_heavy_import():
    code = (
        "import sys; from image_extractor import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted(m for m in ('ctapipe', 'astropy', 'numba', 'tables', "
        "'numpy', 'torch') if m in sys.modules))"
    )
    done = run(sys.executable, "-c", code)
    assert "--bins_cuts_dict" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", ["image_extractor.py", "image-extractor", "prepare_cuts_dict.py"])
def test_installed_commands_print_their_help(name, tmp_path):
    done = run(installed(name), "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")


def test_scripts_beside_image_extractor_py_still_import_the_package(tmp_path):
    """Its name must not hide the package from other commands in the same folder."""
    installed("image_extractor.py")
    shutil.copy(BIN / "image_extractor.py", tmp_path / "image_extractor.py")
    (tmp_path / "other_command.py").write_text(
        "from image_extractor import "
        "image_extractor\nprint(image_extractor.ImageExtractor.__name__)\n"
    )
    done = run(sys.executable, tmp_path / "other_command.py")
    assert (done.stdout.strip(), done.stderr) == ("ImageExtractor", "")


def test_the_auxiliary_files_fit_together():
    for suffix, storage, mode, n_bins in (
        ("", "all", "PIXELS_TIMING_3C", 3),
        ("_1bin", "mapped", "PIXELS_1C", 1),
    ):
        settings = load_config(PACKAGE / "aux" / f"test_pytables{suffix}.config")
        assert (settings.storage_mode, settings.image_mode, settings.energy_bins.count()) == (
            storage,
            mode,
            n_bins,
        )
        assert (settings.mode, settings.type_mode, settings.dtype, settings.dim_order) == (
            "gh_class",
            "SCT",
            "uint16",
            "channels_last",
        )
        a = load_cuts(PACKAGE / "aux" / f"bins_cuts_dict{suffix}.json")
        b = load_cuts(PACKAGE / "aux" / f"bins_cuts_dict{suffix}.pkl")
        for name in ("_keys", "bins", "energies"):
            assert getattr(a, name).tolist() == getattr(b, name).tolist()
        assert len(a) > 20
        edges = settings.energy_bins.edges_tev()
        for number, energy in zip(a.bins, a.energies, strict=True):
            assert edges[number] <= energy < edges[number + 1]
