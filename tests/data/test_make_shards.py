import csv
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from muse.data.dataloader import eval_loader
from muse.data.shard_writer import WritePlan, _digest
from muse.data.tar import TarSource
from tests.data.helpers import encode, picture, sample, write_faulty, write_shards, write_tar
from tools import check_shards, make_shards

FIELDS = ("images", "text", "labels", "masks")


def jpeg(seed, **size):
    return encode(picture(seed, **size), "JPEG")


def make(kind, source, output, *flags):
    argv = [kind, "--input", str(source), "--output", str(output), "--workers", "1", *flags]
    return make_shards.main(argv)


def members(output, name="train"):
    source = TarSource(f"{output}/{name}-*.tar")
    return [r.load().members for shard in source.shards for r in source.read(shard)]


def line(capsys):
    err = capsys.readouterr().err.strip().splitlines()
    errors = [one for one in err if one.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in "".join(err)
    return errors[0]


@pytest.fixture
def class_folders(tmp_path):
    for number in range(6):
        folder = tmp_path / "data" / ("n02" if number % 2 else "n01")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.JPEG").write_bytes(jpeg(number))
    return tmp_path / "data"


def imagenet_tar(folder, path):
    """As the challenge's archive: a tar of one tar for each class."""
    with tarfile.open(path, "w") as outer:
        for one in sorted(folder.iterdir()):
            inner = path.parent / f"{one.name}.tar"
            with tarfile.open(inner, "w") as tar:
                for file in sorted(one.iterdir()):
                    tar.add(file, file.name)
            outer.add(inner, inner.name)
            inner.unlink()
    return path


@pytest.mark.parametrize("form", ["folders", "tar"])
def test_imagenet_is_copied_byte_for_byte_with_its_classes(form, class_folders, tmp_path):
    source = class_folders
    if form == "tar":
        source = imagenet_tar(class_folders, tmp_path / "train.tar")
    assert make("imagenet", source, tmp_path / "out", "--per_shard", "4", "--verify") == 0
    got = members(tmp_path / "out")
    assert sorted((one["jpg"], one["cls"]) for one in got) == sorted(
        (jpeg(n), str(n % 2).encode()) for n in range(6)
    )
    assert (tmp_path / "out/classes.txt").read_text() == "n01\nn02\n"
    assert [one["cls"] for one in got] != sorted(one["cls"] for one in got)  # shuffled
    assert TarSource(f"{tmp_path}/out").contents(f"{tmp_path}/out/train-000000.tar") == (4, None)
    assert (tmp_path / "out/train-000001.tar.idx").is_file()


def test_several_processes_write_the_same_shards(class_folders, tmp_path):
    for workers in ("1", "2"):
        out = tmp_path / workers
        argv = ["folder", "--input", str(class_folders), "--output", str(out), "--per_shard", "2"]
        assert make_shards.main([*argv, "--workers", workers]) == 0
    for number in range(3):
        name = f"train-{number:06d}.tar"
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_captions_of_a_table(tmp_path, suffix):
    rows = [{"file": f"{n // 2}.jpg", "words": f"caption {n}, ünd"} for n in range(4)]
    rows.append({"file": "2.jpg", "words": "only one"})
    (tmp_path / "pictures").mkdir()
    for n in range(3):
        (tmp_path / f"pictures/{n}.jpg").write_bytes(jpeg(n))
    table = tmp_path / f"table.{suffix}"
    with open(table, "w", encoding="utf-8", newline="") as file:
        if suffix == "jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if suffix == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    flags = ["--image_column", "file", "--caption_column", "words", "--keep_order"]
    assert make("captions", table, tmp_path / "out", "--root", f"{tmp_path}/pictures", *flags) == 0
    got = members(tmp_path / "out")
    assert [one["jpg"] for one in got] == [jpeg(n) for n in range(3)]
    assert json.loads(got[0]["json"]) == {"caption": ["caption 0, ünd", "caption 1, ünd"]}
    assert got[2]["txt"] == b"only one"


def test_ade20k(tmp_path, capsys):
    for n in range(3):
        for part, data in (("images", jpeg(n)), ("annotations", sample(n)["seg.png"])):
            folder = tmp_path / "ade" / part / "validation"
            folder.mkdir(parents=True, exist_ok=True)
            suffix = "jpg" if part == "images" else "png"
            (folder / f"ADE_val_{n}.{suffix}").write_bytes(data)
    flags = ("--split", "validation", "--name", "val", "--keep_order")
    assert make("ade20k", tmp_path / "ade", tmp_path / "out", *flags) == 0
    got = members(tmp_path / "out", "val")
    assert got == [{"jpg": jpeg(n), "seg.png": sample(n)["seg.png"]} for n in range(3)]
    assert make("ade20k", tmp_path / "ade", tmp_path / "out2") == 2
    assert "images/training" in line(capsys)
    (tmp_path / "ade/annotations/validation/ADE_val_1.png").unlink()
    assert make("ade20k", tmp_path / "ade", tmp_path / "out2", *flags) == 2
    assert "1 pictures have no annotation, the first is ADE_val_1.jpg" in line(capsys)


def test_coco_keeps_every_caption(tmp_path):
    content = {
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}],
        "annotations": [
            {"image_id": 3 if n % 2 else 7, "caption": f"caption {n} "} for n in range(10)
        ],
    }
    (tmp_path / "captions.json").write_text(json.dumps(content))
    for n, name in enumerate(("a.jpg", "b.jpg")):
        (tmp_path / name).write_bytes(jpeg(n))
    assert make("coco", tmp_path / "captions.json", tmp_path / "out", "--keep_order") == 0
    batch = next(iter(eval_loader(str(tmp_path / "out"), batch_size=2, fields=("images", "text"))))
    assert batch["text"] == ["caption 0", "caption 1"]
    assert json.loads(members(tmp_path / "out")[1]["json"])["caption"] == [
        f"caption {n}" for n in (1, 3, 5, 7, 9)
    ]


def test_edits(tmp_path):
    rows = [{"input": f"{n}.jpg", "output": f"{n}.png", "instruction": f"do {n}"} for n in range(2)]
    for n in range(2):
        (tmp_path / f"{n}.jpg").write_bytes(jpeg(n))
        (tmp_path / f"{n}.png").write_bytes(encode(picture(n + 5)))
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert make("edits", tmp_path / "edits.jsonl", tmp_path / "out", "--keep_order") == 0
    assert members(tmp_path / "out") == [
        {"input.jpg": jpeg(n), "output.png": encode(picture(n + 5)), "txt": f"do {n}".encode()}
        for n in range(2)
    ]


def test_max_side_makes_large_pictures_and_their_masks_smaller(tmp_path):
    mask = np.zeros((40, 80), np.uint8)
    mask[:, 40:] = 3
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jpg").write_bytes(jpeg(1, width=80, height=40))
    (tmp_path / "data/a.seg.png").write_bytes(encode(Image.fromarray(mask)))
    (tmp_path / "data/b.png").write_bytes(encode(picture(2)))
    (tmp_path / "data/c.bmp").write_bytes(encode(picture(3), "BMP"))
    argv = ("--max_side", "40", "--keep_order")
    assert make("folder", tmp_path / "data", tmp_path / "out", *argv) == 0
    large, small, other = members(tmp_path / "out")
    tar = tmp_path / "out/train-000000.tar"
    (shown,) = eval_loader(str(tar), batch_size=1, crop_size=None, resize_shorter_edge=None,
                           max_images=1)  # fmt: skip
    assert shown["images"].shape == (1, 3, 20, 40) and small == {"png": encode(picture(2))}
    (tmp_path / "mask.png").write_bytes(large["seg.png"])
    assert np.array_equal(np.array(Image.open(tmp_path / "mask.png")), mask[::2, ::2])
    (tmp_path / "other.png").write_bytes(other["png"])
    assert np.array_equal(np.array(Image.open(tmp_path / "other.png")), np.array(picture(3)))


# ------------------------------------------------------------------------------- stops and mistakes
def test_a_resume_keeps_finished_shards(class_folders, tmp_path, capsys):
    out, flags = tmp_path / "out", ("--per_shard", "2")
    assert make("imagenet", class_folders, out, *flags) == 0
    whole = {file.name: file.read_bytes() for file in out.glob("*.tar")}
    (out / "train-000001.tar").unlink()
    (out / ".train-000001.half.tar").write_bytes(b"half")
    times = {name: (out / name).stat().st_mtime_ns for name in whole if (out / name).exists()}
    assert make("imagenet", class_folders, out, *flags) == 2
    assert "--resume goes on" in line(capsys)
    assert make("imagenet", class_folders, out, "--per_shard", "3", "--resume") == 2
    assert "other samples" in line(capsys)
    assert make("imagenet", class_folders, out, *flags, "--resume") == 0
    assert {file.name: file.read_bytes() for file in out.glob("*.tar")} == whole
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times
    assert not list(out.glob(".train-*.tar"))


def test_the_plan_knows_the_order(tmp_path):
    plan = WritePlan(tmp_path)
    assert _digest([{"txt": b"a"}, {"txt": b"b"}], plan) != _digest(
        [{"txt": b"b"}, {"txt": b"a"}], plan
    )


def test_pictures_that_cannot_be_used_are_left_out_or_stop_it(class_folders, tmp_path, capsys):
    (class_folders / "n01/bad.jpg").write_bytes(jpeg(1, width=64, height=64)[:700])
    out = tmp_path / "out"
    allowed = ("--verify", "--max_bad_fraction", "0.2")
    assert make("imagenet", class_folders, out, *allowed) == 0
    assert "1 of 7 samples could not be used: truncated_image 1" in capsys.readouterr().out
    assert len(members(out)) == 6
    assert make("imagenet", class_folders, tmp_path / "out2", "--verify") == 2
    assert "n01/bad.jpg" in line(capsys)


@pytest.mark.parametrize(
    "kind, name, content, flags, part",
    [
        ("films", "a.csv", "image,caption\n", [], "unknown kind 'films': one of imagenet"),
        ("captions", "gone.csv", None, [], "no such file or directory"),
        ("captions", "a.csv", "picture,caption\nx.jpg,y\n", [], "no column 'image' (picture, capt"),
        ("captions", "a.csv", "image,caption\n", [], "holds no pictures"),
        ("captions", "a.txt", "x", [], "a table is a .csv, .tsv, .jsonl or .parquet file"),
        ("captions", "a.jsonl", "{}\n{", [], "line 2: not JSON"),
        ("captions", "a.csv", "image,caption\nx.jpg,y\n", [], "unreadable_file"),
        ("edits", "a.csv", "input,output\na,b\n", [], "no column 'instruction'"),
        ("coco", "a.json", '{"images": []}', [], "not COCO's captions_*.json"),
        ("imagenet", "a.tar", "no tar", [], "cannot be read as an uncompressed tar"),
        ("folder", "a.csv", "x", [], "is not a directory"),
        ("captions", "a.csv", "image,caption\nx.jpg,y\n", ["--per_shard", "0"], "--per_shard"),
        ("ade20k", "a.csv", "x", ["--split", "test"], "--split is one of training, validation"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, kind, name, content, flags, part):
    if content is not None:
        (tmp_path / name).write_text(content)
    assert make(kind, tmp_path / name, tmp_path / "out", *flags) == 2
    assert part in line(capsys)
    assert not list(tmp_path.glob("out/*.tar"))


# ------------------------------------------------------------------------------------ checking
def test_a_check_counts_and_writes_the_index(tmp_path, capsys):
    urls = write_shards(tmp_path, 2, 5)
    assert check_shards.main([urls, "--decode", "--output", str(tmp_path / "facts.json")]) == 0
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert json.loads(capsys.readouterr().out)["samples"] == facts["samples"] == 10
    assert facts["shards"] == 2 and facts["faults"] == {} and facts["repeated_keys"] == 0
    assert facts["samples_per_shard"] == {"least": 5, "median": 5, "most": 5}
    assert facts["bytes"] == sum(len(data) for n in range(10) for data in sample(n).values())
    assert facts["members"] == {"cls": 10, "png": 10, "seg.png": 10, "txt": 10}
    assert facts["captions"] == {
        "count": 10,
        "samples_without": 0,
        "repeated": 0,
        "characters": {"least": 9, "median": 9, "most": 9},
    }
    assert facts["classes"]["histogram"] == {str(label): 2 for label in range(5)}
    assert facts["shorter_side"] == {"least": 16, "median": 16, "most": 16}
    assert (tmp_path / "t-000.tar.idx").is_file() and (tmp_path / "t-001.tar.idx").is_file()


def test_a_check_names_every_fault(tmp_path, capsys):
    assert check_shards.main([write_faulty(tmp_path, 3), "--decode"]) == 2
    out, err = capsys.readouterr()
    faults = [one.removeprefix(f"error: {tmp_path}/") for one in err.splitlines()]
    assert faults == [
        "a-0.tar: bad_empty_file: empty_file",
        "a-0.tar: bad_not_an_image: not_an_image",
        "a-0.tar: bad_truncated_image: truncated_image",
        "a-0.tar: bad_decompression_bomb: decompression_bomb",
        "a-0.tar: bad_missing_image: missing_image",
        "a-0.tar: bad_caption_not_utf8: caption_not_utf8",
        "a-0.tar: bad_bad_json: bad_json",
        "a-1.tar: truncated_tar",
    ]
    captions = json.loads(out)["captions"]
    assert captions["samples_without"] == 3 and captions["repeated"] == 4  # the five "x"


def test_a_check_finds_what_is_there_twice(tmp_path):
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", {"same": sample(1)})
    found = check_shards.check_shards(check_shards.open_source(str(tmp_path)))
    assert found.facts()["repeated_keys"] == 1 and found.facts()["captions"]["repeated"] == 1
