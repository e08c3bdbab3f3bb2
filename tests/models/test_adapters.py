"""MUSE_ViT in other people's code: diffusers' pipelines, and as timm's feature extractors."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from muse.models.diffusers_adapter import MuseAutoencoder
from muse.models.feature_pyramid import FeaturePyramid
from tests.helpers import DECODER, random_images, tiny_model


# --- diffusers
def test_there_and_back_in_the_range_of_diffusers():
    """Cell 16, decoder 4: pictures are enlarged four times on the way in."""
    model = tiny_model()
    vae = MuseAutoencoder(model, scaling_factor=0.5, latent_dist=True)
    x = random_images(2, 16, 24) * 2 - 1
    with torch.no_grad():
        out = vae.encode(x)
        large = F.interpolate((x + 1) / 2, size=[64, 96], mode="bilinear", antialias=True)
        latent = model.encode(large.clamp(0, 1)).latent
        assert torch.equal(out.latents, latent) and out.latents.shape == (2, 8, 4, 6)
        assert torch.equal(out.latent_dist.sample(), latent)
        assert torch.equal(out.latent_dist.mode(), out.latent)
        sample = vae.decode(out.latents).sample
        assert torch.equal(sample, model.decode(latent, size=(16, 24)) * 2 - 1)
        assert torch.equal(vae.decode(latent, return_dict=False)[0], sample)
        assert torch.equal(vae(x).sample, sample)
    assert (vae.config.scaling_factor, vae.config["latent_channels"]) == (0.5, 8)
    assert (vae.dtype, vae.device.type) == (torch.float32, "cpu")
    assert MuseAutoencoder(model).encode(x).latent_dist is None
    with pytest.raises(ValueError, match="multiples of 4, got"):
        vae.encode(x[..., :-1])


def test_inside_a_pipeline():
    """DiT's pipeline denoises latents and lets the adapter decode them."""
    torch.manual_seed(0)
    model = tiny_model()
    vae = MuseAutoencoder(model, scaling_factor=0.25)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=8,
        out_channels=8,
        num_layers=1,
        sample_size=4,
        num_embeds_ada_norm=10,
    )
    scheduler = DDIMScheduler()
    pipe = DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    seen = []
    decode = vae.decode
    vae.decode = lambda z, *args, **options: (seen.append(z), decode(z, *args, **options))[1]
    generator = torch.Generator().manual_seed(1)
    words = {"guidance_scale": 1.0, "num_inference_steps": 2, "output_type": "np"}
    images = pipe(class_labels=[1, 2], generator=generator, **words).images
    side = 4 * 2 ** (len(DECODER["decoder_block_out_channels"]) - 1)
    assert images.shape == (2, side, side, 3)
    (latents,) = seen
    with torch.no_grad():
        pixels = model.decode(latents, size=(side, side)).clamp(0, 1)
    assert np.allclose(images, pixels.permute(0, 2, 3, 1).numpy(), atol=1e-5)
    assert 0 < images.std()


# --- features
def test_the_pyramid_has_the_model_s_maps_and_says_their_sizes():
    model = tiny_model()
    pyramid = FeaturePyramid(model)
    images = random_images(2, 50, 64)  # padded to 64 x 64
    with torch.no_grad():
        encoder, block, semantic = pyramid(images)
        assert torch.equal(encoder, model.encoder_features(images))
        assert torch.equal(block, model.features(images, "block"))
        assert torch.equal(semantic, model.features(images, "semantic"))
    info = pyramid.feature_info
    assert info.channels() == [one.shape[1] for one in (encoder, block, semantic)] == [16, 32, 32]
    assert info.reduction() == [64 // one.shape[2] for one in (encoder, block, semantic)]
    names = dict(model.named_modules())
    assert all(name in names for name in info.module_name()) and len(info) == 3
    assert FeaturePyramid(model, ["semantic"]).feature_info[0]["num_chs"] == 32
    with pytest.raises(ValueError, match="must be of encoder, block, semantic"):
        FeaturePyramid(model, ["stem"])


def blobs(count, seed):
    """Noise with a bright rectangle of whole cells, and its mask on the grid of cells."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 64, 64, generator=generator) * 0.3
    masks = torch.zeros(count, 1, 4, 4)
    for index in range(count):
        top, left = torch.randint(0, 3, (2,), generator=generator).tolist()
        masks[index, :, top : top + 2, left : left + 2] = 1
    return images + 0.6 * F.interpolate(masks, scale_factor=16), masks


@pytest.mark.parametrize("level", ["encoder", "block", "semantic"])
def test_a_linear_head_on_the_pyramid_learns_a_mask(level):
    """Segmentation as a user would do it: frozen maps, a 1x1 convolution, held-out pictures."""
    pyramid = FeaturePyramid(tiny_model(), [level])
    (channels,) = pyramid.feature_info.channels()
    (images, masks), (unseen, truth) = blobs(24, 0), blobs(12, 1)
    with torch.no_grad():
        train, test = (F.adaptive_avg_pool2d(pyramid(x)[0], 4) for x in (images, unseen))
    mean, std = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
    head = torch.nn.Conv2d(channels, 1, 1)
    optimizer = torch.optim.Adam(head.parameters(), 0.05)
    for _ in range(150):
        loss = F.binary_cross_entropy_with_logits(head((train - mean) / std), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = head((test - mean) / std) > 0
    union = (found | truth.bool()).sum()
    assert (found & truth.bool()).sum() / union > 0.8  # everything: 0.25
