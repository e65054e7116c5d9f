"""Benchmarks on tiny sizes: their arithmetic, their JSON, and that they run. Nothing is timed."""

import dataclasses
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from astropy.io import fits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench_cta
import bench_loaders
import bench_network
import bench_process
import bench_storage
import compare_training
import measuring
import roofline
import run_all

import SSFTT_dense
import utils
from run_SSFTT_training import TrainConfig

ROW_KEYS = {"name", "ours", "baseline", "ratio", "unit", "against"}
TINY = {"bands": 40, "patches": 4, "cutouts": 2, "cutout": 5, "map_size": 9}
TINY |= {"small_cutout": 3, "runs": 1}


def check_rows(rows):
    for row in rows:
        assert row.keys() >= ROW_KEYS
        assert row["ours"] > 0
        assert row["ratio"] == pytest.approx(row["ours"] / row["baseline"])
        assert row["unit"]
        assert row["against"]
    assert len({row["name"] for row in rows}) == len(rows)


# measuring


def test_ways_run_in_turn_and_the_first_round_does_not_count(monkeypatch):
    calls = []
    clock = iter([9, 9, 1, 10, 2, 30, 6, 20])  # rounds of a and b

    def timed(work):
        work()
        return next(clock)

    monkeypatch.setattr(measuring, "timed", timed)
    works = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    assert measuring.in_turn(works, runs=3) == {"a": 2, "b": 20}
    assert calls == ["a", "b"] * 4


def allocate(megabytes):
    np.ones(megabytes * 125_000)


def test_peak_in_a_child_is_what_the_call_allocates():
    peak, added = measuring.peak_in_child(allocate, 100)
    assert 0.09 < added < 0.15
    assert peak > added


def test_peak_of_a_command_is_of_its_largest_process_and_not_its_parents():
    held = np.ones(50_000_000)  # 400 MB, which rusage would count
    program = (
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', "
        "'import time; x = bytearray(200_000_000); time.sleep(0.3)'])"
    )
    _, peaks = measuring.run_watched([sys.executable, "-c", program])
    assert len(peaks) >= 2
    assert 0.2 <= max(peaks.values()) < 0.3
    assert held.size


def test_a_command_that_fails_is_reported_with_its_last_words():
    with pytest.raises(utils.DataError, match="code 3: no such thing"):
        measuring.run_watched(
            [sys.executable, "-c", "import sys; print('no such thing', file=sys.stderr); exit(3)"]
        )


def test_of_this_environment_a_command_of_another_needs_numpy_only(tmp_path):
    program = (
        "import sys, bench_cta; bench_cta.measuring.write_rows(sys.argv[1], [])\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    words = [sys.executable, "-c", program, str(tmp_path / "x.json")]
    folder = Path(bench_cta.__file__).parent
    loaded = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert not {"torch", "h5py", "pandas", "scipy", "astropy", "tyro", "tqdm"} & set(loaded.split())


# image-extractor


def test_cta_rows_set_what_each_program_took_side_by_side(tmp_path):
    program = "import sys; open(sys.argv[1], 'wb').write(bytes(int(sys.argv[2])))"
    output = tmp_path / "out.h5"
    sizes = {"ctapipe": 200, "eventio": 0, "mapped": 50, "all": 100}
    commands = {
        name: [sys.executable, "-c", program, output, str(size)] for name, size in sizes.items()
    }
    found = bench_cta.measure(commands, output, runs=1)
    assert {name: of.output_bytes for name, of in found.items()} == sizes
    assert all(of.seconds > 0 and of.peak_mb < 100 for of in found.values())
    took = {name: bench_cta.Measured(s, 100 * s, sizes[name]) for s, name in enumerate(sizes, 1)}
    rows = bench_cta.make_rows("proton", took, n_events=10)
    check_rows(rows)
    assert {row["name"]: row["ratio"] for row in rows} == pytest.approx(
        {
            "proton_vs_ctapipe_process": 1 / 3,
            "proton_vs_decode_floor": 2 / 3,
            "proton_all_vs_ctapipe_process": 1 / 4,
            "proton_peak_memory": 3,
            "proton_bytes_per_event": 1 / 4,
        }
    )


# Storage


def test_extrapolation_weighs_bundles_by_their_share():
    found = {
        19: [
            {"seconds": 1.0, "cpu_seconds": 2.0, "h5_mb": 10.0},
            {"seconds": 3.0, "cpu_seconds": 4.0, "h5_mb": 30.0},
        ],
        127: [{"seconds": 8.0, "cpu_seconds": 9.0, "h5_mb": 50.0}],
    }
    out = bench_storage.extrapolate(found, {19: 0.3, 127: 0.1, 61: 0.6}, survey=3600)
    assert out["hours"] == pytest.approx(0.75 * 2 + 0.25 * 8)
    assert out["core_hours"] == pytest.approx(0.75 * 3 + 0.25 * 9)
    assert out["h5_gb"] == pytest.approx(3.6 * (0.75 * 20 + 0.25 * 50))


def test_first_layout_is_what_the_pipeline_writes(tmp_path):
    cube = np.ones((6, 7, 12), np.float32)
    bench_storage.data_io.write_cube(
        tmp_path / "cube.h5", bench_storage.data_io.Cube(cube, np.arange(12.0), cube)
    )
    first = bench_storage.layouts(6, 7, 12)[0]
    with h5py.File(tmp_path / "cube.h5") as f:
        for name in ("cube", "ivar"):
            assert f[name].chunks == first.chunk
            assert (f[name].compression is None) == (not first.options)


def test_every_layout_gives_back_what_was_written(tmp_path):
    rng = np.random.default_rng(0)
    flux = rng.normal(size=(9, 10, 40)).astype("f4")
    flux[:5, :5] = flux[7:] = np.nan
    ivar = np.where(np.isfinite(flux), rng.random(flux.shape, "f4"), 0)
    table = [
        bench_storage.measure_layout(tmp_path / "x.h5", flux, ivar, layout, runs=1)
        for layout in bench_storage.layouts(*flux.shape)
    ]
    assert table[-1]["chunk"] is None
    check_rows(bench_storage.compare_layouts(table))


def test_a_layout_that_loses_numbers_is_refused(tmp_path, monkeypatch):
    flux = np.ones((4, 4, 8), "f4")
    right = bench_storage.write_layout

    def wrong(path, flux, ivar, layout):
        right(path, flux * 2, ivar, layout)

    monkeypatch.setattr(bench_storage, "write_layout", wrong)
    layout = bench_storage.layouts(4, 4, 8)[0]
    with pytest.raises(utils.DataError, match="other numbers"):
        bench_storage.measure_layout(tmp_path / "x.h5", flux, flux, layout, runs=1)


# FITS to H5


def test_process_rows_name_what_is_promised():
    seconds = {"command": 5.0, "cube": 3.0, "igzip": 2.5, "discarding": 2.0, "plain": 10.0}
    rows = bench_process.make_rows(seconds, {"command": 0.4, "plain": 0.8})
    check_rows(rows)
    by_name = {row["name"]: row["ratio"] for row in rows}
    assert by_name["fits_to_h5_vs_igzip"] == pytest.approx(1.2)
    assert by_name["fits_to_h5_vs_igzip_discarding"] == pytest.approx(1.5)
    assert by_name["command_vs_igzip"] == pytest.approx(2)
    assert by_name["command_peak_memory"] == pytest.approx(0.5)


def test_igzip_passes_all_up_to_wave_and_keeps_what_is_needed(tmp_path):
    path = tmp_path / "cube.fits.gz"
    names = ("FLUX", "IVAR", "MASK", "LSF", "WAVE", "REDCORR")
    arrays = {n: np.full((7, 30, 30), i, ">f4") for i, n in enumerate(names)}
    hdus = [fits.PrimaryHDU(), *(fits.ImageHDU(a, name=n) for n, a in arrays.items())]
    fits.HDUList(hdus).writeto(path)
    spans = bench_process.array_spans(path)
    kept = bench_process.decompress(path, spans, keep=True)
    wanted = [arrays[n].tobytes() for n in ("FLUX", "IVAR", "MASK", "WAVE")]
    assert [k[: len(w)] for k, w in zip(kept, wanted, strict=True)] == wanted
    assert bench_process.decompress(path, spans, keep=False) == []
    with gzip.open(path) as f:
        content = f.read(sum(n for _, n in spans))
    assert content.endswith(kept[-1])
    with pytest.raises(AssertionError, match="shorter"):
        bench_process.decompress(path, [*spans, (False, 10**6)], keep=False)


# Network


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """What `make bench-gpu` does, on a CPU: bfloat16, several steps a timing."""
    results = tmp_path_factory.mktemp("results")
    config = bench_network.Config(**TINY, amp="bf16", steps=2, results=results)
    assert bench_network.main(config) == 0
    return json.loads((results / "bench_network_cpu.json").read_text())


def test_network_rows_name_what_is_promised(tiny_run):
    check_rows(tiny_run["rows"])
    names = {row["name"] for row in tiny_run["rows"]}
    assert names >= {
        "dense_forward",
        "dense_training",
        "recommended_training",
        "map_latency",
        "training_memory",
        *(f"stem_{v}" for v in bench_network.VARIANTS if v != "fiducial"),
    }
    assert tiny_run["environment"]["packages"]["torch"]


def test_roofline_has_every_variant_and_a_share_of_its_bound(tiny_run):
    assert [row["variant"] for row in tiny_run["roofline"]] == list(bench_network.VARIANTS)
    for row in tiny_run["roofline"]:
        at_ceilings = row["flops"] / row["ceiling_flops_per_s"]
        moved = row["bytes"] / row["ceiling_bytes_per_s"]
        assert row["bound_measured"] == pytest.approx(1 / max(at_ceilings, moved))
        assert row["limit"] == ("arithmetic" if at_ceilings > moved else "memory")
        assert row["share_peak"] is None  # no data sheet of a CPU


def test_a_part_that_fails_leaves_the_others(tmp_path, monkeypatch):
    def too_much(*args):
        raise torch.cuda.OutOfMemoryError("first line\nno memory")

    monkeypatch.setattr(bench_network, "training_rows", too_much)
    with pytest.raises(utils.DataError, match="not measured: training;"):
        bench_network.main(bench_network.Config(**TINY, results=tmp_path))
    found = json.loads((tmp_path / "bench_network_cpu.json").read_text())
    assert found["failed"] == ["training"]
    assert {row["name"] for row in found["rows"]} >= {"dense_forward", "map_latency"}


def test_a_device_whose_gradients_are_wrong_is_refused(monkeypatch):
    bench = bench_network.Bench.of(bench_network.Config(**TINY, amp="bf16"))
    bench_network.check_device(bench)
    real = bench_network.batch_loss

    def wrong(model, batch, device, *more):
        loss, booked = real(model, batch, device, *more)
        return loss * (1.5 if torch.is_autocast_enabled("cpu") else 1), booked

    monkeypatch.setattr(bench_network, "batch_loss", wrong)
    with pytest.raises(utils.DataError, match=r"amp bf16 differ from the CPU.s by 0\.5"):
        bench_network.check_device(bench)


@pytest.mark.parametrize("compiled", [False, True])
def test_epochs_of_training_itself_are_timed_by_batch_size(tmp_path, monkeypatch, compiled):
    """Here, where nothing waits for a compiler: what would be compiled is called as it is."""
    reached = []
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: reached.append(function.__name__) or function
    )
    config = bench_network.Config(**TINY, amp="bf16", compile=compiled)
    bench, seen = bench_network.Bench.of(config), []
    real = bench_network.run_SSFTT_training.train_epoch

    def train_epoch(run, stopper):
        done = real(run, stopper)
        seen.append(run.progress.seen)
        return done

    monkeypatch.setattr(bench_network.run_SSFTT_training, "train_epoch", train_epoch)
    rows = bench_network.run_rows(bench, tmp_path, sizes=(16, 64), n_steps=3)
    check_rows(rows)
    ways = ("eager", "compiled")[: 1 + compiled]
    assert [row["name"] for row in rows] == [f"run_{n}_{way}" for n in (16, 64) for way in ways]
    assert bool(reached) is compiled
    for n, spaxels in zip(np.repeat((16, 64), 2 * len(ways)), seen, strict=True):
        assert 0.5 < spaxels / (3 * n) < 2


SHAPES = [
    ("fiducial", {}, 5),
    ("fiducial", {"patch_size": 3}, 7),
    ("fiducial", {"patch_size": 9}, 3),
    ("k9s8", {}, 5),
    ("projection30", {"bands": 64}, 5),
]


def one_batch(variant, changes, cutout, n=1):
    sizes = {**TINY, **changes, "cutout": cutout}
    bench = bench_network.Bench.of(bench_network.Config(**sizes))
    step = bench_network.Step(bench, variant, True, n)
    return step.model, step.batch


@pytest.mark.parametrize(("variant", "changes", "cutout"), SHAPES)
@pytest.mark.parametrize("training", [False, True])
def test_operations_are_those_that_torch_counts(variant, changes, cutout, training):
    model, batch = one_batch(variant, changes, cutout)
    with FlopCounterMode(display=False) as counter:
        logits = SSFTT_dense.classify_windows(model, model.features(batch.patches))
        if training:
            logits.sum().backward()
    counted = roofline.count_flops(model.config, cutout, training)
    assert counted == counter.get_total_flops()


class Traffic(TorchDispatchMode):
    """Bytes of the inputs and outputs of every operation that is not a mere view."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            parts = tree_flatten((args, kwargs, out))[0]
            self.total += sum(p.nbytes for p in parts if isinstance(p, torch.Tensor))
        return out


@pytest.mark.parametrize(("variant", "changes", "cutout"), SHAPES)
def test_least_traffic_is_below_that_of_every_operation_by_itself(variant, changes, cutout):
    model, batch = one_batch(variant, changes, cutout, n=2)
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):  # the first step makes the moments
        traffic = Traffic()
        with traffic:
            loss, _ = bench_network.batch_loss(model, batch, torch.device("cpu"))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    least = 2 * roofline.count_bytes(model, cutout, itemsize=4, cutouts=2)
    assert 0.05 * traffic.total < least < traffic.total


def test_patches_of_a_cutout_give_its_logits():
    bench = bench_network.Bench.of(bench_network.Config(**TINY))
    model = bench_network.make_model(bench, "fiducial").eval()
    cutout = bench_network.random_spectra(1, 5, 6, TINY["bands"])
    with torch.inference_mode():
        each = model(bench_network.patches_of(cutout, 7, 30))
        dense = SSFTT_dense.dense_logits(model, cutout)[0].flatten(1).T
    torch.testing.assert_close(dense, each, rtol=1e-4, atol=1e-5)


def test_pipeline_counts_labelled_spaxels_only(tmp_path):
    bench = bench_network.Bench.of(bench_network.Config(**TINY))
    step = bench_network.Step(bench, "fiducial", False, 1)
    loader = bench_network.packed_loader(bench, tmp_path / "x.h5", TINY["bands"], 5, 2)
    found = step.learn_all(loader)
    loader.batch_sampler.set_epoch(0)
    assert found == sum(int((batch.weights > 0).sum()) for batch in loader)


def test_traces_share_out_the_whole_time():
    bench = bench_network.Bench.of(bench_network.Config(**TINY))
    step = bench_network.Step(bench, "fiducial", True, 1)
    found, busy = bench_network.trace_step(step, lines=10_000)
    assert busy == ""  # reported for GPUs only
    assert sum(share for _, share in found) == pytest.approx(1)
    assert any("convolution" in name for name, _ in found)


def test_a_missing_gpu_is_one_clear_line():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(utils.DataError, match="no GPU"):
        bench_network.main(bench_network.Config(device="cuda"))


@pytest.mark.gpu
def test_the_gpu_benchmark_runs(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    config = bench_network.Config(**TINY, device="cuda", results=tmp_path)
    assert bench_network.main(config) == 0
    check_rows(json.loads((tmp_path / "bench_network_cuda.json").read_text())["rows"])


def test_stems_are_options_of_training():
    options = {field.name for field in dataclasses.fields(TrainConfig)}
    assert compare_training.STEMS.keys() == bench_network.VARIANTS.keys()
    assert all(stem.keys() <= options for stem in compare_training.STEMS.values())


# Loaders and all together


def test_loaders_all_load_as_many_patches_as_asked(tmp_path, monkeypatch):
    from mock_cubes import make_data_dir, write_patch_files

    make_data_dir(tmp_path, n_band=24)
    write_patch_files(tmp_path, "logOH", "global", 7)
    monkeypatch.setattr(bench_loaders, "SPLIT", "hard")
    config = bench_loaders.Config(samples=64, batch_size=16, cutout=5, runs=1)
    for source in ("patches", "cubes", "packed"):
        loader = bench_loaders.make_loader(tmp_path, config, source=source)
        assert bench_loaders.one_pass(loader) == 64


def test_rows_of_all_benchmarks_are_gathered(tmp_path):
    rows = [measuring.make_row("a", 1, 2, "s", "b"), measuring.make_row("c", 1, 2, "s", "d")]
    for name, row in zip(("x", "y"), rows, strict=True):
        measuring.write_rows(tmp_path / f"{name}.json", [row])
    found = run_all.gather(tmp_path, {"x": "x.json", "y": "y.json"})
    check_rows(found)
    assert [(row["name"], row["benchmark"]) for row in found] == [("a", "x"), ("c", "y")]
    with pytest.raises(utils.DataError, match="two rows are called a"):
        run_all.gather(tmp_path, {"x": "x.json", "again": "x.json"})


def test_benchmarks_stay_on_their_cores(monkeypatch):
    before = os.sched_getaffinity(0)
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.setenv(name, "64")
    try:
        assert run_all.pin(1) == 1
        assert len(os.sched_getaffinity(0)) == 1
        assert utils.cpu_count() == 1
    finally:
        os.sched_setaffinity(0, before)
