"A check finds exactly the bad files, survives crashes, hangs and kills; copies are whole, upright, in time, and never half-written."
import csv, errno, functools, os, shutil, signal, subprocess, sys, threading, time
from fractions import Fraction
from pathlib import Path
import numpy as np
import pytest
from mbd import scanning, video
from mbd.scanning import load_index

av = pytest.importorskip("av")
check, resize = functools.partial(scanning.check, workers=1), functools.partial(scanning.resize, workers=1)      # a second process costs more than it gains here
REAL = Path(os.environ.get("MBD_REALDATA") or "absent").absolute()
TASKS = """
import os, resource, signal, time
from pathlib import Path
from mbd import scanning

def look(path):
    name = os.path.basename(path)
    if "crash" in name: os.kill(os.getpid(), signal.SIGSEGV)
    if "quit" in name: os._exit(3)
    if "hang" in name: time.sleep(600)
    if "odd" in name: raise RuntimeError("a surprise")
    if "library" in name: raise ImportError("no decoder here")
    print("chatter of a decoder", flush=True)
    with open(os.environ["CALLS"], "a") as file: file.write(name + chr(10))
    return scanning._look(path)

def slow(path):
    time.sleep(0.15)
    return look(path)

def shrink(source, target, *numbers):
    with open(os.environ["CALLS"], "a") as file: file.write(os.path.basename(source) + chr(10))
    if "crash" in os.path.basename(source):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        scanning._part(Path(target)).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return scanning._shrink(source, target, *numbers)

def full(source, target, *numbers):
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    return scanning._shrink(source, target, *numbers)

def no_space(source, target, *numbers): raise OSError(28, "No space left on device")
"""


def film(num_frames, height=48, width=64, seed=0):
    "Blocks that move: every frame is another."
    y, x = np.mgrid[:height, :width]
    return np.stack([np.stack([(x * 3 + 7 * i + seed) % 256, (y * 4 + 5 * i) % 256, 0 * x + (9 * i + 31 * seed) % 256], -1) for i in range(num_frames)]).astype(np.uint8)


def numbered(num_frames, height, width):
    "The number of each frame as eight light or dark stripes."
    bits = np.arange(num_frames)[:, None] >> np.arange(8) & 1
    return np.broadcast_to((40 + 170 * bits.repeat(width // 8, axis=1)).astype(np.uint8)[:, None, :, None], (num_frames, height, width, 3)).copy()


def number_of(frame):
    edges = np.arange(8) * frame.shape[1] / 8
    return sum(1 << bit for bit, at in enumerate(edges) if frame[:, int(at + 3):int(at + frame.shape[1] / 8 - 2)].mean() > 125)


def encode(path, frames, codec="libx264", fps=25, times=None, options=None, clock=None):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        if clock: stream.codec_context.time_base = clock
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times: frame.pts, frame.time_base = times[i], clock
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def times_of(path): return [frame.pts * frame.time_base for frame in video._decode(path)]


def rows(path):
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file: return list(csv.reader(file))


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    "Three whole videos, encoded once."
    folder = tmp_path_factory.mktemp("sample")
    return [video.write_video(folder / f"{n}.mp4", film(n)) for n in (6, 12, 20)]


@pytest.fixture
def root(tmp_path, sample):
    "A folder of whole videos, and one of each kind of bad file."
    folder = tmp_path / "set"
    for name in ("a/one.mp4", "a/two.MP4", "b/three.mkv"): put(folder / name, sample[len(name) % 3])
    data = sample[2].read_bytes()
    put(folder / "b/empty.mp4"), put(folder / "b/text.avi", b"no video at all\n"), put(folder / "b/cut.mp4", data[:len(data) // 2])
    put(folder / "b/noise.webm", np.random.default_rng(0).bytes(5000))
    put(folder / "list.txt", b"1 one"), put(folder / ".hidden.mp4", b""), put(folder / ".git/x.mp4", b"")
    return folder


SHARDS = [True, False, False, False, False, False, False, True]
BAD = ["b/cut.mp4", "b/empty.mp4", "b/noise.webm", "b/text.avi"]


def put(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.read_bytes() if isinstance(content, Path) else content)
    return path


@pytest.fixture
def calls(tmp_path, monkeypatch):
    "Functions that a helper process can import, and the names of the files they really looked at."
    (tmp_path / "scanning_tasks.py").write_text(TASKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    def read():
        names = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        (tmp_path / "calls").unlink(missing_ok=True)
        return sorted(names)
    return read


# ---- check

def test_check_lists_exactly_the_bad_files(root):
    seen = []
    report = check(root, progress=lambda *p: seen.append(p))
    assert list(report.unreadable) == BAD and report.found == 7 and report.readable == 3 and report.kept == 0
    assert [row[0] for row in rows(root / "unreadable.csv")] == ["path", *BAD] and all(row[1] for row in rows(root / "unreadable.csv"))
    table = rows(root / "frames.csv")
    assert table[0][:3] == ["path", "size", "mtime_ns"] and [row[0] for row in table[1:]] == sorted(["a/one.mp4", "a/two.MP4", "b/three.mkv", *BAD])
    assert seen[0] == (0, 7) and seen[-1] == (7, 7) and [done for done, _ in seen] == list(range(8))
    assert sorted(p.name for p in root.iterdir()) == [".git", ".hidden.mp4", "a", "b", "frames.csv", "list.txt", "unreadable.csv"]
    assert "7 videos: 3 readable, 4 unreadable" in repr(report) and "the file is empty: b/empty.mp4" in repr(report)
    index = load_index(root)
    assert set(index) == {"a/one.mp4", "a/two.MP4", "b/three.mkv"}
    for path, found in index.items():
        assert found == video.scan(root / path)
        np.testing.assert_array_equal(video.read_frames(root / path, [4], index=found), video.read_frames(root / path, [4]))


def test_the_tables_do_not_depend_on_the_number_of_workers(root, tmp_path):
    check(root, output=tmp_path / "one"), check(root, workers=3, output=tmp_path / "three")
    for name in ("frames.csv", "unreadable.csv"): assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
    assert not (root / "frames.csv").exists()      # a data set that may only be read
    assert len(load_index(root, output=tmp_path / "one")) == 3 and len(load_index(root)) == 0


def test_what_is_known_is_not_decoded_again_and_changed_files_are(root, calls, sample):
    check(root, look="scanning_tasks:look")
    assert len(calls()) == 7
    before = (root / "frames.csv").read_bytes()
    again = check(root, look="scanning_tasks:look")
    assert calls() == [] and again.kept == 7 and list(again.unreadable) == BAD and (root / "frames.csv").read_bytes() == before
    put(root / "a/one.mp4", sample[1]), (root / "b/empty.mp4").write_bytes(sample[0].read_bytes())
    (root / "a/two.MP4").unlink()
    put(root / "a/new.mp4", sample[0])
    report = check(root, look="scanning_tasks:look")
    assert calls() == ["empty.mp4", "new.mp4", "one.mp4"] and report.kept == 4
    assert set(load_index(root)) == {"a/one.mp4", "a/new.mp4", "b/empty.mp4", "b/three.mkv"}
    assert report.away == 1 and "1 more are known and not there" in repr(report)      # a disk may come back
    stat = os.stat(root / "a/one.mp4")
    os.utime(root / "a/one.mp4", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))      # same size, other time
    assert "a/one.mp4" not in load_index(root) and check(root, look="scanning_tasks:look").kept == 6 and calls() == ["one.mp4"]


def test_a_disk_that_is_away_costs_nothing(root, calls, tmp_path):
    before = check(root, look="scanning_tasks:look"); calls()
    tables = {name: (root / name).read_bytes() for name in ("frames.csv", "unreadable.csv")}
    (root / "a").rename(tmp_path / "a")
    assert check(root, look="scanning_tasks:look").away and calls() == []
    (root / "b").rename(tmp_path / "b")
    assert check(root).found == 0 and {name: (root / name).read_bytes() for name in tables} == tables
    for name in "ab": (tmp_path / name).rename(root / name)
    again = check(root, look="scanning_tasks:look")
    assert calls() == [] and (again.kept, again.unreadable, again.away) == (before.found, before.unreadable, 0)


@pytest.mark.parametrize("name,line", [("frames.csv", "my,own,table"), ("unreadable.csv", "clip,why")])
def test_a_table_of_somebody_else_is_not_replaced(root, name, line):
    (root / name).write_text(line + "\n1,2\n")
    with pytest.raises(ValueError, match=f"{name} is no table of this command"): check(root)
    assert (root / name).read_text() == line + "\n1,2\n"


def test_a_file_that_was_unreadable_is_asked_again_only_on_demand(root, calls, sample):
    put(root / "a/hang.mp4", sample[0])
    assert check(root, timeout=1, look="scanning_tasks:look").unreadable["a/hang.mp4"] == "no answer within 1 s"
    assert "a/hang.mp4" in check(root).unreadable
    assert "a/hang.mp4" not in check(root, retry=True).unreadable


def test_crashes_hangs_and_surprises_cost_their_file_only(root, calls, sample):
    for name in ("crash", "quit", "hang", "odd", "z1", "z2"): put(root / f"a/{name}.mp4", sample[0])
    begin = time.monotonic()
    report = check(root, timeout=2, look="scanning_tasks:look")
    assert time.monotonic() - begin < 60
    found = {path: reason for path, reason in report.unreadable.items() if path not in BAD}
    assert found == {"a/crash.mp4": f"decoder crashed (signal {int(signal.SIGSEGV)})", "a/quit.mp4": "decoder crashed (exit status 3)",
                     "a/hang.mp4": "no answer within 2 s", "a/odd.mp4": "RuntimeError: a surprise"}
    assert {"a/z1.mp4", "a/z2.mp4"} <= set(load_index(root))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_a_list_that_names_one_are_not_opened(tmp_path, sample):
    root = tmp_path / "set"
    put(root / "good.mp4", sample[0]), put(root / "waits.mp4", b"ffconcat version 1.0\nfile pipe\n")      # FFmpeg would open the pipe, and wait for ever
    os.mkfifo(root / "pipe"), os.mkfifo(root / "fifo.mp4")
    begin = time.monotonic()
    report = check(root, timeout=2)
    assert time.monotonic() - begin < 30 and report.unreadable == {"fifo.mp4": "is no regular file", "waits.mp4": "is a list of other files or of addresses, and such are not followed"}
    assert set(load_index(root)) == {"good.mp4"}


def test_a_full_disk_under_the_tables_is_told_and_nothing_found_is_lost(root, monkeypatch):
    def full(path, header, table): raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(scanning, "_write_table", full)
        with pytest.raises(OSError, match="the tables in .*set cannot be written \\(No space left.*make room.*output=") as caught: check(root)
        assert caught.value.errno == errno.ENOSPC
    assert check(root).kept == 7
    class Full:
        def write(self, text): raise OSError(errno.ENOSPC, "No space left on device")
        def flush(self): self.write("")
        def close(self): self.write("")
    real = open
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", lambda file, *a, **k: Full() if str(file).endswith(".journal") and a == ("a",) else real(file, *a, **k))
        with pytest.raises(OSError, match="the tables in .*make room"): check(root, retry=True)
    assert check(root).kept == 7


def test_a_missing_library_is_nobodys_fault(root, calls, sample):
    put(root / "a/library.mp4", sample[0])
    with pytest.raises(ImportError, match="no decoder here"): check(root, look="scanning_tasks:look")
    assert not (root / "unreadable.csv").exists()
    with pytest.raises(RuntimeError, match="absent_module"): check(root, look="absent_module:look")


def processes_of(text):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if text in (folder / "environ").read_bytes().decode(errors="replace"): found.append(int(folder.name))
        except OSError: pass
    return found


@pytest.mark.skipif(not hasattr(signal, "SIGKILL") or not Path("/proc/self/environ").exists(), reason="needs SIGKILL and /proc")
def test_killed_in_the_middle_it_goes_on_where_it_was(root, calls, tmp_path, sample):
    for i in range(8): put(root / f"c/{i}.mp4", sample[0])
    program = "import sys; from mbd.scanning import check; check(sys.argv[1], workers=2, look='scanning_tasks:slow')"      # no __main__ guard is needed
    process = subprocess.Popen([sys.executable, "-c", program, str(root)], env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "KILLED": f"here{os.getpid()}"})
    journal = root / ".frames.journal"
    for _ in range(600):
        if journal.exists() and journal.read_bytes().count(b'"count"') >= 3: break
        time.sleep(0.05)
    process.kill(); process.wait()
    assert not (root / "frames.csv").exists()
    with open(journal, "ab") as file: file.write(b'["c/7.mp4", [1234, 99')      # a line that was being written
    for _ in range(100):
        if not processes_of(f"KILLED=here{os.getpid()}"): break
        time.sleep(0.05)
    assert not processes_of(f"KILLED=here{os.getpid()}")      # helpers end with their parent
    calls()
    report = check(root, look="scanning_tasks:look")
    assert 3 <= report.kept < report.found == 15 and list(report.unreadable) == BAD and len(load_index(root)) == 11
    assert len(calls()) <= 8 and not journal.exists()


def test_ctrl_c_leaves_no_process_and_keeps_what_was_done(root, calls, monkeypatch):
    monkeypatch.setenv("MARK", f"ctrl{os.getpid()}")
    def stop(done, total):
        if done == 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): check(root, progress=stop)
    if Path("/proc/self/environ").exists(): assert processes_of(f"MARK=ctrl{os.getpid()}") == []
    assert check(root).kept == 3


def test_nonsense_in_the_table_is_forgotten(root, calls):
    check(root)
    text = (root / "frames.csv").read_text().splitlines()
    at = next(i for i, line in enumerate(text) if line.startswith("a/one.mp4"))
    cells = text[at].split(",")
    cells[3] = "many"
    text[at] = ",".join(cells)
    (root / "frames.csv").write_text("\n".join(text) + "\na/two")
    assert load_index(root).get("a/one.mp4") is None
    assert check(root, look="scanning_tasks:look").kept == 6 and calls() == ["one.mp4"] and load_index(root)["a/one.mp4"].count


def test_hostile_names_round_trip(tmp_path, sample):
    names = ["a,b.mp4", 'say "x".mp4', "two\nlines.mp4", "cr\rlf.mp4", "Fuß & (1) #;+.mp4", "=1+1.mp4", " blank .mp4", "back\\slash.mp4", os.fsdecode(b"\xff\xfe.mp4")]
    made = []
    for name in names:
        try: put(tmp_path / "set" / name, sample[0]); made.append(name)
        except (OSError, UnicodeError): pass
    bad = put(tmp_path / "set" / "bad,\n\u00fc.avi", b"x").name
    report = check(tmp_path / "set")
    assert len(made) >= 5 and set(load_index(tmp_path / "set")) == set(made) and list(report.unreadable) == [bad]
    assert rows(tmp_path / "set/unreadable.csv")[1][0] == bad
    assert check(tmp_path / "set").kept == len(made) + 1
    repr(report).encode(), repr(scanning.Report(1, 0, {os.fsdecode(b"\xff"): "x"})).encode()
    copied = resize(tmp_path / "set", tmp_path / "small", short_side=32)
    assert copied.readable == len(made) and scanning._videos(tmp_path / "small") == sorted(made)


def test_files_names_exactly_what_is_checked(root):
    check(root)
    os.utime(root / "a/one.mp4", ns=(0, 5))
    report = check(root, files=["b/empty.mp4", str(root / "a/one.mp4"), "a/gone.mp4", "list.txt"])
    assert report.found == 4 and report.kept == 1 and list(report.unreadable) == ["a/gone.mp4", "b/empty.mp4", "list.txt"] and report.concealed == () and report.unreadable["a/gone.mp4"] == "no such file"
    assert {"a/one.mp4", "a/two.MP4", "b/three.mkv"} == set(load_index(root))      # rows about others stay
    for outside in ("../x.mp4", "/x.mp4", "."):
        with pytest.raises(ValueError, match="outside"): check(root, files=[outside])


def test_links_are_followed_once(tmp_path, sample):
    put(tmp_path / "set/a/one.mp4", sample[0]), put(tmp_path / "far/two.mp4", sample[0])
    try: os.symlink(tmp_path / "far", tmp_path / "set/b"), os.symlink(tmp_path / "set", tmp_path / "set/a/loop"), os.symlink(tmp_path / "nowhere", tmp_path / "set/broken.mp4")
    except OSError: pytest.skip("no symbolic links here")
    report = check(tmp_path / "set")
    assert report.found == 3 and report.unreadable == {"broken.mp4": "no such file"} and set(load_index(tmp_path / "set")) == {"a/one.mp4", "b/two.mp4"}


def test_wrong_arguments_are_named(root):
    for error, text, wrong in ((ValueError, "workers", dict(workers=0)), (TypeError, "workers", dict(workers=1.5)), (ValueError, "timeout", dict(timeout=-1)), (ValueError, "module:name", dict(look="look")), (ValueError, "module:name", dict(look=lambda p: p))):
        with pytest.raises(error, match=text): check(root, **wrong)
    with pytest.raises(FileNotFoundError, match="no folder"): check(root / "none")
    with pytest.raises(FileNotFoundError, match="no folder"): load_index(root / "none")
    with pytest.raises(OSError, match="output="): check(root, output=root / "list.txt")
    assert len(load_index(root)) == 0
    (root / "x").mkdir()
    assert check(root / "x").found == 0 and len(load_index(root / "x")) == 0


def test_files_that_end_early_without_an_error_are_unreadable(tmp_path):
    frames, root = film(30, 96, 128), tmp_path / "set"
    root.mkdir()
    encode(root / "whole.avi", frames, "mpeg4", options={"b": "2M"}), encode(root / "whole.mkv", frames), encode(root / "whole.webm", frames, "libvpx", options={"b": "1M"})
    for kind in ("avi", "mkv", "webm"):
        data = (root / f"whole.{kind}").read_bytes()
        put(root / f"cut.{kind}", data[:len(data) * 2 // 3])
    counts = {kind: sum(1 for _ in video._decode(root / f"cut.{kind}")) for kind in ("avi", "mkv", "webm")}
    assert all(0 < count < 30 for count in counts.values())      # FFmpeg sees no error in them
    report = check(root)
    assert sorted(report.unreadable) == ["cut.avi", "cut.mkv", "cut.webm"] and all("is cut off" in reason for reason in report.unreadable.values())
    assert list(report.by_reason.values()) == [["cut.avi", "cut.mkv", "cut.webm"]]
    assert resize(root, tmp_path / "small", short_side=32).unreadable == report.unreadable
    shutil.rmtree(tmp_path / "small"), (root / "frames.csv").unlink()
    assert resize(root, tmp_path / "small", short_side=32).unreadable == report.unreadable and len(scanning._videos(tmp_path / "small")) == 3


def test_pictures_that_the_decoder_patches_are_noted_but_readable(tmp_path):
    data = encode(tmp_path / "a.avi", film(12, 96, 128), "mpeg4", options={"b": "2M"}).read_bytes()
    put(tmp_path / "set/a.avi", data[:4] + b"\xff" * 4 + data[8:len(data) * 2 // 3])      # the last packet is short, and nothing says how long the file should be
    assert sum(frame.is_corrupt for frame in video._decode(tmp_path / "set/a.avi")) == 1
    for kept in (0, 1):
        report = check(tmp_path / "set")
        assert report.kept == kept and report.concealed == ("a.avi",) and not report.unreadable and "1 readable with damaged pictures" in repr(report)
    assert "a.avi" in load_index(tmp_path / "set")


# ---- real files

def truth(path):
    "Whether all of a file decodes in order: (frames, broken)."
    count = 0
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            for _ in container.decode(container.streams.video[0]): count += 1
    except (av.error.FFmpegError, IndexError, OSError): return count, True
    return count, not count


@pytest.mark.slow      # decodes 5,000 frames twice
@pytest.mark.skipif(not (REAL / "clips").is_dir(), reason="MBD_REALDATA names no folder with clips/")
def test_real_clips_are_judged_as_decoding_them_in_order_does(tmp_path):
    found = {str(p.relative_to(REAL / "clips").as_posix()): truth(p) for p in (REAL / "clips").rglob("*") if p.suffix.lower() in scanning.ENDINGS}
    report = check(REAL / "clips", output=tmp_path)
    assert report.found == len(found) >= 15 and set(report.unreadable) == {path for path, (_, broken) in found.items() if broken}
    assert {path: index.count for path, index in load_index(REAL / "clips", output=tmp_path).items()} == {path: count for path, (count, broken) in found.items() if not broken}


@pytest.mark.skipif(not (REAL / "odd").is_dir(), reason="MBD_REALDATA names no folder with odd/")
def test_real_odd_files_are_judged_right(tmp_path):
    report = check(REAL / "odd", output=tmp_path)
    assert set(report.unreadable) == {"corrupted.mp4", "empty.mp4", "text.avi", "truncated_half.avi", "truncated_half.mp4"}      # truncated_half.avi decodes without an error, to its early end
    sounds = [p for p in (REAL / "odd").iterdir() if p.suffix in (".mp3", ".wav")]
    heard = check(REAL / "odd", files=sounds, output=tmp_path / "sounds")
    assert set(heard.unreadable) == {p.name for p in sounds} and set(heard.unreadable.values()) == {"holds no video stream"}
    copied = resize(REAL / "odd", tmp_path / "small", short_side=64)
    assert set(copied.unreadable) == set(report.unreadable)
    for path, index in load_index(REAL / "odd", output=tmp_path).items():
        small = video.scan(tmp_path / "small" / Path(path).with_suffix(".mp4"))
        assert (small.count, small.problem) == (index.count, "") and (small.height < small.width) == (index.height < index.width)      # also the turned ones


# ---- resize

def test_a_copy_has_the_same_frames_in_the_same_order_at_the_same_times(tmp_path):
    frames, root = numbered(40, 96, 128), tmp_path / "set"
    root.mkdir()
    video.write_video(root / "a.mp4", frames, fps=Fraction(30000, 1001))
    encode(root / "b.avi", frames, "mpeg4", options={"b": "4M", "bf": "2"})
    encode(root / "c.mkv", frames, fps=30)
    report = resize(root, tmp_path / "small", short_side=64, keyframes=12, crf=10)
    assert report.readable == 3 and report.kept == 0
    for name, rate in (("a", Fraction(30000, 1001)), ("b", 25), ("c", 30)):
        source, small = next(root.glob(f"{name}.*")), tmp_path / f"small/{name}.mp4"
        index = video.scan(small)
        assert (index.count, index.height, index.width) == (40, 64, 86) and times_of(small) == [i / Fraction(rate) for i in range(40)]
        assert index.keys[0] == 0 and max(np.diff([*index.keys, 40])) <= 12
        assert [number_of(frame) for frame in video.read_video(small)] == list(range(40)) == [number_of(frame) for frame in video.read_video(source)]
        with av.open(str(small)) as container: assert container.streams.video[0].codec_context.name == "h264" and container.streams.video[0].average_rate == rate


def test_times_of_a_variable_rate_are_kept(tmp_path):
    times = np.cumsum([0] + [40, 40, 120, 20, 40, 300, 40, 40, 60, 40, 33] * 2).tolist()
    encode(put(tmp_path / "set/v.mkv"), film(len(times)), times=times, clock=Fraction(1, 1000))
    assert [round(t * 1000) for t in times_of(tmp_path / "set/v.mkv")] == times
    resize(tmp_path / "set", tmp_path / "small", short_side=32)
    assert [round(t * 1000) for t in times_of(tmp_path / "small/v.mp4")] == times


def test_a_turned_video_is_copied_upright(tmp_path):
    source = video.write_video(put(tmp_path / "set/t.mp4"), film(6, 48, 96))
    data, upright = bytearray(source.read_bytes()), np.array([[1, 0, 0], [0, 1, 0], [0, 0, 16384]])
    matrix = lambda a, b, c, d: b"".join(int(v).to_bytes(4, "big", signed=True) for v in (a * 65536, b * 65536, 0, c * 65536, d * 65536, 0, 0, 0, 1 << 30))
    at = data.index(matrix(1, 0, 0, 1), data.index(b"tkhd"))
    data[at:at + 36] = matrix(0, 1, -1, 0)      # a quarter turn, as telephones note it
    source.write_bytes(data)
    assert video.scan(source).height == 96
    resize(tmp_path / "set", tmp_path / "small", short_side=32, crf=5)
    assert all(frame.rotation == 0 for frame in video._decode(tmp_path / "small/t.mp4"))
    large, small = video.read_video(source), video.read_video(tmp_path / "small/t.mp4")
    assert large.shape == (6, 96, 48, 3) and small.shape == (6, 64, 32, 3)
    large, small = large.reshape(6, 32, 3, 16, 3, 3).mean((2, 4)), small.reshape(6, 32, 2, 16, 2, 3).mean((2, 4))
    assert np.abs(large - small).mean() < 0.3 * np.abs(large[:, ::-1, ::-1] - small).mean()


@pytest.mark.parametrize("height, width, short, expected", [(48, 64, 256, (48, 64)), (90, 60, 32, (48, 32)), (64, 64, 32, (32, 32)), (300, 200, 256, (300, 200))])
def test_never_enlarged_and_always_even(tmp_path, height, width, short, expected):
    video.write_video(put(tmp_path / "set/a.mp4"), film(3, height, width))
    resize(tmp_path / "set", tmp_path / "small", short_side=short)
    index = video.scan(tmp_path / "small/a.mp4")
    assert (index.height, index.width) == expected


def test_copies_that_are_there_are_kept_and_originals_untouched(root, calls, tmp_path, sample):
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}
    seen = []
    first = resize(root, tmp_path / "small", short_side=32, shrink="scanning_tasks:shrink", progress=lambda *p: seen.append(p))
    assert len(calls()) == 7 and list(first.unreadable) == BAD and seen[0] == (0, 7) and seen[-1] == (7, 7) and "3 resized, 4 unreadable" in repr(first)
    assert rows(tmp_path / "small/unreadable.csv") == [["path", "reason"], *map(list, first.unreadable.items())]
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "small").rglob("*.mp4")}
    assert sorted(p.relative_to(tmp_path / "small").as_posix() for p in made) == ["a/one.mp4", "a/two.mp4", "b/three.mp4"]
    again = resize(root, tmp_path / "small", short_side=32, shrink="scanning_tasks:shrink")
    assert calls() == sorted(Path(p).name for p in BAD) and again.kept == 3 and {p: p.stat().st_mtime_ns for p in made} == made
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()} == before
    check(root)
    assert resize(root, tmp_path / "small", short_side=32, shrink="scanning_tasks:shrink").unreadable == again.unreadable and calls() == []      # what a check found is believed
    later = max(made.values()) + 10**9
    put(root / "a/one.mp4", sample[2]), os.utime(root / "a/one.mp4", ns=(later, later))
    resize(root, tmp_path / "small", short_side=32, shrink="scanning_tasks:shrink")
    assert calls() == ["one.mp4"] and video.scan(tmp_path / "small/a/one.mp4").count == 20


def test_a_replacement_with_an_older_date_is_copied_anew(tmp_path, calls, sample):
    root, small, old = tmp_path / "set", tmp_path / "small", (10**18, 10**18)      # the year 2001
    again = lambda: resize(root, small, short_side=32, shrink="scanning_tasks:shrink") and calls()
    for name in ("a.mp4", "b.mp4"): put(root / name, sample[0])
    assert again() == ["a.mp4", "b.mp4"] and again() == []
    put(root / "a.mp4", sample[1]), os.utime(root / "a.mp4", ns=old)
    assert again() == ["a.mp4"] and video.num_frames(small / "a.mp4") == 12 and again() == []
    put(root / "a.mp4", sample[0]), os.utime(root / "a.mp4", ns=old)               # another one of the same date
    assert again() == ["a.mp4"] and video.num_frames(small / "a.mp4") == 6
    put(root / "b.mkv", sample[2]), os.utime(root / "b.mkv", ns=old), (root / "b.mp4").unlink()      # the copy of another file had its name
    assert again() == ["b.mkv"] and video.num_frames(small / "b.mp4") == 20 and again() == []
    (small / scanning._MADE_OF).write_text('["a.mp4", ["a.mp4", 1')                # torn: copies without a note count by their age
    assert again() == [] and list(scanning._made_of(small)) == []


def test_a_crash_leaves_nothing_under_a_final_name_and_no_parts(tmp_path, calls, sample):
    put(tmp_path / "set/crash.mp4", sample[0]), put(tmp_path / "set/good.mp4", sample[0])
    put(tmp_path / "small/.git/x")
    stale = put(tmp_path / "small" / scanning._part(Path("good.mp4")).name.replace(str(os.getpid()), "1"), b"half")
    report = resize(tmp_path / "set", tmp_path / "small", short_side=32, shrink="scanning_tasks:shrink")
    assert report.unreadable == {"crash.mp4": f"decoder crashed (signal {int(signal.SIGKILL)})"} and not stale.exists()
    assert sorted(p.name for p in (tmp_path / "small").iterdir()) == [".git", scanning._MADE_OF, "good.mp4", "resize.json", "unreadable.csv"]
    assert resize(tmp_path / "set", tmp_path / "small", short_side=32).readable == 2


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file size need POSIX")
@pytest.mark.parametrize("task", ["full", "no_space"])
def test_a_full_disk_ends_the_run_and_blames_no_input(tmp_path, calls, task):
    for i in range(3): video.write_video(put(tmp_path / f"set/{i}.mp4"), np.random.default_rng(i).integers(0, 256, (12, 64, 64, 3)).astype(np.uint8))
    with pytest.raises(OSError, match="cannot be written.*make room"): resize(tmp_path / "set", tmp_path / "small", short_side=32, shrink=f"scanning_tasks:{task}")
    assert sorted(p.name for p in (tmp_path / "small").iterdir()) == ["resize.json"]
    assert resize(tmp_path / "set", tmp_path / "small", short_side=32).readable == 3


def test_shards_are_disjoint_complete_and_stable(tmp_path, calls, sample):
    for i in range(9): put(tmp_path / f"set/{i}.mp4", sample[0])
    put(tmp_path / "set/x.mp4"), put(tmp_path / "set/y.avi", b"nothing")
    reports = []
    for i in range(3):
        reports.append(resize(tmp_path / "set", tmp_path / "small", short_side=32, shard=(i, 3), shrink="scanning_tasks:shrink"))
        if i == 0: mine = calls()
    assert sum(r.found for r in reports) == 11 and sum(r.readable for r in reports) == 9 and all(r.found for r in reports)
    assert [row[0] for row in rows(tmp_path / "small/unreadable.csv")] == ["path", "x.mp4", "y.avi"]
    others = calls()
    assert not set(mine) & set(others) and len(mine) + len(others) == 11
    names = [f"v_{i}.avi" for i in range(4000)]
    parts = [[n for n in names if scanning._in_shard(n, (i, 4))] for i in range(4)]
    assert sorted(sum(parts, [])) == sorted(names) and all(850 < len(part) < 1150 for part in parts)
    assert [scanning._in_shard(n, (i, 4)) for n in ("a.avi", os.fsdecode(b"\xff.avi")) for i in range(4)] == SHARDS      # the same on every computer, for ever


def at_once(calls):
    "Start the calls at the same moment, each in a thread of this process; the errors."
    gate, errors = threading.Barrier(len(calls)), []
    def run(call):
        gate.wait()
        try: call()
        except Exception as error: errors.append(error)
    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    return errors


def test_jobs_of_an_array_that_have_the_same_process_number_do_not_meet(tmp_path):      # in containers they do; threads share theirs, too
    for n in range(15):
        folder = tmp_path / str(n)
        assert at_once([lambda: scanning._same_settings(folder, {"short_side": 32})] * 12) == []
        assert at_once([lambda i=i: scanning._join_tables(folder, (i, 8), {f"{i}.mp4": "the file is empty"}) for i in range(8)]) == []
        assert len(rows(folder / "unreadable.csv")) == 9 and not list(folder.glob(".*"))


def test_names_never_clash():
    clashing = ["a.avi", "a.mp4", "a.avi.mp4", "A.MKV", "a.mp4.mp4", "b.webm", "d/a.avi", "D/A.avi"]
    copies = scanning._targets(clashing)
    assert len({c.casefold() for c in copies.values()}) == len(clashing) and all(c.endswith(".mp4") for c in copies.values()) and copies["b.webm"] == "b.mp4"
    assert all(c.casefold().startswith(p.casefold().rpartition(".")[0]) for p, c in copies.items()) and scanning._targets(clashing[::-1]) == copies


def test_two_endings_of_one_name_become_two_copies(tmp_path, sample):
    put(tmp_path / "set/a.mp4", sample[0]), put(tmp_path / "set/a.mkv", sample[1])
    resize(tmp_path / "set", tmp_path / "small", short_side=32)
    assert {p.name: video.num_frames(p) for p in (tmp_path / "small").glob("*.mp4")} == {"a.mp4": 6, "a.mkv.mp4": 12}      # "a" is what the lists find: of the originals a.mp4, too


def test_settings_and_folders_that_do_not_fit_are_refused(root, tmp_path):
    for error, text, wrong in ((ValueError, "keyframes", dict(keyframes=11)), (ValueError, "keyframes", dict(keyframes=49)), (ValueError, "even", dict(short_side=255)), (TypeError, "short_side", dict(short_side=25.5)),
                               (ValueError, "crf", dict(crf=60)), (ValueError, "shard", dict(shard=(2, 2))), (ValueError, "shard", dict(shard=(0, 0))), (ValueError, "shard", dict(shard=(-1, 2))), (ValueError, "workers", dict(workers=0))):
        with pytest.raises(error, match=text): resize(root, tmp_path / "small", **wrong)
    for output in (root, root / "small", tmp_path, root / "../set/x"):
        with pytest.raises(ValueError, match="beside root"): resize(root, output)
    with pytest.raises(FileNotFoundError): resize(root / "none", tmp_path / "small")
    assert not (tmp_path / "small").exists() and not (root / "small").exists()
    resize(root, tmp_path / "small", short_side=32)
    with pytest.raises(ValueError, match="resize.json"): resize(root, tmp_path / "small", short_side=34)


@pytest.mark.slow
def test_loading_a_large_table_is_fast_and_killing_often_loses_nothing(tmp_path, sample):
    root = tmp_path / "set"
    for i in range(100): put(root / f"{i % 10}/{i}.mp4", sample[0])
    check(root)
    for i in range(5):
        def stop(done, total):
            if done >= 20 * (i + 1): raise KeyboardInterrupt
        if i == 0: (root / "frames.csv").unlink()
        with pytest.raises(KeyboardInterrupt): check(root, progress=stop)
    report = check(root)
    assert report.kept == 100 and len(load_index(root)) == 100


def test_no_limit_of_time_is_no_crash(tmp_path):
    "`timeout=inf` had every video written down as one that crashes the decoder."
    (tmp_path / "set").mkdir()
    video.write_video(tmp_path / "set/a.mp4", film(6))
    assert check(tmp_path / "set", timeout=float("inf")).readable == 1 and resize(tmp_path / "set", tmp_path / "small", short_side=16, timeout=1e12).readable == 1


@pytest.mark.parametrize("file", [str, Path])
def test_one_file_is_no_list_of_letters(tmp_path, file):
    video.write_video(tmp_path / "a.mp4", film(6)); (tmp_path / "b.mp4").touch()
    report = check(tmp_path, files=file("a.mp4"))
    assert (report.found, report.readable) == (1, 1)


def test_the_first_file_does_not_wait_for_the_decoder_to_be_loaded(tmp_path, monkeypatch):
    "On a busy computer that took two seconds, and a short limit of time called a good file unreadable."
    (tmp_path / "probe.py").write_text("import sys\ndef loaded(): return 'av' in sys.modules\n")
    monkeypatch.syspath_prepend(tmp_path)
    helper = scanning._Helper(("probe", "loaded"), 60)
    try: assert helper.ask() == {"value": True}
    finally: helper.stop()
