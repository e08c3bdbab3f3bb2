"""ImageNet's classes by folder names, against timm's lists of the variants and WordNet's words."""

import importlib.resources
import re

import pytest
from open_clip import IMAGENET_CLASSNAMES
from timm.data import ImageNetInfo

from muse.errors import DataError
from muse.evaluation.imagenet_classes import check_guess, folder_classes, imagenet_wordnet_ids

INFO = importlib.resources.files("timm.data") / "_info"
IMAGENETTE = {  # its ten folders, as its own page lists them
    "n01440764": "tench",
    "n02102040": "English Springer Spaniel",
    "n02979186": "cassette player",
    "n03000684": "chainsaw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


def test_ids_are_the_thousand_in_the_order_of_labels():
    """ImageNet's labels are the ids in the alphabet: a folder of all classes gives 0 .. 999."""
    ids = imagenet_wordnet_ids()
    assert len(set(ids)) == 1000
    assert list(ids) == sorted(ids)
    assert all(re.fullmatch(r"n\d{8}", name) for name in ids)
    classes = folder_classes(sorted(ids))
    assert classes.indices == tuple(range(1000))
    assert list(classes.names) == list(IMAGENET_CLASSNAMES)


def test_names_and_ids_are_of_one_order():
    """WordNet's words for an id share a word with open_clip's name of the same place."""
    info = ImageNetInfo("imagenet-1k")
    classes = folder_classes(imagenet_wordnet_ids())

    def shared(shift):
        found = 0
        for index, wordnet_id in enumerate(imagenet_wordnet_ids()):
            words = info.label_name_to_description(wordnet_id).lower()
            name = classes.names[(index + shift) % 1000].lower().replace("-", " ")
            found += any(re.search(rf"\b{re.escape(word)}", words) for word in name.split())
        return found

    assert shared(0) > 900
    assert shared(1) < 300


@pytest.mark.parametrize("variant", ["imagenet_a", "imagenet_r", "mini_imagenet"])
def test_variants_have_their_published_indices(variant):
    folders = (INFO / f"{variant}_synsets.txt").read_text().split()
    indices = [int(line) for line in (INFO / f"{variant}_indices.txt").read_text().split()]
    classes = folder_classes(folders)
    assert list(classes.indices) == indices
    assert [IMAGENET_CLASSNAMES[index] for index in indices] == list(classes.names)
    assert f"{len(folders)} class folders" in classes.source


def test_imagenette_gets_its_own_ten_names():
    classes = folder_classes(sorted(IMAGENETTE))
    assert [name.lower() for name in classes.names] == [n.lower() for n in IMAGENETTE.values()]
    assert classes.indices[0] == 0 and classes.indices[-1] == 701


def test_imagenet_v2_numbers_are_not_the_alphabet():
    """Folders "0" .. "999" sorted as words: the second is 1, the third 10."""
    folders = sorted(str(number) for number in range(1000))
    classes = folder_classes(folders)
    assert classes.indices[:4] == (0, 1, 10, 100)
    assert classes.names[2] == IMAGENET_CLASSNAMES[10]


def test_other_folders_keep_their_names():
    classes = folder_classes(["big_cat", "dog"])
    assert classes == (("big cat", "dog"), None, "class folders")


@pytest.mark.parametrize(
    "folders, says",
    [
        (["n01440764", "n00000001"], r"none of ImageNet's 1000 WordNet ids: 'n00000001'; give"),
        (["n01440764", "dog", "cat"], r"mix WordNet ids such as 'n01440764' .*: 'cat' and 1 more"),
        (["0", "1", "2"], r"3 class folders are numbers, .* --classnames FILE"),
    ],
)
def test_it_refuses_to_guess(folders, says):
    with pytest.raises(DataError, match=says) as error:
        folder_classes(folders)
    assert "\n" not in str(error.value)


def test_labels_without_names_must_be_all_of_them():
    check_guess([2, 1, 0, 1], 3)
    with pytest.raises(DataError, match=r"10 classes, 0 to 9\) does not hold each of the 1000"):
        check_guess(list(range(10)), 1000)
    with pytest.raises(DataError, match="no labels"):
        check_guess([], 1000)
