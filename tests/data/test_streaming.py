"""Images over the memory budget stay in their files, and make the same batches, bit for bit."""

import os
import shutil
import signal

import numpy as np
import pytest
import torch
from support_data import write_image_folder

from fastres import data
from fastres.data import Augment, Batches, DataError, budget
from fastres.data.budget import Budget
from fastres.data.files import FileSplit

NONE = Budget(0, "of the test")


def pair(folder, **options):
    """The same data in memory and in its files."""
    said = []
    resident = data.load(folder, say=said.append, cache=False, **options)
    streamed = data.load(folder, say=said.append, cache=False, budget=NONE, **options)
    assert isinstance(streamed.train, FileSplit) and not isinstance(resident.train, FileSplit)
    return resident, streamed, said


def batches(dataset, split="train", **options):
    given = {"batch_size": 4, "mean": dataset.mean, "std": dataset.std, "workers": 0, **options}
    return Batches(getattr(dataset, split), **given)


@pytest.fixture
def folder(tmp_path):
    write_image_folder(tmp_path / "photos", train=7, test=3, size=(60, 40), suffix=".jpg")
    return tmp_path / "photos"


@pytest.mark.parametrize(
    "options", [{}, {"image_size": 24}, {"image_size": 64}, {"val_share": 0.3}, {"center_share": 0.7}], ids=str
)
def test_files_and_memory_hold_the_same_set(folder, options):
    resident, streamed, _ = pair(folder, **options)
    for name in ("label", "classes", "mean", "std", "image_size", "digest"):
        assert getattr(resident, name) == getattr(streamed, name)
    for name in ("train", "test", "val"):
        one, other = getattr(resident, name), getattr(streamed, name)
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.equal(one.images, other.sample(torch.arange(len(other))))
            assert torch.equal(one.labels, other.labels) and one.size == other.size


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(
    "augment", [Augment(4, "random", 3), Augment(0, "alternating"), Augment(0), Augment(2, resize=30)], ids=str
)
def test_files_make_the_batches_that_memory_makes(folder, augment, workers):
    resident, streamed, _ = pair(folder)
    for split, train in (("train", True), ("test", False)):
        options = dict(augment=augment, train=train, seed=3)
        one, other = batches(resident, split, **options), batches(streamed, split, workers=workers, **options)
        for epoch, start in ((0, 0), (1, 1)):  # the second one is resumed within
            ours, theirs = (list(b.epoch(epoch, start)) for b in (one, other))
            assert len(ours) == len(theirs) > 0
            for (images, labels), (images_again, labels_again) in zip(ours, theirs):
                assert torch.equal(images, images_again) and torch.equal(labels, labels_again)
                assert images_again.is_contiguous(memory_format=torch.channels_last)


def test_an_epoch_that_was_left_does_not_reach_into_the_next(folder):
    resident, streamed, _ = pair(folder)
    one, other = batches(resident, batch_size=2), batches(streamed, batch_size=2, workers=2)
    next(other.epoch(0))
    for (images, _), (again, _) in zip(one.epoch(1), other.epoch(1), strict=True):
        assert torch.equal(images, again)
    other.close()
    assert torch.equal(next(one.epoch(2))[0], next(other.epoch(2))[0])  # new workers


def test_ranks_share_a_streamed_epoch_without_overlap(folder):
    _, streamed, _ = pair(folder)
    whole = list(batches(streamed, batch_size=6).epoch(1))
    ranks = [list(batches(streamed, batch_size=6, share=(rank, 3)).epoch(1)) for rank in range(3)]
    for step, (images, labels) in enumerate(whole):
        parts = [part[step] for part in ranks]
        assert torch.equal(torch.stack([part[0] for part in parts], 1).flatten(0, 1), images)
        assert torch.equal(torch.stack([part[1] for part in parts], 1).flatten(), labels)


def test_what_memory_keeps_can_be_fed_too(folder):
    resident, _, _ = pair(folder)
    for (images, _), (again, _) in zip(
        batches(resident).epoch(0), batches(resident, workers=2, resident=False).epoch(0), strict=True
    ):
        assert torch.equal(images, again)


def test_the_estimate_comes_before_the_work(folder, monkeypatch):
    said = []
    look = data.sources.decode.look_at
    monkeypatch.setattr(
        data.sources.decode, "look_at", lambda *args, **kwargs: said.append("work") or look(*args, **kwargs)
    )
    data.load(folder, say=said.append, image_size=32, cache=False, budget=Budget(1000, "of the test"))
    assert "20 images, decoded at most 5.72e-05 GiB; the budget is 9.31e-07 GiB (of the test)" in said[0]
    assert said[1] == "work" and "more than the budget" in said[3] and "streamed" in said[3]


def test_no_estimate_where_the_sizes_are_known(folder):
    """A set of small images, whose upper bound is above the budget, is not said to be large at each start."""
    starts: list[list[str]] = [[], []]
    for said in starts:
        data.load(folder, say=said.append, budget=Budget(20 * 224 * 224, "of the test"))
    assert "decoded at most" in starts[0][0] and not any("at most" in line for line in starts[1])


def test_a_share_of_the_center_is_kept_apart_in_the_cache(folder):
    whole, part, again = (
        data.load(folder, say=lambda line: None, center_share=share).train.images for share in (1.0, 0.5, 1.0)
    )
    assert torch.equal(whole, again) and whole.shape[-1] == 40 and part.shape[-1] == 20
    with pytest.raises(DataError, match="--center-share 0.5 is of photos in files, not of synthetic"):
        data.load("synthetic", center_share=0.5)


def test_the_second_start_decodes_nothing(folder, monkeypatch):
    first = data.load(folder, say=lambda line: None, budget=NONE)
    monkeypatch.setattr(data.sources.decode, "squares", None)
    assert data.load(folder, say=lambda line: None, budget=NONE).digest == first.digest


def test_bad_files_are_named_all_at_once_or_left_out(folder):
    for name in ("train/ant/0001.jpg", "test/bee/0002.jpg"):
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match="2 images cannot be read: .*0001.jpg.*0002.jpg.*--skip-bad"):
        data.load(folder, say=lambda line: None, cache=False, budget=NONE)
    resident, streamed, _ = pair(folder, skip_bad=True)
    assert streamed.digest == resident.digest and (len(streamed.train), len(streamed.test)) == (13, 5)
    assert torch.equal(resident.test.images, streamed.test.sample(torch.arange(5)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_goes_while_training_is_named(folder, workers):
    _, streamed, _ = pair(folder)
    (folder / "train" / "bee" / "0003.jpg").unlink()
    with pytest.raises(DataError, match=r"image .*train/bee/0003.jpg does not exist"):
        list(batches(streamed, workers=workers).epoch(0))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_killed_worker_ends_in_a_word_on_memory(folder):
    _, streamed, _ = pair(folder)
    fed = batches(streamed, batch_size=1, workers=1)
    epoch = fed.epoch(0)
    next(epoch)
    (worker,) = fed._feed._loader._iterator._workers
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match="was killed.*--workers"):
        list(epoch)


def test_workers_leave_signals_to_the_process_they_work_for(folder):
    _, streamed, _ = pair(folder)
    fed = batches(streamed, batch_size=1, workers=1)
    epoch = fed.epoch(0)
    next(epoch)
    (worker,) = fed._feed._loader._iterator._workers
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        os.kill(worker.pid, number)
    os.system(f"kill -TERM {worker.pid}")  # from another process
    assert len(list(epoch)) == 13 and worker.is_alive()
    del epoch
    fed.close()
    worker.join(5)
    assert not worker.is_alive()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_are_streamed_by_several_processes(folder, tmp_path, kind):
    archive = shutil.make_archive(str(tmp_path / "packed"), kind, folder)
    resident, streamed, _ = pair(archive)
    for (images, _), (again, _) in zip(
        batches(resident, batch_size=1).epoch(0), batches(streamed, batch_size=1, workers=3).epoch(0), strict=True
    ):
        assert torch.equal(images, again)


def test_a_limited_or_evaluated_set_is_streamed_too(folder):
    resident, streamed, _ = pair(folder)
    one, other = (data.limit(dataset, 5, 3) for dataset in (resident, streamed))
    assert (one.digest, one.mean, one.std) == (other.digest, other.mean, other.std)
    (ours, _), (theirs, _) = (
        data.load_test(folder, "", ("bee", "ant"), 40, 40, cache=False, say=lambda line: None, budget=allowed)
        for allowed in (None, NONE)
    )
    assert isinstance(theirs, FileSplit) and torch.equal(ours.labels, theirs.labels)
    assert torch.equal(ours.images, theirs.sample(torch.arange(6)))


def test_the_budget_is_a_share_of_what_is_free(monkeypatch):
    assert budget.memory_budget(2.5).bytes == 5 << 29
    whole = budget.memory_budget().bytes
    assert 0 < whole < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    monkeypatch.setattr(budget, "free_memory", lambda: 3 << 30)
    assert budget.memory_budget().bytes == 1 << 30
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert budget.memory_budget().bytes == 1 << 28


def test_statistics_of_files_are_exact(folder):
    _, streamed, _ = pair(folder)
    values = streamed.train.sample(torch.arange(14)).numpy().astype(np.float64)
    np.testing.assert_allclose(streamed.mean, values.mean((0, 2, 3)), rtol=1e-14)
    np.testing.assert_allclose(streamed.std, values.std((0, 2, 3)), rtol=1e-13)
