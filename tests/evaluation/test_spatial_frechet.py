"""Spatial features of Inception with random weights: against the network's own layers, by hand."""

import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as fidelity
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from muse.evaluation.metrics.frechet import RunningMoments, frechet_distance
from muse.evaluation.metrics.spatial_frechet import SpatialTap, spatial_features

LAYERS = (
    "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2 "
    "Mixed_5b Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d"
).split()


@pytest.fixture(scope="module")
def network(random_inception_file):
    return fidelity.FeatureExtractorInceptionV3(
        "random", ["2048", "logits_unbiased"], str(random_inception_file)
    )


@pytest.fixture(scope="module")
def images():
    return torch.randint(
        256, (5, 3, 40, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


@torch.no_grad()
def layer_by_layer(network, images):
    """The picture through the network up to Mixed_6d, whose first channels are its first branch."""
    x = fidelity.interpolate_bilinear_2d_like_tensorflow1x(
        images.float(), size=(299, 299), align_corners=False
    )
    x = (x - 128) / 128
    for name in LAYERS:
        x = getattr(network, name)(x)
    assert x.shape[1:] == (768, 17, 17)
    return x


def test_they_are_the_first_seven_channels_of_mixed_6d(network, images):
    block = layer_by_layer(network, images)
    want = torch.stack([block[:, :7, r, c] for r in range(17) for c in range(17)], 1).flatten(1)
    got = spatial_features(network, images)
    assert got.shape == (5, 17 * 17 * 7)
    torch.testing.assert_close(got, want)
    assert got.min() >= 0 and (got > 0).float().mean() > 0.1  # after the ReLU, and not dead


def test_the_first_branch_is_what_the_converter_calls_mixed_6_conv(network, images):
    """`mixed_6/conv` -> `Mixed_6d.branch1x1`: convolution, normalisation and ReLU by hand."""
    seen = []
    hook = network.Mixed_6d.register_forward_hook(
        lambda module, inputs, out: seen.append(inputs[0])
    )
    got = spatial_features(network, images)
    hook.remove()
    branch = network.Mixed_6d.branch1x1
    x = torch.nn.functional.conv2d(seen[0], branch.conv.weight[:7])
    norm = branch.bn
    x = (x - norm.running_mean[:7, None, None]) / (
        norm.running_var[:7, None, None] + norm.eps
    ).sqrt()
    x = x * norm.weight[:7, None, None] + norm.bias[:7, None, None]
    torch.testing.assert_close(got, x.clamp_min(0).permute(0, 2, 3, 1).flatten(1))


def test_one_pass_serves_all_and_the_hook_goes(network, images):
    tap = SpatialTap(network)
    pooled, _ = network(images)
    first = tap.take()
    with pytest.raises(RuntimeError, match="not run"):
        tap.take()
    tap.remove()
    assert torch.equal(network(images)[0], pooled)
    with pytest.raises(RuntimeError, match="not run"):
        tap.take()
    assert torch.equal(first, spatial_features(network, images))
    assert not network.Mixed_6d.branch1x1._forward_hooks


def test_the_distance_is_torch_fidelitys_on_these_features(network, images):
    rows = spatial_features(network, torch.cat((images, images.flip(-1))))[:, ::23].double()
    sides = rows[:5], rows[5:] * 1.1
    stats = [fid_features_to_statistics(side) for side in sides]
    want = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    parts = []
    for side in sides:
        moments = RunningMoments()
        moments.update(side)
        parts += moments.compute()[1:]
    assert frechet_distance(*parts) == pytest.approx(want, rel=1e-4)
