"""Paths in both directions, atomic writes, config files, exit codes."""

import dataclasses
import os
import platform
import re
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import utils
from utils import DataError

import pytest
import tyro

import create_data_splits
import cube_patch_processing

ROOT = Path(__file__).resolve().parents[1]


def test_paths_are_those_of_the_data_locations():
    root, galaxy = Path("d"), "8485-1901"
    patches = "d/processed/patches/logOH/PCA/8485-1901/8485-1901.npy"
    for path, expected in (
        (utils.raw_dir(root, galaxy), "d/raw/8485/1901"),
        (utils.cube_path(root, galaxy), "d/processed/cubes/8485/8485-1901.h5"),
        (utils.label_path(root, "BPT", galaxy), "d/processed/labels/BPT/8485-1901.npy"),
        (utils.patch_path(root, "logOH", "PCA", galaxy), patches),
        (utils.split_path(root, "hard", "val"), "d/splits/hard/val.csv"),
    ):
        assert path == Path(expected)
    for name in ("manga-8485-1901-MAPS-SPX.fits.gz", "8485-1901.h5", "8485-1901_err.npy"):
        assert utils.plateifu_of(f"a/b/{name}") == galaxy


def touch(root, kind, daptype="SPX-MILESHC-MASTARSSP"):
    dash = f"-{daptype}" if daptype else ""
    path = utils.raw_dir(root, "8485-1901") / f"manga-8485-1901-{kind}{dash}.fits.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


WRONG = "8485 8485_1901 8485-1901-1 abc 84-19 ../../x 8485-1901/../.. \0 ٨٤٨٥-1901".split()
"""No plateifus; the last one has digits of another script."""


@pytest.mark.parametrize(
    ("function", "words", "message"),
    [
        (utils.find_raw, ("nowhere", "8485-1901", "MAPS"), r"--data-dir, else \$MANGA_DATA_DIR"),
        (utils.plateifu_of, ("notes.txt",), r"notes\.txt"),
        *((utils.split_plateifu, (text,), r"not a valid plateifu .*8485-1901") for text in WRONG),
        *(
            (utils.split_path, (Path("data"), name), "expected the name of a folder")
            for name in ("", "..", "../../elsewhere", "a/b", "/tmp")
        ),
    ],
)
def test_what_names_no_galaxy_or_file_is_refused(function, words, message):
    with pytest.raises(DataError, match=message):
        function(*words)


def test_dap_cube_is_preferred_and_two_analyses_or_copies_need_a_choice(tmp_path):
    for daptype in (None, "SPX-MILESHC-MASTARSSP"):  # the DRP's file, then also the DAP's
        cube = touch(tmp_path, "LOGCUBE", daptype)
        assert utils.find_raw(tmp_path, "8485-1901", "LOGCUBE") == cube
    hyb, spx = (touch(tmp_path, "MAPS", f"{t}-MILESHC-MASTARSSP") for t in ("HYB10", "SPX"))
    with pytest.raises(DataError, match=r"2 MAPS files .*: choose one with --daptype"):
        utils.find_raw(tmp_path, "8485-1901", "MAPS")
    assert utils.find_raw(tmp_path, "8485-1901", "MAPS", "SPX-MILESHC-MASTARSSP") == spx
    hyb.rename(spx.with_suffix(""))  # the same file, unpacked
    with pytest.raises(DataError, match=r"2 MAPS files .*: remove one of the two copies"):
        utils.find_raw(tmp_path, "8485-1901", "MAPS")


def test_data_dir_order(monkeypatch):
    monkeypatch.delenv("MANGA_DATA_DIR", raising=False)
    assert utils.data_dir() == Path("data/manga")
    monkeypatch.setenv("MANGA_DATA_DIR", "/somewhere")
    assert utils.data_dir() == Path("/somewhere")
    assert utils.data_dir(Path("flag")) == Path("flag")
    with pytest.raises(DataError, match=r"test_utils\.py: a file, expected a data folder"):
        utils.data_dir(Path(__file__))


def write_and_die(out):
    code = f"import os, utils\nwith utils.atomic_path({str(out)!r}) as part:\n"
    code += "    part.write_text('half'); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -9


def test_killed_writer_leaves_no_output(tmp_path):
    paths = utils.cube_path(tmp_path, "8485-1901"), utils.label_path(tmp_path, "BPT", "8485-1901")
    for out in paths:
        write_and_die(out)
        assert not out.exists()
        assert len(list(out.parent.iterdir())) == 1  # what it had begun
    with pytest.raises(DataError, match="no galaxy to work on"):
        cube_patch_processing.main(cube_patch_processing.Config(data_dir=tmp_path))
    with pytest.raises(DataError, match="no label maps"):
        create_data_splits.labelled_galaxies(tmp_path, "BPT", 1)


def test_next_write_in_a_folder_removes_what_lost_writers_left(tmp_path):
    write_and_die(tmp_path / "cube.h5")
    (litter,) = tmp_path.iterdir()
    here, alive = platform.node().replace(".", "-"), os.getppid()
    busy, new = f".busy.npy.{here}.{alive}.part.npy", ".new.npy.elsewhere.77.part.npy"
    download = ".dapall-v3_1_1-3.1.0.fits.part"  # it goes on
    for name in (busy, new, download, ".hidden.npy", ".old.npy.elsewhere.77.part.npy"):
        (tmp_path / name).touch()
        if name not in (busy, new):
            os.utime(tmp_path / name, (0, 0))
    assert litter.exists()
    utils.write_json(tmp_path / "out.json", {})
    assert {p.name for p in tmp_path.iterdir()} == {busy, new, download, ".hidden.npy", "out.json"}


def test_file_is_on_the_disk_before_it_replaces_another(tmp_path, monkeypatch):
    out, flushed = tmp_path / "a.txt", []
    out.write_text("old")

    def fsync(descriptor):
        flushed.append((os.fstat(descriptor).st_ino, out.read_text()))

    monkeypatch.setattr(os, "fsync", fsync)
    with utils.atomic_path(out) as part:
        part.write_text("whole")
    assert flushed == [(out.stat().st_ino, "old")]

    def crash():
        with utils.atomic_path(out) as part:
            part.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        crash()
    assert out.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [out]


@dataclass(frozen=True)
class Example:
    """Config of a script that does nothing."""

    rate: float = 1.0
    names: tuple[str, ...] = ()
    fast: bool = True
    where: Path | None = None
    """A folder."""
    limit: int | None = None
    kind: Literal["a", "b"] = "a"
    seed: int = 0
    debug: bool = False


SAVED = Example(2.5, ("a", "b"), False)


@pytest.fixture
def config_file(tmp_path):
    utils.write_json(tmp_path / "config.json", utils.config_dict(SAVED))
    return tmp_path / "config.json"


def test_config_file_or_run_folder_becomes_flags_and_the_users_flags_win(config_file):
    for path in (config_file, config_file.parent):
        assert tyro.cli(Example, args=utils.config_args(path, Example)) == SAVED
        for words in (["--rate", "7", f"--config={path}"], ["--config", str(path), "--rate", "7"]):
            file, own = utils.split_config_file(words)
            found = utils.parse([*utils.config_args(file, Example, own), *own], Example, "")
            assert found == replace(SAVED, rate=7)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{nonsense", "not readable .*, expected a JSON file"),
        (b"\xff\xfe\x00", "not readable .*, expected a JSON file"),
        (b'{"rte": 3}', "unknown key 'rte'; did you mean 'rate'"),
        (b'["rate", 3]', "expected a JSON object of options, found list"),
        (None, "no such file, expected .*or the folder of a run"),
    ],
)
def test_unreadable_config_file_is_one_clear_line(config_file, content, message):
    config_file.unlink() if content is None else config_file.write_bytes(content)
    for path in (config_file, config_file.parent):
        with pytest.raises(DataError, match=f"{config_file}: {message}") as refused:
            utils.config_args(path, Example)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("result", "words", "code", "message"),
    [
        (None, [], 0, ""),
        (75, [], 75, ""),
        (DataError("a.fits: zero bytes."), [], 1, "error: a.fits: zero bytes.\n"),
        (BrokenPipeError("the archive hung up"), [], 1, "error: the archive hung up\n"),
        (None, ["--seed", "-1"], 1, "error: --seed -1: expected 0 or more.\n"),
        (None, ["--rte", "3"], 2, "error: --rte, 3: no such option. Expected --rate FLOAT. SEE"),
        (None, ["--rate", "x"], 2, "error: --rate: not a number: 'x'. Expected --rate FLOAT. SEE"),
        (None, ["--rate"], 2, "error: --rate: too few, expected 1. SEE"),
        (None, ["--seed", "x"], 2, "error: --seed: not a whole number: 'x'. Expected --seed INT."),
        (None, ["--where", "--seed"], 2, "error: --where: too few, expected 1. SEE"),
        (None, ["--limit", "y"], 2, "error: --limit: found 'y'. Expected --limit INT. SEE"),
        (None, ["--kind", "c"], 2, "error: --kind c: expected one of ('a', 'b'). SEE"),
        (None, ["x" * 200], 2, f"error: {'x' * 200}: no option takes this value. SEE"),
        (DataError("--rate 1: too slow."), [], 1, "error: --rate 1: too slow.\n"),
        (None, ["--config"], 2, "error: config.json: no such file, expected a JSON file"),
    ],
)
def test_exit_codes(command, result, words, code, message):
    def main(config):
        if isinstance(result, Exception):
            raise result
        return result

    found, said = command(main, Example, *words)
    assert found == code
    assert said.startswith(message.replace("SEE", "See script.py --help.\n"))
    assert said.count("\n") == (code in (1, 2))


def test_missing_option_is_named(command):
    needs = dataclasses.make_dataclass("Needs", [("run_dir", Path), ("debug", bool, False)])
    assert command(print, needs) == (2, "error: --run-dir is missing. See script.py --help.\n")


def test_config_file_is_named_with_a_value_that_it_alone_gives(command, tmp_path):
    def main(config):
        raise DataError(f"--rate {config.rate:g}: too slow.")

    for value, words, message in (
        ("x", [], "FILE: --rate: not a number: 'x'. Expected --rate FLOAT. See script.py --help."),
        (3, [], "FILE: --rate 3: too slow."),
        (3, ["--rate", "2"], "--rate 2: too slow."),
        (3, ["--seed", "-1"], "--seed -1: expected 0 or more."),
    ):
        utils.write_json(tmp_path / "a.json", {"rate": value})
        _, said = command(main, Example, "--config", tmp_path / "a.json", *words)
        assert said == f"error: {message.replace('FILE', str(tmp_path / 'a.json'))}\n"


def test_help_shows_no_default_that_says_nothing(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("sys.argv", ["script.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        utils.run_command(print, Example, "What it does.")
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert said.startswith("usage: script.py")
    assert re.search(r"--where PATH +A folder\.\n", said)
    assert "(default: 1.0)" in said
    assert "None" not in said
    assert "(default: )" not in said
    assert os.environ["COLUMNS"] == "60"


def test_first_of_several_processes_says_what_is_wrong(command, monkeypatch):
    def main(config):
        raise DataError("a.fits: zero bytes.")

    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, message in ((0, "error: a.fits: zero bytes.\n"), (1, "")):
        monkeypatch.setenv("RANK", str(rank))
        assert command(main, Example) == (1, message)

    def breaks(config):
        raise OSError(5, "Input/output error", "/disk")

    assert "error: /disk: Input/output error" in command(breaks, Example)[1]


def test_ctrl_c_while_packages_are_imported_leaves_no_traceback():
    for raised, said in (("KeyboardInterrupt", b""), ("ZeroDivisionError", b"ZeroDivisionError\n")):
        code = f"import utils\nraise {raised}"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
        assert done.returncode == (1 if said else -signal.SIGINT)
        assert done.stderr.endswith(said)
        assert bool(done.stderr) == bool(said)


def test_a_reader_that_has_seen_enough_is_no_error():
    code = (
        "import dataclasses, utils\n"
        "Config = dataclasses.make_dataclass('Config', [('debug', bool, False)], frozen=True)\n"
        "utils.run_command(lambda config: print('x\\n' * 10**6), Config, 'Talk.')\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as talk:
        talk.stdout.readline()
        talk.stdout.close()
        assert talk.stderr.read() == b""
    assert talk.returncode == 128 + signal.SIGPIPE


def test_a_zombie_is_not_alive():
    """It keeps its process id until its parent asks, which may be never."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, but is not reaped
    os.kill(child.pid, 0)  # it has a process id all the same
    assert not utils._is_alive(child.pid)
    assert utils._is_alive(os.getpid())
    assert utils._is_alive(1)
    child.wait()


@pytest.mark.parametrize("error", [RecursionError("deep\nstack"), KeyError("x"), MemoryError()])
def test_whatever_a_library_raises_about_a_file_is_one_line(error):
    with pytest.raises(DataError) as refused, utils.reading("a.json", "a config", "Mend it."):
        raise error
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(f"a.json: not readable ({type(error).__name__}: ")
    assert str(refused.value).endswith("), expected a config. Mend it.")


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    out, most = tmp_path / "a.json", resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    utils.write_json(out, "old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, most))
    try:
        with pytest.raises(OSError, match="File too large") as full:
            utils.write_json(out, "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert utils.in_one_line(full.value).startswith(f"{out}: File too large. Check that")
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_text() == '"old"\n'


@pytest.mark.parametrize(
    ("plateifu", "remedy"),
    [
        ("8485-1901", r"download_utils.py --plateifu 8485-1901\. .*--maps FILE"),
        ("8485-1999", "no such IFU"),
    ],
)
def test_missing_file_is_to_be_downloaded_only_if_it_can_exist(tmp_path, plateifu, remedy):
    with pytest.raises(DataError, match=f"{plateifu}: no manga-{plateifu}-MAPS.*{remedy}"):
        utils.find_raw(tmp_path, plateifu, "MAPS")
