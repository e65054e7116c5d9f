from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mock_cubes
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import data_fns
import data_io
import eval_fns
import run_SSFTT_training as training
import utils
from labels import class_names
from run_SSFTT_training import TrainConfig
from utils import DataError

REPO = Path(training.__file__).parent
SCRIPT = REPO / "run_SSFTT_training.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return mock_cubes.make_data_dir(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(root, tmp_path):
    return TrainConfig(
        data_dir=root,
        run_dir=tmp_path / "run",
        split_dir="hard",
        patch_norm="PCA",
        patch_size=5,
        epochs=4,
        batch_size=64,
        augment=True,
        baselines=False,
        device="cpu",
    )


def weights_of(run_dir):
    return training.read_checkpoint(run_dir)["model"]


def numbers_of(run_dir):
    """Rows of metrics.csv without the clock's columns."""
    table = pd.read_csv(run_dir / "metrics.csv")
    return table.drop(columns=["seconds", "spaxels_per_s"])


def assert_same_run(one, other):
    for name, tensor in weights_of(one).items():
        assert torch.equal(tensor, weights_of(other)[name]), name
    pd.testing.assert_frame_equal(numbers_of(one), numbers_of(other), check_exact=True)
    best = [load_file(d / "best.safetensors") for d in (one, other)]
    assert all(torch.equal(best[0][k], best[1][k]) for k in best[0])
    about = [json.loads((d / "model.json").read_text()) for d in (one, other)]
    assert about[0]["best"]["epoch"] == about[1]["best"]["epoch"]


def test_four_epochs_equal_two_and_two(any_config, tmp_path):
    config = replace(any_config, schedule="constant")
    assert training.main(config) == 0
    parted = replace(config, run_dir=tmp_path / "parted", resume="auto")
    assert training.main(replace(parted, epochs=2)) == 0
    assert training.main(parted) == 0
    assert_same_run(config.run_dir, parted.run_dir)


@pytest.fixture(params=["patches", "cutouts", "cutouts in half precision"])
def any_config(config, request):
    if request.param == "patches":
        return config
    amp = "bf16" if "half" in request.param else "off"
    return replace(config, source="packed", cutout=5, amp=amp)


def stop_after(monkeypatch, n_steps, number=signal.SIGUSR1):
    """Send ourselves a signal during the n-th training step."""
    real, seen = training.F.cross_entropy, []

    def cross_entropy(*args, **options):
        if args[0].requires_grad:
            seen.append(1)
            if len(seen) == n_steps:
                os.kill(os.getpid(), number)
        return real(*args, **options)

    monkeypatch.setattr(training.F, "cross_entropy", cross_entropy)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_run_stopped_by_a_signal_resumes_bit_for_bit(any_config, tmp_path, monkeypatch, number):
    config = any_config
    assert training.main(config) == 0
    stopped = replace(config, run_dir=tmp_path / "stopped", resume="auto")
    steps = training.read_checkpoint(config.run_dir)["scheduler"]["last_epoch"] // 4
    assert steps > 3
    with monkeypatch.context() as patch:
        stop_after(patch, steps + 2, number)  # the second step of the second epoch
        assert training.main(stopped) == utils.EXIT_AGAIN
    saved = training.read_checkpoint(stopped.run_dir)
    assert (saved["progress"]["epoch"], saved["progress"]["step"]) == (1, 2)
    assert training.main(stopped) == 0
    assert_same_run(config.run_dir, stopped.run_dir)
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    assert signal.getsignal(number) is usual


def test_second_interrupt_ends_a_run_at_once(config, monkeypatch):
    stop_after(monkeypatch, 2, signal.SIGINT)
    real = training.batch_loss

    def interrupted(*args):
        found = real(*args)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # the first was heard
            os.kill(os.getpid(), signal.SIGINT)
        return found

    monkeypatch.setattr(training, "batch_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.main(config)


def test_signal_in_the_last_epochs_last_step_counts_as_finished(config, monkeypatch):
    config = replace(config, epochs=1, samples_per_epoch=64 * 3)
    stop_after(monkeypatch, 3)
    assert training.main(config) == utils.EXIT_AGAIN  # its validation is still to be done
    assert training.main(replace(config, resume="auto")) == 0
    assert len(numbers_of(config.run_dir)) == 1


def test_finished_run_is_left_alone(config):
    config = replace(config, epochs=1)
    training.main(config)
    before = {p.name: p.stat().st_mtime_ns for p in config.run_dir.iterdir() if p.name != "log.txt"}
    assert training.main(replace(config, resume="auto")) == 0
    after = {p.name: p.stat().st_mtime_ns for p in config.run_dir.iterdir() if p.name != "log.txt"}
    assert before == after


def test_process_stops_on_a_signal_and_goes_on(root, tmp_path):
    words = [
        sys.executable, str(SCRIPT), "--data-dir", str(root), "--run-dir", str(tmp_path / "run"),
        "--split-dir", "hard", "--patch-norm", "PCA", "--epochs", "400",
        "--samples-per-epoch", "64", "--resume", "auto", "--no-baselines", "--batch-size", "32",
    ]  # fmt: skip
    process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.csv"
    deadline = time.monotonic() + 60
    while not metrics.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    _, log = process.communicate(timeout=60)
    assert process.returncode == utils.EXIT_AGAIN, log
    done = len(numbers_of(tmp_path / "run"))
    assert done < 400
    again = subprocess.run(
        [*words, "--epochs", str(done + 1)], cwd=tmp_path, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert len(numbers_of(tmp_path / "run")) == done + 1


def test_resuming_with_other_options_is_refused(config):
    training.main(replace(config, epochs=1))
    with pytest.raises(DataError, match="another dropout, lr"):
        training.main(replace(config, resume="auto", lr=0.5, dropout=0.3))


def test_resuming_with_another_split_is_refused(config, root, tmp_path):
    """Else a run would learn from the galaxies that it is tested on."""
    config = replace(config, data_dir=shutil.copytree(root, tmp_path / "data"), epochs=1)
    training.main(config)
    more = replace(config, epochs=2, resume="auto")
    split = utils.split_path(config.data_dir, "hard")
    for one, other in (("train", "swap"), ("test", "train"), ("swap", "test")):
        (split / f"{one}.csv").rename(split / f"{other}.csv")
    before = weights_of(config.run_dir)
    with pytest.raises(DataError, match=r"made anew since .* \(train, test differ\)"):
        training.main(more)
    assert all(torch.equal(tensor, before[k]) for k, tensor in weights_of(config.run_dir).items())


def test_resuming_with_other_statistics_is_refused(config, root, tmp_path):
    config = replace(config, data_dir=shutil.copytree(root, tmp_path / "data"), epochs=1)
    training.main(config)
    path = utils.stats_path(config.data_dir, "hard")
    stats = data_io.read_stats(path)
    data_io.write_stats(path, replace(stats, components=stats.components[::-1]))
    with pytest.raises(DataError, match=r"made anew since .* \(statistics differ\)"):
        training.main(replace(config, epochs=2, resume="auto"))


def test_resuming_with_other_labels_is_refused(config, root, tmp_path):
    config = replace(config, data_dir=shutil.copytree(root, tmp_path / "data"), epochs=1)
    training.main(config)
    for path in (config.data_dir / "processed" / "labels" / "logOH").glob("*.npy"):
        np.save(path, np.load(path) + np.float32(0.01))
    with pytest.raises(DataError, match="training labels are not those"):
        training.main(replace(config, epochs=2, resume="auto"))


def test_statistics_of_another_split_are_refused(config, root, tmp_path):
    config = replace(config, data_dir=shutil.copytree(root, tmp_path / "data"))
    path = utils.stats_path(config.data_dir, "hard")
    stats = data_io.read_stats(path)
    train = data_io.read_split(path.parent)[0]["train"]["plateifu"].tolist()
    for plateifus in (train, [*train[1:], "1-100"]):
        made = {"config_json": json.dumps({"plateifus": sorted(plateifus)})}
        data_io.write_stats(path, replace(stats, attrs=made))
        if plateifus == train:
            training.set_up(config, config.run_dir)
    with pytest.raises(DataError, match=r"stats\.h5: of other galaxies .*calc_data_stats"):
        training.main(config)


def test_labels_of_several_calibrations_are_refused(config, root, tmp_path):
    config = replace(config, data_dir=shutil.copytree(root, tmp_path / "data"))
    names = data_io.read_split(utils.split_path(root, "hard"))[0]["train"]["plateifu"].tolist()
    for plateifu in names:
        path = utils.label_path(config.data_dir, "logOH", plateifu)
        options = {"diagnostic": "N2-M13" if plateifu == names[1] else "O3N2-M13", "min_snr": 3}
        utils.write_json(path.with_suffix(".json"), {"options": options})
    with pytest.raises(DataError, match=f"{names[1]}: .*diagnostic=N2-M13, those of {names[0]}"):
        training.main(config)
    for plateifu in names:
        path = utils.label_path(config.data_dir, "logOH", plateifu).with_suffix(".json")
        utils.write_json(path, {"options": {"diagnostic": "N2-M13", "min_snr": 3}})
    val = data_io.read_split(utils.split_path(root, "hard"))[0]["val"]["plateifu"][0]
    path = utils.label_path(config.data_dir, "logOH", val).with_suffix(".json")
    utils.write_json(path, {"options": {"diagnostic": "N2-M13", "min_snr": 5}})
    with pytest.raises(DataError, match=r"val part: .*min_snr=5, those of the train part"):
        training.main(config)


def test_resuming_with_cubes_made_otherwise_is_refused(config, root, tmp_path):
    data = shutil.copytree(root, tmp_path / "data")
    config = replace(config, data_dir=data, patch_norm="spectral", epochs=1)
    training.main(config)
    for path in (data / "processed" / "cubes").glob("*/*.h5"):
        cube = data_io.read_cube(path)
        cube.attrs["config_json"] = json.dumps({"deredden": True, "remove_gas_velocity": False})
        data_io.write_cube(path, cube)
    with pytest.raises(DataError, match="remove_gas_velocity=False, those that the run began with"):
        training.main(replace(config, epochs=2, resume="auto"))


def test_few_labels_of_a_split_are_warned_of(config, root, tmp_path, caplog):
    data = shutil.copytree(root, tmp_path / "data")
    parts, meta = data_io.read_split(utils.split_path(data, "hard"))
    parts = {k: t.assign(n_labelled=1000) for k, t in parts.items()}
    data_io.write_split(utils.split_path(data, "hard"), parts, meta)
    training.set_up(replace(config, data_dir=data), config.run_dir)
    assert "the split counts 4000 labelled: were the labels made anew?" in caplog.text


def test_a_class_that_never_occurs_is_warned_of(config, caplog):
    path = utils.split_path(config.data_dir, "hard")
    assert path.is_dir()
    samples = training.set_up(config, config.run_dir)
    classes = training._dataset(samples.loaders["train"]).samples.classes
    classes[classes == 2] = 1
    training.describe_data(samples)
    assert f"no training spaxel is {config.spec.class_names[2]}" in caplog.text


def test_a_run_is_replaced_only_once_its_successor_has_its_data(config, root, tmp_path):
    config = replace(config, data_dir=shutil.copytree(root, tmp_path / "data"), epochs=1)
    training.main(config)
    before = (config.run_dir / "last.pt").read_bytes()
    utils.stats_path(config.data_dir, "hard").unlink()
    with pytest.raises(DataError, match=r"stats\.h5: no such file"):
        training.main(replace(config, overwrite=True))
    assert (config.run_dir / "last.pt").read_bytes() == before


def test_a_run_stopped_while_it_starts_can_be_started_again(config, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "copy_file", stopped)
        with pytest.raises(KeyboardInterrupt):
            training.main(replace(config, epochs=1))
    assert training.main(replace(config, epochs=1, resume="auto")) == 0


def test_runs_of_older_versions_resume(config):
    """They know nothing of options, or facts of the labels, that came later."""
    training.main(replace(config, epochs=1))
    path = config.run_dir / "last.pt"
    saved = torch.load(path, weights_only=True)
    del saved["config"]["compile"]
    torch.save(saved, path)
    about = json.loads((config.run_dir / "model.json").read_text())
    del about["training_labels"]["options"]
    utils.write_json(config.run_dir / "model.json", about)
    assert training.main(replace(config, epochs=2, resume="auto")) == 0


def test_a_folder_of_other_making_is_left_alone(config):
    """A folder test/ of somebody's, or another program's config.json."""
    thesis = config.run_dir / "test" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("three years of work")
    (config.run_dir / "config.json").write_text('{"editor": "vi"}')
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"holds config\.json, test, but no run"):
            training.main(replace(config, overwrite=overwrite))
    assert thesis.read_text() == "three years of work"


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"dropout": 2.0},
        {"label_smoothing": 3.0},
        {"seed": -1},
        {"patch_size": 0},
        {"epochs": 0},
        {"cutout": 4},
        {"batch_size": 0},
    ],
)
def test_impossible_numbers_are_refused_before_anything_is_written(config, wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(DataError, match=f"--{name.replace('_', '-')} {value}: out of range"):
        training.main(replace(config, **wrong))
    assert not config.run_dir.exists()


def test_others_may_read_the_weights(config):
    mask = os.umask(0o022)
    try:
        training.main(replace(config, epochs=1, baselines=True))
    finally:
        os.umask(mask)
    for name in ("best.safetensors", "baseline.safetensors", "model.json"):
        assert (config.run_dir / name).stat().st_mode & 0o777 == 0o644


def test_two_processes_do_not_train_in_one_folder(config):
    config.run_dir.mkdir(parents=True)
    code = (
        f"import sys; sys.path.insert(0, {str(Path(training.__file__).parent)!r})\n"
        "import utils, time\nfrom pathlib import Path\n"
        f"with utils.locked(Path({str(config.run_dir)!r}), 'x'):\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(DataError, match="another process trains here"):
            training.main(config)
        assert not list(config.run_dir.iterdir())
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    assert training.main(replace(config, epochs=1)) == 0


def test_options_that_may_change_are_written_when_a_run_goes_on(config):
    def epochs_in_config():
        return json.loads((config.run_dir / "config.json").read_text())["epochs"]

    assert training.main(replace(config, epochs=2)) == 0
    assert training.main(replace(config, epochs=3, resume="auto")) == 0
    assert epochs_in_config() == 3


def test_fewer_epochs_than_a_run_has_are_told(config):
    assert training.main(replace(config, epochs=2)) == 0
    assert training.main(replace(config, epochs=1, resume="auto")) == 0
    log = (config.run_dir / "log.txt").read_text()
    assert "has 2 epochs already, more than --epochs 1" in log
    assert len(pd.read_csv(config.run_dir / "metrics.csv")) == 2


def test_labels_on_another_scale_than_the_classes_are_refused(config, root, tmp_path):
    root = shutil.copytree(root, tmp_path / "data")
    for path in (root / "processed" / "labels" / "logOH").glob("*[0-9].npy"):
        utils.write_json(path.with_suffix(".json"), {"options": {"diagnostic": "N2O2-KD02"}})
    with pytest.raises(DataError, match=r"labels by N2O2-KD02; .*--diagnostic O3N2-M13"):
        training.main(replace(config, data_dir=root))


def test_compiling_reaches_what_training_calls(config, monkeypatch):
    seen = []

    def compile_(function, dynamic):
        assert not dynamic

        def compiled(*args):
            seen.append(function.__name__)
            return function(*args)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    config = replace(config, epochs=1, samples_per_epoch=64 * 3, compile=True)
    assert training.main(config) == 0
    steps = len(seen)
    assert steps == seen.count("forward") == 3
    assert training.main(replace(config, source="packed", cutout=5, overwrite=True)) == 0
    assert seen[steps:].count("cutout_logits") == len(seen) - steps > 0
    assert eval_fns.load_model(config.run_dir, "cpu").network.config.n_classes == 6


@pytest.mark.gpu
@pytest.mark.parametrize("cutout", [1, 5])
def test_a_gpu_trains_stops_and_takes_over_from_a_cpu(config, monkeypatch, cutout):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    config = replace(config, source="packed", cutout=cutout, amp="bf16", epochs=1)
    assert training.main(config) == 0
    on_gpu = replace(config, device="cuda", resume="auto", epochs=3)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert training.main(on_gpu) == utils.EXIT_AGAIN
    assert training.main(on_gpu) == 0
    numbers = numbers_of(config.run_dir)
    assert len(numbers) == 3
    assert numbers["train_loss"].iloc[-1] < numbers["train_loss"].iloc[0]


def test_run_folder_is_never_overwritten_silently(config):
    config = replace(config, epochs=1)
    training.main(config)
    with pytest.raises(DataError, match="--overwrite"):
        training.main(config)
    (config.run_dir / "test").mkdir()
    assert training.main(replace(config, overwrite=True)) == 0
    assert not (config.run_dir / "test").exists()  # results of the model that is gone


def test_resume_without_a_run_dir_finds_the_newest_run_of_the_same_options(
    config, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = replace(config, run_dir=None, epochs=1)
    training.main(config)
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.endswith("_logOH_PCA")
    assert training.choose_run_dir(replace(config, resume="auto")) == (
        Path("runs") / run.name,
        True,
    )
    other = Path("runs") / "z_started_earlier"  # a name says nothing of the time
    shutil.copytree(run, other)
    os.utime(other / "last.pt", (1, 1))
    assert training.choose_run_dir(replace(config, resume="auto"))[0] == Path("runs") / run.name
    found, resuming = training.choose_run_dir(replace(config, resume="auto", seed=5))
    assert not resuming
    assert found.parent == Path("runs")


def test_saved_config_repeats_the_run(config, tmp_path):
    config = replace(config, epochs=1, bands=(0, 5), monitor="loss", weight_decay=0.01)
    training.main(config)
    words = ["--config", str(config.run_dir / "config.json"), "--run-dir", str(tmp_path / "again")]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    saved = [
        json.loads((d / "config.json").read_text()) for d in (config.run_dir, tmp_path / "again")
    ]
    assert saved[0] == saved[1]
    assert saved[0]["run_dir"] is None  # else a copy would replace the run it was copied from
    assert_same_run(config.run_dir, tmp_path / "again")


def test_files_cubes_and_packed_cubes_train_the_same_weights(config, root, tmp_path):
    config = replace(config, epochs=2)
    mock_cubes.write_patch_files(root, "logOH", "PCA", size=5)
    training.main(config)
    for source in ("patches", "packed"):
        other = replace(
            config, source=source, packed_type="float32", run_dir=tmp_path / f"from {source}"
        )
        training.main(other)
        ours, theirs = weights_of(config.run_dir), weights_of(other.run_dir)
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
        # cubes are validated a map at a time, files patch by patch: equal but for rounding
        pd.testing.assert_frame_equal(
            numbers_of(config.run_dir), numbers_of(other.run_dir), rtol=1e-5
        )


@pytest.mark.parametrize("split", ["hard", "easy"])
@pytest.mark.parametrize("source", ["cubes", "packed"])
def test_validation_by_maps_is_validation_by_patches(config, source, split):
    config = replace(config, epochs=1, source=source, split_dir=split)
    training.main(config)
    prepared = training.set_up(config, config.run_dir)
    training.restore(prepared)
    loader, device = prepared.loaders["val"], prepared.device
    maps, by_map = training.predict_fields(prepared.model, loader, device, "off")
    for at_once in (2, 3, 99):
        together, order = training.predict_fields(prepared.model, loader, device, "off", at_once)
        np.testing.assert_array_equal(order, by_map)
        np.testing.assert_allclose(together, maps, atol=1e-5)
    patches, by_patch = eval_fns.predict_logits(prepared.model, loader, device, "off")
    np.testing.assert_array_equal(np.sort(by_map), by_patch)
    np.testing.assert_allclose(maps[np.argsort(by_map)], patches, rtol=1e-4, atol=1e-5)


def test_loss_of_cutouts_is_the_weighted_loss_of_their_patches(config):
    """In evaluation mode, where batch statistics play no part."""
    config = replace(config, epochs=1, source="packed", cutout=5, packed_type="float32")
    training.main(config)
    prepared = training.set_up(config, config.run_dir)
    model = prepared.model.eval()
    batch = next(iter(prepared.loaders["train"]))
    loss, booked = training.batch_loss(model, batch, prepared.device, label_smoothing=0.1)
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


@pytest.mark.parametrize("norm", utils.PATCH_NORMS)
@pytest.mark.parametrize(("task", "n_classes"), [("BPT", 6), ("logOH", 6), ("logOH", 8)])
def test_every_task_scale_and_norm_trains(config, task, n_classes, norm):
    config = replace(
        config, label_task=task, n_classes=n_classes, patch_norm=norm, epochs=1, balance=False
    )
    assert training.main(config) == 0
    model = eval_fns.load_model(config.run_dir)
    assert model.network.config.n_classes == (3 if task == "BPT" else n_classes)
    assert np.isfinite(numbers_of(config.run_dir).to_numpy()).all()


@pytest.mark.parametrize("cutout", [1, 5])
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_learns_and_resumes(config, amp, cutout):
    config = replace(config, epochs=2, amp=amp, schedule="constant", source="packed", cutout=cutout)
    assert training.main(config) == 0
    assert training.main(replace(config, resume="auto", epochs=3)) == 0
    losses = numbers_of(config.run_dir)["train_loss"]
    assert losses.is_monotonic_decreasing
    assert next(iter(weights_of(config.run_dir).values())).dtype == torch.float32


@pytest.mark.parametrize("cutout", [1, 5])
def test_network_learns_to_beat_the_majority_class(config, cutout):
    config = replace(
        config, patch_norm="spectral", epochs=12, baselines=True, source="packed", cutout=cutout
    )
    training.main(config)
    about = json.loads((config.run_dir / "model.json").read_text())
    assert about["best"]["val_accuracy"] > about["baselines"]["val_majority_accuracy"] + 0.25
    assert about["baselines"]["val_spectrum_accuracy"] > 0.5


def test_loss_that_is_no_number_is_met_within_the_epoch(config, monkeypatch):
    monkeypatch.setattr(training, "CHECK_STEPS", 3)
    with pytest.raises(DataError, match="in epoch 1"):
        training.main(replace(config, lr=1e25, source="packed", cutout=5, batch_size=32))


def test_loss_that_is_no_number_stops_the_run_and_names_the_files(config, root):
    config = replace(config, lr=1e25, balance=False, augment=False)
    with pytest.raises(DataError) as caught:
        training.main(config)
    saved = json.loads((config.run_dir / "nan_batch.json").read_text())
    samples = data_fns.get_dataloaders(root, "hard", config.spec)["train"].dataset.samples
    assert len(saved["rows"]) == 64
    assert saved["spaxels"] == samples.describe(saved["rows"])
    plateifus = {samples.plateifus[samples.galaxy[row]] for row in saved["rows"]}
    assert any(str(utils.cube_path(root, p)) in str(caught.value) for p in plateifus)
    assert "Lower --lr" in str(caught.value)
    assert not (config.run_dir / "last.pt").exists()


def test_training_stops_early_when_nothing_gets_better(config):
    config = replace(config, epochs=30, lr=0.0, patience=2, dropout=0.0, monitor="loss")
    assert training.main(config) == 0
    rows = numbers_of(config.run_dir)  # batch norms settle for some epochs, weights never move
    best = json.loads((config.run_dir / "model.json").read_text())["best"]["epoch"]
    assert len(rows) == best + 2 < 30
    assert rows["val_loss"].idxmin() == best - 1


def test_cosine_falls_from_the_peak_and_constant_stays():
    share = training.learning_rate(TrainConfig(epochs=10), 5)
    assert share(0) == 1
    assert share(25) == pytest.approx((1 + training.FINAL_LR) / 2)
    assert share(50) == pytest.approx(training.FINAL_LR)
    assert training.learning_rate(TrainConfig(schedule="constant"), 5)(40) == 1


def test_projection_starts_as_whitened_principal_components(config, tmp_path):
    config = replace(config, patch_norm="spectral", projection=5)
    model = training.set_up(config, tmp_path).model
    loader = training.set_up(config, tmp_path).loaders["train"]
    spectra = loader.dataset.centres(np.arange(len(loader.dataset)))
    with torch.inference_mode():
        values = model.projection(torch.from_numpy(spectra)[:, :, None, None])[..., 0, 0].numpy()
    np.testing.assert_allclose(values.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(np.cov(values.T), np.eye(5), atol=1e-3)
    model.config = replace(model.config, bands=len(spectra), projection=len(spectra))
    with pytest.raises(DataError, match="training samples"):
        training.start_projection(model, loader.dataset, 0)


def test_a_batch_of_one_patch_is_refused(config):
    with pytest.raises(DataError, match="--batch-size"):
        training.main(replace(config, batch_size=1))


@pytest.mark.parametrize("n_classes", [1, 2, 3])
def test_spectrum_baseline_is_sklearns_logistic_regression(n_classes):
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    spectra = rng.normal(size=(400, 12)).astype(np.float32) * np.arange(1, 13)
    classes = np.digitize(spectra[:, 0] + spectra[:, 3] / 4, [-1, 0.5, 9][: n_classes - 1])

    class Spectra:
        spec = data_fns.PatchSpec("BPT")
        samples = type("Samples", (), {"classes": classes})

        def __len__(self):
            return len(spectra)

        def centres(self, rows):
            return spectra[rows]

    weights = training.fit_spectrum_baseline(Spectra(), seed=0)
    ours = eval_fns.baseline_logits(weights, spectra).argmax(1)
    if n_classes == 1:
        assert (ours == 0).all()
        return
    pca = PCA(12, random_state=0, whiten=True).fit(spectra.astype(float))
    regression = LogisticRegression(max_iter=300).fit(pca.transform(spectra), classes)
    np.testing.assert_array_equal(ours, regression.predict(pca.transform(spectra)))


def test_run_folder_says_where_it_came_from(config):
    training.main(replace(config, epochs=1))
    names = {p.name for p in config.run_dir.iterdir()}
    assert names == {
        "config.json", "environment.json", "split", "log.txt", "metrics.csv", "last.pt",
        "model.json", "best.safetensors", "stats.h5",
    }  # fmt: skip
    environment = json.loads((config.run_dir / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    about = json.loads((config.run_dir / "model.json").read_text())
    assert about["class_names"] == list(class_names("logOH", 6))
    assert about["cubes"]["n_bands"] == mock_cubes.N_BAND
    log = (config.run_dir / "log.txt").read_text()
    for words in (
        "torch",
        "device cpu",
        "train: 4 observations",
        "val: 2 observations",
        "parameters",
    ):
        assert words in log


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--lrr", "1"], 2, "--lrr"),
        (["--patch-norm", "none"], 2, "patch-norm"),
        (["--data-dir", "nowhere"], 1, "create_data_splits.py"),
        (["--config", "nowhere.json"], 2, "nowhere.json"),
        (["--device", "cuda"], 1, "finds no GPU"),
    ],
)
def test_wrong_usage_ends_in_one_line_and_the_right_code(root, tmp_path, words, code, message):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    if "--data-dir" not in words:
        words = ["--data-dir", str(root), "--split-dir", "hard", *words]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "path", sorted((REPO / "configs").glob("train_*.json")), ids=lambda p: p.stem
)
def test_named_configs_are_flags_of_the_script(path):
    import tyro

    config = tyro.cli(TrainConfig, args=utils.with_config_file(["--config", str(path)]))
    saved = json.loads(path.read_text())
    assert {k: utils.config_dict(config)[k] for k in saved} == saved
    assert config.split == f"hard_{config.label_task}"


def test_damaged_checkpoint_is_told_and_can_be_replaced(config):
    config = replace(config, epochs=1)
    training.main(config)
    (config.run_dir / "last.pt").write_bytes(b"half a file")
    with pytest.raises(DataError, match=r"last\.pt: no readable checkpoint"):
        training.main(replace(config, resume="auto"))
    assert training.main(replace(config, overwrite=True)) == 0


def test_split_of_the_run_outlives_the_data_folders(config, root, tmp_path):
    """A split made anew must not turn training galaxies into test galaxies."""
    data = shutil.copytree(root, tmp_path / "data")
    config = replace(config, data_dir=data, epochs=1)
    training.main(config)
    for name in ("train", "val", "test"):
        ours = config.run_dir / "split" / f"{name}.csv"
        assert ours.read_bytes() == utils.split_path(root, "hard", name).read_bytes()
