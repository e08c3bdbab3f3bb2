"""What the multimodal model does for its user: generate, edit, answer."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from muse.generation.sampler import evaluating, noise_for
from muse.models.layers import check_images
from muse.multimodal.sampling import sample_latents


class UMMInferenceMixin:
    """The public methods of `MUSE_UMM`. None of them depends on how samples are put in batches."""

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        steps: int = 20,
        guidance_scale: float = 4.5,
        seed: int = 0,
        size: int | tuple[int, int] | None = None,
        indices: Sequence[int] | None = None,
    ) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] from text.

        Args:
            prompts: B texts.
            steps: of the solver.
            guidance_scale: 1 is no guidance.
            seed: a picture's noise depends on this and on its index alone.
            size: (H, W) in pixels, or one number for both; None is `model.image_size`. The grid of
                latents is the nearest one, and the decoded picture is resized from it.
            indices: the pictures' numbers; 0 ... B - 1 when None.
        """
        self.latent_scale.require()
        prompts = _texts("prompts", prompts)
        size = self.config["image_size"] if size is None else size
        height, width = (size, size) if isinstance(size, int) else size
        if min(height, width) < 1:
            raise ValueError(f"size must be positive, got {height}x{width}")
        with evaluating(self):
            captions = self.captions(prompts)
            # The request without text is the same for all.
            empty = self.captions([""]) if guidance_scale != 1.0 else None
        latents = self._denoise(
            captions, empty, (height, width), steps, guidance_scale, seed, indices
        )
        return self._decode(latents, (height, width))

    @torch.no_grad()
    def edit(
        self,
        images: Tensor,
        instructions: Sequence[str],
        steps: int = 20,
        guidance_scale: float = 4.5,
        seed: int = 0,
        indices: Sequence[int] | None = None,
    ) -> Tensor:
        """The images (B, 3, H, W) in [0, 1], any H and W, changed as they are told, in their size.

        They are read as squares of `model.image_size`, and what is made of them is resized back.
        Guidance drops the instruction and keeps the picture. Arguments as those of `generate`.
        """
        self.latent_scale.require()
        instructions = _texts("instructions", instructions)
        check_images(images)
        _check_count("instructions", instructions, images)
        with evaluating(self):
            captions = self.captions(instructions, images)
            guided = guidance_scale != 1.0
            empty = self.captions([""] * len(images), images) if guided else None
        side = self.config["image_size"]
        latents = self._denoise(captions, empty, (side, side), steps, guidance_scale, seed, indices)
        return self._decode(latents, tuple(images.shape[-2:]))

    @torch.no_grad()
    def answer(
        self, images: Tensor | None, questions: Sequence[str], max_new_tokens: int = 64
    ) -> list[str]:
        """One answer in words to each question, by the likeliest token at every place.

        Args:
            images: (B, 3, H, W) in [0, 1], one a question; None asks without pictures.
            questions: B texts.
            max_new_tokens: tokens after which an answer is cut.
        """
        questions = _texts("questions", questions)
        if images is not None:
            check_images(images)
            _check_count("questions", questions, images)
        chat = self.require_chat()
        with evaluating(self):
            pictures = None if images is None else self.read_pictures(images)
            rows = self.embed([chat.question(q, images is not None) for q in questions], pictures)
            # An answer is written behind its prompt, so shorter prompts are padded in front.
            longest = max(map(len, rows))
            embeds = torch.stack([F.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
            mask = torch.stack(
                [F.pad(row.new_ones(len(row)), (longest - len(row), 0)) for row in rows]
            )
            ids = self.internvl.generate(
                inputs_embeds=embeds,
                attention_mask=mask.long(),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=chat.end_ids,
                pad_token_id=chat.end_ids[0],
            )
        return [chat.words(row) for row in ids]

    def _denoise(
        self,
        captions: Tensor,
        empty: Tensor | None,
        size: tuple[int, int],
        steps: int,
        guidance_scale: float,
        seed: int,
        indices: Sequence[int] | None,
    ) -> Tensor:
        """Latents (B, C, h, w) as the tokenizer decodes them, on the grid nearest to `size`."""
        indices = range(len(captions)) if indices is None else indices
        if len(indices) != len(captions):
            raise ValueError(f"{len(captions)} texts, but {len(indices)} indices")
        grid = [max(1, round(side / self.tokenizer.cell)) for side in size]
        noise = noise_for(seed, indices, (self.tokenizer.config.latent_dim, *grid))
        latents = sample_latents(
            self.generator,
            noise.to(captions.device),
            captions,
            None if empty is None else empty.expand_as(captions),
            steps=steps,
            guidance_scale=guidance_scale,
            solver=self.config["solver"],
            flow_shift=self.config["flow_shift"],
        )
        return self.latent_scale.denormalise(latents)

    def _decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        latents = latents.to(self.tokenizer.to_latent.weight.dtype)
        return self.tokenizer.decode(latents, size=size).float().clamp(0, 1)


def _texts(what: str, texts: Sequence[str]) -> list[str]:
    """A list of texts; one text alone would be taken letter by letter."""
    if isinstance(texts, str) or not texts:
        raise ValueError(f"{what} must be a list of texts, got {texts!r}")
    return list(texts)


def _check_count(what: str, texts: list[str], images: Tensor) -> None:
    if len(texts) != len(images):
        raise ValueError(f"{len(images)} images, but {len(texts)} {what}")
