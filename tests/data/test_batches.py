import pytest
import torch

from fastres.data import Augment, Batches, DataError, Split, normalise, resize
from fastres.data.streams import stream

MEAN, STD = (120.0, 121.0, 122.0), (60.0, 61.0, 62.0)


def numbered_split(count, size=8):
    """Image n is known by its label n; its left half is brighter than the right."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(120, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    images[..., : size // 2] += 130
    return Split(images, torch.arange(count))


def make(split, batch_size=8, **kwargs):
    return Batches(split, batch_size, MEAN, STD, **kwargs)


def is_mirrored(images):
    width = images.shape[3]
    return images[..., : width // 2].mean((1, 2, 3)) < images[..., width // 2 :].mean((1, 2, 3))


AUGMENTS = [
    Augment(4, "random", 3),
    Augment(4, "alternating"),
    Augment(0, "alternating", 2),
    Augment(0),
    Augment(2, resize=12),
    Augment(1, "random", 2, resize=5),
]


@pytest.mark.parametrize("augment", AUGMENTS, ids=str)
def test_a_resumed_epoch_goes_on_bit_for_bit(augment):
    split = numbered_split(50)
    whole = list(make(split, augment=augment, seed=3).epoch(5))
    rest = list(make(split, augment=augment, seed=3).epoch(5, start_step=4))
    assert len(whole) == 6 and len(rest) == 2
    for (images, labels), (images_again, labels_again) in zip(whole[4:], rest):
        assert torch.equal(images, images_again) and torch.equal(labels, labels_again)


def test_a_resumed_epoch_does_not_do_the_work_before(monkeypatch):
    made, images = [], Batches._augmented
    monkeypatch.setattr(Batches, "_augmented", lambda self, *args: made.append(args) or images(self, *args))
    list(make(numbered_split(50), augment=Augment(2)).epoch(0, start_step=4))
    assert len(made) == 2


def test_resuming_at_the_end_yields_nothing_and_past_it_is_an_error():
    batches = make(numbered_split(50))
    assert list(batches.epoch(0, start_step=6)) == []
    for step in (7, -1):
        with pytest.raises(DataError, match=f"step {step} is not in an epoch of 6 batches"):
            batches.epoch(0, start_step=step)


@pytest.mark.parametrize("augment", AUGMENTS, ids=str)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shapes_dtypes_and_layout(augment, train, dtype):
    images, labels = next(make(numbered_split(20), augment=augment, train=train, dtype=dtype).epoch(0))
    size = augment.resize or 8
    assert images.shape == (8, 3, size, size) and images.dtype == dtype
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.shape == (8,) and labels.dtype == torch.int64


def test_an_epoch_has_every_image_once_in_an_order_of_its_own():
    split = numbered_split(40)
    orders = [
        torch.cat([labels for _, labels in make(split, seed=seed).epoch(epoch)])
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    for number, order in enumerate(orders):
        assert torch.equal(order.sort().values, torch.arange(40))
        assert not any(torch.equal(order, other) for other in orders[:number])
    assert not torch.equal(orders[0], torch.arange(40))


def test_images_go_with_their_labels():
    split = numbered_split(40)
    for images, labels in make(split).epoch(2):
        assert torch.equal(images, normalise(split.images[labels], MEAN, STD))


def test_augmentation_differs_between_steps_epochs_and_seeds():
    split = Split(numbered_split(1).images.expand(32, -1, -1, -1), torch.arange(32))  # one image, 32 times

    def look(seed, epoch, step):
        batches = make(split, augment=Augment(4, "random"), seed=seed)
        return next(batches.epoch(epoch, start_step=step))[0]

    looks = [look(*key) for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))]
    for number, one in enumerate(looks):
        assert not any(torch.equal(one, other) for other in looks[:number])
    assert torch.equal(looks[0], look(0, 0, 0))


def test_alternating_flip_shows_both_orientations_in_any_two_epochs():
    split = numbered_split(200)
    batches = make(split, 50, augment=Augment(crop_pad=0, flip="alternating"))
    seen = []
    for epoch in range(4):
        mirrored = torch.zeros(200, dtype=torch.bool)
        for images, labels in batches.epoch(epoch):
            mirrored[labels] = is_mirrored(images)
            plain = normalise(split.images[labels], MEAN, STD)
            expected = torch.where(mirrored[labels].view(-1, 1, 1, 1), plain.flip(3), plain)
            assert torch.equal(images, expected)
        seen.append(mirrored)
    assert 60 < seen[0].sum() < 140
    for epoch in range(3):
        assert (seen[epoch] ^ seen[epoch + 1]).all()
    other = make(split, 50, augment=Augment(0, "alternating"), seed=1)
    images, labels = next(other.epoch(0))
    assert not torch.equal(is_mirrored(images), seen[0][labels])


def test_random_flip_mirrors_half_of_them_independently_of_the_epoch():
    batches = make(numbered_split(400), 400, augment=Augment(0, "random"))
    first, second = (
        is_mirrored(images)[labels.argsort()] for images, labels in (next(batches.epoch(e)) for e in (0, 1))
    )
    for flips in (first, second, first ^ second):
        assert 150 < flips.sum() < 250


def test_crops_are_those_of_the_padded_image():
    split = numbered_split(30)
    images, labels = next(make(split, 30, augment=Augment(2)).epoch(0))
    padded = torch.nn.functional.pad(split.images.double(), (2, 2, 2, 2), mode="reflect")
    corners = set()
    for image, label in zip(images, labels):
        matches = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if torch.equal(normalise(padded[label][None, :, y : y + 8, x : x + 8], MEAN, STD)[0], image)
        ]
        assert len(matches) == 1
        corners.add(matches[0])
    assert len(corners) > 10


@pytest.mark.parametrize("augment", [Augment(2, "alternating", 4), Augment(0, resize=12), Augment(1, "random", 2)])
def test_sizes_by_step(augment):
    batches = make(numbered_split(24), augment=augment, seed=3)
    plain = list(batches.epoch(1))
    sized = list(batches.epoch(1, size_at={0: 4, 1: 6}.get))
    rest = list(batches.epoch(1, 1, {0: 4, 1: 6}.get))
    assert [images.shape[-1] for images, _ in sized] == [4, 6, plain[2][0].shape[-1]]
    for (images, labels), (_, same_labels) in zip(sized, plain):
        assert torch.equal(labels, same_labels) and images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(sized[2][0], plain[2][0]) and torch.equal(rest[0][0], sized[1][0])


def test_a_small_image_is_the_large_one_shrunk():
    batches = make(numbered_split(20, size=16), 20, augment=Augment(3, "random"))
    (large, _), (small, _) = (next(batches.epoch(0, size_at=lambda step, s=s: s)) for s in (None, 8))
    torch.testing.assert_close(small, resize(large, 8), rtol=0, atol=1.1 / 60)


def test_the_hole_shrinks_with_the_image():
    batches = make(numbered_split(20, size=16), 20, augment=Augment(0, cutout=8))
    for size, hole in ((None, 8), (8, 4)):
        images, labels = next(batches.epoch(0, size_at=lambda step, s=size: s))
        black = (images == 0).all(1)
        assert black.sum((1, 2)).max() == hole**2 and black.sum((1, 2)).min() >= (hole // 2) ** 2


def test_cutout_is_zero_after_normalisation():
    batches = make(numbered_split(20), 20, augment=Augment(0, cutout=4))
    images, labels = next(batches.epoch(0))
    plain = normalise(batches.split.images[labels], MEAN, STD)
    cut = (images != plain).any(1)
    assert (images.permute(0, 2, 3, 1)[cut] == 0).all()
    assert cut.sum((1, 2)).max() == 16 and cut.sum((1, 2)).min() >= 4


def test_test_batches_are_in_order_whole_and_only_resized():
    split = numbered_split(20)
    batches = make(split, 8, augment=Augment(4, "alternating", 3, resize=6), train=False)
    parts = list(batches.epoch(1))
    assert len(batches) == 3 and [len(labels) for _, labels in parts] == [8, 8, 4]
    assert torch.equal(torch.cat([labels for _, labels in parts]), split.labels)
    assert torch.equal(torch.cat([images for images, _ in parts]), normalise(resize(split.images, 6), MEAN, STD))


@pytest.mark.parametrize(
    "train, drop_last, sizes",
    [(True, None, [8, 8]), (True, False, [8, 8, 4]), (False, None, [8, 8, 4]), (False, True, [8, 8])],
)
def test_the_last_batch(train, drop_last, sizes):
    batches = make(numbered_split(20), 8, train=train, drop_last=drop_last)
    assert [len(labels) for _, labels in batches.epoch(0)] == sizes
    assert len(batches) == len(sizes)


def test_bad_sizes_are_named():
    split = numbered_split(20)
    with pytest.raises(DataError, match="batch size 21 exceeds the 20 images of the set: lower it to 20"):
        make(split, 21)
    with pytest.raises(DataError, match="batch size 0 must be at least 1"):
        make(split, 0)
    with pytest.raises(DataError, match="crop_pad 8 cannot be reflected in images of 8 pixels: lower it below 8"):
        make(split, augment=Augment(8))
    make(split, augment=Augment(8), train=False)
    assert len(make(split, 20)) == 1


def test_streams_of_neighbouring_keys_differ():
    firsts = {
        torch.rand(1, generator=stream(*key)).item()
        for key in [(0,), (1,), (-1,), (0, 0), (0, 1), (1, 0), (0, 1, 0), (0, 0, 1), (2**63, 1)]
    }
    assert len(firsts) == 9


@pytest.mark.gpu
@pytest.mark.parametrize("augment", AUGMENTS, ids=str)
def test_a_gpu_makes_the_same_batches_without_waiting(augment):
    split = numbered_split(50)
    on_gpu = make(split, augment=augment, device="cuda")
    list(on_gpu.epoch(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        gpu = list(on_gpu.epoch(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    cpu = list(make(split, augment=augment).epoch(1))
    for (images, labels), (cpu_images, cpu_labels) in zip(gpu, cpu):
        assert images.device.type == "cuda" and images.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(images.cpu(), cpu_images, atol=1e-5, rtol=1e-5)
        assert torch.equal(labels.cpu(), cpu_labels)
