"""The network's speed: patch-wise and dense modes, every spectral front end, on a CPU or a GPU.

Measures on random spectra, whose values do not change the time; what is compared runs in turn:
  forward   logits of spaxels from their patches, and of a whole galaxy's from its cube
  training  forward, backward and optimiser step as in run_SSFTT_training.py: patch-wise and on
            cutouts, for every network variant; every spaxel labelled
  pipeline  the same with the loader, from packed cubes, a third of whose spaxels are labelled;
            counts the labelled ones
  run       on a GPU: epochs of run_SSFTT_training.py itself, recommended variant, cutouts 5 wide,
            for several batch sizes, eager and under torch.compile
  map       a whole galaxy from flux to class map: normalised, and inference.map_answer
  evidence  which wavelengths decided, for every spaxel of a galaxy, against its map
  memory    what a training step adds, for the same number of spaxels patch-wise and dense
  roofline  the training rates against the bound that arithmetic and memory traffic set, from the
            network's sizes and this device's measured ceilings: roofline.py
Prints a table; writes results/bench/bench_network_<device>.json. On a GPU the default is bfloat16
and larger batches. --trace shows instead where the time of a step goes, by torch's profiler.

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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import measuring
import utils
from measuring import Row, make_row
from utils import DataError, PatchNorm

import numpy as np
import roofline
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import batches
import data_io
import evidence
import hsi_proc_fns
import inference
import networks
import pack_cubes
import SSFTT_dense
from batches import Batch, CutoutBatch, PackedDataset, SpaxelBatchSampler
from data_fns import DataOptions
from hsi_proc_fns import Stats
from HSI_SSFTT import SSFTT, SSFTTConfig, count_parameters, get_SSFTT_model
from line_fits import line_places
from matched_filter_net import (
    MatchedFilterConfig,
    MatchedFilterNet,
    Spectra,
    joined_size,
    split,
)
from pack_cubes import PackedCubes
from recipe import Recipe
from run_folder import MODEL_VERSION, ModelCard
from samples import PatchSpec, Samples
from training import OptimisationOptions, Progress, Stopper, Training, batch_loss, train_epoch

log = logging.getLogger(__name__)

VARIANTS: dict[str, dict[str, int]] = {
    "published": {},
    "k9s8": {"spectral_kernel": 9, "spectral_stride": 8},
    "k16s16": {"spectral_kernel": 16, "spectral_stride": 16},
    "projection30": {"projection": 30},
    "pca30": {"bands": 30},
}
"""The spectral front ends, as arguments of get_SSFTT_model: the published network, strided first
convolutions (kernel 9 stride 8, 16 and 16), a learned projection of the bands, and principal
components, which are computed beforehand."""
RECOMMENDED = "pca30"
"""The variant that docs/performance.md recommends."""
SHOWN = ("published", RECOMMENDED)
"""The variants of the parts that do not measure all."""
PATCH_WISE = "_patch_wise"
"""Ends the name of a variant's patch-wise step; a bare variant stands for training on cutouts."""
SMALL = "small_cutouts_"
"""Begins the name of a variant's step on small cutouts."""
BASE, AGAINST = "published" + PATCH_WISE, "patch-wise, published"
"""The step that training is compared with, and its description."""

AGREES = {"off": 1e-3, "bf16": 0.15, "fp16": 0.08}
"""Largest difference between a GPU's gradients and a CPU's float32 ones, relative to their norm."""
RUN_CUTOUT, RUN_STEPS = 5, 200
"""Width of cutouts that training chooses by default; steps of an epoch that is timed."""
RUN_BATCHES = (256, 4096, 16384)
"""Labelled spaxels per step; the first is the default."""


@dataclass(frozen=True)
class Config(measuring.Options):
    """The network's speed on this device."""

    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Where to compute."""
    amp: inference.Amp | None = None
    """Mixed precision; default bf16 on a GPU, off on a CPU."""
    bands: int = 2040
    """Bands per spectrum."""
    patch_size: int = 7
    """Width of a patch in spaxels."""
    patches: int | None = None
    """Patches per patch-wise step; default 256, on a GPU 1024."""
    cutouts: int | None = None
    """Cutouts per step; default 5, on a GPU 64. Halved until they fit into the GPU's memory."""
    cutout: int = 27
    """Width of a cutout in spaxels (odd); 27 is where CPUs convolve best: rows of at most 32."""
    small_cutout: int = 11
    """Width of smaller cutouts, the same number of spaxels per step: more overlap, less alike."""
    map_size: int = 74
    """Width in spaxels of the galaxy that is mapped; 74 is MaNGA's largest."""
    steps: int | None = None
    """Steps per timing; default 1, on a GPU 10."""
    runs: int = 3
    """Counted runs of each way, after one that is not counted."""
    compile: bool = False
    """Also measure under torch.compile (needs a C++ compiler; takes minutes)."""
    trace: bool = False
    """Only show where the time of a training step goes, and write it beside the JSON."""


class Bench(NamedTuple):
    """A configuration with its defaults filled in."""

    config: Config
    device: torch.device
    amp: inference.Amp
    patches: int
    cutouts: int
    steps: int

    @classmethod
    def of(cls, config: Config) -> Bench:
        """Fill in what depends on the device; refuse what cannot be measured."""
        if config.cutout % 2 == 0 or min(config.cutout, config.map_size, config.runs) < 1:
            raise DataError("--cutout must be odd, --map-size and --runs at least 1.")
        device = inference.pick_device(config.device)
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
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Type that the convolutions compute in."""
        return inference.AMP_TYPES[self.amp]

    def with_cutout(self, side: int) -> Bench:
        """Take cutouts of another width, with about the same number of spaxels per step."""
        n = max(1, round(self.cutouts * self.config.cutout**2 / side**2))
        return self._replace(config=replace(self.config, cutout=side), cutouts=n)

    def autocast(self) -> torch.autocast:
        """Mixed precision as in training."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.amp != "off")

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()


# What is measured


def make_model(bench: Bench, variant: str) -> SSFTT:
    """Make a variant of the network with initial weights."""
    torch.manual_seed(0)
    sizes = {"bands": bench.config.bands, **VARIANTS[variant]}
    return get_SSFTT_model(patch_size=bench.config.patch_size, **sizes).to(bench.device)


def random_spectra(*shape: int) -> Tensor:
    """Draw normal spectra (n, y, x, band) and give them as loaders do: (n, 1, band, y, x)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).permute(0, 3, 1, 2).unsqueeze(1)


def make_batch(bench: Bench, of: SSFTTConfig, dense: bool, n: int) -> Batch | CutoutBatch:
    """Make a batch of n patches or cutouts on the device, every spaxel labelled."""
    side = bench.config.cutout if dense else 1
    spectra = random_spectra(n, *(side + of.patch_size - 1,) * 2, of.bands)
    generator, rows = torch.Generator().manual_seed(1), torch.arange(n)
    labels = torch.randint(of.n_classes, (n, side, side), generator=generator)
    batch: Batch | CutoutBatch
    if dense:
        weights, values = torch.full(labels.shape, 1 / side**2), torch.zeros(labels.shape)
        batch = CutoutBatch(spectra, labels, rows, weights, values)
    else:
        batch = Batch(spectra, labels.flatten(), rows, torch.zeros(n))
    return type(batch)(*(part.to(bench.device) for part in batch))


def describe_model(bench: Bench, model: SSFTT, patch_norm: PatchNorm = "global") -> ModelCard:
    """Describe a network as a run of training would; nothing was learned."""
    spec = PatchSpec("logOH", patch_norm=patch_norm, patch_size=bench.config.patch_size)
    return ModelCard(
        recipe=Recipe("run", MODEL_VERSION),
        spec=spec,
        class_names=list(spec.class_names),
        class_counts=[0] * len(spec.class_names),
        class_values=None,
        label_median=0.0,
        network_name="ssftt",
        network=asdict(model.config),
        parameters=count_parameters(model),
        split_dir="",
        data_dir="",
    )


class Step:
    """Training steps of one model: a call takes `bench.steps` of them, waits, counts spaxels."""

    peak_gb: float | None = None
    """Most GPU memory that a step took, with model and batch; set by `warm_step`."""

    def __init__(self, bench: Bench, variant: str, dense: bool, n: int) -> None:
        self.bench, self.variant, self.dense, self.n = bench, variant, dense, n
        self.model = make_model(bench, variant).train()
        optimiser = torch.optim.AdamW(self.model.parameters(), 1e-3, fused=True)
        self.training = Training(
            data=DataOptions(network="ssftt", patch_size=bench.config.patch_size),
            options=OptimisationOptions(epochs=1, amp=bench.amp),
            run_dir=bench.config.results,
            device=bench.device,
            loaders={},
            model=self.model,
            optimiser=optimiser,
            scheduler=torch.optim.lr_scheduler.LambdaLR(optimiser, lambda _: 1.0),
            scaler=torch.amp.GradScaler(bench.device.type, enabled=bench.amp == "fp16"),
            card=describe_model(bench, self.model),
            config={"seed": 0},
        )
        self.batch = make_batch(bench, self.model.config, dense, n)

    def compile(self) -> Step:
        """Compile training on cutouts as run_SSFTT_training.py does."""
        torch._dynamo.reset()
        self.training.cutout_outputs = torch.compile(networks.cutout_outputs, dynamic=False)
        return self

    def learn(self, batch: Batch | CutoutBatch) -> Tensor:
        """Take one step; return the sums that batch_loss returns."""
        with self.bench.autocast():
            loss, sums = batch_loss(self.training, batch)
        self.training.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.training.optimiser.step()
        return sums

    def learn_all(self, loader: DataLoader) -> float:
        """Learn from all batches of a loader; return the number of labelled spaxels."""
        return float(torch.stack([self.learn(batch) for batch in loader]).sum(0)[3])

    def __call__(self) -> int:
        """Take the steps; return the number of spaxels learned from."""
        for _ in range(self.bench.steps):
            self.learn(self.batch)
        self.bench.synchronise()
        return self.bench.steps * self.batch.classes.numel()


def warm_step(bench: Bench, variant: str, dense: bool, n: int) -> Step:
    """Make and take a step; on a GPU also measure its memory."""
    before = torch.cuda.memory_allocated() if bench.on_gpu else 0
    step = Step(bench, variant, dense, n)
    step()
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()  # the first step tries convolutions
        step()
        step.peak_gb = (torch.cuda.max_memory_allocated() - before) / 1e9
    return step


def fitting_step(bench: Bench, variant: str, dense: bool) -> Step:
    """Make a step of as many patches or cutouts as the GPU's memory takes, halving their number."""
    n = bench.cutouts if dense else bench.patches
    while True:
        try:
            return warm_step(bench, variant, dense, n)
        except torch.cuda.OutOfMemoryError:
            if n == 1:
                raise DataError(
                    f"{variant}: one cutout {bench.config.cutout} spaxels wide does not fit into "
                    "the GPU's memory. Choose a smaller --cutout."
                ) from None
        n //= 2
        torch.cuda.empty_cache()
        log.warning("%s: out of GPU memory, trying %d per step", variant, n)


def patches_of(cutout: Tensor, patch_size: int, n: int) -> Tensor:
    """Cut the patches of n spaxels of (1, 1, band, y, x), (n, 1, band, P, P)."""
    image = cutout[0, 0].permute(1, 2, 0).numpy()
    ys, xs = np.indices(image.shape[:2]).reshape(2, -1)[:, np.arange(n) % image[..., 0].size]
    patches = hsi_proc_fns.extract_patches(image, ys, xs, patch_size)
    return torch.from_numpy(patches).permute(0, 3, 1, 2).unsqueeze(1)


def check_device(bench: Bench) -> list[Row]:
    """Raise a DataError if a GPU's gradients differ from the CPU's: some releases of cuDNN err."""
    on_cpu = bench._replace(device=torch.device("cpu"), amp="off")
    for variant, amp in itertools.product(SHOWN, ("off", bench.amp)):
        found = []
        for each in (on_cpu, bench._replace(amp=amp)):
            step = Step(each._replace(steps=1), variant, dense=True, n=1)
            for module in step.model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            step.learn(step.batch)
            parts = [p.grad for p in step.model.parameters() if p.grad is not None]
            found.append(torch.cat([p.flatten().double().cpu() for p in parts]))
        off = float((found[1] - found[0]).norm() / found[0].norm())
        log.info(
            "%s, amp %s: gradients differ from the CPU's by %.2g of their norm", variant, amp, off
        )
        if not off < AGREES[amp]:
            raise DataError(
                f"{variant}: gradients of a step with amp {amp} differ from the CPU's by {off:.2g} "
                f"of their norm, expected less than {AGREES[amp]}. Try another release of torch or "
                f"cuDNN (found {torch.backends.cudnn.version()})."
            )
    return []


# Rows


def rate_row(name: str, rate: float, base: float, against: str = AGAINST, **more: Any) -> Row:
    """Make a row of rates in spaxels/s."""
    return make_row(name, rate, base, "spaxels/s", against, **more)


def forward_rows(bench: Bench) -> list[Row]:
    """Compare a whole galaxy's logits with those of a batch of its patches, published network."""
    model, side = make_model(bench, "published").eval(), bench.config.map_size
    cutout = random_spectra(1, side, side, bench.config.bands)
    patches = patches_of(cutout, bench.config.patch_size, bench.patches).to(bench.device)
    cutout = cutout.to(bench.device)

    @torch.inference_mode()
    def forward(dense: bool) -> int:
        with bench.autocast():
            logits = SSFTT_dense.dense_logits(model, cutout) if dense else model(patches)
        bench.synchronise()
        return logits[:, 0].numel()

    works = {name: functools.partial(forward, name == "dense") for name in ("patch_wise", "dense")}
    rates = measuring.rates_of(works, bench.config.runs)
    against = "forward on patches"
    return [rate_row("dense_forward", rates["dense"], rates["patch_wise"], against)]


Steps = dict[str, Step]
"""By variant, with PATCH_WISE after it or SMALL before it if it is such a step."""


def training_rows(bench: Bench, steps: Steps) -> tuple[list[Row], list[dict[str, Any]]]:
    """Compare training steps, patch-wise and dense, of every variant; and find their roofline."""
    rates = measuring.rates_of(steps, bench.config.runs)
    base = rates[BASE]
    rows = [rate_row("dense_training", rates["published"], base, variant="published")]
    for name, step in steps.items():
        if name not in ("published", BASE):
            row_name = name if name.startswith(SMALL) else f"front_end_{name}"
            width = step.bench.config.cutout if step.dense else 1
            row = rate_row(row_name, rates[name], base, variant=step.variant, cutout=width)
            rows.append(row)
    ceilings = roofline.measure_ceilings(bench.device, bench.dtype)
    table, side = list[dict[str, Any]](), bench.config.cutout
    for name in (name for name in VARIANTS if name in steps):
        step = steps[name]
        bound = roofline.set_beside(rates[name], step.model, side, step.n, bench.dtype, ceilings)
        table.append(
            {"variant": name, "cutouts_per_step": step.n, "peak_gb": step.peak_gb, **bound}
        )
        against = f"bound by {bound['limit']}, as measured"
        rows.append(rate_row(f"roofline_{name}", rates[name], bound["bound_measured"], against))
    return rows, table


def matched_filters_rows(bench: Bench, steps: Steps) -> list[Row]:
    """Compare a training step of matched filters on their usual cutouts with SSFTT's."""
    torch.manual_seed(0)
    usual, window = networks.USUAL["matched_filters"], bench.config.patch_size
    network = MatchedFilterNet(MatchedFilterConfig(bench.config.bands, window=window))
    network = network.to(bench.device).train()
    optimiser = torch.optim.AdamW(networks.parameter_groups(network, usual.lr), fused=True)
    n, side = max(1, usual.batch_size // usual.cutout**2), usual.cutout + window - 1
    spectra = random_spectra(n, side, side, joined_size(bench.config.bands))
    spectra[:, :, bench.config.bands :].abs_()  # weights, and colours
    spectra = spectra.to(bench.device)
    weights = torch.full((n, usual.cutout, usual.cutout), 1 / usual.cutout**2, device=bench.device)

    def learn() -> int:
        for _ in range(bench.steps):
            outputs = networks.cutout_outputs(network, spectra, weights)
            each = networks.losses(network, outputs, weights.long(), weights)
            optimiser.zero_grad(set_to_none=True)
            (each * weights).sum().backward()
            optimiser.step()
        bench.synchronise()
        return bench.steps * weights.numel()

    learn()
    works: dict[str, Callable[[], float]] = {"ours": learn}
    works |= {k: steps[k] for k in (BASE, RECOMMENDED)}
    rates = measuring.rates_of(works, bench.config.runs)
    more: dict[str, Any] = {"variant": "matched filters", "cutout": usual.cutout}
    name, against = "matched_filters_training", f"{RECOMMENDED} on cutouts"
    return [
        rate_row(name, rates["ours"], rates[BASE], **more),
        rate_row(f"{name}_vs_{RECOMMENDED}", rates["ours"], rates[RECOMMENDED], against, **more),
    ]


def compiled_rows(bench: Bench, steps: Steps, variant: str) -> list[Row]:
    """Compare a dense step under torch.compile with itself."""
    eager = steps[variant]
    compiled = Step(bench, variant, dense=True, n=eager.n).compile()
    rates = measuring.rates_of({"eager": eager, "compiled": compiled}, bench.config.runs)
    against = "the same, eager"
    return [rate_row(f"compiled_{variant}", rates["compiled"], rates["eager"], against)]


def pipeline_rows(bench: Bench, folder: Path, steps: Steps) -> list[Row]:
    """Compare training with its loader, from packed cubes: dense against patch-wise."""
    works: dict[str, Callable[[], float]] = {}
    for name in (BASE, *SHOWN):
        like = steps[name]
        step = Step(bench, like.variant, dense=False, n=1)
        bands, cutout = step.model.config.bands, bench.config.cutout if like.dense else 1
        loader = packed_loader(bench, folder / f"{bands}.h5", bands, cutout, like.n)
        works[name] = functools.partial(step.learn_all, loader)
    rates = measuring.rates_of(works, bench.config.runs)
    against = f"{AGAINST}, with its loader"
    return [rate_row(f"training_pipeline_{v}", rates[v], rates[BASE], against) for v in SHOWN]


def run_rows(
    bench: Bench,
    folder: Path,
    sizes: tuple[int, ...] = RUN_BATCHES,
    n_steps: int = RUN_STEPS,
) -> list[Row]:
    """Compare epochs of training itself, recommended variant: larger batches, torch.compile."""
    bands = VARIANTS[RECOMMENDED].get("bands", bench.config.bands)
    small = bench.with_cutout(RUN_CUTOUT)
    rates: dict[str, float] = {}
    for size, way in itertools.product(sizes, ("eager", "compiled")[: 1 + bench.config.compile]):
        loader = packed_loader(small, folder / f"run_{bands}.h5", bands, RUN_CUTOUT, 1)
        step = Step(small, RECOMMENDED, dense=True, n=1)
        step.training.loaders["train"] = loader
        sampler, dataset = step.training.sampler, batches.dataset_of(loader)
        each = batches.labelled_in_a_cutout(dataset.samples, sampler.probabilities, RUN_CUTOUT)
        sampler.batch_size = max(1, round(size / each))
        sampler.num_samples = sampler.batch_size * n_steps
        if way == "compiled":
            step.compile()
        for _ in range(2):  # the first compiles, and tries convolutions
            progress = step.training.progress = Progress()
            train_epoch(step.training, Stopper())
        rates[f"run_{size}_{way}"] = progress.seen / progress.seconds
    against = f"the same, {sizes[0]} spaxels per step, eager"
    base = rates[f"run_{sizes[0]}_eager"]
    return [rate_row(name, rate, base, against) for name, rate in rates.items()]


def packed_loader(bench: Bench, path: Path, bands: int, cutout: int, n: int) -> DataLoader:
    """Load `steps` batches of n from packed random cubes, on the device if that is a GPU.

    As many cubes as cutouts per step, up to 16; a disc of a third of their spaxels is labelled.
    """
    side, n_cubes = bench.config.cutout + 10, min(16, bench.cutouts)
    plateifus = [f"1-{i}" for i in range(n_cubes)]
    rng = np.random.default_rng(0)
    if not path.is_file():
        maps = np.arange(1, n_cubes * side**2 + 1, dtype=np.int32).reshape(n_cubes, side, side)
        empty, rows = (
            np.empty((maps.size + 1, bands), np.float16),
            dict(zip(plateifus, maps, strict=True)),
        )
        recipe = pack_cubes.packed_recipe("global", "float16", None, {})
        to_write = PackedCubes(path, empty, rows, dict.fromkeys(plateifus, ""), recipe)
        normals = (rng.standard_normal((side**2, bands), np.float32) for _ in plateifus)
        pack_cubes.write_packed(path, to_write, normals)
    y, x = np.indices((side, side)) - side // 2
    y, x = np.nonzero(np.hypot(y, x) < side / np.sqrt(3 * np.pi))
    galaxy = np.repeat(np.arange(n_cubes, dtype=np.int32), y.size)
    classes = np.random.default_rng(1).integers(6, size=galaxy.size)
    ys, xs = (np.tile(a, n_cubes).astype(np.int32) for a in (y, x))
    row, values = np.full_like(galaxy, -1), np.zeros(galaxy.size, np.float32)
    samples = Samples(plateifus, galaxy, ys, xs, row, classes, values)
    sampler = SpaxelBatchSampler(
        classes, n, balance=True, augment=True, num_samples=n * bench.steps
    )
    spec = PatchSpec("logOH", patch_size=bench.config.patch_size)
    packed = pack_cubes.read_packed(path)
    spectra = batches.as_tensor(packed).to(bench.device)
    dataset = PackedDataset(samples, spec, packed, spectra, cutout, sampler.probabilities)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=batches.collate)


def map_rows(bench: Bench) -> list[Row]:
    """Compare class maps of a whole galaxy: dense against patch-wise, published and recommended."""
    side = bench.config.map_size
    trained = {v: trained_model(bench, v) for v in SHOWN}
    flux = random_spectra(1, side, side, bench.config.bands)[0, 0].permute(1, 2, 0).numpy()

    def class_map(variant: str, patch_wise: bool = False) -> None:
        model = trained[variant]
        values = hsi_proc_fns.normalise(flux, model.spec.patch_norm, model.stats)
        inference.map_answer(model, values, patch_wise).probabilities.argmax(2)

    network, stats = trained[RECOMMENDED].network, trained[RECOMMENDED].stats
    assert isinstance(network, SSFTT)
    assert stats is not None
    whitened = hsi_proc_fns.whitening(stats.components, stats.explained_variance)
    held, mean, components = (
        torch.from_numpy(a.astype(np.float32)).to(bench.device)
        for a in (flux, stats.mean, whitened)
    )

    @torch.inference_mode()
    def on_device() -> None:
        values = (held / held.abs().mean(2, keepdim=True) - mean) @ components.T  # (y, x, K)
        with bench.autocast():
            SSFTT_dense.dense_logits(network, values.permute(2, 0, 1)[None, None]).argmax(1)
        bench.synchronise()

    works: dict[str, Callable[[], object]]
    works = {v: functools.partial(class_map, v) for v in SHOWN}
    took = measuring.in_turn({**works, "on_device": on_device}, bench.config.runs)
    slow = measuring.timed(lambda: class_map("published", True))  # minutes on a CPU: once
    on_cpu = "map_latency_recommended: flux and gaps on the CPU, network in float32"
    table = [
        ("map_latency", took["published"], slow, AGAINST),
        ("map_latency_recommended", took[RECOMMENDED], slow, AGAINST),
        ("map_on_device_recommended", took["on_device"], took[RECOMMENDED], on_cpu),
    ]
    return [make_row(*row[:3], "s", row[3], shape=[side, side]) for row in table]


def evidence_rows(bench: Bench, folder: Path) -> list[Row]:
    """Compare the evidence of a whole galaxy with its map, both from its cube, matched filters."""
    side, bands = bench.config.map_size, bench.config.bands
    wave = np.geomspace(5000, 8000, bands)  # Angstrom, as cubes usually have
    flux = random_spectra(1, side, side, bands)[0, 0].permute(1, 2, 0).numpy()
    path = folder / "cube.h5"
    recipe = Recipe("cube", data_io.CUBE_VERSION)
    data_io.write_cube(path, data_io.Cube(flux, wave, recipe, ivar=np.ones_like(flux)))
    places = line_places(wave)
    network = MatchedFilterNet(MatchedFilterConfig(bands, lines=len(places)))

    def spectra() -> Spectra:
        values = pack_cubes.read_normalised(path, "residual", None).values
        return split(torch.from_numpy(values).to(bench.device))

    residual, weight = (part.flatten(0, 1).cpu() for part in spectra()[:2])
    network.start_filters(residual, weight, places)
    network = network.to(bench.device).eval()

    @torch.inference_mode()
    def galaxy_map() -> None:
        network.map(*spectra()).cpu()

    works = {"map": galaxy_map, "evidence": lambda: evidence.explain(network, spectra())}
    took = measuring.in_turn(works, bench.config.runs)
    against, more = "its map by the same network", {"shape": [side, side]}
    return [make_row("evidence", took["evidence"], took["map"], "s", against, **more)]


def trained_model(bench: Bench, variant: str) -> inference.TrainedModel:
    """Wrap an untrained network for prediction; the components have random directions."""
    network = make_model(bench, variant).eval()
    n, n_bands, stats = network.config.bands, bench.config.bands, None
    if "bands" in VARIANTS[variant]:
        components = np.random.default_rng(0).normal(size=(n, n_bands)) / np.sqrt(n_bands)
        band, component = np.ones(n_bands), np.ones(n)
        recipe = Recipe("statistics", data_io.STATS_VERSION)
        stats = Stats(band, band, band, components, component, component / n, recipe)
    card = describe_model(bench, network, "PCA" if stats else "global")
    return inference.TrainedModel(network, card, stats, bench.device)


def memory_rows(bench: Bench) -> list[Row]:
    """Compare what a step adds in memory, for one cutout and as many patches as its spaxels."""
    n = bench.config.cutout**2
    base = step_memory(bench, "published", False, n)
    against = f"{AGAINST}, as many spaxels ({n})"
    names = {"published": "training_memory", RECOMMENDED: "training_memory_recommended"}
    return [
        make_row(name, step_memory(bench, variant, True, 1), base, "GB", against)
        for variant, name in names.items()
    ]


def step_memory(bench: Bench, variant: str, dense: bool, n: int) -> float:
    """Most memory that model, optimiser, batch and a step take, GB."""
    what = bench._replace(steps=1), variant, dense, n
    if not bench.on_gpu:
        return measuring.peak_in_child(_one_step, *what)[1]
    torch.cuda.empty_cache()
    peak = warm_step(*what).peak_gb
    assert peak is not None
    return peak


def _one_step(bench: Bench, variant: str, dense: bool, n: int) -> None:
    torch.set_num_threads(utils.cpu_count())
    inference.pick_device(bench.device.type)
    Step(bench, variant, dense, n)()


# The profiler


def trace_step(step: Step, lines: int = 12) -> tuple[list[tuple[str, float]], str]:
    """Operations of a training step and their shares of its time, the largest first.

    On a GPU also how busy it was: operations per step, and the share of the time.
    """
    from torch.profiler import ProfilerActivity, profile

    kind, field = ProfilerActivity.CPU, "self_cpu_time_total"
    if step.bench.on_gpu:
        kind, field = ProfilerActivity.CUDA, "self_device_time_total"
    step()
    wall = measuring.timed(step)
    with profile(activities=[kind]) as found:
        step()
    events = [(e.key, float(getattr(e, field)), e.count) for e in found.key_averages()]
    whole = sum(time for _, time, _ in events)
    if not whole:
        raise DataError(
            "torch's profiler saw no time on the device, expected some. Check that profiling is "
            "allowed on this machine."
        )
    count = sum(n for _, time, n in events if time) / step.bench.steps
    busy = f", {count:.0f} operations per step, the GPU busy {whole / 1e6 / wall:.0%} of the time"
    ranked = sorted(events, key=lambda event: -event[1])[:lines]
    return [(name, time / whole) for name, time, _ in ranked], busy if step.bench.on_gpu else ""


def print_traces(bench: Bench) -> None:
    """Print and write where a step's time goes: patch-wise, dense, dense and recommended."""
    kinds = [("published", False, bench), ("published", True, bench), (RECOMMENDED, True, bench)]
    kinds.append((RECOMMENDED, True, bench.with_cutout(RUN_CUTOUT)))
    text = []
    for variant, dense, of in kinds:
        found, busy = trace_step(fitting_step(of, variant, dense))
        mode = f"cutouts {of.config.cutout} wide" if dense else "patch-wise"
        text.append(f"{variant}, {mode}: share of a training step's time{busy}")
        text += [f"{share:8.1%}  {name[:90]}" for name, share in found]
    print("\n".join(text))
    out = bench.config.results / f"trace_{bench.device.type}.txt"
    with utils.atomic_path(out) as part:
        part.write_text("\n".join(text) + "\n")
    print(f"written: {out}")


class Report:
    """What was measured so far, saved after every part in case the run is interrupted."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.rows, self.failed = bench, list[Row](), list[str]()
        self.more: dict[str, Any] = {
            "config": utils.config_dict(bench.config) | {"amp": bench.amp},
            "gpu": torch.cuda.get_device_name() if bench.on_gpu else None,
            "cudnn": torch.backends.cudnn.version(),
        }

    def part(self, name: str, measure: Callable[..., list[Row]], *args: Any) -> None:
        """Add the rows of a part; one that fails is reported, and leaves the others."""
        try:
            self.rows += measure(self.bench, *args)
        except Exception as error:  # whatever torch, its compiler or the driver raise
            log.warning("%s: %s", name, str(error).strip().splitlines()[-1])
            log.debug("%s", name, exc_info=True)
            self.failed.append(name)
        out = self.bench.config.results / f"bench_network_{self.bench.device.type}.json"
        measuring.write_rows(out, self.rows, failed=self.failed, **self.more)
        if self.bench.on_gpu:
            torch.cuda.empty_cache()


def main(config: Config) -> int:
    """Measure, print, write."""
    torch.set_num_threads(utils.cpu_count())
    bench = Bench.of(config)
    if config.trace:
        print_traces(bench)
        return utils.EXIT_DONE
    report, steps = Report(bench), Steps()

    def make(bench: Bench, name: str, variant: str, dense: bool) -> list[Row]:
        steps[name] = fitting_step(bench, variant, dense)
        return []

    def make_small(bench: Bench, variant: str) -> list[Row]:
        return make(bench.with_cutout(config.small_cutout), SMALL + variant, variant, True)

    def training(bench: Bench) -> list[Row]:
        rows, report.more["roofline"] = training_rows(bench, steps)
        return rows

    with tempfile.TemporaryDirectory() as folder:
        if bench.on_gpu:
            report.part("check", check_device)
            report.part("run", run_rows, Path(folder))
        report.part("forward", forward_rows)
        for variant in VARIANTS:
            report.part(f"{variant}, patch-wise", make, variant + PATCH_WISE, variant, False)
            report.part(f"{variant}, dense", make, variant, variant, True)
        for variant in SHOWN:
            report.part(f"{variant}, small cutouts", make_small, variant)
        report.more["per_step"] = {name: step.n for name, step in steps.items()}
        report.part("training", training)
        report.part("matched filters", matched_filters_rows, steps)
        for variant in SHOWN if config.compile else ():
            report.part(f"torch.compile, {variant}", compiled_rows, steps, variant)
        report.part("pipeline", pipeline_rows, Path(folder), steps)
    steps.clear()
    report.part("map", map_rows)
    with tempfile.TemporaryDirectory() as folder:
        report.part("evidence", evidence_rows, Path(folder))
    report.part("memory", memory_rows)
    measuring.print_rows(report.rows)
    if "roofline" in report.more:
        roofline.print_table(report.more["roofline"])
    if report.failed:
        raise DataError(f"not measured: {', '.join(report.failed)}; see the warnings above.")
    return utils.EXIT_DONE


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
