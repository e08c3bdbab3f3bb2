"""A tokenizer on disk, small models, and small directories in the layouts of the libraries."""

import pytest
from diffusers import SanaTransformer2DModel
from transformers import InternVLConfig, InternVLForConditionalGeneration

from tests.helpers import ENCODER
from tests.multimodal.parts import INTERNVL, SANA, filled, make_text_tokenizer, tiny_umm


@pytest.fixture(scope="session")
def text_tokenizer_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "tokenizer"
    make_text_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def umm(text_tokenizer_dir):
    """Shared: a test that changes it takes `make_umm`."""
    return tiny_umm(text_tokenizer_dir)


@pytest.fixture
def make_umm(text_tokenizer_dir):
    return lambda *changes: tiny_umm(text_tokenizer_dir, *changes)


@pytest.fixture(scope="session")
def internvl():
    """A whole small InternVL as transformers makes it, vision tower included."""
    vision = {**ENCODER, "use_mean_pooling": True}
    return filled(
        InternVLForConditionalGeneration(InternVLConfig(**{**INTERNVL, "vision_config": vision}))
    )


@pytest.fixture(scope="session")
def internvl_dir(internvl, tmp_path_factory):
    """What `save_pretrained` of model and tokenizer write, as on the hub."""
    folder = tmp_path_factory.mktemp("internvl")
    internvl.save_pretrained(folder)
    make_text_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sana_dir(tmp_path_factory):
    """The `transformer` folder of a SANA pipeline, with a half precision variant beside it."""
    folder = tmp_path_factory.mktemp("sana")
    sana = filled(SanaTransformer2DModel(**SANA), seed=5)
    sana.save_pretrained(folder / "transformer")
    filled(SanaTransformer2DModel(**SANA), seed=6).half().save_pretrained(
        folder / "transformer", variant="fp16"
    )
    (folder / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    return folder
