"""Checks of the exercises. Each says "right", "not yet", or "wrong" with a hint at what is wrong.

A notebook beside this file (or in the folder `solutions`) begins with

    import sys; sys.path.append("..")     # for solutions/, which is one folder further down
    from checks import Checks
    check = Checks("02")

and then calls `check("1", answer)`. What is asked for is compared with the package, with a measurement, or with a salted hash, on inputs the notebook does not show.
A check never raises: an answer that is missing (`...` or None) is "not yet", an error in the student's code is "wrong" with its message.
Reading on shows the answers' sources, so try first.
"""
import functools, hashlib, itertools, math, traceback
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]


class Wrong(Exception): "An answer that is not right; its words are the hint."
class NotYet(Exception): "No answer so far."


_CHECKS = {}      # (chapter, exercise) -> function of the answers: returns a note or None; raises Wrong, NotYet

def of(chapter, exercise):
    "Decorator of the check of an exercise."
    def note(check): _CHECKS[chapter, exercise] = check; return check
    return note


def _empty(x):
    if x is None or x is ...: return True
    if isinstance(x, dict): x = list(x.values())
    return isinstance(x, (tuple, list, set)) and any(_empty(v) for v in x)

def _given(x):
    "x, if there is one."
    if _empty(x): raise NotYet
    return x

def _copy(x): return x.clone() if isinstance(x, torch.Tensor) and not x.requires_grad else x.copy() if isinstance(x, np.ndarray) else list(x) if isinstance(x, list) else x

def _asked(answer):
    "An answer as a check uses it: a function is given copies, and one that returns nothing is not written yet."
    answer = _given(answer)
    if not callable(answer) or isinstance(answer, (type, torch.nn.Module)): return answer
    @functools.wraps(answer)
    def ask(*values, **named): return _given(answer(*map(_copy, values), **named))
    return ask

def _blame(error, answers):
    "What went wrong in the student's code, and in which line of the cell."
    files = {getattr(getattr(a, "__code__", None), "co_filename", None) for a in answers} - {None}
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    what = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    return f"your code raised {what} (line {lines[-1]} of its cell)" if lines else f"the check cannot use this answer ({what}); compare its kind and shape with what is asked for"


class Checks:
    "The checks of one chapter: `check(exercise, *answers)` prints a line, `check.report()` what is right so far."
    def __init__(self, chapter): self.chapter, self.state = chapter, dict.fromkeys((n for c, n in _CHECKS if c == chapter), "not yet")

    def __call__(self, exercise, *answers):
        "Print whether the answers to an exercise are right."
        try: state, note = "right", _CHECKS[self.chapter, exercise](*map(_asked, answers))
        except NotYet: state, note = "not yet", None
        except Wrong as hint: state, note = "wrong", str(hint)
        except Exception as error: state, note = "wrong", _blame(error, answers)
        self.state[exercise] = state
        print(f"exercise {exercise}: {state}" + (f". {note[0].upper()}{note[1:]}" if note else ""))

    def report(self):
        "Print how many exercises are right, and which are open."
        left = [n for n, state in self.state.items() if state != "right"]
        print(f"{len(self.state) - len(left)} of {len(self.state)} right" + (f"; open: {', '.join(left)}" if left else ""))


# ---- what many checks need

def _array(x): return x.detach().cpu().double().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, dtype=np.float64)

def _number(x, what="the answer"):
    "x as a float that is finite."
    try: x = float(x)
    except (TypeError, ValueError): raise Wrong(f"{what} should be one number, not {type(x).__name__}") from None
    if not math.isfinite(x): raise Wrong(f"{what} is {x}, and that is no answer")
    return x

def _same(got, want, what="the answer", tolerance=1e-5):
    "Raise Wrong, with what is wrong (shape, sign, scale), unless both agree."
    got, want = _array(got), _array(want)
    if got.shape != want.shape: raise Wrong(f"{what} has shape {got.shape}, {want.shape} is asked for")
    if not np.isfinite(got).all(): raise Wrong(f"{what} holds NaN or infinite values")
    close = lambda a: np.allclose(a, want, rtol=tolerance, atol=tolerance)
    if close(got): return
    if close(-got): raise Wrong(f"{what} has the wrong sign")
    if want.size and want.min() >= 0 and want.max() <= 1 and close(1 - got): raise Wrong(f"{what} is one minus what is asked for")
    big = np.abs(want) > 1e-3
    if big.sum() > 1 and not np.allclose(want[big], want[big].flat[0]):
        ratio = got[big] / want[big]
        if ratio.min() > 0 and ratio.max() - ratio.min() < 1e-3 * ratio.max(): raise Wrong(f"{what} has the right shape but the wrong scale: all values are off by one factor")
    raise Wrong(f"{what} is off by up to {np.abs(got - want).max():.2g}")

def _guess(got, truth, tolerance, what="your guess", form="{:.2f}"):
    "A prediction against what was measured; the note tells the measurement."
    got = _number(got, what)
    if abs(got - truth) > tolerance: raise Wrong(f"{what} is too {'low' if got < truth else 'high'}")
    return f"{what}: measured {form.format(truth)}"

def _salted(chapter, exercise, answer):
    "Hash of an answer that cannot be measured."
    if isinstance(answer, (set, frozenset, list, tuple)): answer = ",".join(sorted(map(str, answer)))
    return hashlib.sha256(f"mbd {chapter}.{exercise} {str(answer).strip().lower()}".encode()).hexdigest()[:12]

def _choice(chapter, exercise, answer, digest, hint):
    if _salted(chapter, exercise, answer) != digest: raise Wrong(hint)

def _subset(answer, allowed, what):
    "answer as a set of names."
    if isinstance(answer, str): answer = {answer}
    unknown = set(answer) - set(allowed)
    if unknown: raise Wrong(f"{sorted(map(str, unknown))[0]!r} is no {what}; choose from {', '.join(allowed)}")
    return set(answer)

@functools.cache
def stored():
    "The stored answers of a trained pair, part by part: .local, .global_ (N, K) raw logits in float64, .labels (N,), .sources, .classes."
    with np.load(ROOT / "data/mini_logits.npz") as kept: kept = dict(kept)
    def part(name):
        mine = kept["part"] == name
        return SimpleNamespace(local=torch.tensor(kept["local_logits"][mine]).double(), global_=torch.tensor(kept["global_logits"][mine]).double(),
                               labels=torch.tensor(kept["labels"][mine]).long(), sources=kept["sources"][mine].tolist(), classes=kept["classes"].tolist())
    return {name: part(name) for name in ("fit", "map", "gate", "test")}


# ---- 02: frames by number

def _on_screen(times, length, step, start=0): return np.array([max(i for i in range(len(times)) if times[i] <= times[0] + start + k * step) for k in range(length)])

@of("02", "1")
def _timed_clip(timed_clip):
    from mbd.video import dense_clip
    draw = np.random.default_rng(2)
    even = 700 + 40 * np.arange(90)
    films = [(even, 16, 80, 160), (even, 16, 60, 0)] + [(draw.integers(0, 500) + np.cumsum(draw.choice([33, 34, 66, 100], 60)), 12, int(draw.integers(40, 200)), int(draw.integers(0, 300))) for _ in range(20)]
    for times, length, step, start in films:
        got, want = _array(timed_clip(times, length, step, start)), _on_screen(times, length, step, start)
        if got.shape != want.shape: raise Wrong(f"it should return {length} indices for length = {length}, not an array of shape {got.shape}")
        if (got == want).all(): continue
        if (got < 0).any() or (got >= len(times)).any(): raise Wrong(f"some indices lie outside the {len(times)} frames; past the end the last frame is held")
        nearest = np.abs(times[:, None] - (times[0] + start + step * np.arange(length))).argmin(0)
        if (got == nearest).all(): raise Wrong("the frame nearest in time may be one that is not shown yet at that moment")
        if times[0] and (got == _on_screen(times - times[0], length, step, max(start - times[0], 0))).all(): raise Wrong("the first time stamp of a file need not be 0")
        late = times[got.astype(int)] > times[0] + start + step * np.arange(length)
        raise Wrong("at some moments a frame is taken that is shown only later" if late.any() else "at some moments a frame is taken that has been replaced by a later one")
    assert (_on_screen(even, 16, 80, 160) == dense_clip(90, 16, 2, start=4)).all()
    return "at a constant rate it agrees with dense_clip"

@of("02", "1b")
def _(answer): _choice("02", "1b", answer, "7d26e159c959", "how much time lies between two neighbouring frames of the clip in each half, and how far does the rope turn in it?")

@of("02", "2")
def _(hold, loop):
    from mbd.video import dense_clip
    begins = lambda i: 1 + int((np.diff(i) < 0).sum())
    notes = [_guess(got, begins(i), 0.1, what, "{:.0f}") for got, i, what in ((hold, dense_clip(20, 16, 4, start=0), "with the last frame held"), (loop, 4 * np.arange(16) % 20, "looped"))]
    return "; ".join(notes)

@of("02", "2b")
def _(looping_clip, passes):
    draw = np.random.default_rng(3)
    for n, length, stride in [(20, 16, 4), (7, 5, 1), (90, 16, 2)] + [tuple(map(int, draw.integers(1, 40, 3))) for _ in range(20)]:
        _same(looping_clip(n, length, stride), stride * np.arange(length) % n, f"the clip of {length} frames, {stride} apart, of a video of {n}")
    for indices, want in [([0, 1, 2, 3], 1), ([0, 4, 8, 8, 8], 1), ([0, 4, 8, 2, 6, 0], 3), ([5], 1)]:
        if _number(passes(np.array(indices)), "passes") != want: raise Wrong(f"over the frames {indices} the ball begins at the left {'once' if want == 1 else f'{want} times'}")

@of("02", "3")
def _(cost):
    draw = np.random.default_rng(4)
    for _ in range(30):
        keys = np.unique(np.append(0, draw.integers(0, 200, draw.integers(0, 20))))
        wanted = np.unique(draw.integers(0, 200, draw.integers(1, 17)))
        counting, jumping = (_number(v, "each cost") for v in cost(wanted, keys))
        before = [keys[keys <= i].max() for i in wanted]
        want = sum(1 + max(i for i, k in zip(wanted, before) if k == key) - key for key in set(before))
        if counting != 1 + wanted.max(): raise Wrong("by counting, every frame from 0 up to and with the last one wanted is decoded" + (": one is missing" if counting == wanted.max() else ""))
        if jumping == sum(i - k + 1 for i, k in zip(wanted, before)) and jumping != want: raise Wrong("frames behind one keyframe share its jump: what was decoded for the first is not decoded again for the second")
        if jumping != want: raise Wrong(f"jumping decodes {'more' if jumping < want else 'fewer'} frames than that; from each keyframe that is needed, up to and with the last frame wanted before the next one")

@of("02", "3b")
def _(distance):
    from mbd.video import uniform_segments
    wanted = uniform_segments(250, 16)
    half = [d for d in range(5, 65, 5) if sum(1 + max(i for i in wanted if i // d == g) - d * g for g in {i // d for i in wanted}) <= (1 + wanted.max()) / 2]
    return _guess(distance, max(half), 0.1, "the distance", "{:.0f} frames")

@of("02", "4")
def _(film):
    film = np.asarray(film)
    if film.dtype != np.uint8 or film.ndim != 4 or film.shape[-1] != 3 or len(film) < 10: raise Wrong(f"a film is uint8 (T, H, W, 3) with T >= 10 here, not {film.dtype} {film.shape}")
    grey, change = np.abs(np.diff(film.mean((1, 2, 3)))).max(), np.abs(np.diff(film.astype(float), axis=0)).mean((1, 2, 3)).min()
    if change < 5: raise Wrong(f"neighbouring frames differ by only {change:.1f} grey levels somewhere: a wrong frame would hardly matter; let it be 5 or more")
    if grey > 1: raise Wrong(f"the mean grey moves by {grey:.1f} levels from one frame to the next: the weak proof would notice")
    if len({frame.tobytes() for frame in film}) < len(film): raise Wrong("some frames of it are equal")
    return f"the mean accepts all {len(film) - 1} wrong frames, a checksum none"


# ---- 03: data sets

@of("03", "1")
def _(guess): return _guess(guess, 1 - 0.15 ** 4, 0.02, "your guess", "{:.4f}")

@of("03", "1b")
def _(seen):
    draw = np.random.default_rng(5)
    for clips, held_out in [(2, 0.5), (3, 0.3), (5, 0.15), (4, 0.8)]:
        held = draw.random((200_000 // clips, clips)) < held_out
        truth, got = ((held & ~held.all(1, keepdims=True)).sum() / held.sum()), _number(seen(clips, held_out))
        if abs(got - truth) < 0.01: continue
        if abs(got - (1 - held_out ** clips)) < 1e-6: raise Wrong("the video itself is held out already: it is no sibling of its own")
        if abs(got - (1 - truth)) < 0.01: raise Wrong("this is the part that has no sibling in the training part")
        raise Wrong(f"for {clips} clips a source and {held_out:.0%} held out, counting 200,000 videos gives {'more' if got < truth else 'less'}")

@of("03", "2")
def _(hold_out):
    draw = np.random.default_rng(6)
    for count, fraction in [(10, 0.2), (40, 0.25), (25, 0.2)]:
        sources = [f"g{s:02d}" for s in range(count) for _ in range(int(draw.integers(1, 12)))]
        sources = [sources[i] for i in draw.permutation(len(sources))]
        masks = [np.asarray(hold_out(sources, fraction, seed)) for seed in (0, 0, 1, 2)]
        for mask in masks:
            if mask.shape != (len(sources),) or mask.dtype != bool: raise Wrong(f"it should return one True or False for each of the {len(sources)} videos, not {mask.dtype} {mask.shape}")
            inside, outside = ({s for s, m in zip(sources, mask) if m == side} for side in (True, False))
            if inside & outside: raise Wrong(f"{len(inside & outside)} of {count} sources lie on both sides")
            if len(inside) != round(fraction * count): raise Wrong(f"{len(inside)} of {count} sources are held out, the fraction asked for is {fraction}: count sources, not videos")
        if (masks[0] != masks[1]).any(): raise Wrong("the same seed gives two different cuts: nobody could repeat your experiment")
        if (masks[0] == masks[2]).all() and (masks[0] == masks[3]).all(): raise Wrong("every seed gives the same cut")
    return "no scene lies on both sides"

@functools.cache
def _colours():
    "Mean colour (N, 3) of a frame of generated videos, their classes and sources."
    from mbd import miniactions
    spec = miniactions.Spec(frames=19, gap=0)
    keys = [(k, g, c) for k in range(10) for g in range(1, 9) for c in range(1, 4)]
    return np.array([miniactions.render(spec, miniactions.CLASSES[k], g, c)[0].mean((0, 1)) for k, g, c in keys]), np.array([k for k, _, _ in keys]), np.array([f"{k}-{g}" for k, g, _ in keys])

@of("03", "2b")
def _(by_video, by_source):
    colours, labels, sources = _colours()
    def accuracy(held):
        nearest = np.square(colours[held][:, None] - colours[~held][None]).sum(2).argmin(1)
        return (labels[~held][nearest] == labels[held]).mean()
    draw, found = np.random.default_rng(7), [[], []]
    for _ in range(20):
        names = draw.permutation(np.unique(sources))
        found[0].append(accuracy(draw.random(len(labels)) < 0.25)); found[1].append(accuracy(np.isin(sources, names[:20])))
    return "; ".join(_guess(g, np.mean(t), tolerance, what, "{:.2f}") for g, t, tolerance, what in ((by_video, found[0], 0.12, "cut by video"), (by_source, found[1], 0.10, "cut by source")))

@of("03", "3")
def _(bounds):
    draw = np.random.default_rng(8)
    for _ in range(20):
        expected = int(draw.integers(100, 20_000)); found = int(draw.integers(expected // 2, expected + 1)); right = int(draw.integers(0, found + 1))
        got = _array(bounds(right, found, expected))
        if got.shape == (2,) and got[0] > got[1]: raise Wrong("the lower end comes first")
        if got.shape == (2,) and (np.isclose(got, right / found).any() and found != expected): raise Wrong("an end equals the accuracy over the videos found: what if all the missing ones would be wrong, or all right?")
        _same(got, [right / expected, (right + expected - found) / expected], "(low, high)")

@of("03", "3b")
def _(answer): _choice("03", "3b", answer, "5cc17584ae4e", "compute both pairs of bounds: is there a list of outcomes for the missing videos under which the other laboratory is ahead?")

@of("03", "4")
def _(mirrored):
    lists = [["Pulling [x] from left to right", "Holding [x]", "Pulling [x] from right to left"], ["Turning the camera left", "Turning the camera right", "Holding [x] upright", "Moving [x] up"],
             ["Throwing [x] to the right", "Poking a hole"], ["Leftover in a bowl", "Pushing [x] from right to left", "Copyright sign", "Pushing [x] from left to right"], ["a left b left", "a right b right"]]
    wants = [[2, 1, 0], [1, 0, 2, 3], [-1, 1], [0, 3, 2, 1], [1, 0]]
    for classes, want in zip(lists, wants):
        got = [int(v) for v in mirrored(classes)]
        if len(got) != len(classes): raise Wrong(f"{len(classes)} classes want as many numbers, not {len(got)}")
        for name, g, w in zip(classes, got, want):
            if g == w: continue
            if w >= 0 and w != classes.index(name) and g in (-1, classes.index(name)):
                raise Wrong(f"{name!r} has another class for a mirror image, and it is on the list" + (" (replacing one word after the other leaves both sides the same)" if "left" in name and "right" in name else ""))
            if w < 0: raise Wrong(f"{name!r} shows, mirrored, a class that is not on the list: say -1")
            raise Wrong(f"{name!r} should keep its class: it names no side, or the mirror gives the same name" if w == classes.index(name) else f"{name!r} becomes number {g}, which is another class")


# ---- 05: clips and batches

def _frames_of(box): t, l, h, w = box; grid = np.zeros((80, 80), bool); grid[t:t + h, l:l + w] = True; return grid

@of("05", "1")
def _(overlap):
    draw = np.random.default_rng(9)
    for _ in range(60):
        a, b = (tuple(int(v) for v in (*draw.integers(0, 40, 2), *draw.integers(1, 40, 2))) for _ in range(2))
        both, either = (_frames_of(a) & _frames_of(b)).sum(), (_frames_of(a) | _frames_of(b)).sum()
        got = _number(overlap(a, b))
        if abs(got - both / either) < 1e-9: continue
        if got < 0 or not both: raise Wrong(f"the boxes {a} and {b} do not meet, and you find {got:.2f}" if not both else "an overlap is never negative")
        if abs(got - both) < 1e-9: raise Wrong("this is the area in common, in pixels; divide by the area that either covers")
        if abs(got - both / (a[2] * a[3])) < 1e-9 or abs(got - both / (b[2] * b[3])) < 1e-9: raise Wrong("divide by the area that either covers: the answer must not change when a and b change places")
        raise Wrong(f"for {a} and {b} counting pixels gives {'more' if got < both / either else 'less'}; mind that the third number is the height")

def _iou(a, b):
    h, w = (max(0, min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    return h * w / (a[2] * a[3] + b[2] * b[3] - h * w)

@of("05", "1b")
def _(guess):
    from mbd.clips import AUGMENTATIONS, LOCAL_VIEW, draw
    rng = np.random.default_rng(10)
    boxes = [draw((32, 240, 320), [LOCAL_VIEW], rng, AUGMENTATIONS["standard"]).box for _ in range(2000)]
    return _guess(guess, np.mean([_iou(a, b) for a, b in zip(boxes[::2], boxes[1::2])]), 0.12)

@of("05", "2")
def _(apparent_turn):
    for period, stride in itertools.product((5, 8, 12), range(1, 14)):
        turn, got = stride / period % 1, _number(apparent_turn(period, stride))
        want = turn - 1 if turn > 0.5 else turn
        if abs(got - want) < 1e-9 or turn == 0.5 and abs(got + 0.5) < 1e-9: continue
        if abs(got - turn) < 1e-9: raise Wrong("more than half a turn forward looks like less than half a turn back")
        if abs(got - stride / period) < 1e-9: raise Wrong("whole turns are not seen: only where the ball is counts")
        if abs(got + want) < 1e-9: raise Wrong("the direction is the wrong way round")
        raise Wrong(f"with a period of {period} frames and a stride of {stride} it turns by another angle")

@of("05", "2b")
def _(forward, backward, blind):
    turn = lambda s: s / 8 % 1
    wants = {"forward": {s for s in range(1, 13) if 0 < turn(s) < 0.5}, "backward": {s for s in range(1, 13) if turn(s) > 0.5}, "blind": {s for s in range(1, 13) if turn(s) in (0, 0.5)}}
    for (name, want), got in zip(wants.items(), (forward, backward, blind)):
        got = {int(v) for v in got}
        if got != want: raise Wrong(f"{name}: {len(got & want)} of yours belong there, {len(got - want)} do not, {len(want - got)} are missing")

@of("05", "3")
def _(matched):
    draw = np.random.default_rng(11)
    for _ in range(20):
        local, global_, tolerance = np.sort(draw.integers(0, 200, 16)), np.sort(draw.integers(0, 200, int(draw.integers(1, 12)))), int(draw.integers(0, 9))
        want, other = (np.abs(local[:, None] - global_[None]).min(axis) <= tolerance for axis in (1, 0))
        got = _number(matched(local, global_, tolerance))
        if abs(got - want.mean()) < 1e-9: continue
        if abs(got - other.mean()) < 1e-9: raise Wrong("this is the part of the *global* frames that have a local one near them")
        if abs(got - (np.abs(local[:, None] - global_[None]).min(1) < tolerance).mean()) < 1e-9: raise Wrong("a distance of exactly the tolerance counts")
        raise Wrong("it should be the fraction of the local frames, from 0 to 1, whose nearest global frame is within the tolerance")

@of("05", "3b")
def _(guess): return _guess(guess, 3 / 16, 0.08)

@of("05", "3c")
def _(losses):
    if _subset(losses, ("soft_kl", "decoupled_kl", "relation", "logit", "hint", "attention"), "loss of chapter 10") != {"hint", "attention"}: raise Wrong("which of them compare cell with cell, and which only answers or means over all cells?")

@of("05", "4")
def _(generator_of):
    keys = list(dict.fromkeys([*itertools.product(range(8), range(8), range(12)), *itertools.product((0, 1, 10, 100, 1000), (0, 1, 10, 100, 300), (0, 1, 10, 100, 1000, 10_000, 250_000))]))      # sums of products collide where numbers are large
    first = {key: _given(generator_of(*key)).random(3).tolist() for key in keys}
    if any(generator_of(*key).random(3).tolist() != first[key] for key in keys[::-7]): raise Wrong("asked again, the same seed, epoch and video draw other numbers: something depends on the order of asking")
    seen = {}
    for key, numbers in first.items():
        twin = seen.setdefault(tuple(numbers), key)
        if twin != key: raise Wrong(f"(seed, epoch, video) = {twin} and {key} draw the same numbers")
    _given(generator_of(10**6, 300, 250_000)).random()

@of("05", "5")
def _(safe):
    from mbd.miniactions import CLASSES
    got = _subset(safe, CLASSES, "class")
    if _salted("05", "5", got) != "842f597601fe": raise Wrong("for each class imagine the mirrored video: which class would somebody give it who knows nothing of the mirror? Two of the pairs swap their classes")


# ---- 07: the local stream

def _reach(kernels, strides, dilations):
    "Inputs that move one output of a row of convolutions, by its gradient."
    length = 1
    for k, s, d in zip(kernels[::-1], strides[::-1], dilations[::-1]): length = (length - 1) * s + d * (k - 1) + 1
    x = torch.ones(1, 1, length + 20, dtype=torch.float64, requires_grad=True); y = x
    for k, s, d in zip(kernels, strides, dilations): y = F.conv1d(y, torch.ones(1, 1, k, dtype=torch.float64), stride=s, dilation=d)
    y[0, 0, 0].backward()
    moved = x.grad[0, 0].nonzero()
    return int(moved.max() - moved.min()) + 1

@of("07", "1")
def _(field):
    draw = np.random.default_rng(12)
    rows = [((3, 1, 3, 3), (1, 1, 1, 1), (1, 1, 1, 1)), ((3,), (2,), (1,)), ((3, 3, 3, 3), (2, 2, 2, 1), (1, 1, 1, 1)), ((3, 1, 3, 3, 5), (1,) * 5, (1, 1, 1, 1, 2))]
    rows += [tuple(tuple(int(v) for v in draw.integers(1, 4, n)) for _ in range(3)) for n in (1, 2, 3, 4, 4, 5)]
    for row in rows:
        got, want = _number(field(*row)), _reach(*row)
        if got == want: continue
        if got == want - 1: raise Wrong("one is missing: before the first layer a position sees itself")
        k, s, d = row
        if set(d) == {1} and set(s) == {1}: raise Wrong(f"for kernels {k} it is {'more' if got < want else 'less'}; each layer adds one less than its kernel")
        later = 1 + sum(dd * (kk - 1) * math.prod(s[:i + 1]) for i, (kk, dd) in enumerate(zip(k, d)))
        if got == later: raise Wrong("the stride of a layer widens the steps of the layers *after* it, not its own")
        raise Wrong(f"for kernels {k}, strides {s}, dilations {d} the gradient reaches {'further' if got < want else 'less far'}")

@of("07", "1b")
def _(kernels):
    from mbd.local_stream import LocalStream, gradient_field
    try: kernels = tuple(int(k) for k in kernels); stream = LocalStream(2, widths=(4, 4, 4, 4), temporal_kernels=kernels)
    except (TypeError, ValueError) as error: raise Wrong(str(error)) from None
    torch.manual_seed(0)
    seen = gradient_field(stream, torch.randn(3, 33, 24, 24)).amax((1, 2)).nonzero()
    frames = 2 * int(seen.max() - seen.min()) + 1
    if frames != 17: raise Wrong(f"measured by gradient, this network sees {'more' if frames > 17 else 'fewer'} frames at once")

@of("07", "1c")
def _(answer): _choice("07", "1c", answer, "0efb04e1c158", "compare 17 frames with `miniactions.required_range('SameHand')`")

@of("07", "2")
def _(weights, bias):
    weights, bias = _array(weights), _number(bias, "the bias")
    if weights.shape != (2,): raise Wrong(f"two weights are asked for, one for each channel, not an array of shape {weights.shape}")
    for name, x in _HANDS.items():
        score = float(x.max(0) @ weights + bias)
        if abs(score) < 1e-9: raise Wrong(f"{name}: the score is exactly 0, which is no answer")
        if (score > 0) != (name[0] == name[1]): raise Wrong(f"{name[0]} then {name[1]}: the score is {score:+.2g}, on the wrong side of 0")
    return "all four films are answered rightly"

_HANDS = {(a, b): np.array([[float(t == 1 and a == side or t == 6 and b == side) for side in ("left", "right")] for t in range(8)]) for a in ("left", "right") for b in ("left", "right")}

@of("07", "2b")
def _(answer): _choice("07", "2b", answer, "93f3fabdc37e", "write down the means of the four films as points in the plane, and look for a line with two of them on each side")

class _Zeros(torch.nn.Module):
    "A stream of one channel whose stages pad time by zeros or by the end frames."
    def __init__(self, kernels, mode):
        super().__init__()
        self.kernels, self.mode = kernels, mode

    def forward(self, x):
        x = x.mean(1, keepdim=True)
        for k in self.kernels:
            ends = (0, 0, 0, 0, k // 2, k // 2)
            x = F.conv3d(F.pad(x, ends, mode="replicate") if self.mode == "replicate" else F.pad(x, ends), torch.full((1, 1, k, 1, 1), 1 / k))
        return SimpleNamespace(stages={"first": x * 0, "last": x})

@of("07", "3")
def _(moments):
    clip = torch.full((1, 3, 16, 4, 4), 0.7)
    for kernels in ((3,), (3, 1, 3, 3), (5, 3)):
        for mode, want in (("replicate", 0), ("zeros", 2 * sum(k // 2 for k in kernels))):
            got = _number(moments(_Zeros(kernels, mode), clip))
            if got == want: continue
            if got == 16 - want: raise Wrong("these are the moments that do *not* differ from the middle one")
            if got == want // 2: raise Wrong("a video has two ends")
            raise Wrong(f"a still video through kernels {kernels} with {mode} at the ends: {'more' if got < want else 'fewer'} moments of the *last* stage differ from the middle one")

@of("07", "3b")
def _(zeros, repeated):
    return "; ".join(_guess(got, 2 * (1 + 0 + 1 + 1) * on, 0.1, what, "{:.0f} of 16") for got, on, what in ((zeros, 1, "with zeros"), (repeated, 0, "with end frames repeated")))

@of("07", "3c")
def _(answer): _choice("07", "3c", answer, "45d228f92eac", "give each window two facts, which hand and whether it is early or late. Its vote is a function of these; the answer is the sum of two votes. Can a sum of f(early, hand 1) and g(late, hand 2) be an exclusive or?")

@of("07", "4")
def _(FrameNet):
    from mbd.local_stream import gradient_field
    torch.manual_seed(1)
    net = (FrameNet(5) if isinstance(FrameNet, type) else FrameNet.__wrapped__(5)).eval()
    clip = torch.randn(2, 3, 6, 64, 64)
    with torch.no_grad(): out = _given(net(clip))
    for name in ("logits", "embedding", "stages"):
        if _empty(getattr(out, name, None)): raise Wrong(f"the output has no {name}; a stream returns StreamOutput(logits, embedding, stages)")
    if out.logits.shape != (2, 5): raise Wrong(f"logits of two clips and five classes have shape (2, 5), not {tuple(out.logits.shape)}")
    for name, stage in out.stages.items():
        if stage.ndim != 5 or stage.shape[0] != 2: raise Wrong(f"stage {name!r} has shape {tuple(stage.shape)}; a stage is (B, C, T', H', W'), so fold the frames back")
    if next(reversed(out.stages.values())).shape[2] != 6: raise Wrong("the last stage should have one moment for each of the six frames")
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad(): moved, one = net(clip[:, :, order]), net(clip[:1])
    if not torch.allclose(moved.logits, out.logits, atol=1e-4): raise Wrong("the answer changes when frames change places: a frame must be read alone, and all must be averaged")
    if not torch.allclose(one.logits, out.logits[:1], atol=1e-4): raise Wrong("the answer to a clip depends on the other clips of the batch: batch and time were mixed up")
    if torch.allclose(out.logits[0], out.logits[1], atol=1e-6): raise Wrong("two different clips get the same answer")
    seen = gradient_field(net, clip[0]).amax((1, 2)).nonzero()
    if len(seen) != 1: raise Wrong(f"one position of the last stage sees {len(seen)} frames")
    return "its field in time is one frame"

@of("07", "4b")
def _(guess):
    if 0.53 < _number(guess) < 0.8: raise Wrong("a threshold on the mean vote that is set by hand is right more often than not in some pairs. Does cross-entropy lead there, when the mean vote is on average the same for both twins?")
    _guess(guess, 0.5, 0.03, "the accuracy")
    return "five pairs told apart, and a coin tossed within each"


# ---- 08: the global stream

def _measured_multiplications(tokens, width, expansion):
    from torch.utils.flop_counter import FlopCounterMode
    from mbd.global_stream import Block, attention
    block, x = Block(width, 2, expansion), torch.randn(1, tokens, width)
    def count(run):
        with torch.no_grad(), FlopCounterMode(display=False) as counter: run()
        return counter.get_total_flops() // 2
    q, k, v = block.queries_keys_values(x)
    return count(lambda: attention(q, k, v, fused=False)), count(lambda: (block.qkv(x), block.out(x))), count(lambda: block.mlp(x))

@of("08", "1")
def _(multiplications):
    for tokens, width, expansion in [(72, 96, 2), (10, 8, 4), (300, 16, 1)]:
        got, want = multiplications(tokens, width, expansion), _measured_multiplications(tokens, width, expansion)
        if len(got) != 3: raise Wrong(f"three numbers are asked for, not {len(got)}")
        for name, g, w in zip(("the two products of attention", "the projections", "the perceptron"), got, want):
            if _number(g) == w: continue
            if g == 2 * w: raise Wrong(f"{name}: twice as many as counted; a multiplication with its addition counts once")
            if w % g == 0 and g > 0: raise Wrong(f"{name}: there are more matrices than one; counted in the code it is {w // g} times as much")
            raise Wrong(f"{name}: for {tokens} tokens of width {width} and expansion {expansion} counting in the code gives {'more' if g < w else 'less'}")

@of("08", "1b")
def _(grid, growth):
    total = lambda g: 2 * (8 * g * g) ** 2 * 96 + 8 * (8 * g * g) * 96 ** 2
    overtakes = next(g for g in range(1, 40) if 2 * (8 * g * g) ** 2 * 96 > 4 * (8 * g * g) * 96 ** 2)
    return "; ".join([_guess(grid, overtakes, 0.1, "the grid", "{:.0f}"), _guess(growth, total(6) / total(3), 0.3, "the growth from 3 to 6", "{:.2f} times")])

@of("08", "2")
def _(without_time):
    from mbd.global_stream import GlobalStream
    torch.manual_seed(2)
    stream, clip = GlobalStream(4).eval(), torch.randn(2, 3, 8, 28, 28)
    kept = {name: value.clone() for name, value in stream.state_dict().items()}
    blind = without_time(stream)
    if any((stream.state_dict()[name] != value).any() for name, value in kept.items()): raise Wrong("the stream that was handed in was changed; work on a copy (copy.deepcopy)")
    with torch.no_grad():
        before, plain = stream(clip).logits, blind.eval()(clip).logits
        orders = [blind(clip[:, :, order]).logits for order in (torch.arange(8).flip(0), torch.tensor([3, 1, 7, 0, 6, 2, 5, 4]))]
        places = blind(clip.flip(-1)).logits
    if not all(torch.allclose(plain, other, atol=1e-5) for other in orders): raise Wrong(f"it still knows the order: turning the frames round moves its logits by {(plain - orders[0]).abs().max():.2g}")
    if torch.allclose(plain, places, atol=1e-5) or (blind.place == 0).all(): raise Wrong("it has forgotten the places too; only time was to go")
    if torch.allclose(plain[0], plain[1], atol=1e-6): raise Wrong("it gives the same answer to two different clips")
    moved = [name for name, value in kept.items() if (blind.state_dict()[name] != value).any()]
    if len(moved) > 1: raise Wrong(f"{len(moved)} tensors were changed; one is enough")

@of("08", "2b")
def _(lost):
    from mbd.miniactions import CLASSES
    got = _subset(lost, CLASSES[4:], "class that the whole stream can tell from its twin")
    if _salted("08", "2b", got) != "1950dacc7540": raise Wrong("shuffle the frames of a video in your mind: does what is left still tell the class from its twin? A bag of frames knows that both hands were raised, and not which one first")

@of("08", "3")
def _(window_mask):
    from mbd.global_stream import attention_weights
    for n, radius in [(8, 1), (5, 0), (6, 3), (4, 9)]:
        mask = window_mask(n, radius)
        if not isinstance(mask, torch.Tensor) or mask.shape != (n, n): raise Wrong(f"a tensor of shape ({n}, {n}) is asked for, not {type(mask).__name__} {tuple(getattr(mask, 'shape', ()))}")
        near = (torch.arange(n)[:, None] - torch.arange(n)).abs() <= radius
        if torch.isnan(mask.float()).any(): raise Wrong("it holds NaN: 0 times minus infinity is not a number")
        if mask.dtype == torch.bool or (mask[near] == 1).all(): raise Wrong("it is *added* to the scores: 0 where a token may look, not 1 or True")
        weights = attention_weights(torch.zeros(n, 4), torch.zeros(n, 4), mask)
        if torch.isnan(weights).any(): raise Wrong("some token may look nowhere, not even at itself")
        if (weights[~near] > 0).any(): raise Wrong(f"{int((weights[~near] > 0).sum())} pairs further than {radius} apart still read each other")
        if not torch.allclose(weights[near], (near / near.sum(1, keepdim=True))[near]): raise Wrong("within the window nothing may be preferred: add 0 there")

@of("08", "3b")
def _(blocks):
    def needed(n, radius):
        hop, reach, count = (np.abs(np.subtract.outer(np.arange(n), np.arange(n))) <= radius), np.eye(n, dtype=bool), 0
        while not reach.all(): reach, count = reach @ hop, count + 1
        return count
    for n, radius in [(8, 1), (8, 3), (8, 7), (16, 1), (9, 2), (1, 1)]:
        got, want = _number(blocks(n, radius)), needed(n, radius)
        if got == want: continue
        if got == math.ceil((n - 1) / (2 * radius)): raise Wrong("from the middle that is enough; the first token must hear of the last one too")
        raise Wrong(f"{n} frames, radius {radius}: {'more' if got < want else 'fewer'}")

@of("08", "3c")
def _(joint, divided):
    for what, got, want in (("joint", joint, (8 * 196) ** 2), ("divided", divided, 8 * 196 * (8 + 196))):
        if _number(got) != want: raise Wrong(f"{what}: {'more' if got < want else 'fewer'} pairs")
    return f"joint attention compares {(8 * 196) / (8 + 196):.1f} times as many"

def _time_attention(zero_values):
    from mbd.global_stream import TimeAttention
    torch.manual_seed(3)
    layer, x = TimeAttention(12, 2), torch.randn(2, 4, 3, 12)
    if zero_values:
        with torch.no_grad(): layer.qkv.weight[24:] = 0; layer.qkv.bias[24:] = 0
    (x + layer(x)).square().sum().backward()
    return {name for name, p in layer.named_parameters() if p.grad.abs().max() > 1e-7}

@of("08", "4")
def _(moves):
    got, want = _subset(moves, ("norm.weight", "norm.bias", "qkv.weight", "qkv.bias", "out.weight", "out.bias"), "parameter of TimeAttention"), _time_attention(False)
    if got != want: raise Wrong(f"{len(got - want)} of yours have a gradient of zero, {len(want - got)} that move are missing. What stands between each of them and the loss?")

@of("08", "4b")
def _(moves):
    got, want = _subset(moves, ("norm.weight", "norm.bias", "qkv.weight", "qkv.bias", "out.weight", "out.bias"), "parameter of TimeAttention"), _time_attention(True)
    if got != want: raise Wrong(f"{len(got - want)} of yours have a gradient of zero, {len(want - got)} that move are missing. The gradient of a matrix is what arrives from above times what comes in from below")


# ---- 09: dominance

@of("09", "1")
def _(shares):
    from mbd.dominance import share
    draw = torch.Generator().manual_seed(4)
    for size in (1.0, 5.0, 400.0):
        local, global_ = (size * torch.randn(50, 6, generator=draw) for _ in range(2))
        labels, T = torch.randint(6, (50,), generator=draw), (1.7, 0.6)
        at = lambda z, t: (z.double() / t).log_softmax(1).gather(1, labels[:, None])[:, 0]
        got, want = shares(local, global_, labels, *T), share(at(local, T[0]), at(global_, T[1]))
        if size > 100 and not torch.isfinite(torch.as_tensor(got)).all(): raise Wrong("logits of some hundreds give NaN: both probabilities of the true class round to zero; stay in logarithms")
        if torch.as_tensor(got).shape == want.shape:
            for t, what in (((1, 1), "without its temperatures"), (T[::-1], "with the temperatures of the two streams exchanged")):
                if np.allclose(_array(got), _array(share(at(local, t[0]), at(global_, t[1]))), atol=1e-5): raise Wrong(f"this is the share {what}")
        _same(got, want, "the share")

@functools.cache
def _simulated():
    from mbd.dominance import fit_temperature, simulate_streams
    sim = simulate_streams()
    return sim, fit_temperature(sim.local, sim.labels), fit_temperature(sim.global_, sim.labels)

@of("09", "2")
def _(answer):
    from mbd.dominance import measure
    sim, T_local, T_global = _simulated()
    before, after = (measure(z / T_local, sim.global_ / T_global, sim.labels, sim.sources, sim.classes).reference for z in (sim.local, 5 * sim.local))
    if str(answer).strip().lower() not in ("rises", "falls"): raise Wrong('answer "rises" or "falls"')
    if str(answer).strip().lower() != ("rises" if after > before else "falls"): raise Wrong("where it is right it can win little, for its probability was near one before. And where it is wrong?")
    return f"measured: the local stream's overall share goes from {before:.3f} to {after:.3f}"

def _weighted(videos, weight):
    videos = _array(videos)
    if videos.ndim != 2 or videos.shape[1] != 2 or not 1 <= len(videos) <= 8: raise Wrong(f"one to eight pairs (p_L, p_G) are asked for, not an array of shape {videos.shape}")
    if (videos <= 0).any() or (videos >= 1).any(): raise Wrong("probabilities lie between 0 and 1, without the ends")
    return float((videos[:, 0] / videos.sum(1) * weight(videos)).sum() / weight(videos).sum())

_PLAIN, _MOST, _PRODUCT = (lambda v: np.ones(len(v))), (lambda v: v.max(1)), (lambda v: v.prod(1))

@of("09", "3")
def _(videos):
    plain, weighted = _weighted(videos, _PLAIN), _weighted(videos, _MOST)
    if plain <= 0.65: raise Wrong(f"the plain mean share is {plain:.2f}; it should call the class local, above 0.65")
    if weighted >= 0.35: raise Wrong(f"the share weighted by max(p_L, p_G) is {weighted:.2f}; it should say global, below 0.35")
    return f"plain {plain:.2f}, weighted {weighted:.2f}"

@of("09", "3b")
def _(videos):
    weighted, product = _weighted(videos, _MOST), _weighted(videos, _PRODUCT)
    if weighted <= 0.65: raise Wrong(f"weighted by max(p_L, p_G) the share is {weighted:.2f}; it should call the class local, above 0.65")
    if not 0.45 <= product <= 0.55: raise Wrong(f"weighted by the product the share is {product:.2f}; it should see a balanced class, 0.45 to 0.55")
    return f"by the maximum {weighted:.2f}, by the product {product:.2f}"

def no_dominance(seed, classes=8, sources=10, videos=8):
    "Shares (N,), labels (N,) and sources of a world in which no class is dominant: shares scatter around one half, by source and by video."
    draw = torch.Generator().manual_seed(seed)
    source = torch.arange(classes * sources).repeat_interleave(videos)
    scatter = torch.randn(classes * sources, generator=draw)[source] + 0.5 * torch.randn(len(source), generator=draw)
    return torch.sigmoid(scatter).double(), source // sources, [f"g{s}" for s in source.tolist()]

def _called(share, labels, sources):
    from mbd.dominance import class_share, groups, share_interval
    weight, k = torch.ones_like(share), int(labels.max()) + 1
    low, high, _ = share_interval(share, weight, labels, sources, k, resamples=300)
    return float(np.mean([g != "balanced" for g in groups(low, high, class_share(share, weight, labels, k)[2])]))

@functools.cache
def _calls():
    worlds = [no_dominance(seed) for seed in range(15)]
    return [float(np.mean([_called(s, y, names(sources)) for s, y, sources in worlds])) for names in (lambda s: s, lambda s: [str(i) for i in range(len(s))])]

@of("09", "4")
def _(by_source, by_video):
    return "; ".join(_guess(got, truth, tolerance, what, "{:.0%} of the classes") for got, truth, tolerance, what in ((by_source, _calls()[0], 0.06, "by source"), (by_video, _calls()[1], 0.15, "by video")))

@of("09", "4b")
def _(called):
    for seed, shift in itertools.product((101, 102), (0.0, 0.8)):      # one stream may be the better one everywhere: that is no direction
        share, labels, sources = no_dominance(seed)
        share = torch.sigmoid(torch.logit(share) + shift)
        for names in (sources, [str(i) for i in range(len(sources))]):
            got, want = _number(called(share, labels, names)), _called(share, labels, names)
            if abs(got - want) <= 1 / 8 + 1e-9: continue                  # another number of resamples may turn one class
            if abs(got - (1 - want)) <= 1 / 8: raise Wrong("this is the fraction of balanced classes")
            raise Wrong(f"it finds {'more' if got > want else 'fewer'} classes with a direction than the reference run; a class has one if its interval leaves out the share of all videos")

def leaked(part, seed=0):
    "The simulated streams of the chapter, where the global stream has seen `part` of the videos while it was trained: .local, .global_, .labels, .sources, .classes."
    from mbd.dominance import simulate_streams
    clean, seen = simulate_streams(), simulate_streams(memory=(0.0, 3.0))
    hit = torch.from_numpy(np.random.default_rng(seed).permutation(len(clean.labels)) < round(part * len(clean.labels)))
    clean.global_ = torch.where(hit[:, None], seen.global_, clean.global_)
    return clean

@of("09", "5")
def _(fall, any_group_changes):
    from mbd.dominance import fit_temperature, measure
    def found(part):
        sim = leaked(part)
        return measure(sim.local / fit_temperature(sim.local, sim.labels), sim.global_ / fit_temperature(sim.global_, sim.labels), sim.labels, sim.sources, sim.classes)
    maps = [found(part / 10) for part in range(11)]
    note = _guess(fall, float(maps[0].share[0] - maps[-1].share[0]), 0.03, "the fall of the share")
    if bool(any_group_changes) != any(m.group != maps[0].group for m in maps): raise Wrong("the fall is right. Now compare `group` of the eleven maps, class by class")
    return note


# ---- 10: distillation

@of("10", "1")
def _(gradient):
    from mbd.distillation import soft_kl
    draw = torch.Generator().manual_seed(5)
    for T in (1.0, 2.0, 4.0, 0.5):
        student, teacher = (2 * torch.randn(7, 5, generator=draw) for _ in range(2))
        free = student.clone().requires_grad_()
        soft_kl(free, teacher, T).sum().backward()
        got = torch.as_tensor(gradient(student, teacher, T))
        if got.shape == free.grad.shape and T != 1:
            for factor, words in ((1 / T, "one factor T is missing"), (1 / T**2, "the factor T squared of the loss is missing"), (T, "there is one factor T too many: the chain rule divides by T"), (1 / len(student), "this is the gradient of the batch mean; each sample's own is asked for")):
                if torch.allclose(got, factor * free.grad, atol=1e-5): raise Wrong(words)
        _same(got, free.grad, "the gradient", 1e-4)

@of("10", "1b")
def _(factor):
    draw = torch.Generator().manual_seed(6)
    q, p = torch.randn(8, 101, generator=draw).log_softmax(1), torch.randn(8, 101, generator=draw).softmax(1)
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _guess(factor, float(F.kl_div(q, p, reduction="batchmean") / F.kl_div(q, p, reduction="mean")), 0.5, "the factor", "{:.0f}")

@of("10", "2")
def _(random_arm):
    codes = torch.tensor([1] * 900 + [0] * 500 + [-1] * 700)[torch.randperm(2100, generator=torch.Generator().manual_seed(7))]
    draws = [_given(random_arm(codes.clone(), torch.Generator().manual_seed(seed))) for seed in (0, 0, 1)]
    for to_global, to_local in draws:
        to_global, to_local = torch.as_tensor(to_global).double(), torch.as_tensor(to_local).double()
        if to_global.shape != codes.shape or to_local.shape != codes.shape: raise Wrong(f"two masks of shape {tuple(codes.shape)} are asked for")
        if not set(torch.cat([to_global, to_local]).unique().tolist()) <= {0.0, 1.0}: raise Wrong("a mask holds 0 and 1 (or False and True)")
        if (to_global + to_local)[codes == 0].any(): raise Wrong("on a balanced video nobody teaches: the arm must have exactly the lessons of `directed`")
        if ((to_global + to_local)[codes != 0] != 1).any(): raise Wrong("a video of a dominant class is one lesson: one stream teaches, not both and not none")
        for code, name in ((1, "local"), (-1, "global")):
            part = float(to_global[codes == code].mean())
            if not 0.42 < part < 0.58: raise Wrong(f"on videos of {name} classes the local stream teaches in {part:.0%} of the cases; a direction drawn at random would be near one half in *each* group")
    if not torch.equal(torch.as_tensor(draws[0][0]).double(), torch.as_tensor(draws[1][0]).double()): raise Wrong("the same generator state gives two different arms: draw from the generator that is handed in")
    if torch.equal(torch.as_tensor(draws[0][0]).double(), torch.as_tensor(draws[2][0]).double()): raise Wrong("every seed draws the same directions")

@of("10", "3")
def _(student, teacher):
    from mbd.distillation import relation_loss
    maps = [torch.as_tensor(_array(m)) for m in (student, teacher)]
    for name, m in zip(("student", "teacher"), maps):
        if m.ndim != 5 or len(m) < 4: raise Wrong(f"the {name}'s map should be (B, C, T, H, W) with B of 4 or more, not {tuple(m.shape)}")
        if (m < 0).any(): raise Wrong(f"the {name}'s features are negative somewhere; after a ReLU none is")
    if len(maps[0]) != len(maps[1]): raise Wrong("both maps show the same videos: their B must agree")
    u = [F.normalize(m.mean((2, 3, 4)), dim=1) for m in maps]
    plain = float((u[0] @ u[0].T - u[1] @ u[1].T).square().mean())
    centred = float(relation_loss(*maps))
    if plain >= 0.001: raise Wrong(f"without centring the loss is {plain:.3g}; it should be below 0.001")
    if centred <= 0.5: raise Wrong(f"with centring it is {centred:.3g}; the two should see different classes, so that it is above 0.5")
    return f"without centring {plain:.1e}, with it {centred:.2f}"

@of("10", "4")
def _(coverage):
    from mbd.distillation import cell_overlap
    draw = np.random.default_rng(13)
    for n in range(20):
        wanted, given = (np.sort(draw.uniform(0, 100, int(draw.integers(2, 9)))) for _ in range(2))
        want = cell_overlap(torch.tensor(wanted)[None], torch.tensor(given)[None])[0].sum(1)
        got = _array(coverage(wanted, given))
        if got.shape == tuple(want.shape) and (got < -1e-9).any(): raise Wrong("a fraction is negative: cells that do not meet have nothing in common")
        if got.shape == tuple(want.shape) and np.allclose(got, _array(want) * np.diff(wanted)) and not np.allclose(got, _array(want)): raise Wrong("these are lengths, in frames; divide by the length of the wanted cell")
        _same(got, want, "the coverage")

@functools.cache
def _long_video():
    from mbd.clips import LOCAL_VIEW, View, draw, sample
    from mbd.distillation import cell_edges, cell_overlap
    segments = View(8, 4, 28, sampling="segments")
    where = draw((300, 64, 64), [LOCAL_VIEW, segments])
    edges = [cell_edges(*(torch.tensor([t]) for t in sample(300, view, where)[1:]), view.frames, 8)[0] for view in (LOCAL_VIEW, segments)]
    return edges, cell_overlap(edges[1][None], edges[0][None])[0].sum(1), float((edges[0][1:] + edges[0][:-1] - edges[1][1:] - edges[1][:-1]).abs().max() / 2)

@of("10", "4b")
def _(met, best): return "; ".join([_guess(met, int((_long_video()[1] > 0).sum()), 0.1, "cells met", "{:.0f}"), _guess(best, float(_long_video()[1].max()), 0.1, "the largest coverage")])

@of("10", "4c")
def _(worst): return _guess(worst, _long_video()[2], 6, "the error", "{:.0f} frames")

def _pull(detach, steps=300, rate=0.5):
    teacher, student = (torch.tensor([v], requires_grad=True) for v in ([3.0, 0.0, 0.0], [0.0, 3.0, 0.0]))
    for _ in range(steps):
        lesson = teacher.detach() if detach else teacher
        loss = F.kl_div(student.log_softmax(1), lesson.log_softmax(1), reduction="sum", log_target=True)
        grads = torch.autograd.grad(loss, [student, teacher], allow_unused=True)
        with torch.no_grad():
            for z, g in zip((student, teacher), grads): z -= rate * (0 if g is None else g)
    return [float(z.softmax(1)[0, 0].detach()) for z in (teacher, student)]

@of("10", "5")
def _(guess_detached, guess_free):
    return "; ".join(_guess(got, _pull(detach)[0], 0.1, f"the teacher's belief in the truth, {what}") for got, detach, what in ((guess_detached, True, "detached"), (guess_free, False, "not detached")))

@of("10", "5b")
def _(pull):
    for detach in (True, False):
        got, want = pull(detach), _pull(detach)
        if len(got) != 2: raise Wrong("two numbers are asked for: the teacher's and the student's belief in class 0")
        for what, g, w in zip(("teacher", "student"), got, want):
            if abs(_number(g) - w) > 0.01: raise Wrong(f"detach = {detach}: the {what} should believe {'more' if g < w else 'less'} in the truth after 300 steps of size 0.5")


# ---- 11: fusion

@of("11", "1")
def _(weight):
    from mbd.fusion import AdaptiveFusion
    draw = torch.Generator().manual_seed(8)
    for slope, bias in [(1.0, 0.0), (5.0, 0.3), (-2.0, 1.0)]:
        local, global_ = ((3 * torch.randn(40, 6, generator=draw)).softmax(1) for _ in range(2))
        logit_share = torch.randn(6, generator=draw)
        fusion = AdaptiveFusion(logit_share); fusion.slope.fill_(slope); fusion.bias.fill_(bias)
        got, want = torch.as_tensor(weight(local, global_, logit_share, slope, bias)), fusion.weight(local, global_)
        if got.shape == want.shape and not torch.allclose(got, want, atol=1e-5):
            for p, words in ((local, "the expectation is under the mean of both predictions, not under the local stream's"), (global_, "the expectation is under the mean of both predictions, not under the global stream's")):
                if torch.allclose(got, torch.sigmoid(slope * (p @ logit_share) + bias), atol=1e-5): raise Wrong(words)
            if torch.allclose(got, torch.sigmoid(slope * logit_share[(local + global_).argmax(1)] + bias), atol=1e-5): raise Wrong("this is the share of the most probable class; an *expectation* over all classes is asked for")
            if torch.allclose(got, slope * ((local + global_) / 2 @ logit_share) + bias, atol=1e-5): raise Wrong("these are log-odds; a weight lies between 0 and 1")
        _same(got, want, "the weight")

@of("11", "1b")
def _(as_mean, as_scalar, as_share):
    from mbd.fusion import AdaptiveFusion
    draw, certain = torch.Generator().manual_seed(9), torch.eye(4)
    logit_share, p = torch.randn(4, generator=draw), torch.randn(30, 4, generator=draw).softmax(1)
    fusion = AdaptiveFusion(logit_share)
    for what, values, pair, want in (("the mean", as_mean, (p, p.flip(1)), torch.full((30,), 0.5)), ("one scalar of 0.7", as_scalar, (p, p.flip(1)), torch.full((30,), 0.7)), ("the share of a class that both are certain of", as_share, (certain, certain), logit_share.sigmoid())):
        if len(values) != 2: raise Wrong(f"{what}: a slope and a bias are asked for")
        fusion.slope.fill_(_number(values[0])); fusion.bias.fill_(_number(values[1]))
        if not torch.allclose(fusion.weight(*pair), want, atol=2e-3): raise Wrong(f"{what}: the weights go from {float(fusion.weight(*pair).min()):.2f} to {float(fusion.weight(*pair).max()):.2f} with slope {values[0]:g} and bias {values[1]:.3g}")

@functools.cache
def trained_pair():
    "The stored pair, calibrated: .logit_share, .gate, .test (each (p_local, p_global, labels))."
    from mbd.dominance import fit_temperature, measure
    part = stored()
    m = part["map"]
    T = fit_temperature(m.local, m.labels), fit_temperature(m.global_, m.labels)
    p = lambda r: ((r.local / T[0]).softmax(1), (r.global_ / T[1]).softmax(1), r.labels)
    return SimpleNamespace(logit_share=measure(m.local / T[0], m.global_ / T[1], m.labels, m.sources, m.classes).logit_share, gate=p(part["gate"]), test=p(part["test"]))

@functools.cache
def _fit_on(videos, strength):
    from mbd.fusion import AdaptiveFusion
    pair, slopes, found = trained_pair(), [], []
    for seed in range(10):
        some = torch.randperm(len(pair.gate[2]), generator=torch.Generator().manual_seed(seed))[:videos]
        fusion = AdaptiveFusion(pair.logit_share).fit(*(x[some] for x in pair.gate), strength=strength)
        slopes.append(fusion.slope.item()); found.append(-fusion(*pair.test[:2]).gather(1, pair.test[2][:, None]).log().mean().item())
    return float(np.median(slopes)), max(found)

@of("11", "2")
def _(fit_on):
    for videos, strength in [(5, 0.1), (5, 0.0), (80, 0.1)]:
        got, want = fit_on(videos, strength), _fit_on(videos, strength)
        if len(got) != 2: raise Wrong("two numbers are asked for: the median slope and the largest test NLL")
        for what, g, w, tolerance in zip(("median slope", "largest test NLL"), got, want, (max(1.0, 0.2 * abs(want[0])), 0.02)):
            if abs(_number(g) - w) > tolerance: raise Wrong(f"{videos} videos, strength {strength}: the {what} should be {'larger' if g < w else 'smaller'}; ten draws, each by `torch.randperm` from a generator with the seeds 0 to 9")
    return "largest of ten test NLLs: " + ", ".join(f"{n} videos {_fit_on(n, 0.0)[1]:.3f} without and {_fit_on(n, 0.1)[1]:.3f} with the pull" for n in (5, 80))

@of("11", "2b")
def _(answer): _choice("11", "2b", answer, "66226516ba20", "look at the slopes for 5, 20 and 80 videos without the pull: do they settle? Then think of a regression whose two classes can be separated without a mistake")

@of("11", "3")
def _(ambiguity):
    draw = torch.Generator().manual_seed(10)
    for w in (0.5, 0.2, 0.9):
        local, global_ = ((2 * torch.randn(30, 5, generator=draw)).softmax(1).double() for _ in range(2))
        want = -(local ** w * global_ ** (1 - w)).sum(1).log()
        got = torch.as_tensor(ambiguity(local, global_, w))
        if got.shape == want.shape and (got < -1e-9).any(): raise Wrong("an ambiguity is never negative")
        if got.shape == want.shape and w != 0.5 and torch.allclose(got, -(local ** (1 - w) * global_ ** w).sum(1).log(), atol=1e-6): raise Wrong("w is the weight of the local stream")
        _same(got, want, "the ambiguity")
        pooled = (local ** w * global_ ** (1 - w)); pooled = pooled / pooled.sum(1, keepdim=True)
        assert torch.allclose(-pooled.log(), -w * local.log() - (1 - w) * global_.log() - want[:, None])
    return "for every label: NLL of the pool = weighted NLL of the streams - your number"

@of("11", "3b")
def _(streams, pool):
    pair = trained_pair(); at = lambda z: float(-z.log_softmax(1).gather(1, pair.test[2][:, None]).mean())
    a, b = (p.log() for p in pair.test[:2]); half = (0.75 * a + 0.25 * b, 0.25 * a + 0.75 * b)
    truth = {"the streams' mean NLL": (at(a) + at(b), at(half[0]) + at(half[1])), "the NLL of the pool": (at(a / 2 + b / 2), at(half[0] / 2 + half[1] / 2))}
    for (what, (before, after)), got in zip(truth.items(), (streams, pool)):
        want = "stays" if abs(after - before) < 1e-6 else "falls" if after < before else "rises"
        if str(got).strip().lower() not in ("falls", "stays", "rises"): raise Wrong(f'{what}: answer "falls", "stays" or "rises"')
        if str(got).strip().lower() != want: raise Wrong(f"{what} does something else. The pool works on the mean of the two streams' log-probabilities: has it moved?")
    return "measured: " + "; ".join(f"{what} {before / (1 + ('mean' in what)):.3f} -> {after / (1 + ('mean' in what)):.3f}" for what, (before, after) in truth.items())

@functools.cache
def _swapped():
    from mbd.fusion import AdaptiveFusion, MeanFusion, corrupt
    pair = trained_pair(); local, global_, labels = pair.test
    adaptive, bad = AdaptiveFusion(pair.logit_share).fit(*pair.gate), lambda p: corrupt(p, "swap", 1.0)
    top1 = lambda p: float((p.argmax(1) == labels).double().mean())
    return top1(MeanFusion()(local, bad(global_))), top1(adaptive(local, bad(global_))), top1(adaptive(bad(local), global_))

@of("11", "4")
def _(mean_global, adaptive_global, adaptive_local):
    names = ("the mean, global answers swapped", "adaptive, global answers swapped", "adaptive, local answers swapped")
    return "; ".join(_guess(got, truth, 0.1, what) for got, truth, what in zip((mean_global, adaptive_global, adaptive_local), _swapped(), names))


# ---- 14: evaluation

def _right_class(p, y=0):
    p = _array(p)
    if p.shape != (3,): raise Wrong(f"three probabilities are asked for, not an array of shape {p.shape}")
    if (p < 0).any() or abs(p.sum() - 1) > 1e-6: raise Wrong("each vector must be at least 0 everywhere and sum to 1")
    return p

@of("14", "1")
def _(local, global_):
    local, global_ = _right_class(local), _right_class(global_)
    for name, p in (("local", local), ("global", global_)):
        if p[0] >= max(p[1:]) - 1e-9: raise Wrong(f"the {name} stream is already right, or ties: class 0 must not be its first choice")
    both = (local + global_) / 2
    if both[0] <= max(both[1:]) + 1e-9: raise Wrong(f"their mean answers class {both.argmax() if both.max() > both[0] else 'with a tie'}; class 0 has {both[0]:.2f}, the best other {max(both[1:]):.2f}")
    return "the oracle counts this video as lost, and the mean gets it right"

def rooms(seed, sources=60, videos=15, spread=2.0):
    "Right or wrong (N,) bool and source (N,) of a test set: each source has its own probability of being answered rightly, 0.8 on average; a larger spread makes sources more alike."
    draw = np.random.default_rng(seed)
    chance = draw.beta(0.8 * spread, 0.2 * spread, sources)
    return draw.random((sources, videos)).ravel() < np.repeat(chance, videos), np.repeat(np.arange(sources), videos)

@of("14", "2")
def _(source_interval):
    from mbd.evaluation import interval
    for seed, kind in [(1, "equal"), (2, "equal"), (3, "unequal")]:
        right, sources = rooms(seed)
        if kind == "unequal": keep = np.random.default_rng(seed).random(len(right)) < np.linspace(0.1, 1, 60)[sources]; right, sources = right[keep], sources[keep]
        order = np.random.default_rng(seed).permutation(len(right)); right, sources = right[order], sources[order]
        low, high = (_number(v, "each end") for v in source_interval(right, sources))
        _, l, h = interval(right, sources); _, naive_l, naive_h = interval(right, None)
        if low > high: raise Wrong("the lower end comes first")
        width, want, naive = high - low, h - l, naive_h - naive_l
        if abs(width - naive) < 0.2 * naive and want > 1.5 * naive: raise Wrong("it is as narrow as if all videos were independent: draw sources, and take all videos of each one drawn")
        if not 0.85 < width / want < 1.15 or abs(low - l) > 0.015 or abs(high - h) > 0.015: raise Wrong(f"it is {'wider' if width > want else 'narrower'} than the reference" if not 0.85 < width / want < 1.15 else "its ends lie elsewhere; with sources of unequal size the accuracy of a draw is (videos right) / (videos), over all drawn")

@of("14", "2b")
def _(alike, unlike):
    from mbd.evaluation import interval
    def factor(spread):
        widths = []
        for seed in range(5):
            right, sources = rooms(seed, spread=spread)
            (_, l, h), (_, a, b) = interval(right, sources), interval(right, None); widths.append((h - l) / (b - a))
        return float(np.mean(widths))
    return "; ".join(_guess(got, factor(spread), 0.35, what, "{:.2f} times as wide") for got, spread, what in ((alike, 2.0, "spread 2"), (unlike, 200.0, "spread 200")))

@functools.cache
def _gain(checkpoints, videos, trials=2000): return float(np.random.default_rng(14).binomial(videos, 0.8, (trials, checkpoints)).max(1).mean() / videos - 0.8)

@of("14", "3")
def _(gain):
    for checkpoints, videos in [(1, 300), (30, 300), (10, 1000), (200, 200)]:
        got, want = _number(gain(checkpoints, videos)), _gain(checkpoints, videos)
        if abs(got - want) <= 0.1 * want + 0.002: continue
        if abs(got - want - 0.8) <= 0.1 * want + 0.002: raise Wrong("this is the accuracy of the best; how much of it is luck?")
        if abs(got - 100 * want) <= 10 * want + 0.2: raise Wrong("give a fraction, not per cent")
        raise Wrong(f"{checkpoints} checkpoints, {videos} videos: the best of them looks {'better' if got < want else 'less good'} than that, on average")

@of("14", "3b")
def _(four_times_the_videos, hundred_times_the_checkpoints):
    return "; ".join([_guess(four_times_the_videos, _gain(30, 1200) / _gain(30, 300), 0.08, "four times the videos", "{:.2f} times the gain"), _guess(hundred_times_the_checkpoints, _gain(1000, 300) / _gain(10, 300), 0.4, "a hundred times the checkpoints", "{:.2f} times the gain")])

@of("14", "4")
def _(a, b, sources):
    from mbd.evaluation import interval, paired_difference
    a, b, sources = (np.asarray(x).ravel() for x in (a, b, sources))
    if not len(a) == len(b) == len(sources) >= 40: raise Wrong(f"two answers and a source for each of 40 videos or more, not {len(a)}, {len(b)} and {len(sources)}")
    if not set(np.unique(np.concatenate([a, b]).astype(float))) <= {0.0, 1.0}: raise Wrong("a and b hold right (True, 1) or wrong (False, 0)")
    if len(np.unique(sources)) < 10: raise Wrong("use ten sources or more")
    (_, a_low, a_high), (_, b_low, b_high), (d, low, high) = interval(a, sources), interval(b, sources), paired_difference(a, b, sources)
    overlap = min(a_high, b_high) - max(a_low, b_low)
    if low <= 0 <= high: raise Wrong(f"the interval of the difference is [{low:+.3f}, {high:+.3f}]: it does not decide who is better")
    if overlap < 0.5 * min(a_high - a_low, b_high - b_low): raise Wrong("the two intervals hardly overlap; at least half of the shorter one should lie in the other")
    return f"a [{a_low:.2f}, {a_high:.2f}], b [{b_low:.2f}, {b_high:.2f}], a - b {d:+.3f} [{low:+.3f}, {high:+.3f}]"

@of("14", "5")
def _(upper_limit):
    for n in (10, 30, 600):
        got, want = _number(upper_limit(n)), 1 - 0.05 ** (1 / n)
        if abs(got - want) < 0.02 * want + 1e-9: continue
        if abs(got - 3 / n) < 0.01 * want: raise Wrong("3 / n is the approximation; solve (1 - e) ** n = 0.05 for e")
        if abs(got - 0.05 ** (1 / n)) < 0.02: raise Wrong("this is the accuracy; the limit of the *error* is asked for")
        raise Wrong(f"with n = {n} and this error, zero mistakes would be {'more' if got < want else 'less'} likely than 5 %")

@of("14", "5b")
def _(limit): return _guess(limit, 1 - 0.05 ** (1 / 30), 0.01, "the honest limit", "{:.3f}")
