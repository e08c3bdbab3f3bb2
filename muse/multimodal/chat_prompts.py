"""What the language model is told, in its own chat template: requests for pictures, and questions.

    <|im_start|>user
    <img><IMG_CONTEXT> ... <IMG_CONTEXT></img>
    Edit the image: put it on grass<|im_end|>
    <|im_start|>assistant

The queries, or the answer, stand directly behind the last line break.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from muse.errors import CheckpointError

GENERATE, EDIT = "Generate an image: ", "Edit the image: "
# A template writes one of these where a picture stands (transformers' releases differ).
_PICTURE, _PLACEHOLDER = "<IMG_CONTEXT>", "<image>"


class ChatPrompts:
    """Token ids of requests, by a tokenizer's own chat template.

    Special tokens inside a text are removed: they would end the turn, or claim a second picture.

    Args:
        tokenizer: transformers' fast tokenizer with a chat template.
        picture_tokens: tokens of one picture.
        vocabulary: rows of the language model's embeddings.

    Raises:
        CheckpointError: a tokenizer without the tokens of a picture, or with more tokens than
            `vocabulary`.
    """

    def __init__(self, tokenizer, picture_tokens: int, vocabulary: int):
        self.tokenizer, self.picture_tokens = tokenizer, picture_tokens
        names = {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": _PICTURE,
        }
        start, end, self.context = (getattr(tokenizer, n, v) for n, v in names.items())
        ids = tokenizer.get_vocab()
        for token in (start, end, self.context):
            if token not in ids:
                raise CheckpointError(f"the text tokenizer has no token {token}")
        if max(ids.values()) >= vocabulary:
            raise CheckpointError(
                f"the text tokenizer has ids up to {max(ids.values())}, but the language model "
                f"{vocabulary} embeddings: they do not belong together"
            )
        self.context_id = ids[self.context]
        self._picture = start + self.context * picture_tokens + end
        self._special = [*tokenizer.get_added_vocab(), start, end, self.context, _PLACEHOLDER]

    def generation(self, text: str) -> Tensor:
        """Ids (n,) of a request for a picture; the empty text is the request without text."""
        return self._ids((GENERATE + self._clean(text)).rstrip(), picture=False)

    def editing(self, text: str) -> Tensor:
        """Ids (n,) of a request to change the picture that stands before it."""
        return self._ids((EDIT + self._clean(text)).rstrip(), picture=True)

    def question(self, text: str, picture: bool = True) -> Tensor:
        """Ids (n,) of a question, about a picture unless told otherwise."""
        return self._ids(self._clean(text), picture)

    def answer(self, text: str) -> Tensor:
        """Ids (n,) of what the assistant says, with the token that ends its turn."""
        ids = self.tokenizer(self._clean(text), add_special_tokens=False)["input_ids"]
        return torch.tensor([*ids, self.end_ids[0]])

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end an answer: the turn's end, and the tokenizer's own end of text."""
        ids = self.tokenizer.get_vocab()
        ends = [ids[token] for token in ("<|im_end|>", self.tokenizer.eos_token) if token in ids]
        if not ends:
            raise CheckpointError("the text tokenizer has no token that ends an answer")
        return list(dict.fromkeys(ends))

    def words(self, ids: Tensor) -> str:
        """The text of generated ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _clean(self, text: str) -> str:
        for token in self._special:
            text = text.replace(token, "")
        return text.strip()

    def _ids(self, text: str, picture: bool) -> Tensor:
        content = [{"type": "text", "text": text}]
        if picture:
            content.insert(0, {"type": "image"})
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        for mark in (self.context, _PLACEHOLDER):
            rendered = rendered.replace(mark, self._picture)
        ids = torch.tensor(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])
        found = int((ids == self.context_id).sum())
        if found != picture * self.picture_tokens:
            raise CheckpointError(
                f"the chat template made {found} picture tokens of {picture * self.picture_tokens}"
            )
        return ids


def drop_texts(
    texts: Sequence[str], probability: float, generator: torch.Generator | None = None
) -> list[str]:
    """Each text, or with this probability the empty one: one draw a sample, for guidance.

    A sample loses its text as a whole, so that the same network learns to predict without.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"the probability must be 0 to 1, got {probability}")
    dropped = torch.rand(len(texts), generator=generator) < probability
    return ["" if drop else text for text, drop in zip(texts, dropped.tolist())]
