"""Augmentation by workers, and of whole batches in pairs: deterministic by seed, resumable, and what it says it is."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from support_data import write_image_folder

from fastres import data
from fastres.data import Augment, Batches, DataError, Split, normalise, pixels
from fastres.data.files import FileSplit
from fastres.data.sampling import balanced

KINDS = {
    "crop": Augment(0, crop_scale=0.3),
    "larger crop": Augment(0, crop_scale=0.3, resize=48),
    "jitter": Augment(2, "random", color_jitter=0.4),
    "rand": Augment(0, auto_augment="rand"),
    "trivial": Augment(0, "alternating", auto_augment="trivial"),
    "erasing": Augment(0, random_erasing=1.0),
    "mixup": Augment(0, mixup=0.4),
    "cutmix": Augment(2, cutmix=1.0),
    "all": Augment(0, "random", 3, None, 0.2, 0.3, "rand", 12, 0.5, 0.2, 1.0),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """The training split of a folder, in its files and in memory."""
    folder = tmp_path_factory.mktemp("photos")
    write_image_folder(folder, train=9, test=1, size=(60, 40), suffix=".jpg")
    loaded = [data.load(folder, cache=False, say=lambda line: None, from_files=files) for files in (True, False)]
    assert isinstance(loaded[0].train, FileSplit) and not isinstance(loaded[0].test, FileSplit)
    assert loaded[0].digest == loaded[1].digest
    return loaded[0].train, loaded[1].train


def make(split, augment, batch_size=6, **options):
    given = dict(
        mean=(120, 121, 122), std=(60, 60, 60), augment=augment, classes=2, seed=3, **{"workers": 0, **options}
    )
    return Batches(split, batch_size, **given)


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(image, image_again) and torch.equal(label, label_again)
        for (image, label), (image_again, label_again) in zip(ours, theirs)
    )


@pytest.mark.parametrize("name", KINDS)
def test_an_epoch_depends_on_seed_and_epoch_alone(photos, name):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = list(make(photos[0], KINDS[name]).epoch(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(one, list(make(photos[0], KINDS[name], workers=2).epoch(2)))
    assert same(one[1:], list(make(photos[0], KINDS[name]).epoch(2, 1)))
    assert not same(one, list(make(photos[0], KINDS[name]).epoch(3)))
    for images, labels in one:
        side = KINDS[name].resize or 40
        assert images.shape == (6, 3, side, side) and images.is_contiguous(memory_format=torch.channels_last)
        assert images.isfinite().all() and len(labels) == 6


@pytest.mark.parametrize("name", [name for name in KINDS if "crop" not in name and name != "all"])
def test_files_and_memory_show_the_same(photos, name):
    streamed, resident = (list(make(split, KINDS[name]).epoch(1)) for split in photos)
    assert same(streamed, resident)


@pytest.mark.parametrize("name", ["crop", "jitter", "trivial", "erasing", "mixup", "cutmix", "all"])
@pytest.mark.parametrize("ranks, batch_size", [(2, 6), (3, 6), (2, 8), (3, 7), (4, 12)])
def test_ranks_see_their_share_of_one_process_batch(photos, name, ranks, batch_size):
    """Mixed with the same images, too, and with an uneven last batch."""
    source, options = photos["crop" not in name and name != "all"], dict(drop_last=False)
    whole = list(make(source, KINDS[name], batch_size, **options).epoch(1))
    parts = [list(make(source, KINDS[name], batch_size, share=(r, ranks), **options).epoch(1)) for r in range(ranks)]
    for step, (images, labels) in enumerate(whole):
        for rank, part in enumerate(parts):
            if rank < len(images):
                assert torch.equal(part[step][0], images[rank::ranks]) and torch.equal(
                    part[step][1], labels[rank::ranks]
                )


def test_ranks_decode_no_more_where_half_a_batch_divides_over_them(photos, monkeypatch):
    decoded, own = [], FileSplit.square
    monkeypatch.setattr(FileSplit, "square", lambda split, number: (decoded.append(number), own(split, number))[1])
    for ranks, batch_size, count in ((1, 6, 6), (2, 8, 4), (3, 6, 2), (2, 6, 6)):
        decoded.clear()
        next(make(photos[0], KINDS["mixup"], batch_size, share=(ranks - 1, ranks)).epoch(0))
        assert len(decoded) == len(set(decoded)) == count


def test_validation_images_are_left_alone(photos):
    for name, augment in KINDS.items():
        plain = make(photos[1], Augment(0, resize=augment.resize), train=False)
        assert same(list(make(photos[1], augment, train=False).epoch(0)), list(plain.epoch(0))), name


def test_views_of_one_image_differ_from_batch_to_batch(photos):
    split = photos[0].subset(torch.zeros(6, dtype=torch.int64))
    images, _ = next(make(split, KINDS["crop"]).epoch(0))
    assert len({image.numpy().tobytes() for image in images}) == 6


def ramp(width, height, orientation=1, kind="JPEG"):
    """A photo whose red grows to the right and green downwards, stored turned as an EXIF orientation says."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    image = Image.fromarray(np.stack([x, y, np.zeros_like(x)], 2).astype(np.uint8))
    undo = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    tag = Image.Exif()
    tag[0x0112] = orientation
    file = io.BytesIO()
    turned = image.transpose(undo[orientation]) if orientation > 1 else image
    turned.save(file, kind, exif=tag, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("box", [(0, 0, 1200, 800), (600, 100, 400, 300), (1100, 700, 100, 100), (3, 5, 30, 20)])
def test_a_crop_shows_its_part_of_the_upright_photo(box, orientation, kind):
    """Also where a JPEG is decoded at a fraction of its size."""
    photo = pixels.open_image(ramp(1200, 800, orientation, kind))
    asked = []
    seen = np.asarray(pixels.resized_crop(photo, (32, 40), lambda *size: asked.append(size) or box), float)
    assert asked == [(1200, 800)] and seen.shape == (32, 40, 3)
    left, top, width, height = box
    red = (left + (np.arange(40) + 0.5) / 40 * width - 0.5) / 1199 * 255
    green = (top + (np.arange(32) + 0.5) / 32 * height - 0.5) / 799 * 255
    assert abs(seen[:, :, 0] - red).max() < 4 and abs(seen[:, :, 1].T - green).max() < 4


def test_a_large_jpeg_is_decoded_at_a_fraction_but_not_below_what_is_seen():
    sizes = []
    for box in ((0, 0, 1200, 800), (0, 0, 300, 200), (0, 0, 40, 32)):
        photo = pixels.open_image(ramp(1200, 800))
        pixels.resized_crop(photo, (32, 40), lambda *_, box=box: box)
        sizes.append(photo.size)
    assert sizes == [(150, 100), (300, 200), (1200, 800)]


def test_random_erasing_sets_a_rectangle_to_the_mean(photos):
    erased, plain = (next(make(photos[1], Augment(0, random_erasing=p)).epoch(0))[0] for p in (1.0, 0.0))
    for image, before in zip(erased, plain):
        changed = (image != before).any(0)
        rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
        box = image[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert box.abs().max() < 1e-6 and 0.01 * 1600 < box[0].numel() < 0.4 * 1600


def test_mixup_adds_pairs_by_the_shares_of_their_labels(photos):
    split = photos[1]
    mixed, shares = next(make(split, KINDS["mixup"]).epoch(1))
    plain, labels = next(make(split, Augment(0)).epoch(1))
    hot = torch.nn.functional.one_hot(labels, 2).float()
    assert shares.shape == (6, 2) and torch.allclose(shares.sum(1), torch.ones(6))
    differ = (hot != hot.roll(3, 0)).any(1)
    share = ((shares - hot.roll(3, 0)) / (hot - hot.roll(3, 0)).where(hot != hot.roll(3, 0), torch.nan))[differ]
    share = share[:, 0].unique()
    assert share.max() - share.min() < 1e-5 and 0 < share[0] < 1
    torch.testing.assert_close(mixed, plain * share[0] + plain.roll(3, 0) * (1 - share[0]), atol=1e-4, rtol=1e-4)


def test_cutmix_pastes_a_rectangle_as_large_as_its_share(photos):
    augment = Augment(0, cutmix=1.0)
    for step in range(3):
        mixed, shares = next(make(photos[1], augment).epoch(1, step))
        plain, labels = next(make(photos[1], Augment(0)).epoch(1, step))
        pasted = (mixed != plain).any(1)
        assert torch.equal(mixed, torch.where((mixed != plain), plain.roll(3, 0), plain))
        kept = shares[torch.arange(6), labels][labels != labels.roll(3)]
        if len(kept):
            assert abs(1 - pasted.float().mean((1, 2)).max() - kept[0]) < 0.1


def test_both_mixtures_take_turns(photos):
    batches = make(photos[1], Augment(0, mixup=1.0, cutmix=1.0))
    plain = make(photos[1], Augment(0))
    kinds = set()
    for epoch in range(6):
        for (mixed, _), (images, _) in zip(batches.epoch(epoch), plain.epoch(epoch)):
            kinds.add(bool(((mixed == images) | (mixed == images.roll(3, 0))).all()))
    assert kinds == {True, False}


@pytest.mark.parametrize(
    "wrong, complaint",
    [
        (dict(crop_scale=0.0), "crop_scale 0.0 is not between"),
        (dict(crop_scale=0.5, crop_pad=4), "two crops"),
        (dict(color_jitter=1.5), "color_jitter 1.5 is not"),
        (dict(auto_augment="best"), "choose from none, rand, trivial"),
        (dict(magnitude=31), "magnitude 31"),
        (dict(random_erasing=-0.1), "random_erasing -0.1"),
        (dict(mixup=-1.0), "mixup -1.0"),
    ],
)
def test_values_out_of_range_are_refused(wrong, complaint):
    with pytest.raises(DataError, match=complaint):
        Augment(**{"crop_pad": 0, **wrong})


def test_mixing_needs_the_number_of_classes(photos):
    with pytest.raises(DataError, match="number of classes"):
        make(photos[1], KINDS["mixup"]).__class__(photos[1], 6, (0,) * 3, (1,) * 3, KINDS["mixup"])


def test_balanced_sampling_shows_rare_classes_as_often():
    labels = torch.tensor([0] * 70 + [2] * 25 + [3] * 5)[torch.randperm(100)]
    order = balanced(labels, torch.Generator().manual_seed(0))
    assert len(order) == 100 and sorted(labels[order].bincount()[[0, 2, 3]].tolist()) == [33, 33, 34]
    times = order.bincount(minlength=100)
    for label in (0, 2, 3):  # no image a second time before all others of its class
        of_class = times[labels == label]
        assert of_class.max() - of_class.min() <= 1
    assert not torch.equal(order, balanced(labels, torch.Generator().manual_seed(1)))


def test_balanced_batches_are_resumed_bit_for_bit():
    labels = torch.tensor([0] * 30 + [1] * 6)
    split = Split(torch.randint(256, (36, 3, 8, 8), dtype=torch.uint8), labels)
    options = dict(mean=(0,) * 3, std=(1,) * 3, augment=Augment(2), sampling="balanced", seed=1)
    whole = list(Batches(split, 6, **options).epoch(4))
    assert same(whole[3:], list(Batches(split, 6, **options).epoch(4, 3)))
    assert abs(torch.cat([labels for _, labels in whole]).float().mean() - 0.5) < 0.02
    with pytest.raises(DataError, match="sampling 'fair' is unknown"):
        Batches(split, 6, **{**options, "sampling": "fair"})


def test_plain_images_are_normalised_as_before(photos):
    images, labels = next(make(photos[1], Augment(0)).epoch(0))
    assert any(
        torch.equal(images[0], normalise(photos[1].images[n : n + 1], (120, 121, 122), (60,) * 3)[0]) for n in range(18)
    )
