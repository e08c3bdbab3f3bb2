import numpy as np
import pytest
import torch
from PIL import Image

from muse.data.dataloader import eval_loader, train_loader
from muse.data.folders import FolderSource
from muse.data.sources import open_source
from muse.data.tar import TarSource
from muse.errors import ConfigError, DataError
from tests.data.helpers import encode, picture, write_shards

SIZE = {"resize_shorter_edge": 16, "crop_size": 16}


def put(path, data: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def test_class_folders(tmp_path):
    """Labels are places in alphabetical order; pictures at any depth, any suffix case, hidden ones
    left out.
    """
    expected = {}
    for i, name in enumerate(["b_dog/1.png", "a_cat/2.PNG", "a_cat/deep/3.jpeg", "c/4.png"]):
        put(tmp_path / name, encode(picture(i), "JPEG" if name.endswith("jpeg") else "PNG"))
        expected[name] = {"b": 1, "a": 0, "c": 2}[name[0]]
    put(tmp_path / "a_cat/.hidden.png", b"")
    put(tmp_path / "a_cat/notes.md", b"")
    loader = eval_loader(str(tmp_path), batch_size=3, fields=("images", "labels"), **SIZE)
    assert loader.classes == ("a_cat", "b_dog", "c") and loader.num_samples == 4
    got = {
        key: label
        for batch in loader
        for key, label in zip(batch["keys"], batch["labels"].tolist(), strict=True)
    }
    assert got == expected


def test_flat_folder_with_captions(tmp_path):
    put(tmp_path / "1.png", encode(picture(1)))
    put(tmp_path / "1.txt", b"one")
    put(tmp_path / "2.png", encode(picture(2)))
    put(tmp_path / "2.json", b'{"caption": "two"}')
    (batch,) = eval_loader(tmp_path, batch_size=4, fields=("images", "text"), **SIZE)
    assert batch["text"] == ["one", "two"] and batch["keys"] == ["1.png", "2.png"]
    expected = torch.from_numpy(np.array(picture(1))[:, 2:18].copy()).permute(2, 0, 1) / 255
    assert torch.equal(batch["images"][0], expected)
    put(tmp_path / "3.png", encode(picture(3)))
    put(tmp_path / "3.txt", b" ")
    (batch,) = eval_loader(tmp_path, batch_size=4, **SIZE)  # captions not asked for
    assert batch["text"] == ["one", "two", ""]
    with pytest.raises(DataError, match="missing_caption 1 .3.png."):
        list(eval_loader(tmp_path, batch_size=4, fields=("images", "text"), **SIZE))
    put(tmp_path / "3.caption", b"three")  # an empty .txt falls to the next
    (batch,) = eval_loader(tmp_path, batch_size=4, fields=("images", "text"), **SIZE)
    assert batch["text"] == ["one", "two", "three"]


@pytest.mark.parametrize(
    "images, masks", [("images", "masks"), ("images/val", "annotations/val"), ("pics", "segs")]
)
def test_picture_and_mask_folders(tmp_path, images, masks):
    for n in (3, 7):
        put(tmp_path / images / f"{n}.jpg", encode(picture(n), "JPEG"))
        put(tmp_path / masks / f"{n}.png", encode(Image.fromarray(np.full((16, 20), n, np.uint8))))
    source = (
        {"images": str(tmp_path / "pics"), "masks": str(tmp_path / "segs")}
        if images == "pics"
        else str(tmp_path)
    )
    options = dict(batch_size=2, fields=("images", "masks"), **SIZE)
    (batch,) = eval_loader(source, **options)
    assert batch["masks"].dtype == torch.int64 and batch["masks"].shape == (2, 16, 16)
    assert [mask.unique().tolist() for mask in batch["masks"]] == [[3], [7]]
    (batch,) = eval_loader(source, zero_label_ignored=True, **options)
    assert [mask.unique().tolist() for mask in batch["masks"]] == [[2], [6]]


def test_masks_that_do_not_fit(tmp_path):
    put(tmp_path / "images/1.png", encode(picture(1)))
    put(tmp_path / "masks/2.png", encode(picture(1)))
    with pytest.raises(DataError, match="no mask in .*masks has the name of a picture .*'1.png'"):
        open_source(str(tmp_path))
    with pytest.raises(DataError, match="no such mask folder"):
        open_source({"images": str(tmp_path / "images"), "masks": str(tmp_path / "none")})
    put(tmp_path / "masks/1.png", encode(Image.new("L", (5, 5))))
    with pytest.raises(DataError, match="mask_size 1"):
        list(eval_loader(str(tmp_path), batch_size=1, fields=("images", "masks"), **SIZE))


def test_what_a_directory_is(tmp_path):
    write_shards(tmp_path / "tars", 1, 2)
    put(tmp_path / "pictures/1.png", encode(picture(1)))
    (tmp_path / "empty").mkdir()
    put(tmp_path / "mixed/1.png", b"")
    put(tmp_path / "mixed/cat/2.png", b"")
    assert isinstance(open_source(str(tmp_path / "tars")), TarSource)
    assert isinstance(open_source(tmp_path / "pictures"), FolderSource)
    for name, message in (
        ("empty", "holds neither"),
        ("gone", "no such shard"),
        ("mixed", "mixes class folders"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(str(tmp_path / name))
    with pytest.raises(ConfigError, match="needs 'urls'"):
        open_source({"url": "x"})
    with pytest.raises(ConfigError, match="not a data source"):
        open_source(None)


def test_training_on_a_folder_shares_out_every_picture(tmp_path):
    """Two ranks with two workers over ten pictures: an epoch of all readers together is the set."""
    for n in range(10):
        put(tmp_path / f"{n}.png", encode(picture(n)))
    options = dict(batch_size=1, fields=("images",), num_workers=2, **SIZE)
    seen = []
    for rank in range(2):
        loader = train_loader(str(tmp_path), rank=rank, world=2, **options)
        shares = [
            0,
            0,
        ]  # ten pictures over four readers: readers 0 and 1 get three, 2 and 3 get two
        for number, batch in enumerate(loader):
            worker = number % 2
            if shares[worker] < (3 if rank == 0 else 2):
                shares[worker] += 1
                seen += batch["keys"]
            if number == 5:
                break
    assert sorted(seen) == [f"{n}.png" for n in range(10)]
    with pytest.raises(DataError, match="has 10 shards for 11 ranks"):
        train_loader(str(tmp_path), rank=0, world=11, **options)


def test_a_list_and_two_folders_written_out_as_on_a_command_line(tmp_path):
    for n in range(2):
        put(tmp_path / "pics" / f"{n}.png", encode(picture(n)))
        put(tmp_path / "segs" / f"{n}.png", encode(Image.fromarray(np.full((16, 20), n, np.uint8))))
    text = f"{{images: {tmp_path}/pics, masks: {tmp_path}/segs}}"
    (batch,) = eval_loader(text, batch_size=2, fields=("images", "masks"), **SIZE)
    assert batch["masks"][:, 0, 0].tolist() == [0, 1]
    source = open_source(text)
    assert (source.root, source.mask_folder) == (f"{tmp_path}/pics", f"{tmp_path}/segs")
    write_shards(tmp_path, 2, 3)
    shards = [f"{tmp_path}/t-000.tar", f"{tmp_path}/t-001.tar"]
    assert open_source(f"[{', '.join(shards)}]").shards == shards
    # braces and brackets of patterns mean what they meant
    assert open_source(f"{{{shards[0]},{shards[1]}}}").shards == shards
    (tmp_path / "[x]").mkdir()
    assert open_source(f"{tmp_path}/t-00[01].tar").shards == shards
