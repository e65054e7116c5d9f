"""The command line: extracting (the historic command) and looking at the results.

    image_extractor.py "/data/*.simtel.gz" out.h5 settings.config bins.pkl --shuffle --split
    image-extractor inspect out.h5
    image-extractor plot out.h5 --event 3 --output event.png
    image-extractor gallery out.h5 --output gallery.png
    image-extractor validate out.h5
    image-extractor merge a.h5 b.h5 --output all.h5
    image-extractor export out.h5 --output out.dl1.h5
    image-extractor config settings.config --mode config

Exit codes: 0 done; 1 a problem with the data (everything usable has been written); 2 wrong usage or
configuration; 130 stopped by a signal.
"""

from __future__ import annotations

import argparse
import glob
import json
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import __version__
from .errors import DataError, UsageError

DEFAULT_FRACTIONS = {"Training": 0.9, "Validation": 0.1, "Test": 0.0}
COMMANDS = {
    "extract": "extract images from simtel files (the same as image_extractor.py)",
    "inspect": "describe a data set",
    "plot": "draw the images of an event",
    "gallery": "draw random images of each class and telescope type, and distributions",
    "validate": "check a data set",
    "merge": "merge data sets, or split one",
    "export": "export a data set to ctapipe's DL1 format",
    "config": "write a configuration, or check one",
}


def commands(argv: list[str] | None = None) -> int:
    """Run `image-extractor COMMAND ...`; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    listed = "\n".join(f"  {name:10}{what}" for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="image-extractor",
        usage="image-extractor [--help] [--version] COMMAND ...",
        description=f"Image data sets from simtel files. Commands:\n{listed}",
        epilog="image-extractor COMMAND --help describes a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"image-extractor {__version__}")
    if not argv or argv[0] not in COMMANDS:
        parser.parse_known_args(argv)  # --help and --version end here
        given = f"{argv[0]!r} is not a command" if argv else "no command"
        parser.error(f"{given} (expected {', '.join(COMMANDS)}). Give one of these first.")
    return main(argv)


def main(argv: list[str] | None = None) -> int:
    """Run a command, `extract` if none is named; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv and argv[0] in COMMANDS else "extract"
    rest = argv[1:] if argv and argv[0] in COMMANDS else argv
    if command == "config":
        from . import config

        return config.main(rest, "image-extractor config")
    make_parser, run = {
        "extract": (_extract_parser, _extract),
        "inspect": (_inspect_parser, _inspect),
        "plot": (_plot_parser, _plot),
        "gallery": (_gallery_parser, _gallery),
        "validate": (_validate_parser, _validate),
        "merge": (_merge_parser, _merge),
        "export": (_export_parser, _export),
    }[command]
    args = make_parser().parse_args(rest)
    logging.basicConfig(
        level=logging.DEBUG if args.debug else logging.INFO,
        format="%(message)s",
        stream=sys.stderr,
        force=True,
    )
    for noisy in ("matplotlib", "numba", "numexpr", "PIL", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    _stop_asked.clear()
    previous = {n: signal.signal(n, _stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        return run(args)
    except KeyboardInterrupt:
        print("Stopped. The output is as it was before.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except DataError as error:
        if args.debug:
            raise
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


_stop_asked = threading.Event()


def _stop(*_: Any) -> None:
    """Stop at Ctrl-C or SIGTERM.

    The error is not an Exception, because the libraries below catch those (numba while it loads
    its extensions, the reader of damaged files). Where one swallows even this, as code called from
    C does, `_go_on` raises it again.
    """
    _stop_asked.set()
    raise KeyboardInterrupt


def _go_on() -> None:
    """Raise KeyboardInterrupt if the process has been asked to stop."""
    if _stop_asked.is_set():
        raise KeyboardInterrupt


def _extract_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="image_extractor.py",
        description="Extract images from simtel files to an HDF5 data set. "
        "Other commands: image-extractor "
        f"{{{','.join(c for c in COMMANDS if c != 'extract')}}} --help",
    )
    parser.add_argument("--version", action="version", version=f"image_extractor.py {__version__}")
    add = parser.add_argument
    add("path_to_simtel_files", help='a simtel file, or a quoted pattern: "/data/*.simtel.gz"')
    add("output_file", type=Path, help="HDF5 file; created, or appended to if it exists")
    add(
        "config_file",
        type=Path,
        help="configuration (write one with: image-extractor config FILE --mode config)",
    )
    add(
        "bins_cuts_dict",
        nargs="?",
        type=Path,
        help="dictionary of bins and cuts: .pkl, .json or .h5",
    )
    add(
        "--bins_cuts_dict",
        "--bins_cuts_dict_file",
        "--bins-cuts-dict",
        dest="bins_cuts_dict_option",
        metavar="BINS_CUTS_DICT",
        type=Path,
        help="the dictionary given as an option instead",
    )
    add(
        "--max_events",
        "--max-events",
        type=_whole_number(1),
        help="maximum number of events taken from each file, including those already in the output",
    )
    _add_arrangement(parser)
    add(
        "--jobs",
        type=_whole_number(1),
        default=1,
        help="number of processes, each extracting whole files (default: 1; at most one less than "
        "there are cores, because each uses more than one)",
    )
    add("--overwrite", action="store_true", help="replace the output instead of appending to it")
    add(
        "--compression",
        choices=("gzip", "none", "blosc-lz4", "blosc-zstd"),
        default="gzip",
        help="compression of the output (default: gzip, which every HDF5 reader can open)",
    )
    add("--summary", type=Path, help="JSON file to which the summary is written as well")
    add("--debug", action="store_true", help="print more messages, and tracebacks of errors")
    return parser


def _add_arrangement(parser: argparse.ArgumentParser) -> None:
    """Add the options of shuffling and splitting."""
    add = parser.add_argument
    add("--shuffle", action="store_true", help="put the events in random order")
    add(
        "--split",
        action="store_true",
        help="split the table Events into Events_Training, Events_Validation and Events_Test",
    )
    add(
        "--split-fractions",
        "--split_fractions",
        type=_fractions,
        metavar="NAME=FRACTION,...",
        help="parts of --split and their fractions (default: Training=0.9,Validation=0.1,Test=0)",
    )
    add(
        "--split-by",
        "--split_by",
        choices=("shower", "event"),
        default="shower",
        help="shower: all uses of a simulated shower go to the same part, and each part has its "
        "fraction of every particle class and energy range; event: events are drawn singly, as "
        "historically, so that parts share showers (default: shower)",
    )
    add(
        "--stratify",
        action="store_true",
        help="with --split-by event, divide each particle class in the fractions of --split",
    )
    add(
        "--seed",
        type=_whole_number(0),
        default=0,
        help="random seed of --shuffle and --split (default: 0)",
    )


def _whole_number(low: int) -> Callable[[str], int]:
    def check(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text}: expected a whole number >= {low}")
        return int(text)

    return check


def _fractions(text: str) -> dict[str, float]:
    parts: dict[str, float] = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        try:
            fraction = float(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{item!r}: expected NAME=FRACTION") from None
        if not name.isidentifier() or name in parts or not 0 <= fraction <= 1:
            raise argparse.ArgumentTypeError(
                f"{item!r}: expected NAME=FRACTION with each name once and fractions from 0 to 1"
            )
        parts[name] = fraction
    if not math.isclose(sum(parts.values()), 1.0, abs_tol=1e-6):
        raise argparse.ArgumentTypeError(
            f"the fractions add up to {sum(parts.values()):g}, expected 1"
        )
    return parts


def _extract(args: argparse.Namespace) -> int:
    from .config import load_config

    log = logging.getLogger(__name__)
    started = time.perf_counter()
    settings = load_config(args.config_file)
    arrangement = _arrangement(args)
    given = [p for p in (args.bins_cuts_dict, args.bins_cuts_dict_option) if p is not None]
    if len(set(given)) > 1:
        raise UsageError(
            f"two dictionaries: {given[0]} and {given[1]} (expected one). Leave one out."
        )
    pattern = str(Path(args.path_to_simtel_files).expanduser())
    files = [Path(p) for p in sorted(glob.glob(pattern, recursive=True)) if not Path(p).is_dir()]
    if not files and Path(pattern).is_file():  # a name with brackets in it
        files = [Path(pattern)]
    if not files and Path(pattern).is_dir():
        raise UsageError(
            f'{pattern}: is a folder (expected files). Give its files: "{pattern}/*.simtel.gz".'
        )
    if not files:
        raise UsageError(
            f"{args.path_to_simtel_files}: no such file. "
            'Check the path; put patterns in quotes: "/data/*.simtel.gz".'
        )
    if any(p.resolve() == args.output_file.resolve() for p in files):
        raise UsageError(f"{args.output_file}: is also an input file. Give another output.")
    if args.summary and (args.summary.is_dir() or not args.summary.parent.is_dir()):
        raise UsageError(
            f"{args.summary}: is a folder, or in a folder that does not exist. Give another file."
        )
    if args.output_file.is_file() and not args.overwrite:
        _refuse_damage(args, args.output_file, "nothing can be appended")

    from tqdm import tqdm

    from . import image_extractor, layout, report
    from .cuts import load_cuts
    from .transaction import write_whole

    cuts = load_cuts(given[0]) if given and settings.use_pkl_dict else None
    log.info(
        "image_extractor %s: extracting %d file(s) to %s", __version__, len(files), args.output_file
    )
    if cuts is not None:
        log.info("%s: lists %d events that passed the cuts", given[0], len(cuts))
    elif given:
        log.info("%s: not used, because use_pkl_dict = False in the configuration", given[0])
    elif settings.mode == "gh_class":
        log.info(
            "no dictionary of bins and cuts: all events are kept and binned by their true energy"
        )
    jobs = min(args.jobs, max(1, _cores() - 1))
    if jobs < args.jobs:
        log.info(
            "--jobs %d: extracting with %d, because one process uses more than one of the %d cores",
            args.jobs,
            jobs,
            _cores(),
        )
    extractor = image_extractor.ImageExtractor(
        args.output_file,
        cuts,
        settings=settings,
        overwrite=args.overwrite,
        compression=args.compression,
        command=" ".join(sys.argv),
        **arrangement,
    )

    def count(events: int) -> None:
        _go_on()
        bar.update(events)

    def file_done(done: report.FileReport) -> None:
        bar.files += 1
        bar.set_postfix_str(f"file {bar.files}/{len(files)}")
        if done.failed:
            log.warning("%s: left out: %s", done.file, done.problem)

    from tqdm.contrib.logging import logging_redirect_tqdm

    with tqdm(unit=" events", disable=None, mininterval=0.5) as bar, logging_redirect_tqdm():
        bar.files = 0
        reports = extractor.process_files(files, args.max_events, jobs, count, file_done)
    summary = report.summary(reports, args.output_file, time.perf_counter() - started)
    print(report.summary_text(summary, layout.CHARGE_UNIT_PE, settings.dtype))
    if args.summary:
        write_whole(args.summary, (json.dumps(summary, indent=1) + "\n").encode())
    if summary["events_read"] and not summary["events_passed"]:
        reasons = {name: words for name, words in report.COUNTS.items() if name in report.REASONS}
        counts = ", ".join(f"{summary[n]} {words}" for n, words in reasons.items() if summary[n])
        log.warning("No event was written, because none passed: %s.", counts)
    is_bad = summary["files_failed"] or summary["files_incomplete"] or not summary["events_passed"]
    return 1 if is_bad else 0


def _arrangement(args: argparse.Namespace) -> dict[str, Any]:
    """Options of `finishing.finish` from the command line."""
    if args.split_fractions and not args.split:
        raise UsageError("--split-fractions needs --split. Add --split.")
    if args.stratify and not args.split:
        raise UsageError("--stratify needs --split. Add --split.")
    fractions = (args.split_fractions or DEFAULT_FRACTIONS) if args.split else None
    options = {name: getattr(args, name) for name in ("shuffle", "split_by", "stratify", "seed")}
    return {"split": fractions, **options}


def _cores() -> int:
    """Count the cores that this process may use."""
    return int(os.environ.get("SLURM_CPUS_PER_TASK") or len(os.sched_getaffinity(0)))


def _look_parser(name: str, what: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"image-extractor {name}", description=what)
    parser.add_argument("file", type=Path, help="HDF5 file written by image_extractor.py")
    parser.add_argument("--debug", action="store_true", help="print tracebacks of errors")
    return parser


def _inspect_parser() -> argparse.ArgumentParser:
    return _look_parser("inspect", "Describe a data set: parameters, runs, telescopes, counts.")


def _validate_parser() -> argparse.ArgumentParser:
    return _look_parser(
        "validate",
        "Check a data set: indices, counts, ranges. The exit code is 1 if anything is wrong.",
    )


def _plot_parser() -> argparse.ArgumentParser:
    parser = _look_parser(
        "plot", "Draw the images of an event: charges in the camera, stored images, peak times."
    )
    parser.add_argument(
        "--event", type=int, default=None, help="event_number (default: the brightest event)"
    )
    parser.add_argument(
        "--run", type=int, default=None, help="run_number, if several runs have this event_number"
    )
    parser.add_argument(
        "--max-images",
        type=_whole_number(1),
        default=4,
        help="number of images to draw, the brightest first (default: 4)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("event.png"), help="PNG file (default: event.png)"
    )
    return parser


def _look(args: argparse.Namespace, path: Path, function: str, *more: Any) -> Any:
    """Call a function of look.py in a process of its own, because HDF5 may crash on damaged files.

    Raises
    ------
    DataError
        If it crashed, or raised any other error.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(theirs, function, (path, *more)))
    child.start()
    theirs.close()
    try:
        error, value = ours.recv()
    except EOFError:
        error, value = RuntimeError("it crashed"), None
    finally:
        child.terminate()
        child.join()
    if isinstance(error, DataError) or (error is not None and args.debug):
        raise error
    if error is not None:
        raise DataError(
            f"{path}: damaged, so that HDF5 cannot read it ({error}). Extract the data again."
        )
    return value


def _refuse_damage(args: argparse.Namespace, path: Path, what: str) -> None:
    """Raise DataError if a node of a data set differs from its checksum."""
    damage = _look(args, path, "damaged_nodes")
    if damage:
        raise DataError(
            f"{path}: {what}, because of damage: {damage[0]}. Extract the data again to a new file "
            "(--overwrite replaces this one)."
        )


def _answer(pipe: Any, function: str, arguments: tuple[Any, ...]) -> None:
    """Send (error or None, result) of a function of look.py; runs in the other process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    from . import look

    try:
        pipe.send((None, getattr(look, function)(*arguments)))
    except DataError as error:
        pipe.send((error, None))
    # PyTables has no error type of its own for damaged files: almost any error occurs.
    except Exception as error:
        pipe.send(
            (RuntimeError(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"), None)
        )


def _inspect(args: argparse.Namespace) -> int:
    print(_look(args, args.file, "inspect"))
    return 0


def _validate(args: argparse.Namespace) -> int:
    problems = _look(args, args.file, "validate")
    for problem in problems:
        print(f"{args.file}: {problem}")
    if not problems:
        print(f"{args.file}: valid")
    return 1 if problems else 0


def _plot(args: argparse.Namespace) -> int:
    print(_look(args, args.file, "plot", args.output, args.event, args.run, args.max_images))
    return 0


def _gallery_parser() -> argparse.ArgumentParser:
    parser = _look_parser(
        "gallery", "Draw random images of each class and telescope type, above distributions."
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("gallery.png"), help="(default: gallery.png)")
    add("--part", help="part of a split data set, e.g. Training (default: all events)")
    add("--columns", type=_whole_number(1), default=6, help="images per row (default: 6)")
    add("--seed", type=_whole_number(0), default=0, help="which images (default: 0)")
    return parser


def _gallery(args: argparse.Namespace) -> int:
    print(_look(args, args.file, "draw_gallery", args.output, args.part, args.columns, args.seed))
    return 0


def _merge_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="image-extractor merge",
        description="Merge data sets with equal array and configuration, e.g. of parallel jobs; "
        "each event is kept once. With one data set: shuffle or split it.",
    )
    add = parser.add_argument
    add("files", nargs="+", type=Path, help="HDF5 files written by image_extractor.py, not split")
    add("--output", type=Path, required=True, help="HDF5 file to write")
    add("--overwrite", action="store_true", help="replace the output if it exists")
    _add_arrangement(parser)
    add("--debug", action="store_true", help="print tracebacks of errors")
    return parser


def _merge(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from . import merging

    arrangement = _arrangement(args)
    for path in args.files:
        _refuse_damage(args, path, "cannot be merged")

    def count(events: int) -> None:
        _go_on()
        bar.update(events)

    with tqdm(unit=" events", disable=None) as bar:
        command = " ".join(sys.argv)
        counts = merging.merge(
            args.files, args.output, args.overwrite, command, count, **arrangement
        )
    for path, (n, repeated, same) in zip(args.files, counts, strict=True):
        out = f", {repeated} of them in an earlier file and left out" if repeated else ""
        also = f", {same} kept beside others with their numbers" if same else ""
        print(f"{path}: {n} events{out}{also}")
    total = sum(n - repeated for n, repeated, _ in counts)
    print(f"{args.output}: {total} events, {args.output.stat().st_size / 1e6:.1f} MB")
    return 0


def _export_parser() -> argparse.ArgumentParser:
    parser = _look_parser("export", "Export a data set to ctapipe's DL1 format.")
    add = parser.add_argument
    add("--output", type=Path, required=True, help="HDF5 file to write")
    add("--part", help="part of a split data set, e.g. Training (default: all events)")
    add(
        "--parameters",
        action="store_true",
        help="also clean the images, and write ctapipe's image parameters and cleaning masks",
    )
    add("--picture", type=float, default=10.0, help="cleaning threshold, p.e. (default: 10)")
    add("--boundary", type=float, default=5.0, help="of neighbours, p.e. (default: 5)")
    add("--overwrite", action="store_true", help="replace the output if it exists")
    return parser


def _export(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from . import exporting

    _refuse_damage(args, args.file, "cannot be exported")

    def count(events: int) -> None:
        _go_on()
        bar.update(events)

    with tqdm(unit=" events", disable=None) as bar:
        n = exporting.export(
            args.file,
            args.output,
            args.part,
            args.parameters,
            args.picture,
            args.boundary,
            args.overwrite,
            count,
        )
    print(f"{args.output}: {n} events, {args.output.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
