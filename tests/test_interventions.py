import numpy as np
import pytest, torch

from mbd.interventions import INTERVENTIONS, low_resolution, short_crop, shuffle_frames, shuffle_patches


@pytest.fixture
def video():
    return np.random.default_rng(0).integers(0, 256, (32, 24, 20, 3), dtype=np.uint8)


@pytest.fixture
def count():
    "A video whose frames are their numbers."
    return np.arange(12, dtype=np.uint8).reshape(12, 1, 1, 1)


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_shape_and_type_stay_the_seed_decides_and_the_input_is_left_alone(name, video):
    kept, change = video.copy(), INTERVENTIONS[name]
    out = change(video, seed=5)
    assert out.shape == video.shape and out.dtype == np.uint8 and (out == change(video, seed=5)).all()
    assert (out != video).any() and (video == kept).all()
    out[:] = 0
    assert (video == kept).all()                                     # no view of the input is handed out
    video.flags.writeable = False                                    # as an array read from a file may be
    assert (change(video, seed=5) == change(kept, seed=5)).all() and (change(kept[:, :, ::-1], seed=5) == change(kept[:, :, ::-1].copy(), seed=5)).all()


def test_shuffled_frames_are_the_same_frames(video):
    out = shuffle_frames(video)
    assert sorted(map(bytes, out)) == sorted(map(bytes, video)) and (shuffle_frames(video, seed=1) != out).any()


@pytest.mark.parametrize("block", [2, 5, 6, 11])
def test_blocks_stay_whole_and_change_places(count, block):
    out = shuffle_frames(count, block).ravel().tolist()
    blocks = [list(range(12))[i:i + block] for i in range(0, 12, block)]
    assert sorted(out) == list(range(12)) and out != list(range(12))
    for b in blocks: assert out[out.index(b[0]):][:len(b)] == b


def test_a_random_order_is_never_the_order_it_was_in(count):
    assert all(shuffle_frames(count, 6, seed).ravel().tolist() == [6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4, 5] for seed in range(20))


def test_crop_keeps_its_window_where_it_was_and_fills_up(count):
    assert short_crop(count, 4).ravel().tolist() == [4, 4, 4, 4, 4, 5, 6, 7, 7, 7, 7, 7]
    assert short_crop(count, 4, start=0).ravel().tolist() == [0, 1, 2, 3] + [3] * 8
    assert short_crop(count, 4, start=5, fill="repeat").ravel().tolist() == [8, 5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7]
    assert (short_crop(count, 12) == count).all()


def test_patches_change_places_alike_in_all_frames_and_the_rest_stays(video):
    out = shuffle_patches(video, 3, seed=2)                          # 24 x 20: patches of 8 x 6, two columns left over
    assert (out[:, :, 18:] == video[:, :, 18:]).all()
    cut = lambda v: [v[:, 8 * i:8 * i + 8, 6 * j:6 * j + 6].tobytes() for i in range(3) for j in range(3)]
    assert sorted(cut(out)) == sorted(cut(video)) and cut(out) != cut(video)       # whole patches, with their motion


def test_low_resolution_keeps_means_and_loses_detail():
    stripes = np.zeros((2, 8, 8, 3), np.uint8); stripes[:, :, ::2] = 200
    assert (low_resolution(stripes, 2) == 100).all() and (low_resolution(stripes, 1) == stripes).all()
    flat = np.full((1, 9, 7, 1), 77, np.uint8)
    assert (low_resolution(flat, 4) == 77).all()


@pytest.mark.parametrize("call, message", [
    (lambda v: shuffle_frames(v, 32), "block .* 1..31"), (lambda v: shuffle_frames(v, 0), "block"), (lambda v: shuffle_frames(v, 2.0), "block"), (lambda v: shuffle_frames(v[:1]), "one frame"),
    (lambda v: short_crop(v, 33), "frames .* 1..32"), (lambda v: short_crop(v, 8, start=25), "start .* 0..24"), (lambda v: short_crop(v, 8, fill="loop"), "'hold' or 'repeat'"),
    (lambda v: shuffle_patches(v, 1), "grid"), (lambda v: shuffle_patches(v, 21), "grid .* 2..20"), (lambda v: shuffle_patches(v[:, :1]), "4|2"), (lambda v: low_resolution(v, 21), "factor .* 1..20"), (lambda v: low_resolution(v, True), "factor"),
    (lambda v: shuffle_frames(v.astype(float)), "uint8"), (lambda v: short_crop(v[0], 1), "T, H, W, C"), (lambda v: low_resolution(v[:0]), "T, H, W, C"),
])
def test_what_does_not_fit_is_refused(video, call, message):
    with pytest.raises(ValueError, match=message): call(video)


def test_one_frame_has_no_other_order():
    from mbd.interventions import Reordered
    with pytest.raises(ValueError, match="no other order"): Reordered(torch.nn.Identity(), "shuffled")(torch.zeros(1, 3, 1, 4, 4))
