import csv, json, os, shutil, subprocess, sys
from collections import Counter
from pathlib import Path
import pytest
from mbd import datasets
from mbd.datasets import KNOWN, Dataset, Record, counts, cut_parts, load, names_direction, table

ROOT = Path(__file__).parents[1]
REAL = ROOT / os.environ.get("MBD_REALDATA", "absent")
needs_real = pytest.mark.skipif(not (REAL / "annotations").is_dir(), reason="MBD_REALDATA names no folder with the official lists")
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


@pytest.mark.parametrize("arguments, part", [(("ufc101",), "did you mean 'ucf101'"), (("kinetics",), "did you mean 'kinetics400'"), (("imagenet",), "unknown"), (("ucf101", 0), "no split 0; valid: 1, 2, 3"),
                                             (("ucf101", 4), "no split 4"), (("ucf101", "1"), "no split '1'"), (("kinetics400", 2), "no split 2; valid: 1"), (("ucf101", 1, "tset"), "did you mean 'test'"),
                                             (("ucf101", 1, "validation"), "valid: train, test"), (("hmdb51", 1, "val"), "no subset 'val'"), (("kinetics400", 1, "validate"), "did you mean 'validation'"),
                                             (("ssv2", 1, "test"), "has no labels")])
def test_wrong_arguments_name_the_nearest(root, arguments, part):
    name, *rest = arguments
    with pytest.raises(ValueError) as error: load(name, root, *rest)
    assert part in str(error.value) and str(arguments[-1]) in str(error.value)


def test_a_missing_list_is_named(root):
    with pytest.raises(FileNotFoundError, match="trainlist03.txt of ucf101 is missing; looked in .*ucfTrainTestlist"): load("ucf101", root, split=3)


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


def test_a_validation_list_is_halved_by_source_and_a_training_list_never_tested_on(root):
    train, test = load("ucf101", root), load("ucf101", root, subset="test")
    more = [Record(f"{r.id}-{n}", r.path, r.label, f"{r.source}-{n}", r.subset) for r in test.records for n in range(8)]
    parts = cut_parts(more, {"map": .25, "gate": .25}, rest="test")
    assert list(parts) == ["test", "map", "gate"] and sum(map(len, parts.values())) == len(more)
    assert len({r.source for r in more}) == sum(len({r.source for r in part}) for part in parts.values()) and .4 < len(parts["test"])/len(more) < .6
    with pytest.raises(ValueError, match="'train' list; it cannot be tested on"): cut_parts(train, rest="test")
    with pytest.raises(ValueError, match="rest = 'map'"): cut_parts(train, rest="map", fractions={"gate": .2})


@pytest.mark.parametrize("fractions", [{"fit": 0.5}, {"map": 0}, {"map": -0.1}, {"map": 1.0}, {"map": 0.6, "gate": 0.4}])
def test_fractions_that_cannot_be(root, fractions):
    with pytest.raises(ValueError, match="fractions"): cut_parts(load("ucf101", root), fractions)


# ---- UCF101, further

def test_other_endings_and_names_of_folders(root):
    videos = root / "UCF-101"
    for p in (videos / "YoYo").iterdir(): p.rename(p.with_suffix(".MP4"))
    (videos / "HandstandPushups").rename(videos / "Hand_stand pushups")
    (videos / entry("Archery", 3, 1)).with_suffix(".mp4").touch()      # beside the .avi, which is preferred
    train = load("ucf101", root)
    assert (train.found, train.missing) == (36, []) and train.records[0].path.name == "v_Archery_g03_c01.avi"
    assert {r.path.suffix for r in train.records if r.label == 2} == {".MP4"} and {r.path.parent.name for r in train.records if r.label == 1} == {"Hand_stand pushups"}
    (videos / entry("Archery", 3, 1)).with_suffix(".avi.part").touch()
    (videos / entry("Archery", 3, 1)).unlink(); (videos / entry("Archery", 3, 1)).with_suffix(".mp4").unlink()
    assert load("ucf101", root).missing == ["v_Archery_g03_c01"]


def test_a_video_in_the_folder_of_another_class_is_missing(root):
    (root / "UCF-101" / entry("Archery", 3, 1)).rename(root / "UCF-101/YoYo/v_Archery_g03_c01.avi")
    assert load("ucf101", root).missing == ["v_Archery_g03_c01"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_count_if_they_lead_somewhere(root, tmp_path):
    a, b = (root / "UCF-101" / entry("Archery", 3, c) for c in (1, 2))
    a.rename(tmp_path / "a.avi"); a.symlink_to(tmp_path / "a.avi")
    b.unlink(); b.symlink_to(tmp_path / "nowhere.avi")
    assert load("ucf101", root).missing == ["v_Archery_g03_c02"]


# ---- unreadable files, counts

def test_a_set_that_may_only_be_read_has_its_list_beside_the_official_ones(root, tmp_path):
    lists = tmp_path / "lists"
    shutil.copytree(root / "ucfTrainTestlist", lists)
    write(lists / "unreadable.csv", "path,reason", f"UCF-101/{entry('Archery', 3, 1)},no frame decodes")
    assert load("ucf101", root).unreadable == {} and load("ucf101", root, annotations=lists).unreadable == {"v_Archery_g03_c01": "no frame decodes"}
    write(root / "unreadable.csv", "path,reason")
    assert load("ucf101", root, annotations=lists).unreadable == {}             # the set's own goes first


def test_unreadable_videos_are_found_but_no_records(root):
    write(root / "unreadable.csv", "path,reason", f"UCF-101/{entry('Archery', 3, 1)},no frame decodes", f'UCF-101/{entry("YoYo", 1, 1)},"killed, after 60 s"', "UCF-101/gone.avi,was there once")
    (root / "UCF-101" / entry("YoYo", 3, 1)).unlink()
    train, test = load("ucf101", root), load("ucf101", root, subset="test")
    assert train.unreadable == {"v_Archery_g03_c01": "no frame decodes"} and test.unreadable == {"v_YoYo_g01_c01": "killed, after 60 s"}
    for d in (train, test): assert d.expected == d.found + len(d.missing) and len(d.records) == d.found - len(d.unreadable) and not {r.id for r in d.records} & set(d.unreadable)
    assert (train.found, train.missing) == (35, ["v_YoYo_g03_c01"]) and "35 found, 1 missing, 1 unreadable" in repr(train)
    assert load("ucf101", root / "UCF-101").unreadable == train.unreadable      # made for the folder above: its paths count from there


def test_a_broken_video_that_is_there_in_another_ending_too_is_read_from_that(root):
    good = (root / "UCF-101" / entry("Archery", 3, 1)).with_suffix(".mp4")
    write(root / "unreadable.csv", "path,reason", f"UCF-101/{entry('Archery', 3, 1)},no frame decodes")
    good.touch()
    train = load("ucf101", root)
    assert not train.unreadable and next(r for r in train.records if r.id == "v_Archery_g03_c01").path == good
    write(root / "unreadable.csv", "path,reason", *(f"UCF-101/{Path(entry('Archery', 3, 1)).with_suffix(e).as_posix()},no frame decodes" for e in (".avi", ".mp4")))
    assert set(load("ucf101", root).unreadable) == {"v_Archery_g03_c01"}


def test_unreadable_list_of_the_current_folder(root, monkeypatch):
    write(root / "UCF-101/unreadable.csv", "path,reason", f"{entry('Archery', 3, 1)},broken")
    monkeypatch.chdir(root / "UCF-101")
    assert set(load("ucf101", ".", annotations=root).unreadable) == {"v_Archery_g03_c01"}


@pytest.mark.parametrize("text, n", [("file,why\na.avi,broken\n", 1), ("path,reason\na.avi,broken\nb.avi\n", 3), ("", 1)])
def test_an_unreadable_list_of_another_form_is_an_error(root, text, n):
    (root / "unreadable.csv").write_text(text)
    with pytest.raises(ValueError, match=f"unreadable.csv, line {n}:.*path,reason"): load("ucf101", root)


def test_edition_and_table(root):
    train = load("ucf101", root)
    assert train.edition == "" and "not the official list" in repr(train)
    full = Dataset("ucf101", 2, "test", [], ["c"] * 101, 3734, 3000, ["x"] * 734, {"y": "broken"})
    assert full.edition == "official" and "not the official" not in repr(full) and Dataset("ucf101", 1, "test", [], ["c"] * 101, 3734, 0, []).edition == ""
    assert Dataset("ucf101", 2, "test", [], ["c"] * 99, 3734, 0, []).edition == "" and Dataset("mine", 1, "train", [], [], 1, 1, []).edition == ""
    rows = counts([train, full])
    assert rows[1] == {"name": "ucf101", "split": 2, "subset": "test", "classes": 101, "official": 3734, "expected": 3734, "found": 3000, "missing": 734, "unreadable": 1, "edition": "official"}
    assert rows[0]["official"] == 9537 and rows[0]["edition"] == ""
    lines = table([train, full]).splitlines()
    assert lines[1].split() == ["ucf101", "1", "train", "3", "9537", "36", "36", "0", "0", "differs"] and lines[2].split() == ["ucf101", "2", "test", "101", "3734", "3734", "3000", "734", "1", "official"]
    assert table([]).split()[:2] == ["data", "set"]


def test_text_that_is_not_utf8_is_named(root):
    file = root / "ucfTrainTestlist/trainlist01.txt"
    file.write_bytes(file.read_bytes() + b"Archery/v_\xff_g09_c01.avi 1\r\n")
    with pytest.raises(ValueError, match="trainlist01.txt, line 37: .*not UTF-8"): load("ucf101", root)


# ---- HMDB51

FILMS = ("Zoo_1", "zoo_2", "A+B;_C!", "[Home]_#7_(1999)_&_more", "The_wave_machine", "21")


def hmdb51_name(film, name, i=0): return f"{film}_{name}_f_cm_np1_fr_med_{i}"


def write(file, *lines, end="\n"):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes("".join(line + end for line in lines).encode())


@pytest.fixture
def hmdb51(tmp_path):
    "3 classes, 6 films; of each class 4 videos to train, 1 to test, 1 unused; the split 2 turns them around."
    root = tmp_path / "hmdb51"
    for name in ("kick", "kick_ball", "wave"):
        for split in (1, 2):
            write(root / f"testTrainMulti_7030_splits/{name}_test_split{split}.txt", *(f"{hmdb51_name(film, name)}.avi {n} " for film, n in zip(FILMS, (1, 1, 1, 1, 2, 0)[::1 if split == 1 else -1])), end="\r\n")
        for film in FILMS: write(root / "hmdb51_org" / name / f"{hmdb51_name(film, name)}.avi")
    return root


def test_hmdb51(hmdb51):
    train, test, unused = (load("hmdb51", hmdb51, subset=s) for s in ("train", "test", "unused"))
    assert train.classes == ["kick", "kick_ball", "wave"] and [(d.expected, d.found, d.missing) for d in (train, test, unused)] == [(12, 12, []), (3, 3, []), (3, 3, [])]
    assert [r.source for r in train.records if r.label == 2] == ["zoo", "zoo", "a+b;_c!", "[home]_#7_(1999)_&_more"]
    assert [(r.source, r.label, r.subset) for r in test.records] == [("the_wave_machine", label, "test") for label in range(3)] and {r.source for r in unused.records} == {"21"}
    assert all(r.path.is_file() and r.path.stem == r.id and r.path.parent.name == train.classes[r.label] for r in train.records) and len({r.id for r in train.records}) == 12
    assert {r.source for r in load("hmdb51", hmdb51, split=2, subset="test").records} == {"zoo"} and not train.directional


def test_hmdb51_places(hmdb51, tmp_path):
    assert load("hmdb51", hmdb51 / "hmdb51_org").found == 12                  # lists beside the videos' folder
    lists = (hmdb51 / "testTrainMulti_7030_splits").rename(tmp_path / "lists")
    with pytest.raises(FileNotFoundError) as error: load("hmdb51", hmdb51)
    for place in ("testTrainMulti_7030_splits", "annotations", "hmdb51_org"): assert str(hmdb51 / place) in str(error.value)
    assert "annotations=" in str(error.value) and "test_train_splits.rar" in str(error.value) and "MBD_ANNOTATIONS_HMDB51" in str(error.value)
    assert load("hmdb51", hmdb51, annotations=lists).found == load("hmdb51", hmdb51 / "hmdb51_org", annotations=lists).found == 12
    for p in list((hmdb51 / "hmdb51_org").iterdir()): p.rename(hmdb51 / p.name)
    assert load("hmdb51", hmdb51, annotations=lists).found == 12              # class folders in the folder itself
    (lists / "wave_test_split2.txt").unlink()
    with pytest.raises(FileNotFoundError, match="wave_test_split2.txt"): load("hmdb51", hmdb51, split=2, annotations=lists)
    with pytest.raises(FileNotFoundError, match="test_split3.txt"): load("hmdb51", hmdb51, split=3, annotations=lists)


@pytest.mark.parametrize("line", ["../secret.avi 1", "/etc/passwd 1", f"../{hmdb51_name('x', 'wave')}.avi 1", f"a\\{hmdb51_name('x', 'wave')}.avi 1", f"{hmdb51_name('x', 'wave')}.avi 3", f"{hmdb51_name('x', 'wave')}.avi",
                                  f"{hmdb51_name('x', 'kick')}.avi 1", f"{hmdb51_name('Zoo_1', 'wave')}.avi 0", "film.avi 1", "nonsense"])
def test_hmdb51_bad_lines(hmdb51, line):
    file = hmdb51 / "testTrainMulti_7030_splits/wave_test_split1.txt"
    file.write_bytes(file.read_bytes() + line.encode())
    for subset in ("train", "test"):
        with pytest.raises(ValueError) as error: load("hmdb51", hmdb51, subset=subset)
        assert f"{file}, line 7: {line!r}" in str(error.value)


@pytest.mark.parametrize("stem, film", [("TrumanShow_wave_f_nm_np1_fr_med_26", "TrumanShow"), ("Veoh_Alpha_Dog_1_wave_u_cm_np12_ba_bad_113", "Veoh_Alpha_Dog_1"), ("a_wave_wave_wave_h_nm_np0_ri_goo_0", "a_wave_wave"),
                                        ("wave_f_nm_np1_fr_med_1_wave_f_nm_np1_le_med_2", "wave_f_nm_np1_fr_med_1")])
def test_title_of_a_film(stem, film):
    assert datasets._hmdb51_entry(f"{stem}.avi 2", "wave") == (stem, 2, film)


# ---- Kinetics-400

HEADER = "label,youtube_id,time_start,time_end,split"
K400 = {"train": ['"arm wrestling",--7qK_w-g3Y,1,11,train', "petting animal (not cat),bbbbbbbbbbb,20,30,train", "massaging person's head,ccccccccccc,300,310,train", "arm wrestling,ddddddddddd,0,10,train"],
        "validate": ["juggling,eeeeeeeeeee,5,15,validate"]}
K400_CLASSES = ["arm wrestling", "juggling", "massaging person's head", "petting animal (not cat)"]


@pytest.fixture
def k400(tmp_path):
    root = tmp_path / "k400"
    for name, rows in K400.items(): write(root / f"annotations/{name}.csv", HEADER, *rows)
    for file in ("train/arm wrestling/--7qK_w-g3Y_000001_000011.mp4", "train/petting_animal_(not_cat)/bbbbbbbbbbb.mkv", "train/Massaging_Persons_Head/ccccccccccc_000300_000310.webm", "train/arm_wrestling/ddddddddddd_000000_000010.avi",
                 "val/eeeeeeeeeee_000005_000015.mp4"): write(root / file)
    return root


def test_kinetics400(k400):
    train, validation = load("kinetics400", k400), load("kinetics400", k400, subset="validation")
    assert train.classes == validation.classes == K400_CLASSES and (train.expected, train.found, train.missing, validation.found) == (4, 4, [], 1)
    assert [(r.id, r.label, r.source, r.start, r.end, r.path.suffix) for r in train.records] == [
        ("--7qK_w-g3Y_000001_000011", 0, "--7qK_w-g3Y", 1, 11, ".mp4"), ("bbbbbbbbbbb_000020_000030", 3, "bbbbbbbbbbb", 20, 30, ".mkv"), ("ccccccccccc_000300_000310", 2, "ccccccccccc", 300, 310, ".webm"), ("ddddddddddd_000000_000010", 0, "ddddddddddd", 0, 10, ".avi")]
    assert all(r.path.is_file() for r in train.records) and validation.records[0].subset == "validation"
    with pytest.raises(FileNotFoundError, match="test.csv.*looked in"): load("kinetics400", k400, subset="test")
    with pytest.raises(ValueError, match="'validation' list"): cut_parts(validation)


@pytest.mark.parametrize("place", ["train/{c}/{n}", "{c}/{n}", "{n}", "train/{n}", "videos_train/{c}/{n}", "videos/train/{c}/{n}", "k400/train/{n}", "replacement/{n}", "replacement/replacement_for_corrupted_k400/{n}"])
def test_kinetics400_places(tmp_path, place):
    write(tmp_path / "train.csv", HEADER, *K400["train"])
    for line in K400["train"]:
        label, video, a, b, _ = next(csv.reader([line]))
        write(tmp_path / place.format(c=label.replace(" ", "_"), n=f"{video}_{int(a):06}_{int(b):06}.mp4"))
    assert load("kinetics400", tmp_path).found == 4


def test_kinetics400_replacements_come_first(k400):
    write(k400 / "replacement/replacement_for_corrupted_k400/--7qK_w-g3Y_000001_000011.mp4")
    assert "replacement" in load("kinetics400", k400).records[0].path.parts


@pytest.mark.parametrize("name", ["ccccccccccc_000301_000311.mp4", "ccccccccccc_000300_000310.txt", "CCCCCCCCCCC_000300_000310.mp4", "ccccccccccc_000300_000310.mp4.part", "xccccccccccc.mp4"])
def test_kinetics400_names_that_do_not_fit(k400, name):
    old = k400 / "train/Massaging_Persons_Head/ccccccccccc_000300_000310.webm"
    old.rename(old.with_name(name))
    assert load("kinetics400", k400).missing == ["ccccccccccc_000300_000310"]


def test_kinetics400_wrong_class_folder_and_plain_name_of_two_rows(k400):
    old = k400 / "train/Massaging_Persons_Head/ccccccccccc_000300_000310.webm"
    old.rename(k400 / "train/arm_wrestling" / old.name)
    assert load("kinetics400", k400).missing == ["ccccccccccc_000300_000310"]
    write(k400 / "annotations/train.csv", HEADER, *K400["train"], "juggling,bbbbbbbbbbb,50,60,train")
    write(k400 / "train/bbbbbbbbbbb.mp4")
    assert load("kinetics400", k400).missing == ["bbbbbbbbbbb_000020_000030", "ccccccccccc_000300_000310", "bbbbbbbbbbb_000050_000060"]


def test_kinetics400_names_of_lists_and_columns(k400):
    lists = k400 / "annotations"
    (lists / "validate.csv").rename(lists / "val.csv")
    write(lists / "train.csv", "split,is_cc,label,youtube_id,time_start,time_end", "train,0,arm wrestling,--7qK_w-g3Y,1.0,11.0", end="\r\n")
    assert load("kinetics400", k400).records[0].start == 1 and load("kinetics400", k400, subset="validation").found == 1
    (lists / "train.csv").rename(lists / "kinetics-400_train.csv")
    assert load("kinetics400", k400).found == 1
    write(lists / "test.csv", "youtube_id,time_start,time_end,split", "eeeeeeeeeee,5,15,test")
    with pytest.raises(ValueError, match="no column 'label'"): load("kinetics400", k400, subset="test")


@pytest.mark.parametrize("line", ["arm wrestling,../../secret,1,11,train", "arm wrestling,/etc/passwd,1,11,train", "arm wrestling,--7qK_w-g3Y,11,1,train", "arm wrestling,fffffffffff,1,x,train", "arm wrestling,fffffffffff,-1,9,train",
                                  "arm wrestling,fffffffffff,1,11,test", "arm wrestling,fffffffffff,1,11", "arm wrestling,fffffffffff,1,11,train,0", "arm wrestling,--7qK_w-g3Y,1,11,train", 'juggling,"fffffffffff,1,11,train'])
def test_kinetics400_bad_lines(k400, line):
    file = k400 / "annotations/train.csv"
    write(file, HEADER, K400["train"][0], "", line, "juggling,ggggggggggg,1,11,train")
    with pytest.raises(ValueError) as error: load("kinetics400", k400)
    assert f"{file}, line 4: {line!r}" in str(error.value)


def test_kinetics400_without_header(k400):
    write(k400 / "annotations/train.csv", *K400["train"])
    with pytest.raises(ValueError, match="train.csv, line 1: .*is not the header"): load("kinetics400", k400)
    write(k400 / "annotations/train.csv")
    with pytest.raises(ValueError, match="train.csv, line 1: .*is not the header"): load("kinetics400", k400)


def test_kinetics400_label_map_and_processed_list(k400):
    lists = k400 / "annotations"
    write(lists / "label_map_k400.txt", *K400_CLASSES[::-1])
    assert load("kinetics400", k400).classes == K400_CLASSES[::-1] and load("kinetics400", k400).records[0].label == 3
    write(lists / "valid_processed.txt", "eeeeeeeeeee_000005_000015 0 299 2", "fffffffffff_000005_000015 0 299 2")
    assert load("kinetics400", k400, subset="validation").expected == 1      # the official list goes first
    (lists / "validate.csv").unlink()
    d = load("kinetics400", k400, subset="validation")
    assert (d.expected, d.missing, d.records[0].label, d.records[0].start, d.records[0].source) == (2, ["fffffffffff_000005_000015"], 2, 5, "eeeeeeeeeee")
    for line in ("fffffffffff_000005_000015 0 299 4", "../../x_000005_000015 0 299 1", "fffffffffff 0 299 1", "eeeeeeeeeee_000005_000015 0 299 1", "fffffffffff_000005_000015 0 299"):
        write(lists / "valid_processed.txt", "eeeeeeeeeee_000005_000015 0 299 2", line)
        with pytest.raises(ValueError) as error: load("kinetics400", k400, subset="validation")
        assert f"valid_processed.txt, line 2: {line!r}" in str(error.value)
    write(lists / "label_map_k400.txt", "juggling")
    with pytest.raises(ValueError, match="train.csv, line 2.*label map does not name"): load("kinetics400", k400)
    write(lists / "label_map_k400.txt", "juggling", "juggling")
    with pytest.raises(ValueError, match="label_map_k400.txt, line 2"): load("kinetics400", k400)
    (lists / "label_map_k400.txt").unlink()
    with pytest.raises(FileNotFoundError, match="label_map_k400.txt"): load("kinetics400", k400, subset="validation")


# ---- Something-Something V2

TEMPLATES = ["Pushing [something] from left to right", "Putting [something similar to other things that are already on the table]", "Turning [something] upside down"]
NAMES = [t.replace("[", "").replace("]", "") for t in TEMPLATES]


def ssv2_entry(id, template): return json.dumps({"id": str(id), "label": "pushing \u00e9clair", "template": template, "placeholders": ["\u00e9clair"]}, ensure_ascii=False)


@pytest.fixture
def ssv2(tmp_path):
    root = tmp_path / "ssv2"
    write(root / "labels/labels.json", json.dumps({name: str(i) for i, name in reversed(list(enumerate(NAMES)))}))
    write(root / "labels/train.json", "[" + ",\n".join(ssv2_entry(i, TEMPLATES[i % 3]) for i in range(1, 13)) + "]")
    write(root / "labels/validation.json", json.dumps([json.loads(ssv2_entry(i, TEMPLATES[i % 3])) for i in (100, 101)], indent=2))
    for i in (*range(1, 12), 100, 101): write(root / f"20bn-something-something-v2/{i}.{'mp4' if i == 5 else 'webm'}")
    return root


def test_ssv2(ssv2):
    train, validation = load("ssv2", ssv2), load("ssv2", ssv2, subset="validation")
    assert train.classes == NAMES and train.directional == validation.directional == {0}
    assert (train.expected, train.found, train.missing, validation.found) == (12, 11, ["12"], 2)
    assert [(r.id, r.label, r.source, r.path.name) for r in train.records[3:5]] == [("4", 1, "4", "4.webm"), ("5", 2, "5", "5.mp4")] and train.records[0].start is None
    parts = cut_parts(train)
    check(parts, train.records, ["map", "gate"])


def test_ssv2_places_and_names(ssv2, tmp_path):
    for old, new in (("train", "something-something-v2-train"), ("labels", "something-something-v2-labels")): (ssv2 / f"labels/{old}.json").rename(ssv2 / f"labels/{new}.json")
    assert load("ssv2", ssv2).found == load("ssv2", ssv2 / "20bn-something-something-v2").found == 11
    lists = (ssv2 / "labels").rename(tmp_path / "apart")
    with pytest.raises(FileNotFoundError, match="train.json.*looked in .*labels.*annotations="): load("ssv2", ssv2)
    for i in lists.iterdir(): i.rename(ssv2 / i.name)
    (ssv2 / "20bn-something-something-v2").rename(ssv2 / "videos")
    assert load("ssv2", ssv2).found == load("ssv2", ssv2 / "videos", annotations=ssv2).found == 11
    (ssv2 / "something-something-v2-labels.json").unlink()
    with pytest.raises(FileNotFoundError, match="labels.json"): load("ssv2", ssv2)


def test_ssv2_processed_lists(ssv2):
    lists = ssv2 / "labels"
    for f in list(lists.iterdir()): f.unlink()
    write(lists / "label_map.txt", *NAMES)
    write(lists / "something-something-v2-train-processed.txt", *(f"{i} 0 40 {i % 3}" for i in range(1, 13)))
    train = load("ssv2", ssv2)
    assert (train.classes, train.expected, train.found, train.directional) == (NAMES, 12, 11, {0}) and [r.label for r in train.records[:3]] == [1, 2, 0]
    for line in ("12 0 40 3", "12 0 40", "../x 0 40 1", "1 0 40 1"):
        write(lists / "something-something-v2-train-processed.txt", "1 0 40 1", line)
        with pytest.raises(ValueError) as error: load("ssv2", ssv2)
        assert f"train-processed.txt, line 2: {line!r}" in str(error.value)


@pytest.mark.parametrize("line, n", [(ssv2_entry("../12", NAMES[0]), 3), (ssv2_entry(12, "Juggling [something]"), 3), (ssv2_entry(1, NAMES[0]), 3), ('{"id": "12"}', 3), ('"12"', 3), ("[]", 3), ('{"id": "12", "template": ["a"]}', 3), ('{"id: "12"}', 3), ("", 3)])
def test_ssv2_bad_entries_name_the_line(ssv2, line, n):
    file = ssv2 / "labels/train.json"
    write(file, "[" + ssv2_entry(1, TEMPLATES[0]) + ",", ssv2_entry(2, TEMPLATES[0]) + ",", line + "]")
    with pytest.raises(ValueError) as error: load("ssv2", ssv2)
    assert f"{file}, line {n}: " in str(error.value)


@pytest.mark.parametrize("text", ["", "{}", "[", "[]", "[" + ssv2_entry(1, TEMPLATES[0]), "[" + ssv2_entry(1, TEMPLATES[0]) + "] x", "[" + ssv2_entry(1, TEMPLATES[0]) + ",]", ssv2_entry(1, TEMPLATES[0]), "[1 2]"])
def test_ssv2_lists_that_are_cut_off(ssv2, text):
    (ssv2 / "labels/train.json").write_text(text)
    with pytest.raises(ValueError, match="train.json, line 1: "): load("ssv2", ssv2)


@pytest.mark.parametrize("text", ["", "[]", "{}", '["a", "b"]', '{"a": "0", "b": "2"}', '{"a": "0", "b": "0"}', '{"a": "x"}', "1", '{"a": "0"'])
def test_ssv2_bad_labels(ssv2, text):
    (ssv2 / "labels/labels.json").write_text(text)
    with pytest.raises(ValueError, match="labels.json"): load("ssv2", ssv2)


@pytest.mark.parametrize("name, marked", [("Pulling something from right to left", True), ("Turning the camera left while filming something", True), ("Moving something to the left of something", True), ("LeftThenRight", True),
                                          ("turn_right", True), ("Spinning counterclockwise", True), ("Plugging something into something but pulling it right out as you remove your hand", False), ("Turning something upside down", False),
                                          ("Putting something upright on the table", False), ("bright lights", False), ("Cleft", False), ("Basketball", False)])
def test_names_that_tell_a_direction(name, marked):
    assert names_direction(name) is marked


# ---- records

def test_a_path_may_be_given_as_text_and_is_a_path(k400):
    import copy, pickle
    from dataclasses import FrozenInstanceError, replace
    text, path = Record("a", "x/y.avi", 0, "s"), Record("a", Path("x/y.avi"), 0, "s")
    assert text == path and hash(text) == hash(path) and repr(text) == repr(path) and isinstance(text.path, Path)
    assert pickle.loads(pickle.dumps(Record("a", "x/y.avi", 0, "s"))) == copy.deepcopy(text) == path and replace(text, path="z").path == Path("z")
    with pytest.raises(FrozenInstanceError): text.path = Path("other")
    with pytest.raises(TypeError, match="path"): Record("a", label=0, source="s")
    assert all(isinstance(r.path, Path) and r.path.is_file() for r in load("kinetics400", k400).records)


@pytest.mark.parametrize("root", [".", "./", "../here", "x/.."])
def test_unreadable_files_are_known_however_the_root_is_written(k400, monkeypatch, root):
    here = k400.parent / "here"; k400.rename(here); (here / "x").mkdir()
    monkeypatch.chdir(here)
    first = load("kinetics400", root).records[0]
    (here / "unreadable.csv").write_text(f"path,reason\n{first.path.resolve().relative_to(here.resolve()).as_posix()},broken\n")
    again = load("kinetics400", root)
    assert again.unreadable == {first.id: "broken"} and first.id not in {r.id for r in again.records}


# ---- many videos

@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="resource is not there")
def test_a_quarter_of_a_million_videos(tmp_path):
    n, root = 250_000, tmp_path / "k400"
    classes = [f"class {i:03}" for i in range(400)]
    clips = [(i % 400, f"{i:011x}", i % 300) for i in range(n)]
    write(root / "annotations/train.csv", HEADER, *(f"{classes[c]},{video},{a},{a + 10},train" for c, video, a in clips))
    for c in classes: (root / "train" / c).mkdir(parents=True)
    for c, video, a in clips: os.close(os.open(f"{root}/train/{classes[c]}/{video}_{a:06}_{a + 10:06}.mp4", os.O_CREAT | os.O_WRONLY))
    code = f"""import re, time
from mbd import datasets
start = time.process_time()
d = datasets.load("kinetics400", {str(root)!r})
status = open("/proc/self/status").read() if {sys.platform == "linux"} else "VmHWM: 0 kB"      # ru_maxrss would include the parent's size
print(d.found, time.process_time() - start, re.search(r"VmHWM:\\s*(\\d+)", status)[1])"""
    found, seconds, memory = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert int(found) == n and float(seconds) < 15 and int(memory) / 2**10 < 500


def test_no_single_file_is_asked_for(k400, monkeypatch):
    asked = []
    for name in ("stat", "lstat"): monkeypatch.setattr(os, name, lambda *a, old=getattr(os, name), **k: asked.append(str(a[0])) or old(*a, **k))
    assert load("kinetics400", k400).found == 4
    assert not [path for path in asked if path.endswith((".mp4", ".mkv", ".webm", ".avi"))]


# ---- the real lists

@needs_real
@pytest.mark.parametrize("split, train, test", [(1, 9537, 3783), (2, 9586, 3734), (3, 9624, 3696)])
def test_official_lists(split, train, test):
    sets = [load("ucf101", REAL / "clips/ucf101", split, subset, REAL / "annotations/ucf101") for subset in ("train", "test")]
    assert [d.expected for d in sets] == [train, test] and all(len(d.classes) == 101 and d.found + len(d.missing) == d.expected and d.edition == "official" for d in sets)
    assert not {i.rsplit("_c", 1)[0] for i in sets[0].missing} & {i.rsplit("_c", 1)[0] for i in sets[1].missing}
    if split == 1: assert [sorted(r.source for r in d.records) for d in sets] == [["SoccerJuggling_g23", "SoccerJuggling_g24"], ["ApplyEyeMakeup_g01", "Basketball_g01"]]


@needs_real
@pytest.mark.parametrize("split", [1, 2, 3])
def test_official_lists_of_hmdb51(split):
    sets = {subset: load("hmdb51", REAL / "clips/hmdb51", split, subset, REAL / "annotations/hmdb51") for subset in ("train", "test", "unused")}
    assert {s: d.expected for s, d in sets.items()} == {"train": 3570, "test": 1530, "unused": 1666} and all(len(d.classes) == 51 and d.edition == "official" and not d.directional for d in sets.values())
    ids = [{r.id for r in d.records} | set(d.missing) for d in sets.values()]
    assert len(set().union(*ids)) == 6766 == sum(map(len, ids)) and sum(d.found for d in sets.values()) == 4
    if split == 1: assert {s: sorted(r.source for r in d.records) for s, d in sets.items()} == {"train": ["ratrace", "turnk_r_pippi_michel"], "test": ["trumanshow"], "unused": ["schoolruleshowtheyhelpus"]}


@needs_real
@pytest.mark.parametrize("split", [1, 2, 3])
def test_cut_of_hmdb51_by_film(split):
    rows = datasets._hmdb51(REAL / "clips/hmdb51", split, "train", REAL / "annotations/hmdb51")[1]
    assert Counter(row[1] for row in rows) == {label: 70 for label in range(51)}
    records = [Record(id, Path(id), label, source) for id, label, source, _ in rows]
    for seed in range(3):
        parts = cut_parts(records, seed=seed)
        check(parts, records, ["map", "gate"])
        assert all(0.1 < len(parts[p]) / len(records) < 0.2 for p in ("map", "gate"))


@needs_real
def test_official_lists_of_kinetics400(tmp_path):
    lists = REAL / "annotations/kinetics400"
    validation, test = (load("kinetics400", REAL / "clips/kinetics400", 1, subset, lists) for subset in ("validation", "test"))
    assert (validation.expected, test.expected) == (18009, 35308) and validation.edition and test.edition
    assert [r.id for r in validation.records] == ["R6llTwEh07w_000000_000010", "SOX5yA1l24A_000299_000309"] and {validation.classes[r.label] for r in validation.records} == {"using segway"}
    for name in ("validate.csv", "test.csv", "valid_processed.txt"): os.symlink(lists / name, tmp_path / name)
    sorted_labels = load("kinetics400", tmp_path, 1, "validation")
    assert len(validation.classes) == 400 and validation.classes == test.classes == sorted_labels.classes and not validation.directional     # label map = alphabetical order
    os.remove(tmp_path / "validate.csv"); os.symlink(lists / "label_map_k400.txt", tmp_path / "label_map_k400.txt")
    processed = load("kinetics400", REAL / "clips/kinetics400", 1, "validation", tmp_path)
    assert processed.expected == 19877 and processed.edition == "processed" and processed.found == 3


@needs_real
def test_official_lists_of_ssv2():
    train, validation = (load("ssv2", REAL / "clips/ssv2", 1, subset, REAL / "annotations/ssv2") for subset in ("train", "validation"))
    assert (train.expected, validation.expected, len(train.classes)) == (168913, 24777, 174) and train.edition == validation.edition == "official"
    ids = [{r.id for r in d.records} | set(d.missing) for d in (train, validation)]
    assert not ids[0] & ids[1] and [r.id for r in validation.records] == ["121896"] and validation.classes[validation.records[0].label].startswith("Stuffing something into something")
    assert [train.classes[label] for label in sorted(train.directional)] == ["Pulling something from left to right", "Pulling something from right to left", "Pushing something from left to right",
        "Pushing something from right to left", "Turning the camera left while filming something", "Turning the camera right while filming something"]


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


def test_a_list_that_was_seen_may_be_named_in_any_form():
    "A forgotten comma, `(\"kinetics400/train\")`, must not open a closed door, nor the name of the set alone."
    for seen in ("kinetics400/train", ("kinetics400/train",), "kinetics400", ["ucf101", "kinetics400"]): assert datasets.has_seen(seen, "kinetics400/train")
    assert datasets.has_seen(["ucf101"], "ucf101/test2") and not datasets.has_seen("kinetics400/train", "kinetics400/validation") and not datasets.has_seen("ucf101", "")


@pytest.mark.parametrize("call, error, message", [
    (lambda d: cut_parts(d, .15), TypeError, "fractions must be a dict of parts, such as .*not 0.15"), (lambda d: cut_parts(d, {"map": "0.15"}), ValueError, "map = '0.15' must lie between 0 and 1"),
    (lambda d: cut_parts(d, seed=None), TypeError, "seed must be a whole number, not None"), (lambda d: cut_parts(d, seed=-1), ValueError, "seed must be at least 0, not -1"),
    (lambda d: load("ucf101", None), ValueError, "root is None: .*set ucf101 in the .data. section of settings.ini, or MBD_DATA_UCF101")])
def test_odd_arguments_are_named(root, call, error, message):
    with pytest.raises(error, match=message): call(load("ucf101", root))


def test_a_split_is_a_whole_number_in_names(root):
    for split in (1.0, True): assert load("ucf101", root, split).records[0].origin == "ucf101/train1"
