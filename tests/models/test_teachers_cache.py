"""The memo: same bits from memory as at first, one copy of shared maps, nothing beyond its size."""

import pytest
import torch

from muse.teachers import (
    CachedTeacher,
    FrozenTeacher,
    TopologyTarget,
    build_feature_teacher,
    build_topology_teacher,
)

OPTIONS = {"kind": "affinity", "source": "random", "layers": [0, 1]}
MAP_BYTES = 16 * 16 * 2


def pictures(count=4):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def names(count=4):
    return [f"sample{index}" for index in range(count)]


class Counting(FrozenTeacher):
    """Passes on to a teacher and counts the images it is asked for."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher, self.images = teacher, 0

    def forward(self, images, **arguments):
        self.images += len(images)
        return self.teacher(images, **arguments)


def cached(max_bytes=1 << 20, **options):
    return CachedTeacher(Counting(build_topology_teacher(OPTIONS | options, 3, (4, 4))), max_bytes)


def test_remembered_equals_fresh_bit_for_bit_and_the_teacher_to_half_precision():
    teacher, images = cached(), pictures()
    fresh, remembered = teacher(images, keys=names()), teacher(images, keys=names())
    assert teacher.teacher.images == 4 and (teacher.hits, teacher.misses) == (4, 4)
    assert remembered.grid == (4, 4)
    direct = teacher(images)
    for first, again, exact in zip(fresh.maps, remembered.maps, direct.maps):
        assert torch.equal(first, again) and first.dtype == torch.float32
        torch.testing.assert_close(first.sum(-1), torch.ones(4, 1, 16), atol=1e-6, rtol=0)
        torch.testing.assert_close(first, exact, atol=1e-4, rtol=2e-3)


def test_an_answer_does_not_depend_on_the_batch_it_was_first_asked_in():
    teacher, other, images = cached(), cached(), pictures()
    whole = teacher(images, keys=names())
    other(images[2:3], keys=names()[2:3])
    mixed = other(images.flip(0), keys=names()[::-1])
    assert torch.equal(whole.maps[0].flip(0), mixed.maps[0]) and other.teacher.images == 4


def test_shared_maps_are_stored_once_and_come_back_shared():
    teacher = cached()
    target = teacher(pictures(), keys=names())
    assert teacher.bytes == 4 * MAP_BYTES and target.maps[0] is target.maps[2]
    spread = cached(spread=True)
    found = spread(pictures(), keys=names())
    assert spread.bytes == 4 * 2 * MAP_BYTES  # two layers for three blocks
    for stored, exact in zip(found.maps, spread(pictures()).maps):
        torch.testing.assert_close(stored, exact, atol=1e-4, rtol=2e-3)


def test_a_full_memo_goes_on_computing():
    teacher, images = cached(max_bytes=2 * MAP_BYTES + 10), pictures()
    first = teacher(images, keys=names())
    second = teacher(images, keys=names())
    assert teacher.bytes == 2 * MAP_BYTES and teacher.teacher.images == 4 + 2
    assert torch.equal(first.maps[0], second.maps[0])


def test_grids_are_kept_apart_and_repeated_keys_are_fine():
    teacher, images = cached(), pictures()
    teacher(images, keys=names())
    assert teacher(images, keys=names(), grid=(2, 2)).maps[0].shape == (4, 1, 4, 4)
    twice = teacher(images[[0, 0]], keys=["again", "again"]).maps[0]
    assert torch.equal(twice[0], twice[1])
    with pytest.raises(ValueError, match="3 keys for 4 images"):
        teacher(images, keys=names(3))


def test_per_head_maps_in_a_tuple_of_distinct_tensors():
    class Two(FrozenTeacher):
        def forward(self, images):
            maps = torch.rand(len(images), 2, 4, 4).softmax(-1)
            return TopologyTarget((maps, maps.flip(1), maps), (2, 2))

    teacher = CachedTeacher(Two())
    first = teacher(pictures(2), keys=["a", "b"])
    again = teacher(pictures(2), keys=["b", "a"])
    assert torch.equal(again.maps[1], first.maps[1].flip(0)) and again.maps[0] is again.maps[2]


def test_features_and_the_configuration_key():
    options = {"kind": "backbone", "source": "random", "layers": [0, 1], "cache": True}
    teacher = build_feature_teacher(options, (4, 4))
    found = teacher(pictures(), keys=names())
    assert isinstance(teacher, CachedTeacher) and teacher.dim == found.shape[1] == 24
    torch.testing.assert_close(found, teacher(pictures()), atol=1e-3, rtol=1e-3)
    assert build_topology_teacher(OPTIONS | {"cache": 3}, 1, (4, 4)).max_bytes == 3 << 20
    torch.nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
