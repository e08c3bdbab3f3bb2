import pytest
from safetensors.torch import load_file

from tests.golden.fill import GOLDEN


@pytest.fixture(scope="session")
def golden():
    """Inputs and outputs of the authors' loss functions, float32."""
    return load_file(GOLDEN / "release_losses.safetensors")
