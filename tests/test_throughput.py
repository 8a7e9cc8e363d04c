import numpy as np, pytest
pytest.importorskip("av")
from mbd import throughput, video


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path): monkeypatch.setenv("MBD_CACHE", str(tmp_path / "cache"))


def test_table_has_every_case_and_writes_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "COLUMNS", {name: dict(list(ways.items())[:1]) for name, ways in throughput.COLUMNS.items()})    # a loop with one kind of threads is enough
    seen, real = [], tmp_path / "real" / "class"
    real.mkdir(parents=True)
    throughput.write_film(real / "a|b.mp4", "H.264", 12, 20, 32, 48)
    text = throughput.data_table(tmp_path / "reports" / "data.md", tmp_path / "real", codecs=("H.264", "MPEG-4"), keyframes=(6,), lengths=(4,), workers=1, rounds=2, num_frames=20, size=(32, 48), command="mbd bench data --test", progress=lambda *a: seen.append(a))
    assert (tmp_path / "reports" / "data.md").read_text() == text and "`mbd bench data --test`" in text and "numpy" in text
    for title in ("H.264, 6, 4 dense", "H.264, 6, 4 spread", "MPEG-4, 6, 4 dense", "MPEG-4, 6, 4 spread"): assert text.count(f"| {title} |") == 2   # alone, and with workers
    assert "class/a b.mp4, 4 dense" in text and seen == [(k, 10) for k in range(1, 11)]
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(columns) == 1 and "ours, index" in text and "PyAV loop" in text


def test_a_reader_that_lies_or_fails_is_shown(tmp_path):
    path = throughput.write_film(tmp_path / "a.mp4", "H.264", 6, 20, 32, 48)
    def late(path, indices, index): return video.read_frames(path, [19 - i for i in indices], index)
    def fails(path, indices, index): raise RuntimeError("no")
    result = throughput.row(path, [3, 4, 5], {"ours, index": {"": video.read_frames}, "late": {"": late}, "fails": {"": fails}, "both": {"bad": fails, "good": video.read_frames}}, rounds=2)
    assert result["ours, index"][2] == 0 and result["late"][2] == 3 and result["fails"] == "RuntimeError" and result["both"][1:3] == ("good", 0)
    text = throughput.line("x", result, ["ours, index", "late", "fails", "both"])
    assert "**3 wrong**" in text and "RuntimeError" in text and text.count("|") == 6


def test_films_have_the_keyframes_asked_for(tmp_path):
    for codec, suffix in (("H.264", "mp4"), ("MPEG-4", "avi")):
        index = video.scan(throughput.write_film(tmp_path / f"a.{suffix}", codec, 7, 20, 32, 48))
        assert index.keys == [0, 7, 14] if codec == "H.264" else max(np.diff([*index.keys, 20])) <= 9    # MPEG-4 puts B-frames before a keyframe
        assert (index.count, index.height, index.width) == (20, 32, 48)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="rounds"): throughput.data_table(rounds=0)
    with pytest.raises(ValueError, match="num_frames"): throughput.data_table(num_frames=4)


def test_a_report_that_was_stopped_keeps_its_lines_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "COLUMNS", {"ours, index": throughput.COLUMNS["ours, index"]})
    small = dict(codecs=["H.264"], keyframes=[6], lengths=[16], workers=0, rounds=1, num_frames=20, size=(32, 48))
    def stop(done, total): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): throughput.data_table(tmp_path / "data.md", **small, progress=stop)
    text = (tmp_path / "data.md").read_text()
    assert "| H.264, 6, 16 dense |" in text and text.endswith("Unfinished: 1 of 2 lines.\n")
    whole = throughput.data_table(tmp_path / "data.md", **small)
    assert (tmp_path / "data.md").read_text() == whole and "16 spread" in whole and "Unfinished" not in whole and "workers" not in whole
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ""] == ["data.md"]


def test_a_broken_clip_is_a_line_and_what_cannot_be_measured_is_named_first(tmp_path):
    (tmp_path/"a.mp4").write_bytes(b"no video"); throughput.write_film(tmp_path/"b.mp4", "H.264", 6, 20, 32, 48)
    text = throughput.data_table(None, tmp_path, ("H.264",), (6,), (4,), 0, 1, 20, (32, 48))
    assert "| a.mp4: is no video" in text and "| b.mp4, 4 dense |" in text
    for wrong, words in ((dict(real=tmp_path/"gone"), "is no folder"), (dict(codecs=("HEVC",)), "'HEVC' is unknown"), (dict(lengths=()), "lengths is empty")):
        with pytest.raises(ValueError, match=words): throughput.data_table(**wrong)
