"""Downloads: whole and right, or an error that says why, whatever the server does."""

from __future__ import annotations

import base64
import ctypes
import errno
import hashlib
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from api.errors import ApiError
from api.models import disk, partial_file, transfer
from api.models.addresses import Reach
from api.models.http_client import MAX_REDIRECTS, Policy, Wanted
from api.models.http_stream import open_stream
from api.models.partial_file import Fetched
from api.models.transfer import download, download_many

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
DATA = random.Random(7).randbytes(1_300_001)
SHA = hashlib.sha256(DATA).hexdigest()
# impatient between two tries, but not with a server that shares a busy machine
QUICK = Policy(connect_timeout=10, read_timeout=10, attempts=4, backoff=0.001, max_wait=0.3, save_every=0.05)


class Site:
    """What the server has, what it does wrong, and what it was asked."""

    def __init__(self) -> None:
        self.data = DATA
        self.etag = '"v1"'
        self.ranges = True
        self.chunked = False
        self.length: int | None = None
        self.headers: dict[str, str] = {}
        self.cut: Callable[[int], int | None] = lambda n: None  # request number -> bytes of body sent before the cut
        self.answer: Callable[[int, Handler], bool] = lambda n, handler: False  # True: it has answered
        self.rate = 0.0
        self.limit: int | None = None  # bytes of bodies, all together, after which it falls silent
        self.given = 0
        self.closing = threading.Event()
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.open = self.most = 0
        self.lock = threading.Lock()

    def may_give(self, count: int) -> bool:
        with self.lock:
            allowed = self.limit is None or self.given < self.limit or self.closing.is_set()
            self.given += count if allowed else 0
            return allowed


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        site = self.site
        with site.lock:
            site.asked.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
            number = len(site.asked)
            site.open += 1
            site.most = max(site.most, site.open)
        try:
            if not site.answer(number, self):
                self.body(number)
        except OSError:
            self.close_connection = True
        finally:
            with site.lock:
                site.open -= 1

    def plain(self, status: int, **headers: str) -> bool:
        self.send_response(status)
        for name, value in {"Content_Length": "0", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        return True

    def body(self, number: int) -> None:
        site = self.site
        data, status, extra = site.data, 200, dict(site.headers)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match and site.ranges and self.headers.get("If-Range", site.etag) == site.etag:
            start, end = int(match[1]), min(int(match[2] or 1 << 60) + 1, len(data))
            if start >= len(data):
                self.plain(416, Content_Range=f"bytes */{len(data)}")
                return
            extra["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            data, status = data[start:end], 206
        self.send_response(status)
        if site.etag:
            self.send_header("ETag", site.etag)
        if site.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(site.length or len(data)))
        for name, value in extra.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = site.cut(number)
        step = 50_000 if site.rate or site.limit is not None else 1 << 30
        for at in range(0, len(data) if cut is None else cut, step):
            piece = data[at : min(at + step, len(data) if cut is None else cut)]
            while not site.may_give(len(piece)):
                time.sleep(0.01)
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if site.chunked else piece)
            if site.rate:
                site.closing.wait(len(piece) / site.rate)
        if cut is not None or site.length:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif site.chunked:
            self.wfile.write(b"0\r\n\r\n")


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(partial_file, "PIECE", 200_000)
    yield from serve()


other = pytest.fixture(name="other")(lambda: (yield from serve()))


def serve() -> Iterator[Site]:
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"site": site}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}/model.safetensors"  # type: ignore[attr-defined]
    yield site
    site.closing.set()
    server.shutdown()
    server.server_close()


def get(site: Site, path: Path, **options: object) -> Fetched:
    options = {"policy": QUICK, "parts": 3, **options}
    fetched = download(options.pop("url", site.url), path, **options)
    assert path.read_bytes() == site.data
    assert (fetched.path, fetched.size) == (path.name, len(site.data))
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name], "something was left behind"
    return fetched


def fails(site: Site, path: Path, **options: object) -> ApiError:
    options = {"policy": QUICK, "parts": 3, **options}
    with pytest.raises(ApiError) as error:
        download(options.pop("url", site.url), path, **options)
    assert not path.exists()
    return error.value


def bodies(site: Site) -> int:
    return sum(1 for command, _, _ in site.asked if command == "GET")


@pytest.mark.parametrize("parts", [1, 3, 8])
@pytest.mark.parametrize("size", [0, 1, 199_999, 200_000, 200_001, 1_300_001])
def test_whole_in_parts(site: Site, tmp_path: Path, parts: int, size: int) -> None:
    site.data = DATA[:size]
    fetched = get(site, tmp_path / "f", parts=parts)
    assert fetched.sha256 == hashlib.sha256(site.data).hexdigest()
    assert (fetched.etag, fetched.verified) == ('"v1"' if size else fetched.etag, False)
    assert bodies(site) == max(1, -(-size // 200_000)), "each byte is asked for once"
    assert site.most <= parts


def test_ranges_carry_the_validator(site: Site, tmp_path: Path) -> None:
    get(site, tmp_path / "f")
    first, *rest = [headers for _, _, headers in site.asked]
    assert "if-range" not in first
    assert {headers["if-range"] for headers in rest} == {'"v1"'}
    site.asked.clear()
    site.etag = 'W/"v1"'  # RFC 9110 §13.1.5: no weak validator in If-Range
    get(site, tmp_path / "f")
    assert not any("if-range" in headers for _, _, headers in site.asked)


@pytest.mark.parametrize("chunked", [False, True])
def test_without_ranges(site: Site, tmp_path: Path, chunked: bool) -> None:
    site.ranges, site.chunked = False, chunked
    assert get(site, tmp_path / "f").sha256 == SHA
    assert bodies(site) == 1


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("tenth", range(10))
def test_cut_at_every_tenth_of_the_first_answer(site: Site, tmp_path: Path, tenth: int, ranges: bool) -> None:
    site.ranges = ranges
    whole = 200_000 if ranges else len(DATA)
    site.cut = lambda n: whole * tenth // 10 if n == 1 else None
    assert get(site, tmp_path / "f").sha256 == SHA


@pytest.mark.parametrize("seed", range(5))
def test_cut_at_random_bytes_again_and_again(site: Site, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    site.cut = lambda n: rng.randrange(1, 200_000) if rng.random() < 0.8 else None
    assert get(site, tmp_path / "f").sha256 == SHA
    assert bodies(site) > 8, "the fault did not happen"


def test_a_chunked_answer_that_is_cut_is_not_taken_for_whole(site: Site, tmp_path: Path) -> None:
    site.ranges, site.chunked, site.etag = False, True, ""
    site.cut = lambda n: 500_000
    assert fails(site, tmp_path / "f").code == "SOURCE_UNREACHABLE"
    site.cut = lambda n: None
    get(site, tmp_path / "f")


def test_an_answer_of_unknown_length_is_refused(site: Site, tmp_path: Path) -> None:
    def answer(number: int, handler: Handler) -> bool:
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + DATA[:1000])
        handler.close_connection = True
        return True

    site.answer = answer
    assert "how long" in fails(site, tmp_path / "f").message
    site.data = DATA[:1000]
    get(site, tmp_path / "f", size=1000)
    assert fails(site, tmp_path / "g", size=1001).code in ("SOURCE_UNREACHABLE", "MODEL_CORRUPT")


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429, 408])
def test_passing_errors_are_tried_again(site: Site, tmp_path: Path, status: int) -> None:
    site.answer = lambda n, handler: n % 3 != 0 and handler.plain(status)
    assert get(site, tmp_path / "f", parts=1).sha256 == SHA


def test_lasting_errors_end(site: Site, tmp_path: Path) -> None:
    site.answer = lambda n, handler: handler.plain(503)
    error = fails(site, tmp_path / "f", parts=1)
    assert error.code == "SOURCE_UNREACHABLE"
    assert "503" in error.message
    assert "127.0.0.1" in error.message
    assert len(site.asked) == QUICK.attempts


def test_retry_after_is_honoured_and_bounded(site: Site, tmp_path: Path) -> None:
    site.data = DATA[:10]
    for value in ("1", "100000", "Wed, 21 Oct 2037 07:28:00 GMT"):
        site.asked.clear()
        site.answer = lambda n, handler, v=value: n == 1 and handler.plain(429, Retry_After=v)
        start = time.monotonic()
        get(site, tmp_path / "f", parts=1)
        assert 0.25 < time.monotonic() - start < 20, value


@pytest.mark.parametrize(
    ("status", "code"), [(401, "SOURCE_DENIED"), (403, "SOURCE_DENIED"), (404, "MODEL_NOT_FOUND"), (410, "MODEL_NOT_FOUND"), (400, "SOURCE_UNREACHABLE")],
)  # fmt: skip
def test_final_answers_are_not_tried_again(site: Site, tmp_path: Path, status: int, code: str) -> None:
    site.answer = lambda n, handler: handler.plain(status)
    policy = Policy(token_variable="SITE_TOKEN")  # noqa: S106
    error = fails(site, tmp_path / "f", policy=policy)
    assert (error.code, len(site.asked)) == (code, 1)
    assert ("SITE_TOKEN" in error.message) == (code == "SOURCE_DENIED")


def flipped() -> bytes:
    data = bytearray(DATA)
    data[777_777] ^= 1
    return bytes(data)


@pytest.mark.parametrize("how", ["argument", "url"])
def test_a_flipped_byte_is_found(site: Site, tmp_path: Path, how: str) -> None:
    options = {"sha256": SHA} if how == "argument" else {"url": site.url + f"#sha256={SHA}"}
    site.data = flipped()
    error = fails(site, tmp_path / "f", **options)
    assert (error.code, "sha256" in error.message) == ("MODEL_CORRUPT", True)
    site.data = DATA
    assert get(site, tmp_path / "f", **options).verified


DIGESTS = {
    "Content-MD5": hashlib.md5(DATA, usedforsecurity=False).digest(),
    "x-amz-checksum-sha256": hashlib.sha256(DATA).digest(),
    "x-amz-checksum-sha1": hashlib.sha1(DATA, usedforsecurity=False).digest(),
    "x-amz-checksum-crc32": zlib.crc32(DATA).to_bytes(4, "big"),
}


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("header", [*DIGESTS, "Repr-Digest"])
def test_digests_of_the_source_are_compared(site: Site, tmp_path: Path, header: str, ranges: bool) -> None:
    site.ranges = ranges
    if header == "Repr-Digest":
        site.headers = {header: f"sha-256=:{base64.b64encode(hashlib.sha256(DATA).digest()).decode()}:"}
    else:
        site.headers = {header: base64.b64encode(DIGESTS[header]).decode()}
    assert get(site, tmp_path / "f", digest=False).verified
    site.data = flipped()
    assert fails(site, tmp_path / "g").code == "MODEL_CORRUPT"


def test_a_composite_checksum_of_s3_is_no_digest(site: Site, tmp_path: Path) -> None:
    site.headers = {"x-amz-checksum-sha256": base64.b64encode(bytes(32)).decode() + "-3"}
    assert not get(site, tmp_path / "f").verified


@pytest.mark.parametrize("name", ["md5", "crc32"])
def test_digests_that_are_known_before_are_compared(site: Site, tmp_path: Path, name: str) -> None:
    """Of a listing, such as an ETag of S3 that is an MD5: the answer itself says nothing."""
    right = {"md5": hashlib.md5(DATA, usedforsecurity=False).digest(), "crc32": zlib.crc32(DATA).to_bytes(4, "big")}
    wanted = Wanted(site.url, "f", digests={name: right[name]})
    (got,) = download_many([wanted], tmp_path, policy=QUICK)
    assert got.verified
    (tmp_path / "f").unlink()
    site.data = flipped()
    with pytest.raises(ApiError) as error:
        download_many([wanted], tmp_path, policy=QUICK)
    assert (error.value.code, name in error.value.message) == ("MODEL_CORRUPT", True)
    assert not (tmp_path / "f").exists()


def test_sizes_and_etags_that_were_promised(site: Site, tmp_path: Path) -> None:
    assert fails(site, tmp_path / "f", size=1000).code == "MODEL_CORRUPT"
    assert fails(site, tmp_path / "f", etag='"v0"').code == "MODEL_CORRUPT"
    get(site, tmp_path / "f", size=len(DATA), etag="v1")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_content_length_that_is_too_long(site: Site, tmp_path: Path, ranges: bool) -> None:
    site.ranges, site.length = ranges, len(DATA) + 10
    assert fails(site, tmp_path / "f").code == "SOURCE_UNREACHABLE"
    site.length = None
    get(site, tmp_path / "f")


def test_a_content_length_that_is_too_short(site: Site, tmp_path: Path) -> None:
    site.ranges, site.length = False, len(DATA) - 10
    assert fails(site, tmp_path / "f", size=len(DATA)).code == "MODEL_CORRUPT"
    assert fails(site, tmp_path / "f", sha256=SHA).code == "MODEL_CORRUPT"


@pytest.mark.parametrize("lie", ["bytes 0-99/1300001", "bytes 5-200004/1300001", "bytes 0-199999/*", "items 0-1/2", ""])
def test_a_content_range_that_was_not_asked_for(site: Site, tmp_path: Path, lie: str) -> None:
    def answer(number: int, handler: Handler) -> bool:
        handler.send_response(206)
        handler.send_header("Content-Range", lie)
        handler.send_header("Content-Length", "200000")
        handler.end_headers()
        handler.wfile.write(DATA[:200_000])
        return True

    site.answer = answer
    assert fails(site, tmp_path / "f").code == "SOURCE_UNREACHABLE"


def test_content_that_changes_midway_is_fetched_afresh(site: Site, tmp_path: Path) -> None:
    new = random.Random(8).randbytes(len(DATA))

    def answer(number: int, handler: Handler) -> bool:
        if number == 4:
            site.data, site.etag = new, '"v2"'
        return False

    site.answer = answer
    assert get(site, tmp_path / "f", parts=1).etag == '"v2"'
    assert (tmp_path / "f").read_bytes() == new


def test_content_that_keeps_changing_is_an_error(site: Site, tmp_path: Path) -> None:
    def answer(number: int, handler: Handler) -> bool:
        site.etag = f'"v{number}"'
        return False

    site.answer = answer
    error = fails(site, tmp_path / "f", parts=1)
    assert (error.code, "changed" in error.message) == ("SOURCE_UNREACHABLE", True)
    assert not any(tmp_path.iterdir())


class Stop(Exception):
    pass


def interrupted(site: Site, path: Path, after: int, **options: object) -> None:
    """A download that ends at its first report past ``after`` bytes."""

    def on_progress(phase: str, done: int, total: int | None) -> None:
        assert phase == "download"
        if done > after:
            raise Stop

    # enough to get there though a piece under way is not counted, and not enough to be done
    site.limit = min(after + 400_000, len(DATA) - 50_001)
    with pytest.raises(Stop):
        download(site.url, path, policy=QUICK, on_progress=on_progress, **{"parts": 2, **options})
    site.limit = None
    assert not path.exists()


def again(site: Site) -> str:
    """The same file under a name of its own: a request that was cut off may reach the log late."""
    return site.url + "?again"


def kept(path: Path) -> int:
    """Bytes that the side file says are there."""
    side = path.with_name(path.name + ".part.json")
    return sum(end - start for start, end in json.loads(side.read_text())["done"]) if side.exists() else 0


def sent(site: Site) -> int:
    later = [headers.get("range", "") for _, path, headers in site.asked if path.endswith("?again")]
    ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", value) for value in later]
    return sum(min(int(m[2]) + 1, len(DATA)) - int(m[1]) for m in ranges if m)


def test_it_goes_on_where_it_was_interrupted(site: Site, tmp_path: Path) -> None:
    interrupted(site, tmp_path / "f", 700_000)
    done = kept(tmp_path / "f")
    assert 700_000 < done < len(DATA)
    assert get(site, tmp_path / "f", url=again(site)).sha256 == SHA
    assert sent(site) == len(DATA) - done


def test_another_etag_starts_afresh(site: Site, tmp_path: Path) -> None:
    interrupted(site, tmp_path / "f", 700_000)
    site.data, site.etag = random.Random(9).randbytes(len(DATA)), '"v2"'
    assert get(site, tmp_path / "f").etag == '"v2"'


@pytest.mark.parametrize("etag", ["", 'W/"v1"'])
def test_without_a_strong_etag_it_starts_afresh(site: Site, tmp_path: Path, etag: str) -> None:
    site.etag = etag
    interrupted(site, tmp_path / "f", 700_000)
    get(site, tmp_path / "f", url=again(site))
    assert sent(site) == len(DATA)


@pytest.mark.parametrize("etag", ["", 'W/"v1"'])
def test_with_a_known_sha256_it_goes_on_without_an_etag(site: Site, tmp_path: Path, etag: str) -> None:
    site.etag = etag
    interrupted(site, tmp_path / "f", 700_000)
    get(site, tmp_path / "f", url=again(site), sha256=SHA)
    assert 0 < sent(site) < len(DATA)


def test_a_resumed_file_of_other_content_is_fetched_once_more(site: Site, tmp_path: Path) -> None:
    site.data = flipped()
    interrupted(site, tmp_path / "f", 1_000_000, parts=1)
    site.data = DATA
    get(site, tmp_path / "f", sha256=SHA)


@pytest.mark.parametrize(
    "side", ["", "{", "[]", '{"size": -1, "etag": "\\"v1\\"", "done": []}', '{"size": 1300001, "etag": "\\"v1\\"", "done": [[0, 9000000]]}', '{"size": 1300001, "etag": "\\"v1\\"", "done": [[5, 3]]}'],
)  # fmt: skip
def test_a_damaged_side_file_starts_afresh(site: Site, tmp_path: Path, side: str) -> None:
    (tmp_path / "f.part").write_bytes(bytes(len(DATA)))
    (tmp_path / "f.part.json").write_text(side)
    assert get(site, tmp_path / "f").sha256 == SHA


def test_killed_in_the_middle_it_goes_on(site: Site, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from api.models import partial_file, transfer as t;"
        "partial_file.PIECE = 200_000;"
        "t.download(sys.argv[1], Path(sys.argv[2]), parts=2, policy=t.Policy(save_every=0.02))"
    )
    rng = random.Random(3)
    site.limit = 300_000  # each time, so that three times are not the whole
    for last in (False, False, True):
        site.asked.clear()
        site.given = 0
        child = subprocess.Popen([sys.executable, "-c", code, site.url, str(tmp_path / "f")], cwd=ROOT)
        while not (site.asked and (not last or (tmp_path / "f.part.json").exists())) and child.poll() is None:
            time.sleep(0.01)
        time.sleep(0 if last else rng.uniform(0, 0.2))
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not (tmp_path / "f").exists()
    site.limit = None
    assert get(site, tmp_path / "f", url=again(site)).sha256 == SHA
    assert sent(site) < len(DATA), "nothing was kept"


def test_the_record_never_claims_what_is_not_on_the_disk(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopping machine keeps what was there when fdatasync was called; more arrives while that waits."""
    part, side, site.rate = tmp_path / "f.part", tmp_path / "f.part.json", 2e6
    on_disk = bytearray()
    records = 0

    def fdatasync(fd: int) -> None:
        nonlocal on_disk, records
        for start, end in json.loads(side.read_text())["done"] if side.exists() else ():
            records += 1
            assert on_disk[start:end] == DATA[start:end]
        on_disk = bytearray(part.read_bytes())
        time.sleep(0.05)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    get(site, tmp_path / "f", policy=Policy(save_every=0.01))
    assert records > 3, "it did not happen"


def test_a_slow_disk_does_not_hold_up_the_hashes(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    received, waited = threading.Event(), []
    site.rate = 2e6
    monkeypatch.setattr(os, "fdatasync", lambda fd: waited.append(received.wait(20)))

    def on_progress(phase: str, done: int, total: int | None) -> None:
        if done == len(DATA):
            received.set()

    get(site, tmp_path / "f", policy=Policy(save_every=0.05), on_progress=on_progress)
    assert waited
    assert all(waited), "nothing went on while it waited"


@pytest.mark.parametrize(("enough", "most"), [(0.0, 1), (1e12, 4)])
def test_more_connections_only_while_they_are_slow(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enough: float, most: int
) -> None:
    monkeypatch.setattr(transfer, "_FAST", enough)
    site.rate = 1e6
    get(site, tmp_path / "f", parts=4)
    assert site.most == most


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOSPC, errno.EDQUOT])
def test_space_is_set_aside_where_that_can_be_done(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(disk, "_fallocate", lambda *arguments: ctypes.set_errno(number) or -1)
    if number in (errno.ENOSPC, errno.EDQUOT):
        assert fails(site, tmp_path / "f").code == "DISK_FULL"
        assert not any(tmp_path.iterdir())
    else:
        get(site, tmp_path / "f")


def test_space_is_set_aside(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        disk.reserve(file.fileno(), 2**20)
        stat = os.fstat(file.fileno())
        assert stat.st_size == 2**20
        os.posix_fallocate(file.fileno(), 0, 2**20)
        assert os.fstat(file.fileno()).st_blocks == stat.st_blocks, "nothing was left to set aside"


@pytest.mark.parametrize(("drops", "silence", "why"), [(0, 0.3, "in time"), (1000, 1, "bytes a second")])
def test_silence_and_trickles_time_out(site: Site, tmp_path: Path, drops: int, silence: float, why: str) -> None:
    def answer(number: int, handler: Handler) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.send_header("ETag", '"v1"')
        handler.end_headers()
        for _ in range(drops):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.05)
        site.closing.wait(60)
        return True

    site.answer = answer
    policy = Policy(read_timeout=silence, attempts=1, backoff=0.001)
    start = time.monotonic()
    assert why in fails(site, tmp_path / "f", policy=policy).message
    assert time.monotonic() - start < 30


def test_nobody_there(tmp_path: Path, site: Site) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/f?X-Amz-Signature=s3cret"
    error = fails(site, tmp_path / "f", url=url)
    assert error.code == "SOURCE_UNREACHABLE"
    assert "s3cret" not in f"{error.message} {error.requested}"


def test_progress_ends_it_at_once(site: Site, tmp_path: Path) -> None:
    """Also while the server is silent: no thread and no descriptor stays behind."""
    site.answer = lambda n, handler: site.closing.wait(60) or handler.plain(200)
    threads, start = threading.active_count(), time.monotonic()
    seen: list[float] = []

    def on_progress(phase: str, done: int, total: int | None) -> None:
        seen.append(time.monotonic())
        if len(seen) > 3:
            raise Stop

    with pytest.raises(Stop):
        download(site.url, tmp_path / "f", parts=2, on_progress=on_progress)
    assert time.monotonic() - start < 15
    workers = [t for t in threading.enumerate() if "_work" in t.name]
    assert not workers, threads
    assert not any(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(fd: int, data: memoryview, at: int) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        assert fails(site, tmp_path / "f").code == "DISK_FULL"
    assert not any(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: os.statvfs_result([1, 1, 10, 10, 10, 0, 0, 0, 0, 255]))
        assert fails(site, tmp_path / "f").code == "DISK_FULL"
    assert not any(tmp_path.iterdir())
    get(site, tmp_path / "f")


def moved(to: str) -> Callable[[int, Handler], bool]:
    return lambda n, handler: handler.plain(302, Location=to)


def test_secrets_stay_with_their_origin(site: Site, other: Site, tmp_path: Path) -> None:
    site.answer = moved(other.url)
    url = site.url.replace("://", "://user:p%40ss@")
    get(other, tmp_path / "f", url=url, headers={"X-Token": "t", "Cookie": "c"})
    _, _, first = site.asked[0]
    assert first["authorization"] == "Basic " + base64.b64encode(b"user:p@ss").decode()
    assert (first["x-token"], first["cookie"]) == ("t", "c")
    for _, _, headers in other.asked:
        assert not {"authorization", "x-token", "cookie"} & set(headers)
    assert len(site.asked) <= 3, "pieces go straight to where it leads"


def test_redirects_on_one_origin_keep_what_was_sent(site: Site, tmp_path: Path) -> None:
    site.answer = lambda n, handler: n == 1 and handler.plain(307, Location="/elsewhere")
    get(site, tmp_path / "f", headers={"X-Token": "t"})
    assert site.asked[1][1] == "/elsewhere"
    assert site.asked[1][2]["x-token"] == "t"


def test_too_many_redirects(site: Site, tmp_path: Path) -> None:
    site.answer = lambda n, handler: handler.plain(302, Location=f"/{n}")
    assert "redirects" in fails(site, tmp_path / "f").message
    assert len(site.asked) == MAX_REDIRECTS + 1
    site.asked.clear()
    site.answer = lambda n, handler: n <= 5 and handler.plain(302, Location=f"/{n}")
    get(site, tmp_path / "f")


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://[::1"])
def test_redirects_lead_to_http_only(site: Site, tmp_path: Path, to: str) -> None:
    site.answer = moved(to)
    assert fails(site, tmp_path / "f").code == "URL_NOT_ALLOWED"


def test_a_redirect_that_expired_is_asked_for_again(site: Site, other: Site, tmp_path: Path) -> None:
    site.answer = moved(other.url)
    other.answer = lambda n, handler: n == 3 and handler.plain(403)
    assert get(other, tmp_path / "f", url=site.url, parts=1).sha256 == SHA
    assert len(site.asked) == 2


def test_private_addresses_can_be_kept_out(site: Site, tmp_path: Path) -> None:
    policy = Policy(reach=Reach())
    for url in (site.url, site.url.replace("127.0.0.1", "localhost")):
        assert fails(site, tmp_path / "f", url=url, policy=policy).code in ("URL_NOT_ALLOWED", "SOURCE_UNREACHABLE")
    assert not site.asked


@pytest.mark.parametrize(
    "url", ["", "file:///x", "http://", "http://a b/", "http://a/\r\nX: y", "http://a:99999/", "//x/y"]
)
def test_what_is_no_http_url_is_refused(tmp_path: Path, url: str, site: Site) -> None:
    assert fails(site, tmp_path / "f", url=url).code == "URL_NOT_ALLOWED"


def test_a_senseless_sha256_is_refused(site: Site, tmp_path: Path) -> None:
    assert fails(site, tmp_path / "f", url=site.url + "#sha256=123").code == "INVALID_INPUTS"


def test_many_share_their_connections(site: Site, tmp_path: Path) -> None:
    site.rate = 2e7
    files = [Wanted(site.url, f"part{i % 3}/f{i}", sha256=SHA if i % 2 else None) for i in range(9)]
    reports: list[tuple[int, int | None]] = []
    found = download_many(
        files, tmp_path, connections=4, policy=QUICK, on_progress=lambda p, d, t: reports.append((d, t))
    )
    assert [f.path for f in found] == [f.path for f in files]
    assert all((tmp_path / f.path).read_bytes() == DATA for f in files)
    assert 2 <= site.most <= 4
    assert reports[-1] == (9 * len(DATA), 9 * len(DATA))
    assert [d for d, _ in reports] == sorted(d for d, _ in reports)


def test_none_of_many_is_there_until_all_are(site: Site, tmp_path: Path) -> None:
    def answer(number: int, handler: Handler) -> bool:
        if handler.path != "/bad":
            return False
        while kept(tmp_path / "good") < len(DATA) and not site.closing.is_set():
            time.sleep(0.01)
        return handler.plain(404)

    site.answer = answer
    files = [Wanted(site.url, "good"), Wanted(site.url.rpartition("/")[0] + "/bad", "bad")]
    with pytest.raises(ApiError):
        download_many(files, tmp_path, policy=Policy())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good.part", "good.part.json"]
    site.answer = lambda n, handler: False
    download_many([Wanted(again(site), "good"), Wanted(again(site), "bad")], tmp_path, policy=QUICK)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "good"]
    assert sent(site) == len(DATA) + 1, "the whole one is only asked whether it is still the same"


@pytest.mark.parametrize("path", ["../x", "/x", "a/../b", "", "a//b"])
def test_paths_stay_below_the_folder(site: Site, tmp_path: Path, path: str) -> None:
    with pytest.raises(ValueError, match="not below"):
        download_many([Wanted(site.url, path)], tmp_path)


def read(site: Site, **options: object) -> bytes:
    with io.BufferedReader(open_stream(site.url, policy=QUICK, **options), 65536) as stream:
        return stream.read()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_stream_goes_on_after_cuts(site: Site, ranges: bool) -> None:
    rng = random.Random(5)
    site.ranges = ranges
    site.cut = lambda n: rng.randrange(100_000, 900_000) if n < 4 else None
    assert read(site, sha256=SHA) == DATA
    assert bodies(site) >= 3


def test_a_stream_does_not_join_two_contents(site: Site) -> None:
    site.cut = lambda n: 500_000 if n == 1 else None
    site.answer = lambda n, handler: n == 2 and setattr(site, "etag", '"v2"') is not None
    with pytest.raises(ApiError) as error:
        read(site)
    assert error.value.code == "SOURCE_UNREACHABLE"
    site.ranges, site.etag, site.answer = False, "", lambda n, handler: False
    site.asked.clear()
    with pytest.raises(ApiError, match="neither ranges nor a strong ETag"):
        read(site)


def test_a_stream_compares_the_sha256_at_its_end(site: Site) -> None:
    site.data = flipped()
    with pytest.raises(ApiError) as error:
        read(site, sha256=SHA)
    assert error.value.code == "MODEL_CORRUPT"


def test_a_stream_can_be_closed_while_it_waits(site: Site) -> None:
    site.rate = 1e3  # 50 seconds between two pieces
    stream = open_stream(site.url, policy=Policy(read_timeout=40))
    threading.Timer(0.2, stream.close).start()
    start = time.monotonic()
    with pytest.raises((ApiError, ValueError)):
        while stream.read(1_000_000):
            pass
    assert time.monotonic() - start < 20
