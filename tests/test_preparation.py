import errno, gzip, hashlib, http.server, io, json, os, shutil, signal, socket, ssl, stat, subprocess, sys, tarfile, threading, time, types, zipfile
from pathlib import Path
import pytest
from mbd import datasets, preparation
from mbd.preparation import (ArchiveError, DiskFullError, DownloadError, Entry, Guard, PreparationError, Source, checksum, download, prepare, unpack)

LIST = "UCF101TrainTestSplits-RecognitionTask.zip"
NO_SUM = {LIST: None}
RAR = b"Rar!\x1a\x07\x00"
FAST = {"wait": 0.001, "timeout": 5}


class Shelf(http.server.BaseHTTPRequestHandler):
    "Serves server.files; server.cuts holds what happens to the coming answers: bytes after which the line drops, or None."
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def log_message(self, *given): pass

    def do_GET(self):
        s = self.server
        body = s.files.get(self.path)
        s.asked.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        if callable(body): return body(self)
        if body is None: return self.send_error(404)
        wanted, proof = self.headers.get("Range"), self.headers.get("If-Range")
        use = s.ranges and wanted and proof in (None, s.tag, s.date)
        start = int(wanted[6:].split("-")[0]) if use else 0
        if use and start >= len(body): return self.send_error(416)
        self.send_response(206 if use else 200)
        if use: self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if s.tag: self.send_header("ETag", s.tag)
        if s.date: self.send_header("Last-Modified", s.date)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        cut = s.cuts.pop(0) if s.cuts else None
        self.wfile.write(body[start:] if cut is None else body[start:start + cut])
        if cut is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    "A kill loses nothing that was written; only a power cut would, and none of these tests cuts the power."
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def server():
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Shelf)
    s.files, s.asked, s.cuts, s.ranges, s.tag, s.date = {}, [], [], True, '"one"', None
    threading.Thread(target=s.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    s.base = f"http://127.0.0.1:{s.server_port}"
    yield s
    s.shutdown()
    s.server_close()


def zipped(entries):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in entries.items(): archive.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


def tarred(entries, zip=True):
    "A tar(.gz): {name: bytes or TarInfo}."
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in entries.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if content is not info: info.size = len(content)
            archive.addfile(info, None if content is info else io.BytesIO(content))
    return gzip.compress(out.getvalue(), 1) if zip else out.getvalue()


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def tree(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file() and not {preparation.WORK, "downloads"} & set(p.relative_to(folder).parts)}


UCF_VIDEOS = {f"UCF-101/{c}/v_{c}_g{g:02}_c01.avi": (c + str(g)).encode() * 50 for c in ("Archery", "YoYo") for g in (1, 2, 3)}
UCF_LISTS = {"ucfTrainTestlist/classInd.txt": "1 Archery\r\n2 YoYo\r\n", "ucfTrainTestlist/testlist01.txt": "Archery/v_Archery_g01_c01.avi\r\nYoYo/v_YoYo_g01_c01.avi\r\n",
             "ucfTrainTestlist/trainlist01.txt": "".join(f"{c}/v_{c}_g{g:02}_c01.avi {n}\r\n" for n, c in enumerate(("Archery", "YoYo"), 1) for g in (2, 3))}
UCF = {**UCF_VIDEOS, **{n: t.encode() for n, t in UCF_LISTS.items()}}


@pytest.fixture
def ucf(server):
    server.files |= {"/UCF101.rar": zipped(UCF_VIDEOS), f"/{LIST}": zipped(UCF_LISTS)}
    return {"urls": server.base, "checksums": NO_SUM, "say": None, **FAST}


# downloads

BODY = bytes(range(256)) * 4000


def test_a_dropped_line_is_continued_where_it_stopped(server, tmp_path):
    server.files["/a.bin"], server.cuts, seen = BODY, [300_000, 200_000], []
    assert download(f"{server.base}/a.bin", tmp_path / "x/a.bin", "md5:" + hashlib.md5(BODY).hexdigest(), progress=lambda *t: seen.append(t), **FAST).read_bytes() == BODY
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["a.bin"] and seen[-1] == (len(BODY), len(BODY)) and seen == sorted(seen)
    assert [asked[1:] for asked in server.asked] == [(None, None), ("bytes=300000-", '"one"'), ("bytes=500000-", '"one"')]
    n = len(server.asked)
    download(f"{server.base}/a.bin", tmp_path / "x/a.bin", **FAST)
    assert len(server.asked) == n                # it is there


def stop(done, total): raise KeyboardInterrupt


def begun(server, file, cut=300_000):
    "A download that was given up after `cut` bytes."
    server.files["/a.bin"], server.cuts = BODY, [cut]
    with pytest.raises(KeyboardInterrupt): download(f"{server.base}/a.bin", file, progress=lambda done, total: stop(done, total) if done >= cut else None, **FAST)
    assert file.with_name(file.name + ".part").stat().st_size == cut and not file.exists()


def test_a_later_call_continues(server, tmp_path):
    begun(server, tmp_path / "a.bin")
    assert download(f"{server.base}/a.bin", tmp_path / "a.bin", **FAST).read_bytes() == BODY and server.asked[-1][1] == "bytes=300000-"


def test_date_stands_in_for_a_weak_tag_and_without_both_nothing_is_joined(server, tmp_path):
    server.tag, server.date = 'W/"one"', "Sun, 01 Nov 2020 00:00:00 GMT"
    begun(server, tmp_path / "a.bin")
    download(f"{server.base}/a.bin", tmp_path / "a.bin", **FAST)
    assert server.asked[-1][1:] == ("bytes=300000-", server.date)
    server.tag = server.date = None
    begun(server, tmp_path / "b.bin")
    download(f"{server.base}/a.bin", tmp_path / "b.bin", **FAST)
    assert server.asked[-1][1] is None
    begun(server, tmp_path / "c.bin")
    download(f"{server.base}/a.bin", tmp_path / "c.bin", checksum(tmp_path / "b.bin"), **FAST)     # a checksum will judge
    assert server.asked[-1][1:] == ("bytes=300000-", None)


@pytest.mark.parametrize("ranges", (True, False))
def test_a_file_that_changed_meanwhile_is_begun_again(server, tmp_path, ranges):
    begun(server, tmp_path / "a.bin")
    server.files["/a.bin"], server.tag, server.ranges = BODY[::-1], '"two"', ranges
    assert download(f"{server.base}/a.bin", tmp_path / "a.bin", **FAST).read_bytes() == BODY[::-1]


def test_a_server_that_joins_another_file_is_not_believed(server, tmp_path):
    begun(server, tmp_path / "a.bin")
    def liar(request):                           # ignores If-Range
        start = int((request.headers.get("Range") or "bytes=0-")[6:-1])
        new = BODY[::-1] + b"!"
        request.send_response(206 if start else 200)
        if start: request.send_header("Content-Range", f"bytes {start}-{len(new) - 1}/{len(new)}")
        request.send_header("Content-Length", str(len(new) - start))
        request.end_headers()
        request.wfile.write(new[start:])
    server.files["/a.bin"] = liar
    assert download(f"{server.base}/a.bin", tmp_path / "a.bin", **FAST).read_bytes() == BODY[::-1] + b"!"


def test_a_server_without_ranges_starts_again(server, tmp_path):
    server.ranges = False
    begun(server, tmp_path / "a.bin")
    assert download(f"{server.base}/a.bin", tmp_path / "a.bin", **FAST).read_bytes() == BODY


def test_a_shrunken_file_and_a_complete_part(server, tmp_path):
    begun(server, tmp_path / "a.bin")
    server.files["/a.bin"] = BODY[:1000]         # same tag: the server says 416
    assert download(f"{server.base}/a.bin", tmp_path / "a.bin", **FAST).read_bytes() == BODY[:1000]
    begun(server, tmp_path / "b.bin", len(BODY))
    n = len(server.asked)
    assert download(f"{server.base}/a.bin", tmp_path / "b.bin", **FAST).read_bytes() == BODY and len(server.asked) == n


def test_truncation_ends_with_words_and_keeps_the_part(server, tmp_path):
    server.files["/a.bin"], server.cuts = BODY, [5000] + [0] * 10
    with pytest.raises(DownloadError, match="dropped after 5,000 of 1,024,000.*3 attempts.*5,000 bytes are kept"): download(f"{server.base}/a.bin", tmp_path / "a.bin", retries=2, **FAST)
    assert not (tmp_path / "a.bin").exists() and (tmp_path / "a.bin.part").stat().st_size == 5000


def test_wrong_checksum_keeps_nothing(server, tmp_path):
    server.files["/a.zip"] = zipped({"a": b"1"})
    with pytest.raises(DownloadError, match="has the checksum sha256:.*not sha256:0000.*removed"): download(f"{server.base}/a.zip", tmp_path / "a.zip", "sha256:" + "0" * 64, **FAST)
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.zip").write_bytes(b"PK mine")
    with pytest.raises(DownloadError, match="a.zip has the checksum.*move it away"): download(f"{server.base}/a.zip", tmp_path / "a.zip", "md5:" + "0" * 32, **FAST)
    assert (tmp_path / "a.zip").read_bytes() == b"PK mine"                                 # the user's own file is never removed
    for bad in ("0" * 64, "sha256:12", "crc:1234", ":"):
        with pytest.raises(ValueError, match="checksum"): download(f"{server.base}/a.zip", tmp_path / "b.zip", bad)


def test_a_web_page_is_no_archive(server, tmp_path):
    server.files |= {"/a.rar": b"<!DOCTYPE html><p>log in", "/a.csv": b"\n<html>"}
    with pytest.raises(DownloadError, match="no archive but a web page"): download(f"{server.base}/a.rar", tmp_path / "a.rar", **FAST)
    with pytest.raises(DownloadError, match="web page, not a list"): download(f"{server.base}/a.csv", tmp_path / "a.csv", **FAST)
    assert not list(tmp_path.iterdir())


def answer(code, **headers):
    def send(request):
        request.send_response(code)
        for name, value in {"Content-Length": "0", **headers}.items(): request.send_header(name.replace("_", "-"), value)
        request.end_headers()
    return send


def test_only_http_and_only_downwards_never(server, tmp_path):
    for url in ("file:///etc/hostname", "ftp://x/a", "data:,a", "/etc/hostname", "http:///a"):
        with pytest.raises(DownloadError, match="only http"): download(url, tmp_path / "a", **FAST)
    for target in ("file:///etc/hostname", "ftp://127.0.0.1/a", "data:,a"):
        server.files["/a"] = answer(302, Location=target)
        with pytest.raises(DownloadError, match="leads to.*only http"): download(f"{server.base}/a", tmp_path / "a", **FAST)
    with pytest.raises(DownloadError, match="encrypted"): preparation._check_url("http://x/a", "https://x/a")
    server.files |= {"/a": answer(301, Location="/b"), "/b": b"here"}
    assert download(f"{server.base}/a", tmp_path / "a", **FAST).read_bytes() == b"here"
    server.files["/loop"] = answer(302, Location="/loop")
    with pytest.raises(DownloadError): download(f"{server.base}/loop", tmp_path / "loop", **FAST)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_waiting_does_not_mend_is_said_at_once(server, tmp_path):
    with pytest.raises(DownloadError, match="404.*urls=.*browser"): download(f"{server.base}/none", tmp_path / "a", **FAST)
    assert len(server.asked) == 1
    server.files["/busy"] = answer(503)
    with pytest.raises(DownloadError, match="503.*3 attempts"): download(f"{server.base}/busy", tmp_path / "a", retries=2, **FAST)
    assert len(server.asked) == 4
    server.files["/packed"] = answer(200, Content_Encoding="gzip")
    with pytest.raises(DownloadError, match="packed"): download(f"{server.base}/packed", tmp_path / "a", **FAST)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(DownloadError, match="online"): download(f"http://127.0.0.1:{free.getsockname()[1]}/a", tmp_path / "a", retries=1, **FAST)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/my folder/a", "http://127.0.0.1:9/\u00fcbung/a", "http://127.0.0.1:port/a", "http://127.0.0.1:99999/a", "http://[bad/a", "http://127.0.0.1:9/a\r\nHost: x"])
def test_an_address_that_is_none_is_refused_before_anybody_is_asked(tmp_path, url):
    begin = time.monotonic()
    with pytest.raises(DownloadError, match="(?s)is no address.*urls="): download(url, tmp_path / "a", retries=5, wait=1)
    assert time.monotonic() - begin < 1 and not list(tmp_path.iterdir())


def test_a_redirect_may_name_a_file_with_a_blank(server, tmp_path):
    server.files |= {"/a": answer(302, Location="/my file"), "/my%20file": b"here"}
    assert download(f"{server.base}/a", tmp_path / "a", **FAST).read_bytes() == b"here"


@pytest.mark.parametrize("length", ["abc", "5, 5", "-5", ""])
def test_a_length_that_is_no_number_is_an_unknown_length(server, tmp_path, length):
    def send(request):
        request.send_response(200)
        request.send_header("Content-Length", length)
        request.end_headers()
        request.wfile.write(BODY)
        request.close_connection = True
    server.files["/a.bin"] = send
    assert download(f"{server.base}/a.bin", tmp_path / "a.bin", **FAST).read_bytes() == BODY


def test_a_silent_server_is_not_waited_for_forever(server, tmp_path):
    server.files["/slow"] = lambda request: time.sleep(0.6)
    begin = time.monotonic()
    with pytest.raises(DownloadError, match="timed out"): download(f"{server.base}/slow", tmp_path / "a", timeout=0.1, retries=1, wait=0.001)
    assert time.monotonic() - begin < 2


def test_certificates_are_verified_and_the_message_says_what_to_do(tmp_path, monkeypatch):
    handler = next(h for h in preparation._opener().handlers if isinstance(h, preparation.urllib.request.HTTPSHandler))
    assert handler._context.verify_mode == ssl.CERT_REQUIRED and handler._context.check_hostname
    assert not {"FileHandler", "FTPHandler", "DataHandler"} & {type(h).__name__ for h in preparation._opener().handlers}
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_message, calls = "unable to get local issuer certificate", []
    class Opener:
        def open(self, request, timeout): calls.append(1); raise preparation.urllib.error.URLError(error)
    monkeypatch.setattr(preparation, "_opener", Opener)
    with pytest.raises(DownloadError, match=r"unable to get local issuer.*Verification stays on.*browser, save the file as .*UCF101.rar.*SSL_CERT_FILE"): download("https://www.crcv.ucf.edu/UCF101.rar", tmp_path / "UCF101.rar")
    assert len(calls) == 1


def test_a_certificate_that_nobody_vouches_for_is_refused(server, tmp_path, monkeypatch):
    openssl = shutil.which("openssl") or pytest.skip("openssl makes the certificate for this test")
    subprocess.run([openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", tmp_path / "key", "-out", tmp_path / "cert", "-days", "2",
                    "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.files["/a.bin"] = BODY
    url = server.base.replace("http:", "https:") + "/a.bin"
    with pytest.raises(DownloadError, match="certificate cannot be verified.*Verification stays on"): download(url, tmp_path / "a.bin", **FAST)
    assert not server.asked and not (tmp_path / "a.bin.part").exists()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert"))               # the remedy that the message names
    assert download(url, tmp_path / "a.bin", **FAST).read_bytes() == BODY


# full disk

def fill(monkeypatch, limit):
    "From now on the disk takes `limit` more bytes."
    left, real = [limit], preparation._write
    def write(out, block):
        if len(block) > left[0]:
            real(out, block[:left[0]])
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= len(block)
        real(out, block)
    monkeypatch.setattr(preparation, "_write", write)


def test_full_disk_while_fetching_is_told_and_continued(server, tmp_path, monkeypatch):
    server.files["/a.bin"] = BODY
    with monkeypatch.context() as m:
        fill(m, 250_000)
        with pytest.raises(DiskFullError, match="a.bin.*needs [0-9.]+ KiB.*free are.*continues") as told: download(f"{server.base}/a.bin", tmp_path / "a.bin", **FAST)
    assert told.value.folder == tmp_path and len(BODY) - 250_000 <= told.value.needed <= len(BODY) and told.value.free > 0
    had = (tmp_path / "a.bin.part").stat().st_size
    assert had == 250_000 and download(f"{server.base}/a.bin", tmp_path / "a.bin", **FAST).read_bytes() == BODY and server.asked[-1][1] == f"bytes={had}-"


def test_room_is_asked_before_the_first_byte(server, tmp_path, monkeypatch):
    server.files["/a.bin"] = BODY
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=preparation.RESERVE + 1000))
    with pytest.raises(DiskFullError, match="free are 64.0 MiB"): download(f"{server.base}/a.bin", tmp_path / "a.bin", **FAST)
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.zip").write_bytes(zipped({"a": b"1" * 5000}))
    with pytest.raises(DiskFullError): unpack(tmp_path / "a.zip", tmp_path / "out")
    assert tree(tmp_path / "out") == {}


@pytest.mark.parametrize("pack", (zipped, tarred))
def test_full_disk_while_unpacking_leaves_nothing_and_a_later_run_continues(ucf, server, tmp_path, monkeypatch, pack):
    server.files["/UCF101.rar"] = pack(UCF_VIDEOS)
    with monkeypatch.context() as m:
        download(f"{server.base}/UCF101.rar", tmp_path / "downloads/UCF101.rar")
        fill(m, 1500)
        with pytest.raises(DiskFullError, match="UCF101.rar|RecognitionTask"): prepare("ucf101", tmp_path, **ucf)
    assert not (tmp_path / "UCF-101").exists() and not list((tmp_path / preparation.WORK).glob("*.new"))
    assert prepare("ucf101", tmp_path, **ucf).videos == 6 and tree(tmp_path) == UCF


# archives

def refused(tmp_path, data, match, name="a.zip", **more):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ArchiveError, match=match): unpack(tmp_path / name, tmp_path / "in/out", **more)
    (tmp_path / name).unlink()
    assert not list((tmp_path / "in").rglob("*.*")) and [p.name for p in tmp_path.iterdir()] == ["in"], "something was written"


NAMES = ("/absolute.txt", "../outside.txt", "a/../../outside.txt", "C:/x.txt", "C:x.txt", "a\\b.txt", "..\\x.txt", "CON", "a/nul.txt", "com1.avi", "a:b", "a./b.txt", "blank /b.txt", "a?.txt", "a\x01b", "x" * 256, "a/" * 40 + "b.txt")


@pytest.mark.parametrize("pack", (zipped, tarred))
@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_elsewhere_are_refused(tmp_path, pack, name):
    refused(tmp_path, pack({"good.txt": b"1", name: b"2"}), "nothing of it was put in place")


@pytest.mark.parametrize("pack", (zipped, tarred))
def test_an_archive_cannot_write_our_records(ucf, tmp_path, pack):
    planted = json.dumps({"schema": 1, "name": "ucf101", "archives": {"UCF101.rar": {"files": 1, "bytes": 1, "skipped": 0, "places": ["a"], "folder": "root", "size": 1, "videos": 13320}}}).encode()
    (tmp_path / "evil").write_bytes(pack({"a": b"1", f"{preparation.WORK}/record.json": planted}))
    with pytest.raises(ArchiveError, match="our own records"): unpack(tmp_path / "evil", tmp_path / "set")
    assert not tree(tmp_path / "set") and prepare("ucf101", tmp_path / "set", **ucf).videos == len(UCF_VIDEOS)


def test_links_and_devices_are_refused(tmp_path):
    for kind, word in ((tarfile.SYMTYPE, "symbolic"), (tarfile.LNKTYPE, "hard"), (tarfile.FIFOTYPE, "pipe"), (tarfile.CHRTYPE, "device"), (tarfile.BLKTYPE, "device")):
        refused(tmp_path, tarred({"a.txt": b"1", "b": link("b", "a.txt", kind)}), word)
    refused(tmp_path, tarred({"d": link("d", "..", tarfile.SYMTYPE), "d/outside.txt": b"1"}), "symbolic")
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        info = zipfile.ZipInfo("b")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    refused(tmp_path, out.getvalue(), "symbolic link")


@pytest.mark.parametrize("names", (("A/x.txt", "a/y.txt"), ("x.txt", "X.TXT"), ("e\u0301.txt", "\u00e9.txt"), ("a", "a/b.txt"), ("a/b.txt", "a"), ("stra\u00dfe", "STRASSE")))
def test_names_that_would_collide_on_some_system_are_refused(tmp_path, names):
    for pack in (zipped, tarred): refused(tmp_path, pack({n: b"1" for n in names}), "collides")


def test_the_same_name_twice_is_refused(tmp_path):
    with pytest.warns(UserWarning), zipfile.ZipFile(out := io.BytesIO(), "w") as archive:
        for text in ("1", "2"): archive.writestr(zipfile.ZipInfo("a.txt"), text)
    refused(tmp_path, out.getvalue(), "twice")
    refused(tmp_path, zipped({"x/a.txt": b"1", "y/a.txt": b"2"}), "twice", depth=1)      # one name is left of both


def test_bombs_are_refused_before_they_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "FLOOR", 100_000)
    with zipfile.ZipFile(out := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive: archive.writestr("a.txt", bytes(3_000_000))
    refused(tmp_path, out.getvalue(), "limit for an archive of this size")
    refused(tmp_path, tarred({"a.txt": bytes(3_000_000)}), "limit for an archive of this size", "a.tar.gz")
    monkeypatch.setattr(preparation, "ENTRIES", 3)
    refused(tmp_path, zipped({str(n): b"" for n in range(4)}), "more than 3")


def test_an_entry_writes_what_it_claims(tmp_path):
    for blocks, word in (([b"12345"], "more"), ([b"1"], "less")):
        guard = Guard("a.zip", 100, tmp_path)
        with pytest.raises(ArchiveError, match=f"{word} than the 3 bytes"): preparation._write_entry(guard, Entry("a", 3, "file", lambda: iter(blocks)), tmp_path / word)


def test_damaged_and_cut_off_archives(tmp_path):
    whole = tarred({f"{n}.avi": os.urandom(3000) for n in range(20)})
    for data in (whole[:len(whole) // 2], whole[:-4], whole[:-30] + b"x" * 30, b"no archive at all", zipped({"a": b"1"})[:-10]): refused(tmp_path, data, "damaged or cut off")
    plain = tarred({"a.avi": b"1" * 2000, "b.avi": b"2" * 2000}, zip=False)
    refused(tmp_path, plain[:1500], "damaged or cut off", "a.tar")
    data = bytearray(zipped({"a.txt": b"12345678"}))
    data[data.index(b"12345678")] ^= 1
    refused(tmp_path, bytes(data), "damaged or cut off")


@pytest.mark.parametrize("count", [400, pytest.param(6000, marks=pytest.mark.slow)])
def test_archives_with_random_bytes_changed_are_unpacked_or_refused(tmp_path, count):
    import numpy as np
    noise, sources = np.random.default_rng(0), {}
    films = {f"UCF-101/C{n % 3}/v_C{n % 3}_g{n:02}_c01.avi": noise.bytes(300) if n % 2 else b"film" * 90 for n in range(6)}
    for name, method in (("stored", zipfile.ZIP_STORED), ("deflated", zipfile.ZIP_DEFLATED), ("bzip2", zipfile.ZIP_BZIP2), ("lzma", zipfile.ZIP_LZMA)):
        with zipfile.ZipFile(out := io.BytesIO(), "w", method) as archive:
            for film, content in films.items(): archive.writestr(film, content)
        sources[name] = out.getvalue()
    long = tarfile.TarInfo("UCF-101/" + "\u00fc" * 90 + ".avi")
    long.pax_headers = {"comment": "x", "mtime": "1.5"}
    sources |= {"tar": tarred(films, zip=False), "tar.gz": tarred(films), "long": tarred({**films, "long": long}, zip=False)}
    outcomes = set()
    for n in range(count):
        rng, data, folder = np.random.default_rng([1, n]), bytearray(list(sources.values())[n % len(sources)]), tmp_path / str(n)
        for at in rng.integers(0, len(data) if n % 3 else 700, int(rng.integers(1, 9))): data[at] = rng.integers(256)
        if n % 5 == 0: del data[int(rng.integers(len(data))):]
        folder.mkdir()
        (folder / "archive").write_bytes(data)
        try: outcomes.add("unpacked" if unpack(folder / "archive", folder / "set") else "")
        except PreparationError:
            outcomes.add("refused")
            assert not tree(folder / "set")
        assert {p.name for p in folder.iterdir()} <= {"archive", "set"} and len(list(tmp_path.iterdir())) == 1      # nothing beside
        shutil.rmtree(folder)
    assert outcomes == {"unpacked", "refused"}


def test_what_is_kept_of_a_name(tmp_path):
    (tmp_path / "a.zip").write_bytes(zipped({"./x/UCF-101/YoYo/v.avi": b"1", "x/UCF-101/YoYo/Thumbs.db": b"2", "__MACOSX/x/._v.avi": b"3", "x/UCF-101/Sit & [do] + (x);!#~@.AVI": b"4"}))
    assert unpack(tmp_path / "a.zip", tmp_path / "out", into="UCF-101", depth=2, endings=(".avi",)) == {"files": 2, "bytes": 4, "skipped": 2, "places": ["UCF-101"]}
    assert tree(tmp_path / "out") == {"UCF-101/YoYo/v.avi": b"1", "UCF-101/UCF-101/Sit & [do] + (x);!#~@.AVI": b"4"}
    (tmp_path / "b.zip").write_bytes(zipped({"readme.md": b"1"}))
    with pytest.raises(ArchiveError, match="holds no file that ends in .avi"): unpack(tmp_path / "b.zip", tmp_path / "b", endings=(".avi",))
    (tmp_path / "c.zip").write_bytes(zipped({"v.avi": b"1"}))
    with pytest.raises(ArchiveError, match="not the archive that was expected"): unpack(tmp_path / "c.zip", tmp_path / "c", depth=2)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/v.avi").mkdir()
    with pytest.raises(PreparationError, match="in the way"): unpack(tmp_path / "c.zip", tmp_path / "d")


def test_unpacking_adds_to_a_folder_and_follows_a_link_of_the_user(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/UCF-101").symlink_to(tmp_path / "other", target_is_directory=True)
    (tmp_path / "other/mine.avi").write_bytes(b"mine")
    (tmp_path / "a.zip").write_bytes(zipped(UCF_VIDEOS))
    unpack(tmp_path / "a.zip", tmp_path / "out")
    assert (tmp_path / "other/YoYo/v_YoYo_g01_c01.avi").exists() and (tmp_path / "other/mine.avi").read_bytes() == b"mine"


def test_unpacking_onto_another_disk(tmp_path, monkeypatch):
    real = os.replace
    def replace(a, b):
        if Path(a).parent != Path(b).parent and ".ready" in str(a): raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(a, b)
    monkeypatch.setattr(os, "replace", replace)
    (tmp_path / "a.zip").write_bytes(zipped(UCF_VIDEOS))
    unpack(tmp_path / "a.zip", tmp_path / "out")
    assert tree(tmp_path / "out") == UCF_VIDEOS


# rar

def fake_rarfile(monkeypatch):
    "A library that reads 'rars' made of a rar signature and a zip."
    class Error(Exception): pass
    class Info:
        def __init__(self, z): self.z, self.filename, self.file_size, self.file_redir = z, z.filename, z.file_size, None
        def needs_password(self): return self.filename.startswith("secret")
        def is_symlink(self): return self.filename.startswith("link")
        def is_dir(self): return self.z.is_dir()
    class RarFile:
        def __init__(self, path):
            data = Path(path).read_bytes()
            if b"BROKEN" in data: raise Error("bad header")
            self.zip = zipfile.ZipFile(io.BytesIO(data[len(RAR):]))
        def __enter__(self): return self
        def __exit__(self, *given): pass
        def infolist(self): return [Info(z) for z in self.zip.infolist()]
        def open(self, info): return self.zip.open(info.z)
    monkeypatch.setitem(sys.modules, "rarfile", types.SimpleNamespace(RarFile=RarFile, Error=Error, tool_setup=lambda: None))


def fake_libarchive(monkeypatch):
    import contextlib
    class ArchiveError(Exception): pass
    @contextlib.contextmanager
    def file_reader(path):
        data = Path(path).read_bytes()
        if b"BROKEN" in data: raise ArchiveError("bad header")
        def entries():
            with zipfile.ZipFile(io.BytesIO(data[len(RAR):])) as z:
                for i in z.infolist():
                    islink = i.filename.startswith("link")
                    yield types.SimpleNamespace(pathname=i.filename, size=i.file_size, issym=islink, islnk=False, isdir=i.is_dir(), isfile=not i.is_dir() and not islink,
                                                get_blocks=lambda size, i=i: iter([z.read(i)[:3], z.read(i)[3:]]))
        yield entries()
    monkeypatch.setitem(sys.modules, "rarfile", None)
    monkeypatch.setitem(sys.modules, "libarchive", types.SimpleNamespace(file_reader=file_reader, ArchiveError=ArchiveError))


def fake_bsdtar(monkeypatch, tmp_path):
    "A program that turns our 'rar' (signature and zip) into a tar stream, as `bsdtar -c -f - @archive` does."
    if os.name == "nt": pytest.skip("the stub is a script")
    program = tmp_path / "bin/bsdtar"
    program.parent.mkdir()
    program.write_text(f"""#!{sys.executable}
import io, sys, tarfile, zipfile
assert sys.argv[1:4] == ["-c", "-f", "-"] and sys.argv[4].startswith("@/") and len(sys.argv) == 5, sys.argv
data = open(sys.argv[4][1:], "rb").read()
if b"BROKEN" in data: sys.exit("bsdtar: bad header")
with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as out, zipfile.ZipFile(io.BytesIO(data[{len(RAR)}:])) as z:
    for i in z.infolist():
        t = tarfile.TarInfo(i.filename)
        t.size = i.file_size
        if i.filename.startswith("link"): t.type, t.linkname, t.size = tarfile.SYMTYPE, "/etc", 0
        out.addfile(t, io.BytesIO(z.read(i)))
    if any("CUT" in i.filename for i in z.infolist()): sys.exit("bsdtar: cut off")
""")
    program.chmod(0o755)
    monkeypatch.setitem(sys.modules, "rarfile", None)
    monkeypatch.setitem(sys.modules, "libarchive", None)
    monkeypatch.setenv("PATH", str(program.parent))


@pytest.fixture(params=("rarfile", "libarchive", "bsdtar"))
def rar(request, monkeypatch, tmp_path):
    "Each of the three ways, with a stand-in for the library or the program."
    {"rarfile": fake_rarfile, "libarchive": fake_libarchive}[request.param](monkeypatch) if request.param != "bsdtar" else fake_bsdtar(monkeypatch, tmp_path)
    assert preparation.rar_reader() == request.param
    return request.param


def rarred(entries): return RAR + zipped(entries)


def test_rar_is_unpacked_and_judged_by_the_same_rule(rar, tmp_path):
    place = tmp_path / "there; touch $(x)"        # no shell sees it
    place.mkdir()
    (place / "a.rar").write_bytes(rarred(UCF_VIDEOS))
    assert unpack(place / "a.rar", place / "out", into="UCF-101", depth=2)["files"] == 6 and tree(place / "out") == UCF_VIDEOS
    for name, word in (("../x.txt", "leads out"), ("/x", "absolute"), ("link", "link"), ("yoyo/x.avi", "collides")):
        (place / "b.rar").write_bytes(rarred({"YoYo/a.avi": b"1", name: b"2"}))
        with pytest.raises(ArchiveError, match=word): unpack(place / "b.rar", place / "b")
        assert tree(place) == {k: v for k, v in tree(place).items() if k.startswith(("out/", "a.rar", "b.rar"))} and not (place / "x.txt").exists()
    (place / "c.rar").write_bytes(RAR + b"BROKEN")
    with pytest.raises(ArchiveError, match="c.rar is damaged"): unpack(place / "c.rar", place / "c")


def test_a_program_that_fails_at_the_end_is_not_believed(monkeypatch, tmp_path):
    fake_bsdtar(monkeypatch, tmp_path)
    (tmp_path / "a.rar").write_bytes(rarred({"CUT.avi": b"1"}))
    with pytest.raises(ArchiveError, match="cut off.*rarfile"): unpack(tmp_path / "a.rar", tmp_path / "out")
    assert tree(tmp_path / "out") == {}


def test_without_a_rar_reader_the_message_says_what_to_install_and_a_folder_unpacked_by_hand_is_taken(monkeypatch, tmp_path, ucf, server):
    for name in ("rarfile", "libarchive"): monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(preparation, "_bsdtar", lambda: None)
    assert preparation.rar_reader() is None
    server.files["/UCF101.rar"] = rarred(UCF_VIDEOS)
    with pytest.raises(ArchiveError, match="rarfile.*unrar.*libarchive-c.*bsdtar.*by hand"): prepare("ucf101", tmp_path, **ucf)
    assert (tmp_path / "downloads/UCF101.rar").exists()
    for name, content in UCF_VIDEOS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ArchiveError): prepare("ucf101", tmp_path, **ucf)                       # 6 are not 13,320
    monkeypatch.setitem(preparation.SOURCES, "ucf101", tuple(Source(**{**vars(s), "videos": 6 if s.videos else 0}) for s in preparation.SOURCES["ucf101"]))
    assert prepare("ucf101", tmp_path, **ucf).videos == 6


def test_lists_and_folders_of_any_known_name_put_there_by_hand_are_taken(monkeypatch, tmp_path, hmdb, server):
    options, files = hmdb
    for name in ("rarfile", "libarchive"): monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(preparation, "_bsdtar", lambda: None)
    lists, videos = preparation.SOURCES["hmdb51"]
    monkeypatch.setitem(preparation.SOURCES, "hmdb51", (lists, Source(**{**vars(videos), "videos": 4})))
    monkeypatch.setitem(datasets.KNOWN, "hmdb51", (2, {(split, subset): {n: "official"} for split in (1, 2, 3) for subset, n in (("train", 2), ("test", 2), ("unused", 0))}))
    for name, content in files.items():
        for target in [name.replace("split1", f"split{k}") for k in (1, 2, 3)] if "split1" in name else [name.removeprefix("hmdb51_org/")]:
            (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / target).write_bytes(content)
    missing = tmp_path / "testTrainMulti_7030_splits/wave_test_split3.txt"
    text = missing.read_bytes(); missing.unlink()
    with pytest.raises(ArchiveError, match="test_train_splits.rar.*data/README.md"): prepare("hmdb51", tmp_path, **options)
    missing.write_bytes(text)
    asked = len(server.asked)
    assert prepare("hmdb51", tmp_path, **options).videos == 4 and len(server.asked) == asked


# the four sets

def test_ucf101_from_the_server(ucf, tmp_path):
    lines, seen = [], []
    made = prepare("ucf101", tmp_path / "set", **ucf | {"say": lines.append}, progress=lambda *t: seen.append(t))
    assert tree(tmp_path / "set") == UCF and (made.videos, made.archives, made.root, made.lists) == (6, 2, tmp_path / "set", tmp_path / "set")
    assert [d for d, _ in seen] == sorted(d for d, _ in seen) and len({t for _, t in seen}) == 1 and seen[-1][0] == seen[-1][1]
    assert lines[-1] == "ucf101: 6 videos in place" and any("UCF101.rar: fetching from 127.0.0.1, no checksum" in line for line in lines)
    train = datasets.load("ucf101", made.root)
    assert (train.expected, train.found) == (4, 4)


def test_lists_apart_files_of_the_user_and_throwing_archives_away(ucf, server, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/UCF101.rar").write_bytes(server.files.pop("/UCF101.rar"))
    made = prepare("ucf101", tmp_path / "set", source=tmp_path / "mine", annotations=tmp_path / "lists", keep=False, **ucf)
    assert [a[0] for a in server.asked] == [f"/{LIST}"] and (tmp_path / "mine/UCF101.rar").exists() and not list((tmp_path / "set/downloads").iterdir())
    assert set(tree(tmp_path / "lists")) == set(UCF_LISTS) and tree(tmp_path / "set") == UCF_VIDEOS
    assert datasets.load("ucf101", made.root, annotations=made.lists).found == 4
    n = len(server.asked)
    prepare("ucf101", tmp_path / "set", annotations=tmp_path / "lists", **ucf)
    assert len(server.asked) == n                                                             # done, though the archives are gone
    shutil.rmtree(tmp_path / "lists")
    prepare("ucf101", tmp_path / "set", annotations=tmp_path / "lists", **ucf)
    assert len(server.asked) == n + 1 and set(tree(tmp_path / "lists")) == set(UCF_LISTS)      # the lists were thrown away: again


def test_one_file_that_has_moved_is_fetched_from_its_address_and_the_others_from_where_they_are(ucf, server, tmp_path):
    server.files["/moved/UCF101.rar"] = server.files.pop("/UCF101.rar")
    with pytest.raises(DownloadError, match="404"): prepare("ucf101", tmp_path, **ucf)
    assert prepare("ucf101", tmp_path, **ucf | {"urls": [f"{server.base}/moved/UCF101.rar", server.base]}).videos == 6
    assert prepare("ucf101", tmp_path / "b", **ucf | {"urls": {LIST: f"{server.base}/{LIST}", "UCF101.rar": f"{server.base}/moved/UCF101.rar"}}).videos == 6
    with pytest.raises(ValueError, match="both taken for the folder"): prepare("ucf101", tmp_path / "c", **ucf | {"urls": [server.base, server.base + "/moved"]})


def test_checksums_of_the_table_and_of_the_user(ucf, server, tmp_path):
    with pytest.raises(DownloadError, match="not sha256:5c0d1a53"): prepare("ucf101", tmp_path, **ucf | {"checksums": None})
    bad = NO_SUM | {"UCF101.rar": "sha256:" + "1" * 64}
    with pytest.raises(DownloadError, match="not sha256:1111"): prepare("ucf101", tmp_path, **ucf | {"checksums": bad})
    assert not (tmp_path / "UCF-101").exists() and not list((tmp_path / "downloads").glob("UCF101.rar*"))
    good = NO_SUM | {"UCF101.rar": "sha256:" + hashlib.sha256(server.files["/UCF101.rar"]).hexdigest()}
    assert prepare("ucf101", tmp_path, **ucf | {"checksums": good}).videos == 6
    with pytest.raises(ValueError, match="UCF-101.rar.*did you mean 'UCF101.rar'"): prepare("ucf101", tmp_path, **ucf | {"checksums": {"UCF-101.rar": "x"}})


@pytest.fixture
def hmdb(server, monkeypatch):
    fake_rarfile(monkeypatch)
    videos = {f"hmdb51_org/{c}/{v}": (c + v).encode() for c in ("wave", "brush_hair") for v in (f"A_(x)_&_[y];_{c}_f_cm_np1_ba_med_1.avi", f"B+!#_{c}_f_cm_np1_ba_med_2.avi")}
    inner = {f"{c}.rar": rarred({n.removeprefix("hmdb51_org/"): b for n, b in videos.items() if f"/{c}/" in n}) for c in ("wave", "brush_hair")}
    lists = {f"testTrainMulti_7030_splits/{c}_test_split1.txt": "".join(f"{n.rpartition('/')[2]} {k} \n" for k, n in enumerate((n for n in videos if f"/{c}/" in n), 1)).encode() for c in ("wave", "brush_hair")}
    server.files |= {"/hmdb51_org.rar": rarred(inner), "/test_train_splits.rar": rarred(lists)}
    return {"urls": server.base, "say": None, **FAST}, {**videos, **lists}


def test_hmdb51_a_rar_of_rars(hmdb, tmp_path):
    options, whole = hmdb
    seen = []
    made = prepare("hmdb51", tmp_path, progress=lambda *t: seen.append(t), **options)
    assert tree(tmp_path) == whole and made.videos == 4 and seen[-1][0] == seen[-1][1] and [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert [p.name for p in (tmp_path / preparation.WORK).iterdir() if p.name not in ("record.json", "lock")] == []
    assert (datasets.load("hmdb51", tmp_path).found, datasets.load("hmdb51", tmp_path, subset="test").found) == (2, 2)
    assert prepare("hmdb51", tmp_path, **options).videos == 4
    shutil.rmtree(tmp_path / "hmdb51_org/wave")                       # thrown away: unpacked again
    assert prepare("hmdb51", tmp_path, **options).videos == 4 and tree(tmp_path) == whole


@pytest.fixture
def kinetics(server):
    def name(subset, n): return f"{subset[:3]}{n:08d}_000001_000011.mp4"
    parts = {(s, n): {f"./{name(s, 10 * n + k)}": f"{s}{n}{k}".encode() * 100 for k in range(3)} for s, count in (("train", 2), ("val", 1)) for n in range(count)}
    for (s, n), entries in parts.items(): server.files[f"/{s}/part_{n}.tar.gz"] = tarred(entries)
    server.files |= {f"/{f}": b"label,youtube_id,time_start,time_end,split\n" for f in ("train.csv", "val.csv", "test.csv")}
    for s in ("train", "val"):
        server.files[f"/{s}.csv"] += "".join(f"abseiling,{Path(n).name[:11]},1,11,{s if s == 'train' else 'validate'}\n" for (t, _), e in parts.items() if t == s for n in e).encode()
        server.files[f"/k400_{s}_path.txt"] = "\n".join(f"https://mirror.invalid/400/{s}/part_{n}.tar.gz" for t, n in parts if t == s).encode()
    server.files["/replacement_for_corrupted_k400.tgz"] = tarred({f"replacement_for_corrupted_k400/{name('train', 1)}": b"mended", "replacement_for_corrupted_k400/elsewhere01_000001_000011.mp4": b"waits"})
    whole = {f"{s}/{Path(n).name}": b for (s, _), e in parts.items() for n, b in e.items()} | {f"annotations/{f}": server.files[f"/{f}"] for f in ("train.csv", "val.csv", "test.csv")}
    whole |= {f"train/{name('train', 1)}": b"mended", "replacement/elsewhere01_000001_000011.mp4": b"waits"}
    return {"urls": server.base, "say": None, **FAST}, whole


def test_kinetics400_part_by_part(kinetics, server, tmp_path):
    options, whole = kinetics
    lost = server.files.pop("/train/part_1.tar.gz")
    with pytest.raises(DownloadError, match="part_1.*404"): prepare("kinetics400", tmp_path, keep=False, **options)
    done = [p for p, *_ in server.asked]
    server.files["/train/part_1.tar.gz"] = lost
    seen = []
    made = prepare("kinetics400", tmp_path, keep=False, progress=lambda *t: seen.append(t), **options)
    assert tree(tmp_path) == whole and made.videos == 9 and seen[-1][0] == seen[-1][1]
    again = [p for p, *_ in server.asked][len(done):]
    assert "/train/part_0.tar.gz" not in again and again.count("/train/part_1.tar.gz") == 1 and "/k400_test_path.txt" not in again
    assert not list((tmp_path / "downloads").rglob("*.tar.gz"))
    validation = datasets.load("kinetics400", tmp_path, subset="validation")
    assert (validation.expected, validation.found) == (3, 3)
    shutil.rmtree(tmp_path / "train")                                # thrown away: fetched again, and mended again
    prepare("kinetics400", tmp_path, keep=False, **options)
    assert tree(tmp_path) == whole
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(DownloadError, match="k400_test_path"): prepare("kinetics400", tmp_path, subsets=("train", "test"), **options)      # ends before anything is unpacked
    prepare("kinetics400", tmp_path, **options)
    assert (tmp_path / "train").is_dir() and {k: v for k, v in tree(tmp_path).items() if not k.startswith("downloads/")} == whole


def test_kinetics400_checks_its_lists(kinetics, server, tmp_path):
    options, _ = kinetics
    for line in ("https://x/part_0.exe", "https://x/..", "file:///etc/passwd"):
        server.files["/k400_val_path.txt"] = line.encode()
        with pytest.raises(PreparationError, match="k400_val_path.txt, line 1"): prepare("kinetics400", tmp_path / "x", subsets="validation", **options)
        shutil.rmtree(tmp_path / "x")
    server.files["/k400_val_path.txt"] = b"file:///tmp/part_0.tar.gz"
    with pytest.raises(DownloadError, match="only http"): prepare("kinetics400", tmp_path / "y", subsets=("validation",), **options | {"urls": {s.file: f"{server.base}/{s.file}" for s in preparation.SOURCES["kinetics400"]}})
    server.files["/k400_val_path.txt"] = b"https://mirror.invalid/part_0.tar.gz"
    with pytest.raises(ValueError, match="part_0"): prepare("kinetics400", tmp_path / "z", checksums={"part_0.tar.gz": "md5:" + "0" * 32}, subsets=("validation",), **options)
    with pytest.raises(DownloadError, match="not md5:0000"): prepare("kinetics400", tmp_path / "z", checksums={"val/part_0.tar.gz": "md5:" + "0" * 32}, subsets=("validation",), **options)


SSV2 = {f"20bn-something-something-v2/{n}.webm": os.urandom(4000) for n in range(1, 9)}
LABELS = {"labels.json": b'{"Pushing something": "0"}', "train.json": b'[{"id": "1", "label": "pushing a cup", "template": "Pushing [something]", "placeholders": ["a cup"]}]', "validation.json": b"[]", "test.json": b"[]"}


def ssv2_parts(folder, wrap=None, count=3):
    folder.mkdir(parents=True, exist_ok=True)
    data = tarred(SSV2)
    step = -(-len(data) // count)
    for n in range(count):
        name, piece = f"20bn-something-something-v2-{n:02}", data[n * step:(n + 1) * step]
        if wrap == "zip": (folder / f"{name}.zip").write_bytes(zipped({name: piece}))
        elif wrap == "hidden": (folder / name).write_bytes(zipped({name: piece}))          # a zip that is not called one
        else: (folder / name).write_bytes(piece)
    (folder / "20bn-something-something-download-package-labels.zip").write_bytes(zipped({f"labels/{n}": b for n, b in LABELS.items()}))
    return folder


@pytest.mark.parametrize("wrap", (None, "zip", "hidden"))
def test_ssv2_parts_are_joined_without_a_copy(tmp_path, wrap):
    folder = ssv2_parts(tmp_path / "mine", wrap)
    before, seen = tree(folder), []
    made = prepare("ssv2", tmp_path / "set", source=folder, say=None, progress=lambda *t: seen.append(t))
    assert tree(tmp_path / "set") == SSV2 | {f"labels/{n}": b for n, b in LABELS.items()} and tree(folder) == before and made.videos == 8 and seen[-1][0] == seen[-1][1]
    train = datasets.load("ssv2", tmp_path / "set")
    assert (train.expected, train.found) == (1, 1)


def test_ssv2_missing_parts(tmp_path):
    folder = ssv2_parts(tmp_path / "mine")
    for name, match in (("20bn-something-something-v2-00", "v2-00 has the checksum md5:.*download it again"), ("20bn-something-something-v2-07", "no file")):
        with pytest.raises((PreparationError, ValueError), match=match): prepare("ssv2", tmp_path / "set", source=folder, say=None, checksums={name: "md5:" + "0" * 32})
    (folder / "20bn-something-something-v2-01").rename(tmp_path / "one")
    with pytest.raises(PreparationError, match="lacks part 01"): prepare("ssv2", tmp_path / "set", source=folder, say=None)
    (tmp_path / "one").rename(folder / "20bn-something-something-v2-01")
    (folder / "20bn-something-something-v2-02").rename(tmp_path / "two")
    with pytest.raises(ArchiveError, match="parts 00 to 01.*later part may be missing"): prepare("ssv2", tmp_path / "set", source=folder, say=None)
    assert not (tmp_path / "set/20bn-something-something-v2").exists()
    (tmp_path / "two").rename(folder / "20bn-something-something-v2-02")
    assert prepare("ssv2", tmp_path / "set", source=folder, say=None, checksums={"20bn-something-something-v2-02": checksum(folder / "20bn-something-something-v2-02", "md5")}).videos == 8
    with pytest.raises(PreparationError, match="lacks the label files"): prepare("ssv2", tmp_path / "none", say=None)
    (tmp_path / "json").mkdir()
    for name, content in LABELS.items(): (tmp_path / "json" / f"something-something-v2-{name}").write_bytes(content)
    with pytest.raises(PreparationError, match="licence.*source="): prepare("ssv2", tmp_path / "other", source=tmp_path / "json", say=None)
    assert set(tree(tmp_path / "other")) == {f"labels/{n}" for n in LABELS}


def test_ssv2_a_zip_that_was_cut_off_is_named(tmp_path):
    folder = ssv2_parts(tmp_path / "mine", "zip")
    part = folder / "20bn-something-something-v2-01.zip"
    whole, first = part.read_bytes(), folder / "20bn-something-something-v2-00.zip"
    part.write_bytes(whole[:-30])
    with pytest.raises(ArchiveError, match="v2-01.zip is damaged or cut off; download it again"): prepare("ssv2", tmp_path / "set", source=folder, say=None)
    part.write_bytes(whole)
    first.write_bytes(first.read_bytes().replace(b"PK\x03\x04", b"PK\x03\x05", 1))      # its table of contents is whole, the entry is not
    with pytest.raises(ArchiveError, match="damaged or cut off.*parts 00 to 02"): prepare("ssv2", tmp_path / "set", source=folder, say=None)


def test_ssv2_zips_of_videos(tmp_path):
    folder = ssv2_parts(tmp_path / "mine", count=1)
    (folder / "20bn-something-something-v2-00").unlink()
    names = sorted(SSV2)
    for n in (0, 1): (folder / f"20bn-something-something-v2-{n:02}.zip").write_bytes(zipped({k: SSV2[k] for k in names[n::2]}))
    assert prepare("ssv2", tmp_path / "set", source=folder, say=None).videos == 8
    assert {k: v for k, v in tree(tmp_path / "set").items() if k.endswith("webm")} == SSV2


# arguments, locks, kills

def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path):
    for given, match in (({"name": "ucf-101"}, "did you mean 'ucf101'"), ({"source": tmp_path / "none"}, "no folder"), ({"subsets": ("val",)}, "'val' is unknown.*validation"), ({"urls": {"UCF.rar": "x"}}, "no file 'UCF.rar'")):
        with pytest.raises(ValueError, match=match): prepare(**{"name": "ucf101", "root": tmp_path / "set", **given})
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="root.*no folder"): prepare("ucf101", tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_one_process_at_a_time_and_one_set_a_folder(ucf, server, tmp_path):
    with preparation._locked(tmp_path / preparation.WORK):
        with pytest.raises(PreparationError, match="another process"): prepare("ucf101", tmp_path, **ucf)
    prepare("ucf101", tmp_path, **ucf)
    with pytest.raises(PreparationError, match="holds ucf101"): prepare("kinetics400", tmp_path)
    for text in ("{", "[]", "{}", '"x"', "7", '{"name": "ucf101"}', '{"name": "ucf101", "archives": []}', '{"name": "ucf101", "archives": {"UCF101.rar": 3}}', '{"name": "ucf101", "archives": {"UCF101.rar": {"folder": "elsewhere", "places": [], "videos": 1}}}'):
        (tmp_path / preparation.WORK / "record.json").write_text(text)
        with pytest.raises(PreparationError, match="record.json is damaged"): prepare("ucf101", tmp_path, **ucf)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="whoever may write everywhere meets no folder that cannot be written to")
def test_a_folder_that_may_only_be_read_is_told(ucf, tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PreparationError, match="set.*Permission denied; name a folder"): prepare("ucf101", tmp_path / "set", **ucf)
    finally: tmp_path.chmod(0o755)


def test_faults_of_the_disk_outside_of_files_are_told(ucf, tmp_path, monkeypatch):
    write = preparation._write_json
    for number, match in ((errno.EROFS, "record.json.*Read-only file system; name a folder"), (errno.ENOSPC, "no room for.*make room")):
        def fail(file, content, number=number):
            if file.name == "record.json": raise OSError(number, os.strerror(number), str(file))
            write(file, content)
        monkeypatch.setattr(preparation, "_write_json", fail)
        with pytest.raises(PreparationError, match=match): prepare("ucf101", tmp_path / "set", **ucf)
    monkeypatch.setattr(preparation, "_write_json", write)
    assert prepare("ucf101", tmp_path / "set", **ucf).videos == len(UCF_VIDEOS)


CLIENT = "import sys; from mbd.preparation import prepare; prepare('ucf101', sys.argv[1], urls=sys.argv[2], checksums={%r: None}, say=None)" % LIST


def test_a_killed_client_continues_and_is_killed_again(ucf, server, tmp_path):
    "SIGKILL in the middle of a download that the server holds open, twice."
    big = zipped(UCF_VIDEOS | {"UCF-101/YoYo/v_YoYo_g09_c01.avi": BODY})
    part, go_on, stop = tmp_path / "downloads/UCF101.rar.part", threading.Event(), [0]
    def halfway(request):
        start = int((request.headers.get("Range") or "bytes=0-")[6:-1])
        request.send_response(206 if start else 200)
        if start: request.send_header("Content-Range", f"bytes {start}-{len(big) - 1}/{len(big)}")
        request.send_header("ETag", '"one"')
        request.send_header("Content-Length", str(len(big) - start))
        request.end_headers()
        request.wfile.write(big[start:stop[0]])
        request.wfile.flush()
        go_on.wait(20)
    server.files["/UCF101.rar"] = halfway
    for stop[0] in (400_000, 800_000):
        child = subprocess.Popen([sys.executable, "-c", CLIENT, str(tmp_path), server.base], env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})
        deadline = time.monotonic() + 20
        while not (part.exists() and part.stat().st_size == stop[0]) and time.monotonic() < deadline: time.sleep(0.01)
        child.kill()
        assert child.wait() != 0 and part.stat().st_size == stop[0] and not (tmp_path / "downloads/UCF101.rar").exists()
    go_on.set()
    server.files["/UCF101.rar"] = big
    assert prepare("ucf101", tmp_path, **ucf).videos == 7
    assert [a[1] for a in server.asked if a[0] == "/UCF101.rar"] == [None, "bytes=400000-", "bytes=800000-"] and tree(tmp_path)["UCF-101/YoYo/v_YoYo_g09_c01.avi"] == BODY


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("keep, step", ((False, 3), pytest.param(False, 1, marks=pytest.mark.slow), pytest.param(True, 1, marks=pytest.mark.slow)))
def test_killed_at_any_moment_the_tree_ends_up_the_same(hmdb, server, tmp_path, keep, step):
    "SIGKILL before the k-th change of the disk, for every k; the next call ends with the same tree, and no half archive is ever in place."
    options, whole = hmdb
    options |= {"keep": keep}
    events = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "shutil.copyfile")
    source = tmp_path / "mine"
    source.mkdir()
    for name in ("hmdb51_org.rar", "test_train_splits.rar"): (source / name).write_bytes(server.files[f"/{name}"])
    classes, kills = {n.rpartition("/")[0] for n in whole}, 0
    for k in range(1, 1000, step):
        root = tmp_path / str(k)
        root.mkdir()
        if not keep: shutil.copytree(source, root / "downloads")
        if (pid := os.fork()) == 0:
            count = 0
            signal.alarm(30)                     # a child that hangs ends, and the test fails
            def hook(event, given):
                nonlocal count
                if event in events and str(root) in str(given[0]) and not (event == "open" and isinstance(given[1], str) and "r" in given[1]):
                    count += 1
                    if count == k: os.kill(os.getpid(), 9)
            sys.addaudithook(hook)
            try: prepare("hmdb51", root, source=source if keep else None, **options)
            finally: os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
        half = tree(root)
        for folder in classes:
            n = sum(name.startswith(folder + "/") for name in half)
            assert n in (0, 2), (k, folder, n)
        assert prepare("hmdb51", root, source=source if keep else None, **options).videos == 4, k
        assert tree(root) == whole, k
        assert sorted(p.name for p in (root / preparation.WORK).iterdir()) == ["lock", "record.json"], k
        shutil.rmtree(root)
        kills += killed
        if not killed: break
    assert kills * step > 50 and not killed and not server.asked


@pytest.fixture
def archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as packed:
        for name in ("A/v.avi", "A/via", "A/w.AVI"): packed.writestr(name, name)
    return tmp_path / "set.zip"


@pytest.mark.parametrize("endings", [".avi", ".AVI", (".avi",), [".AVI"]])
def test_one_ending_is_no_list_of_letters(archive, tmp_path, endings):
    assert unpack(archive, tmp_path / "out", endings=endings)["files"] == 2 and not (tmp_path / "out/A/via").exists()


@pytest.mark.parametrize("options, message", [({"into": "../lists"}, "into = '../lists' leads out of the folder"), ({"into": "/lists"}, "into = '/lists' is an absolute name"),
                                              ({"depth": -1}, "depth must be at least 0, not -1")])
def test_what_is_unpacked_stays_in_its_folder(archive, tmp_path, options, message):
    "`../lists` was unpacked beside the tree that is moved into place: told as done, and lost."
    with pytest.raises(ValueError, match=message): unpack(archive, tmp_path / "out", **options)
    assert not (tmp_path / "lists").exists() and not list((tmp_path / "out").rglob("*.avi")) and unpack(archive, tmp_path / "out")["files"] == 3


@pytest.mark.parametrize("mode", ["bz2", "xz"])
def test_a_way_to_pack_that_is_not_read_is_no_damage(tmp_path, mode):
    with tarfile.open(tmp_path / f"set.tar.{mode}", f"w:{mode}") as packed: packed.addfile(tarfile.TarInfo("a.avi"))
    with pytest.raises(ArchiveError, match="is packed by bzip2, 7z or xz.*unpack it by hand"): unpack(tmp_path / f"set.tar.{mode}", tmp_path / "out")


def test_checksums_belong_to_files(tmp_path):
    with pytest.raises(ValueError, match="checksums must be a dict .*not 'sha256:abc'"): prepare("ucf101", tmp_path / "ucf101", checksums="sha256:abc")
    assert not (tmp_path / "ucf101").exists()
