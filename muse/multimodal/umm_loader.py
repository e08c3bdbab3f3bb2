"""Batches of one kind each, kinds and sources mixed by weight, through the loaders of muse/data.

A source is a mapping `{urls: ..., kind: image|edit|question, weight: 1.0}`, or a list of such; a
plain path or pattern is of the kind image. A batch holds one kind, for the model has one way for
each; all processes take the same kind at the same time, as DDP and FSDP require.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig

from muse.config import plain
from muse.data.dataloader import eval_loader, train_loader
from muse.data.eval import EvalLoader
from muse.data.faults import BadSamples
from muse.data.mixture import parse_mixture, pick_source
from muse.data.train import TrainLoader
from muse.errors import CheckpointError, ConfigError
from muse.multimodal.umm_samples import MAKERS

# What the multimodal model must find in a sample; the makers of edits and questions know the rest.
_FIELDS = ("images", "text")


class KindsLoader:
    """Endless batches, each from the loader of one kind; in proportion to the kinds' weights.

    Args:
        loaders: by kind.
        weights: by kind.
        seed: of the order of kinds, which no process changes.
    """

    def __init__(self, loaders: dict[str, TrainLoader], weights: dict[str, float], seed: int):
        self.loaders, self.seed = loaders, seed
        self.weights = [weights[kind] for kind in loaders]
        self.drawn = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        kinds = list(self.loaders)
        streams = {kind: iter(loader) for kind, loader in self.loaders.items()}
        while True:
            kind = kinds[pick_source(self.weights, self.drawn, (self.seed, "kinds"))]
            batch = next(streams[kind])
            self.drawn += 1
            yield batch

    @property
    def retries(self) -> int:
        return sum(loader.retries for loader in self.loaders.values())

    @property
    def bad(self) -> BadSamples:
        """The faults of all kinds together."""
        found = BadSamples()
        for loader in self.loaders.values():
            found.seen += loader.bad.seen
            for kind, count in loader.bad.counts.items():
                found.counts[kind] = found.counts.get(kind, 0) + count
                found.keys.setdefault(kind, []).extend(loader.bad.keys[kind])
        return found

    def state_dict(self) -> dict[str, Any]:
        states = {kind: loader.state_dict() for kind, loader in self.loaders.items()}
        return {"drawn": self.drawn, "kinds": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; a kind that was not there before starts at its beginning."""
        try:
            self.drawn, kinds = int(state["drawn"]), dict(state["kinds"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"not a position in data of several kinds: {error!r}") from error
        for kind, loader in self.loaders.items():
            if kind in kinds:
                loader.load_state_dict(kinds[kind])


def sources_by_kind(source: Any) -> dict[str, list[tuple[Any, float]]]:
    """Kind -> (source, weight) pairs, in the order of the first of each kind."""
    if isinstance(source, Mapping):
        source = [source]
    found: dict[str, list[tuple[Any, float]]] = {}
    for one, weight in zip(*parse_mixture(source)):
        kind = one.get("kind", "image") if isinstance(one, Mapping) else "image"
        if kind not in MAKERS:
            raise ConfigError(f"a source's kind must be one of {', '.join(MAKERS)}, got {kind!r}")
        found.setdefault(kind, []).append((one, weight))
    return found


def build_kinds_loader(
    cfg: DictConfig, *, rank: int = 0, world: int = 1, pin_memory: bool = False
) -> KindsLoader:
    """The training batches of process `rank` of `world`."""
    params = cfg.dataset.params
    kinds = sources_by_kind(plain(params.train_shards_path_or_url))
    loaders = {
        kind: train_loader(
            _as_mixture(sources),
            batch_size=cfg.training.per_gpu_batch_size,
            **plain(cfg.dataset.preprocessing),
            num_workers=params.num_workers_per_gpu,
            seed=cfg.training.seed,
            rank=rank,
            world=world,
            shuffle_buffer=params.shuffle_buffer,
            resampled=params.resampled,
            mix=params.mix,
            cache_in_memory=params.cache_in_memory,
            max_bad_fraction=cfg.dataset.max_bad_fraction,
            fields=_FIELDS,
            pin_memory=pin_memory,
            maker=MAKERS[kind],
        )
        for kind, sources in kinds.items()
    }
    weights = {kind: sum(weight for _, weight in sources) for kind, sources in kinds.items()}
    return KindsLoader(loaders, weights, cfg.training.seed)


def _as_mixture(sources: list[tuple[Any, float]]) -> Any:
    """The sources of one kind as `parse_mixture` reads them."""
    if len(sources) == 1:
        return sources[0][0]
    return [{**one, "weight": weight} for one, weight in sources]


def build_kinds_eval_loaders(
    cfg: DictConfig, *, rank: int = 0, world: int = 1, max_images: int | None = None
) -> dict[str, list[EvalLoader]]:
    """By kind, loaders that give each evaluation sample once over all processes.

    max_images: of each source, instead of the configuration's number.
    """
    params, preprocessing = cfg.dataset.params, cfg.dataset.preprocessing
    kinds = sources_by_kind(plain(params.eval_shards_path_or_url))
    return {
        kind: [
            eval_loader(
                source,
                batch_size=params.eval_batch_size,
                fields=_FIELDS,
                resize_shorter_edge=preprocessing.resize_shorter_edge,
                crop_size=preprocessing.crop_size,
                rank=rank,
                world=world,
                max_images=max_images or params.max_eval_images,
                max_bad_fraction=cfg.dataset.max_bad_fraction,
                maker=MAKERS[kind],
            )
            for source, _ in sources
        ]
        for kind, sources in kinds.items()
    }
