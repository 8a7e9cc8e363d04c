import functools, multiprocessing, os, pickle, signal, socket, sys
from pathlib import Path
import numpy as np, pytest, torch
from mbd import video
from mbd.video import VideoError, dense_clip, multi_view, num_frames, read_frames, scan, uniform_segments, write_video

av = pytest.importorskip("av")
ROOT = Path(__file__).parents[1]
REAL = ROOT / os.environ.get("MBD_REALDATA", "absent")
needs_real = pytest.mark.skipif(not (REAL / "clips").is_dir(), reason="MBD_REALDATA names no folder with real clips")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MBD_CACHE", str(tmp_path / "cache"))
    video._index.cache_clear()
    return tmp_path / "cache"


def film(n, height=48, width=128):
    "Frames that carry their number as eight squares along the top, over a slowly moving ground."
    y, x = np.mgrid[:height, :width]
    frames = np.stack([np.stack([110 + 50 * np.sin((x + i) / 19), 110 + 50 * np.sin((y - i) / 15), 0 * x + 120], -1) for i in range(n)]).astype(np.uint8)
    frames[:, :16] = 0
    for i in range(n):
        for bit in range(8):
            if i >> bit & 1: frames[i, :16, 16 * bit:16 * bit + 14] = 255
    return frames


def numbers(frames): return [sum(1 << b for b in range(8) if f[5:11, 16 * b + 4:16 * b + 10].mean() > 127) for f in frames]


def write(path, frames, codec, b_frames, gop=12, pix_fmt="yuv420p", **options):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = gop, b_frames
        for frame in frames: container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def truth(path):
    "In-order decode, independent of the module: frames, and whether it ended without an error."
    frames, whole = [], True
    with av.open(str(path), metadata_errors="replace") as container:
        try:
            for f in container.decode(container.streams.video[0]): frames.append(np.rot90(f.to_ndarray(format="rgb24"), round(f.rotation / 90)))
        except av.error.FFmpegError: whole = False
    return frames, whole


def difference(a, b): return np.abs(a.astype(int) - b).mean() if a.shape == b.shape else np.inf


KINDS = {"h264.mp4": ("libx264", 2), "plain.avi": ("mpeg4", 0), "b.avi": ("mpeg4", 2), "h264-b.avi": ("libx264", 3), "b.mp4": ("mpeg4", 2), "b.mkv": ("libx264", 3)}


@pytest.mark.parametrize("name", KINDS)
def test_frame_exact_whatever_is_asked(tmp_path, name):
    codec, b = KINDS[name]
    path = write(tmp_path / name, film(250), codec, b)
    assert num_frames(path) == 250
    rng = np.random.default_rng(0)
    for indices in ([0], [249], [3, 3, 1], range(0, 250, 7), range(200, 216), rng.integers(0, 250, 20), list(rng.permutation(250)[:9]), torch.tensor([240, 239])):
        frames = read_frames(path, indices)
        assert numbers(frames) == [int(i) for i in indices]
        assert frames.shape == (len(indices), 48, 128, 3) and frames.dtype == np.uint8 and frames.flags.c_contiguous


def counts(monkeypatch):
    "Watch how often frames are read by counting."
    seen, count = [], video._by_counting
    monkeypatch.setattr(video, "_by_counting", lambda *a: (seen.append(a[0]), count(*a))[1])
    return seen


def test_jumps_serve_where_the_times_are_good(tmp_path, monkeypatch):
    good, bad = write(tmp_path / "good.mp4", film(250), "libx264", 2), write(tmp_path / "bad.avi", film(250), "libx264", 2)
    assert scan(good).seek and len(scan(good).times) == 250 == len(scan(good).checksums) / 2 and not scan(bad).seek
    video._index.cache_clear()   # a new process reads it from the disk
    seen = counts(monkeypatch)
    for asked in (range(220, 236), [230, 225], range(0, 250, 9), [249], [0], range(250)): assert numbers(read_frames(good, asked)) == list(asked)
    assert not seen
    assert numbers(read_frames(bad, range(220, 236))) == list(range(220, 236)) and seen == [bad]


@pytest.mark.parametrize("threads", [1, 2, 5, 8])
def test_threads_change_nothing(tmp_path, monkeypatch, threads):
    path = write(tmp_path / "a.mp4", film(120), "libx264", 3)
    index, frames = scan(path), np.stack(truth(path)[0])
    monkeypatch.setattr(video, "_threads", lambda groups: threads)
    monkeypatch.setattr(video, "_by_counting", lambda *_: pytest.fail("did not jump"))
    for asked in (range(60, 76), range(2, 120, 7), [119], range(120)): assert np.array_equal(read_frames(path, asked, index), frames[list(asked)])


def lies(real):
    "Ways in which a jump may go wrong: another frame under the right time, a frame too few, another picture, an error."
    def earlier(*a):
        found = list(real(*a))
        times = [frame.pts for frame in found]
        for frame, time in zip(found[-1:] + found[:-1], times):
            frame.pts = time
            yield frame
    def fewer(container, stream, wanted): yield from (frame for frame in real(container, stream, wanted) if frame.pts != max(wanted))
    def mirrored(*a):
        for frame in real(*a):
            turned = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame.to_ndarray()[:, ::-1]), format=frame.format.name)
            turned.pts = frame.pts
            yield turned
    def fails(*a): raise av.error.InvalidDataError(1094995529, "Invalid data"); yield
    return earlier, fewer, mirrored, fails


@pytest.mark.parametrize("known", [False, True])
def test_a_jump_that_goes_wrong_is_never_believed(tmp_path, monkeypatch, known):
    for k, lie in enumerate(lies(video._towards)):
        path = write(tmp_path / f"{k}.mp4", film(250), "libx264", 2)
        index = scan(path)
        assert index.seek
        with monkeypatch.context() as patch:
            patch.setattr(video, "_towards", lie)
            assert numbers(read_frames(path, range(220, 236), index if known else None)) == list(range(220, 236))
        assert not index.seek       # not asked again, nor by another process
        video._index.cache_clear()
        assert scan(path).seek == known


def test_a_jump_found_wrong_while_indexing_is_never_tried(tmp_path, monkeypatch):
    for k, lie in enumerate(lies(video._towards)):
        with monkeypatch.context() as patch:
            patch.setattr(video, "_towards", lie)
            assert not scan(write(tmp_path / f"{k}.mp4", film(60), "libx264", 2)).seek


def test_without_pyav_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None); (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(ImportError, match="pip install av"): num_frames(tmp_path / "a.mp4")


def test_a_row_brings_the_index_back(tmp_path, monkeypatch):
    for path in (write(tmp_path / "good.mp4", film(120), "libx264", 2), write(tmp_path / "bad.avi", film(120), "mpeg4", 2)):
        index = scan(path)
        row = index.row()
        assert all(type(k) is type(v) is str and not set("\n\r") & set(v) for k, v in row.items()) and not {"path", "size", "mtime_ns"} & set(row)
        again = video.FrameIndex.from_row(row)
        assert again.row() == row and (again.count, again.height, again.width, again.keys, again.seek, again.problem) == (120, 48, 128, index.keys, index.seek, "")
        monkeypatch.setattr(video, "scan", lambda path: pytest.fail("scanned")); monkeypatch.setattr(video, "_save", lambda *_: pytest.fail("cached"))
        assert numbers(read_frames(path, [100, 3, 3], again)) == [100, 3, 3]
        with pytest.raises(IndexError, match="has 120"): read_frames(path, [120], again)
        monkeypatch.undo(); monkeypatch.setenv("MBD_CACHE", str(tmp_path / "cache"))


def test_a_row_of_a_long_film_stays_small():
    index = video.FrameIndex(200_000, 10, 10, "", video._runs(range(0, 200_000, 12)), video._runs(range(200_000)), bytes(400_000), True)
    assert sum(map(len, index.row().values())) < 100 and not video.FrameIndex.from_row(index.row()).seek
    assert video.FrameIndex.from_row(index.row(index.count)).times == list(range(200_000))
    ragged = np.cumsum(np.random.default_rng(0).integers(30, 40, 30_000)).tolist()   # matroska's milliseconds: no two steps alike
    index = video.FrameIndex(30_000, 10, 10, "", "0", video._runs(ragged), bytes(60_000), True)
    assert index.times == ragged and max(map(len, index.row().values())) < 131_072    # what Python's csv module reads


@pytest.mark.parametrize("change", [dict(count="0"), dict(count="-3"), dict(count="x"), dict(count=None), dict(height="0"), dict(times="0 1x98"), dict(times="0 0x119"), dict(times="0 1x999999999999"), dict(times="a"),
    dict(keys="5 -3"), dict(keys="0 500"), dict(keys="-1"), dict(checksums="AAAA"), dict(checksums="?"), dict(seek="maybe"), dict(seek=""), dict(times="", checksums="")])
def test_a_row_of_nonsense_is_refused(change):
    row = video.FrameIndex(120, 48, 128, "", "0 12x9", "0 512x119", bytes(240), True).row()
    video.FrameIndex.from_row(row)
    with pytest.raises(ValueError, match="index the file anew"): video.FrameIndex.from_row(row | change)
    for name in row:
        with pytest.raises(ValueError, match="index the file anew"): video.FrameIndex.from_row({k: v for k, v in row.items() if k != name})


def test_a_file_changed_after_indexing_is_noticed(tmp_path):
    path = write_video(tmp_path / "a.mp4", film(120))
    index = scan(path)
    row = index.row() | dict(size=str(path.stat().st_size), mtime_ns=str(path.stat().st_mtime_ns))
    bare, stamped = video.FrameIndex.from_row(index.row()), video.FrameIndex.from_row(row)
    assert index.mtime_ns == stamped.mtime_ns > 0 == bare.mtime_ns
    os.utime(path, (1, 1))
    for known in (index, stamped):
        with pytest.raises(VideoError, match="has changed since it was indexed .*index it anew"): read_frames(path, [3], known)
    assert numbers(read_frames(path, [3], bare)) == [3]
    write_video(path, film(120)[:, ::-1], fps=30)
    with pytest.raises(VideoError, match="not the file that was indexed"): read_frames(path, [30], bare)
    write_video(path, film(20))
    with pytest.raises(VideoError): read_frames(path, [100], video.FrameIndex.from_row(index.row()))
    path.unlink()
    with pytest.raises(VideoError, match="No such file"): read_frames(path, [3], bare)


def test_same_picture_size_and_bits(tmp_path):
    path = write_video(tmp_path / "a.mp4", film(30, width=134))   # a width that is no multiple of 8 or 16
    frames, _ = truth(path)
    assert np.array_equal(read_frames(path, range(30)), np.stack(frames))


def test_ten_bits_and_two_streams(tmp_path):
    path = write(tmp_path / "ten.mkv", film(20), "libx264", 0, pix_fmt="yuv420p10le")
    assert numbers(read_frames(path, [19, 4])) == [19, 4]
    with av.open(str(tmp_path / "two.mp4"), "w") as container:
        streams = [container.add_stream("libx264", rate=25) for _ in range(2)]
        for stream, (h, w) in zip(streams, ((48, 128), (96, 256))): stream.height, stream.width, stream.pix_fmt = h, w, "yuv420p"
        for frame in film(10):
            for stream, picture in zip(streams, (frame, 255 - frame.repeat(2, 0).repeat(2, 1))): container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for stream in streams: container.mux(stream.encode())
    assert numbers(read_frames(tmp_path / "two.mp4", [9, 0])) == [9, 0]


@pytest.mark.parametrize("matrix, turns", [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_rotation_is_applied(tmp_path, matrix, turns):
    path = write_video(tmp_path / "a.mp4", film(5))
    number = lambda v: (v * 0x10000 & 0xFFFFFFFF).to_bytes(4, "big")
    square = lambda a, b, c, d: number(a) + number(b) + bytes(4) + number(c) + number(d) + bytes(12) + bytes.fromhex("40000000")
    data, upright = path.read_bytes(), read_frames(path, range(5))
    at = data.index(square(1, 0, 0, 1), data.index(b"tkhd"))
    (tmp_path / "turned.mp4").write_bytes(data[:at] + square(*matrix) + data[at + 36:])
    assert np.array_equal(read_frames(tmp_path / "turned.mp4", range(5)), np.rot90(upright, turns, (1, 2)))


def test_size_changes_on_the_way(tmp_path):
    parts = [write(tmp_path / f"{k}.ts", f, "libx264", 0, bf="0") for k, f in enumerate((film(6), film(6, 96, 256)))]
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(p.read_bytes() for p in parts))
    frames = read_frames(path, range(num_frames(path)))
    assert frames.shape[1:] == (48, 128, 3) and len(frames) > 6


def test_indices_outside_are_named(tmp_path):
    path = write_video(tmp_path / "a.mp4", film(12))
    for bad in ([12], [0, -1], [3, 99]):
        with pytest.raises(IndexError) as error: read_frames(path, bad)
        assert str(path) in str(error.value) and str([i for i in bad if not 0 <= i < 12][0]) in str(error.value) and "12" in str(error.value)
    with pytest.raises(TypeError): read_frames(path, [1.5])
    assert read_frames(path, []).shape == (0, 48, 128, 3)


def test_no_videos(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", film(30)).read_bytes()
    (tmp_path / "empty.mp4").touch(); (tmp_path / "text.avi").write_text("not a film"); (tmp_path / "cut.mp4").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "folder.mp4").mkdir(); os.mkfifo(tmp_path / "pipe.mp4")
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono"); frame.rate = 8000
        container.mux(stream.encode(frame))
    for name, problem in (("empty.mp4", "empty"), ("text.avi", "no video that FFmpeg knows"), ("cut.mp4", "cut off"), ("folder.mp4", "no regular file"),
                          ("pipe.mp4", "no regular file"), ("sound.wav", "no video stream"), ("gone.mp4", "No such file")):
        for call in (num_frames, functools.partial(read_frames, indices=[0])):
            with pytest.raises(VideoError) as error: call(tmp_path / name)
            assert error.value.path == tmp_path / name and problem in error.value.problem and str(tmp_path / name) in str(error.value)


def test_a_playlist_does_not_reach_the_network(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        (tmp_path / "list.avi").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:{server.getsockname()[1]}/a.ts\n#EXT-X-ENDLIST\n")
        with pytest.raises(VideoError): num_frames(tmp_path / "list.avi")
        with pytest.raises(BlockingIOError): server.accept()


def test_a_cut_file_gives_what_decodes_and_nothing_else(tmp_path):
    path = write(tmp_path / "a.avi", film(120), "mpeg4", 0)
    data = path.read_bytes()
    for k in (55, 65):
        cut = tmp_path / f"{k}.avi"
        cut.write_bytes(data[:len(data) * k // 100])
        frames, _ = truth(cut)
        assert 0 < num_frames(cut) == len(frames) < 120
        assert all(difference(a, b) < 2 for a, b in zip(read_frames(cut, range(len(frames))), frames))
        with pytest.raises(IndexError, match=f"has {len(frames)}"): read_frames(cut, range(120))


def test_noise_in_a_file_never_hangs_or_yields_a_partial_array(tmp_path):
    data = bytearray(write(tmp_path / "a.mp4", film(60), "libx264", 2).read_bytes())
    for seed in range(8):
        rng, noisy = np.random.default_rng(seed), bytearray(data)
        for at in rng.integers(0, len(data), 40): noisy[at] = rng.integers(256)
        path = tmp_path / f"{seed}.mp4"
        path.write_bytes(noisy)
        try: n = num_frames(path)
        except VideoError: continue
        assert len(read_frames(path, range(n))) == n
        with pytest.raises(VideoError if scan(path).problem else IndexError): read_frames(path, [n])


def test_a_frame_behind_the_damage_is_an_error_that_names_it(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", film(12))
    whole, decode = read_frames(path, range(12)), video._decode
    def breaks_off(path):
        for i, frame in enumerate(decode(path)):
            if i == 5: raise av.error.InvalidDataError(1094995529, "Invalid data found when processing input")
            yield frame
    monkeypatch.setattr(video, "_decode", breaks_off)
    os.utime(path, (1, 1))      # its index is made anew
    assert num_frames(path) == 5 and np.array_equal(read_frames(path, range(5)), whole[:5])
    for asked in ([0, 5], [11], range(100)):
        with pytest.raises(VideoError, match="cannot be read: decoding breaks off after 5 frames") as error: read_frames(path, asked)
        assert error.value.path == path
    with pytest.raises(IndexError): read_frames(path, [-1])


def test_index_is_kept_and_follows_the_file(tmp_path, cache, monkeypatch):
    path = write_video(tmp_path / "a.mp4", film(12))
    num_frames(path)
    (stored,) = cache.rglob("*.json")
    assert b"checksums" in stored.read_bytes()
    video._index.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(video, "_look", lambda path: pytest.fail("decoded again"))
        assert num_frames(path) == num_frames(str(path)) == 12
    write_video(path, film(14))
    assert num_frames(path) == 14 and numbers(read_frames(path, [13])) == [13]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"key": 1, "index": {}}', b"\xff\xfe\x00", b'{"key": null, "row": {"count": "99"}}', b"[" * 200_000], ids=range(7))
def test_a_damaged_index_is_made_anew(tmp_path, cache, damage):
    path = write_video(tmp_path / "a.mp4", film(12))
    num_frames(path)
    (stored,) = cache.rglob("*.json")
    good = stored.read_bytes()
    stored.write_bytes(damage); video._index.cache_clear()
    assert num_frames(path) == 12 and stored.read_bytes() == good


def test_a_cache_that_cannot_be_written_costs_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MBD_CACHE", str(tmp_path / "file" / "below"))
    assert num_frames(write_video(tmp_path / "a.mp4", film(12))) == 12


@pytest.mark.parametrize("ending, codec", [("mp4", "h264"), ("avi", "mpeg4"), ("webm", "vp9"), ("WEBM", "vp9")])
def test_write_video_is_repeatable_and_close(tmp_path, ending, codec):
    frames = film(20)
    first, second = write_video(tmp_path / f"a.{ending}", frames), write_video(tmp_path / f"b.{ending}", frames)
    assert first.read_bytes() == second.read_bytes()
    assert difference(read_frames(first, range(20)), frames) < 4
    assert write_video(tmp_path / f"c.{ending}", frames, crf=40).stat().st_size < first.stat().st_size
    with av.open(str(write_video(tmp_path / f"d.{ending}", frames, fps=12.5))) as container:
        assert float(container.streams.video[0].average_rate) == 12.5 and container.streams.video[0].codec_context.name.endswith(codec)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{c}.{ending}" for c in "abc"] + ["cache", f"d.{ending}"]


@pytest.mark.parametrize("ending", ["mp4", "avi", "webm"])
@pytest.mark.parametrize("fps", [25, 30])
def test_what_write_video_writes_is_read_frame_by_frame(tmp_path, ending, fps):
    path, asked = write_video(tmp_path / f"a.{ending}", film(150), fps=fps), [149, 0, 77, 77, 12, 130, 3]
    expected, whole = truth(path)
    assert whole and num_frames(path) == 150 and numbers(expected) == list(range(150))
    assert np.array_equal(read_frames(path, asked), np.stack([expected[i] for i in asked])) and np.array_equal(read_frames(path, range(150)), expected)


@pytest.mark.parametrize("name", ["a.gif", "a.mkv", "a"])
def test_write_video_refuses_endings_it_has_no_codec_for(tmp_path, name):
    with pytest.raises(ValueError, match=r"cannot write .*choose one of \.mp4, \.avi, \.webm"): write_video(tmp_path / name, film(3))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad, part", [(film(3)[:, :47], "even"), (film(3).astype(float), "uint8"), (film(3)[0], "uint8 (T, H, W, 3)"), (film(3)[:0], "T >= 1")])
def test_write_video_refuses(tmp_path, bad, part):
    with pytest.raises(ValueError) as error: write_video(tmp_path / "a.mp4", bad)
    assert part in str(error.value) and not list(tmp_path.iterdir())


def _die_before_renaming(path):
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    write_video(path, film(12))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_writer_leaves_no_file_of_that_name(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_die_before_renaming, args=(tmp_path / "a.mp4",))
    process.start(); process.join(20)
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_in_workers(tmp_path, start):
    if start not in multiprocessing.get_all_start_methods(): pytest.skip(f"no {start} here")
    paths = [write(tmp_path / "a.mp4", film(250), "libx264", 2), write(tmp_path / "b.avi", film(250), "mpeg4", 2)]
    for path in paths: read_frames(path, [240])   # decoders were used in the parent before
    loader = torch.utils.data.DataLoader(paths * 4, batch_size=None, collate_fn=functools.partial(read_frames, indices=[240, 3, 249]), num_workers=2 if start == "fork" else 1, multiprocessing_context=start, timeout=60)
    assert [numbers(frames) for frames in loader] == [[240, 3, 249]] * 8
    if start == "fork":
        (tmp_path / "text.avi").write_text("no")
        loader = torch.utils.data.DataLoader([tmp_path / "text.avi"], batch_size=None, collate_fn=functools.partial(read_frames, indices=[0]), num_workers=1, timeout=60)
        with pytest.raises(VideoError, match="text.avi"): next(iter(loader))


def test_many_processes_meet_one_new_file(tmp_path, cache):
    if "fork" not in multiprocessing.get_all_start_methods(): pytest.skip("needs fork")
    path = write_video(tmp_path / "a.mp4", film(60))
    with multiprocessing.get_context("fork").Pool(4) as pool: assert pool.map(num_frames, [path] * 16, chunksize=1) == [60] * 16
    assert len([p for p in cache.rglob("*") if p.is_file()]) == 1


def test_error_survives_pickling():
    error = pickle.loads(pickle.dumps(VideoError("a.mp4", "is odd")))
    assert (error.path, error.problem, str(error)) == (Path("a.mp4"), "is odd", "a.mp4: is odd")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow(tmp_path):
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20
    path = write_video(tmp_path / "a.mp4", film(40, 96, 256))
    for _ in range(50): read_frames(path, [1, 39])
    before = resident()
    for _ in range(150): read_frames(path, [1, 39])
    assert resident() - before < 8   # MiB; one set of the 40 frames left behind each time would be 400


def test_dense_clip():
    assert dense_clip(10, 4).tolist() == [3, 4, 5, 6] and dense_clip(10, 4, 2).tolist() == [1, 3, 5, 7] and dense_clip(10, 4, start=8).tolist() == [8, 9, 9, 9]
    assert dense_clip(3, 6).tolist() == [0, 1, 2, 2, 2, 2] and dense_clip(1, 3, 5).tolist() == [0, 0, 0]
    starts = [dense_clip(10, 4, 2, generator=np.random.default_rng(s)) for s in range(60)]
    assert {int(s[0]) for s in starts} == {0, 1, 2, 3} and all((np.diff(s) == 2).all() for s in starts)


def test_uniform_segments():
    assert uniform_segments(10, 5).tolist() == [1, 3, 5, 7, 9] and uniform_segments(2, 4).tolist() == [0, 0, 1, 1] and uniform_segments(100, 1).tolist() == [50]
    for s in range(20):
        picked = uniform_segments(100, 10, np.random.default_rng(s))
        assert (picked // 10 == np.arange(10)).all()
    assert len({tuple(uniform_segments(100, 10, np.random.default_rng(s))) for s in range(20)}) == 20


def test_multi_view():
    views = multi_view(100, 8, 2, 5)
    assert views.shape == (5, 8) and views[0, 0] == 0 and views[-1, -1] == 99 and (np.diff(views, axis=1) == 2).all()
    assert multi_view(100, 8, 2, 1).tolist() == [dense_clip(100, 8, 2).tolist()] and multi_view(5, 8, 1, 3).max() == 4


@pytest.mark.parametrize("call", [lambda: dense_clip(0, 4), lambda: dense_clip(10, 0), lambda: dense_clip(10, 4, 0), lambda: dense_clip(10, 4, start=10),
                                  lambda: dense_clip(10, 4, start=-1), lambda: uniform_segments(10, 0), lambda: multi_view(10, 4, 1, 0)])
def test_sampling_refuses_nonsense(call):
    with pytest.raises(ValueError, match="must"): call()


@needs_real
@pytest.mark.parametrize("path", sorted(p for f in ("clips", "odd") for p in (REAL / f).rglob("*") if p.is_file()) if (REAL / "clips").is_dir() else [], ids=lambda p: p.name)
def test_real_files(path):
    try: frames, _ = truth(path)
    except (av.error.FFmpegError, IndexError): frames = []
    if not frames:
        with pytest.raises(VideoError): read_frames(path, [0])
        return
    n = len(frames)
    assert num_frames(path) == n
    for asked in (np.linspace(0, n - 1, 8).round().astype(int), np.arange(n - 1, max(-1, n - 9), -1), dense_clip(n, 8, start=n * 3 // 4)):
        assert max(difference(a, frames[i]) for a, i in zip(read_frames(path, asked), asked)) < 2
    with pytest.raises(VideoError if scan(path).problem else IndexError): read_frames(path, [n])


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile secret.mp4\n", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n"])
def test_a_video_that_is_a_list_of_other_files_opens_none_of_them(tmp_path, text):
    write_video(tmp_path / "secret.mp4", np.zeros((4, 32, 32, 3), np.uint8))
    (tmp_path / "holiday.mp4").write_text(text)
    with pytest.raises(VideoError, match="holiday.mp4"): read_frames(tmp_path / "holiday.mp4", [0])
    with pytest.raises(VideoError, match="holiday.mp4"): num_frames(tmp_path / "holiday.mp4")


@pytest.mark.parametrize("fps", [0, -5, float("inf"), float("nan"), 1e-4, "25", None])
def test_a_video_needs_a_rate(tmp_path, fps):
    with pytest.raises(ValueError, match="a.mp4: fps must be above 0"): write_video(tmp_path / "a.mp4", film(3), fps=fps)


@pytest.mark.parametrize("crf", [-1, 52, 51.5, float("nan"), "18", True])
@pytest.mark.parametrize("ending", ["mp4", "avi"])
def test_a_quality_outside_its_scale_is_refused(tmp_path, ending, crf):
    with pytest.raises(ValueError, match="crf must be a number from 0 to 51, not"): write_video(tmp_path / f"a.{ending}", film(3), crf=crf)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such names")
@pytest.mark.parametrize("name", ["a:b.mp4", "pipe:1.mp4"])
def test_a_colon_in_a_name_is_no_protocol(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert numbers(read_frames(write_video(name, film(5)), [4])) == [4] and (tmp_path / name).exists()


def test_a_video_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.fstat(file).st_size), sync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(Path(b).name), replace(a, b)))
    path = write_video(tmp_path / "a.mp4", film(5))
    assert done == [path.stat().st_size, "a.mp4"]


def test_a_rate_may_be_a_number_of_numpy(tmp_path):
    write_video(tmp_path / "a.mp4", film(3), fps=np.float32(12.5))
    with av.open(str(tmp_path / "a.mp4")) as container: assert container.streams.video[0].average_rate == 12.5
    with pytest.raises(VideoError, match="a.mp4: cannot be written"): write_video(tmp_path / "a.mp4", film(3), fps=1e12)


@pytest.mark.parametrize("mask", [[True, False, True], np.array([True, False, True]), torch.tensor([True, False, True])])
def test_a_mask_is_not_taken_for_frames_0_and_1(tmp_path, mask):
    with pytest.raises(TypeError, match="True and False.*flatnonzero"): read_frames(write_video(tmp_path / "a.mp4", film(3)), mask)


@pytest.mark.parametrize("generator", [0, np.random.RandomState(0), torch.Generator()])
def test_what_draws_no_numbers_is_told(generator):
    for call in (lambda: dense_clip(10, 4, generator=generator), lambda: uniform_segments(10, 4, generator)):
        with pytest.raises(TypeError, match="generator must be a numpy Generator, such as np.random.default_rng"): call()


def test_a_window_refuses_frames_it_does_not_have(tmp_path):
    first, last = (window.begin for window in video.sliding_windows(write_video(tmp_path / "a.mp4", film(16)), 8))
    assert (first, last) == (0, 8)
    for window in video.sliding_windows(tmp_path / "a.mp4", 8):
        for bad in (8, -1):
            with pytest.raises(IndexError, match=f"no frame {bad} in the window that begins at frame {window.begin}, it has 8"): window.read([0, bad])
        assert window.read([]).shape == (0, 48, 128, 3) and numbers(window.read(np.arange(8))) == list(range(window.begin, window.begin + 8))
