"""CSV files of file and label."""

import shutil

import pytest
from PIL import Image

from fastres import data
from fastres.data import DataError
from fastres.data.budget import Budget


@pytest.fixture
def images(tmp_path):
    for i in range(12):
        path = tmp_path / "pictures" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (i, i, i)).save(path)
    return tmp_path


def load(path, **options):
    said = []
    return data.load(path, say=said.append, **options), said


def lines(count=12, split=""):
    return "".join(f"pictures/{i}.png,{'ant' if i % 2 else 'bee'}{split and ',' + split(i)}\n" for i in range(count))


@pytest.mark.parametrize("heading", ["file,label\n", "", "\ufefffilename,class\n", "Image,Category\n"])
def test_a_table(images, heading):
    (images / "labels.csv").write_text(heading + lines(), "utf-8")
    dataset, _ = load(images / "labels.csv", val_share=0.5)
    assert dataset.classes == ("ant", "bee") and len(dataset.train) == len(dataset.test) == 6
    for split in (dataset.train, dataset.test):
        assert [1 - value % 2 for value in split.images[:, 0, 0, 0].tolist()] == split.labels.tolist()
    with pytest.raises(DataError, match="--val-share"):
        load(images / "labels.csv")


def test_other_delimiters_orders_and_a_column_of_splits(images):
    rows = [f"{('train', 'valid', 'test')[i // 4]}\t{i % 2}\tx\tpictures/{i}.png" for i in range(12)]
    (images / "labels.tsv").write_text("split\tlabel\tnote\tpath\r\n" + "\r\n".join(rows) + "\r\n\r\n")
    dataset, _ = load(images / "labels.tsv")
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (4, 4, 4)
    assert dataset.test.images[:, 0, 0, 0].tolist() == [8, 9, 10, 11]
    (images / "labels.tsv").write_text("file;label\n" + lines().replace(",", ";"))
    assert len(load(images / "labels.tsv", val_share=0.5)[0].train) == 6


def test_numbers_are_sorted_as_numbers(images):
    (images / "labels.csv").write_text("file,label\n" + "".join(f"pictures/{i}.png,{i // 2 + 7}\n" for i in range(12)))
    assert load(images / "labels.csv", val_share=0.5)[0].classes == ("7", "8", "9", "10", "11", "12")


def test_a_folder_with_tables(images):
    for name, part in (("train", range(8)), ("val", range(8, 12))):
        rows = "".join(f"{i},{'ant' if i % 2 else 'bee'}\n" for i in part)  # without the ending
        (images / f"{name}.csv").write_text("id,label\n" + rows)
    (images / "pictures").rename(images / "images")
    dataset, _ = load(images)
    assert (len(dataset.train), len(dataset.test)) == (8, 4)


def test_missing_files_are_all_named_or_left_out(images):
    (images / "labels.csv").write_text("file,label\n" + lines() + "pictures/x.png,ant\n/no/such.png,bee\n")
    with pytest.raises(DataError, match="2 images cannot be read: .*x.png .it does not exist., /no/such.png"):
        load(images / "labels.csv", val_share=0.5)
    dataset, said = load(images / "labels.csv", val_share=0.5, skip_bad=True)
    assert len(dataset.train) + len(dataset.test) == 12 and "2 unreadable images" in said[-1]


def test_lines_that_repeat_a_file(images):
    (images / "labels.csv").write_text("file,label\n" + lines() + "pictures/3.png,ant\n")
    dataset, said = load(images / "labels.csv", val_share=0.5)
    assert len(dataset.train) + len(dataset.test) == 12 and "1 lines that repeat a file" in said[0]


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "its first line must name the columns"),
        ("file,label\n", "has no line with a file"),
        ("a,b,c\n1,2,3\n", "its first line must name the columns"),
        ("file,label\npictures/1.png\n", "line 2 has no label"),
        ("file,label\n,ant\n", "line 2 has no file"),
        ("file,label,split\npictures/1.png,ant,tain\n", "line 2: split 'tain' is not train, val or test"),
        ("file,label\npictures/1.png,ant\npictures/1.png,bee\n", "line 3: .*1.png is 'bee' .* and 'ant'"),
        ("file,label\npictures/1.png,ant\n", "has 1 class"),
        (b"file,label\n\xff\xfe,ant\n", "save it as CSV in UTF-8"),
    ],
)
def test_what_is_no_table_is_named(images, text, complaint):
    (images / "labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=complaint) as error:
        load(images / "labels.csv", val_share=0.5)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["zip", "gztar"])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("budget", [None, Budget(0, "of the test")], ids=["memory", "files"])
def test_a_table_in_an_archive(images, tmp_path_factory, kind, wrapped, budget):
    root = tmp_path_factory.mktemp("packed")
    inside = root / "pack" / "set" if wrapped else root / "pack"
    shutil.copytree(images / "pictures", inside / "pictures")
    (inside / "labels.csv").write_text("file,label,split\n" + lines(split=lambda i: "train" if i < 8 else "val"))
    packed = shutil.make_archive(str(root / "set"), kind, root / "pack")
    (images / "labels.csv").write_text((inside / "labels.csv").read_text())
    for options in ({"budget": budget}, {"budget": budget, "cache": False}):
        found, _ = load(packed, **options)
        assert (len(found.train), len(found.test), found.classes) == (8, 4, ("ant", "bee"))
        assert found.digest == load(images / "labels.csv")[0].digest


def test_tables_of_splits_in_an_archive(images, tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    for name in ("train", "valid"):  # names of files without their ending, in a folder of the table's name
        (root / "pack" / name).mkdir(parents=True)
    for i in range(12):
        shutil.copy(images / "pictures" / f"{i}.png", root / "pack" / ("train" if i < 8 else "valid"))
    for name, part in (("train", range(8)), ("valid", range(8, 12))):
        rows = "".join(f"{i},{'ant' if i % 2 else 'bee'}\n" for i in part)
        (root / "pack" / f"{name}.csv").write_text("image_id,breed\n" + rows)
    dataset, _ = load(shutil.make_archive(str(root / "set"), "zip", root / "pack"))
    assert dataset.train.images[:, 0, 0, 0].tolist() == list(range(8)) and len(dataset.test) == 4


def test_what_a_table_in_an_archive_names_in_vain(images):
    (images / "labels.csv").write_text("file,label\n" + lines() + "../../etc/passwd,ant\nlost.png,bee\n")
    packed = shutil.make_archive(str(images / "set"), "zip", images)
    with pytest.raises(DataError, match="2 images cannot be read: .*passwd .it does not exist.*lost.png .it does not"):
        load(packed, val_share=0.5)
    dataset, said = load(packed, val_share=0.5, skip_bad=True)
    assert len(dataset.train) + len(dataset.test) == 12 and "2 unreadable images" in said[-1]


def test_class_folders_in_an_archive_beside_some_table_are_classes(images):
    for i in range(12):
        place = images / "pack" / ("ant" if i % 2 else "bee")
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / "pictures" / f"{i}.png", place)
    (images / "pack" / "notes.csv").write_text("who,when\n")
    dataset, _ = load(shutil.make_archive(str(images / "set"), "zip", images / "pack"), val_share=0.5)
    assert dataset.classes == ("ant", "bee")


def test_a_folder_with_one_table_and_one_folder_of_images(images):
    (images / "labels.csv").write_text("file,label\n" + lines())
    assert len(load(images, val_share=0.5)[0].train) == 6


def test_a_contests_table_of_tests_without_labels_is_left_out(images):
    (images / "train.csv").write_text("id,label\n" + "".join(f"{i},{i % 2}\n" for i in range(8)))
    (images / "val.csv").write_text("id,label\n" + "".join(f"{i},{i % 2}\n" for i in range(8, 10)))
    (images / "test.csv").write_text("id\n10\n11\n")
    (images / "pictures").rename(images / "images")
    for place in (images, shutil.make_archive(str(images.parent / "contest"), "zip", images)):
        dataset, said = load(place)
        assert (len(dataset.train), len(dataset.test), dataset.val) == (8, 2, None)
        assert said[0].endswith("test.csv)") and "1 tables without labels" in said[0]
    (images / "val.csv").unlink()
    with pytest.raises(DataError, match="no folder 'test'"):
        load(images)
