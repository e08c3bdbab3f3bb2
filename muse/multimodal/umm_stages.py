"""The table of multimodal stages: what each one trains.

A stage is data, as in muse/stages.py, whose `select_trainable` reads these rows too. The language
model and the tokenizer are frozen in all of them. The paper names no stages; these are UniLIP's,
and the projector's is ours.
"""

from muse.stages import Stage

_CONNECTOR = (r"^queries$", r"^connector\.", r"^to_caption\.", r"^latent_tokens\.")

UMM_STAGES: dict[str, Stage] = {
    # Understanding: MUSE's training moves the encoder, and the projector follows it, on questions
    # and answers. It changes what the others read of a picture, so it comes first.
    "projector": Stage((r"^internvl\.model\.multi_modal_projector\.",)),
    # 1: the connector learns to speak SANA's language; SANA is frozen.
    "connector": Stage(_CONNECTOR),
    # 2: both, on text-to-image and editing pairs.
    "connector_generator": Stage((*_CONNECTOR, r"^generator\.")),
    # 3: the same parts, on instructions.
    "instructions": Stage((*_CONNECTOR, r"^generator\.")),
}

# Kinds of samples that train something in a stage (muse/multimodal/umm_samples.py).
KINDS_OF_STAGES: dict[str, tuple[str, ...]] = {
    "projector": ("question",),
    "connector": ("image", "edit"),
    "connector_generator": ("image", "edit"),
    "instructions": ("image", "edit"),
}
