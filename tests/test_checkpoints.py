"Checkpoints come back bit for bit, survive kills, full disks and damage, and a crafted file does no harm."
import errno, json, logging, math, os, re, shutil, struct, subprocess, sys
from types import SimpleNamespace
import pytest
import torch
from safetensors.torch import save_file
from mbd import checkpoints
from mbd.checkpoints import CheckpointError, Checkpoints, digest

ABOUT = {"seed": 0, "rate": .1}
def names(folder): return sorted(f.name for f in folder.iterdir())
def steps(folder, stage="s", best=False): return sorted(int(f.name.split("step-")[1].split(".")[0]) for f in folder.iterdir() if f.name.startswith(stage + ".") and (".best." in f.name) == best)
def tensors(step): return {"w": torch.full((50,), float(step)), "n": torch.tensor(step)}
def save(kept, step, stage="s", about=ABOUT, **more): return kept.save(stage, step, tensors(step), {"at": step}, about, **more)
def sound(found):
    assert found.tensors["n"].item() == found.step == found.state["at"] and torch.equal(found.tensors["w"], tensors(found.step)["w"])
    return found.step
def spoil(file, at=-1):
    data = bytearray(file.read_bytes()); data[at] ^= 1
    file.unlink(); file.write_bytes(data)      # unlinked first: the best one may share its bytes


KINDS = {
    "bfloat16": torch.tensor([1., -0., math.inf, math.nan, 1e-40], dtype=torch.bfloat16), "float16": torch.tensor([1., math.nan], dtype=torch.float16), "float64": torch.tensor([math.pi, -0., math.nan, 5e-324], dtype=torch.float64),
    "float32": torch.tensor([[1e-45, math.nan]]), "int64": torch.tensor([2**63 - 1, -2**63]), "uint8": torch.arange(256, dtype=torch.uint8), "bool": torch.tensor([True, False]), "zero-d": torch.tensor(7), "zero-d bool": torch.tensor(True),
    "empty": torch.zeros(0, 3), "turned": torch.arange(6.).view(2, 3).t(), "part": torch.arange(10)[3:5], "parameter": torch.nn.Parameter(torch.ones(2)), "a name / with ü": torch.ones(1)}

def test_every_kind_of_tensor_comes_back_bit_for_bit(tmp_path):
    shared = torch.arange(4.)
    given = KINDS | {"one": shared, "same": shared, "half": shared[:2]}
    kept = Checkpoints(tmp_path)
    state = {"rows": [{"loss": .1 + .2, "name": "ü\udc80"}], "none": None, "n": 2**70, "e": 1e-300}
    file = kept.save("s", 3, given, state, ABOUT, score=.5)
    found = Checkpoints(tmp_path).load("s", ABOUT)
    assert (found.stage, found.step, found.done, found.score, found.state, found.file) == ("s", 3, False, .5, state, file) and found.tensors.keys() == given.keys()
    for name, tensor in given.items():
        same = found.tensors[name]
        assert same.dtype == tensor.dtype and same.shape == tensor.shape and same.device.type == "cpu" and not same.requires_grad, name
        assert digest({"x": same}) == digest({"x": tensor}), name
    file.unlink(); (tmp_path/file.name.replace("s.", "s.best.", 1)).unlink()      # nothing is still mapped from the file
    assert found.tensors["one"].add_(1).sum() == 10


def test_a_checkpoint_without_tensors_or_state(tmp_path):
    Checkpoints(tmp_path).save("s", 0, {}, {}, {})
    found = Checkpoints(tmp_path).load("s", {})
    assert found.tensors == {} and found.step == 0 and found.score is None


def test_digest_sees_names_kinds_shapes_and_bits_but_not_the_order():
    a, b = torch.arange(6.), torch.ones(2, dtype=torch.bfloat16)
    assert digest({"a": a, "b": b}) == digest({"b": b.clone(), "a": a.view(2, 3).reshape(6)}) and re.fullmatch("[0-9a-f]{16}", digest({}))
    others = [{"a": a}, {"b": a}, {"a": a.view(2, 3)}, {"a": a.int()}, {"a": torch.tensor([0., 1, 2, 3, 4, 5.0000005])}, {"a": -a}, {"a": torch.tensor(0.)}, {"a": torch.tensor(-0.)}, {"a": a[:0]}, {"a": a[:0], "b": a[:0]}, {}]
    assert len({digest(t) for t in others}) == len(others)
    layer = torch.nn.Linear(3, 2)
    assert digest(layer) == digest(layer.state_dict())
    with pytest.raises(TypeError, match="'a' is a list"): digest({"a": [1]})


def test_the_last_ones_and_the_best_stay_and_at_the_end_one_and_the_best(tmp_path):
    kept = Checkpoints(tmp_path, keep=3)
    for step, score in enumerate([.1, .7, None, .7, math.nan, .3], 1): save(kept, step, score=score)
    save(kept, 1, "other")
    assert steps(tmp_path) == [4, 5, 6] and steps(tmp_path, best=True) == [2] and sound(kept.best("s")) == 2 and kept.best("other") is None
    again = Checkpoints(tmp_path, keep=3)          # another process knows the best as well
    save(again, 7, score=.6); assert steps(tmp_path, best=True) == [2]
    save(again, 8, score=.8); assert steps(tmp_path, best=True) == [8]
    save(again, 9, done=True, score=.2)
    found = Checkpoints(tmp_path).load("s", ABOUT)
    assert steps(tmp_path) == [9] and steps(tmp_path, best=True) == [8] and steps(tmp_path, "other") == [1] and found.done and found.score == .2 and sound(again.best("s")) == 8


def test_the_newest_is_what_was_saved_last_even_with_the_same_or_a_smaller_step(tmp_path):
    kept = Checkpoints(tmp_path, keep=5)
    for step in (9, 10, 10, 3): save(kept, step)
    assert sound(kept.load("s", ABOUT)) == 3
    kept.save("s", 3, tensors(3), {"at": 3, "second": True}, ABOUT)
    assert kept.load("s", ABOUT).state["second"]


def test_the_best_is_a_copy_where_there_are_no_links(tmp_path, monkeypatch):
    def none(*given): raise OSError(errno.EPERM, "no links here")
    monkeypatch.setattr(os, "link", none)
    kept = Checkpoints(tmp_path, keep=1)
    for step, score in ((1, .9), (2, .1)): save(kept, step, score=score)
    assert sound(kept.best("s")) == 1 and sound(kept.load("s", ABOUT)) == 2 and not any(tmp_path.glob(".part*"))


def test_due_after_so_many_seconds(tmp_path, monkeypatch):
    now = [0.]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    kept = Checkpoints(tmp_path, every=60)
    assert not kept.due() and Checkpoints(tmp_path, every=0).due()
    now[0] = 60.; assert kept.due()
    save(kept, 1); assert not kept.due()
    now[0] = 119.; assert not kept.due()


def test_a_stage_that_was_never_begun(tmp_path):
    kept = Checkpoints(tmp_path/"new"/"folder")
    save(kept, 1, "warm-up")
    assert kept.load("warm", ABOUT) is None and kept.load("up", ABOUT) is None and kept.best("warm-up") is None


def test_another_fingerprint_is_refused_with_both_values_and_a_remedy(tmp_path):
    kept = Checkpoints(tmp_path)
    save(kept, 1, "distil", about=dict(rate=.1, seed=0, views=(8, 8), mixup=None, bad=math.nan))
    assert kept.load("distil", dict(views=[8, 8], seed=0, rate=.1, mixup=None, bad=math.nan)).step == 1
    with pytest.raises(CheckpointError) as error: kept.load("distil", dict(rate=.2, seed=0, views=(8, 9), new="x", bad=math.nan))
    for part in (str(tmp_path), "'distil'", "rate was 0.1 and is 0.2", "views was [8, 8] and is [8, 9]", "mixup was null and is absent", 'new was absent and is "x"', "another folder, or delete"): assert part in str(error.value)
    assert "seed" not in str(error.value) and "bad" not in str(error.value) and steps(tmp_path, "distil") == [1]


@pytest.mark.parametrize("how", ["bit", "header", "cut", "empty", "zeros"])
def test_a_damaged_newest_is_named_put_aside_and_the_one_before_is_used(how, tmp_path, caplog):
    kept = Checkpoints(tmp_path)
    first, last = save(kept, 1), save(kept, 2)
    size = last.stat().st_size
    if how in ("bit", "header"): spoil(last, -1 if how == "bit" else 3)
    else: last.write_bytes({"cut": last.read_bytes()[:size//2], "empty": b"", "zeros": bytes(size)}[how])
    with caplog.at_level(logging.WARNING, "mbd.checkpoints"): found = Checkpoints(tmp_path).load("s", ABOUT)
    assert sound(found) == 1 and str(last) in caplog.text and first.name in caplog.text
    assert names(tmp_path) == sorted([first.name, last.name + ".damaged"])
    caplog.clear()
    assert sound(kept.load("s", ABOUT)) == 1 and not caplog.text      # said once
    save(kept, 2); save(kept, 3); assert sound(kept.load("s", ABOUT)) == 3 and last.name + ".damaged" in names(tmp_path)


def test_it_falls_back_where_the_damaged_one_cannot_be_moved(tmp_path, monkeypatch, caplog):
    kept = Checkpoints(tmp_path)
    save(kept, 1); spoil(save(kept, 2))
    def refuse(*given): raise PermissionError(errno.EACCES, "no")
    monkeypatch.setattr(os, "replace", refuse)
    assert sound(kept.load("s", ABOUT)) == 1 and "put aside" not in caplog.text and "damaged" in caplog.text


def test_all_damaged_is_an_error_every_time_and_never_a_new_start(tmp_path):
    kept = Checkpoints(tmp_path)
    for step in (1, 2): spoil(save(kept, step, score=step))
    for file in tmp_path.glob("*.best.*"): spoil(file)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="all 3 checkpoints of stage 's' are damaged.*delete them"): Checkpoints(tmp_path).load("s", ABOUT)
    assert len(names(tmp_path)) == 3


def test_the_best_is_a_last_resort_and_a_damaged_best_makes_room_for_another(tmp_path, caplog):
    kept = Checkpoints(tmp_path)
    for step, score in ((1, .9), (2, .1), (3, .2)):
        file = save(kept, step, score=score)
        if step > 1: spoil(file)
    assert sound(kept.load("s", ABOUT)) == 1
    spoil(next(tmp_path.glob("*.best.*")))
    again = Checkpoints(tmp_path)
    assert again.best("s") is None and "damaged" in caplog.text
    save(again, 4, score=.05); assert sound(again.best("s")) == 4


def test_a_file_that_may_not_be_read_is_no_damaged_file(tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path); save(kept, 1); last = save(kept, 2)
    def refuse(file): raise PermissionError(errno.EACCES, "Permission denied", str(file))
    monkeypatch.setattr(checkpoints, "_file_digest", refuse)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"): kept.load("s", ABOUT)
    assert last.name in names(tmp_path)


def test_a_file_that_another_process_has_just_put_aside(tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path); save(kept, 1); last = save(kept, 2); real = checkpoints._read
    def read(file):
        if file == last: last.rename(f"{last}.damaged")
        return real(file)
    monkeypatch.setattr(checkpoints, "_read", read)
    assert sound(kept.load("s", ABOUT)) == 1


@pytest.mark.parametrize("stage", ["../s", "a/b", "a.b", "", "S", "a b", "a\n", "x" * 65, None, "\u0661"])
def test_a_stage_cannot_lead_out_of_the_folder(stage, tmp_path):
    kept = Checkpoints(tmp_path/"in")
    for call in (lambda: kept.load(stage, ABOUT), lambda: kept.best(stage), lambda: kept.save(stage, 1, {}, {}, {})):
        with pytest.raises(ValueError, match="stage"): call()
    assert names(tmp_path) == ["in"] and names(tmp_path/"in") == []


@pytest.mark.parametrize("given, match", [(dict(state={"x": torch.ones(1)}), "state"), (dict(fingerprint={"x": {1, 2}}), "fingerprint"), (dict(tensors={"x": [1.]}), "'x'"), (dict(tensors={"__metadata__": torch.ones(1)}), "metadata"),
    (dict(tensors={"x": torch.ones(2).to_sparse()}), "'x'"), (dict(tensors={"x": torch.ones(2, dtype=torch.complex128)}), "complex128"), (dict(step=-1), "step"), (dict(state={"x": "a" * 2**25}), "characters")])
def test_what_no_checkpoint_can_hold_is_refused_and_costs_nothing(given, match, tmp_path):
    kept = Checkpoints(tmp_path, keep=1); save(kept, 1)
    with pytest.raises(ValueError, match=match): kept.save(**dict(stage="s", step=2, tensors={}, state={}, fingerprint=ABOUT) | given)
    assert steps(tmp_path) == [1] and len(names(tmp_path)) == 1 and sound(kept.load("s", ABOUT)) == 1


# ---- crafted files

def craft(folder, content, step=9, number=7):
    file = folder/"crafted"; file.write_bytes(content)
    return file.rename(folder/f"s.{number:08d}.step-{step}.{checkpoints._file_digest(file)}.safetensors")

def header(text): return struct.pack("<Q", len(text)) + text

def words(**change): return json.dumps(dict(stage="s", step=9, done=False, score=None, state={}, fingerprint=ABOUT) | change)

def with_words(folder, text):
    save_file({"w": torch.ones(2)}, str(folder/"x"), {"mbd": text})
    data = (folder/"x").read_bytes(); (folder/"x").unlink()
    return data

CRAFTED = {
    "pickle": lambda f: b"\x80\x04cposix\nsystem\n(S'touch /tmp/never'\ntR.", "deep header": lambda f: header(b'{"a":' * 300_000), "list": lambda f: header(b"[" * 300_000),
    "huge header": lambda f: struct.pack("<Q", 2**60) + b"{}", "beyond the end": lambda f: header(json.dumps({"a": dict(dtype="F32", shape=[10**12], data_offsets=[0, 4 * 10**12])}).encode()),
    "overlap": lambda f: header(json.dumps({n: dict(dtype="F32", shape=[1], data_offsets=[0, 4]) for n in "ab"}).encode()) + bytes(4), "huge and empty": lambda f: header(json.dumps({"a": dict(dtype="F32", shape=[2**62, 2**62, 0], data_offsets=[0, 0])}).encode()),
    "no words": lambda f: header(b"{}"), "deep words": lambda f: with_words(f, "[" * 300_000), "deep state": lambda f: with_words(f, words().replace('"state": {}', '"state": {"a": ' + '{"a": ' * 100_000 + "1" + "}" * 100_001)),
    "other words": lambda f: with_words(f, "[1, 2]"), "missing words": lambda f: with_words(f, '{"stage": "s", "step": 9}'), "step is words": lambda f: with_words(f, words(step="9")), "state is a list": lambda f: with_words(f, words(state=[])),
    "other stage": lambda f: with_words(f, words(stage="../x")), "other step": lambda f: with_words(f, words(step=8)), "long number": lambda f: with_words(f, words().replace(": 9", ": " + "9" * 10_000)), "done is a word": lambda f: with_words(f, words(done="no"))}

@pytest.mark.parametrize("kind", CRAFTED)
def test_a_crafted_file_executes_nothing_and_is_put_aside(kind, tmp_path, caplog):
    kept = Checkpoints(tmp_path); save(kept, 1)
    file = craft(tmp_path, CRAFTED[kind](tmp_path))
    assert sound(kept.load("s", ABOUT)) == 1 and file.name + ".damaged" in names(tmp_path) and file.name in caplog.text


def test_the_crafting_itself_is_right_and_strangers_are_left_alone(tmp_path):
    file = craft(tmp_path, with_words(tmp_path, words()))
    strangers = ["s.txt", "s.00000009.step-1.safetensors", "notes.safetensors", "s.00000009.step-99.zzzzzzzzzzzzzzzz.safetensors"]
    for name in strangers: (tmp_path/name).write_text("mine")
    (tmp_path/"s.00000099.step-1.0123456789abcdef.safetensors").mkdir()
    kept = Checkpoints(tmp_path, keep=1)
    assert kept.load("s", ABOUT).file == file
    save(kept, 10, done=True); assert set(strangers) < set(names(tmp_path)) and sound(kept.load("s", ABOUT)) == 10 and not file.exists()


# ---- a disk that is full, or not to be written

@pytest.mark.parametrize("keep", [1, 2])
def test_too_little_room_is_noticed_before_a_byte_is_written(keep, tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path, keep=keep); good = save(kept, 1)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    monkeypatch.setattr(checkpoints, "save_file", lambda *given: pytest.fail("it was written"))
    with pytest.raises(CheckpointError) as error: kept.save("s", 2, {"w": torch.zeros(250_000)}, {}, ABOUT)
    for part in (str(tmp_path), "It needs 1 MB, 0.0001 MB are free", good.name, "unharmed", "No space left"): assert part in str(error.value)
    assert isinstance(error.value.__cause__, OSError) and sound(kept.load("s", ABOUT)) == 1


@pytest.mark.parametrize("act", ["save_file", "fsync", "link+copy", "replace", "mkdir"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_fails_in_any_step_loses_nothing(act, code, tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path, keep=1); good = save(kept, 1, score=.1)
    def fail(*given, **more): raise OSError(code, os.strerror(code))
    with monkeypatch.context() as patch:
        if act == "save_file": patch.setattr(checkpoints, "save_file", fail)
        elif act == "link+copy": patch.setattr(os, "link", fail); patch.setattr(checkpoints.shutil, "copyfile", fail)
        else: patch.setattr(os, act, fail)
        with pytest.raises(CheckpointError, match="was not saved.*" + re.escape(os.strerror(code))) as error: save(kept, 2, score=.2)
    assert good.exists() and steps(tmp_path) == [1] and "unharmed" in str(error.value) and not any(tmp_path.glob(".part*"))
    assert sound(kept.load("s", ABOUT)) in (1, 2)      # 2: already there under the name of the best
    assert sound(kept.load("s", ABOUT)) == 1 or act == "replace"
    save(kept, 2, score=.2); assert sound(kept.load("s", ABOUT)) == sound(kept.best("s")) == 2 and steps(tmp_path) == [2]


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of this kind")
def test_a_real_write_that_breaks_off_in_the_middle(tmp_path):
    import resource
    kept, (soft, hard) = Checkpoints(tmp_path, keep=1), resource.getrlimit(resource.RLIMIT_FSIZE)
    good = save(kept, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=f"was not saved.*{good.name}, is unharmed"): kept.save("s", 2, {"w": torch.ones(1_000_000)}, {}, ABOUT)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == [good.name] and sound(kept.load("s", ABOUT)) == 1


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path, monkeypatch):
    (tmp_path/"file").write_text("mine")
    for place in (tmp_path/"file", tmp_path/"file"/"below"):
        with pytest.raises(CheckpointError, match="file is a file|no checkpoint can be written"): Checkpoints(place)
    assert (tmp_path/"file").read_text() == "mine"
    def fail(*given, **more): raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr(checkpoints.tempfile, "TemporaryFile", fail)
    with pytest.raises(CheckpointError, match="Read-only"): Checkpoints(tmp_path/"x")


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="everything may be written")
def test_a_real_folder_without_the_right_to_write(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="Permission denied"): Checkpoints(tmp_path)
    finally: tmp_path.chmod(0o700)


def test_an_old_file_that_cannot_be_removed_does_not_fail_the_save(tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path, keep=1); save(kept, 1)
    def refuse(*given, **more): raise PermissionError(errno.EACCES, "in use")
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        save(kept, 2)
    assert sound(kept.load("s", ABOUT)) == 2
    save(kept, 3); assert steps(tmp_path) == [3]


def test_a_folder_that_went_away(tmp_path):
    kept = Checkpoints(tmp_path/"gone"); save(kept, 1); shutil.rmtree(tmp_path/"gone")
    with pytest.raises(CheckpointError, match="gone.*was not saved.*There is none before it"): save(kept, 2)
    with pytest.raises(CheckpointError, match="gone cannot be read"): kept.load("s", ABOUT)


@pytest.mark.parametrize("given", [dict(keep=0), dict(keep=1.5), dict(every=-1), dict(every=math.nan)])
def test_settings_that_make_no_sense(given, tmp_path):
    with pytest.raises(ValueError, match=next(iter(given))): Checkpoints(tmp_path, **given)


# ---- kills

class Kill(BaseException): "Nothing catches it."

@pytest.mark.parametrize("first_score, second_score", [(None, None), (.1, .2), (.2, .1)])
@pytest.mark.parametrize("done", [False, True])
def test_stopped_at_every_act_there_is_a_whole_checkpoint(done, first_score, second_score, tmp_path, monkeypatch):
    acts, at = ("mkdir", "open", "fsync", "link", "replace", "unlink", "rmdir"), 0
    real = {name: getattr(os, name) for name in acts}
    while True:
        folder, count = tmp_path/str(at), [0]
        kept = Checkpoints(folder, keep=1); save(kept, 1, score=first_score)
        def act(name):
            def call(*given, **more):
                count[0] += 1
                if count[0] > at: raise Kill
                return real[name](*given, **more)
            return call
        with monkeypatch.context() as patch:
            for name in acts: patch.setattr(os, name, act(name))
            try: save(kept, 2, done=done, score=second_score)
            except Kill: pass
        again = Checkpoints(folder, keep=1)
        assert sound(again.load("s", ABOUT)) in (1, 2)
        if first_score: assert sound(again.best("s")) == (1 if first_score > second_score else again.load("s", ABOUT).step)
        save(again, 2, done=done, score=second_score); again.load("s", ABOUT)
        assert sound(again.load("s", ABOUT)) == 2 and steps(folder) == [2] and not any(folder.glob(".part*"))
        if first_score: assert steps(folder, best=True) == [1 if first_score > second_score else 2]
        if count[0] <= at: break
        at += 1
    assert at > 6


HUNT = """
import os, signal, sys, time, torch
from pathlib import Path
from mbd.checkpoints import Checkpoints
folder, kills, size, seconds = Path(sys.argv[1]), *map(int, sys.argv[2:4]), float(sys.argv[4])

def write(pipe):
    kept = Checkpoints(folder, keep=1)
    found = kept.load("s", {"seed": 0})
    step = found.step if found else 0
    while True:
        step += 1
        kept.save("s", step, {"w": torch.full((size,), float(step))}, {"at": step}, {"seed": 0}, score=step % 7)
        os.write(pipe, b"%d " % step)

hits = last = 0
for turn in range(kills):
    ours, theirs = os.pipe()
    if not (process := os.fork()):
        try: write(theirs)
        finally: os._exit(9)
    os.close(theirs)
    first = os.read(ours, 1) if turn % 2 else b""       # every second one has saved at least once, however busy the machine is
    time.sleep(seconds * (turn * .618 % 1))
    os.kill(process, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status == -signal.SIGKILL, status
    with os.fdopen(ours) as pipe: said = [int(word) for word in (first.decode() + pipe.read()).split()]
    hits += any(folder.glob(".part*"))
    found, best = Checkpoints(folder).load("s", {"seed": 0}), Checkpoints(folder).best("s")
    if found is None: assert not said; continue
    assert found.state["at"] == found.step >= max(said, default=last) >= last, (found.step, said, last)
    assert len(found.tensors["w"]) == size and bool((found.tensors["w"] == found.step).all())
    assert bool((best.tensors["w"] == best.step).all()) and best.score == min(found.step, 6)
    assert not list(folder.glob("*.damaged")) and len(list(folder.glob("s.*"))) <= 4
    last = found.step
print(hits, last)
"""

def hunt(folder, kills, size, seconds):
    """Kill a process again and again that saves without a pause. What it said to have saved must be there and whole, or something newer.
    Returns how many kills hit a save, and how far the steps came."""
    ended = subprocess.run([sys.executable, "-c", HUNT, *map(str, (folder, kills, size, seconds))], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    return map(int, ended.stdout.split())

@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_killed_while_it_saves(tmp_path):
    hits, steps = hunt(tmp_path, 14, 50_000, .02)
    assert hits > 0 and steps > 6

@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_killed_three_hundred_times_while_it_saves(tmp_path):
    hits, steps = hunt(tmp_path, 300, 1_000_000, .15)
    assert hits > 50 and steps > 150


SAVER = """
import sys, torch
from mbd.checkpoints import Checkpoints
kept = Checkpoints(sys.argv[1], every=0)
for step in range(25): kept.save(sys.argv[2], step, {"w": torch.full((1000,), float(step))}, {"of": sys.argv[2]}, {}, done=step == 24)
"""


def test_processes_save_stages_of_their_own_at_the_same_time(tmp_path):
    savers = [subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path), f"test-{rank}"], stderr=subprocess.PIPE, text=True) for rank in range(3)]
    for saver in savers: assert saver.communicate(timeout=120)[1] == "" and saver.returncode == 0
    for rank in range(3):
        found = Checkpoints(tmp_path).load(f"test-{rank}", {})
        assert found.done and found.state == {"of": f"test-{rank}"} and found.tensors["w"].eq(24).all()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_difference_far_inside_a_long_value_counts_and_is_shown(tmp_path):
    about = {"distillation": {f"field {i}": "x"*20 for i in range(20)}}
    kept = Checkpoints(tmp_path); kept.save("distil", 1, {}, {}, about)
    other = {"distillation": about["distillation"] | {"field 19": "averaged"}}
    with pytest.raises(CheckpointError, match="averaged"): kept.load("distil", other)
    assert kept.load("distil", about).step == 1
