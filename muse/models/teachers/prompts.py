"""Class names as text embeddings, averaged over prompts: the classifier of zero-shot evaluation."""
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from muse.models.teachers.text import TextTeacher

Template = str | Callable[[str], str]


def class_embeddings(teacher: TextTeacher, classnames: Sequence[str],
                     templates: Sequence[Template] | None = None) -> Tensor:
    """(C,E) L2-normalised: mean over prompts of normalised embeddings, normalised again (as CLIP's evaluation does).

    templates: strings with one `{}`, or functions of a class name; None: open_clip's 80 ImageNet prompts.
    """
    if templates is None:
        from open_clip import OPENAI_IMAGENET_TEMPLATES as templates
    if not classnames or not templates:
        raise ValueError("class_embeddings needs at least one class name and one template")
    rows = [teacher.encode([fill(template, name) for template in templates]).mean(dim=0) for name in classnames]
    return F.normalize(torch.stack(rows), dim=-1)


def fill(template: Template, classname: str) -> str:
    """One prompt."""
    return template.format(classname) if isinstance(template, str) else template(classname)
