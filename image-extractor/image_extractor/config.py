"""The configuration file: its schema, reading, checking and writing it.

Reads   a configobj file (sections in brackets, `key = value`).
Writes  a commented default file, on request.

`SPEC`, a configspec of configobj, states where in the file each setting is, which values it takes
and, in the comment above it, what it means; configobj's Validator does the checks. The defaults are
those of `settings.Settings`. The default file and the printed schema are made from these two.

    python -m image_extractor.config settings.config --mode config     # write a commented default
    python -m image_extractor.config settings.config --mode val        # check a file
    python -m image_extractor.config --mode spec                       # print the schema
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    # Run as a file, like its historic namesake: start again as a module of the package.
    import pathlib
    import runpy
    import sys

    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])
    runpy.run_module("image_extractor.config", run_name="__main__", alter_sys=True)

import argparse
import difflib
import functools
import math
import re
import sys
from collections.abc import Iterable, Iterator
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

from configobj import ConfigObj, ConfigObjError, Section, validate

from .errors import DataError, UsageError
from .settings import MAPPINGS, TEV_PER_UNIT, Cut, EnergyBins, Settings, selections
from .transaction import write_whole


class ConfigError(UsageError):
    """Every bad key and value of a configuration, one per line."""


_BINS_SPEC = f"""\
# Unit of energy.
units = option({", ".join(TEV_PER_UNIT)})
# linear: min, max and bin_size are energies. log10: they are exponents of ten.
scale = option(linear, log10)
# Lower edge of the first bin.
min = float
# Upper edge of the last bin.
max = float
# Width of a bin. It must divide max - min.
bin_size = float
"""
SPEC = f"""\
# What to learn. gh_class: one group per energy bin. energy_recon: one table, bins as labels.
mode = option(gh_class, energy_recon)
# all: images in the event table. mapped: one image array per telescope, row numbers in tel_map.
storage_mode = option(all, mapped)
# Whether to use the dictionary of bins and cuts if one is given.
use_pkl_dict = boolean

# Images.
[image]
# Channels: charge, then peak time in samples (TIMING modes), then zeros.
mode = option(PIXELS_3C, PIXELS_1C, PIXELS_TIMING_2C, PIXELS_TIMING_3C)
# Each pixel is repeated this many times along both axes.
scale_factor = integer(1)
# Number type. Charges are in 0.01 photo-electrons; those too large saturate and are counted.
dtype = option(uint16, uint32, int16, int32, float32)
# Unit of stored peak times, in samples. 1: whole samples, as historically.
time_unit = float(0.001, 1)
# Position of the channel axis.
dim_order = option(channels_first, channels_last)
# How pixels become an image. auto: square or axial, by the camera. none: a vector of pixels.
mapping = mappings
# Whether pixels are first turned by the angle at which they are mounted, into the camera frame.
derotate = boolean

# Telescopes.
[telescope]
# Which telescopes are stored, e.g. SST+SCT, NectarCam, MSTN-*, 5-12.
type_mode = telescopes
# Types that replace those found from the mirror area, e.g. MSTS-*: MST, 30-39: SST.
types = types

# Energy bins of gh_class: of the reconstructed energy with a dictionary, else of the true energy.
[energy_bins]
{_BINS_SPEC}
# Cuts made by prepare_cuts_dict.py on EventDisplay's results: lower <= value < upper.
[preselection_cuts]
# Mean reduced scaled width.
MSCW = cut
# Mean reduced scaled length.
MSCL = cut
# Chi square of the energy reconstruction.
EChi2S = cut
# Reconstructed energy (TeV).
ErecS = cut
# Height of the emission maximum (km).
EmissionHeight = cut
# Simulated offset from the camera centre (deg).
MC_Offset = cut
# Number of images.
NImages = cut
# Uncertainty of the reconstructed energy (TeV).
dES = cut

# Cuts on the images, made with ctapipe during extraction.
[image_cuts]
# Keep events with at least this many images that pass the cuts below.
min_telescopes = integer(1)
# Minimum charge after cleaning (photo-electrons).
min_intensity = float(0)
# Maximum fraction of the charge in the two outer rings of pixels.
max_leakage = float(0, 1)
# Tailcuts cleaning: minimum charge of a core pixel (photo-electrons).
picture_threshold = float(0)
# Tailcuts cleaning: minimum charge of a boundary pixel (photo-electrons).
boundary_threshold = float(0)

# Only for mode energy_recon.
[energy_recon]
# Keep only gammas.
gamma_only = boolean

# Bins of the true energy.
[[bins]]
{_BINS_SPEC}"""
Place = tuple[str, ...]  # sections and key, e.g. ("energy_recon", "bins", "min")
OLD_SPELLINGS: dict[Place, Place] = {("image", "dim_ordering"): ("image", "dim_order")}
# Where in Settings a section or key of the file is held, if not under the key's own name.
HELD_IN: dict[Place, str] = {
    ("image", "mode"): "image_mode",
    ("energy_bins",): "energy_bins",
    ("preselection_cuts",): "preselection_cuts",
    ("energy_recon", "bins"): "energy_recon_bins",
}
EXPECTED = {
    "boolean": "True | False",
    "cut": "two numbers, the lower first; None for an open bound",
    "mappings": f"{' | '.join(MAPPINGS)}; others for some telescopes, TELESCOPES: METHOD, ...",
    "telescopes": "SST | SCT | LST | MST | ALL | camera | optics | pattern with * or ? | id | "
    "id-id, joined by +",
    "types": "TELESCOPES: TYPE, ... with types of at most 8 letters, digits, - and _",
}


class Key(NamedTuple):
    """One key of the file: its check, as in the configspec, and what it means."""

    check: str
    help: str

    @property
    def expected(self) -> str:
        """The values that the check accepts, in words."""
        name, _, rest = self.check.rstrip(")").partition("(")
        arguments = re.split(r", ?", rest) if rest else []
        if name == "option":
            return " | ".join(arguments)
        words = EXPECTED.get(name) or ("whole number" if name == "integer" else "number")
        if len(arguments) == 2:
            return f"{words} from {arguments[0]} to {arguments[1]}"
        return f"{words} >= {arguments[0]}" if arguments else words


def _integer(value: Any, low: str) -> int:
    return validate.is_integer(int(value) if isinstance(value, Integral) else value, low)


def _number(value: Any, low: str | None = None, high: str | None = None) -> float:
    number = validate.is_float(float(value) if isinstance(value, Real) else value, low, high)
    if math.isnan(number):
        raise validate.VdtTypeError(value)
    return number


def _telescopes(value: Any) -> str:
    return validate.is_string(validate.is_string(value).strip(), 1)


def _list(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else validate.is_string(value)


def _mappings(value: Any) -> str:
    items = _selections(value)
    if not items or any(method not in MAPPINGS for _, method in items):
        raise validate.VdtValueError(value)
    if sum(not telescopes for telescopes, _ in items) > 1:
        raise validate.VdtValueError(value)
    return _list(value)


def _types(value: Any) -> str:
    for telescopes, kind in _selections(value):
        if not telescopes or not re.fullmatch(r"[\w-]{1,8}", kind, re.ASCII):
            raise validate.VdtValueError(value)
    return _list(value)


def _selections(value: Any) -> list[tuple[str, str]]:
    try:
        return selections(_list(value))
    except ValueError:
        raise validate.VdtValueError(value) from None


def _cut(value: Any) -> list[Any]:
    """Read `lower, upper` or `column, ..., lower, upper`; parentheses are allowed."""
    items = value if isinstance(value, list) else [value]
    words = [w.strip("()[]'\" ") if isinstance(w, str) else w for w in items]
    words = [w for w in words if w != ""]
    if len(words) < 2:
        raise validate.VdtTypeError(value)
    low, high = (None if w in (None, "None") else _number(w) for w in words[-2:])
    if low is not None and high is not None and high <= low:
        raise validate.VdtValueError(value)
    return [*words[:-2], low, high]


_VALIDATOR = validate.Validator(
    {
        "integer": _integer,
        "float": _number,
        "telescopes": _telescopes,
        "mappings": _mappings,
        "types": _types,
        "cut": _cut,
    }
)


def _walk(node: Any, above: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every key and section below a section, with its place."""
    for name, value in node.items():
        yield (*above, name), value
        if isinstance(value, Section):
            yield from _walk(value, (*above, name))


def _read_spec() -> tuple[dict[Place, Key], dict[Place, str]]:
    """Keys and sections of SPEC, with what the comment above each says."""
    spec = ConfigObj(SPEC.splitlines(), interpolation=False, list_values=False, _inspec=True)
    spec.comments[spec.scalars[0]] = spec.initial_comment
    keys, sections = {}, {}
    for place, value in _walk(spec):
        node = functools.reduce(lambda section, name: section[name], place[:-1], spec)
        comment = node.comments[place[-1]][-1].removeprefix("# ")
        if isinstance(value, Section):
            sections[place] = comment
        else:
            keys[place] = Key(value, comment)
    return keys, sections


SCHEMA, SECTIONS = _read_spec()


def load_config(path: str | Path) -> Settings:
    """Read and check a configuration file.

    Raises
    ------
    ConfigError
        Naming every unknown key and every bad value, one per line.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such configuration file. Write one with: "
            f"image-extractor config {path} --mode config"
        )
    try:
        return parse_config(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read as text ({error}). Give a configuration file in UTF-8."
        ) from error


def parse_config(text: str, where: str) -> Settings:
    """Read and check the text of a configuration file; `where` begins each error message."""
    try:
        tree = ConfigObj(text.splitlines(), interpolation=False)
    except ConfigObjError as error:
        details = [str(e) for e in getattr(error, "errors", None) or [error]]
        raise ConfigError("\n".join(f"{where}: {d} Correct it." for d in details)) from error
    problems: list[str] = []
    given: dict[Place, Any] = {}
    for place, value in _walk(tree):
        if place[1:] and place[:-1] not in SECTIONS:
            continue  # its section is unknown and named already
        kind, known = ("section", SECTIONS) if isinstance(value, Section) else ("key", SCHEMA)
        key = OLD_SPELLINGS.get(place, place)
        if key not in known:
            problems.append(f"{_show(place)}: unknown {kind}{_nearest(place, known)}")
        elif kind == "key" and given.setdefault(key, value) != value:
            problems.append(
                f"{_show(place)} = {_as_words(value)}: given as {_as_words(given[key])} under "
                "another name of the same setting (expected one value). Leave one of them out"
            )
    return _checked(given, problems, where)


def checked(settings: Settings) -> Settings:
    """Put settings made in Python through the checks of a file. Raises ConfigError."""
    return _checked(values(settings), [], "settings")


def _checked(given: dict[Place, Any], problems: list[str], where: str) -> Settings:
    """Check the given values, take defaults for the others; report all problems together."""
    defaults = values(Settings())
    members: dict[str, Any] = {}
    for place, key in SCHEMA.items():
        try:
            value = given.get(place, defaults[place])
            if value is None:  # the Validator lets None pass
                raise validate.VdtTypeError(value)
            value = _VALIDATOR.check(key.check, value)
        except validate.ValidateError:
            default = _as_words(defaults[place])
            problems.append(
                f"{_show(place)} = {_as_words(given[place])}: not a valid value "
                f"(expected {key.expected}). Correct it; the default is {default}"
            )
            value = _VALIDATOR.check(key.check, defaults[place])
        if key.check == "cut":
            columns = tuple(value[:-2]) or Settings().preselection_cuts[place[-1]].columns
            value = Cut(columns, *value[-2:])
        section = HELD_IN.get(place[:-1])
        if section:
            members.setdefault(section, {})[place[-1]] = value
        else:
            members[HELD_IN.get(place, place[-1])] = value
    for sections in (("energy_bins",), ("energy_recon", "bins")):
        bins = members[HELD_IN[sections]] = EnergyBins(**members[HELD_IN[sections]])
        name = "".join(f"[{s}]" for s in sections)
        problems += [f"{name} {p}. Change min, max or bin_size" for p in bins.problems()]
    if problems:
        raise ConfigError("\n".join(f"{where}: {p}." for p in problems))
    return Settings(**members)


def values(settings: Settings) -> dict[Place, Any]:
    """Values of all keys of the file, in its order; cuts as [column, ..., low, high]."""
    found: dict[Place, Any] = {}
    for place in SCHEMA:
        name, section = place[-1], HELD_IN.get(place[:-1])
        if section is None:
            found[place] = getattr(settings, HELD_IN.get(place, name))
        elif isinstance(holder := getattr(settings, section), EnergyBins):
            found[place] = getattr(holder, name)
        else:
            cut = holder.get(name, Cut((name,), None, None))  # a cut that is left out is open
            columns = () if cut.columns == (name,) else cut.columns
            found[place] = [*columns, cut.low, cut.high]
    return found


def differences(ours: Settings, theirs: Settings) -> list[str]:
    """Each setting that differs, with both values."""
    a, b = values(ours), values(theirs)
    return [
        f"{_show(place)} = {_as_words(a[place])}, not {_as_words(b[place])}"
        for place in SCHEMA
        if a[place] != b[place]
    ]


def _show(place: Place) -> str:
    return "".join(f"[{p}]" for p in place[:-1]) + (" " if place[1:] else "") + place[-1]


def _as_words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _nearest(place: Place, known: Iterable[Place]) -> str:
    names = {".".join(k): k for k in known}
    close = difflib.get_close_matches(".".join(place), names, 1, 0.6)
    return f", perhaps {_show(names[close[0]])}. Correct its name" if close else ". Remove it"


def as_text(settings: Settings | None = None, comments: bool = True) -> str:
    """Write the configuration file with these settings (the defaults if None)."""
    tree = ConfigObj(indent_type="")
    if comments:
        tree.initial_comment = [
            "# Settings of image_extractor.py. Keys may be left out: they then take their defaults."
        ]
    for place, value in values(settings or Settings()).items():
        node = tree
        for depth, name in enumerate(place[:-1], 1):
            if name not in node:
                node[name] = {}
                node.comments[name] = ["", f"# {SECTIONS[place[:depth]]}"][: 1 + comments]
            node = node[name]
        node[place[-1]] = value
        if comments:
            key = SCHEMA[place]
            node.comments[place[-1]] = [f"# {key.help} ({key.expected})"]
    return "\n".join(tree.write()) + "\n"


def spec_text() -> str:
    """Write the schema, one line per key: place, values, default, meaning."""
    defaults = values(Settings())
    rows = [(_show(p), k.expected, _as_words(defaults[p]), k.help) for p, k in SCHEMA.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(r, [*widths, 0], strict=True)).rstrip() for r in rows
    )


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Write a default configuration, check one, or print the schema; return the exit code."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write a commented default configuration, check a file, or print the schema.",
    )
    parser.add_argument("file", nargs="?", type=Path, help="configuration file")
    parser.add_argument(
        "--mode",
        choices=("config", "val", "spec"),
        default="val",
        help="config: write FILE; val: check FILE; spec: print the schema (default: val)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="let --mode config replace an existing FILE"
    )
    args = parser.parse_args(argv)
    if args.mode == "spec":
        print(spec_text())
        return 0
    if args.file is None:
        parser.error(f"--mode {args.mode} needs a FILE")
    try:
        if args.mode == "val":
            load_config(args.file)
        elif args.file.exists() and not args.overwrite:
            raise UsageError(f"{args.file}: exists already. Give --overwrite to replace it.")
        else:
            write_whole(args.file, as_text().encode())
    except DataError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    print(f"{args.file}: {'valid' if args.mode == 'val' else 'written'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
