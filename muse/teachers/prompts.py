"""Class names as text embeddings, averaged over prompts: the classifier of zero-shot evaluation."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from muse.errors import ConfigError

Template = str | Callable[[str], str]
TEXTS_AT_A_TIME = 256


def imagenet_templates() -> list[Template]:
    """open_clip's 80 prompts, the field's default."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES  # noqa: PLC0415 - heavy

    return list(OPENAI_IMAGENET_TEMPLATES)


def prompts(name: str, templates: Sequence[Template]) -> list[str]:
    """One class name in every template.

    `{}` or `{c}` in a string stands for the name; a callable is called with it.
    """
    texts = []
    for template in templates:
        if callable(template):
            texts.append(template(name))
        elif "{}" in template or "{c}" in template:
            texts.append(template.replace("{}", name).replace("{c}", name))
        else:
            raise ConfigError(f"template without {{}} for the class name: {template!r}")
    return texts


@torch.no_grad()
def class_embeddings(
    teacher, names: Sequence[str], templates: Sequence[Template] | None = None
) -> Tensor:
    """(K,E), L2-normalised: mean over templates of the normalised embeddings, as open_clip does.

    Args:
        teacher: a text teacher, or a function of a list of n strings -> (n,E), L2-normalised; it is
            given the texts of a few classes at a time.
        names: K class names.
        templates: None takes open_clip's 80.
    """
    templates = imagenet_templates() if templates is None else templates
    if not names or not templates:
        raise ConfigError("zero-shot needs at least one class name and one template")
    encode = getattr(teacher, "encode", teacher)
    per_block = max(1, TEXTS_AT_A_TIME // len(templates))
    rows = []
    for start in range(0, len(names), per_block):
        block = names[start : start + per_block]
        texts = encode([text for name in block for text in prompts(name, templates)])
        by_class = texts.float().unflatten(0, (len(block), -1))  # (classes, templates, E)
        rows.append(F.normalize(by_class.mean(1), dim=-1))
    return torch.cat(rows)
