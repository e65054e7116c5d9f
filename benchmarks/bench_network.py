"""The network's speed: patch-wise against dense, every stem, on a CPU or a GPU.

Measures in turn, in one run, on random spectra (no value changes the time):
  forward   logits of spaxels from their patches, and of a whole galaxy's from its cube
  training  forward, backward and optimiser step as run_SSFTT_training.py takes them: patch-wise,
            and on cutouts, for every stem; every spaxel labelled
  pipeline  the same with the loader, from packed cubes, a third of whose spaxels are labelled;
            counts the labelled ones
  run       on a GPU: epochs of run_SSFTT_training.py itself, recommended stem, cutouts 5 wide, for
            several batch sizes, eager and under torch.compile
  map       a whole galaxy from flux to class map: normalised, and eval_fns.predict_map
  memory    what a training step adds, for as many spaxels patch-wise as dense
  roofline  the training rates against the bound that arithmetic and memory traffic set, from the
            network's shapes (`count_flops`, `count_bytes`) and this device's measured ceilings
Prints a table; writes results/bench/bench_network_<device>.json. On a GPU in bfloat16, with
larger batches. --trace prints instead where the time of a step goes, by torch's profiler.

    python benchmarks/bench_network.py
    python benchmarks/bench_network.py --device cuda --compile
    python benchmarks/bench_network.py --trace
"""

from __future__ import annotations

import functools
import itertools
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import measuring
import numpy as np
import torch
from measuring import Row, make_row
from torch import Tensor
from torch.utils.data import DataLoader

import data_fns
import data_io
import eval_fns
import hsi_proc_fns
import run_SSFTT_training
import utils
from data_fns import Batch, Batches, CutoutBatch, PatchSpec
from HSI_SSFTT import SMALLEST_CONVOLVED, SSFTT, get_SSFTT_model
from run_SSFTT_training import batch_loss, compile_steps
from utils import DataError

log = logging.getLogger(__name__)

VARIANTS: dict[str, dict[str, int]] = {
    "fiducial": {},
    "k9s8": {"spectral_kernel": 9, "spectral_stride": 8},
    "k16s16": {"spectral_kernel": 16, "spectral_stride": 16},
    "projection30": {"projection": 30},
    "pca30": {"bands": 30},
}
"""Arguments of get_SSFTT_model; pca30 is fed with components computed beforehand."""
RECOMMENDED = "pca30"
"""The stem that docs/performance.md recommends."""
SHOWN = ("fiducial", RECOMMENDED)
"""The stems of the parts that do not measure all."""

PEAKS: dict[str, tuple[float, float]] = {
    "NVIDIA H200": (989.5e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": (989.5e12, 3.35e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.039e12),
}
"""Dense bfloat16 FLOP/s and bytes/s by the device's name, of SXM modules (NVIDIA's data sheets
"H200 Tensor Core GPU", "H100 Tensor Core GPU" and "A100 80GB Tensor Core GPU"; the first two state
twice the FLOP/s, with sparsity)."""
AGREES = {"off": 1e-3, "bf16": 0.15, "fp16": 0.08}
"""How far a GPU's numbers may lie from a CPU's float32 ones, of their norm."""
SECONDS_OF_WORK = 0.2
"""At least so long is one measurement of a ceiling."""
RUN_CUTOUT, RUN_STEPS = 5, 200
"""Cutouts of configs/train_cutouts.json; steps of an epoch that is timed."""
RUN_BATCHES = (256, 4096, 16384)
"""Labelled spaxels a step; the first is the default."""
ADAM_BYTES = 4 * 8
"""A float32 parameter's traffic in a step of Adam: read it, its gradient and both moments; write
it and both moments; and write the gradient in the backward pass."""


@dataclass(frozen=True)
class Config:
    """The network's speed on this device."""

    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Where to compute."""
    amp: eval_fns.Amp | None = None
    """Mixed precision; default bf16 on a GPU, off on a CPU."""
    bands: int = 2040
    """Bands of a spectrum."""
    patch_size: int = 7
    """Spaxels a side of a patch."""
    patches: int | None = None
    """Patches a step, patch-wise; default 256, on a GPU 1024."""
    cutouts: int | None = None
    """Cutouts a step; default 5, on a GPU 64. Halved until they fit into the GPU's memory."""
    cutout: int = 27
    """Spaxels a side of a cutout (odd); 27 is where CPUs convolve best: rows of at most 32."""
    small_cutout: int = 11
    """Spaxels a side of smaller cutouts, as many spaxels a step: more overlap, less alike."""
    map_size: int = 74
    """Spaxels a side of the galaxy that is mapped; 74 is MaNGA's largest."""
    steps: int | None = None
    """Steps of one timing; default 1, on a GPU 10."""
    runs: int = 3
    """Counted runs of each, after one that is not."""
    compile: bool = False
    """Also measure under torch.compile (needs a C++ compiler; takes minutes)."""
    trace: bool = False
    """Only show where the time of a training step goes, and write it beside the JSON."""
    results: Path = measuring.RESULTS
    """Folder of the JSON."""


class Bench(NamedTuple):
    """A configuration with its defaults filled in."""

    config: Config
    device: torch.device
    amp: eval_fns.Amp
    patches: int
    cutouts: int
    steps: int

    @classmethod
    def of(cls, config: Config) -> Bench:
        """Fill in what depends on the device; refuse what cannot be measured."""
        if config.cutout % 2 == 0 or min(config.cutout, config.map_size, config.runs) < 1:
            raise DataError("--cutout must be odd, --map-size and --runs at least 1.")
        device = eval_fns.pick_device(config.device)
        on_gpu = device.type == "cuda"
        torch.backends.cudnn.benchmark = True  # as in training
        return cls(
            config,
            device,
            config.amp or ("bf16" if on_gpu else "off"),
            config.patches or (1024 if on_gpu else 256),
            config.cutouts or (64 if on_gpu else 5),
            config.steps or (10 if on_gpu else 1),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Type that the convolutions compute in."""
        return eval_fns.AMP_TYPES[self.amp]

    def autocast(self) -> torch.autocast:
        """Mixed precision as in training."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.amp != "off")

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


# What is measured


def make_model(bench: Bench, variant: str) -> SSFTT:
    """Make a variant of the network with initial weights."""
    torch.manual_seed(0)
    arguments = {"bands": bench.config.bands, **VARIANTS[variant]}
    model = get_SSFTT_model(patch_size=bench.config.patch_size, **arguments)
    return model.to(bench.device)


def random_spectra(*shape: int) -> Tensor:
    """Draw (n, y, x, band) normal spectra and give them as loaders do: (n, 1, band, y, x)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).permute(0, 3, 1, 2).unsqueeze(1)


def make_batch(bench: Bench, model: SSFTT, dense: bool, n: int) -> Batch | CutoutBatch:
    """Make a batch of n patches or cutouts on the device, every spaxel labelled."""
    classes, bands = model.arguments["n_classes"], model.arguments["bands"]
    size, cutout = model.patch_size, bench.config.cutout
    generator, rows = torch.Generator().manual_seed(1), torch.arange(n)
    if not dense:
        labels = torch.randint(classes, (n,), generator=generator)
        batch: Batch | CutoutBatch = Batch(random_spectra(n, size, size, bands), labels, rows)
    else:
        side = cutout + size - 1
        labels = torch.randint(classes, (n, cutout, cutout), generator=generator)
        weights = torch.full((n, cutout, cutout), 1 / cutout**2)
        batch = CutoutBatch(random_spectra(n, side, side, bands), labels, rows, weights)
    return type(batch)(*(part.to(bench.device) for part in batch))


class Step:
    """Training steps of one model; each call takes `bench.steps` of them and waits.

    Attributes
    ----------
    spaxels : int
        Learned from in a call.
    peak_gb : float or None
        GPU memory that it took at most, with model and batch; set by `fitting_step`.
    """

    peak_gb: float | None = None

    def __init__(self, bench: Bench, variant: str, dense: bool, n: int) -> None:
        self.bench, self.variant, self.n = bench, variant, n
        self.model = make_model(bench, variant).train()
        self.optimiser = torch.optim.AdamW(self.model.parameters(), 1e-3, fused=True)
        self.batch = make_batch(bench, self.model, dense, n)
        self.spaxels = bench.steps * self.batch.classes.numel()

    def learn(self, batch: Batch | CutoutBatch) -> Tensor:
        """Take one step; return what batch_loss books."""
        with self.bench.autocast():
            loss, booked = batch_loss(self.model, batch, self.bench.device)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        return booked

    def __call__(self) -> None:
        """Take the steps."""
        for _ in range(self.bench.steps):
            self.learn(self.batch)
        self.bench.synchronise()


def fitting_step(bench: Bench, variant: str, dense: bool) -> Step:
    """Make steps of as many patches or cutouts as the GPU's memory takes, halving their number."""
    n, step = bench.cutouts if dense else bench.patches, None
    on_gpu = bench.device.type == "cuda"
    while True:
        try:
            before = torch.cuda.memory_allocated() if on_gpu else 0
            step = Step(bench, variant, dense, n)
            step()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()  # the first step tries convolutions
                step()
                step.peak_gb = (torch.cuda.max_memory_allocated() - before) / 1e9
            return step
        except torch.cuda.OutOfMemoryError:
            step = None  # it holds memory
            if n == 1:
                raise DataError(
                    f"{variant}: not even one cutout of {bench.config.cutout} spaxels a side fits "
                    "into the GPU's memory. Choose a smaller --cutout."
                ) from None
        n //= 2
        torch.cuda.empty_cache()
        log.warning("%s: out of GPU memory, trying %d a step", variant, n)


def patches_of(cutout: Tensor, patch_size: int, n: int) -> Tensor:
    """Cut the patches of n spaxels of (1, 1, band, y, x), (n, 1, band, P, P)."""
    image = cutout[0, 0].permute(1, 2, 0).numpy()
    ys, xs = np.indices(image.shape[:2]).reshape(2, -1)[:, np.arange(n) % image[..., 0].size]
    patches = hsi_proc_fns.extract_patches(image, ys, xs, patch_size)
    return torch.from_numpy(patches).permute(0, 3, 1, 2).unsqueeze(1)


def check_device(bench: Bench) -> list[Row]:
    """Raise a DataError if a GPU's gradients are not those of the CPU.

    The time of a wrong answer is worth nothing, and some releases of cuDNN gave one.
    """
    on_cpu = bench._replace(device=torch.device("cpu"), amp="off")
    for variant, amp in itertools.product(SHOWN, ("off", bench.amp)):
        found = []
        for each in (on_cpu, bench._replace(amp=amp)):
            step = Step(each._replace(steps=1), variant, dense=True, n=1)
            step.model.dropout.p = 0.0
            for module in step.model.block.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            step.learn(step.batch)
            parts = [p.grad for p in step.model.parameters() if p.grad is not None]
            found.append(torch.cat([p.flatten().double().cpu() for p in parts]))
        off = float((found[1] - found[0]).norm() / found[0].norm())
        log.info("%s: gradients of a step, %s: %.2g of their norm off a CPU's", variant, amp, off)
        if not off < AGREES[amp]:
            raise DataError(
                f"{variant}: a step's gradients with amp {amp} are {off:.2g} of their norm off a "
                f"CPU's, expected less than {AGREES[amp]}. Try another release of torch or cuDNN "
                f"({torch.backends.cudnn.version()})."
            )
    return []


# Rows


def forward_rows(bench: Bench) -> list[Row]:
    """Compare logits of a whole galaxy's spaxels with those of a batch of its patches, fiducial."""
    model, side = make_model(bench, "fiducial").eval(), bench.config.map_size
    cutout = random_spectra(1, side, side, bench.config.bands)
    patches = patches_of(cutout, model.patch_size, bench.patches).to(bench.device)
    cutout = cutout.to(bench.device)

    @torch.inference_mode()
    def patch_wise() -> None:
        with bench.autocast():
            model(patches)
        bench.synchronise()

    @torch.inference_mode()
    def dense() -> None:
        with bench.autocast():
            model.forward_dense(cutout)
        bench.synchronise()

    took = measuring.in_turn({"patch_wise": patch_wise, "dense": dense}, bench.config.runs)
    rates = {"patch_wise": len(patches) / took["patch_wise"], "dense": side**2 / took["dense"]}
    against = "forward on patches"
    return [make_row("dense_forward", rates["dense"], rates["patch_wise"], "spaxels/s", against)]


Steps = dict[tuple[str, bool], Step]
"""By variant and whether on cutouts."""


def training_rows(bench: Bench, steps: Steps) -> tuple[list[Row], list[dict[str, Any]]]:
    """Compare training steps: patch-wise and dense, every stem; and find their roofline."""
    took = measuring.in_turn({str(key): step for key, step in steps.items()}, bench.config.runs)
    rates = {key: step.spaxels / took[str(key)] for key, step in steps.items()}
    base, against = rates["fiducial", False], "patch-wise, fiducial"

    def row(name: str, variant: str, dense: bool) -> Row:
        return make_row(name, rates[variant, dense], base, "spaxels/s", against, variant=variant)

    rows = [row("dense_training", "fiducial", True)]
    rows += [
        row(f"stem_{variant}{'' if dense else '_patch_wise'}", variant, dense)
        for variant, dense in steps
        if variant != "fiducial"
    ]
    rows.append(row("recommended_training", RECOMMENDED, True))
    ceilings = measure_ceilings(bench)
    table = [
        roofline(bench, steps[variant, True], rates[variant, True], ceilings)
        for variant, dense in steps
        if dense
    ]
    for entry in table:
        name, against = f"roofline_{entry['variant']}", f"bound by {entry['limit']}, as measured"
        ours, bound = entry["spaxels_per_s"], entry["bound_measured"]
        rows.append(make_row(name, ours, bound, "spaxels/s", against))
    return rows, table


def small_cutout_rows(bench: Bench, patch_wise: Step) -> list[Row]:
    """Compare training on small cutouts, as many spaxels a step, with patch-wise."""
    side = bench.config.small_cutout
    n = max(1, round(bench.cutouts * bench.config.cutout**2 / side**2))
    small = bench._replace(config=replace(bench.config, cutout=side), cutouts=n)
    steps = {v: fitting_step(small, v, True) for v in SHOWN}
    took = measuring.in_turn({"patch_wise": patch_wise, **steps}, bench.config.runs)
    base = patch_wise.spaxels / took["patch_wise"]
    against = "patch-wise, fiducial"
    return [
        make_row(f"small_cutouts_{v}", s.spaxels / took[v], base, "spaxels/s", against, cutout=side)
        for v, s in steps.items()
    ]


def compiled_rows(bench: Bench, steps: Steps, variant: str) -> list[Row]:
    """Compare a dense step under torch.compile with itself."""
    eager = steps[variant, True]
    torch._dynamo.reset()
    compiled = Step(bench, variant, dense=True, n=eager.n)
    compile_steps(compiled.model)
    took = measuring.in_turn({"eager": eager, "compiled": compiled}, bench.config.runs)
    rates = {name: eager.spaxels / seconds for name, seconds in took.items()}
    name = f"compiled_{variant}"
    return [make_row(name, rates["compiled"], rates["eager"], "spaxels/s", "the same, eager")]


def pipeline_rows(bench: Bench, folder: Path, steps: Steps) -> list[Row]:
    """Compare training with its loader, from packed cubes: dense against patch-wise."""
    kinds = {"patch_wise": ("fiducial", 1)}
    kinds |= {v: (v, bench.config.cutout) for v in SHOWN}
    works, labelled = {}, dict[str, float]()
    for kind, (variant, cutout) in kinds.items():
        step = Step(bench, variant, dense=False, n=1)
        bands = step.model.arguments["bands"]
        n = steps[variant, cutout > 1].n
        loader = packed_loader(bench, folder / f"{bands}.h5", bands, cutout, n)
        works[kind] = functools.partial(one_pass, step, loader, labelled, kind)
    took = measuring.in_turn(works, bench.config.runs)
    rates = {kind: labelled[kind] / seconds for kind, seconds in took.items()}
    against = "patch-wise, fiducial, with its loader"
    return [
        make_row(f"training_pipeline_{v}", rates[v], rates["patch_wise"], "spaxels/s", against)
        for v in SHOWN
    ]


def one_pass(step: Step, loader: DataLoader, labelled: dict[str, float], kind: str) -> None:
    """Learn from all batches of a loader; note the number of labelled spaxels."""
    booked = [step.learn(batch) for batch in loader]
    labelled[kind] = float(torch.stack(booked).sum(0)[3])


def run_rows(
    bench: Bench,
    folder: Path,
    sizes: tuple[int, ...] = RUN_BATCHES,
    n_steps: int = RUN_STEPS,
) -> list[Row]:
    """Compare epochs of training itself, recommended stem: larger batches, torch.compile."""
    bands = VARIANTS[RECOMMENDED].get("bands", bench.config.bands)
    small = bench._replace(config=replace(bench.config, cutout=RUN_CUTOUT), steps=n_steps)
    rates: dict[tuple[int, str], float] = {}
    for size, way in itertools.product(sizes, ("eager", "compiled")[: 1 + bench.config.compile]):
        loader = packed_loader(small, folder / f"run_{bands}.h5", bands, RUN_CUTOUT, 1)
        batches = loader.batch_sampler
        assert isinstance(batches, Batches)
        assert isinstance(loader.dataset, data_fns.PackedDataset)
        each = data_fns.labelled_in_a_cutout(
            loader.dataset.samples, batches.probabilities, RUN_CUTOUT
        )
        batches.batch_size = max(1, round(size / each))
        batches.num_samples = batches.batch_size * n_steps
        model = make_model(bench, RECOMMENDED)
        if way == "compiled":
            torch._dynamo.reset()
            compile_steps(model)
        optimiser = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
        run = run_SSFTT_training.Training(
            run_SSFTT_training.TrainConfig(amp=bench.amp),
            folder,
            bench.device,
            {"train": loader},
            model,
            optimiser,
            torch.optim.lr_scheduler.LambdaLR(optimiser, lambda _: 1.0),
            torch.amp.GradScaler(bench.device.type, enabled=bench.amp == "fp16"),
            {},
        )
        for _ in range(2):  # the first compiles, and tries convolutions
            run.progress = run_SSFTT_training.Progress()
            run_SSFTT_training.train_epoch(run, run_SSFTT_training.Stopper())
        rates[size, way] = run.progress.seen / run.progress.seconds
    base, against = rates[sizes[0], "eager"], f"the same, {sizes[0]} spaxels a step, eager"
    return [
        make_row(f"run_{size}_{way}", rate, base, "spaxels/s", against)
        for (size, way), rate in rates.items()
    ]


def packed_loader(bench: Bench, path: Path, bands: int, cutout: int, n: int) -> DataLoader:
    """Load `steps` batches of n from packed random cubes, on the device if that is a GPU.

    As many cubes as cutouts a step, up to 16; a disc of a third of the cubes' spaxels is labelled.
    """
    side, n_cubes = bench.config.cutout + 10, min(16, bench.cutouts)
    plateifus = [f"1-{i}" for i in range(n_cubes)]
    if not path.is_file():
        maps = np.arange(1, n_cubes * side**2 + 1, dtype=np.int32).reshape(n_cubes, side, side)
        spectra = np.empty((maps.size + 1, bands), np.float16)
        wave = np.geomspace(5000, 8000, bands)
        named = dict(zip(plateifus, maps, strict=True))
        packed = data_io.Packed(spectra, named, wave, {p: {} for p in plateifus})
        rng = np.random.default_rng(0)
        cubes = (rng.standard_normal((side**2, bands), np.float32) for _ in plateifus)
        data_io.write_packed(path, packed, cubes)
    y, x = np.indices((side, side))
    y, x = np.nonzero(np.hypot(y - side // 2, x - side // 2) < side / np.sqrt(3 * np.pi))
    galaxy = np.repeat(np.arange(n_cubes, dtype=np.int32), y.size)
    classes = np.random.default_rng(1).integers(6, size=galaxy.size)
    ys, xs = (np.tile(a, n_cubes).astype(np.int32) for a in (y, x))
    row, values = np.full_like(galaxy, -1), np.zeros(galaxy.size, np.float32)
    samples = data_fns.Samples(plateifus, galaxy, ys, xs, row, classes, values)
    batches = Batches(classes, n, balance=True, augment=True, num_samples=n * bench.steps)
    spec = PatchSpec("logOH", patch_size=bench.config.patch_size)
    dataset = data_fns.PackedDataset(
        samples, spec, data_fns.PackedStore(path), cutout, batches.probabilities
    )
    if bench.device.type == "cuda":
        dataset.to(bench.device)
    return DataLoader(dataset, batch_sampler=batches, collate_fn=data_fns.collate)


def map_rows(bench: Bench) -> list[Row]:
    """Compare class maps of a whole galaxy: dense against patch-wise, fiducial and recommended."""
    side, runs = bench.config.map_size, bench.config.runs
    trained = {v: trained_model(bench, v) for v in SHOWN}
    flux = random_spectra(1, side, side, bench.config.bands)[0, 0].permute(1, 2, 0).numpy()

    def values(variant: str) -> np.ndarray:
        model = trained[variant]
        return hsi_proc_fns.normalise(flux, model.spec.patch_norm, model.stats)

    def class_map(variant: str, patch_wise: bool) -> None:
        eval_fns.predict_map(trained[variant], values(variant), patch_wise).argmax(2)

    held = torch.from_numpy(flux).to(bench.device)
    network, stats = trained[RECOMMENDED].network, trained[RECOMMENDED].stats
    assert stats is not None
    mean, components = (
        torch.from_numpy(a.astype(np.float32)).to(bench.device)
        for a in (stats.mean, stats.components / np.sqrt(stats.explained_variance)[:, None])
    )

    @torch.inference_mode()
    def on_device() -> None:
        values = (held / held.abs().mean(2, keepdim=True) - mean) @ components.T  # (y, x, K)
        with bench.autocast():
            network.forward_dense(values.permute(2, 0, 1)[None, None]).argmax(1)
        bench.synchronise()

    works: dict[str, Callable[[], object]]
    works = {v: functools.partial(class_map, v, False) for v in SHOWN}
    took = measuring.in_turn({**works, "on_device": on_device}, runs)
    slow = measuring.timed(lambda: class_map("fiducial", True))  # minutes on a CPU: once
    against = "patch-wise, fiducial"
    more = {"shape": [side, side]}
    rows = [
        make_row("map_latency", took["fiducial"], slow, "s", against, **more),
        make_row("map_latency_recommended", took[RECOMMENDED], slow, "s", against, **more),
    ]
    name = "map_on_device_recommended"
    against = "map_latency_recommended: flux and gaps on the CPU, network in float32"
    return [*rows, make_row(name, took["on_device"], took[RECOMMENDED], "s", against, **more)]


def trained_model(bench: Bench, variant: str) -> eval_fns.TrainedModel:
    """Wrap an untrained network for predict_map; components of random directions."""
    network = make_model(bench, variant).eval()
    n, n_bands, stats = network.arguments["bands"], bench.config.bands, None
    if variant == "pca30":
        components = np.random.default_rng(0).normal(size=(n, n_bands)) / np.sqrt(n_bands)
        band, component = np.ones(n_bands), np.ones(n)
        stats = data_io.Stats(band, band, band, components, component, component / n)
    spec = PatchSpec(
        "logOH", patch_norm="PCA" if stats else "global", patch_size=bench.config.patch_size
    )
    about = {"class_names": spec.class_names}
    return eval_fns.TrainedModel(network, spec, stats, about, bench.device)


def memory_rows(bench: Bench) -> list[Row]:
    """Compare what a step adds in memory, for as many patches as one cutout has spaxels."""
    n = bench.config.cutout**2
    kinds = {"patch_wise": ("fiducial", False, n), "fiducial": ("fiducial", True, 1)}
    kinds[RECOMMENDED] = (RECOMMENDED, True, 1)
    added = {kind: step_memory(bench, *what) for kind, what in kinds.items()}
    against = f"patch-wise, fiducial, as many spaxels ({n})"
    return [
        make_row(name, added[kind], added["patch_wise"], "GB", against)
        for name, kind in (
            ("training_memory", "fiducial"),
            ("training_memory_recommended", RECOMMENDED),
        )
    ]


def step_memory(bench: Bench, variant: str, dense: bool, n: int) -> float:
    """GB that model, optimiser, batch and a step take at most."""
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        step = Step(bench._replace(steps=1), variant, dense, n)
        step()
        torch.cuda.reset_peak_memory_stats()  # as in `fitting_step`
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    return measuring.peak_in_child(_one_step, bench._replace(steps=1), variant, dense, n)[1]


def _one_step(bench: Bench, variant: str, dense: bool, n: int) -> None:
    torch.set_num_threads(utils.cpu_count())
    eval_fns.pick_device(bench.device.type)
    Step(bench, variant, dense, n)()


# The roofline


def count_flops(model: SSFTT, cutout: int, training: bool) -> int:
    """Operations of the matrix products and convolutions on one cutout of T x T spaxels.

    A multiplication and an addition count as two. The backward pass takes each product twice
    (towards weights and inputs), but for the first layer, whose inputs need no gradient.
    Products with the zeros that SSFTT.features_by_pairs adds to its filters do not count, nor
    what is no such product: norms, activations, the attention of the class token.
    """
    a, size, window = model.arguments, model.patch_size, model.window
    kernel = 3 if size >= SMALLEST_CONVOLVED else 1
    dim, tokens, inner = a["dim"], a["n_tokens"], cutout**2
    padded = cutout + size - 1
    first, second = (padded - i * (kernel - 1) for i in (1, 2))
    assert second == cutout + window - 1
    layers = []
    if a["projection"]:
        layers.append(a["bands"] * a["projection"] * padded**2)
    layers.append(model.widest * a["spectral_kernel"] * kernel**2 * first**2)
    layers.append(model.widest * dim * kernel**2 * second**2)
    layers.append((tokens + dim) * dim * second**2)
    each = dim * dim + 2 * dim * dim * (tokens + 1)  # q of the class token; k and v of all
    each += dim * dim + 2 * dim * a["mlp_dim"] + dim * a["n_classes"]
    layers.append(each * inner)
    forward = 2 * sum(layers)
    return 3 * forward - 2 * layers[0] if training else forward


def count_bytes(model: SSFTT, cutout: int, itemsize: int, cutouts: int) -> float:
    """Least memory traffic of a training step for one of its cutouts.

    Taken for granted: every element-wise operation is fused with its neighbours, nothing of the
    size of a convolution's output stays in cache. Then the output of a convolution followed by a
    batch norm crosses the memory eight times: written; read by the next layer (with the statistics
    taken on the way); in the backward pass read for the next layer's weights, its gradient
    written, both read for the norm's sums, both read for the layer's own weights. The input
    crosses twice, a projection's output four times. Parameters: ADAM_BYTES a step, and a read of
    them in each pass.
    """
    a, size = model.arguments, model.patch_size
    kernel = 3 if size >= SMALLEST_CONVOLVED else 1
    padded = cutout + size - 1
    first, second = (padded - i * (kernel - 1) for i in (1, 2))
    moved = 2 * a["bands"] * padded**2
    moved += 4 * (a["projection"] or 0) * padded**2
    moved += 8 * model.widest * first**2 + 8 * a["dim"] * second**2
    parameters = sum(p.numel() for p in model.parameters())
    return moved * itemsize + parameters * (ADAM_BYTES + 2 * itemsize) / cutouts


def measure_ceilings(bench: Bench) -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s of a large copy on this device."""
    side, n = (8192, 1 << 30) if bench.device.type == "cuda" else (2048, 1 << 28)
    a, b = (torch.randn(side, side, device=bench.device, dtype=bench.dtype) for _ in range(2))
    source = torch.ones(n // 4, device=bench.device)
    target = torch.empty_like(source)

    def best(work: Callable[[], object]) -> float:
        def some(n: int) -> float:
            def run() -> None:
                for _ in range(n):
                    work()
                bench.synchronise()

            return measuring.timed(run)

        some(3)
        n = max(3, int(SECONDS_OF_WORK / max(some(3) / 3, 1e-6)))
        return min(some(n) for _ in range(3)) / n

    return 2 * side**3 / best(lambda: a @ b), 2 * n / best(lambda: target.copy_(source))


def roofline(
    bench: Bench, step: Step, rate: float, ceilings: tuple[float, float]
) -> dict[str, Any]:
    """Set a rate of dense training beside what the device could do at most (Williams et al. 2009).

    Returns
    -------
    dict
        Of one spaxel: flops, bytes. peak_gb: GPU memory of the step (None on CPUs).
        bound_measured, bound_peak: spaxels/s at the measured ceilings and at the data sheet's
        (None for devices not in PEAKS); share_measured, share_peak: of these. limit: what sets
        the bound.
    """
    spaxels = bench.config.cutout**2
    itemsize = torch.tensor([], dtype=bench.dtype).element_size()
    flops = count_flops(step.model, bench.config.cutout, training=True) / spaxels
    moved = count_bytes(step.model, bench.config.cutout, itemsize, step.n) / spaxels
    peak = PEAKS.get(torch.cuda.get_device_name()) if bench.device.type == "cuda" else None
    bound, bound_peak = (c and 1 / max(flops / c[0], moved / c[1]) for c in (ceilings, peak))
    assert bound is not None
    return {
        "variant": step.variant,
        "spaxels_per_s": rate,
        "cutouts_a_step": step.n,
        "peak_gb": step.peak_gb,
        "flops": flops,
        "bytes": moved,
        "limit": "arithmetic" if flops / ceilings[0] > moved / ceilings[1] else "memory",
        "ceiling_flops_per_s": ceilings[0],
        "ceiling_bytes_per_s": ceilings[1],
        "bound_measured": bound,
        "share_measured": rate / bound,
        "bound_peak": bound_peak,
        "share_peak": bound_peak and rate / bound_peak,
    }


def print_roofline(table: list[dict[str, Any]]) -> None:
    """Print the roofline, one line a variant."""
    ceilings = table[0]["ceiling_flops_per_s"] / 1e12, table[0]["ceiling_bytes_per_s"] / 1e9
    print(f"measured ceilings: {ceilings[0]:.3g} TFLOP/s, {ceilings[1]:.3g} GB/s")
    words = f"{'MFLOP':>9}{'kB':>9}{'spaxels/s':>12}{'of bound':>10}{'of peak':>9}  limit"
    print(f"{'dense training':16}{words}")
    for row in table:
        of_peak = f"{row['share_peak']:.1%}" if row["share_peak"] else "-"
        print(
            f"{row['variant']:16}{row['flops'] / 1e6:9.2f}{row['bytes'] / 1e3:9.1f}"
            f"{row['spaxels_per_s']:12.4g}{row['share_measured']:10.1%}{of_peak:>9}  {row['limit']}"
        )


# The profiler


def trace_step(step: Step, lines: int = 12) -> tuple[list[tuple[str, float]], str]:
    """Operations of a training step and their shares of its time, the largest first.

    Beside them, on a GPU, how busy it was: operations a step, and the share of the time.
    """
    from torch.profiler import ProfilerActivity, profile

    on_gpu = step.bench.device.type == "cuda"
    step()
    wall = measuring.timed(step)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        step()
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    times = {e.key: float(getattr(e, field)) for e in found.key_averages()}
    whole = sum(times.values())
    if not whole:
        raise DataError("torch's profiler saw no time on the device; is it allowed to trace here?")
    ranked = sorted(times.items(), key=lambda item: -item[1])[:lines]
    count = sum(e.count for e in found.key_averages() if getattr(e, field)) / step.bench.steps
    busy = f", {count:.0f} operations a step, the GPU busy {whole / 1e6 / wall:.0%} of the time"
    return [(name, value / whole) for name, value in ranked], busy if on_gpu else ""


def print_traces(bench: Bench) -> None:
    """Print and write where a step's time goes: patch-wise, dense, dense and recommended."""
    n = max(1, round(bench.cutouts * bench.config.cutout**2 / RUN_CUTOUT**2))
    small = bench._replace(config=replace(bench.config, cutout=RUN_CUTOUT), cutouts=n)
    kinds = [("fiducial", False, bench), ("fiducial", True, bench)]
    kinds += [(RECOMMENDED, True, bench), (RECOMMENDED, True, small)]
    text = []
    for variant, dense, of in kinds:
        found, busy = trace_step(fitting_step(of, variant, dense))
        face = f"cutouts {of.config.cutout} wide" if dense else "patch-wise"
        text.append(f"{variant}, {face}: share of a training step's time{busy}")
        text += [f"{share:8.1%}  {name[:90]}" for name, share in found]
    print("\n".join(text))
    out = bench.config.results / f"trace_{bench.device.type}.txt"
    with utils.atomic_path(out) as part:
        part.write_text("\n".join(text) + "\n")
    print(f"written: {out}")


class Report:
    """What was measured so far, saved after every part: a machine may be lent for a short time."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.rows, self.failed = bench, list[Row](), list[str]()
        self.more: dict[str, Any] = {
            "config": utils.config_dict(bench.config) | {"amp": bench.amp},
            "cudnn": torch.backends.cudnn.version(),
        }

    def part(self, name: str, measure: Callable[[], list[Row]]) -> None:
        """Add the rows of a part; one that fails is told, and leaves the others."""
        try:
            self.rows += measure()
        except Exception as error:  # whatever torch, its compiler or the driver raise
            log.warning("%s: %s", name, str(error).strip().splitlines()[-1])
            log.debug("%s", name, exc_info=True)
            self.failed.append(name)
        out = self.bench.config.results / f"bench_network_{self.bench.device.type}.json"
        measuring.write_rows(out, self.rows, failed=self.failed, **self.more)
        if self.bench.device.type == "cuda":
            torch.cuda.empty_cache()


def main(config: Config) -> int:
    """Measure, print, write."""
    torch.set_num_threads(utils.cpu_count())
    bench = Bench.of(config)
    if config.trace:
        print_traces(bench)
        return utils.EXIT_DONE
    report = Report(bench)
    if bench.device.type == "cuda":
        report.part("check", lambda: check_device(bench))
        with tempfile.TemporaryDirectory() as folder:
            report.part("run", lambda: run_rows(bench, Path(folder)))
    report.part("forward", lambda: forward_rows(bench))
    steps: Steps = {}

    def make(variant: str, dense: bool) -> list[Row]:
        steps[variant, dense] = fitting_step(bench, variant, dense)
        return []

    for variant, dense in itertools.product(VARIANTS, (False, True)):
        face = "dense" if dense else "patch_wise"
        report.part(f"{variant}, {face}", functools.partial(make, variant, dense))
    report.more["a_step"] = {
        f"{v}_{'dense' if d else 'patch_wise'}": step.n for (v, d), step in steps.items()
    }

    def training() -> list[Row]:
        rows, report.more["roofline"] = training_rows(bench, steps)
        return rows

    report.part("training", training)
    report.part("small cutouts", lambda: small_cutout_rows(bench, steps["fiducial", False]))
    for variant in SHOWN if config.compile else ():
        part = functools.partial(compiled_rows, bench, steps, variant)
        report.part(f"torch.compile, {variant}", part)
    with tempfile.TemporaryDirectory() as folder:
        report.part("pipeline", lambda: pipeline_rows(bench, Path(folder), steps))
    steps.clear()
    report.part("map", lambda: map_rows(bench))
    report.part("memory", lambda: memory_rows(bench))
    measuring.print_rows(report.rows)
    if "roofline" in report.more:
        print_roofline(report.more["roofline"])
    if report.failed:
        raise DataError(f"not measured: {', '.join(report.failed)}; see the warnings above.")
    return utils.EXIT_DONE


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
