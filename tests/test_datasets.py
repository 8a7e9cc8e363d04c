import os, subprocess, sys
from collections import Counter
from pathlib import Path
import pytest
from mbd import datasets
from mbd.datasets import Dataset, Record, cut_parts, load

ROOT = Path(__file__).parents[1]
REAL = ROOT / os.environ.get("MBD_REALDATA", "absent")
needs_real = pytest.mark.skipif(not (REAL / "annotations/ucf101").is_dir(), reason="MBD_REALDATA names no folder with the official lists")
CLASSES = ("Archery", "HandstandPushups", "YoYo")


def entry(name, group, clip): return f"{name}/v_{'HandStandPushups' if name == 'HandstandPushups' else name}_g{group:02}_c{clip:02}.avi"


@pytest.fixture
def root(tmp_path):
    "A set in the official layout: 3 classes, 8 groups of 2 clips (empty files), groups 1 and 2 in the test list."
    root = tmp_path / "ucf101"
    (root / "ucfTrainTestlist").mkdir(parents=True)
    lists = {"classInd": [f"{i} {c}" for i, c in enumerate(CLASSES, 1)], "trainlist01": [], "testlist01": []}
    for label, name in enumerate(CLASSES, 1):
        (root / "UCF-101" / name).mkdir(parents=True)
        for group in range(1, 9):
            for clip in (1, 2):
                (root / "UCF-101" / entry(name, group, clip)).touch()
                lists["testlist01" if group < 3 else "trainlist01"].append(entry(name, group, clip) + ("" if group < 3 else f" {label}"))
    for name, lines in lists.items(): (root / f"ucfTrainTestlist/{name}.txt").write_bytes("".join(line + "\r\n" for line in lines).encode())
    return root


def test_records_of_the_official_layout(root):
    train, test = load("ucf101", root), load("ucf101", str(root), split=1, subset="test")
    assert (train.expected, train.found, train.missing, test.expected, test.found) == (36, 36, [], 12, 12)
    assert train.classes == list(CLASSES) and (train.name, train.split, train.subset) == ("ucf101", 1, "train")
    r = train.records[12]
    assert (r.id, r.label, r.source, r.subset) == ("v_HandStandPushups_g03_c01", 1, "HandstandPushups_g03", "train") and r.path.is_file()
    assert not {r.source for r in train.records} & {r.source for r in test.records}
    with pytest.raises(AttributeError): r.label = 2


def test_missing_videos_are_counted_and_named(root):
    for name in (entry("YoYo", 3, 1), entry("Archery", 5, 2)): (root / "UCF-101" / name).unlink()
    train = load("ucf101", root)
    assert (train.expected, train.found, train.missing) == (36, 34, ["v_Archery_g05_c02", "v_YoYo_g03_c01"])
    assert "36 expected, 34 found, 2 missing" in repr(train) and "v_YoYo_g03_c01" in repr(train) and len(train.records) == 34
    for p in (root / "UCF-101/YoYo").iterdir(): p.unlink()
    (root / "UCF-101/YoYo").rmdir()
    assert load("ucf101", root).found == 23


def test_places_of_lists_and_videos(root, tmp_path):
    assert load("ucf101", root / "UCF-101").found == 36            # lists beside the videos' folder
    lists = root / "ucfTrainTestlist"
    lists = lists.rename(tmp_path / "apart")
    with pytest.raises(FileNotFoundError, match="classInd.txt.*annotations="): load("ucf101", root)
    assert load("ucf101", root, annotations=lists).found == 36
    lists = lists.rename(tmp_path / "ucfTrainTestlist")
    assert load("ucf101", root, annotations=tmp_path).found == 36
    for f in lists.iterdir(): f.rename(root / f.name)
    assert load("ucf101", root).found == 36                         # lists in the folder itself
    for f in root.glob("*.txt"): f.rename(root / "UCF-101" / f.name)
    assert load("ucf101", root).found == load("ucf101", root / "UCF-101").found == 36   # lists among the videos
    with pytest.raises(FileNotFoundError, match="elsewhere does not exist.*settings.ini"): load("ucf101", tmp_path / "elsewhere")


@pytest.mark.parametrize("arguments, part", [(("ufc101",), "did you mean 'ucf101'"), (("hmdb51",), "not yet built"), (("kinetics400",), "not yet built"), (("ssv2",), "not yet built"),
                                             (("imagenet",), "unknown"), (("ucf101", 0), "no split 0; valid: 1, 2, 3"), (("ucf101", 4), "no split 4"), (("ucf101", "1"), "no split '1'"),
                                             (("ucf101", 1, "tset"), "did you mean 'test'")])
def test_wrong_arguments_name_the_nearest(root, arguments, part):
    name, *rest = arguments
    with pytest.raises(ValueError) as error: load(name, root, *rest)
    assert part in str(error.value) and str(arguments[-1]) in str(error.value)


def test_a_missing_list_is_named(root):
    with pytest.raises(FileNotFoundError, match="trainlist03.txt is missing"): load("ucf101", root, split=3)


@pytest.mark.parametrize("line", ["../../etc/v_x_g01_c01.avi 1", "/etc/passwd 1", "Archery/../../v_a_g01_c01.avi 1", "..\\v_a_g01_c01.avi 1", "Archery/v_Archery_g09_c01.avi", "Archery/v_Archery_g09_c01.avi 2",
                                  "Archery/v_Archery_g09_c01.avi one", "Archery/film.avi 1", "Juggling/v_Juggling_g01_c01.avi 1", "Archery/v_Archery_g03_c01.avi 1", "nonsense"])
def test_bad_lines_name_file_and_line(root, line):
    file = root / "ucfTrainTestlist/trainlist01.txt"
    file.write_bytes(file.read_bytes() + f"\r\n{line}\r\n".encode())
    with pytest.raises(ValueError) as error: load("ucf101", root)
    assert "trainlist01.txt, line 38" in str(error.value) and repr(line) in str(error.value)


@pytest.mark.parametrize("text", ["1 Archery\n3 YoYo\n", "1 Archery\n2 Archery\n", "1 ../x\n", "1 ..\n", "Archery\n", ""])
def test_bad_class_lists(root, text):
    (root / "ucfTrainTestlist/classInd.txt").write_text(text)
    with pytest.raises(ValueError, match="classInd.txt"): load("ucf101", root)


def test_byte_order_mark_and_plain_line_ends(root):
    for f in (root / "ucfTrainTestlist").iterdir(): f.write_bytes(b"\xef\xbb\xbf" + f.read_bytes().replace(b"\r\n", b"\n"))
    assert load("ucf101", root).found == 36


def check(parts, records, names):
    assert list(parts) == ["fit", *names] and sorted(r.id for p in parts.values() for r in p) == sorted(r.id for r in records)
    sources = [{r.source for r in p} for p in parts.values()]
    assert sum(map(len, sources)) == len(set().union(*sources))
    assert all({r.label for r in p} == {r.label for r in records} for p in parts.values())


def test_parts_by_source(root):
    train = load("ucf101", root)
    parts = cut_parts(train)
    check(parts, train.records, ["map", "gate"])
    assert {k: len(v) for k, v in parts.items()} == {"fit": 24, "map": 6, "gate": 6}
    assert cut_parts(train.records) == parts and cut_parts(train, seed=1) != parts
    backwards = cut_parts(train.records[::-1])
    assert all({r.id for r in backwards[k]} == {r.id for r in parts[k]} for k in parts)   # the order of the list does not matter
    assert [r.id for r in parts["fit"]] == [r.id for r in train.records if r in parts["fit"]]


def test_parts_are_the_same_in_another_process(root):
    code = f"from mbd.datasets import *; print(*[r.id for r in cut_parts(load('ucf101', {str(root)!r}), seed=7)['map']])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "5"}, cwd=ROOT).stdout
    assert out.split() == [r.id for r in cut_parts(load("ucf101", root), seed=7)["map"]]


@pytest.mark.parametrize("fractions", [{"map": 0.5, "gate": 0.4}, {"map": 0.4, "gate": 0.5}, {"map": 0.9, "gate": 0.05}, {"map": 0.01, "gate": 0.01}, {"val": 0.3}])
@pytest.mark.parametrize("sources", [3, 4, 7, 25])
def test_every_class_in_every_part(fractions, sources):
    records = [Record(f"{c}{s}{k}", Path("x"), c, f"{c}_g{s:02}") for c in range(5) for s in range(sources) for k in range(2)]
    for seed in range(5): check(cut_parts(records, fractions, seed), records, fractions)


def test_sources_shared_by_classes_stay_in_one_part():
    records = [Record(f"{c}{s}", Path("x"), c, f"film{(s + 4 * c) % 12}") for c in range(3) for s in range(8)]
    for seed in range(10): check(cut_parts(records, seed=seed), records, ["map", "gate"])


def test_too_few_sources_is_an_error(root):
    records = [r for r in load("ucf101", root).records if r.label or r.source < "Archery_g05"]
    with pytest.raises(ValueError, match=r"class 0 has 2 source.*Archery_g03"): cut_parts(records)


def test_test_videos_are_refused(root):
    train, test = load("ucf101", root), load("ucf101", root, subset="test")
    for bad in (test, test.records, train.records + test.records[:1]):
        with pytest.raises(ValueError, match="'test' list"): cut_parts(bad)
    with pytest.raises(ValueError, match="no records"): cut_parts([])


@pytest.mark.parametrize("fractions", [{"fit": 0.5}, {"map": 0}, {"map": -0.1}, {"map": 1.0}, {"map": 0.6, "gate": 0.4}])
def test_fractions_that_cannot_be(root, fractions):
    with pytest.raises(ValueError, match="fractions"): cut_parts(load("ucf101", root), fractions)


@needs_real
@pytest.mark.parametrize("split, train, test", [(1, 9537, 3783), (2, 9586, 3734), (3, 9624, 3696)])
def test_official_lists(split, train, test):
    sets = [load("ucf101", REAL / "clips/ucf101", split, subset, REAL / "annotations/ucf101") for subset in ("train", "test")]
    assert [d.expected for d in sets] == [train, test] and all(len(d.classes) == 101 and d.found + len(d.missing) == d.expected for d in sets)
    assert not {i.rsplit("_c", 1)[0] for i in sets[0].missing} & {i.rsplit("_c", 1)[0] for i in sets[1].missing}
    if split == 1: assert [sorted(r.source for r in d.records) for d in sets] == [["SoccerJuggling_g23", "SoccerJuggling_g24"], ["ApplyEyeMakeup_g01", "Basketball_g01"]]


@needs_real
def test_cut_of_the_official_list(tmp_path):
    root = tmp_path / "UCF-101"
    for line in (REAL / "annotations/ucf101/trainlist01.txt").read_text().split("\n"):
        if line.strip():
            path = root / line.split()[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    train = load("ucf101", root, annotations=REAL / "annotations/ucf101")
    assert train.found == train.expected == 9537
    parts = cut_parts(train)
    check(parts, train.records, ["map", "gate"])
    assert all(Counter(s.rsplit("_", 1)[0] for s in {r.source for r in parts[p]}).most_common()[0][1] == 3 for p in ("map", "gate"))
