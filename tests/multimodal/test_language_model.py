"""Language model, projector and SANA from directories, against transformers' and diffusers' own."""

import json

import pytest
import torch
from diffusers import SanaTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import GotOcr2ImageProcessor, InternVLProcessor
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

from muse.errors import CheckpointError, ConfigError
from muse.multimodal import MUSE_UMM
from muse.multimodal.language_model import (
    build_language_model,
    language_fields,
    load_text_tokenizer,
    tied,
)
from muse.multimodal.sana import build_sana, sana_fields
from tests.helpers import merged, random_images
from tests.multimodal.parts import INTERNVL, SANA, TEMPLATE, UMM, filled


def rewrite(folder, target, change):
    """A copy of a saved InternVL with `change(state, config)` applied."""
    target.mkdir()
    state = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(state, config)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


# --------------------------------------------------------------------------------- language model
def test_a_directory_gives_transformers_weights_without_the_tower(internvl, internvl_dir):
    built = build_language_model(str(internvl_dir), {})
    assert built.model.vision_tower is None
    expected = {n: t for n, t in internvl.state_dict().items() if "vision_tower" not in n}
    state = built.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert not tied(built)


def test_files_with_the_names_in_memory(internvl, internvl_dir, tmp_path):
    """`save_pretrained` writes other names; a file may hold those of the state dict too."""
    assert "language_model.lm_head.weight" in load_file(internvl_dir / "model.safetensors")

    def as_in_memory(state, config):
        state.clear()
        state.update({name: tensor.clone() for name, tensor in internvl.state_dict().items()})

    folder = rewrite(internvl_dir, tmp_path / "memory", as_in_memory)
    built = build_language_model(str(folder), {}).state_dict()
    assert all(torch.equal(tensor, internvl.state_dict()[name]) for name, tensor in built.items())


def test_a_config_as_older_releases_wrote_it(internvl, internvl_dir, tmp_path):
    """Half precision, one rope_theta, notes of the release: float32 and the same rotation."""

    def older(state, config):
        config["torch_dtype"] = config["text_config"]["torch_dtype"] = "bfloat16"
        config["text_config"]["dtype"] = "bfloat16"
        config["_attn_implementation_autoset"] = True
        config["text_config"].pop("rope_parameters")
        config["text_config"]["rope_theta"] = 500.0

    built = build_language_model(str(rewrite(internvl_dir, tmp_path / "older", older)), {})
    assert {p.dtype for p in built.parameters()} == {torch.float32}
    inv_freq = built.model.language_model.rotary_emb.inv_freq
    torch.testing.assert_close(inv_freq, 500.0 ** (-torch.arange(0, 8, 2) / 8))
    again = build_language_model("random", language_fields(built))
    assert torch.equal(again.model.language_model.rotary_emb.inv_freq, inv_freq)


def test_a_head_that_no_file_holds_is_the_embeddings(internvl, internvl_dir, tmp_path):
    folder = rewrite(
        internvl_dir, tmp_path / "tied", lambda s, _: s.pop("language_model.lm_head.weight")
    )
    built = build_language_model(str(folder), {})
    assert tied(built)
    assert torch.equal(built.lm_head.weight, internvl.model.language_model.embed_tokens.weight)


def test_directories_that_do_not_fit(internvl_dir, tmp_path):
    missing = rewrite(
        internvl_dir, tmp_path / "missing", lambda s, _: s.pop("language_model.model.norm.weight")
    )
    with pytest.raises(
        CheckpointError, match=r"1 missing tensor \(model.language_model.norm.weight\)"
    ):
        build_language_model(str(missing), {})

    def widen(state, config):
        config["text_config"]["intermediate_size"] = 64

    with pytest.raises(CheckpointError, match="a checkpoint of another size"):
        build_language_model(str(rewrite(internvl_dir, tmp_path / "wide", widen)), {})
    with pytest.raises(CheckpointError, match="no such directory"):
        build_language_model(str(tmp_path / "nowhere"), {})

    original = rewrite(
        internvl_dir, tmp_path / "original", lambda _, c: c.update(llm_config=c.pop("text_config"))
    )
    with pytest.raises(CheckpointError, match="original layout .llm_config.; .* ends in -hf"):
        build_language_model(str(original), {})


def test_fields_that_make_no_internvl():
    with pytest.raises(ConfigError, match="text_confg; did you mean text_config?"):
        build_language_model("random", {"text_confg": {}})
    with pytest.raises(ConfigError, match="text_config must hold"):
        build_language_model("random", {"image_token_id": 3})
    with pytest.raises(ConfigError, match="must be given where source is random"):
        build_language_model("random", {})
    wrong = merged(INTERNVL, {"text_config": {"hidden_size": "wide"}})
    with pytest.raises(ConfigError, match="makes no InternVL: .*hidden_size"):
        build_language_model("random", wrong)


# -------------------------------------------------------------- reading pictures as InternVL does
@pytest.fixture(scope="module")
def with_its_tower(internvl_dir, text_tokenizer_dir):
    """A MUSE_UMM whose tokenizer has InternVL's own tower for its encoder."""
    changes = {
        "tokenizer": {"config": {"encoder": {"source": str(internvl_dir)}}},
        "language_model": {"source": str(internvl_dir), "config": {}},
    }
    config = merged(UMM, changes)
    config["language_model"]["config"] = {}
    return MUSE_UMM(config).eval()


def test_pictures_are_read_as_internvl_reads_them(internvl, with_its_tower):
    images = random_images(2, 32, 32)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    expected = internvl.model.get_image_features(
        pixel_values=(images - mean) / std,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    ).pooler_output
    read = with_its_tower.read_pictures(images)
    assert read.shape == (2, 4, 32)
    torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-4)


def test_answers_are_those_of_transformers_pipeline(internvl, internvl_dir, with_its_tower):
    """Processor, model and `generate` of transformers, on the same picture and question."""
    tokenizer = load_text_tokenizer(str(internvl_dir))
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            size={"height": 32, "width": 32},
            crop_to_patches=False,
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(),
        image_seq_length=4,
        chat_template=TEMPLATE,
    )
    image = (random_images(1, 32, 32) * 255).round() / 255
    for question in ("what is it?", "how many of them are there"):
        content = [
            {"type": "image", "image": image[0].mul(255).to(torch.uint8)},
            {"type": "text", "text": question},
        ]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        ids = internvl.generate(**inputs, max_new_tokens=12, do_sample=False)
        reference = tokenizer.decode(
            ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        assert with_its_tower.answer(image, [question], max_new_tokens=12) == [reference.strip()]


# ------------------------------------------------------------------------------------------- SANA
def test_sana_from_a_pipelines_directory(sana_dir):
    reference = SanaTransformer2DModel.from_pretrained(sana_dir, subfolder="transformer")
    for source in (sana_dir, sana_dir / "transformer"):
        built = build_sana(str(source), {}, latent_dim=8)
        x, captions, time = torch.randn(2, 8, 3, 5), torch.randn(2, 4, 24), torch.tensor([1.0, 900])
        out = built(x, captions, time).sample
        assert torch.equal(out, reference.eval()(x, captions, time).sample)
    assert build_sana("random", sana_fields(built), 8).config == built.config


def test_sanas_that_do_not_fit(sana_dir):
    with pytest.raises(ConfigError, match="takes latents of 8 channels and gives 8, .* have 32"):
        build_sana(str(sana_dir), {}, latent_dim=32)
    with pytest.raises(ConfigError, match="config.num_layer; did you mean num_layers?"):
        build_sana("random", {"num_layer": 2}, latent_dim=32)
    with pytest.raises(ConfigError, match="patch_size must be 1, got 2"):
        build_sana("random", {**SANA, "patch_size": 2}, latent_dim=8)
    with pytest.raises(CheckpointError, match="does not hold the weights of SANA"):
        build_sana(str(sana_dir), {**SANA, "num_layers": 3}, latent_dim=8)


def test_random_sana_is_built_from_fields_alone():
    built = filled(build_sana("random", SANA, latent_dim=8))
    assert built(torch.zeros(1, 8, 2, 2), torch.zeros(1, 3, 24), torch.zeros(1)).sample.shape == (
        1,
        8,
        2,
        2,
    )
