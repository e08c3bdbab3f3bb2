"""The published network: golden outputs, its names and sizes, and what must not change them."""

import json
import math

import pytest
import torch

from muse.generation import LightningDiT
from muse.generation.embeddings import sine_table
from tests.golden.fill import GOLDEN

B1 = {"hidden_size": 768, "depth": 12, "num_heads": 12}
XL1 = {"hidden_size": 1152, "depth": 28, "num_heads": 16}


def relative(value, reference) -> float:
    return float((value - reference).abs().max() / reference.abs().max())


def muse_sized(**size) -> LightningDiT:
    with torch.device("meta"):
        return LightningDiT(8, 1, 32, num_classes=1000, **size)


def test_velocity_is_the_published_networks(net, golden):
    with torch.no_grad():
        velocity = net(golden["x"], golden["t"], golden["y"])
    assert relative(velocity, golden["velocity"]) < 1e-5


def test_names_and_shapes_are_the_published_ones(net):
    for model, file in ((net, "lightningdit_tiny"), (muse_sized(**XL1), "lightningdit_xl1_8x8x32")):
        keys = json.loads((GOLDEN / f"{file}_keys.json").read_text())
        assert {name: list(value.shape) for name, value in model.state_dict().items()} == keys
    assert len(keys) == 351


@pytest.mark.parametrize("size, count", [(B1, 130_408_736), (XL1, 675_035_552)])
def test_parameter_count(size, count):
    assert sum(p.numel() for p in muse_sized(**size).parameters()) == count


def test_normed_queries_have_the_published_names():
    net = LightningDiT(4, 1, 8, 48, 1, 4, 10, qk_norm=True)
    added = {name for name in net.state_dict() if "q_norm" in name or "k_norm" in name}
    assert added == {"blocks.0.attn.q_norm.weight", "blocks.0.attn.k_norm.weight"}
    x = torch.randn(2, 8, 4, 4)
    for part in net.blocks:
        torch.nn.init.normal_(part.adaLN_modulation[1].weight)
    torch.nn.init.normal_(net.final_layer.linear.weight)
    t, y = torch.rand(2), torch.tensor([1, 2])
    before = net.eval()(x, t, y)
    net.blocks[0].attn.qkv.weight.data[:96] *= 7  # queries and keys: their length does not count
    net.blocks[0].attn.qkv.bias.data[:96] *= 7
    assert torch.allclose(net(x, t, y), before, atol=1e-4)


def test_a_new_network_says_zero():
    net = LightningDiT(4, 2, 3, 32, 2, 4, 10)
    velocity = net(torch.randn(2, 3, 4, 4), torch.rand(2), torch.tensor([0, 9]))
    assert torch.equal(velocity, torch.zeros(2, 3, 4, 4))


def test_position_tables_by_hand():
    table = sine_table((2, 3), 8)  # token 5 is row 1, column 2; frequencies 1 and 1/100
    row, column = 1, 2
    by_hand = [
        f(place * w) for place in (column, row) for f in (math.sin, math.cos) for w in (1, 0.01)
    ]
    assert torch.allclose(table[5], torch.tensor(by_hand))
    rope = LightningDiT(
        (2, 3), 1, 2, 16, 1, 2, 1
    ).feat_rope  # d = 8: two pairs by row, two by column
    angles = [row, row, row / 100, row / 100, column, column, column / 100, column / 100]
    assert torch.allclose(rope.freqs_cos[5], torch.tensor([math.cos(a) for a in angles]))
    assert torch.allclose(rope.freqs_sin[5], torch.tensor([math.sin(a) for a in angles]))


def test_patches_come_back_to_their_places():
    """Without blocks, one cell of the latent moves the velocity of its own 2x2 patch alone."""
    net = LightningDiT((4, 6), 2, 3, 32, 0, 4, 10).eval()
    torch.nn.init.normal_(net.final_layer.linear.weight)
    x, t, y = torch.randn(1, 3, 4, 6), torch.rand(1), torch.tensor([1])
    changed = x.clone()
    changed[0, 1, 3, 2] += 1  # row 3, column 2: patch (1, 1), rows 2-3, columns 2-3
    moved = (net(changed, t, y) - net(x, t, y)).abs()[0].amin(0) > 0
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[2:4, 2:4] = True
    assert torch.equal(moved, expected)
    # Within the patch the output's order is row, column, channel.
    with torch.no_grad():
        net.final_layer.linear.weight.zero_()
        net.final_layer.linear.bias.copy_(torch.arange(12.0))
    assert net(x, t, y)[0, :, 2:4, 2:4].tolist() == [
        [[c, 3 + c], [6 + c, 9 + c]] for c in (0.0, 1.0, 2.0)
    ]


def test_labels_are_dropped_at_their_rate_and_once_a_sample(make_net):
    images, rate = 4000, 0.1
    net = make_net(class_dropout_prob=rate).train()
    looked_up, conditions = [], []
    net.y_embedder.embedding_table.register_forward_hook(
        lambda module, args, output: looked_up.append(args[0])
    )
    for block in net.blocks:
        block.register_forward_hook(lambda module, args, output: conditions.append(args[1]))
    labels = torch.arange(images) % 10
    with torch.no_grad():
        net(torch.zeros(images, 8, 4, 4), torch.full((images,), 0.5), labels)
    assert len(looked_up) == 1 and len(conditions) == 2
    assert torch.equal(conditions[0], conditions[1])
    dropped = looked_up[0] == 10
    assert torch.equal(looked_up[0][~dropped], labels[~dropped])
    deviation = math.sqrt(images * rate * (1 - rate))
    assert abs(dropped.sum().item() - images * rate) < 4 * deviation


def test_no_label_is_dropped_in_eval_mode(net, golden):
    outputs = [net(golden["x"], golden["t"], golden["y"]) for _ in range(2)]
    assert torch.equal(*outputs)


def test_no_class_is_a_label_of_its_own(net, golden):
    with torch.no_grad():
        nothing = net(golden["x"], golden["t"], torch.full((5,), 10))
    assert relative(nothing, golden["velocity"]) > 1e-2


def test_gradient_checkpointing_changes_no_output_and_no_gradient(make_net, golden):
    results = []
    for again in (False, True):
        net = make_net(gradient_checkpointing=again).train()
        calls = []
        net.blocks[0].mlp.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        torch.manual_seed(3)  # the same labels are dropped
        velocity = net(golden["x"], golden["t"], golden["y"])
        velocity.square().mean().backward()
        gradients = {n: p.grad for n, p in net.named_parameters() if p.requires_grad}
        results.append((velocity, gradients, len(calls)))
    (plain, plain_grads, once), (saved, saved_grads, twice) = results
    assert (once, twice) == (1, 2)
    assert torch.equal(plain, saved)
    assert all(torch.equal(plain_grads[name], saved_grads[name]) for name in plain_grads)


def test_compiles_into_one_graph(net, golden):
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with torch.no_grad():
        velocity = compiled(golden["x"], golden["t"], golden["y"])
    assert relative(velocity, golden["velocity"]) < 1e-5


def test_bfloat16_is_near(net, golden):
    inputs = golden["x"], golden["t"], golden["y"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = net(*inputs)
    assert mixed.dtype == torch.float32
    assert relative(mixed, golden["velocity"]) < 0.03
    with torch.no_grad():
        pure = net.bfloat16()(*inputs)
    assert relative(pure, golden["velocity"]) < 0.03


def test_time_keeps_its_steps_under_autocast(net):
    """Neighbours of 1,000 times differ as they do without autocast, to the last bit."""
    times = torch.tensor([0.900, 0.901])
    exact = net.t_embedder(times)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net.t_embedder(times)
    assert torch.equal(exact, mixed) and (exact[0] - exact[1]).abs().max() > 1e-5


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(5, 7, 4, 4)}, r"x must be .*\(B, 8, 4, 4\).*\(5, 7, 4, 4\)"),
        ({"x": torch.zeros(5, 8, 4, 5)}, r"\(5, 8, 4, 5\)"),
        ({"x": torch.zeros(5, 8, 4, 4, dtype=torch.int64)}, "int64"),
        ({"t": torch.zeros(4)}, r"t must be .*\(5,\).*\(4,\)"),
        ({"t": torch.zeros(5, dtype=torch.int64)}, "int64"),
        ({"y": torch.zeros(5, 1, dtype=torch.int64)}, r"\(5, 1\)"),
        ({"y": torch.zeros(5)}, "float32"),
        ({"y": torch.tensor([0, 1, 11, 2, 3])}, "label 11: labels are 0 to 9, and 10"),
        ({"y": torch.tensor([0, 1, -1, 2, 3])}, "label -1"),
    ],
)
def test_wrong_inputs_are_named(net, golden, change, message):
    with pytest.raises(ValueError, match=message):
        net(**{**{name: golden[name] for name in "xty"}, **change})


@pytest.mark.parametrize(
    "arguments, message",
    [((5, 2, 8, 48, 1, 4, 10), "5x5 .* patch_size 2"), ((4, 1, 8, 50, 1, 4, 10), "50 .* 16")],
)
def test_impossible_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LightningDiT(*arguments)
