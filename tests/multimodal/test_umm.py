"""The whole model: what sees what, independence of the batch, editing's inputs, training losses."""

import hashlib

import pytest
import torch
import torch.nn.functional as F

from muse.errors import CheckpointError, ConfigError
from muse.generation.embeddings import sine_table
from muse.generation.latents import LatentStatistics
from muse.generation.sampler import noise_for
from muse.multimodal import MUSE_UMM
from muse.multimodal.sampling import sample_latents, sana_loss
from tests.helpers import random_images, tiny_model
from tests.multimodal.parts import UMM

TEXTS = ["a cat", "two dogs on the grass beside a house", "x"]


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------ masks
@pytest.fixture
def rows(umm):
    """Embeddings of an edit: prompt with picture, then queries."""
    ids = umm.chat.editing("a cat")
    (prompt,) = umm.embed([ids], umm.read_pictures(random_images(1, 32, 32)))
    return ids, prompt.detach(), umm.queries.detach()


def test_a_prompt_does_not_see_the_queries(umm, rows):
    ids, prompt, queries = rows
    n = len(ids)
    one = umm.hidden_states([torch.cat([prompt, queries])])
    other = umm.hidden_states([torch.cat([prompt, queries + torch.randn_like(queries)])])
    assert torch.equal(one[:, :n], other[:, :n])
    assert (one[:, n:] != other[:, n:]).any(-1).all()


@pytest.mark.parametrize("what", ["text", "picture"])
def test_every_query_sees_prompt_and_picture(umm, rows, what):
    ids, prompt, queries = rows
    at = ids == umm.chat.context_id if what == "picture" else ids == ids[-3]
    changed = prompt + at[:, None] * torch.randn_like(prompt)
    one = umm.hidden_states([torch.cat([prompt, queries])])[:, len(ids) :]
    other = umm.hidden_states([torch.cat([changed, queries])])[:, len(ids) :]
    assert (one != other).any(-1).all()


def test_a_query_sees_those_before_it_alone(umm, rows):
    ids, prompt, queries = rows
    changed = queries.clone()
    changed[2] += 1
    one = umm.hidden_states([torch.cat([prompt, queries])])[0, len(ids) :]
    other = umm.hidden_states([torch.cat([prompt, changed])])[0, len(ids) :]
    assert torch.equal(one[:2], other[:2])
    assert (one[2:] != other[2:]).any(-1).all()


def test_no_gradient_flows_from_the_prompt_to_the_queries(umm, rows):
    ids, prompt, queries = rows
    queries = queries.clone().requires_grad_(True)
    hidden = umm.hidden_states([torch.cat([prompt, queries])])
    (gradient,) = torch.autograd.grad(hidden[:, : len(ids)].sum(), queries, allow_unused=True)
    assert gradient is None or not gradient.any()


def test_padding_stands_where_nothing_looks(umm, rows):
    _, prompt, queries = rows
    row = torch.cat([prompt, queries])
    alone = umm.hidden_states([row])[0]
    longer = torch.randn(len(row) + 9, row.shape[1])
    padded = umm.hidden_states([row, longer])[0, : len(row)]
    close(padded, alone)


def test_captions_read_the_queries_of_each_row(umm):
    """By hand for each text alone: queries behind its embeddings, connector, linear layer."""
    captions = umm.captions(TEXTS)
    for caption, text in zip(captions, TEXTS):
        ids = umm.chat.generation(text)
        embeds = torch.cat([umm.internvl.get_input_embeddings()(ids), umm.queries])[None]
        hidden = umm.internvl.model.language_model(inputs_embeds=embeds).last_hidden_state
        by_hand = umm.to_caption(umm.connector(hidden[:, len(ids) :]))[0]
        close(caption, by_hand)
    assert captions.shape == (3, 5, 24)


# ------------------------------------------------------------------------------------- generating
def test_a_picture_depends_on_seed_and_index_not_on_the_batch(umm):
    together = umm.generate(TEXTS, steps=3, seed=7)
    for i, text in enumerate(TEXTS):
        close(umm.generate([text], steps=3, seed=7, indices=[i])[0], together[i])
    assert not torch.allclose(umm.generate(TEXTS, steps=3, seed=8), together, atol=1e-3)
    same_text = umm.generate(["a cat", "a cat"], steps=3, seed=7)
    assert not torch.allclose(same_text[0], same_text[1], atol=1e-3)


def test_generation_by_hand(umm):
    """Noise of (seed, index), captions with and without text, solver, scale, decoder."""
    captions, empty = umm.captions(["a cat"]), umm.captions([""])
    noise = noise_for(3, [0], (8, 2, 2))
    latents = sample_latents(umm.generator, noise, captions, empty, steps=2, guidance_scale=3.0)
    expected = umm.tokenizer.decode(latents / 1.5, size=(32, 32)).clamp(0, 1)
    out = umm.generate(["a cat"], steps=2, guidance_scale=3.0, seed=3)
    close(out, expected)
    unguided = umm.generate(["a cat"], steps=2, guidance_scale=1.0, seed=3)
    assert not torch.allclose(out, unguided, atol=1e-3)


def test_the_text_matters(umm):
    one = umm.generate(["a cat"], steps=2)
    assert not torch.allclose(one, umm.generate(["a dog"], steps=2), atol=1e-3)


@pytest.mark.parametrize("size", [None, 48, (40, 70), (7, 9)])
def test_pictures_have_the_size_that_was_asked_for(umm, size):
    out = umm.generate(["a cat"], steps=1, size=size)
    wanted = {None: (32, 32), 48: (48, 48)}.get(size, size)
    assert tuple(out.shape) == (1, 3, *wanted)
    assert out.min() >= 0
    assert out.max() <= 1


def test_edits_keep_the_size_and_do_not_depend_on_the_batch(umm):
    images = random_images(3, 40, 52)
    together = umm.edit(images, TEXTS, steps=2, seed=1)
    assert together.shape == images.shape
    alone = umm.edit(images[1:2], TEXTS[1:2], steps=2, seed=1, indices=[1])
    close(alone[0], together[1])
    other = umm.edit(images.flip(0), TEXTS, steps=2, seed=1)
    assert not torch.allclose(other[1:2], together[0:1], atol=1e-3)


def test_editing_without_its_text_keeps_the_picture(umm, monkeypatch):
    """The second captions of guidance: the same pictures, no instruction."""
    asked = []
    real = type(umm).captions

    def note(self, texts, images=None):
        asked.append((list(texts), images))
        return real(self, texts, images)

    monkeypatch.setattr(type(umm), "captions", note)
    images = random_images(2, 32, 32)
    umm.edit(images, TEXTS[:2], steps=1)
    assert [texts for texts, _ in asked] == [TEXTS[:2], ["", ""]]
    assert all(seen is images for _, seen in asked)


def test_answers_do_not_depend_on_the_batch(umm):
    images = random_images(3, 32, 32)
    together = umm.answer(images, TEXTS, max_new_tokens=6)
    alone = [umm.answer(images[i : i + 1], [TEXTS[i]], max_new_tokens=6)[0] for i in range(3)]
    assert together == alone
    assert umm.answer(None, TEXTS, max_new_tokens=6) == [
        umm.answer(None, [text], max_new_tokens=6)[0] for text in TEXTS
    ]


# ---------------------------------------------------------------------------------------- editing
KINDS = [["language"], ["encoder"], ["latent"], ["language", "encoder"], ["latent", "encoder"]]


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("reads", ["all", "queries"])
def test_what_the_connector_reads_of_the_source_picture(make_umm, monkeypatch, kinds, reads):
    umm = make_umm({"source_tokens": kinds, "generator_reads": reads})
    images = random_images(2, 32, 32)
    seen = []
    real = umm.connector.forward
    monkeypatch.setattr(umm.connector, "forward", lambda x: seen.append(x) or real(x))
    captions = umm.captions(["a cat", "a longer instruction"], images)

    pictures = umm.read_pictures(images)
    latent = umm.tokenizer.encode(images).latent * 1.5  # of the factor
    tokens = {"encoder": pictures}
    if "latent" in kinds:
        tokens["latent"] = umm.latent_tokens(latent.flatten(2).mT) + sine_table((2, 2), 32)
    outputs = []
    for i, text in enumerate(["a cat", "a longer instruction"]):
        ids = umm.chat.editing(text)
        (prompt,) = umm.embed([ids], pictures[i : i + 1])
        hidden = umm.hidden_states([torch.cat([prompt, umm.queries])])[0]
        outputs.append((hidden[: len(ids)][ids == umm.chat.context_id], hidden[len(ids) :]))
    tokens["language"] = torch.stack([output for output, _ in outputs])
    queries = torch.stack([query for _, query in outputs])
    close(seen[0], torch.cat([*[tokens[kind] for kind in kinds], queries], dim=1))
    length = 5 if reads == "queries" else 5 + 4 * len(kinds)
    assert captions.shape == (2, length, 24)


def test_pictures_stand_in_their_places_in_the_prompt(umm):
    images = random_images(2, 32, 32)
    pictures = umm.read_pictures(images)
    ids = umm.chat.editing("a cat")
    first, second = umm.embed([ids, ids], pictures)
    at = ids == umm.chat.context_id
    assert torch.equal(first[at], pictures[0])
    assert torch.equal(second[at], pictures[1])
    assert torch.equal(first[~at], umm.internvl.get_input_embeddings()(ids[~at]))


# --------------------------------------------------------------------------------------- training
def test_picture_loss_by_hand(umm):
    targets, level = random_images(2, 32, 32), torch.tensor([0.2, 0.7])
    noise = torch.randn(2, 8, 2, 2)
    latents = umm.tokenizer.encode(targets).latent * 1.5
    expected = sana_loss(umm.generator, latents, umm.captions(TEXTS[:2]), level, noise)
    loss = umm(TEXTS[:2], targets=targets, level=level, noise=noise)
    torch.testing.assert_close(loss, expected)


def test_answer_loss_is_transformers_own(umm):
    """Labels at the answer's tokens alone, through InternVL's forward."""
    images, answers = random_images(2, 32, 32), ["yes", "no, it is a dog"]
    losses = umm(TEXTS[:2], images, answers=answers)
    for i in range(2):
        asked, said = umm.chat.question(TEXTS[i]), umm.chat.answer(answers[i])
        pictures = umm.read_pictures(images[i : i + 1])
        (row,) = umm.embed([torch.cat([asked, said])], pictures)
        labels = torch.cat([torch.full_like(asked, -100), said])[None]
        expected = umm.internvl(inputs_embeds=row[None], labels=labels).loss
        torch.testing.assert_close(losses[i], expected, rtol=1e-4, atol=1e-5)


def test_recomputing_layers_changes_no_gradient(make_umm):
    gradients = []
    for recompute in (False, True):
        umm = make_umm({"gradient_checkpointing": recompute}).train()
        torch.manual_seed(0)
        umm(TEXTS, targets=random_images(3, 32, 32)).mean().backward()
        gradients.append({n: p.grad for n, p in umm.named_parameters() if p.grad is not None})
    assert "queries" in gradients[0]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------ scale
def test_latents_are_scaled_by_their_own_statistics(make_umm, tmp_path):
    latents = torch.randn(50, 8, 2, 2) * torch.arange(1, 9).view(8, 1, 1) + 3
    statistics = LatentStatistics()
    statistics.update(latents)
    statistics.save(tmp_path / "statistics.safetensors")
    changes = {"latent_factor": None, "latent_statistics": str(tmp_path / "statistics.safetensors")}
    scale = make_umm(changes).latent_scale
    normalised = scale.normalise(latents)
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        normalised.std((0, 2, 3), correction=0), torch.ones(8), rtol=1e-5, atol=1e-5
    )
    close(scale.denormalise(normalised), latents)
    close(normalised, statistics.normalise(latents))


def test_statistics_of_another_tokenizer(make_umm, tmp_path):
    tiny_model().save_pretrained(tmp_path / "muse")
    changes = {
        "tokenizer": {"source": str(tmp_path / "muse")},
        "latent_factor": None,
        "latent_statistics": str(tmp_path / "statistics.safetensors"),
    }
    digest = hashlib.sha256((tmp_path / "muse" / "model.safetensors").read_bytes()).hexdigest()
    for sha256 in (digest, "0" * 64):
        statistics = LatentStatistics(tokenizer_sha256=sha256)
        statistics.update(torch.randn(3, 8, 2, 2))
        statistics.save(tmp_path / "statistics.safetensors")
        if sha256 == digest:
            make_umm(changes)
        else:
            with pytest.raises(CheckpointError, match="latents of another tokenizer"):
                make_umm(changes)


def test_a_factor_multiplies(umm):
    latents = torch.randn(2, 8, 2, 2)
    close(umm.latent_scale.normalise(latents), latents * 1.5)
    close(umm.latent_scale.denormalise(latents), latents / 1.5)


def test_latents_of_an_unknown_scale_are_refused(make_umm):
    umm = make_umm({"latent_factor": None})
    with pytest.raises(ConfigError, match="scale of the latents is not known"):
        umm.generate(["a cat"], steps=1)
    with pytest.raises(ConfigError, match="scale of the latents is not known"):
        umm.edit(random_images(1, 32, 32), ["a cat"], steps=1)
    positions = LatentStatistics("position")
    positions.update(torch.randn(3, 8, 2, 2))
    with pytest.raises(ConfigError, match="by channel"):
        umm.latent_scale.set_statistics(positions)
    other = LatentStatistics()
    other.update(torch.randn(3, 4, 2, 2))
    with pytest.raises(ConfigError, match="of 4 channels, .* have 8"):
        umm.latent_scale.set_statistics(other)


# ----------------------------------------------------------------------------------------- errors
def test_arguments_that_do_not_fit(umm):
    images = random_images(2, 32, 32)
    with pytest.raises(ValueError, match="prompts must be a list of texts, got 'a cat'"):
        umm.generate("a cat")
    with pytest.raises(ValueError, match="list of texts, got \\[\\]"):
        umm.generate([])
    with pytest.raises(ValueError, match="2 texts, but 1 indices"):
        umm.generate(["a", "b"], steps=1, indices=[0])
    with pytest.raises(ValueError, match="size must be positive, got 0x32"):
        umm.generate(["a"], size=(0, 32))
    with pytest.raises(ValueError, match="2 images, but 1 instructions"):
        umm.edit(images, ["a"])
    with pytest.raises(ValueError, match=r"got values in \[0, 2"):
        umm.edit(torch.tensor([0.0, 2.0]).repeat(1, 3, 32, 16), ["a"])
    with pytest.raises(ValueError, match="2 images, but 3 questions"):
        umm.answer(images, ["a", "b", "c"])
    with pytest.raises(ValueError, match="either targets .* or answers"):
        umm(["a"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 40}, "image_size=40 must be a multiple of 16"),
        ({"num_query": 3}, "unknown key model.num_query; did you mean num_queries?"),
        ({"connector": "mlp"}, "model.connector must be one of synergistic, llm_layers, got 'mlp'"),
        ({"source_tokens": ["pixels"]}, "source_tokens must name some of language, encoder"),
        ({"source_tokens": []}, "source_tokens must name some of"),
        ({"source_tokens": ["encoder", "encoder"]}, "names one kind twice"),
        ({"latent_statistics": "file"}, "exclude each other"),
        ({"flow_shift": 0}, "flow_shift must be above 0"),
        (
            {"language_model": {"config": {"vision_config": {"hidden_size": 24}}}},
            "encoder is 16 wide, but the language model's projector reads 24",
        ),
    ],
)
def test_configurations_that_do_not_fit(make_umm, change, message):
    with pytest.raises(ConfigError) as error:
        make_umm(change)
    assert message in str(error.value)


def test_without_a_text_tokenizer():
    umm = MUSE_UMM(UMM, load_sources=False)
    with pytest.raises(ConfigError, match="without a text tokenizer"):
        umm.generate(["a cat"])
    with pytest.raises(ConfigError, match="text_tokenizer must name a directory"):
        MUSE_UMM(UMM)


def test_pictures_are_resized_as_they_are_read(umm):
    images = random_images(1, 50, 30)
    resized = F.interpolate(images, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.equal(umm.read_pictures(images), umm.read_pictures(resized))
    assert torch.equal(umm.resize(resized), resized)
