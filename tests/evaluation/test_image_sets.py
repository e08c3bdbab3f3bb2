"""Sets of pictures: folder, shards and npz give the same bytes; writing gives them back."""

import io
import tarfile

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from skimage.data import astronaut, coffee

from muse.data.crops import PictureCrop
from muse.errors import DataError
from muse.evaluation.image_sets import open_image_set
from muse.evaluation.image_writer import image_writer

COUNT, SIDE = 11, 24
PICTURES = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)


def as_bytes(batches):
    return (torch.cat(list(batches)) * 255).round().byte().permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """The same pictures as a folder, a shard, and an npz, plain and compressed."""
    root = tmp_path_factory.mktemp("forms")
    (root / "folder").mkdir()
    with tarfile.open(root / "set.tar", "w") as archive:
        for number, picture in enumerate(PICTURES):
            Image.fromarray(picture).save(root / "folder" / f"{number:03d}.png")
            data = (root / "folder" / f"{number:03d}.png").read_bytes()
            info = tarfile.TarInfo(f"{number:03d}.png")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    np.savez(root / "plain.npz", arr_0=PICTURES, arr_1=np.arange(COUNT))  # ADM adds labels
    np.savez_compressed(root / "packed.npz", PICTURES)
    return root


@pytest.mark.parametrize("form", ["folder", "set.tar", "plain.npz", "packed.npz"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_every_form_gives_the_same_bytes_in_order(forms, form, batch_size):
    images = open_image_set(str(forms / form))
    assert images.count == COUNT
    assert images.statistics == {}
    batches = list(images.batches(batch_size))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert np.array_equal(as_bytes(batches), PICTURES)
    assert np.array_equal(as_bytes(images.batches(batch_size)), PICTURES)  # and again


def test_loader_processes_change_nothing(forms):
    images = open_image_set(str(forms / "folder"))
    assert np.array_equal(as_bytes(images.batches(3, num_workers=2)), PICTURES)


def test_an_npz_is_read_in_blocks(forms, monkeypatch):
    """No block is larger than what was asked for: a set of 50,000 would not fit."""
    read = []
    original = np.frombuffer

    def watched(data, *rest):
        read.append(len(data))
        return original(data, *rest)

    monkeypatch.setattr(np, "frombuffer", watched)
    list(open_image_set(str(forms / "plain.npz")).batches(4))
    assert max(read) == 4 * SIDE * SIDE * 3
    assert sum(read) == PICTURES.size


@pytest.mark.parametrize("form", ["folder", "npz"])
def test_pictures_are_cut_by_the_protocols_crop(tmp_path, form):
    crop = PictureCrop("adm", None, 48)
    pictures = [coffee(), coffee()[:, ::-1].copy()]
    if form == "npz":
        np.savez(tmp_path / "set.npz", np.stack(pictures))
        source = tmp_path / "set.npz"
    else:
        pictures[1] = astronaut()  # of another size
        source = tmp_path
        for number, picture in enumerate(pictures):
            Image.fromarray(picture).save(tmp_path / f"{number}.png")
    want = [crop(Image.fromarray(picture)).permute(1, 2, 0).numpy() for picture in pictures]
    assert np.array_equal(as_bytes(open_image_set(source, crop).batches()), np.stack(want))


# -------------------------------------------------------------------------------------- statistics
def test_adms_reference_file(tmp_path):
    """mu, sigma, mu_s, sigma_s beside arr_0, as ADM's reference batches hold them."""
    rng = np.random.default_rng(1)
    parts = {"mu": rng.random(5), "sigma": rng.random((5, 5))}
    spatial = {"mu_s": rng.random(7), "sigma_s": rng.random((7, 7))}
    np.savez(tmp_path / "both.npz", arr_0=PICTURES, **parts, **spatial)
    images = open_image_set(tmp_path / "both.npz")
    assert images.count == COUNT and sorted(images.statistics) == ["fid", "sfid"]
    assert np.array_equal(images.statistics["sfid"][1], spatial["sigma_s"])
    np.savez(tmp_path / "alone.npz", **parts)
    images = open_image_set(tmp_path / "alone.npz")
    assert images.count == 0 and sorted(images.statistics) == ["fid"]
    assert np.array_equal(images.statistics["fid"][0], parts["mu"])


@pytest.mark.parametrize(
    "arrays, says",
    [
        ({"features": PICTURES}, r"neither arr_0 .* nor mu and sigma .*, but features$"),
        ({"mu": np.zeros(3)}, r"neither arr_0 .*, but mu$"),
        ({"mu": np.zeros(3), "sigma": np.zeros((4, 4))}, r"mu must be \(D,\) and sigma \(D, D\)"),
        ({"arr_0": PICTURES.astype(np.float32)}, r"of uint8 .* not \(11, 24, 24, 3\) of float32"),
        ({"arr_0": PICTURES[..., :1]}, r"must be \(N,H,W,3\)"),
        ({"arr_0": PICTURES[:0]}, "with N above 0"),
        ({"arr_0": np.asfortranarray(PICTURES)}, r"must be \(N,H,W,3\)"),
        ({"arr_0": np.array([{}], dtype=object)}, r"must be \(N,H,W,3\) .* of object"),
    ],
)
def test_an_npz_that_does_not_fit_is_one_line(tmp_path, arrays, says):
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(DataError, match=says) as error:
        open_image_set(tmp_path / "wrong.npz")
    assert "wrong.npz" in str(error.value) and "\n" not in str(error.value)


def test_missing_and_broken_files_are_one_line(tmp_path, forms):
    (tmp_path / "text.npz").write_text("not a zip")
    for source, says in (
        (tmp_path / "text.npz", "is not an npz file"),
        (tmp_path / "none.npz", "no such file"),
        (tmp_path / "none", "none"),
    ):
        with pytest.raises(DataError, match=says):
            open_image_set(source)
    cut = bytearray((forms / "plain.npz").read_bytes())
    cut[4000:4100] = bytes(100)  # within the pictures: the check sum of the file does not fit
    (tmp_path / "cut.npz").write_bytes(cut)
    with pytest.raises(DataError, match=r"cut.npz is damaged"):
        list(open_image_set(tmp_path / "cut.npz").batches())


def test_pictures_of_two_sizes_need_a_crop(tmp_path):
    for number, size in enumerate([(24, 24), (24, 24), (30, 24)]):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    with pytest.raises(DataError, match=r"2.png is not of the first picture's size: give --resize"):
        list(open_image_set(tmp_path).batches(2))


def test_an_unreadable_picture_is_not_left_out(tmp_path):
    Image.new("RGB", (24, 24)).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"1.png \(not_an_image\)"):
        list(open_image_set(tmp_path).batches())
    with pytest.raises(DataError, match=r"1.png \(not_an_image\)"):
        list(open_image_set(tmp_path, PictureCrop("center", 24, 24)).batches())


# ----------------------------------------------------------------------------------------- writing
def tensors(pictures=PICTURES):
    return torch.from_numpy(pictures.astype(np.float32) / 255).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", ["set.npz", "set"])
def test_what_is_written_is_read_back(tmp_path, name):
    target = tmp_path / "deep" / name
    with image_writer(target) as add:
        for part in tensors().split(4):
            add(part)
    assert np.array_equal(as_bytes(open_image_set(target).batches()), PICTURES)
    assert [path.name for path in target.parent.iterdir()] == [name]  # nothing else is left
    if name.endswith("npz"):
        assert np.array_equal(np.load(target)["arr_0"], PICTURES)
    else:
        assert sorted(p.name for p in target.iterdir())[-1] == "000010.png"


@pytest.mark.parametrize("name", ["set.npz", "set"])
def test_indices_give_the_order_and_leave_no_gap(tmp_path, name):
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    with image_writer(tmp_path / name) as add:
        for index in order.split(3):
            add(tensors()[index], index * 2**33)  # as of remote shards: far apart
    assert np.array_equal(as_bytes(open_image_set(tmp_path / name).batches()), PICTURES)


def test_bytes_are_rounded_and_clamped(tmp_path):
    with image_writer(tmp_path / "set.npz") as add:
        add(
            torch.tensor([-0.01, 0.4999 / 255, 0.5001 / 255, 1.01])
            .view(1, 1, 2, 2)
            .repeat(1, 3, 1, 1)
        )
    assert np.load(tmp_path / "set.npz")["arr_0"][0, ..., 0].tolist() == [[0, 0], [1, 255]]


@pytest.mark.parametrize("name", ["set.npz", "set"])
def test_a_failure_leaves_the_old_one_and_nothing_else(tmp_path, name):
    with image_writer(tmp_path / name) as add:
        add(tensors())
    with pytest.raises(KeyError), image_writer(tmp_path / name) as add:
        add(tensors()[:3])
        raise KeyError
    assert open_image_set(tmp_path / name).count == COUNT
    with image_writer(tmp_path / name) as add:
        add(tensors()[:3])
    assert open_image_set(tmp_path / name).count == 3
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_of_other_things_is_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="holds 'notes.txt'"), image_writer(tmp_path):
        pass
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(DataError, match="holds 'notes.txt'"):
        with image_writer(tmp_path / "notes.txt"):
            pass
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(DataError, match="is a folder"), image_writer(tmp_path / "folder.npz"):
        pass


def test_pictures_of_two_sizes_are_no_array(tmp_path):
    with pytest.raises(DataError, match="in one array"), image_writer(tmp_path / "x.npz") as add:
        add(tensors())
        add(tensors()[:, :, :20])
    with pytest.raises(DataError, match="no pictures"), image_writer(tmp_path / "x.npz"):
        pass
    assert list(tmp_path.iterdir()) == []


def write_part(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    for name in ("set.npz", "set"):
        with image_writer(folder / name) as add:
            mine = torch.arange(COUNT)[rank::2]
            for index in mine.split(2):
                add(tensors()[index], index)
    with image_writer(folder / "one.npz") as add:
        if rank == 1:  # a process without pictures
            add(tensors(), torch.arange(COUNT))
    dist.destroy_process_group()


def test_two_processes_write_one_set(tmp_path):
    mp.spawn(write_part, (tmp_path,), nprocs=2)
    for name in ("set.npz", "set", "one.npz"):
        assert np.array_equal(as_bytes(open_image_set(tmp_path / name).batches()), PICTURES)
