"""Network, loss and sampler together: two classes, each a Gaussian, come out as they went in."""

import torch

from muse.generation import LightningDiT, flow_loss, noise_for, sample

CENTRES = torch.tensor([[1.5, -0.5], [-1.0, 1.0]])  # (class, channel)
SPREAD = 0.3
SHAPE = (2, 2, 2)


def trained_network() -> LightningDiT:
    net = LightningDiT(2, 1, 2, hidden_size=32, depth=2, num_heads=2, num_classes=2)
    weights = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=3e-3, betas=(0.9, 0.95), weight_decay=0)
    for _ in range(250):
        labels = torch.randint(2, (64,))
        latents = CENTRES[labels][:, :, None, None] + SPREAD * torch.randn(64, *SHAPE)
        loss = flow_loss(net, latents, labels)
        (loss.velocity.mean() + loss.cosine.mean()).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return net


def test_a_trained_network_samples_its_classes():
    net = trained_network()
    labels = torch.arange(200) % 2
    samples = sample(net, noise_for(0, range(200), SHAPE), labels, steps=25)
    nothing = sample(net, noise_for(0, range(200), SHAPE), torch.full((200,), 2), steps=25)
    for label, centre in enumerate(CENTRES):
        own = samples[labels == label].transpose(0, 1).flatten(1)  # (channel, values)
        assert (own.mean(1) - centre).abs().max() < 0.3
        assert (own.std(1) - SPREAD).abs().max() < 0.15
    # "No class" was learned from dropped labels: both classes, so both sides of their midpoint.
    first = nothing.mean((2, 3))[:, 0] > CENTRES[:, 0].mean()
    assert 0.1 < first.float().mean() < 0.9
