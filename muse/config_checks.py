"""Keys of a configuration that must fit each other; each check is a `ConfigError` of one line."""

from omegaconf import DictConfig

from muse.errors import ConfigError


def check_together(config: DictConfig) -> None:
    """The whole configuration: model, latent, losses with their teachers, crop.

    Training asks for more of the crop, see `check_training_crop`.
    """
    check_model(config.model)
    _check_latent(config.model)
    _check_losses(config)
    _check_crop(config)


def check_model(model: DictConfig) -> None:
    if model.dim % model.num_heads or (model.dim // model.num_heads) % 2:
        raise ConfigError(
            f"model.dim={model.dim} must be model.num_heads={model.num_heads} times an even head "
            "width"
        )
    if model.routing == "shared" and model.join_semantics:
        raise ConfigError(
            "model.join_semantics=true is impossible with model.routing=shared: there S is the "
            "value stream"
        )


def _check_latent(model: DictConfig) -> None:
    # Not part of `check_model`: a saved model with a `decoder_adapter` has two widths and the
    # source `random`.
    channels = model.decoder.config.get("latent_channels")
    if channels is not None and channels != model.latent_dim and model.decoder.source == "random":
        raise ConfigError(
            f"model.latent_dim={model.latent_dim} but "
            f"model.decoder.config.latent_channels={channels}"
        )


def _check_losses(config: DictConfig) -> None:
    for term, teacher in (("topology", "topology"), ("itc", "text"), ("distillation", "feature")):
        if config.losses[term].weight > 0 and config.teacher[teacher].kind == "none":
            raise ConfigError(
                f"losses.{term}.weight={config.losses[term].weight} needs a teacher, but "
                f"teacher.{teacher}.kind is none"
            )
    itc = config.losses.itc
    if itc.across_accumulation and itc.objective == "distillation":
        raise ConfigError(
            "losses.itc.across_accumulation=true has no meaning with "
            "losses.itc.objective=distillation: a regression has no negatives"
        )
    sections = [section for section in config.losses.values() if isinstance(section, DictConfig)]
    if not any(section.weight > 0 for section in sections):
        raise ConfigError("every loss has weight 0: nothing would be learned")


def _check_crop(config: DictConfig) -> None:
    crop, resize = (
        config.dataset.preprocessing.crop_size,
        config.dataset.preprocessing.resize_shorter_edge,
    )
    if crop > resize:
        raise ConfigError(
            f"dataset.preprocessing.crop_size={crop} is larger than resize_shorter_edge={resize}"
        )


def check_training_crop(config: DictConfig) -> None:
    """Training crops are whole cells; a measurement takes any picture, which the model pads."""
    crop = config.dataset.preprocessing.crop_size
    patch = config.model.encoder.config.get("patch_size", 14)
    patch = patch if isinstance(patch, int) else patch[0]
    cell = patch * config.model.unshuffle
    if crop % cell:
        raise ConfigError(
            f"dataset.preprocessing.crop_size={crop} is not a multiple of {cell} "
            f"(encoder patch {patch} x model.unshuffle {config.model.unshuffle})"
        )
