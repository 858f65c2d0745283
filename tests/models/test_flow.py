"""The rectified-flow loss and sampler: right on cases with known answers, keyed by clip."""

import pytest
import torch

from hairpin.models.video_dit import VideoDiT, flow_loss, sample, tiny
from hairpin.models.video_dit.flow import LEVEL_LOGIT_MEAN, draw, generator

SETTINGS = {"seed": 3, "given_frames": 2, "null_label": 10}
DRAWS = {"given_frames": 1, "label_dropout": 0.5}


def clips(b=4, t=6, h=4, w=4, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    video = torch.rand(b, t, h, w, generator=rng, dtype=torch.float32).to(dtype) * 2 - 1
    return video, torch.arange(b)[:, None]


class Oracle:
    """Knows the clean video, and keeps what it was called with."""

    def __init__(self, video):
        self.video, self.calls = video, []

    def __call__(self, noisy, level, labels, given):
        self.calls.append((noisy, level, labels, given))
        return self.video


def test_a_perfect_model_has_no_loss():
    video, labels = clips()
    loss = flow_loss(Oracle(video), video, labels, index=range(4), **SETTINGS)
    assert loss.total == 0
    assert loss.count == 4


def test_the_model_sees_given_frames_clean_and_the_others_on_the_line_to_noise():
    video, labels = clips()
    oracle = Oracle(video)
    flow_loss(oracle, video, labels, index=range(4), **SETTINGS)
    noisy, level, _, given = oracle.calls[0]
    drawn = draw(range(4), seed=3, given_frames=2, label_dropout=0.1, like=video)
    expected = (1 - level)[:, None, None, None] * video + level[:, None, None, None] * drawn.noise
    assert given[:, :2].all()
    assert not given[:, 5].any()
    assert torch.equal(given, drawn.given)
    assert torch.equal(noisy[given], video[given])
    torch.testing.assert_close(noisy[~given], expected[~given])


def test_loss_is_the_error_of_the_clean_video():
    video, labels = clips(b=1)
    loss = flow_loss(Oracle(video + 0.1), video, labels, index=[0], **SETTINGS)
    torch.testing.assert_close(loss.mean, torch.tensor(0.01), rtol=1e-5, atol=0)


def test_error_on_given_frames_costs_nothing():
    video, labels = clips()
    wrong = video.clone()
    wrong[:, :2] += 5
    assert flow_loss(Oracle(wrong), video, labels, index=range(4), **SETTINGS).total == 0


@pytest.mark.parametrize("cut", [0, 1, 3, 4])
def test_loss_is_the_same_however_the_batch_is_divided(cut):
    torch.manual_seed(0)
    model = VideoDiT(tiny()).double()
    torch.nn.init.normal_(model.head.linear.weight)
    video, labels = clips(t=4, h=8, w=8, dtype=torch.float64)
    whole = flow_loss(model, video, labels, index=range(4), **SETTINGS)
    parts = [
        flow_loss(model, video[rows], labels[rows], index=range(4)[rows], **SETTINGS)
        for rows in (slice(0, cut), slice(cut, 4))
    ]
    assert sum(p.count for p in parts) == whole.count
    torch.testing.assert_close(sum(p.total for p in parts), whole.total, rtol=1e-12, atol=0)


def test_draws_are_keyed_by_seed_and_index_and_not_by_dtype():
    like = torch.empty(1, 3, 2, 2)
    one = draw([5, 6, 7], seed=1, like=like, **DRAWS)
    two = draw([6], seed=1, like=like.double(), **DRAWS)
    other = draw([6], seed=2, like=like, **DRAWS)
    for whole, single in zip(one, two, strict=True):
        assert torch.equal(whole[1:2].to(single), single)
    assert two.noise.dtype == two.level.dtype == torch.float64
    assert not torch.equal(one.noise[1:2], other.noise)


def test_draws_follow_their_distributions():
    drawn = draw(
        range(4000), seed=0, given_frames=1, label_dropout=0.25, like=torch.empty(1, 4, 1, 1)
    )
    assert abs(drawn.noise.mean()) < 0.03
    assert abs(drawn.noise.std() - 1) < 0.03
    assert abs(drawn.level.logit().mean() - LEVEL_LOGIT_MEAN) < 0.05
    assert abs(drawn.level.logit().std() - 1) < 0.05
    assert abs(drawn.keep_label.float().mean() - 0.75) < 0.03
    numbers = drawn.given.sum(dim=1).bincount(minlength=5)
    assert numbers[0] == numbers[4] == 0
    assert (numbers[1:4] / 4000 - 1 / 3).abs().max() < 0.03


def test_every_clip_counts_the_same_however_many_frames_it_is_given():
    video, labels = clips(b=64)
    off = torch.arange(64.0)
    oracle = Oracle(video + off[:, None, None, None])
    loss = flow_loss(oracle, video, labels, index=range(64), **SETTINGS | {"given_frames": 0})
    assert len(oracle.calls[0][3].sum(dim=1).unique()) > 3
    torch.testing.assert_close(loss.total, off.square().sum())


def test_dropped_labels_become_the_null_label():
    video, labels = clips(b=64)
    oracle = Oracle(video)
    labels = labels % 10
    flow_loss(oracle, video, labels, index=range(64), label_dropout=0.5, **SETTINGS)
    seen = oracle.calls[0][2]
    assert set(seen[seen != labels].tolist()) == {10}
    assert 10 < (seen == 10).sum() < 54


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_sampling_with_a_perfect_model_arrives_at_the_clip(method):
    video, labels = clips()
    out = sample(
        Oracle(video),
        video[:, :2],
        labels,
        frames=6,
        index=range(4),
        seed=0,
        null_label=10,
        steps=3,
        method=method,
    )
    torch.testing.assert_close(out, video)
    assert torch.equal(out[:, :2], video[:, :2])


def test_heun_is_of_second_order():
    """A Gaussian's flow has a closed form: half the step, a quarter of Heun's error."""

    def gaussian(x, level, labels, given):  # data ~ N(0, 0.5^2): E[clean | x]
        a = level[:, None, None, None]
        return x * 0.25 * (1 - a) / (0.25 * (1 - a) ** 2 + a**2)

    def error(method, steps):
        start = torch.from_numpy(generator(0, 0).standard_normal((1, 2, 2), dtype="float32"))
        out = sample(
            gaussian,
            torch.empty(1, 0, 2, 2, dtype=torch.float64),
            torch.zeros(1, 1).long(),
            frames=1,
            index=[0],
            seed=0,
            null_label=10,
            steps=steps,
            method=method,
        )
        return (out[0] - 0.5 * start.double()).abs().max().item()

    assert error("euler", 32) / error("euler", 64) == pytest.approx(2, rel=0.15)
    assert error("heun", 32) / error("heun", 64) == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize("frames_per_pass", [1, 3, 4, 9])
def test_a_roll_out_gives_what_it_drew(frames_per_pass):
    """A model that adds 1 to the last given frame counts up, one pass at a time."""
    given_numbers = []

    def last_given_plus_one(x, level, labels, given):
        number = int(given[0].sum())
        given_numbers.append(number)
        return (x[:, number - 1 : number] + 1).expand_as(x)

    out = sample(
        last_given_plus_one,
        torch.zeros(1, 2, 2, 2),
        torch.zeros(1, 1).long(),
        frames=6,
        index=[0],
        seed=0,
        null_label=10,
        steps=1,
        frames_per_pass=frames_per_pass,
    )
    assert given_numbers == list(range(2, 6, frames_per_pass))
    expected = [0, 0] + [1 + (i // frames_per_pass) for i in range(4)]
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor(expected).float())


def test_guidance_goes_beyond_the_unlabelled_prediction():
    def by_label(x, level, labels, given):
        return torch.where(labels == 10, 0.0, 1.0)[:, :, None, None].expand_as(x).to(x)

    def drawn(guidance):
        return sample(
            by_label,
            torch.empty(1, 0, 2, 2),
            torch.tensor([[3]]),
            frames=3,
            index=[0],
            seed=0,
            null_label=10,
            steps=2,
            guidance=guidance,
        )

    torch.testing.assert_close(drawn(1.0), torch.ones(1, 3, 2, 2))
    torch.testing.assert_close(drawn(2.5), torch.full((1, 3, 2, 2), 2.5))


def test_a_sample_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    model = VideoDiT(tiny()).double()
    torch.nn.init.normal_(model.head.linear.weight)
    video, labels = clips(t=4, h=8, w=8, dtype=torch.float64)
    settings = {"frames": 4, "seed": 1, "null_label": 10, "steps": 2}
    whole = sample(model, video[:, :1], labels, index=range(4), **settings)
    last = sample(model, video[3:, :1], labels[3:], index=[3], **settings)
    torch.testing.assert_close(last, whole[3:], rtol=1e-12, atol=1e-12)
