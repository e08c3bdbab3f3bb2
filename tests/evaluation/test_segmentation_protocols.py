"""scripts/segment_probe.py by each of its protocols, on pictures of several sizes."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import confusion_matrix

from muse import load_config
from muse.evaluation import segmentation_heads
from muse.evaluation.probed_network import BareEncoder
from muse.evaluation.protocols import find_protocol
from muse.evaluation.segmentation_heads import SegmentationHeads, train_heads
from muse.evaluation.segmentation_pictures import class_colours
from muse.evaluation.segmentation_training import evaluate_scenes
from muse.evaluation.sliding_window import Inference
from scripts import segment_probe
from tests.helpers import one_error

SIZES = [(40, 56), (70, 48), (64, 64), (41, 59), (90, 45), (48, 48)]
QUICK = ["--steps", "3", "--probe_batch_size", "4", "--num_pictures", "2", "--num_workers", "0"]
SMALL = ["--resize", "32", "--crop", "32"]  # cells of 8, as the model's


def scene_folder(folder, count=6, seed=0, classes=3):
    """images/ and masks/ of several sizes: the class is seen in the colour."""
    rng = np.random.default_rng(seed)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for i in range(count):
        height, width = SIZES[i % len(SIZES)]
        mask = np.kron(rng.integers(0, classes, (3, 3)), np.ones((30, 30), int))[:height, :width]
        pixels = np.stack([80 * mask + 20, 200 - 60 * mask, 90 + 0 * mask], 2)
        noise = rng.integers(-15, 16, pixels.shape)
        Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(
            folder / "images" / f"{i:02d}.png"
        )
        Image.fromarray(mask.astype(np.uint8)).save(folder / "masks" / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    at = tmp_path_factory.mktemp("scenes")
    return scene_folder(at / "train", 12), scene_folder(at / "val", 6, seed=1)


@pytest.fixture
def run(trained_run, scenes, tmp_path):
    """run(flags ...) into tmp_path/out; the code, and metrics.json of a run that went well."""
    config, trained = trained_run
    base = ["--config", str(config), "--checkpoint", str(trained / "final"), "--device", "cpu"]
    data = ["--train_url", str(scenes[0]), "--val_url", str(scenes[1]), "--labels", "plain"]

    def command(*flags, fails=False):
        code = segment_probe.main(
            [*base, *data, *QUICK, "--output_dir", str(tmp_path / "out"), *flags]
        )
        file = tmp_path / "out/metrics.json"
        if fails:
            assert not file.exists()
            return code
        assert code == 0
        return json.loads(file.read_text())

    return command


# -------------------------------------------------------------------------------- each protocol
def test_release_squashes_and_drops_what_fills_no_cell(run, tmp_path):
    """36 pixels, cells of 8: 32 of them on a grid of 4 x 4; masks squashed with the pictures."""
    got = run("--protocol", "release", "--crop", "36", "--steps", "6")
    protocol = got["protocol"]
    assert protocol["name"] == "release"
    assert set(protocol["changed"]) == {"crop", "steps", "epochs", "batch_size"}
    assert protocol["crop"] == {"square": 36}
    assert got["oracle"]["grid"] == [4, 4]
    recipe = protocol["recipe"]
    assert (recipe["optimizer"], recipe["loss"], recipe["mean_over"]) == ("sgd", "pixels", "all")
    probe = protocol["probe"]
    assert probe["held_out"] == 1 and protocol["train"]["images"] == 11
    assert probe["epoch"] in (1, 2, 3)  # 11 pictures are two batches of 4
    assert probe["chosen_on"] == "1 held-out training pictures, by mIoU"
    absent = got["classes_absent"]
    assert got["miou"] == pytest.approx(got["miou_present"] * (3 - absent) / 3)
    assert 0 < got["miou"] <= got["oracle"]["miou_upsampled"] + 0.1
    assert got["protocol"]["val"]["images"] == 6
    assert (tmp_path / "out/segmentation.png").exists()
    assert not (tmp_path / "out/features").exists()  # nothing is stored


@pytest.mark.parametrize("inference", ["whole", "slide"])
def test_dinov2_measures_pictures_of_several_sizes(run, inference):
    got = run("--protocol", "dinov2", *SMALL, "--inference", inference)
    protocol = got["protocol"]
    recipe, probe = protocol["recipe"], protocol["probe"]
    assert recipe["augmentation"]["shorter_edge"] == recipe["augmentation"]["crop_size"] == 32
    assert (recipe["window"], recipe["stride"]) == (32, 21)  # 341 of 512
    assert recipe["inference"] == inference and recipe["warmup_steps"] == 0
    assert probe["held_out"] == 0 and "chosen_on" not in probe
    assert protocol["crop"] == {"resize_shorter_edge": 32}
    assert protocol["train"]["images"] == 12 and protocol["val"]["images"] == 6
    assert protocol["train"]["samples"]["read"] >= 3 * 4
    assert got["classes"] == 3 and 0 < got["miou"] < 1
    # 32 x 45 in windows of 32 are grids of 4 x 4; in one piece of 4 x 6, padded to 48
    assert got["oracle"]["grid"] == ([4, 4] if inference == "slide" else [4, 6])


def test_dinov2_by_default_slides_and_warms_up(run):
    """Of 40 steps 1500 / 40000 are two."""
    got = run("--protocol", "dinov2", *SMALL, "--steps", "40", "--lr", "0.01")
    recipe = got["protocol"]["recipe"]
    assert (recipe["inference"], recipe["warmup_steps"], recipe["schedule"]) == ("slide", 2, "poly")
    assert got["miou"] > 0.4  # the class is a colour, which a linear head on cells reads


def test_native_keeps_its_crop_and_store(run, tmp_path):
    got = run()
    assert got["protocol"]["name"] == "native" and (tmp_path / "out/features").exists()
    assert got["oracle"]["grid"] == [4, 4]
    assert got["miou"] < got["oracle"]["miou_upsampled"] <= 1


# ------------------------------------------------------------------------- rates, grids, baselines
@pytest.mark.parametrize("protocol", ["native", "dinov2"])
def test_several_rates_are_trained_at_once_and_one_is_chosen(run, protocol):
    extra = SMALL if protocol == "dinov2" else []
    rates = ["0.0000001", "0.05", "0.01"]
    got = run("--protocol", protocol, *extra, "--steps", "25", "--learning_rates", *rates)
    probe = got["protocol"]["probe"]
    by_rate = got["held_out_miou_by_rate"]
    assert list(by_rate) == ["1e-07", "0.05", "0.01"]
    assert by_rate[f"{probe['learning_rate']:g}"] == max(by_rate.values())
    assert probe["learning_rate"] != 1e-7
    assert probe["chosen_on"] == "1 held-out training pictures, by mIoU"
    assert "learning_rates" in got["protocol"]["changed"]


def test_the_chosen_head_is_the_one_trained_alone():
    """Heads do not touch each other: same rate, same pictures, same weights."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(4, 5, 3, 3, generator=generator), torch.randint(0, 3, (4, 12, 12)))
        for _ in range(5)
    ]
    for name in ("native", "release", "dinov2"):
        recipe = find_protocol(name, "segment_probe")
        several, one = (
            SegmentationHeads(5, 3, rates, recipe.affine) for rates in ((0.1, 0.01), (0.01,))
        )
        for heads in (several, one):
            assert list(train_heads(heads, batches, recipe, 5)) == [1, 2, 3, 4, 5]
        for a, b in zip(several.heads[1].parameters(), one.heads[0].parameters(), strict=True):
            torch.testing.assert_close(a, b)


def test_the_encoder_has_its_own_grid(trained_run):
    """Patches of 8 and an unshuffle of 2: twice the latent grid, whose cells are its means."""
    model = load_config(trained_run[0], ["model.unshuffle=2"]).model
    own, latent = BareEncoder(model, own_grid=True), BareEncoder(model)
    latent.load_state_dict(own.state_dict())
    images = torch.rand(1, 3, 40, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps, means = own.features(images), latent.features(images)
    assert own.cell == latent.cell == 16
    assert maps.shape[-2:] == (6, 8) and means.shape[-2:] == (3, 4)  # of 48 x 64, padded
    torch.testing.assert_close(F.avg_pool2d(maps, 2), means)
    assert maps.std() > means.std()


def test_baselines_say_their_grid(run):
    got = run("--mode", "baseline")
    assert got["protocol"]["network"]["grid"] == "the encoder's own"
    got = run("--baseline", "pixels")
    assert got["oracle"]["grid"] == [16, 16] and "grid" not in got["protocol"]["network"]


def test_pixel_loss_is_torchs_cross_entropy_on_resized_logits():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 2, 3, generator=generator, requires_grad=True)  # R, B, K, h, w
    labels = torch.randint(0, 4, (3, 9, 11), generator=generator)
    labels[0, :3] = 65535
    want = sum(
        F.cross_entropy(
            F.interpolate(one, (9, 11), mode="bilinear", align_corners=False),
            labels,
            ignore_index=65535,
        )
        for one in logits
    )
    (expected,) = torch.autograd.grad(want, logits)
    for values in (2**25, 1):  # in one piece, and picture by picture
        logits.grad = None
        segmentation_heads.RESIZED_VALUES = values
        try:
            segmentation_heads._pixels_backward(logits * 1, labels, None)
        finally:
            segmentation_heads.RESIZED_VALUES = 2**25
        torch.testing.assert_close(logits.grad, expected)


# --------------------------------------------------------------------------- at the masks' own size
class OneHotMaps:
    """The picture's own channels on a grid of cells of 4."""

    cell = 4

    def __call__(self, pictures):
        rows, columns = (-side % 4 for side in pictures.shape[-2:])
        return F.avg_pool2d(F.pad(pictures, (0, columns, 0, rows), mode="replicate"), 4)


def test_miou_at_own_size_is_sklearns_confusion():
    """Pictures and masks of different sizes; by hand: resize, cut, resize, argmax, count."""
    generator = torch.Generator().manual_seed(0)
    heads = SegmentationHeads(3, 5, (1.0,))
    with torch.no_grad():
        heads.heads[0].classify.weight.normal_(generator=generator)
    loader, pairs = [], []
    for i, (size, own) in enumerate([((10, 14), (25, 33)), ((9, 9), (9, 9)), ((16, 12), (7, 5))]):
        image = torch.rand(1, 3, *size, generator=generator)
        mask = torch.randint(0, 5, (1, *own), generator=generator)
        mask[0, 0, :2] = 65535
        loader.append({"images": image, "masks": mask, "indices": torch.tensor([i])})
        with torch.no_grad():
            grid = heads.eval()(OneHotMaps()(image))[0]
        covered = [4 * side for side in grid.shape[-2:]]
        shown = F.interpolate(grid, covered, mode="bilinear")[..., : size[0], : size[1]]
        guess = F.interpolate(shown, own, mode="bilinear").argmax(1)
        kept = mask != 65535
        pairs.append((mask[kept].numpy(), guess[kept].numpy()))
    truth, guess = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    counts = confusion_matrix(truth, guess, labels=range(5))
    iou = counts.diagonal() / (counts.sum(0) + counts.sum(1) - counts.diagonal())
    got = evaluate_scenes(heads, OneHotMaps(), loader, lambda masks: masks, Inference())[0]
    np.testing.assert_allclose(got.per_class.numpy(), iou)
    assert got.mean == pytest.approx(iou.mean())


# ------------------------------------------------------------------------------------- the pictures
@pytest.mark.parametrize("flags", [[], ["--protocol", "dinov2", *SMALL]], ids=["native", "dinov2"])
def test_saved_predictions_show_picture_truth_and_prediction(run, flags, scenes, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("ground\nwall\nsky\n")
    folder = tmp_path / "predictions"
    run(*flags, "--save_predictions", str(folder), "--classnames", str(names))
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(6)]
    pixels = torch.from_numpy(np.array(Image.open(files[2]))).permute(2, 0, 1)  # 64 x 64
    side = 32
    assert pixels.shape[1] > side and pixels.shape[2] == 3 * side + 8  # and a legend
    shown = pixels[:, :side, side + 4 : 2 * side + 4]
    mask = torch.from_numpy(np.asarray(Image.open(scenes[1] / "masks/02.png")).astype(np.int64))
    colours = (class_colours(3) * 255).round().to(torch.uint8)
    want = colours[F.interpolate(mask[None, None].float(), (side, side))[0, 0].long()]
    same = (shown == want.permute(2, 0, 1)).all(0).float().mean()
    assert same > 0.95  # nearest resizing of Pillow and of torch differ at borders


def test_the_palette_tells_150_classes_apart():
    colours = class_colours(150)
    assert colours.min() >= 0 and colours.max() <= 1
    distance = torch.cdist(colours, colours) + torch.eye(150)
    assert distance.min() > 0.05
    assert torch.equal(class_colours(7), colours[:7])  # fixed: no matter how many there are


# --------------------------------------------------------------------------------------- bad input
def test_bad_input_is_one_line_and_leaves_nothing(run, scenes, tmp_path, capsys):
    small, many, bare = (tmp_path / name for name in ("small", "many", "bare"))
    scene_folder(small)
    for file in (small / "masks").iterdir():
        Image.new("L", (8, 8)).save(file)
    scene_folder(many, classes=4)
    scene_folder(bare, count=3)
    for file in (bare / "masks").iterdir():
        file.unlink()
    (tmp_path / "two.txt").write_text("a\nb\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("keep\n")
    dinov2 = ["--protocol", "dinov2", *SMALL]
    release = ["--protocol", "release", "--crop", "32"]
    pictures = ["--save_predictions", str(tmp_path / "predictions")]
    cases = [
        (["--protocol", "mae"], "segment_probe has no protocol 'mae': one of native, release"),
        ([*dinov2, "--train_url", str(small)], "mask_size"),
        ([*dinov2, *pictures, "--val_url", str(small)], "mask_size 6"),
        ([*release, "--val_url", str(small)], "mask_size 6"),
        ([*dinov2, "--val_url", str(bare)], "has the name of a picture"),
        ([*dinov2, *pictures, "--val_url", str(many)], "..3 do not fit 3 classes"),
        ([*dinov2, "--num_classes", "2"], "do not fit 2 classes"),
        ([*release, "--num_classes", "2"], "do not fit 2 classes"),
        (["--inference", "slide"], "this protocol has no windows; dinov2 has"),
        ([*dinov2, *pictures, "--classnames", str(tmp_path / "two.txt")], "2 names for 3 classes"),
        ([*dinov2, "--save_predictions", str(tmp_path / "mine")], "letter.txt"),
        ([*dinov2, "--lr", "0"], "--learning_rates must be above 0, not 0"),
        ([*dinov2, "--crop", "0"], "--crop must be at least 1, not 0"),
        ([*dinov2, "--lr", "1e30", "--steps", "8"], "the probe diverged at learning rate 1e+30"),
        ([*release, "--train_url", f"pipe:cat {tmp_path}/x.tar"], "nothing can be held out"),
    ]
    for flags, said in cases:
        line = one_error(capsys, run(*flags, fails=True))
        assert said in line, line
        assert not (tmp_path / "predictions").exists()
        assert not list(tmp_path.glob(".*partial"))
    assert (tmp_path / "mine/letter.txt").read_text() == "keep\n"
