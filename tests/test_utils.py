"""Paths in both directions, classes, atomic writes, config files, loops that go on."""

import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import utils
from utils import DataError

ROOT = Path(__file__).resolve().parents[1]


def test_paths_are_those_of_the_data_locations():
    root, galaxy = Path("d"), "8485-1901"
    assert utils.cube_path(root, galaxy) == Path("d/processed/cubes/8485/8485-1901.h5")
    assert utils.label_path(root, "BPT", galaxy) == Path("d/processed/labels/BPT/8485-1901.npy")
    assert utils.patch_path(root, "logOH", "PCA", galaxy) == Path(
        "d/processed/patches/logOH/PCA/8485-1901/8485-1901.npy"
    )
    assert utils.raw_dir(root, galaxy) == Path("d/raw/8485/1901")
    assert utils.split_path(root, "hard", "val") == Path("d/splits/hard/val.csv")


def touch(root, kind, daptype="SPX-MILESHC-MASTARSSP"):
    dash = f"-{daptype}" if daptype else ""
    path = utils.raw_dir(root, "8485-1901") / f"manga-8485-1901-{kind}{dash}.fits.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_every_kind_of_file_leads_to_every_other(tmp_path):
    raw = {"logcube": touch(tmp_path, "LOGCUBE"), "maps": touch(tmp_path, "MAPS")}
    files = {
        **raw,
        "cube": utils.cube_path(tmp_path, "8485-1901"),
        "label": utils.label_path(tmp_path, "BPT", "8485-1901"),
        "patches": utils.patch_path(tmp_path, "BPT", "spatial", "8485-1901"),
    }
    for start in files.values():
        for kind, expected in files.items():
            assert utils.sibling(start, kind, "BPT", "spatial") == expected
    assert utils.sibling(files["patches"], "label") == files["label"]


def test_sibling_asks_for_what_the_path_does_not_say(tmp_path):
    cube = utils.cube_path(tmp_path, "8485-1901")
    with pytest.raises(DataError, match="label_task"):
        utils.sibling(cube, "label")
    with pytest.raises(DataError, match="patch_norm"):
        utils.sibling(cube, "patches", "BPT")
    with pytest.raises(DataError, match="no data folder"):
        utils.sibling("/elsewhere/8485-1901.h5", "cube")


def test_two_analyses_side_by_side_need_a_choice(tmp_path):
    touch(tmp_path, "MAPS", "HYB10-MILESHC-MASTARSSP")
    spx = touch(tmp_path, "MAPS")
    with pytest.raises(DataError, match="--daptype"):
        utils.find_raw(tmp_path, "8485-1901", "MAPS")
    assert utils.find_raw(tmp_path, "8485-1901", "MAPS", "SPX-MILESHC-MASTARSSP") == spx


def test_dap_cube_is_preferred_to_drp_cube(tmp_path):
    drp = touch(tmp_path, "LOGCUBE", None)
    assert utils.find_raw(tmp_path, "8485-1901", "LOGCUBE") == drp
    dap = touch(tmp_path, "LOGCUBE")
    assert utils.find_raw(tmp_path, "8485-1901", "LOGCUBE") == dap


def test_missing_raw_file_names_all_three_ways_to_the_data_folder(tmp_path):
    with pytest.raises(DataError, match=r"--data-dir, MANGA_DATA_DIR or \./data/manga"):
        utils.find_raw(tmp_path, "8485-1901", "MAPS")


def test_data_dir_order(monkeypatch):
    monkeypatch.delenv("MANGA_DATA_DIR", raising=False)
    assert utils.data_dir() == Path("data/manga")
    monkeypatch.setenv("MANGA_DATA_DIR", "/somewhere")
    assert utils.data_dir() == Path("/somewhere")
    assert utils.data_dir(Path("flag")) == Path("flag")


@pytest.mark.parametrize("text", ["8485", "8485_1901", "8485-1901-1", "abc", "84-19"])
def test_no_plateifu_is_refused(text):
    with pytest.raises(DataError, match="plateifu"):
        utils.split_plateifu(text)


def test_plateifu_from_any_file_name():
    for name in ("manga-8485-1901-MAPS-SPX.fits.gz", "8485-1901.h5", "8485-1901_err.npy"):
        assert utils.plateifu_of(f"a/b/{name}") == "8485-1901"
    with pytest.raises(DataError):
        utils.plateifu_of("notes.txt")


def test_metallicity_classes_have_the_scales_edges():
    values = np.array([8.3, 8.40, 8.4399, 8.44, 8.9, np.nan])
    np.testing.assert_array_equal(utils.label_classes(values, "logOH", 6), [0, 1, 1, 2, 5, -1])
    assert utils.label_classes(np.array([8.34]), "logOH", 8) == 1
    for n in (6, 8):
        assert len(utils.class_names("logOH", n)) == n == utils.class_values(n).size
        back = utils.label_classes(utils.class_values(n), "logOH", n)
        np.testing.assert_array_equal(back, np.arange(n))
    with pytest.raises(DataError, match="6 or 8"):
        utils.logoh_edges(7)


def test_crash_while_writing_leaves_the_old_file(tmp_path):
    out = tmp_path / "a.txt"
    out.write_text("old")

    def crash():
        with utils.atomic_path(out) as part:
            part.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        crash()
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_killed_writer_leaves_no_output(tmp_path):
    out = tmp_path / "cube.h5"
    code = (
        "import os, signal, utils\n"
        f"with utils.atomic_path({str(out)!r}) as part:\n"
        "    part.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert not out.exists()


@dataclass(frozen=True)
class Example:
    """Config of a script that does nothing."""

    rate: float = 1.0
    names: tuple[str, ...] = ()
    fast: bool = True
    where: Path | None = None


def test_config_file_becomes_flags_and_later_flags_win(tmp_path):
    import tyro

    saved = Example(2.5, ("a", "b"), False, None)
    path = tmp_path / "config.json"
    utils.write_json(path, utils.config_dict(saved))
    assert tyro.cli(Example, args=utils.config_args(path)) == saved
    words = utils.with_config_file(["--rate", "7", f"--config={path}"])
    assert tyro.cli(Example, args=words).rate == 7
    words = utils.with_config_file(["--config", str(path), "--rate", "7"])
    assert tyro.cli(Example, args=words) == Example(7, ("a", "b"), False, None)


def test_unreadable_config_file_is_one_clear_line(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{nonsense")
    for bad in (path, tmp_path / "absent.json"):
        with pytest.raises(DataError, match=str(bad)):
            utils.with_config_file(["--config", str(bad)])


def run_in_process(main, argv, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", *argv])
    with pytest.raises(SystemExit) as stop:
        utils.run_command(main, Example, "doc")
    return stop.value.code


def test_exit_codes(monkeypatch, capsys):
    def broken(config):
        raise DataError("a.fits: zero bytes.")

    assert run_in_process(lambda config: None, [], monkeypatch) == 0
    assert run_in_process(lambda config: 75, [], monkeypatch) == 75
    assert run_in_process(broken, [], monkeypatch) == 1
    assert "error: a.fits: zero bytes." in capsys.readouterr().err
    assert run_in_process(broken, ["--rte", "3"], monkeypatch) == 2
    assert "--rte" in capsys.readouterr().err


def visit(plateifu, bad=()):
    if plateifu in bad:
        raise DataError(f"{plateifu}: broken")
    return "written"


@pytest.mark.parametrize("jobs", [1, 2])
def test_loop_goes_on_past_a_bad_galaxy_and_lists_it(tmp_path, jobs):
    names = [f"8485-{n}" for n in (1901, 1902, 1903)]
    failed = tmp_path / "failed.csv"
    outcome = utils.for_each_galaxy(
        partial(visit, bad=("8485-1902",)), names, "cubes", failed, jobs
    )
    assert outcome == {"8485-1901": "written", "8485-1902": "failed", "8485-1903": "written"}
    rows = list(csv.DictReader(failed.open()))
    assert rows == [{"plateifu": "8485-1902", "stage": "cubes", "reason": "8485-1902: broken"}]
    assert utils.report(outcome, "cubes", tmp_path) == 1
    outcome = utils.for_each_galaxy(visit, names, "cubes", failed, jobs)
    assert utils.report(outcome, "cubes", tmp_path) == 0
    assert not failed.exists()


def test_shards_partition_the_list():
    items = list(range(11))
    parts = [utils.shard_of(items, f"{k}/3") for k in range(3)]
    assert sorted(i for part in parts for i in part) == items
    for bad in ("3/3", "a/b", "1"):
        with pytest.raises(DataError, match="--shard"):
            utils.shard_of(items, bad)


def test_environment_names_what_a_run_depended_on():
    found = json.loads(json.dumps(utils.environment()))
    assert found["packages"]["numpy"] == np.__version__
    assert {"python", "platform", "git", "command", "version"} <= set(found)


def test_other_recipe_needs_overwrite():
    utils.check_recipe(Path("x"), {"a": [1], "b": 3}, {"a": (1,)})
    with pytest.raises(DataError, match=r"another a\..*--overwrite"):
        utils.check_recipe(Path("x"), {"a": 1}, {"a": 2})
