"""Settings: the configuration file, its schema, its checks.

Reads   a configobj file (sections in brackets, `key = value`).
Writes  a commented default file, on request.

The dataclass `Settings` is the whole configuration with its defaults; `SCHEMA` says where in the
file each setting is, what it may be and what it means. The default file, the printed schema and
the checks are made from these two.

    python -m image_extractor.config settings.config --mode config     # write a commented default
    python -m image_extractor.config settings.config --mode val        # check a file
    python -m image_extractor.config --mode spec                       # print the schema

This module imports nothing of the package, so that it can be run as a file, as its historic
namesake was.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from configobj import ConfigObj, ConfigObjError, Section

TEV_PER_UNIT = {"eV": 1e-12, "MeV": 1e-6, "GeV": 1e-3, "TeV": 1.0}
MAX_BINS = 255  # the bin label is one byte
MAPPINGS = ("auto", "square", "axial", "oversampling", "rebin", "nearest", "bilinear", "none")


class ConfigError(ValueError):
    """Every bad key and value of a configuration, one a line."""


@dataclass(frozen=True)
class EnergyBins:
    """Energy bins: `scale` linear or log10, edges from `min` to `max` in `units`."""

    units: str = "TeV"
    scale: str = "log10"
    min: float = -1.0
    max: float = 1.0
    bin_size: float = 0.5

    def edges(self) -> list[float]:
        """Bin edges in the configured scale and units; the last is exactly `max`."""
        n = self.count()
        return [self.min + i * (self.max - self.min) / n for i in range(n)] + [self.max]

    def edges_tev(self) -> list[float]:
        """Bin edges in TeV."""
        unit = TEV_PER_UNIT[self.units]
        return [(10.0**e if self.scale == "log10" else e) * unit for e in self.edges()]

    def count(self) -> int:
        """Count the bins: rounded, since (0.3 - -2) / 0.1 is 22.999999999999996."""
        return round((self.max - self.min) / self.bin_size)

    def problems(self) -> list[str]:
        """Say what is wrong with the three numbers together."""
        if not (math.isfinite(self.min) and math.isfinite(self.max) and self.max > self.min):
            return [f"min = {self.min} and max = {self.max}: max must be above min"]
        if not (math.isfinite(self.bin_size) and self.bin_size > 0):
            return [f"bin_size = {self.bin_size}: must be above 0"]
        n = (self.max - self.min) / self.bin_size
        if abs(n - round(n)) > 1e-6 * max(1.0, n) or round(n) < 1:
            return [f"bin_size = {self.bin_size}: does not divide {self.min} .. {self.max}"]
        if round(n) > MAX_BINS:
            return [f"bin_size = {self.bin_size}: makes {round(n)} bins, at most {MAX_BINS} fit"]
        if self.scale == "linear" and self.min < 0:
            return [f"min = {self.min}: a linear energy cannot be negative"]
        return []


@dataclass(frozen=True)
class Cut:
    """Half-open: `low` <= value < `high`; None is open. Several columns add in quadrature."""

    columns: tuple[str, ...]
    low: float | None
    high: float | None


def _historic_cuts() -> dict[str, Cut]:
    return {
        "MSCW": Cut(("MSCW",), -2.0, 2.0),
        "MSCL": Cut(("MSCL",), -2.0, 5.0),
        "EChi2S": Cut(("EChi2S",), 0.0, None),
        "ErecS": Cut(("ErecS",), 0.0, None),
        "EmissionHeight": Cut(("EmissionHeight",), 0.0, 50.0),
        "MC_Offset": Cut(("MCxoff", "MCyoff"), 0.0, 3.0),
        "NImages": Cut(("NImages",), 3.0, None),
        "dES": Cut(("dES",), 0.0, None),
    }


@dataclass(frozen=True)
class Settings:
    """Everything a run is told, apart from files. Defaults are those of the historic schema."""

    mode: str = "gh_class"
    storage_mode: str = "all"
    use_pkl_dict: bool = True
    image_mode: str = "PIXELS_3C"
    scale_factor: int = 2
    dtype: str = "uint16"
    dim_order: str = "channels_last"
    mapping: str = "auto"
    type_mode: str = "SCT"
    energy_bins: EnergyBins = EnergyBins()
    preselection_cuts: dict[str, Cut] = field(default_factory=_historic_cuts)
    gamma_only: bool = True
    energy_recon_bins: EnergyBins = EnergyBins(min=-2.0, max=2.0, bin_size=0.05)
    min_telescopes: int = 1
    min_intensity: float = 0.0
    max_leakage: float = 1.0
    picture_threshold: float = 10.0
    boundary_threshold: float = 5.0

    @property
    def bins(self) -> EnergyBins:
        """Energy bins of the mode: of its groups (gh_class) or of its label (energy_recon)."""
        return self.energy_bins if self.mode == "gh_class" else self.energy_recon_bins


class Allowed(NamedTuple):
    """What a key may be: a check, which raises ValueError, and the same in words."""

    check: Callable[[Any], Any]
    words: str


def _option(*choices: str) -> Allowed:
    def check(value: Any) -> str:
        for choice in choices:
            if str(value) == choice:
                return choice
        raise ValueError(f"choose one of {', '.join(choices)}")

    return Allowed(check, " | ".join(choices))


def _boolean(value: Any) -> bool:
    known = {"true": True, "yes": True, "on": True, "1": True}
    known |= {"false": False, "no": False, "off": False, "0": False}
    if str(value).strip().lower() not in known:
        raise ValueError("write True or False")
    return known[str(value).strip().lower()]


def _integer(low: int) -> Allowed:
    def check(value: Any) -> int:
        try:
            number = int(str(value))
        except ValueError:
            raise ValueError(f"write a whole number, {low} or more") from None
        if number < low:
            raise ValueError(f"must be {low} or more")
        return number

    return Allowed(check, f"whole number >= {low}")


def _number(low: float = -math.inf, high: float = math.inf) -> Allowed:
    def check(value: Any) -> float:
        try:
            number = float(str(value))
        except ValueError:
            raise ValueError("write a number") from None
        if not low <= number <= high:
            raise ValueError(f"must be between {low} and {high}")
        return number

    words = "number" if low == -math.inf else f"number >= {low:g}"
    return Allowed(check, words if high == math.inf else f"{low:g} .. {high:g}")


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("write one word, such as SCT or LST+MST")
    return value.strip()


def _cut(default_columns: tuple[str, ...]) -> Allowed:
    """Read `low, high` or `column, ..., low, high`; None is open; parentheses are allowed."""

    def check(value: Any) -> Cut:
        words = [
            str(v).strip().strip("()[]'\" ")
            for v in (value if isinstance(value, list) else [value])
        ]
        words = [w for w in words if w]
        if len(words) < 2:
            raise ValueError("write a lower and an upper bound, None for an open one")
        bounds = []
        for word in words[-2:]:
            try:
                bounds.append(None if word == "None" else float(word))
            except ValueError:
                raise ValueError(f"{word!r} is neither a number nor None") from None
        low, high = bounds
        if low is not None and high is not None and high <= low:
            raise ValueError("the upper bound must be above the lower")
        return Cut(tuple(words[:-2]) or default_columns, low, high)

    return Allowed(check, "lower, upper")


@dataclass(frozen=True)
class Key:
    """One setting of the file: where it is, what it may be, what it means.

    `attribute` is that of Settings which holds it; "" if it has the key's own name.
    """

    path: tuple[str, ...]
    allowed: Allowed
    help: str
    attribute: str = ""

    def text(self, settings: Settings) -> str:
        """Write the value that the settings have, as in a file."""
        name = self.path[-1]
        value = getattr(settings, self.attribute or name)
        if isinstance(value, EnergyBins):
            value = getattr(value, name)
        elif isinstance(value, dict):
            cut = value.get(name, Cut((name,), None, None))  # none is an open one
            columns = () if cut.columns == (name,) else cut.columns
            return ", ".join([*columns, str(cut.low), str(cut.high)])
        return str(value)

    def put(self, settings: Settings, value: Any) -> Settings:
        """Give the settings with this one changed."""
        name = self.path[-1]
        whole = getattr(settings, self.attribute or name)
        if isinstance(whole, EnergyBins):
            value = replace(whole, **{name: value})
        elif isinstance(whole, dict):
            value = {**whole, name: value}
        return replace(settings, **{self.attribute or name: value})


def _bins(path: tuple[str, ...], attribute: str) -> list[Key]:
    rows = [
        ("units", _option(*TEV_PER_UNIT), "Unit of energy."),
        ("scale", _option("linear", "log10"), "log10: the numbers below are exponents of ten."),
        ("min", _number(), "Lower edge of the first bin."),
        ("max", _number(), "Upper edge of the last bin."),
        ("bin_size", _number(), "Width of a bin; must divide max - min."),
    ]
    return [Key((*path, name), allowed, text, attribute) for name, allowed, text in rows]


def _cuts() -> list[Key]:
    meaning = {
        "MSCW": "Mean reduced scaled width.",
        "MSCL": "Mean reduced scaled length.",
        "EChi2S": "Chi square of the energy reconstruction.",
        "ErecS": "Reconstructed energy (TeV).",
        "EmissionHeight": "Height of the emission maximum (km).",
        "MC_Offset": "Simulated offset from the camera centre (deg).",
        "NImages": "Number of images.",
        "dES": "Uncertainty of the reconstructed energy (TeV).",
    }
    return [
        Key(("preselection_cuts", name), _cut(cut.columns), meaning[name], "preselection_cuts")
        for name, cut in Settings().preselection_cuts.items()
    ]


_BOOLEAN = Allowed(_boolean, "True | False")
SCHEMA: list[Key] = [
    Key(
        ("mode",),
        _option("gh_class", "energy_recon"),
        "gh_class: a group an energy bin. energy_recon: one table, its energy bin as a label.",
    ),
    Key(
        ("storage_mode",),
        _option("all", "mapped"),
        "all: images in the event table. mapped: an image array a telescope, row numbers in "
        "tel_map.",
    ),
    Key(("use_pkl_dict",), _BOOLEAN, "Use the dictionary of bins and cuts when one is given."),
    Key(
        ("image", "mode"),
        _option("PIXELS_3C", "PIXELS_1C", "PIXELS_TIMING_2C", "PIXELS_TIMING_3C"),
        "Channels: charge, then peak time in samples (TIMING), then zeros.",
        "image_mode",
    ),
    Key(
        ("image", "scale_factor"),
        _integer(1),
        "Each pixel is repeated this many times along both axes.",
    ),
    Key(
        ("image", "dtype"),
        _option("uint16", "uint32", "int16", "int32", "float32"),
        "Stored number. Charges are in 0.01 photo-electrons; what does not fit saturates and is "
        "counted.",
    ),
    Key(
        ("image", "dim_order"),
        _option("channels_first", "channels_last"),
        "Where the channel axis is.",
    ),
    Key(
        ("image", "mapping"),
        _option(*MAPPINGS),
        "How pixels become a picture. auto: square or axial, by the camera. none: vectors of "
        "pixels.",
    ),
    Key(
        ("telescope", "type_mode"),
        Allowed(_text, "SST | SCT | LST | MST | ALL | camera | id, joined by +"),
        "Which telescopes are stored, e.g. SST+SCT, NectarCam, 5-12.",
    ),
    *_bins(("energy_bins",), "energy_bins"),
    *_cuts(),
    Key(
        ("image_cuts", "min_telescopes"),
        _integer(1),
        "Keep events with at least this many images that pass the cuts below.",
    ),
    Key(
        ("image_cuts", "min_intensity"),
        _number(0.0),
        "Least charge after cleaning (photo-electrons).",
    ),
    Key(
        ("image_cuts", "max_leakage"),
        _number(0.0, 1.0),
        "Largest share of the charge in the two outer rings of pixels.",
    ),
    Key(
        ("image_cuts", "picture_threshold"),
        _number(0.0),
        "Tailcuts cleaning: charge of a core pixel (photo-electrons).",
    ),
    Key(
        ("image_cuts", "boundary_threshold"),
        _number(0.0),
        "Tailcuts cleaning: charge of a boundary pixel (photo-electrons).",
    ),
    Key(
        ("energy_recon", "gamma_only"),
        _BOOLEAN,
        "energy_recon: leave out everything but gammas.",
    ),
    *_bins(("energy_recon", "bins"), "energy_recon_bins"),
]
OLD_SPELLINGS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("image", "dim_ordering"): ("image", "dim_order")
}
SECTION_HELP = {
    ("image",): "Pictures.",
    ("telescope",): "Telescopes.",
    (
        "energy_bins",
    ): "Energy bins of gh_class; an event goes to the bin of its reconstructed energy.",
    (
        "preselection_cuts",
    ): "Cuts that prepare_cuts_dict.py makes on EventDisplay's results, lower <= value < upper.",
    ("image_cuts",): "Cuts on the images themselves, made with ctapipe while extracting.",
    ("energy_recon",): "Only for mode energy_recon.",
    ("energy_recon", "bins"): "Bins of the true energy.",
}


def load_config(path: str | Path) -> Settings:
    """Read and check a configuration file.

    Raises
    ------
    ConfigError
        Naming every unknown key and every bad value, one a line.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file. Write one with --mode config.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        tree = ConfigObj(lines, interpolation=False)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({error}).") from error
    except ConfigObjError as error:
        details = [str(e) for e in getattr(error, "errors", None) or [error]]
        raise ConfigError("\n".join(f"{path}: {d}" for d in details)) from error
    return parse_config(tree, str(path))


def parse_config(tree: dict[str, Any], where: str = "configuration") -> Settings:
    """Check a nested dict of raw values; missing keys take their defaults. Raises ConfigError."""
    known = {key.path: key for key in SCHEMA}
    sections = {path[:n] for path in known for n in range(1, len(path))}
    problems: list[str] = []
    raw: dict[tuple[str, ...], Any] = {}

    def visit(node: dict[str, Any], prefix: tuple[str, ...]) -> None:
        for name, value in node.items():
            path = (*prefix, name)
            if isinstance(value, (Section, dict)):
                if path in sections:
                    visit(value, path)
                else:
                    problems.append(f"{_show(path)}: unknown section{_nearest(path, sections)}")
                continue
            target = OLD_SPELLINGS.get(path, path)
            if target not in known:
                problems.append(f"{_show(path)}: unknown key{_nearest(path, set(known))}")
            elif target in raw and str(raw[target]) != str(value):
                problems.append(f"{_show(path)} = {value}: {_show(target)} says {raw[target]}")
            else:
                raw[target] = value

    visit(tree, ())
    settings = Settings()
    for key in SCHEMA:
        if key.path in raw:
            try:
                settings = key.put(settings, key.allowed.check(raw[key.path]))
            except ValueError as error:
                problems.append(f"{_show(key.path)} = {_flat(raw[key.path])}: {error}")
    problems += [f"[energy_bins] {p}" for p in settings.energy_bins.problems()]
    problems += [f"[energy_recon][bins] {p}" for p in settings.energy_recon_bins.problems()]
    if problems:
        raise ConfigError("\n".join(f"{where}: {p}." for p in problems))
    return settings


def _show(path: tuple[str, ...]) -> str:
    return "".join(f"[{p}]" for p in path[:-1]) + (" " if path[1:] else "") + path[-1]


def _flat(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _nearest(path: tuple[str, ...], known: set[tuple[str, ...]]) -> str:
    import difflib

    names = {".".join(k): k for k in known}
    close = difflib.get_close_matches(".".join(path), names, 1, 0.6)
    return f", perhaps {_show(names[close[0]])}" if close else ""


def as_text(settings: Settings | None = None, comments: bool = True) -> str:
    """Write the configuration file that says these settings (the defaults if None)."""
    settings = settings or Settings()
    lines = [
        "# Settings of image_extractor.py. Lines may be left out: the defaults are those shown."
    ]
    lines = lines if comments else []
    section: tuple[str, ...] = ()
    for key in SCHEMA:
        parent = key.path[:-1]
        if parent != section:
            for depth in range(1, len(parent) + 1):
                if parent[:depth] != section[:depth]:
                    lines += [""] + ([f"# {SECTION_HELP[parent[:depth]]}"] if comments else [])
                    lines.append("[" * depth + parent[depth - 1] + "]" * depth)
            section = parent
        if comments:
            lines.append(f"# {key.help} ({key.allowed.words})")
        lines.append(f"{key.path[-1]} = {key.text(settings)}")
    return "\n".join(lines) + "\n"


def spec_text() -> str:
    """Write the schema, a line a key."""
    rows = [(_show(k.path), k.allowed.words, k.text(Settings()), k.help) for k in SCHEMA]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(r, [*widths, 0], strict=True)).rstrip() for r in rows
    )


def main(argv: list[str] | None = None) -> int:
    """Write a default configuration, check one, or print the schema."""
    parser = argparse.ArgumentParser(
        description="Write a commented default configuration, check a file, or print the schema."
    )
    parser.add_argument("file", nargs="?", type=Path, help="configuration file")
    parser.add_argument(
        "--mode",
        choices=("config", "val", "spec"),
        default="val",
        help="config: write FILE; val: check FILE; spec: print the schema",
    )
    parser.add_argument("--overwrite", action="store_true", help="let --mode config replace FILE")
    args = parser.parse_args(argv)
    if args.mode == "spec":
        print(spec_text())
        return 0
    if args.file is None:
        parser.error(f"--mode {args.mode} needs a FILE")
    if args.mode == "config":
        if args.file.exists() and not args.overwrite:
            print(f"{args.file}: exists. Give --overwrite to replace it.", file=sys.stderr)
            return 2
        try:
            write_atomically(args.file, as_text().encode())
        except OSError as error:
            print(f"{args.file}: cannot be written ({error.strerror}).", file=sys.stderr)
            return 1
        print(f"{args.file}: written")
        return 0
    try:
        load_config(args.file)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{args.file}: valid")
    return 0


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file by way of a hidden neighbour; devices such as /dev/stdout directly."""
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    path = path.resolve()  # of a symbolic link, the file is replaced
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


if __name__ == "__main__":
    sys.exit(main())
