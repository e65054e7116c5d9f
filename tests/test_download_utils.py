"""Downloads from a local server: resumed, checked in size and content, whole or absent."""

import base64
import contextlib
import errno
import functools
import gzip
import io
import itertools
import os
import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import utils
from utils import DataError

import numpy as np
import pytest
from astropy.io import fits

import download_utils as du
from mock.galaxy import draw_params, simulate_galaxy
from mock.survey import write_galaxy

ROOT = Path(__file__).resolve().parents[1]


@functools.cache  # its CHECKSUM cards contain the time
def fits_file(plateifu, checksum=True) -> bytes:
    """A file of 1 MB with the cards that the archive's files have."""
    data = np.frombuffer(np.random.default_rng(0).bytes(1_000_000), "u1")
    cards = fits.Header({"PLATEIFU": plateifu}) if plateifu else None
    hdus = fits.HDUList([fits.PrimaryHDU(header=cards), fits.ImageHDU(data, name="FLUX")])
    with io.BytesIO() as f:
        hdus.writeto(f, checksum=checksum)
        return f.getvalue()


PLAIN = fits_file(None)
CONTENT = gzip.compress(fits_file("8485-1901"), mtime=0)
HTML = b"<html>Please sign in</html>"


class Archive(BaseHTTPRequestHandler):
    """Serves `files`; can be slow, cut answers short (`cuts`), ignore ranges, or send nonsense."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    cuts: list[int] = []  # noqa: RUF012
    ranges = True
    pause_s = 0.0
    busy: list[str] = []  # noqa: RUF012
    """Answer 503 with these Retry-After first."""
    length: str | None = None
    """Content-Length instead of the right one; "": none."""
    total = ""
    """Total size in an answer 416, instead of the right one."""
    step = 0
    """Bytes sent every 10 ms; 0: all at once."""
    modified: str | None = "Mon, 06 Dec 2021 08:49:37 GMT"
    """Last-Modified; None: the server does not say."""
    says_sizes = True
    """Answer HEAD."""
    shift = 0
    """Bytes by which a rest begins too late."""
    log: list[tuple[str, str | None]] = []  # noqa: RUF012
    headers_seen: list[dict[str, str]] = []  # noqa: RUF012
    asked_sizes: list[str] = []  # noqa: RUF012

    def do_HEAD(self):
        self.asked_sizes.append(self.path)
        content = self.files.get(self.path) if self.says_sizes else None
        self.send_response(404 if content is None else 200)
        if content is not None:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()

    def do_GET(self):
        self.log.append((self.path, self.headers.get("Range")))
        self.headers_seen.append(dict(self.headers))
        time.sleep(self.pause_s)
        content = self.files.get(self.path)
        if content is None:
            return self.send_error(404)
        if self.busy:
            self.send_response(503)
            self.send_header("Retry-After", self.busy.pop())
            self.end_headers()
            return None
        asked, start = self.ranges and self.headers.get("Range"), 0
        if self.headers.get("If-Range") not in (None, self.modified):
            asked = None
        if asked:
            start = int(asked.removeprefix("bytes=").rstrip("-")) + self.shift
        rest, is_beyond = content[start:], start >= len(content) > 0
        self.send_response(416 if is_beyond else 206 if asked else 200)
        if is_beyond:
            self.send_header("Content-Range", f"bytes */{self.total or len(content)}")
        elif asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.modified:
            self.send_header("Last-Modified", self.modified)
        if self.length != "":
            self.send_header("Content-Length", self.length or str(len(rest)))
        self.end_headers()
        rest = rest[: self.cuts.pop()] if self.cuts else rest
        for i in range(0, len(rest), self.step or len(rest) or 1):
            self.wfile.write(rest[i : i + (self.step or len(rest))])
            self.wfile.flush()
            time.sleep(0.01 if self.step else 0)
        self.close_connection = True

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving():
    """A server of its own state, with the usual manners."""

    class Server(Archive):
        files, cuts, busy, log, headers_seen, asked_sizes = {}, [], [], [], [], []

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        Server.base = f"http://127.0.0.1:{server.server_port}/sas"
        yield Server
        server.shutdown()


@pytest.fixture
def archive():
    with serving() as server:
        yield server


@pytest.fixture
def mirror():
    with serving() as server:
        yield server


def put(archive, content=CONTENT, path="a.fits.gz"):
    """URLs from which the archive now serves the content."""
    archive.files[f"/sas/{path}"] = content
    return du.urls_of(path, [archive.base])


def put_galaxy(archive, plateifu, kinds=("MAPS", "LOGCUBE")):
    """Have the archive serve a galaxy's files."""
    content = gzip.compress(fits_file(plateifu), mtime=0)
    for kind in kinds:
        put(archive, content, du.archive_path(kind, plateifu, du.DEFAULT_DAPTYPE))


def test_paths_are_those_of_the_archive():
    base, daptype = "dr17/manga/spectro", du.DEFAULT_DAPTYPE
    analysis = f"{base}/analysis/v3_1_1/3.1.0"
    logcube = f"{analysis}/{daptype}/8485/1901/manga-8485-1901-LOGCUBE-{daptype}.fits.gz"
    drp = f"{base}/redux/v3_1_1/8485/stack/manga-8485-1901-LOGCUBE.fits.gz"
    assert du.archive_path("LOGCUBE", "8485-1901", daptype) == logcube
    assert du.archive_path("DRPCUBE", "8485-1901", daptype) == drp
    assert du.archive_path("drpall", None, daptype) == f"{base}/redux/v3_1_1/drpall-v3_1_1.fits"
    assert du.urls_of("dr17/x", du.Config().base_url) == ["https://data.sdss.org/sas/dr17/x"]


def test_broken_connection_is_resumed_where_it_stopped(archive, tmp_path):
    archive.cuts = [300_000, 400_000]  # used from the end
    path = tmp_path / "a.fits.gz"
    du.fetch(put(archive), path, pause_s=0)
    assert path.read_bytes() == CONTENT
    starts = [int(r.removeprefix("bytes=")[:-1]) for _, r in archive.log[1:]]
    assert archive.log[0][1] is None
    assert starts == [400_000, 700_000]


def test_interrupted_download_is_resumed_by_the_next_command(archive, tmp_path):
    archive.cuts = [70_000]
    path = tmp_path / "a.fits.gz"
    with pytest.raises(DataError, match="run the same command again"):
        du.fetch(put(archive), path, retries=0)
    assert not path.exists()
    du.fetch(put(archive), path, retries=0)
    assert path.read_bytes() == CONTENT
    assert archive.log[-1][1] == "bytes=70000-"


@pytest.mark.parametrize("cuts", [[], [70_000]])
def test_a_file_needed_by_several_processes_is_fetched_once_and_resumed_by_those_who_wait(
    archive, tmp_path, cuts
):
    archive.pause_s, archive.cuts = 0.5, [*cuts]
    url, path = put(archive), tmp_path / "a.fits.gz"
    if not cuts:
        path.write_bytes(b"old")  # as with --overwrite

    def fetch(_):
        try:
            return du.fetch(url, path, retries=0)
        except DataError:
            return 0

    with ThreadPoolExecutor(3) as pool:
        sizes = sorted(pool.map(fetch, range(3)))
    assert sizes == [0 if cuts else len(CONTENT), len(CONTENT), len(CONTENT)]
    assert path.read_bytes() == CONTENT
    assert [asked for _, asked in archive.log] == [None, *["bytes=70000-" for _ in cuts]]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("part", "cuts", "ranges"),
    [
        (None, [], True),
        (None, [70_000], False),  # a server without ranges: from the beginning
        (CONTENT, [], True),
        (CONTENT + b"more", [], True),
    ],
)
def test_whole_file_arrives_whatever_there_is_of_it(archive, tmp_path, part, cuts, ranges):
    archive.cuts, archive.ranges = cuts, ranges
    path = tmp_path / "deep" / "a.fits.gz"
    path.parent.mkdir()
    if part:
        (path.parent / ".a.fits.gz.part").write_bytes(part)
    assert du.fetch(put(archive), path, pause_s=0) == len(CONTENT)
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty file"), (CONTENT[:-9], "damaged"), (HTML, "expected to begin with SIMPLE"),
        (gzip.compress(HTML, mtime=0), "expected to begin with SIMPLE"),
        (None, "not in the archive"),
        (PLAIN[:-5760], "cut short inside FLUX"), (PLAIN[:500_000], "cut short inside FLUX"),
        (fits_file("8485-1901", checksum=False) + PLAIN[900_000:], "no header where one should be"),
        (PLAIN[:400_000] + PLAIN[500_000:600_000] + PLAIN[500_000:], "FLUX is damaged"),
        (fits_file("8485-1902"), "the server sent the file of 8485-1902, expected 8485-1901"),
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_missing_or_damaged_file_is_requested_once_and_never_kept(
    archive, tmp_path, content, expected
):
    with pytest.raises(DataError, match=expected) as refused:
        du.fetch(put(archive, content), tmp_path / "manga-8485-1901-MAPS.fits.gz")
    assert "\n" not in str(refused.value)
    assert len(archive.log) == 1
    assert list(tmp_path.iterdir()) == []


def config_of(tmp_path, *archives, **options):
    options = {"data_dir": tmp_path, "jobs": 1, "retries": 0, **options}
    return du.Config(base_url=tuple(a.base for a in archives), **options)


def test_command_fetches_missing_files_and_continues_after_failures(archive, tmp_path):
    one, config = "8485-1901", config_of(tmp_path, archive)
    put_galaxy(archive, one)
    empty = utils.raw_dir(tmp_path, one) / f"manga-{one}-MAPS-{config.daptype}.fits.gz"
    empty.parent.mkdir(parents=True)
    empty.touch()  # zero bytes count as missing
    assert du.main(replace(config, plateifu=(one, "7443-12703"))) == 1
    for kind in ("MAPS", "LOGCUBE"):
        assert utils.find_raw(tmp_path, one, kind).read_bytes() == CONTENT
    assert "7443-12703" in (tmp_path / "raw" / "failed.csv").read_text()
    archive.log.clear()
    archive.asked_sizes.clear()
    assert du.main(replace(config, plateifu=(one,))) == 0
    assert archive.log == archive.asked_sizes == []


def test_drp_cubes_lie_where_the_other_commands_look_for_them(archive, tmp_path):
    put_galaxy(archive, "8485-1901", ["DRPCUBE"])
    config = config_of(tmp_path, archive, plateifu=("8485-1901",), kinds=("DRPCUBE",))
    assert du.main(config) == 0
    assert utils.find_raw(tmp_path, "8485-1901", "LOGCUBE").read_bytes() == CONTENT


def drpall(*rows) -> bytes:
    """A catalogue with rows (plateifu, redshift)."""
    columns = {
        "plateifu": ("11A", [name for name, _ in rows]),
        "mangaid": ("9A", [f"1-{i}" for i in range(len(rows))]),
        "nsa_z": ("D", [-9999.0] * len(rows)),
        "z": ("D", [z for _, z in rows]),
    }
    table = [fits.Column(k, form, array=values) for k, (form, values) in columns.items()]
    with io.BytesIO() as f:
        hdus = fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU.from_columns(table)])
        hdus.writeto(f, checksum=True)
        return f.getvalue()


ROWS = [(f"8485-{ifu}", 0.01 * i) for i, ifu in enumerate((1901, 1902, 3701, 3702, 3703, 3704), 1)]
ROWS += [("8485-6101", -9999.0), ("7443-1901", 0.03)]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"z": (0.02, 0.03)}, ["7443-1901", "8485-1902", "8485-3701"]),
        ({"plate": (7443,)}, ["7443-1901"]),
        ({"plate": (8485,), "z": (0, 0.015)}, ["8485-1901"]),
        ({"plateifu": ("8485-1901", "8485-1902", "8485-6101"), "z": (0.015, 1)}, ["8485-1902"]),
    ],
)
def test_a_query_chooses_galaxies_from_the_catalogue(archive, tmp_path, capsys, query, expected):
    url = put(archive, drpall(*ROWS), du.archive_path("drpall", None, du.DEFAULT_DAPTYPE))
    config = config_of(tmp_path, archive, kinds=("MAPS",), dry_run=True, **query)
    assert du.main(config) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [utils.PLATEIFU.search(line)[0] for line in listed] == expected
    assert [path for path, _ in archive.log] == ["/sas" + url[0].removeprefix(archive.base)]
    put_galaxy(archive, expected[0])
    assert du.main(replace(config, dry_run=False)) == (len(expected) > 1)  # the others are missing
    assert utils.find_raw(tmp_path, expected[0], "MAPS")


def test_a_random_choice_is_always_the_same_and_part_of_a_larger_one(archive, tmp_path):
    put(archive, drpall(*ROWS), du.archive_path("drpall", None, du.DEFAULT_DAPTYPE))
    config = config_of(tmp_path, archive, catalogue=True)
    assert du.main(config) == 0
    chosen = [du.choose_galaxies(tmp_path, replace(config, n=n)) for n in (2, 5, 99)]
    assert [len(names) for names in chosen] == [2, 5, 7]  # one has no redshift
    assert set(chosen[0]) < set(chosen[1]) < set(chosen[2])
    assert chosen[0] != chosen[2][:2]
    halves = [du.choose_galaxies(tmp_path, replace(config, n=5, shard=f"{k}/2")) for k in (0, 1)]
    assert sorted(halves[0] + halves[1]) == chosen[1]
    with pytest.raises(DataError, match="no such galaxy with a redshift"):
        du.choose_galaxies(tmp_path, replace(config, z=(3, 4)))
    with pytest.raises(DataError, match="--n 0: expected 1 or more"):
        du.main(replace(config, n=0))


def test_the_total_size_is_said_before_and_refused_if_the_disk_is_too_small(
    archive, tmp_path, monkeypatch, caplog
):
    names = [f"8485-{i}" for i in (1901, 1902, 3701)]
    for name in names:
        put_galaxy(archive, name)
    config = config_of(tmp_path / "new", archive, plateifu=tuple(names))
    caplog.set_level("INFO")
    free = du.shutil.disk_usage(tmp_path)._replace(free=5_000_000)
    monkeypatch.setattr(du.shutil, "disk_usage", lambda _: free)
    with pytest.raises(DataError, match=r"0\.01 GB are to be fetched, but 0\.01 GB are free"):
        du.main(config)
    assert f"6 files to fetch, {6e-9 * len(CONTENT):.2f} GB; 0.01 GB are free" in caplog.text
    assert archive.log == []
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(du, "ASKED_FILES", 2)  # the total is estimated
    archive.asked_sizes.clear()
    with pytest.raises(DataError, match="ask for fewer"):
        du.main(config)
    assert "6 files to fetch, about 0.01 GB" in caplog.text
    assert len(archive.asked_sizes) == 3  # the root and two files


def test_a_server_that_says_no_sizes_is_fetched_from_all_the_same(archive, tmp_path, caplog):
    put_galaxy(archive, "8485-1901")
    archive.says_sizes = False
    caplog.set_level("INFO")
    assert du.main(config_of(tmp_path, archive, plateifu=("8485-1901",))) == 0
    assert "2 files to fetch, of unknown size" in caplog.text


def test_a_mirror_takes_over_whatever_the_archive_does(archive, mirror, tmp_path):
    names = ("8485-1901", "8485-1902", "8485-3701")
    for name in names:
        put_galaxy(mirror, name, ["MAPS"])
    for name, bad in ((names[0], HTML), (names[1], CONTENT)):  # the third is missing
        put(archive, bad, du.archive_path("MAPS", name, du.DEFAULT_DAPTYPE))
    config = config_of(tmp_path, archive, mirror, plateifu=names, kinds=("MAPS",))
    assert du.main(config) == 0
    assert [len(server.log) for server in (archive, mirror)] == [3, 3]
    archive.base = "http://127.0.0.1:1/sas"  # nobody is there
    config = config_of(tmp_path, archive, mirror, plateifu=names, kinds=("MAPS",), overwrite=True)
    assert du.main(config) == 0
    assert len(mirror.log) == 6
    with pytest.raises(DataError, match=r"127.0.0.1:1/sas: no connection .* expected the archive"):
        du.main(replace(config, base_url=(archive.base,)))


def test_a_mirror_resumes_what_the_archive_has_begun(archive, mirror, tmp_path):
    archive.cuts = [70_000]
    urls, path = put(archive) + put(mirror), tmp_path / "a.fits.gz"
    assert du.fetch(urls, path, retries=0) == len(CONTENT)
    assert [asked for _, asked in mirror.log] == ["bytes=70000-"]
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("modified", ["Tue, 07 Dec 2021 08:49:37 GMT", None])
def test_a_file_that_was_replaced_on_the_server_is_not_glued_to_the_old_one(
    archive, tmp_path, modified
):
    archive.cuts, path = [70_000], tmp_path / "a.fits.gz"
    with pytest.raises(DataError, match="broke after 70000 bytes"):
        du.fetch(put(archive), path, retries=0)
    archive.modified = modified
    new = gzip.compress(fits_file("8485-1902"), mtime=0)
    assert du.fetch(put(archive, new), path, retries=0) == len(new)
    assert path.read_bytes() == new
    assert archive.headers_seen[1]["If-Range"] == "Mon, 06 Dec 2021 08:49:37 GMT"


def test_a_server_without_times_resumes_too(archive, tmp_path):
    archive.cuts, archive.modified = [70_000], None
    assert du.fetch(put(archive), tmp_path / "a.fits.gz", pause_s=0) == len(CONTENT)
    assert [asked for _, asked in archive.log] == [None, "bytes=70000-"]
    assert "If-Range" not in archive.headers_seen[1]


def test_a_rest_from_another_place_is_not_glued_to_the_part(archive, tmp_path):
    archive.cuts, archive.shift = [70_000], 5
    assert du.fetch(put(archive), tmp_path / "a.fits.gz", pause_s=0) == len(CONTENT)
    assert [asked for _, asked in archive.log] == [None, "bytes=70000-", None]


def test_proxy_and_netrc_are_respected(archive, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine archive.test login astronomer password secret")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", archive.base.removesuffix("/sas"))
    archive.files["http://archive.test/a.fits.gz"] = CONTENT  # a proxy is asked for whole URLs
    path = tmp_path / "a.fits.gz"
    assert du.fetch(["http://archive.test/a.fits.gz"], path, retries=0) == len(CONTENT)
    said = archive.headers_seen[0]["Authorization"].removeprefix("Basic ")
    assert base64.b64decode(said) == b"astronomer:secret"


@pytest.mark.slow
def test_the_real_demo_runs_through_on_galaxies_that_are_like_real_ones(archive, tmp_path):
    make = ["make", "-n", "--no-print-directory", "SETUP=no", f"python={sys.executable}"]
    outside = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}  # of `make test`
    commands = subprocess.run(
        [*make, "demo-real"], cwd=ROOT, env=outside, capture_output=True, text=True, check=True
    ).stdout
    names = utils.PLATEIFU.findall(commands.splitlines()[0])
    for i, name in enumerate(names, 1):  # these are star-forming
        params = draw_params(1, i, (19,), 0)
        write_galaxy(tmp_path, simulate_galaxy(replace(params, plateifu="-".join(name))))
    for file in (tmp_path / "raw").rglob("*.fits.gz"):
        kind, plateifu = file.name.split("-")[3], utils.plateifu_of(file)
        path = du.archive_path(kind, plateifu, du.DEFAULT_DAPTYPE)
        assert path.endswith(file.name)
        put(archive, file.read_bytes(), path)
    for name in ("data", "results"):
        commands = commands.replace(f"{name}/real", str(tmp_path / name))
    mine = commands.replace("download_utils.py", f"download_utils.py --base-url {archive.base}")
    done = subprocess.run(["bash", "-e", "-c", mine], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "results" / "maps").glob("*.fits"))) == len(names) == 3
    assert len(list((tmp_path / "results" / "figures").glob("*_maps.png"))) == 3
    nowhere = commands.replace(
        "download_utils.py", "download_utils.py --base-url http://127.0.0.1:1"
    )
    nowhere = nowhere.replace(str(tmp_path / "data"), str(tmp_path / "new"))
    done = subprocess.run(["bash", "-e", "-c", nowhere], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: http://127.0.0.1:1: no connection")
    assert done.stderr.count("\n") == 1


def test_dry_run_lists_missing_files_among_them_an_empty_catalogue(archive, tmp_path, capsys):
    config = config_of(tmp_path, archive, catalogue=True)
    (url,) = put(archive, path=du.archive_path("drpall", None, config.daptype))
    path = tmp_path / "raw" / "drpall-v3_1_1.fits"
    path.parent.mkdir(parents=True)
    path.touch()
    for printed in (f"{url} {path}\n", ""):
        assert du.main(replace(config, dry_run=True)) == 0
        assert capsys.readouterr().out == printed
        assert du.main(config) == 0
        assert path.read_bytes() == CONTENT


def test_command_without_a_galaxy_is_refused(tmp_path):
    with pytest.raises(DataError, match="nothing to fetch"):
        du.main(du.Config(data_dir=tmp_path))


@pytest.mark.parametrize("length", ["", "abc", "-5", "1e6"])
def test_a_content_length_that_is_none_does_not_matter(archive, tmp_path, length):
    archive.length = length
    assert du.fetch(put(archive), tmp_path / "a.fits.gz", retries=0) == len(CONTENT)


@pytest.mark.parametrize("total", ["*", "", "abc", "5"])
def test_a_part_that_the_server_knows_nothing_of_is_fetched_again(archive, tmp_path, total):
    archive.total, path = total, tmp_path / "a.fits.gz"
    (tmp_path / ".a.fits.gz.part").write_bytes(CONTENT + b"more")
    assert du.fetch(put(archive), path, retries=1, pause_s=0) == len(CONTENT)
    assert path.read_bytes() == CONTENT


def test_a_busy_server_is_left_alone_for_as_long_as_it_asks(archive, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(du.time, "sleep", pauses.append)
    archive.busy = ["x", "9999999", "17"]  # used from the end
    du.fetch(put(archive), tmp_path / "a.fits.gz", pause_s=1)
    assert [p for p in pauses if p >= 1] == [17, du.MAX_PAUSE_S, 4]


def test_a_server_that_drips_counts_as_failed_and_is_resumed(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(du, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(du, "MIN_SPEED", 50_000)
    archive.step = 100  # 10 kB/s
    with pytest.raises(DataError, match=r"only \d+ bytes in [01] s.*resumes the download"):
        du.fetch(put(archive), tmp_path / "a.fits.gz", retries=1, pause_s=0)
    assert archive.log[0][1] is None
    assert archive.log[1][1] is not None
    archive.step = 0
    assert du.fetch(put(archive), tmp_path / "a.fits.gz", retries=0) == len(CONTENT)


def test_a_full_disk_is_no_damaged_file_and_what_came_is_kept(archive, tmp_path):
    urls, path, code = put(archive), tmp_path / "a.fits.gz", 0
    pid = os.fork()
    if not pid:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        try:
            du.fetch(urls, path)
        except OSError as error:
            code = error.errno
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == errno.EFBIG
    assert (tmp_path / ".a.fits.gz.part").read_bytes() == CONTENT[:200_000]
    assert du.fetch(urls, path) == len(CONTENT)
    assert archive.log[1][1] == "bytes=200000-"


@pytest.mark.parametrize("length", [None, ""])
def test_a_file_that_is_too_large_is_not_kept(archive, tmp_path, monkeypatch, length):
    monkeypatch.setattr(du, "MAX_SIZE", 500_000)
    archive.length = length
    with pytest.raises(DataError, match=r"GB, expected "):
        du.fetch(put(archive), tmp_path / "a.fits.gz", pause_s=0)
    assert len(archive.log) == 1
    assert not list(tmp_path.iterdir())
