"Odd, damaged and hostile files: each is read right, or refused with a VideoError; none hangs, nothing is left open."
import os, signal, subprocess, sys
from fractions import Fraction
from pathlib import Path
import numpy as np, pytest
from mbd import video
from mbd.video import FrameIndex, VideoError, num_frames, read_frames, read_video, scan, write_video

av = pytest.importorskip("av")
ROOT = Path(__file__).parents[1]
REAL = ROOT / os.environ.get("MBD_REALDATA", "absent") / "odd"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MBD_CACHE", str(tmp_path / "cache"))
    video._index.cache_clear()


def film(n, height=48, width=64):
    "Moving stripes with noise: no two frames alike."
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 40, (n, height, width, 3))
    return np.stack([np.stack([100 + 60 * np.sin((x + 3 * i) / 7), 100 + 60 * np.sin((y - 2 * i) / 5), 0 * x + 4 * i % 200], -1) + noise[i] for i in range(n)]).clip(0, 255).astype(np.uint8)


def write(path, frames, codec, pix_fmt, b_frames=0, gop=8, times=None, metadata=(), options=()):
    with av.open(str(path), "w") as container:
        for key, value in metadata: container.metadata[key] = value
        stream = container.add_stream(codec, rate=25, options=dict(options))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        stream.codec_context.gop_size, stream.codec_context.max_b_frames, stream.thread_count = gop, b_frames, 1
        if times is not None: stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pix_fmt)
            if times is not None: picture.pts, picture.time_base = int(times[i]), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def truth(path):
    "In-order decode, independent of the module."
    frames = []
    with av.open(str(path), metadata_errors="replace") as container:
        try:
            for f in container.decode(container.streams.video[0]): frames.append(np.rot90(f.to_ndarray(format="rgb24"), round(f.rotation / 90)))
        except av.error.FFmpegError: pass
    return frames


def assert_exact(path, count=None):
    "All, some, and frames in another order are those of decoding from the start, with an index and without, to the last bit."
    frames = np.stack(truth(path))
    n = len(frames)
    assert num_frames(path) == n and (count is None or n == count)
    known = FrameIndex.from_row(scan(path).row())
    for asked in (range(n), [n - 1], [n - 1, 0, n // 2, n // 2], range(0, n, 3)):
        for index in (None, known): assert np.array_equal(read_frames(path, asked, index), frames[list(asked)])
    assert np.array_equal(read_video(path), frames)
    with pytest.raises(IndexError): read_frames(path, [n])


KINDS = {   # name: codec, pixel format, height, width
    "one.mp4": ("libx264", "yuv420p", 48, 64), "raw.avi": ("rawvideo", "yuv420p", 35, 63), "raw444.nut": ("rawvideo", "yuv444p", 35, 63), "rgb.avi": ("rawvideo", "bgr24", 35, 63),
    "ffv1-444.mkv": ("ffv1", "yuv444p", 35, 63), "ffv1-grey.mkv": ("ffv1", "gray", 35, 63), "ffv1-grey10.mkv": ("ffv1", "gray10le", 35, 63), "ffv1-alpha.mkv": ("ffv1", "yuva420p", 36, 64), "ffv1-bgra.mkv": ("ffv1", "bgr0", 35, 63),
    "h264-444.mp4": ("libx264", "yuv444p", 35, 63), "h264-422-10.mkv": ("libx264", "yuv422p10le", 48, 64), "h264-grey.mp4": ("libx264", "gray", 48, 64), "h264-nv12.mp4": ("libx264", "nv12", 48, 64), "h264-odd.mkv": ("libx264", "yuv444p", 1, 1),
    "mjpeg.avi": ("mjpeg", "yuvj420p", 35, 63), "png.mov": ("png", "rgb24", 35, 63), "paletted.gif": ("gif", "rgb8", 35, 63), "vp8.webm": ("libvpx", "yuv420p", 35, 63), "vp9.webm": ("libvpx-vp9", "yuv420p", 35, 63),
    "mpeg2.ts": ("mpeg2video", "yuv420p", 48, 64), "mpeg4.avi": ("mpeg4", "yuv420p", 48, 64), "wmv2.wmv": ("wmv2", "yuv420p", 48, 64), "hevc10.mp4": ("libx265", "yuv420p10le", 64, 64), "flash.flv": ("flv1", "yuv420p", 48, 64)}


@pytest.mark.parametrize("name", KINDS)
def test_formats_depths_and_sizes(tmp_path, name):
    codec, pix_fmt, height, width = KINDS[name]
    n = 1 if name.startswith("one") else 20
    try: path = write(tmp_path / name, film(n, height, width), codec, pix_fmt, options={"x265-params": "log-level=none"} if codec == "libx265" else ())
    except (av.error.FFmpegError, ValueError) as error: pytest.skip(f"this FFmpeg writes no {codec} {pix_fmt}: {error}")
    assert_exact(path, n)
    assert scan(path).height == height and scan(path).width == width


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_one_frame(tmp_path, suffix):
    path = write(tmp_path / f"one.{suffix}", film(1), "libx264", "yuv420p")
    assert_exact(path, 1)
    assert read_frames(path, [0] * 8).shape == (8, 48, 64, 3)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_frame_rate_and_a_late_start(tmp_path, suffix):
    times = 700 + np.cumsum(np.random.default_rng(3).integers(1, 400, 40))
    path = write(tmp_path / f"variable.{suffix}", film(40), "libx264", "yuv420p", b_frames=2, times=times)
    assert_exact(path, 40)
    assert scan(path).seek and len(set(np.diff(scan(path).times))) > 20


def test_a_file_that_declares_no_frames_and_latin_1_metadata(tmp_path):
    path = write(tmp_path / "a.mkv", film(20), "libx264", "yuv420p", metadata=[("title", "Fu~ball")])
    path.write_bytes(path.read_bytes().replace(b"Fu~ball", b"Fu\xdfball"))
    with av.open(str(path), metadata_errors="replace") as container: assert container.streams.video[0].frames == 0
    with pytest.raises(UnicodeDecodeError): av.open(str(path))
    assert_exact(path, 20)


def test_keyframes_that_lean_on_earlier_frames(tmp_path):
    for name, options in (("open", {"x264-params": "open-gop=1:bframes=3:keyint=8:min-keyint=8:scenecut=0"}), ("refresh", {"x264-params": "intra-refresh=1:keyint=8:bframes=0"})):
        assert_exact(write(tmp_path / f"{name}.mp4", film(60), "libx264", "yuv420p", b_frames=3, options=options), 60)


def test_interlaced_and_raw_streams_are_counted(tmp_path):
    for name, codec, options in (("fields.mp4", "libx264", {"x264-params": "interlaced=1"}), ("bare.h264", "libx264", ()), ("bare.m2v", "mpeg2video", ())):
        assert_exact(write(tmp_path / name, film(30), codec, "yuv420p", b_frames=2, options=options))


@pytest.mark.parametrize("offset", [-3, 3])
def test_a_sound_track_does_not_disturb(tmp_path, offset):
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as container:
        sound, picture = container.add_stream("pcm_s16le", rate=8000, layout="mono"), container.add_stream("libx264", rate=25)
        picture.height, picture.width, picture.pix_fmt = 48, 64, "yuv420p"
        for i, frame in enumerate(film(20)):
            chunk = av.AudioFrame.from_ndarray(np.zeros((1, 320), np.int16), layout="mono")
            chunk.rate, chunk.pts = 8000, 320 * max(0, i + offset)
            if i + offset >= 0: container.mux(sound.encode(chunk))
            container.mux(picture.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(picture.encode())
    assert_exact(path, 20)


NAMES = ["new\nline.mp4", "frame%d.mp4", "%s%n.mp4", "-dash.mp4", "--version.mp4", "it's \"quoted\".mp4", "concat:a.mp4|b.mp4", "file:a.mp4", "pipe:0", "http:a.mp4", "zażółć 動画 🎬.mp4", " .mp4", "a;rm -rf $HOME.mp4", "*.mp4", "[a-z]{1,2}.mp4",
         "back\\slash.mp4", "tab\t.mp4", "subfile,,start,0,end,9,,:a.mp4", "crypto:a.mp4", "no suffix", "wrong.txt", "." + "x" * 240 + ".mp4", os.fsdecode(b"not-utf8-\xff.mp4")]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
@pytest.mark.skipif(sys.platform != "linux", reason="other systems forbid such names")
def test_hostile_names(tmp_path, monkeypatch, name):
    frames = film(6)
    whole = write_video(tmp_path / "a.mp4", frames)
    os.replace(whole, os.path.join(tmp_path, name))
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(read_frames(name, [5, 0]), read_video(tmp_path / name)[[5, 0]]) and num_frames(name) == 6
    os.truncate(name, 100)
    with pytest.raises(VideoError) as error: num_frames(name)
    assert os.path.basename(str(error.value.path)) == name.split("/")[-1]


def test_a_cover_picture_is_no_video(tmp_path):
    def song(path, with_film):
        with av.open(str(path), "w") as container:
            cover = container.add_stream("png", rate=25)
            cover.height, cover.width, cover.pix_fmt = 48, 64, "rgb24"
            cover.disposition = av.stream.Disposition.attached_pic
            stream = container.add_stream("libx264", rate=25) if with_film else container.add_stream("aac", rate=8000, layout="mono")
            if with_film: stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
            container.mux(cover.encode(av.VideoFrame.from_ndarray(255 - film(1)[0], format="rgb24")))
            chunk = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            chunk.rate = 8000
            for frame in ([av.VideoFrame.from_ndarray(f, format="rgb24") for f in film(9)] if with_film else [chunk]): container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path
    with pytest.raises(VideoError, match="no video stream"): num_frames(song(tmp_path / "song.mp4", False))
    path = song(tmp_path / "film.mp4", True)
    assert num_frames(path) == 9 and abs(read_frames(path, [8])[0].astype(int) - film(9)[8]).mean() < 12


@pytest.mark.parametrize("path", sorted(p for p in REAL.iterdir() if p.is_file()) if REAL.is_dir() else [pytest.param(None, marks=pytest.mark.skip(reason="MBD_REALDATA names no folder with odd files"))], ids=lambda p: getattr(p, "name", "absent"))
def test_odd_real_files_by_row(path):
    "What test_video asks of these files without an index, with one that went through a table, to the last bit."
    try: index = scan(path)
    except VideoError as error:
        assert error.problem
        return
    frames, known = truth(path), FrameIndex.from_row(index.row())
    asked = [len(frames) - 1, 0, *range(0, len(frames), 7)]
    assert np.array_equal(read_frames(path, asked, known), np.stack([frames[i] for i in asked]))
    assert known.seek == index.seek


# Damage -------------------------------------------------------------------------------------------------------------

READ = """
import resource, signal, sys
import numpy as np
from mbd import video
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
for path in sys.argv[1:]:
    print("begin", path, flush=True)
    signal.alarm(20)              # no handler: the time-out ends the process even inside a decoder
    try:
        n = video.num_frames(path)
        index = video.FrameIndex.from_row(video.scan(path).row())
        for asked in (list(range(min(n, 40))), [n - 1, 0, n // 2]):
            for known in (None, index):
                frames = video.read_frames(path, asked, known)
                assert frames.shape == (len(asked), index.height, index.width, 3) and frames.dtype == np.uint8
        answer = "read"
    except video.VideoError as error:
        assert error.problem and str(error.path) == path
        answer = "refused"
    print("end", answer, flush=True)
"""


def damaged(folder, count, seed=0):
    "`count` files with random bytes changed, cut out or put in."
    sources = [write(folder / f"source{k}.{suffix}", film(30), codec, "yuv420p", b_frames=b).read_bytes() for k, (suffix, codec, b) in enumerate(
        [("mp4", "libx264", 2), ("avi", "mpeg4", 2), ("mkv", "libx264", 2), ("webm", "libvpx-vp9", 0), ("ts", "mpeg2video", 2), ("avi", "mjpeg", 0)][:5])]
    suffixes, paths = ("mp4", "avi", "mkv", "webm", "ts"), []
    for n in range(count):
        rng, data = np.random.default_rng([seed, n]), bytearray(sources[n % 5])
        head = len(data) if n % 3 else 1200        # every third file: damage in its first bytes only
        for at in rng.integers(0, head, int(rng.integers(1, 60))): data[at] = rng.integers(256)
        if n % 7 == 0: del data[int(rng.integers(len(data))):]
        if n % 11 == 0: data[100:100] = rng.bytes(int(rng.integers(1, 300)))
        paths.append(folder / f"damaged{n}.{suffixes[n % 5]}")
        paths[-1].write_bytes(data)
    return [str(p) for p in paths]


def read_apart(paths, env):
    "Outcome of reading each file in a process of its own kind: 'read', 'refused', or the way the process ended."
    outcomes = {}
    while len(outcomes) < len(paths):
        todo = [p for p in paths if p not in outcomes]
        done = subprocess.run([sys.executable, "-c", READ, *todo[:250]], capture_output=True, text=True, env=env, timeout=1200)
        lines = done.stdout.splitlines()
        for begin, end in zip(lines[::2], lines[1::2]): outcomes[begin[6:]] = end[4:]
        if done.returncode: outcomes[lines[-1][6:]] = f"exit {done.returncode}: {done.stderr[-400:]}"
    return outcomes


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="needs SIGALRM")
def test_damaged_files_are_read_or_refused(tmp_path, count):
    env = os.environ | {"PYTHONPATH": str(ROOT), "MBD_CACHE": str(tmp_path / "cache")}
    outcomes = read_apart(damaged(tmp_path, count), env)
    bad = {p: o for p, o in outcomes.items() if o not in ("read", "refused")}
    assert not bad and len(outcomes) == count
    assert {"read", "refused"} == set(outcomes.values())


# Nothing is left behind ---------------------------------------------------------------------------------------------

def resident(): return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


@pytest.mark.parametrize("reads", [600, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_stays_flat_and_no_file_stays_open(tmp_path, reads):
    good, untimed, broken = write(tmp_path / "a.mp4", film(40), "libx264", "yuv420p", b_frames=2), write(tmp_path / "b.avi", film(40), "libx264", "yuv420p", b_frames=2), tmp_path / "c.mp4"
    broken.write_bytes(good.read_bytes()[:500])
    assert scan(good).seek and not scan(untimed).seek
    kept, opened, curve = [(p, scan(p)) for p in (good, untimed)], None, []
    for n in range(reads):
        path, index = kept[n % 2]
        read_frames(path, [n % 40, 39], index if n % 3 else None)
        if n % 5 == 0:
            with pytest.raises(VideoError): read_frames(broken, [0])
        if n % (reads // 20) == 0: curve.append(resident())
        if n == reads // 4: opened = len(os.listdir("/proc/self/fd"))
    assert len(os.listdir("/proc/self/fd")) == opened
    assert curve[-1] - curve[5] < 6, curve    # MiB; forgotten decoders would take hundreds
