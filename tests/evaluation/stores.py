"""An extraction that hands out given batches, for tests of the feature store."""

import numpy as np

from muse.evaluation.feature_parts import Coverage

NO_FAULTS = {"seen": 0, "counts": {}, "keys": {}}


class GivenBatches:
    """Batches, name -> array, whose `indices` are the samples' places.

    What is covered is left out of later starts, as a loader does.

    Args:
        batches: in order.
        kept: what `notes` gives.
        stop: raised in place of batch number `stop[0]`.
    """

    def __init__(self, batches, kept=None, stop=None):
        self.given, self.kept, self.stop = list(batches), kept or {}, stop
        self.handed: list[int] = []  # indices handed out by this start
        self.told = 0
        self.earlier = None

    def batches(self, covered):
        for number, batch in enumerate(self.given):
            if self.stop is not None and self.stop[0] == number:
                raise self.stop[1]
            keep = ~np.isin(batch["indices"], covered)
            if keep.any():
                self.handed += batch["indices"][keep].tolist()
                yield {name: rows[keep] for name, rows in batch.items()}

    def progress(self):
        new, self.told = self.handed[self.told :], len(self.handed)
        return Coverage(np.array(new, np.int64), {**NO_FAULTS, "seen": len(new)})

    def notes(self, earlier):
        self.earlier = list(earlier)
        return self.kept
