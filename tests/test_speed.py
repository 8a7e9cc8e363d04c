"""Speed: what is timed is what is used, tables say what happened, an exported program answers as the model does."""
import logging, multiprocessing, sys
import pytest, torch
from mbd import fusion, pairs, speed
from mbd.global_stream import GlobalStream
from mbd.local_stream import LocalStream
from mbd.pairs import find_pair
from mbd.speed import Fused, export, inference_table, load_program, random_clips, random_model, ratios
from mbd.training import Training

HAND = find_pair("miniactions")


@pytest.fixture(scope="module")
def model():
    "As after training: calibrated, and with a fitted fusion."
    torch.manual_seed(0)
    model = random_model(HAND).eval()
    model.temperature.copy_(torch.tensor([.5, 3.])); model.fusion.slope.fill_(4.); model.fusion.bias.fill_(-1.)
    return model


@pytest.fixture(scope="module")
def program(model, tmp_path_factory):
    file = export(model.train(), tmp_path_factory.mktemp("program") / "fused.pt2")
    assert model.training and list(file.parent.iterdir()) == [file]
    model.eval()
    return file


def cells(text): return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| local stream |", "| step |"))]


# ---- inference

def test_the_model_has_work_for_both_directions(model):
    assert set(model.map.group) == {"local", "balanced", "global"} and isinstance(model.fusion, fusion.AdaptiveFusion)
    assert len(random_model(find_pair("miniactions", "swapped"), num_classes=3).classes) == 3


def test_ratios_are_within_rounds():
    assert ratios([1.1, 3.3, 1.1], [1., 3., 1.]) == "1.1 [1.1, 1.1]"


def test_the_table_counts_every_round_and_says_the_difference(monkeypatch, tmp_path):
    "Two models are asked equally often, in turn; a compiled model that answers otherwise is seen."
    asked, seen = [], []
    class Twin(torch.nn.Module):
        def __init__(self, model): super().__init__(); self.model = model
        def forward(self, *clips):
            out = self.model(*clips); out.fused = out.fused + .25; return out
    monkeypatch.setattr(speed, "_compiled", Twin)
    real = speed._answers
    def answers(model, clips, precision):
        asked.append((type(model).__name__, len(clips[0]), model.training if isinstance(model, torch.nn.Module) else None, precision, torch.is_grad_enabled()))
        return real(model, clips, precision)
    monkeypatch.setattr(speed, "_answers", answers)
    text = inference_table(tmp_path / "deep" / "inference.md", pairs=[HAND], batches=(1, 3), rounds=2, command="mbd bench inference --rounds 2", progress=lambda *given: seen.append(given))
    assert (tmp_path / "deep" / "inference.md").read_text() == text and "Unfinished" not in text and "`mbd bench inference --rounds 2`" in text and seen == [(1, 2), (2, 2)]
    assert [row[3] for row in cells(text)] == ["1", "3"] and all(row[9] == "0.2" or row[9] == "0.3" for row in cells(text))
    for name, extra in (("MBD", 0), ("Twin", 1)): assert [batch for kind, batch, *_ in asked if kind == name] == [1] * (3 + extra) + [3] * (3 + extra)
    assert {(training, precision) for kind, _, training, precision, _ in asked if kind == "MBD"} == {(False, "float32")}


def test_the_default_is_one_line_for_each_different_pair(monkeypatch):
    monkeypatch.setattr(pairs, "stream_cost", lambda name, view: pairs.Cost(1, {"hand_cnn": 1., "swin3d_t": 9.}.get(name, 3.)))
    monkeypatch.setattr(speed, "random_model", lambda pair: torch.nn.Identity())
    monkeypatch.setattr(speed, "_inference_cells", lambda *given: list("abcdefg"))
    found = cells(inference_table(batches=(1, 16)))
    assert [(row[0].split(",")[0], row[1].split(",")[0], row[3]) for row in found] == [(*pair, batch) for pair in (("hand_cnn", "hand_transformer"), ("r2plus1d_18", "mvit_v2_s"), ("r2plus1d_18", "swin3d_t")) for batch in ("1", "16")]


def test_what_does_not_fit_or_compile_gets_words(monkeypatch):
    def full(*given): raise torch.OutOfMemoryError("CUDA out of memory")
    with monkeypatch.context() as patch:
        patch.setattr(speed, "_inference_cells", full)
        assert cells(inference_table(pairs=["miniactions/hand"], batches=(2,)))[0][4:] == ["out of memory"] + ["-"] * 6
    class Broken(torch.nn.Module):
        def __init__(self, model): super().__init__()
        def forward(self, *clips): raise torch._dynamo.exc.InternalTorchDynamoError("no compiler")
    monkeypatch.setattr(speed, "_compiled", Broken)
    row = cells(inference_table(pairs=["miniactions/hand"], batches=(1,), rounds=1))[0]
    assert row[6] == "does not compile (InternalTorchDynamoError)" and float(row[5]) > 0
    class Wrong(Broken):
        def forward(self, *clips): raise RuntimeError("shapes differ")
    monkeypatch.setattr(speed, "_compiled", Wrong)
    with pytest.raises(RuntimeError, match="shapes differ"): inference_table(pairs=["miniactions/hand"], batches=(1,), rounds=1)


@pytest.mark.parametrize("wrong, said", [(dict(pairs=["ucf11/hand"]), "ucf101"), (dict(pairs=["ucf101/hnad"]), "did you mean 'hand'"), (dict(rounds=0), "rounds must be a whole number of at least 1"), (dict(batches=(0, 4)), "a batch must be")])
def test_wrong_words_are_found_before_anything_is_measured(wrong, said, monkeypatch):
    monkeypatch.setattr(speed, "random_model", lambda *given: pytest.fail("measured"))
    with pytest.raises(ValueError, match=said): inference_table(**wrong)


# ---- the program

def test_a_program_answers_as_the_model_for_any_number_of_videos(model, program):
    run, about = load_program(program)
    for videos in (1, 2, 5):
        clips = random_clips(model, videos)
        with torch.no_grad():
            out = model(*clips)
            for wanted, got in zip((out.fused, out.weight, out.local.logits, out.global_.logits), run(*clips), strict=True): assert torch.allclose(wanted, got, atol=1e-4) and len(got) == videos
    assert about["classes"] == model.classes and (about["local_view"]["frames"], about["global_view"]["size"]) == (16, 28)
    with pytest.raises(AssertionError, match="Guard failed"): run(clips[0][..., :40], clips[1])


def test_the_fusion_questions_its_numbers_again(model, program):
    with pytest.raises(ValueError, match="not probabilities"): model.fusion(torch.full((2, 10), .5), torch.full((2, 10), .1))


def test_an_old_program_stays_where_a_new_one_fails(model, program, tmp_path, monkeypatch):
    def full(*given, **more): raise OSError(28, "No space left on device")
    (tmp_path / "old.pt2").write_bytes(b"old")
    monkeypatch.setattr(speed, "_followed", lambda *given: None); monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(OSError, match="No space"): export(model, tmp_path / "old.pt2")
    assert (tmp_path / "old.pt2").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_no_program_is_said_in_words(model, tmp_path, program):
    with pytest.raises(FileNotFoundError, match="no such file"): load_program(tmp_path / "none.pt2")
    (tmp_path / "half.pt2").write_bytes(program.read_bytes()[:5000])
    logging.disable(logging.ERROR)
    try:
        with pytest.raises(ValueError, match="damaged or none of torch.export's"): load_program(tmp_path / "half.pt2")
    finally: logging.disable(logging.NOTSET)
    torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.ones(2),)), tmp_path / "other.pt2")
    with pytest.raises(ValueError, match="says nothing of its classes"): load_program(tmp_path / "other.pt2")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ucf101/pretrained", "ssv2/pretrained", "ucf101/images"])
def test_default_pairs_as_programs(name, tmp_path):
    "Large networks with random weights; one has to be followed by its code."
    torch.manual_seed(0)
    model = random_model(find_pair(*name.split("/"))).eval()
    run, _ = load_program(export(model, tmp_path / "fused.pt2"))
    for videos in (1, 3):
        clips = random_clips(model, videos)
        with torch.no_grad():
            for wanted, got in zip(Fused(model)(*clips), run(*clips), strict=True): assert torch.allclose(wanted, got, atol=1e-4)


@pytest.mark.slow
def test_compiled_answers_are_the_same():
    row = cells(inference_table(pairs=["miniactions/hand"], batches=(2,), rounds=1))[0]
    assert float(row[9]) < 1e-4 and float(row[7]) > 0, row


# ---- a training step

def batch_of(pair, size=4):
    torch.manual_seed(0)
    return {key: torch.randn(size, 3, view.frames, view.size, view.size) for key, view in (("local", pair.local.view), ("global_", pair.global_.view))} | {"label": torch.arange(size)}


@pytest.mark.parametrize("name, passes, trained", [("local", (1, 0), (1, 0)), ("global", (0, 1), (0, 1)), ("teachers", (1, 1), (0, 0)), ("live", (1, 1), (1, 1)), ("averaged", (2, 2), (1, 1)), ("frozen", (2, 2), (1, 1))])
def test_each_candidate_computes_what_the_count_says(name, passes, trained, monkeypatch):
    "Forward passes of each stream, and of these those with a gradient."
    seen = []
    for kind in (LocalStream, GlobalStream):
        real = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, x, real=real, kind=kind: seen.append((kind, torch.is_grad_enabled(), self.training)) or real(self, x))
    with speed._stepper(name, HAND, Training(batch_size=4), {}, "cpu") as step:
        for _ in range(2): step(batch_of(HAND))
    for kind, all_, some in zip((LocalStream, GlobalStream), passes, trained):
        mine = [pass_ for pass_ in seen if pass_[0] is kind]
        assert len(mine) == 2 * all_ and mine.count((kind, True, True)) == 2 * some and mine.count((kind, False, False)) == 2 * (all_ - some)


def test_the_count_of_a_lesson_is_that_of_its_parts():
    work = speed.step_gflops(3., 5.)
    assert work == {"local": 9., "global": 15., "teachers": 8., "live": 24., "averaged": 32., "frozen": 32.}
    for lesson in speed.LESSONS: assert work[lesson] == sum(work[part] for part in speed.made_of(lesson))


@pytest.mark.parametrize("name, fields, options, math", [("plain", (False, False), {}, False), ("compile+channels_last", (True, True), {}, False), ("checkpointing+math_attention", (False, False), {"checkpointing": True}, True)])
def test_variants(name, fields, options, math):
    settings, *rest = speed.variant(name, Training(batch_size=8))
    assert (settings.compile, settings.channels_last) == fields and rest == [options, math] and settings.batch_size == 8


def test_rates_and_hours():
    assert speed.matrix_rate(size=128, rounds=1) > 1e7
    assert [speed.nominal(f"NVIDIA {name}") for name in ("H200", "A100-SXM4-80GB", "H100 PCIe", "GeForce", "RTX A1000 Laptop GPU", "H100 NVL")] == [989e12, 312e12, 756e12, None, None, None]
    assert speed.projected_hours(2., 10, 5)["ucf101"] == pytest.approx(9624 * 5 * 2 / 10 / 3600)


class Candidate:
    "Stands in for a process: says what it is told to say."
    asked, fails = [], {}
    times = {"local": .001, "global": .002, "teachers": .001, "live": .006, "averaged": .004, "frozen": .004}
    def __init__(self, name, job): self.name, self.job = name, job
    def __enter__(self):
        if self.name in self.fails: raise self.fails[self.name]
        return self
    def __exit__(self, *error): self.asked.append((self.name, "closed"))
    def __call__(self, word="step"):
        self.asked.append((self.name, word))
        return {"step": None, "memory": 2**20 * 100, "loader": (.5, .125)}[word]


@pytest.fixture
def candidates(monkeypatch):
    monkeypatch.setattr(speed, "_Candidate", Candidate); monkeypatch.setattr(Candidate, "asked", []); monkeypatch.setattr(Candidate, "fails", {})
    real = speed.measure
    monkeypatch.setattr(speed, "measure", lambda calls, rounds: {name: [(Candidate.times[name], 0.)] * len(walls) for name, walls in real(calls, rounds).items()})     # asked in turn, with times that no other program disturbs
    monkeypatch.setattr(speed, "matrix_rate", lambda *given: 1e12); monkeypatch.setattr("mbd.throughput.write_film", lambda *given: None)
    return Candidate


def sections(text): return {line[3:]: text.split(line + "\n")[1].split("\n## ")[0] for line in text.splitlines() if line.startswith("## ")}


def test_the_table_asks_all_in_turn_and_divides_by_the_parts(candidates, tmp_path):
    seen = []
    text = speed.train_table(tmp_path / "train.md", pairs=["miniactions/hand"], variants=("plain", "checkpointing"), rounds=2, progress=lambda *given: seen.append(given), command="mbd bench train")
    assert (tmp_path / "train.md").read_text() == text and seen == [(1, 2), (2, 2)] and "Unfinished" not in text
    steps = [name for name, word in candidates.asked if word == "step"]
    assert len(steps) == 6 * 3 and steps[:6] == steps[6:12] != steps[12:] and sorted(steps[12:]) == sorted(steps[:6])
    words = [word for _, word in candidates.asked]
    assert words.index("memory") < words.index("loader") < words.index("closed") and words.count("memory") == words.count("closed") == 6      # reading does not count as memory of the step
    found = sections(text); plain = next(section for name, section in found.items() if name.endswith(": plain"))
    rows = {row[0]: row for row in cells(plain)}
    assert list(rows) == list(speed._WORDS.values()) and rows["MBD, live peers"][2] == "2 [2, 2]" and rows["MBD, frozen teachers"][2] == "1 [1, 1]" and rows["MBD, live peers"][6] == "0.50" and rows["MBD, frozen teachers"][6].rstrip(" |") == "0.33"
    assert next(section for name, section in found.items() if name.endswith(": checkpointing")).strip() == "not offered by both backbones"
    assert "0.5 s a step, of these 0.125 s waiting" in plain and any(name.startswith("Hours of 30 epochs") for name in found)


def test_what_cannot_be_measured_is_said_and_the_rest_goes_on(candidates, tmp_path):
    candidates.fails["frozen"] = speed._Stopped("out of memory")
    text = speed.train_table(tmp_path / "train.md", pairs=["miniactions/hand"], rounds=1)
    assert "out of memory" in text and "Hours" not in text and [word for _, word in candidates.asked] == ["closed"] * 5
    candidates.fails["frozen"] = RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="shapes differ"): speed.train_table(tmp_path / "again.md", pairs=["miniactions/hand"], rounds=1)
    assert "Unfinished: 0 of 1" in (tmp_path / "again.md").read_text()


@pytest.mark.parametrize("wrong, said", [(dict(variants=("plain", "compiled")), "did you mean 'compile'"), (dict(batch_size=2), "batch_size must be a whole number of at least 3"), (dict(rounds=0), "rounds must"), (dict(pairs=["ucf101/hnad"]), "did you mean 'hand'"), (dict(precision="int8"), "precision must be")])
def test_wrong_words_are_found_before_a_process_starts(candidates, wrong, said):
    with pytest.raises(ValueError, match=said): speed.train_table(**wrong)
    assert not candidates.asked


@pytest.mark.slow
def test_a_real_table(tmp_path):
    "Processes start, step, tell their memory, read through a loader, and end."
    text = speed.train_table(tmp_path / "train.md", pairs=["miniactions/hand"], batch_size=4, rounds=2, workers=1, size=(64, 96))
    rows = cells(next(section for name, section in sections(text).items() if name.endswith(": plain")))
    assert [row[0] for row in rows] == list(speed._WORDS.values()) and all(float(row[1].split()[0]) > 0 for row in rows)
    assert not sys.platform.startswith("linux") or all(int(row[5]) > 0 for row in rows)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_an_error_of_a_process_is_said_here():
    job = dict(pair=HAND, settings=Training(batch_size=4), options={"widht": 3}, math=False, device="cpu", threads=1, film="none.mp4", workers=0, steps=1)
    with pytest.raises(RuntimeError, match="VideoError|none.mp4|No such file"):
        with speed._Candidate("live", job): pass
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("table", [speed.inference_table, speed.train_table])
def test_a_precision_that_would_not_be_computed_is_refused(table):
    with pytest.raises(ValueError, match="precision must be float32 or bfloat16, not 'bf16'"): table(pairs=["miniactions/hand"], precision="bf16")
