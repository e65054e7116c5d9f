"""Training: the loop (training.py) and the command (run_SSFTT_training.py)."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import utils
from utils import DataError

import mock_cubes
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import numbers_of
from mock_cubes import later, rebuild_cube, rebuild_statistics, relabel
from mock_network import like_trained
from safetensors.torch import load_file
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

import baselines
import data_io
import inference
import network_start
import networks
import run_folder
import run_SSFTT_training as script
import training
from labels import class_middles, class_names
from run_SSFTT_training import TrainConfig, train_config
from samples import PatchSpec

REPO = Path(script.__file__).parent
TRAIN, VAL = mock_cubes.PLATEIFUS[:4], mock_cubes.PLATEIFUS[4:6]
USUAL = {
    "network": "ssftt",
    "split_dir": "hard", "patch_size": 5, "packed_type": "float32", "batch_size": 64, "epochs": 4,
    "baselines": False, "device": "cpu",
}  # fmt: skip
KINDS = {
    "patches": {"cutout": 1, "schedule": "constant"},
    "cutouts": {"schedule": "constant"},
    "half precision": {"amp": "bf16", "schedule": "constant"},
    "cosine": {"cutout": 1},
    "matched filters": {"network": "matched_filters", "cutout": 7, "schedule": "constant"},
}


@pytest.fixture
def options(root, tmp_path):
    return {**USUAL, "data_dir": root, "run_dir": tmp_path / "run"}


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """A run of one epoch; only copies of it may be changed."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    assert train({**USUAL, "data_dir": root, "run_dir": run_dir, "epochs": 1}) == 0
    return run_dir


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory, request):
    """Options of a run of four epochs, never stopped."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    options = {**USUAL, **KINDS[request.param], "data_dir": root, "run_dir": run_dir}
    assert train(options) == 0
    return options


def train(options, **changes):
    return script.main(train_config(**{**options, **changes}))


def set_up(options, **changes):
    return script.set_up(train_config(**{**options, **changes}), options["run_dir"])


@pytest.fixture
def run_script(command):
    """Function that runs the command in this process and returns its exit code and stderr."""
    return partial(command, script.main, TrainConfig)


def weights_of(run_dir):
    return run_folder.read_checkpoint(run_dir)["model"]


def json_of(run_dir, name="model.json"):
    return json.loads((run_dir / name).read_text())


def assert_same_run(one, other):
    torch.testing.assert_close(weights_of(one), weights_of(other), rtol=0, atol=0)
    best = [load_file(run / "best.safetensors") for run in (one, other)]
    torch.testing.assert_close(*best, rtol=0, atol=0)
    pd.testing.assert_frame_equal(numbers_of(one), numbers_of(other), check_exact=True)
    assert json_of(one)["best"]["epoch"] == json_of(other)["best"]["epoch"]


def at_step(monkeypatch, n_steps, act):
    """Act during the n-th training step."""
    real, seen = networks.losses, []

    def losses(network, outputs, *args, **options):
        if outputs.requires_grad:
            seen.append(1)
            if len(seen) == n_steps:
                act()
        return real(network, outputs, *args, **options)

    monkeypatch.setattr(networks, "losses", losses)


def sends(number):
    return lambda: os.kill(os.getpid(), number)


def crashes():
    raise RuntimeError("power cut")


@pytest.mark.parametrize(
    "whole", ["patches", "cutouts", "half precision", "matched filters"], indirect=True
)
def test_four_epochs_equal_two_and_two(whole, tmp_path):
    parted = {**whole, "run_dir": tmp_path / "parted", "resume": "auto"}
    assert train(parted, epochs=2) == 0
    assert json_of(parted["run_dir"], "config.json")["epochs"] == 2
    assert train(parted) == 0
    assert json_of(parted["run_dir"], "config.json")["epochs"] == 4
    assert_same_run(whole["run_dir"], parted["run_dir"])


@pytest.mark.parametrize(
    ("whole", "number"),
    [
        ("patches", signal.SIGUSR1),
        ("patches", signal.SIGINT),
        ("cutouts", signal.SIGTERM),
        ("cutouts", None),
        ("half precision", signal.SIGUSR1),
        ("cosine", signal.SIGTERM),
        ("matched filters", signal.SIGTERM),
    ],
    indirect=["whole"],
    ids=str,
)
def test_run_stopped_by_a_signal_or_a_crash_resumes_bit_for_bit(
    whole, number, tmp_path, monkeypatch
):
    stopped = {**whole, "run_dir": tmp_path / "stopped", "resume": "auto"}
    steps = run_folder.read_checkpoint(whole["run_dir"])["scheduler"]["last_epoch"] // 4
    assert steps > 3
    with monkeypatch.context() as patch:  # the second step of the second epoch
        at_step(patch, steps + 2, sends(number) if number else crashes)
        if number:
            assert train(stopped) == utils.EXIT_AGAIN
        else:
            with pytest.raises(RuntimeError, match="power cut"):
                train(stopped)
    saved = run_folder.read_checkpoint(stopped["run_dir"])["progress"]
    assert (saved["epoch"], saved["step"]) == (1, 2 if number else 0)
    assert train(stopped) == 0
    assert_same_run(whole["run_dir"], stopped["run_dir"])
    if number:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        assert signal.getsignal(number) is usual


def test_second_interrupt_ends_a_run_at_once(options, monkeypatch):
    at_step(monkeypatch, 2, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        train(options)


def test_signal_in_the_last_step_leaves_only_validation_to_do(options, monkeypatch):
    options = {**options, "epochs": 1, "samples_per_epoch": 64 * 3, "cutout": 1}
    at_step(monkeypatch, 3, sends(signal.SIGUSR1))
    assert train(options) == utils.EXIT_AGAIN
    assert train(options, resume="auto") == 0
    assert len(numbers_of(options["run_dir"])) == 1


@pytest.mark.slow
def test_process_stops_on_a_signal_and_continues(root, tmp_path, run_script):
    run, log = tmp_path / "run", ""
    words = f"--data-dir {root} --run-dir {run} --split-dir hard --resume auto --device cpu".split()
    words += "--samples-per-epoch 64 --batch-size 32 --patience 0 --no-baselines --epochs".split()
    command_line = [sys.executable, script.__file__, *words, "4000"]
    process = subprocess.Popen(command_line, stderr=subprocess.PIPE, text=True)
    while "epoch 1/4000" not in log and (line := process.stderr.readline()):
        log += line
    process.send_signal(signal.SIGUSR1)
    log += process.communicate()[1]
    assert process.returncode == utils.EXIT_AGAIN, log
    done = len(numbers_of(run))
    assert 1 <= done < 4000
    assert run_script(*words, done + 1)[0] == 0
    assert len(numbers_of(run)) == done + 1


def test_finished_run_is_left_alone_even_if_fewer_epochs_are_asked_for(options, trained):
    run_dir = shutil.copytree(trained, options["run_dir"])

    def times():
        renewed = ("log.txt", "config.json")
        return {p: p.stat().st_mtime_ns for p in run_dir.iterdir() if p.name not in renewed}

    before = times()
    assert train(options, resume="auto", epochs=1) == 0
    assert times() == before
    assert train(options, resume="auto", epochs=2) == 0
    assert train(options, resume="auto", epochs=1) == 0
    assert "has 2 epochs already, more than --epochs 1" in (run_dir / "log.txt").read_text()
    assert len(numbers_of(run_dir)) == 2


def test_run_stopped_while_it_starts_can_be_started_again(options, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "environment", crashes)
        with pytest.raises(RuntimeError, match="power cut"):
            train(options)
    assert train(options, epochs=1, resume="auto") == 0


def test_resume_without_a_folder_finds_the_newest_run_of_the_same_options(
    options, trained, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    newer, older = (shutil.copytree(trained, Path("runs") / name) for name in ("a", "z"))
    os.utime(older / "last.pt", (1, 1))  # the time decides, not the name
    utils.write_json(Path("runs/damaged/last.pt"), {})

    def chosen(resume=True, **changes):
        deciding = train_config(**{**options, **changes, "run_dir": None}).deciding
        return run_folder.choose(None, resume, False, deciding, "logOH_PCA")

    assert chosen() == chosen(epochs=9, patience=1) == (newer, True)
    for new, resuming in (chosen(seed=5), chosen(resume=False)):
        assert (resuming, new.exists(), new.parent) == (False, False, Path("runs"))
        assert new.name.endswith("_logOH_PCA")


# What is refused: (what happens to the data folder, and to the run `old`, options, message)


def exchanged(one, other):
    def change(data):
        paths = [utils.split_path(data, "hard", part) for part in (one, other)]
        contents = [path.read_bytes() for path in paths]
        for path, content in zip(paths, reversed(contents), strict=True):
            path.write_bytes(content)

    return change


def then_statistics(change):
    return lambda data: (change(data), rebuild_statistics(data))


def foreign(data):
    """A folder test/ of somebody's, and another program's config.json."""
    shutil.rmtree("old")
    Path("old/test").mkdir(parents=True)
    Path("old/test/thesis.txt").write_text("three years of work")
    Path("old/config.json").write_text('{"editor": "vi"}')


OUT_OF_RANGE = {
    "lr": (-1, float("nan")), "dropout": (2,), "label_smoothing": (3,), "weight_decay": (-0.1,),
    "seed": (-1,), "patch_size": (0,), "epochs": (0,), "cutout": (4,), "batch_size": (0,),
    "patience": (-1,), "n_tokens": (0,), "samples_per_epoch": (-1,),
}  # fmt: skip
REFUSED = {
    "other options": (
        None, {"lr": 0.5, "dropout": 0.3},
        r"run was made with dropout=0.1 \(now 0.3\), lr=0.001 \(now 0.5\)\..*--config old",
    ),
    "a test galaxy became a training galaxy": (
        then_statistics(exchanged("train", "test")), {},
        "(?=.*another split)(?=.*set of cubes)(?=.*set of training labels)(?=.*set of statistics)",
    ),
    "validation and test parts exchanged": (exchanged("val", "test"), {}, "another split"),
    "statistics": (rebuild_statistics, {}, "old: made with another set of statistics. Start"),
    "training labels": (later(relabel, TRAIN[:1], 0.01), {}, "another set of training labels. S"),
    "validation labels": (later(relabel, VAL, 0.01), {}, "another set of training labels. Start"),
    "options of labels": (
        later(relabel, TRAIN + VAL, min_snr=5.0), {}, r"with labels\.min_snr=3\.0 \(now 5\.0\)\. S"
    ),
    "validation cube": (
        later(rebuild_cube, VAL[0], "new"), {}, "old: made with another set of cubes. Start"
    ),
    "training cube": (
        then_statistics(later(rebuild_cube, TRAIN[0], redshift=0.5)),
        {}, "old: made with another set of cubes, another set of statistics. Start again",
    ),
    "options of cubes": (
        then_statistics(
            lambda data: [rebuild_cube(data, p, deredden=False) for p in mock_cubes.PLATEIFUS]
        ),
        {}, r"made with cube\.deredden=True \(now False\), another set of cubes",
    ),
    "damaged checkpoint": (
        lambda _: os.truncate("old/last.pt", 50), {}, r"last\.pt: not readable"
    ),
    "neither resume nor overwrite": (None, {"resume": "no"}, "old: holds a run. .*--overwrite"),
    "folder of other origin": (foreign, {}, r"holds config\.json, test, but not a training run"),
    "the same with --overwrite": (foreign, {"overwrite": True}, "but not a training run"),
    "overwriting without a split": (
        None, {"overwrite": True, "split_dir": "no"}, "create_data_splits"
    ),
    "overwriting without labels": (
        lambda data: utils.label_path(data, "logOH", TRAIN[0]).unlink(),
        {"overwrite": True}, "no such file",
    ),
    "a batch of one patch": (
        None, {"run_dir": Path("new"), "batch_size": 1, "cutout": 1}, "at least 2 patches"
    ),
    "projection on more than the bands": (
        None, {"run_dir": Path("new"), "projection": 7}, "expected 1 to 6"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_without_touching_any_run(case, root, trained, tmp_path, monkeypatch):
    change, options, message = REFUSED[case]
    data = shutil.copytree(root, tmp_path / "data")
    shutil.copytree(trained, tmp_path / "runs" / "old")
    monkeypatch.chdir(tmp_path / "runs")
    if change:
        change(data)

    def content():
        paths = [p for p in Path().rglob("*") if p.name != "log.txt"]
        return {p: p.is_file() and p.read_bytes() for p in paths}

    before, resume = content(), "no" if "overwrite" in options or "run_dir" in options else "auto"
    usual = {**USUAL, "data_dir": data, "run_dir": Path("old"), "resume": resume, "epochs": 2}
    with pytest.raises(DataError, match=message) as caught:
        train({**usual, **options})
    assert content() == before  # and there is no folder `new`
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, vs in OUT_OF_RANGE.items() for v in vs])
def test_options_out_of_range_are_refused_before_anything_is_written(options, name, value):
    with pytest.raises(DataError, match=f"--{name.replace('_', '-')} {value}: expected"):
        train(options, **{name: value})
    assert not options["run_dir"].exists()


def test_unchanged_data_in_another_place_are_resumed_on(options, root, trained, tmp_path):
    """The counterpart of all that is refused."""
    shutil.copytree(trained, options["run_dir"])
    data = shutil.copytree(root, tmp_path / "elsewhere")
    assert train(options, data_dir=data, resume="auto", epochs=2, patience=1) == 0
    assert len(numbers_of(options["run_dir"])) == 2


@pytest.mark.parametrize(
    ("flag", "value", "code", "message"),
    [
        ("--lrr", "1", 2, "--lrr"),
        ("--patch-norm", "none", 2, "patch-norm"),
        ("--data-dir", "nowhere", 1, "check --data-dir"),
        ("--config", "nowhere.json", 2, "nowhere.json"),
        ("--device", "cuda", 1, "no GPU found"),
    ],
)
def test_wrong_usage_ends_in_one_line_and_the_right_code(
    flag, value, code, message, root, tmp_path, monkeypatch, run_script
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found, said = run_script("--data-dir", root, "--split-dir", "hard", flag, value)
    assert found == code
    assert message in said
    assert "Traceback" not in said
    assert not Path("runs").exists()


def test_damaged_run_can_be_replaced_and_nothing_of_it_stays(options, trained):
    run_dir = shutil.copytree(trained, options["run_dir"])
    (run_dir / "last.pt").write_bytes(b"half a file")
    (run_dir / "test").mkdir()
    assert train(options, overwrite=True, epochs=1) == 0
    assert not (run_dir / "test").exists()  # results of the model that is gone
    assert_same_run(run_dir, trained)


def test_two_processes_do_not_train_in_one_folder(options):
    with utils.locked(options["run_dir"], "taken"):
        with pytest.raises(DataError, match="another process trains here"):
            train(options)
        assert not list(options["run_dir"].iterdir())
    assert train(options, epochs=1) == 0


def test_command_alone_creates_statistics_and_packed_cubes_and_trains(
    tmp_path, monkeypatch, run_script
):
    """`python run_SSFTT_training.py --label-task logOH`, shortened to one epoch."""
    root = mock_cubes.make_data_dir(tmp_path / "data")
    utils.split_path(root, "hard").rename(utils.split_path(root, "hard_logOH"))
    utils.stats_path(root, "hard_logOH").unlink()
    monkeypatch.setenv("MANGA_DATA_DIR", str(root))
    monkeypatch.chdir(tmp_path)
    assert run_script("--label-task", "logOH", "--epochs", 1, "--device", "cpu")[0] == 0
    assert (root / "processed/packed/hard_logOH/residual_float16.h5").is_file()
    (run,) = Path("runs").iterdir()
    card = run_folder.ModelCard.read(run)
    assert (card.network_name, card.spec.patch_norm, card.spec.patch_size) == (
        "matched_filters",
        "residual",
        7,
    )
    assert card.best["monitor"] == "mae_dex"
    ssftt = ("--label-task", "logOH", "--network", "ssftt", "--run-dir", "ssftt")
    assert run_script(*ssftt, "--epochs", 1, "--device", "cpu")[0] == 0
    assert len(data_io.read_split_stats(root, "hard_logOH").components) == 30
    assert (root / "processed/packed/hard_logOH/PCA_float16.h5").is_file()
    card = run_folder.ModelCard.read(Path("ssftt"))
    assert (card.network_name, card.spec.patch_norm, card.spec.bands) == ("ssftt", "PCA", None)


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.json")), ids=lambda p: p.stem)
def test_named_configs_are_flags_of_the_script(path, command):
    found = []
    assert command(found.append, TrainConfig, "--config", path)[0] == 0
    saved = json.loads(path.read_text())
    assert saved
    assert {k: utils.config_dict(found[0])[k] for k in saved} == saved
    assert found[0].data.split == "hard_logOH"
    script.check_options(found[0])


def test_config_of_a_run_folder_repeats_the_run(options, tmp_path, run_script):
    options = {**options, "bands": (0, 5), "monitor": "loss", "weight_decay": 0.01}
    assert train(options, epochs=1) == 0
    again = tmp_path / "again"
    assert run_script("--config", options["run_dir"], "--run-dir", again)[0] == 0
    saved = [json_of(d, "config.json") for d in (options["run_dir"], again)]
    assert saved[0] == saved[1]
    assert saved[0]["run_dir"] is None  # otherwise the copy would replace the run
    assert_same_run(options["run_dir"], again)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--network", "ssftt"), ("PCA", 5, 256, 1e-3, "accuracy")),
        (("--network=ssftt", "--lr", "0.5"), ("PCA", 5, 256, 0.5, "accuracy")),
        (("--network", "matched_filters"), ("residual", 9, 512, 0.002, "loss")),
        (("--label_task", "BPT"), ("residual", 9, 512, 0.002, "accuracy")),
        (("--seed", "1"), ("residual", 9, 512, 0.002, "loss")),
    ],
)
def test_another_network_brings_its_own_defaults_to_the_config_of_a_run(
    words, expected, tmp_path, command
):
    usual = {"cutout": 9, "batch_size": 512, "lr": 0.002, "monitor": "loss"}
    script.write_config(train_config(**usual), tmp_path)
    found = []
    assert command(found.append, TrainConfig, *words, "--config", tmp_path)[0] == 0
    config = utils.config_dict(found[0])
    names = ("patch_norm", "cutout", "batch_size", "lr", "monitor")
    assert tuple(config[name] for name in names) == expected
    assert config["split_dir"] == ("hard_BPT" if "BPT" in words else "hard_logOH")
    script.check_options(found[0])


def test_what_a_config_says_without_naming_the_network_holds_for_any(tmp_path, command):
    utils.write_json(tmp_path / "some.json", {"lr": 0.01, "cutout": 11, "epochs": 5})
    for network in ("ssftt", "matched_filters"):
        found = []
        words = ("--network", network, "--config", tmp_path / "some.json")
        assert command(found.append, TrainConfig, *words)[0] == 0
        config = utils.config_dict(found[0])
        assert [config[name] for name in ("network", "lr", "cutout", "epochs")] == [
            network,
            0.01,
            11,
            5,
        ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amp": "bf16"}, "--amp with --network matched_filters: expected with SSFTT alone"),
        ({"compile": True}, "--compile with .* expected with SSFTT alone"),
        ({"spectral_stride": 2}, "--spectral-stride with .* expected with SSFTT alone"),
        ({"n_tokens": 5}, "--n-tokens with .* expected with SSFTT alone"),
        ({"patch_norm": "PCA"}, "--patch-norm PCA with --network matched_filters"),
        ({"network": "ssftt", "patch_norm": "residual"}, "--patch-norm residual with --network ss"),
        ({"bands": (0, 5)}, "--bands with --network matched_filters: expected all bands"),
        ({"source": "patches"}, "--source patches with .* expected packed cubes"),
        ({"patch_size": 4, "augment": False}, "--patch-size 4 with .* expected an odd one"),
        ({"label_smoothing": 0.1}, "--label-smoothing 0.1: .* without classes to smooth"),
        ({"label_task": "BPT", "monitor": "mae_dex"}, "--monitor mae_dex with --label-task BPT"),
    ],
)
def test_what_a_network_cannot_use_is_refused_by_its_name(options, message):
    with pytest.raises(DataError, match=message) as caught:
        script.check_options(train_config(**options))
    own = {f"--{name.replace('_', '-')}" for name in (*options, "network", "config")}
    assert {*re.findall("--[a-z-]+", str(caught.value))} <= own  # no other option's name


def test_run_whose_folder_is_removed_ends_with_an_error(options, monkeypatch):
    at_step(monkeypatch, 2, lambda: shutil.rmtree(options["run_dir"]))
    with pytest.raises(DataError, match=r"removed or emptied\. Start the run again"):
        train(options)
    assert not options["run_dir"].exists()


def test_resumed_run_does_not_compute_the_start_that_its_checkpoint_replaces(options, monkeypatch):
    options |= {"network": "matched_filters", "epochs": 1, "resume": "auto"}
    assert train(options) == 0
    monkeypatch.setattr(network_start, "start_filters", crashes)
    assert train(options, epochs=2) == 0
    assert len(numbers_of(options["run_dir"])) == 2


def test_run_folder_records_where_it_came_from(options, trained):
    files = "config.json environment.json split log.txt metrics.csv last.pt model.json stats.h5"
    assert {p.name for p in trained.iterdir()} == {*files.split(), "best.safetensors"}
    card = run_folder.ModelCard.read(trained)
    assert card.class_names == list(class_names("logOH", 6))
    assert sum(card.class_counts) == 444
    assert card.recipe.options["cube"]["n_band"] == mock_cubes.N_BAND
    assert card.recipe.options["labels"]["diagnostic"] == "O3N2-M13"
    assert card.recipe == set_up(options, epochs=7).card.recipe
    log = (trained / "log.txt").read_text()
    for words in ("torch", "device cpu", "train: 4 observations", "val: 2 obs", "parameters"):
        assert words in log


def test_class_that_never_occurs_and_slow_recipe_are_warned_of(options, caplog):
    ready = set_up(options, patch_norm="global")
    classes = ready.loaders["train"].dataset.samples.classes
    classes[classes == 2] = 1
    script.describe_data(ready)
    assert f"no training spaxel is of class {class_names('logOH', 6)[2]}" in caplog.text
    assert "with --patch-norm global, training on cutouts hardly progresses" in caplog.text


@pytest.mark.parametrize("split", ["hard", "easy"])
@pytest.mark.parametrize("packed_type", ["float16", "float32"])
def test_validation_by_maps_is_validation_by_patches(options, split, packed_type):
    ready = set_up(options, split_dir=split, packed_type=packed_type)
    network, loader, device = like_trained(ready.model), ready.loaders["val"], ready.device
    maps, by_map = inference.sample_outputs(network, loader, device)
    for at_once in (2, 3, 99):
        together, order = inference.field_outputs(network, loader.dataset, device, "off", at_once)
        np.testing.assert_array_equal(order, by_map)
        np.testing.assert_allclose(together, maps, rtol=1e-4, atol=1e-5)
    patches, by_patch = inference.patch_outputs(network, loader, device)
    np.testing.assert_array_equal(np.sort(by_map), by_patch)
    np.testing.assert_allclose(maps[np.argsort(by_map)], patches, rtol=1e-4, atol=1e-5)


def test_loss_of_cutouts_is_the_weighted_loss_of_their_patches(options):
    """In evaluation mode, where batch statistics play no part."""
    ready = set_up(options, label_smoothing=0.1)
    model, batch = like_trained(ready.model), next(iter(ready.loaders["train"]))
    loss, booked = training.batch_loss(ready, batch)
    expected, hits = 0.0, 0.0
    for cutout, classes, weights in zip(batch.patches, batch.classes, batch.weights, strict=True):
        for y, x in np.argwhere(classes.numpy() >= 0):
            patch = cutout[None, :, :, y : y + 5, x : x + 5]
            logits = model(patch)[0].detach().double().log_softmax(0).numpy()
            smooth = np.full(6, 0.1 / 6)
            smooth[classes[y, x]] += 0.9
            expected -= float(weights[y, x]) * (smooth @ logits)
            hits += float(weights[y, x]) * (logits.argmax() == classes[y, x])
    assert loss.item() == pytest.approx(expected / len(batch.patches), rel=1e-5)
    sums = [expected, hits, float(batch.weights.sum()), float((batch.classes >= 0).sum())]
    np.testing.assert_allclose(booked.numpy(), sums, rtol=1e-5)


SCALES = {
    "global": ("BPT", 3),
    "spatial": ("logOH", 6),
    "spectral": ("logOH", 8),
    "PCA": ("BPT", 3),
}


@pytest.mark.parametrize("norm", SCALES)
def test_every_task_scale_and_norm_trains(options, norm):
    task, n_classes = SCALES[norm]
    spec = {"label_task": task, "patch_norm": norm, "n_classes": max(n_classes, 6)}
    assert train(options, **spec, epochs=1, samples_per_epoch=128, balance=False) == 0
    model = inference.load_model(options["run_dir"], "cpu")
    assert model.network.config.n_classes == n_classes
    assert np.isfinite(numbers_of(options["run_dir"]).to_numpy()).all()


@pytest.mark.parametrize(("amp", "cutout"), [("bf16", 1), ("fp16", 1), ("fp16", 5)])
def test_mixed_precision_learns_and_resumes(options, amp, cutout):
    options = {**options, "amp": amp, "schedule": "constant", "cutout": cutout}
    assert train(options, epochs=2) == 0
    assert train(options, epochs=3, resume="auto") == 0
    assert numbers_of(options["run_dir"])["train_loss"].is_monotonic_decreasing
    assert next(iter(weights_of(options["run_dir"]).values())).dtype == torch.float32


@pytest.mark.parametrize("cutout", [1, 5])
def test_network_learns_to_beat_the_majority_class(options, cutout):
    options = {**options, "patch_norm": "spectral", "cutout": cutout, "patience": 0}
    assert train(options, epochs=12, baselines=True) == 0
    card = run_folder.ModelCard.read(options["run_dir"])
    assert card.best["val_accuracy"] > card.baselines["val_majority_accuracy"] + 0.25
    assert card.baselines["val_spectrum_only_accuracy"] > 0.5


def test_loss_that_is_not_finite_stops_the_run_within_the_epoch_and_names_its_files(
    options, monkeypatch
):
    monkeypatch.setattr(training, "CHECK_STEPS", 3)
    at_step(monkeypatch, 4, crashes)  # which it must not come to
    with pytest.raises(DataError, match=r"in epoch 1, .*Lower --lr \(1e\+25\)") as caught:
        train(options, lr=1e25, balance=False, augment=False, cutout=1)
    saved = json_of(options["run_dir"], "nan_batch.json")
    samples = set_up(options, cutout=1).loaders["train"].dataset.samples
    assert len(saved["rows"]) == 64
    assert saved["spaxels"] == samples.spaxel_names(saved["rows"])
    plateifus = {samples.plateifus[samples.galaxy[row]] for row in saved["rows"]}
    paths = [str(utils.cube_path(options["data_dir"], p)) for p in plateifus]
    assert any(path in str(caught.value) for path in paths)
    assert not (options["run_dir"] / "last.pt").exists()


def test_training_stops_early_when_nothing_gets_better(options):
    options = {**options, "epochs": 30, "lr": 0.0, "patience": 2, "dropout": 0.0, "monitor": "loss"}
    assert train(options, cutout=1) == 0
    rows = numbers_of(options["run_dir"])  # batch norms settle for some epochs, weights never move
    best = json_of(options["run_dir"])["best"]["epoch"]
    assert len(rows) == best + 2 < 30
    assert rows["val_loss"].idxmin() == best - 1


def test_cosine_falls_from_the_peak_and_constant_stays():
    share = script.learning_rate(training.OptimisationOptions(epochs=10), 5)
    steps = (0, 25, 50, 99)
    expected = [1, (1 + script.FINAL_LR) / 2, script.FINAL_LR, script.FINAL_LR]
    assert [share(step) for step in steps] == pytest.approx(expected)
    constant = training.OptimisationOptions(epochs=10, schedule="constant")
    assert script.learning_rate(constant, 5)(40) == 1


def test_projection_starts_as_whitened_principal_components(options, monkeypatch):
    ready = set_up(options, patch_norm="spectral", projection=5, cutout=1)
    dataset = ready.loaders["train"].dataset
    spectra = torch.from_numpy(dataset.centres(np.arange(len(dataset))))
    with torch.inference_mode():
        values = ready.model.projection(spectra[:, :, None, None])[..., 0, 0].numpy()
    np.testing.assert_allclose(values.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(np.cov(values.T), np.eye(5), atol=1e-3)
    monkeypatch.setattr(baselines.sample_spectra, "__defaults__", (5,))
    with pytest.raises(DataError, match=r"--projection 5: .* than the 5 training samples"):
        set_up(options, patch_norm="spectral", projection=5)


@pytest.mark.parametrize("n_classes", [1, 2, 3])
def test_spectrum_baseline_is_sklearns_logistic_regression(n_classes):
    rng = np.random.default_rng(0)
    spectra = rng.normal(size=(400, 12)).astype(np.float32) * np.arange(1, 13)
    classes = np.digitize(spectra[:, 0] + spectra[:, 3] / 4, [-1, 0.5, 9][: n_classes - 1])

    class Spectra:
        spec, samples = PatchSpec("BPT"), SimpleNamespace(classes=classes)

        def __len__(self):
            return len(spectra)

        def centres(self, rows):
            return spectra[rows]

    weights = baselines.fit(Spectra(), 0, None, learns_dex=False)
    ours = baselines.apply(weights, spectra, Spectra.spec, None).classes
    if n_classes == 1:
        assert (ours == 0).all()
        return
    whitened = PCA(12, random_state=0, whiten=True).fit_transform(spectra.astype(float))
    regression = LogisticRegression(max_iter=300).fit(whitened, classes)
    np.testing.assert_array_equal(ours, regression.predict(whitened))


def test_compiling_reaches_what_training_calls(options, monkeypatch):
    seen = []

    def compile_(function, dynamic):
        assert not dynamic
        return lambda *args: (seen.append(function.__name__), function(*args))[1]

    monkeypatch.setattr(torch, "compile", compile_)
    options = {**options, "epochs": 1, "samples_per_epoch": 64 * 3, "compile": True}
    assert train(options, cutout=1) == 0
    assert seen == ["forward"] * 3
    assert train(options, overwrite=True) == 0
    assert set(seen[3:]) == {"cutout_outputs"}
    assert inference.load_model(options["run_dir"], "cpu").network.config.n_classes == 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("cutout", [1, 5])
def test_a_gpu_trains_stops_and_takes_over_from_a_cpu(options, monkeypatch, cutout):
    options = {**options, "cutout": cutout, "amp": "bf16"}
    assert train(options, epochs=1) == 0
    on_gpu = {**options, "device": "cuda", "resume": "auto", "epochs": 3}
    with monkeypatch.context() as patch:
        at_step(patch, 3, sends(signal.SIGUSR1))
        assert train(on_gpu) == utils.EXIT_AGAIN
    assert train(on_gpu) == 0
    losses = numbers_of(options["run_dir"])["train_loss"]
    assert len(losses) == 3
    assert losses.iloc[-1] < losses.iloc[0]


def test_class_values_are_means_of_training_labels_or_middles_of_classes_without_any():
    labels, classes = np.array([8.41, 8.43, 8.7], np.float32), np.array([2, 2, 5])
    expected = class_middles(6)
    expected[[2, 5]] = [8.42, 8.7]
    found = script.class_values(labels, classes, PatchSpec("logOH"))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert script.class_values(labels, classes, PatchSpec("BPT")) is None


@pytest.mark.parametrize("network", ["ssftt", "matched_filters"])
def test_a_run_that_diverges_is_never_a_best_model(options, network):
    with pytest.raises(DataError, match=r"not finite|expected a finite number.*--lr"):
        train(options, network=network, lr=1e30, cutout=7, epochs=3)
    if network == "matched_filters":  # their start is a model
        assert inference.load_model(options["run_dir"], "cpu").card.best["epoch"] == 0
        return
    with pytest.raises(DataError):
        inference.load_model(options["run_dir"], "cpu")


@pytest.mark.parametrize(("margin", "kept"), [(0.05, 0), (-0.05, 1)])
def test_training_that_improves_on_the_start_by_less_than_the_margin_is_not_kept(
    options, monkeypatch, margin, kept
):
    monkeypatch.setattr(training, "START_MARGIN", margin)
    train(options, network="matched_filters", lr=1e-7, cutout=7, epochs=1)
    assert json_of(options["run_dir"])["best"]["epoch"] == kept


def test_weights_that_are_not_finite_are_no_model(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    weights, about = run_folder.read_tensors(run / "best.safetensors")
    weights["head.weight"][0, 0] = float("nan")
    run_folder.write_tensors(run / "best.safetensors", weights, about)
    with pytest.raises(DataError, match=r"head\.weight holds values that are not finite"):
        inference.load_model(run, "cpu")
