"""Retrieval with all captions: R@k by a sort, the layouts of COCO and Flickr30k, the command."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from muse.errors import DataError
from muse.evaluation import command, retrieval
from muse.evaluation.caption_files import CaptionedPictures, read_caption_file
from muse.evaluation.retrieval import full_retrieval
from muse.utils import distributed
from scripts import evaluate_images, zero_shot
from tests.helpers import one_error


def unit(count, width=8, seed=0):
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


def owners(counts):
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


# ----------------------------------------------------------------------------------------- recalls
def by_sorting(images, texts, image_of, k):
    """The share of queries with a right answer among the first k of numpy's order."""
    scores = (images.double() @ texts.double().T).numpy()
    of = image_of.numpy()
    best = np.argsort(-scores, axis=1)[:, :k]
    to_text = np.mean([(of[row] == i).any() for i, row in enumerate(best)])
    best = np.argsort(-scores.T, axis=1)[:, :k]
    return to_text, np.mean([of[i] in row for i, row in enumerate(best)])


@pytest.mark.parametrize("counts", [[5] * 30, [1, 5, 2, 7, 5, 5, 1, 3, 4, 5, 6, 5], [1] * 25])
def test_recalls_are_those_of_a_sort(counts, monkeypatch):
    image_of = owners(counts)
    images, texts = unit(len(counts)), unit(len(image_of), seed=1)
    texts = torch.nn.functional.normalize(texts + images[image_of], dim=1)
    got = full_retrieval(images, texts, image_of)
    for k in (1, 5, 10):
        to_text, to_image = by_sorting(images, texts, image_of, k)
        assert got[f"image_to_text_r{k}"] == pytest.approx(to_text)
        assert got[f"text_to_image_r{k}"] == pytest.approx(to_image)
    assert 0 < got["image_to_text_r1"] < got["image_to_text_r10"]
    monkeypatch.setattr(retrieval, "BLOCK", 70)  # few rows at a time
    assert full_retrieval(images, texts, image_of) == pytest.approx(got)


def test_equal_scores_are_a_choice_at_random():
    """Against all orders of five captions, two of them the picture's own; and chance."""
    image_of = torch.tensor([0, 0, 1, 1, 1])
    images, texts = torch.ones(2, 1), torch.ones(5, 1)
    got = full_retrieval(images, texts, image_of, recalls=(1, 2, 3, 4))
    for k in (1, 2, 3, 4):
        orders = list(itertools.permutations(range(5)))
        want = [np.mean([any(image_of[i] == p for i in o[:k]) for o in orders]) for p in (0, 1)]
        assert got[f"image_to_text_r{k}"] == pytest.approx(np.mean(want))
        assert got[f"image_to_text_chance_r{k}"] == pytest.approx(np.mean(want))
        assert got[f"text_to_image_r{k}"] == pytest.approx(min(k / 2, 1))


def test_a_block_of_similarities_is_all_that_is_held(monkeypatch):
    monkeypatch.setattr(retrieval, "BLOCK", 4096)
    largest = []
    product = torch.Tensor.__matmul__

    def watched(a, b):
        made = product(a, b)
        largest.append(made.numel())
        return made

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    image_of = owners([5] * 200)
    full_retrieval(unit(200), unit(1000, seed=1), image_of)
    assert max(largest) <= 4096 and sum(largest) == 2 * 200 * 1000


@pytest.mark.parametrize("image_of", [[0, 0, 2], [0, 1], [0, 1, 3]])
def test_every_picture_has_a_caption(image_of):
    with pytest.raises(ValueError, match="a caption for each"):
        full_retrieval(unit(3), unit(3), torch.tensor(image_of))


# ----------------------------------------------------------------------------------------- layouts
COUNT, EACH = 4, 5


def sentence(picture, number):
    return f"picture {picture} in words {number}"


@pytest.fixture
def folder(tmp_path):
    """val/0.jpg ... and files of captions in every form."""
    (tmp_path / "val").mkdir()
    rng = np.random.default_rng(0)
    names = [f"{i}.jpg" for i in range(COUNT)]
    for name in names:
        pixels = rng.integers(0, 256, (40, 44, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "val" / name)
    texts = [[sentence(i, j) for j in range(EACH)] for i in range(COUNT)]
    split = [
        {"filename": name, "filepath": "val", "split": "test",
         "sentences": [{"raw": one} for one in own]}
        for name, own in zip(names, texts)
    ]  # fmt: skip
    elsewhere = {"filename": "x.jpg", "filepath": "val", "split": "train", "sentences": []}
    (tmp_path / "karpathy.json").write_text(json.dumps({"images": [*split, elsewhere]}))
    images = [{"id": i + 50, "file_name": name} for i, name in enumerate(names)]
    notes = [{"image_id": i + 50, "caption": t} for i, own in enumerate(texts) for t in own]
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": notes}))
    pairs = [(name, j, t) for name, own in zip(names, texts) for j, t in enumerate(own)]
    (tmp_path / "flickr.token").write_text("".join(f"{n}#{j}\t{t}\n" for n, j, t in pairs))
    rows = "".join(f'{n},"{t}"\n' for n, _, t in pairs)
    (tmp_path / "captions.csv").write_text("image,caption\n" + rows)
    return tmp_path


FORMS = ["karpathy.json", "coco.json", "flickr.token", "captions.csv"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_captions(form, folder):
    pictures = CaptionedPictures(folder / "val", folder / form)
    assert pictures.shards == ("0.jpg", "1.jpg", "2.jpg", "3.jpg")
    for number, shard in enumerate(pictures.shards):
        want = tuple(sentence(number, j) for j in range(EACH))
        assert pictures.captions[shard] == want
        (record,) = pictures.read(shard)
        assert record.load().members["jpg"] == (folder / "val" / shard).read_bytes()


def test_a_split_is_found_from_the_folder_above(folder):
    assert CaptionedPictures(folder, folder / "karpathy.json").shards[0] == "val/0.jpg"


def test_a_picture_without_captions_is_one_line(folder):
    Image.new("RGB", (8, 8)).save(folder / "val" / "new.jpg")
    for form in FORMS[1:]:
        with pytest.raises(DataError, match="1 of 5 pictures of .* have no caption in .*new.jpg"):
            CaptionedPictures(folder / "val", folder / form)
    (folder / "val" / "2.jpg").unlink()
    with pytest.raises(DataError, match="names val/2.jpg, which is not in"):
        CaptionedPictures(folder / "val", folder / "karpathy.json")


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("none.json", None, "cannot be read"),
        ("list.json", "[1]", "of no form that is known"),
        ("broken.json", "{", "of no form that is known"),
        ("train.json", '{"images": []}', "names no pictures of `test`"),
        ("other.csv", "a,b\n1,2\n", "of no form that is known"),
        ("plain.txt", "a picture\n", "of no form that is known"),
        ("empty.txt", "", "names no pictures"),
    ],
)
def test_another_file_is_one_line(name, text, says, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=says):
        read_caption_file(tmp_path / name)


# ------------------------------------------------------------------------------------- the command
@pytest.fixture
def run(trained_run, tmp_path):
    config, trained = trained_run
    flags = ["--config", config, "--checkpoint", trained / "final", "--device", "cpu"]

    def command_line(*extra):
        words = [*flags, "--output_dir", tmp_path / "out", *extra]
        return zero_shot.main(list(map(str, words)))

    return command_line


def read(tmp_path):
    return json.loads((tmp_path / "out" / "metrics.json").read_text())


@pytest.mark.parametrize("protocol, form", [("coco-retrieval", 0), ("flickr-retrieval", 2)])
def test_protocols_of_retrieval(protocol, form, run, folder):
    """The first five count of each picture; there is no classification."""
    if form == 2:
        with open(folder / FORMS[form], "a") as file:
            file.write("1.jpg#5\ta sixth\n")
    data = ["--val_url", folder / "val", "--captions", folder / FORMS[form]]
    size = ["--resize", 32, "--crop", 32]
    assert run("--protocol", protocol, *data, *size, "--batch_size", 3) == 0
    got = read(folder)
    assert "top1" not in got
    assert (got["retrieval_images"], got["retrieval_captions"]) == (COUNT, COUNT * EACH)
    for way in ("image_to_text", "text_to_image"):
        ranks = [got[f"retrieval_{way}_r{k}"] for k in (1, 5, 10)]
        assert ranks == sorted(ranks) and ranks[-1] <= 1
    assert got["retrieval_text_to_image_r5"] == 1  # of four pictures
    said = got["protocol"]
    assert said["name"] == protocol and set(said["changed"]) == {"crop", "images"}
    assert said["retrieval"]["captions_per_image"] == {"least": EACH, "most": EACH}


def test_all_of_shards_with_labels_beside_classification(run, tmp_path):
    assert run("--retrieval", "all") == 0
    got = read(tmp_path)
    assert got["retrieval_images"] == got["retrieval_captions"] == 8 and "top1" in got
    assert {"retrieval", "recalls"} <= set(got["protocol"]["changed"])
    assert got["protocol"]["recipe"]["recalls"] == [1, 5, 10]


def test_captions_beside_the_pictures_one_a_line(run, folder):
    for number in range(COUNT):
        lines = "\n".join(sentence(number, j) for j in range(number + 1))
        (folder / "val" / f"{number}.txt").write_text(lines + "\n")
    assert run("--retrieval", "all", "--val_url", folder / "val") == 0
    got = read(folder)
    assert got["retrieval_captions"] == 1 + 2 + 3 + 4 and "top1" not in got
    said = got["protocol"]["retrieval"]["captions_per_image"]
    assert said == {"least": 1, "most": 4}
    (folder / "val" / "3.txt").unlink()


def test_missing_captions_are_one_line_and_leave_nothing(run, folder, capsys):
    out = folder / "out" / "metrics.json"
    line = one_error(capsys, run("--retrieval", "all", "--val_url", folder / "val"))
    assert "missing_caption" in line and not out.exists()
    (folder / "val" / "new.png").write_bytes((folder / "val" / "0.jpg").read_bytes())
    data = ["--val_url", folder / "val", "--captions", folder / "coco.json"]
    line = one_error(capsys, run("--protocol", "coco-retrieval", *data))
    assert "1 of 5 pictures" in line and not out.exists()
    line = one_error(capsys, run("--captions", folder / "coco.json"))
    assert "--captions is for --retrieval all or a number" in line
    line = one_error(capsys, run("--retrieval", "some"))
    assert (
        "--retrieval must be 0 (none) or at least 2 candidates, not some; `all` takes all" in line
    )


# ----------------------------------------------------------------------------- waiting for the rest
def test_collectives_have_a_time_out_of_their_own(run, shapes_data, tmp_path, monkeypatch):
    """What the process group is made with: twelve hours, or the flag."""
    joined = []

    def watched(device, timeout=None):
        joined.append(timeout.total_seconds())
        return device

    monkeypatch.setattr(command, "join_processes", watched)
    assert run() == 0
    sets = ["--real", f"{shapes_data}/val-*.tar", "--fake", f"{shapes_data}/val-*.tar"]
    out = ["--output_dir", str(tmp_path), "--metrics", "ssim", "--device", "cpu"]
    assert evaluate_images.main([*sets, *out, "--collective_timeout", "90"]) == 0
    assert joined == [12 * 3600, 90 * 60]


def test_the_time_out_reaches_the_process_group(monkeypatch):
    made = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(
        distributed.dist, "init_process_group", lambda backend, **options: made.update(options)
    )
    distributed.join_processes("cpu", command.timedelta(minutes=3))
    assert made["timeout"].total_seconds() == 180
