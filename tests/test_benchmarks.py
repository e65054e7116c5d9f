"""Benchmarks at tiny sizes: their arithmetic, their JSON, and that they run. No speed is tested."""

import functools
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import measuring
import utils

import bench_cta
import bench_loaders
import bench_network
import bench_process
import bench_storage
import compare_training
import h5py
import interval_coverage
import numpy as np
import pandas as pd
import pytest
import roofline
import run_all
import torch
from astropy.io import fits
from conftest import write_fits
from mock_cubes import cube_recipe, make_data_dir, write_patch_files
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

import data_io
import process_single_cube
import SSFTT_dense
from run_SSFTT_training import train_config

pytestmark = pytest.mark.slow

TINY = {"bands": 40, "patches": 4, "cutouts": 2, "cutout": 5, "map_size": 9}
TINY |= {"small_cutout": 3, "runs": 1}


def ratios(rows):
    """Ratio of each row by its name, after a check of the rows."""
    for row in rows:
        assert row["ours"] > 0
        assert row["ratio"] == pytest.approx(row["ours"] / row["baseline"])
        assert row["unit"]
        assert row["against"]
    found = {row["name"]: row["ratio"] for row in rows}
    assert len(found) == len(rows)
    return found


def network_bench(**changes):
    return bench_network.Bench.of(bench_network.Config(**{**TINY, **changes}))


# Measuring


def test_ways_run_in_turn_and_the_first_round_does_not_count(monkeypatch):
    calls, clock = [], iter([9, 9, 1, 10, 2, 30, 6, 20])  # rounds of a and b
    monkeypatch.setattr(measuring, "timed", lambda work: work() or next(clock))
    works = {name: functools.partial(calls.append, name) for name in "ab"}
    assert measuring.in_turn(works, runs=3) == {"a": 2, "b": 20}
    assert calls == ["a", "b"] * 4
    clock = iter([9, 9, 1, 10, 2, 30, 6, 20])
    counts = {"a": lambda: 6, "b": lambda: 10}
    assert measuring.rates_of(counts, runs=3) == {"a": 3, "b": 0.5}


def test_peak_memory_is_of_the_process_in_question_and_not_of_its_parent():
    held = np.ones(50_000_000)  # 400 MB, which rusage would count
    peak, added = measuring.peak_in_child(np.ones, 12_500_000)  # 100 MB
    assert 0.09 < added < 0.15
    assert peak > added
    child = "import time; x = bytearray(200_000_000); time.sleep(0.3)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    _, peaks = measuring.run_watched([sys.executable, "-c", parent])
    assert len(peaks) >= 2
    assert 0.2 <= max(peaks.values()) < 0.3
    assert held.size


def test_a_command_that_fails_is_reported_with_its_last_message():
    with pytest.raises(utils.DataError, match="code 3: no such thing"):
        measuring.run_watched(["sh", "-c", "echo no such thing >&2; exit 3"])


def test_rows_of_all_benchmarks_are_gathered(tmp_path):
    for name, ours in (("x", 1), ("y", 3)):
        row = measuring.make_row(name, ours, 2, "s", "b")
        measuring.write_rows(tmp_path / f"{name}.json", [row])
    found = run_all.gather(tmp_path, {"of x": "x.json", "of y": "y.json"})
    assert ratios(found) == {"x": 0.5, "y": 1.5}
    assert [row["benchmark"] for row in found] == ["of x", "of y"]
    with pytest.raises(utils.DataError, match="two rows are called x"):
        run_all.gather(tmp_path, {"of x": "x.json", "again": "x.json"})


def test_benchmarks_stay_on_their_cores(monkeypatch):
    before = os.sched_getaffinity(0)
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.setenv(name, "64")
    try:
        assert run_all.pin(1) == len(os.sched_getaffinity(0)) == utils.cpu_count() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_image_extractors_benchmark_needs_only_numpy_of_this_environment(tmp_path):
    program = (
        "import sys, bench_cta; bench_cta.measuring.write_rows(sys.argv[1], [])\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    words = [sys.executable, "-c", program, str(tmp_path / "x.json")]
    folder = Path(bench_cta.__file__).parent
    loaded = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert not {"torch", "h5py", "pandas", "scipy", "astropy", "tyro", "tqdm"} & set(loaded.split())
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["environment"]["packages"]["numpy"] == np.__version__


def test_ratios_are_ours_divided_by_the_baseline():
    sizes = {"ctapipe": 200, "eventio": 0, "mapped": 50, "all": 100}
    took = {name: bench_cta.Measured(s, 100 * s, sizes[name]) for s, name in enumerate(sizes, 1)}
    expected = {"vs_ctapipe_process": 1 / 3, "vs_decode_floor": 2 / 3, "peak_memory": 3}
    expected |= {"all_vs_ctapipe_process": 1 / 4, "bytes_vs_ctapipe": 1 / 4}
    rows = bench_cta.make_rows("x", took, n_events=10)
    assert ratios(rows) == pytest.approx({f"x_{name}": value for name, value in expected.items()})
    seconds = {"command": 5.0, "cube": 3.0, "igzip": 2.5, "discarding": 2.0, "plain": 10.0}
    expected = {"fits_to_h5_vs_igzip": 1.2, "fits_to_h5_vs_igzip_discarding": 1.5}
    expected |= {"fits_to_h5_vs_plain_script": 0.3, "plain_script_vs_igzip": 4}
    expected |= {"command_vs_igzip": 2, "command_peak_memory": 0.5}
    rows = bench_process.make_rows(seconds, {"command": 0.4, "plain": 0.8})
    assert ratios(rows) == pytest.approx(expected)


# Storage, FITS to H5


def test_extrapolation_weights_bundle_sizes_with_their_fractions():
    keys = ("seconds", "cpu_seconds", "h5_mb")
    found = {19: [(1.0, 2.0, 10.0), (3.0, 4.0, 30.0)], 127: [(8.0, 9.0, 50.0)]}
    found = {b: [dict(zip(keys, g, strict=True)) for g in of] for b, of in found.items()}
    out = bench_storage.extrapolate(found, {19: 0.3, 127: 0.1, 61: 0.6}, survey=3600)
    expected = {"hours": 0.75 * 2 + 0.25 * 8, "core_hours": 0.75 * 3 + 0.25 * 9}
    expected |= {"galaxies": 3600, "h5_gb": 3.6 * (0.75 * 20 + 0.25 * 50)}
    assert out == pytest.approx(expected)


def test_checksums_cost_what_reading_without_them_does_not(tmp_path):
    galaxy = "8485-1901"
    write_fits(utils.raw_dir(tmp_path, galaxy), galaxy)
    process_single_cube.process_galaxy(galaxy, tmp_path, process_single_cube.GalaxyOptions())
    rows = bench_storage.measure_checksums(tmp_path, galaxy, runs=1)
    assert set(ratios(rows)) == {"cube_checked", "flux_checked", "logcube_checked"}


def test_layouts_return_what_was_written_and_the_first_is_the_pipelines(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    flux = rng.normal(size=(9, 10, 40)).astype("f4")
    flux[:5, :5] = flux[7:] = np.nan
    ivar = np.where(np.isfinite(flux), rng.random(flux.shape, "f4"), 0)
    layouts = bench_storage.layouts(*flux.shape)
    path = tmp_path / "x.h5"
    table = [bench_storage.measure_layout(path, flux, ivar, x, runs=1) for x in layouts]
    assert table[-1]["chunk"] is None
    assert set(ratios(bench_storage.compare_layouts(table))) >= {"h5_size", "h5_read_whole"}
    data_io.write_cube(path, data_io.Cube(flux, np.arange(40.0), cube_recipe(), ivar))
    with h5py.File(path) as f:
        for dataset in (f["cube"], f["ivar"]):
            assert dataset.chunks == layouts[0].chunk
            assert (dataset.compression is None) == (not layouts[0].options)
    right = bench_storage.write_layout
    monkeypatch.setattr(bench_storage, "write_layout", lambda p, f, i, x: right(p, f * 2, i, x))
    with pytest.raises(utils.DataError, match="differ from those written"):
        bench_storage.measure_layout(path, flux, ivar, layouts[0], runs=1)


def test_igzip_decompresses_all_up_to_wave_and_keeps_what_is_needed(tmp_path):
    path = tmp_path / "cube.fits.gz"
    names = ("FLUX", "IVAR", "MASK", "LSF", "WAVE", "REDCORR")
    hdus = [fits.ImageHDU(np.full((7, 30, 30), i, ">f4"), name=n) for i, n in enumerate(names)]
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(path)
    spans = bench_process.array_spans(path)
    kept = bench_process.decompress(path, spans, keep=True)
    values = [np.frombuffer(k, ">f4", 6300) for k in kept]  # the rest is padding
    assert [set(v) for v in values] == [{0}, {1}, {2}, {4}]
    assert bench_process.decompress(path, spans, keep=False) == []
    with gzip.open(path) as f:
        assert f.read(sum(n for _, n in spans)).endswith(kept[-1])


# Loaders, training


def test_all_loaders_load_as_many_labelled_spaxels(tmp_path, monkeypatch):
    make_data_dir(tmp_path, n_band=24)
    write_patch_files(tmp_path, "logOH", "global", 7)
    monkeypatch.setattr(bench_loaders, "SPLIT", "hard")
    config = bench_loaders.Config(samples=64, batch_size=16)
    for options in ({"source": "patches"}, {"cutout": 1}):
        assert bench_loaders.one_pass(bench_loaders.make_loader(tmp_path, config, **options)) == 64
    loader = bench_loaders.make_loader(tmp_path, config, cutout=5)
    assert 32 < bench_loaders.one_pass(loader) < 128


def test_front_ends_are_options_of_training():
    for options in compare_training.FRONT_ENDS.values():
        train_config(**options)  # raises a TypeError for unknown ones


# The network


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """Result of what `make bench-gpu` does, on a CPU: bfloat16, several steps per timing."""
    results = tmp_path_factory.mktemp("results")
    config = bench_network.Config(**TINY, amp="bf16", steps=2, results=results)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CPUS_PER_TASK", "1")  # of torch's threads, also in later tests
        assert bench_network.main(config) == 0
    return json.loads((results / "bench_network_cpu.json").read_text())


def test_network_rows_cover_every_front_end(tiny_run):
    front_ends = {f"front_end_{v}" for v in bench_network.VARIANTS if v != "published"}
    names = {"dense_forward", "dense_training", "map_latency", "evidence"}
    names |= {"matched_filters_training", "matched_filters_training_vs_pca30"}
    assert set(ratios(tiny_run["rows"])) >= front_ends | names | {"training_memory"}
    assert [row["variant"] for row in tiny_run["roofline"]] == list(bench_network.VARIANTS)
    for row in tiny_run["roofline"]:
        at_ceilings = row["flops"] / row["ceiling_flops_per_s"]
        moved = row["bytes"] / row["ceiling_bytes_per_s"]
        assert row["bound_measured"] == pytest.approx(1 / max(at_ceilings, moved))
        assert row["limit"] == ("arithmetic" if at_ceilings > moved else "memory")
        assert row["share_peak"] is None  # there is no data sheet of a CPU


def test_a_part_that_fails_leaves_the_others(tmp_path):
    def too_much(bench):
        raise torch.cuda.OutOfMemoryError("first line\nno memory")

    report = bench_network.Report(network_bench(results=tmp_path))
    report.part("bad", too_much)
    report.part("good", lambda bench: [measuring.make_row("x", 1, 2, "s", "b")])
    found = json.loads((tmp_path / "bench_network_cpu.json").read_text())
    assert (found["failed"], ratios(found["rows"])) == (["bad"], {"x": 0.5})


def test_a_device_whose_gradients_are_wrong_is_refused(monkeypatch):
    bench = network_bench(amp="bf16")
    bench_network.check_device(bench)
    real = bench_network.batch_loss

    def wrong(training, batch):
        loss, booked = real(training, batch)
        return loss * (1.5 if torch.is_autocast_enabled("cpu") else 1), booked

    monkeypatch.setattr(bench_network, "batch_loss", wrong)
    with pytest.raises(utils.DataError, match=r"amp bf16 differ from the CPU.s by 0\.5"):
        bench_network.check_device(bench)


def test_epochs_of_training_itself_are_timed_by_batch_size(tmp_path, monkeypatch):
    seen, train_epoch = [], bench_network.train_epoch
    # without a compiler: what would be compiled is called as it is
    monkeypatch.setattr(torch, "compile", lambda f, **_: seen.append(f.__name__) or f)

    def counting(training, stopper):
        done = train_epoch(training, stopper)
        seen.append(training.progress.seen)
        return done

    monkeypatch.setattr(bench_network, "train_epoch", counting)
    bench = network_bench(amp="bf16", compile=True)
    rows = bench_network.run_rows(bench, tmp_path, sizes=(16, 64), n_steps=3)
    assert list(ratios(rows)) == [f"run_{n}_{w}" for n in (16, 64) for w in ("eager", "compiled")]
    for i, n in enumerate((16, 64)):
        eager, compiled = seen[5 * i : 5 * i + 2], seen[5 * i + 2 : 5 * i + 5]
        assert compiled == ["cutout_outputs", *eager]
        assert all(0.5 < spaxels / (3 * n) < 2 for spaxels in eager)


SHAPES = [
    ("published", {"cutout": 5}),
    ("published", {"cutout": 7, "patch_size": 3}),
    ("published", {"cutout": 3, "patch_size": 9}),
    ("k9s8", {"cutout": 5}),
    ("projection30", {"cutout": 5, "bands": 64}),
]


class Traffic(TorchDispatchMode):
    """Bytes of the inputs and outputs of every operation that is not a mere view."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            parts = tree_flatten((args, kwargs, out))[0]
            self.total += sum(p.nbytes for p in parts if isinstance(p, torch.Tensor))
        return out


@pytest.mark.parametrize(("variant", "sizes"), SHAPES)
def test_roofline_counts_torchs_operations_and_less_than_its_traffic(variant, sizes):
    step = bench_network.Step(network_bench(**sizes), variant, True, 2)
    model, cutout = step.model, sizes["cutout"]
    for training in (False, True):
        with FlopCounterMode(display=False) as counter:
            features = model.features(step.batch.patches)
            logits = SSFTT_dense.classify_windows(model, features)
            if training:
                logits.sum().backward()
        count = roofline.count_flops(model.config, cutout, training)
        assert 2 * count == counter.get_total_flops()
    step()  # makes the optimiser's moments
    with Traffic() as traffic:
        step.learn(step.batch)
    least = 2 * roofline.count_bytes(model, cutout, itemsize=4, cutouts=2)
    assert 0.05 * traffic.total < least < traffic.total


def test_patches_of_a_cutout_give_its_logits():
    model = bench_network.make_model(network_bench(), "published").eval()
    cutout = bench_network.random_spectra(1, 5, 6, TINY["bands"])
    with torch.inference_mode():
        each = model(bench_network.patches_of(cutout, 7, 30))
        dense = SSFTT_dense.dense_logits(model, cutout)[0].flatten(1).T
    torch.testing.assert_close(dense, each, rtol=1e-4, atol=1e-5)


def test_pipeline_counts_only_labelled_spaxels_and_a_trace_all_of_the_time(tmp_path):
    bench = network_bench()
    step = bench_network.Step(bench, "published", False, 1)
    loader = bench_network.packed_loader(bench, tmp_path / "x.h5", TINY["bands"], 5, 2)
    found = step.learn_all(loader)
    assert found == sum(int((batch.weights > 0).sum()) for batch in loader)
    shares, _ = bench_network.trace_step(step, lines=10_000)
    assert sum(share for _, share in shares) == pytest.approx(1)


@pytest.mark.gpu
def test_the_gpu_benchmark_runs(tmp_path):
    assert bench_network.main(bench_network.Config(**TINY, device="cuda", results=tmp_path)) == 0
    assert ratios(json.loads((tmp_path / "bench_network_cuda.json").read_text())["rows"])


def test_coverage_of_intervals_is_that_of_galaxies_left_out():
    rng = np.random.default_rng(0)
    n, each = 60, 200
    label = rng.uniform(8.3, 8.7, n * each)
    wrong_by = 1 + 5 * (label - 8.3)  # the more, the larger the label
    frame = pd.DataFrame(
        {
            "mangaid": np.repeat([f"1-{k}" for k in range(n)], each),
            "value": label, "scale": 0.01, "logoh": label + 0.01 * wrong_by * rng.laplace(
                size=label.size
            ), "snr": rng.normal(size=label.size), "radius": rng.random(label.size),
            "true": np.digitize(label, (8.4, 8.5, 8.6)),
        }
    )  # fmt: skip
    tables = [interval_coverage.coverage(frame, 10, 0, bins) for bins in (1, 4)]
    one, four = ({(r["name"], r["bin"]): r["mean"] for r in rows} for rows in tables)
    assert len(one) == 1 + 3 + 3 + 4 + 1 + 1
    for name in ("all", "S/N, third", "radius, third", "single galaxies"):
        assert one[name, 0] == pytest.approx(0.9, abs=0.02)
        assert four[name, 0] == pytest.approx(0.9, abs=0.02)
    assert one["class", 3] < 0.83 < 0.94 < one["class", 0]
    assert all(four["class", k] == pytest.approx(0.9, abs=0.04) for k in range(4))
    assert four["half-width", 0] < one["half-width", 0]
