"""For the tests of measurements: an Inception network with random weights, in a file."""

from unittest import mock

import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as fidelity


@pytest.fixture(scope="session")
def random_inception_file(tmp_path_factory):
    """Random weights of sensible size, in a file such as torch-fidelity reads."""
    torch.manual_seed(0)
    with (
        mock.patch.object(fidelity, "load_state_dict_from_url", return_value={}),
        mock.patch.object(fidelity.FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        network = fidelity.FeatureExtractorInceptionV3("random", ["2048"])
    for module in network.modules():  # keeps activations from dying out over the depth
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path
