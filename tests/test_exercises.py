"""The exercises: blanks run and are refused by every check, solutions pass, plausible mistakes are told what is wrong."""
import contextlib, inspect, io, json, os, re, sys
from pathlib import Path
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "nbs" / "exercises"
BLANKS = sorted(FOLDER.glob("ex_*.ipynb"))
CHAPTERS = ["02_video", "03_datasets", "05_clips", "07_local_stream", "08_global_stream", "09_dominance", "10_distillation", "11_fusion", "14_evaluation"]
pytestmark = pytest.mark.skipif(not BLANKS, reason="an installed package has no notebooks")
names = [p.stem[3:] for p in BLANKS]


@pytest.fixture(scope="module")
def checks():
    "The module that the notebooks import, as they find it."
    path, sys.path = sys.path, [str(FOLDER), *sys.path]
    import checks
    yield checks
    sys.path = path


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell): return "".join(cell["source"])


def shown(cell): return "".join("".join(o.get("text", "")) for o in cell.get("outputs", ()))


def solution(blank): return FOLDER / "solutions" / blank.name


def run(path, monkeypatch):
    "Execute the code cells of a notebook in its folder, as a kernel does: (its namespace, what it printed)."
    import matplotlib
    monkeypatch.chdir(path.parent); monkeypatch.setattr(sys, "path", [*sys.path])
    space, out = {"__name__": "__main__"}, io.StringIO()
    with contextlib.redirect_stdout(out), matplotlib.rc_context({"backend": "agg"}):
        import matplotlib.pyplot as plt
        monkeypatch.setattr(plt, "show", lambda: None)
        for cell in cells(path):
            if cell["cell_type"] == "code": exec(compile(source(cell), f"<cell {cell['id']} of {path.name}>", "exec"), space)
        plt.close("all")
    return space, out.getvalue()


def states(text): return dict(re.findall(r"^exercise (\w+): (right|wrong|not yet)", text, re.M))


# ---- the notebooks as they are written

def test_every_chapter_that_teaches_the_method_or_the_data_has_exercises(): assert names == CHAPTERS and sorted(p.name for p in (FOLDER / "solutions").glob("*.ipynb")) == [p.name for p in BLANKS]


@pytest.mark.parametrize("path", BLANKS, ids=names)
def test_blank_and_solution_differ_in_the_answers_only(path):
    blank, solved = cells(path), {c["id"]: c for c in cells(solution(path))}
    kept = [c for c in cells(solution(path)) if c["id"] in {b["id"] for b in blank}]
    assert [c["id"] for c in kept] == [b["id"] for b in blank]
    open_ = [b for b in blank if source(b).startswith("# your answer to ")]
    for b in blank[2:]:
        assert (source(b) != source(solved[b["id"]])) == (b in open_), source(b)[:80]      # the first two cells are title and introduction
    assert all("..." in source(b) for b in open_)
    assert not [c for c in cells(solution(path)) if c["id"] not in {b["id"] for b in blank} and c["cell_type"] == "code"]
    asked = re.findall(r'check\("(\w+)"', "\n".join(source(b) for b in blank if b["cell_type"] == "code"))
    assert [re.match(r"# your answer to (\w+)", source(b))[1] for b in open_] == asked and 2 <= len({re.match(r"\d+", a)[0] for a in asked}) <= 5


@pytest.mark.parametrize("path", BLANKS, ids=names)
def test_committed_outputs_are_those_of_blanks_and_of_solutions(path):
    for file, wanted in ((path, "not yet"), (solution(path), "right")):
        checked = [c for c in cells(file) if re.match(r'check\("', source(c))]
        assert checked and all(set(states(shown(c)).values()) == {wanted} for c in checked), file.name


@pytest.mark.parametrize("path", BLANKS, ids=names)
def test_twelve_questions_each_with_an_answer_and_what_counts(path):
    [questions] = [source(c) for c in cells(path) if source(c).startswith("## Self-test")]
    [answers] = [source(c) for c in cells(solution(path)) if source(c).startswith("### Answers")]
    numbered = lambda text: re.findall(r"^(\d+)\. ", text, re.M)
    assert numbered(questions) == numbered(answers) == [str(i) for i in range(1, 13)]
    assert all("*Must say:*" in line for line in answers.splitlines() if re.match(r"\d+\. ", line)) and "Must say" not in questions


@pytest.mark.parametrize("path", BLANKS, ids=names)
def test_the_chapter_leads_to_its_exercises_and_back(path):
    chapter = ROOT / "nbs" / f"{path.stem[3:]}.ipynb"
    [cell] = [c for c in cells(chapter) if c["cell_type"] == "markdown" and "## Exercises" in source(c)]
    assert f"(exercises/{path.name})" in source(cell)
    for file in (path, solution(path)):
        for link in re.findall(r"\]\(([^)#]+\.ipynb)\)", "\n".join(source(c) for c in cells(file) if c["cell_type"] == "markdown")):
            assert (file.parent / link).resolve().is_file(), f"{file.name}: {link}"
    assert "nbs/exercises" in (ROOT / "README.md").read_text(encoding="utf-8")


# ---- run

@pytest.mark.parametrize("path", BLANKS, ids=names)
def test_a_blank_runs_to_its_end_and_no_check_calls_it_right(path, checks, monkeypatch):
    space, text = run(path, monkeypatch)
    found = states(text)
    assert found == dict.fromkeys(space["check"].state, "not yet") and len(found) >= 4, found
    assert f"0 of {len(found)} right" in text


@pytest.mark.parametrize("path", BLANKS, ids=names)
def test_a_solution_passes_every_check(path, checks, monkeypatch):
    space, text = run(solution(path), monkeypatch)
    found = states(text)
    assert found == dict.fromkeys(space["check"].state, "right"), text
    assert f"{len(found)} of {len(found)} right" in text and {e for c, e in checks._CHECKS if c == path.stem[3:5]} == set(found)


# ---- what a check says

def said(checks, chapter, exercise, *answers):
    with contextlib.redirect_stdout(io.StringIO()) as out: checks.Checks(chapter)(exercise, *answers)
    return out.getvalue()


def softmax_share(local, global_, labels, T_local, T_global):
    p = [(z / T).softmax(1).gather(1, labels[:, None])[:, 0] for z, T in ((local, T_local), (global_, T_global))]
    return p[0] / (p[0] + p[1])


def by_video(sources, fraction, seed): return np.random.default_rng(seed).permutation(len(sources)) < fraction * len(sources)


def replaced(classes):
    names = [c.replace("left", "right").replace("right", "left") for c in classes]
    return [classes.index(n) if n in classes else -1 for n in names]


def video_bootstrap(right, sources):
    draw = np.random.default_rng(0)
    return np.quantile([right[draw.integers(0, len(right), len(right))].mean() for _ in range(500)], [0.025, 0.975])


def gradient_without_square(s, t, T): return ((s / T).softmax(1) - (t / T).softmax(1)) / T


def tossed(codes, generator):
    coin = torch.rand(len(codes), generator=generator) < 0.5
    return coin.float(), (~coin).float()


def edges_apart(kernels, strides, dilations): return 1 + sum(d * (k - 1) for k, d in zip(kernels, dilations))


def nearest_frame(times, length, step, start=0): return np.abs(times[:, None] - (times[0] + start + step * np.arange(length))).argmin(0)


def jump_each(wanted, keys): return 1 + wanted.max(), sum(i - keys[keys <= i].max() + 1 for i in wanted)


def called_against_one_half(share, labels, sources):
    "The overall share is not one half wherever one stream is the better one everywhere."
    from mbd.dominance import groups, share_interval
    low, high, _ = share_interval(share, torch.ones_like(share), labels, sources, int(labels.max()) + 1, resamples=300)
    return np.mean([group != "balanced" for group in groups(low, high, .5)])


MISTAKES = [
    ("02", "1", [nearest_frame], "not shown yet"),
    ("02", "1b", ["a"], "how far"),
    ("02", "2", [1, 1], "too low"),
    ("02", "3", [jump_each], "share"),
    ("02", "4", [np.random.default_rng(0).integers(0, 9, (12, 8, 8, 3)).astype(np.uint8)], "differ by only"),
    ("02", "4", [np.random.default_rng(0).integers(0, 255, (12, 4, 4, 3)).astype(np.uint8)], "mean grey moves"),
    ("03", "1", [0.15], "too low"),
    ("03", "1b", [lambda clips, f: 1 - f ** clips], "sibling of its own"),
    ("03", "2", [by_video], "both sides"),
    ("03", "3", [lambda right, found, expected: (right / expected, right / found)], "missing ones"),
    ("03", "4", [replaced], "replacing one word"),
    ("03", "4", [lambda classes: [i for i in range(len(classes))]], "mirror image"),
    ("05", "1", [lambda a, b: max(0, min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])) * max(0, min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])) / (a[2] * a[3])], "change places"),
    ("05", "2", [lambda period, stride: stride / period % 1], "half a turn"),
    ("05", "4", [lambda seed, epoch, video: np.random.default_rng(seed + epoch + video)], "same numbers"),
    ("05", "4", [lambda seed, epoch, video: np.random.default_rng(seed*10_000 + epoch*100 + video)], "same numbers"),
    ("05", "4", [lambda *key, draw=np.random.default_rng(0): draw], "order of asking"),
    ("05", "5", [{"PushUpsSlow", "PushUpsFast"}], "mirrored video"),
    ("05", "5", [{"Cartwheel"}], "is no class"),
    ("07", "1", [edges_apart], "gradient reaches further"),
    ("07", "1b", [(3, 1, 3, 3)], "fewer frames"),
    ("07", "1b", [(2, 3, 3, 3)], "odd"),
    ("07", "2", [[1, 1], -1.5], "wrong side"),
    ("07", "3", [lambda stream, clip: 16], "not"),
    ("07", "4b", [0.65], "cross-entropy"),
    ("08", "1", [lambda n, d, e=2: (n * n * d, 4 * n * d * d, 2 * e * n * d * d)], "more matrices"),
    ("08", "2", [lambda stream: stream], "still knows the order"),
    ("08", "2b", [{"SameHand", "OtherHand"}], "shuffle"),
    ("08", "3", [lambda n, radius: ((torch.arange(n)[:, None] - torch.arange(n)).abs() > radius) * -torch.inf], "NaN"),
    ("08", "3", [lambda n, radius: (torch.arange(n)[:, None] - torch.arange(n)).abs() <= radius], "added"),
    ("08", "3b", [lambda n, radius: -(-(n - 1) // (2 * radius))], "first token"),
    ("08", "4", [{"out.weight", "qkv.weight"}], "gradient of zero"),
    ("09", "1", [softmax_share], "logarithms"),
    ("09", "1", [lambda local, global_, labels, a, b: 1 - torch.sigmoid((local / a).log_softmax(1).gather(1, labels[:, None]) - (global_ / b).log_softmax(1).gather(1, labels[:, None]))[:, 0]], "one minus"),
    ("09", "2", ["rises"], "where it is wrong"),
    ("09", "3", [[(0.9, 0.1)]], "should say global"),
    ("09", "4", [0.05, 0.05], "by video is too low"),
    ("09", "4b", [called_against_one_half], "leaves out the share of all videos"),
    ("10", "1", [gradient_without_square], "squared"),
    ("10", "1", [lambda s, t, T: -T * ((s / T).softmax(1) - (t / T).softmax(1))], "sign"),
    ("10", "2", [tossed], "balanced"),
    ("10", "2", [lambda codes, generator: ((codes > 0).float(), (codes < 0).float())], "one half in *each* group"),
    ("10", "3", [torch.ones(8, 4, 1, 1, 1), torch.ones(8, 4, 1, 1, 1)], "see different classes"),
    ("10", "5", [0.5, 0.5], "too low"),
    ("11", "1", [lambda p, q, logit_share, slope, bias: torch.sigmoid(slope * (p @ logit_share) + bias)], "mean of both"),
    ("11", "1", [lambda p, q, logit_share, slope, bias: torch.sigmoid(slope * logit_share[(p + q).argmax(1)] + bias)], "expectation"),
    ("11", "1b", [(0, 0), (0, 0.7), (1, 0)], "one scalar"),
    ("11", "3", [lambda p, q, w: -(p ** (1 - w) * q ** w).sum(1).log()], "weight of the local stream"),
    ("11", "3b", ["falls", "falls"], "has it moved"),
    ("14", "1", [[0.4, 0.6, 0.0], [0.4, 0.6, 0.0]], "their mean answers class 1"),
    ("14", "1", [[0.6, 0.4, 0.0], [0.4, 0.0, 0.6]], "already right"),
    ("14", "2", [video_bootstrap], "independent"),
    ("14", "3", [lambda checkpoints, videos: 0.0], "looks better"),
    ("14", "4", [np.arange(400) % 2, (np.arange(400) + 1) % 2, np.arange(400) // 10], "does not decide"),
    ("14", "5", [lambda n: 3 / n], "approximation"),
    ("14", "5b", [0.005], "too low"),
]


@pytest.mark.parametrize("chapter,exercise,answers,hint", MISTAKES, ids=[f"{c}-{e}-{n}" for n, (c, e, *_) in enumerate(MISTAKES)])
def test_a_plausible_mistake_is_wrong_and_the_hint_says_why(checks, chapter, exercise, answers, hint):
    text = said(checks, chapter, exercise, *answers)
    assert text.startswith(f"exercise {exercise}: wrong") and hint.lower() in text.lower(), text


def test_no_check_raises_whatever_it_is_given(checks):
    def broken(*values, **named): raise KeyError("lost")
    for (chapter, exercise), check in checks._CHECKS.items():
        number = len(inspect.signature(check).parameters)
        for junk in ("nonsense", float("nan"), [], [[]], {}, object(), -1, lambda *a, **k: "nonsense", lambda *a, **k: np.full(3, np.nan), broken):
            assert re.match(rf"exercise {exercise}: wrong", said(checks, chapter, exercise, *[junk] * number)), (chapter, exercise, junk)
        for nothing in (..., None, lambda *a, **k: None):
            assert said(checks, chapter, exercise, *[nothing] * number).startswith(f"exercise {exercise}: ") and "right" not in said(checks, chapter, exercise, *[nothing] * number)


def test_an_error_in_the_students_code_is_told_with_its_line(checks):
    space = {}
    exec(compile("def bounds(right, found, expected):\n    share = right / found\n    return share[0], 1\n", "<cell>", "exec"), space)
    text = said(checks, "03", "3", space["bounds"])
    assert "wrong. Your code raised" in text and "(line 3 of its cell)" in text and "Traceback" not in text
