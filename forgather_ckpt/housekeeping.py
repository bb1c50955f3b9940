"""What rank 0 does behind the saves of a run: remove what is not kept, and tell of bests, space and costs."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from forgather_ckpt import annotations, pruning, space
from forgather_ckpt.deleter import Deleter
from forgather_ckpt.policies import Policy, Stored, bests
from forgather_ckpt.retention import Protected, countable
from forgather_ckpt.run_clock import SaveCosts

logger = logging.getLogger(__name__)

SAVES_PER_STORAGE_LINE = 10
_DELETING_SECONDS = 30.0


class Housekeeping:
    """Over the checkpoints of one run; rank 0's alone, and without a word to the others.

    `grace_seconds`: a save that takes longer is warned of.
    """

    def __init__(self, run: Path, policy: Policy, *, grace_seconds: float) -> None:
        self._run = run
        self._policy = policy
        self.protected = Protected()
        """What stays, whatever the policy says."""
        self._grace_seconds = grace_seconds
        self._deleter = Deleter()
        self._costs = SaveCosts()
        self._told: set[str] = set()

    def close(self) -> None:
        """Wait for what is being removed, if it does not take too long."""
        self._deleter.close(_DELETING_SECONDS)

    def prune(self) -> pruning.Pruned:
        """Remove what the policy does not keep."""
        return pruning.prune(self._run, self._policy, self.protected, delete=self._deleter.delete)

    def after_save(self, path: Path, *, step: int, seconds: float, elapsed_seconds: float, note: str | None) -> None:
        """When a checkpoint has been committed, which took so many seconds; what fails is told."""
        self._costs.add(step, seconds, elapsed_seconds)
        logger.info("saved %s", path)
        try:
            if note is not None:
                annotations.annotate(path, lambda noted: replace(noted, notes=(*noted.notes, note)))
            pruned = self.prune()
            self._tell_best(path, [verdict.checkpoint for verdict in pruned.verdicts if verdict.keep])
            self._tell_space(pruned)
            self._tell_grace(seconds)
        except Exception as err:  # the checkpoint is there, and training goes on
            logger.warning("after the save of %s: %s: %s", path.name, type(err).__name__, err)

    def _tell_best(self, path: Path, kept: Sequence[Stored]) -> None:
        for best in bests(self._policy):
            ranked = best.ranked(countable(kept))[: best.n]
            for place, (one, value) in enumerate(ranked, start=1):
                if one.path == path:
                    what = "new best checkpoint" if place == 1 else f"best checkpoint {place} of {best.n}"
                    logger.info("%s: %s (%s=%.6g)", what, path, best.metric, value)

    def _tell_space(self, pruned: pruning.Pruned) -> None:
        storage = space.storage(self._run, pruned.left)
        if self._costs.num_saves % SAVES_PER_STORAGE_LINE == 0:
            logger.info("%s", space.line(storage))
            logger.info("%s", self._costs.advice())
        removed = (storage.largest_recent_bytes or 0) if pruned.removed else 0
        if shortage := space.shortage(storage, removed_per_save_bytes=removed):
            self._warn_once("space", shortage)
        else:
            self._told.discard("space")

    def _tell_grace(self, seconds: float) -> None:
        if seconds > self._grace_seconds:
            self._warn_once(
                "grace",
                f"a save took {seconds:.1f} s, longer than the {self._grace_seconds:g} s that remain after a "
                "signal (grace_seconds): an emergency checkpoint would be lost. Ask the launcher for more, as with torchrun "
                "--shutdown-timeout, terminationGracePeriodSeconds of Kubernetes, #SBATCH --signal; see docs/preemption.md",
            )

    def _warn_once(self, about: str, text: str) -> None:
        if about not in self._told:
            self._told.add(about)
            logger.warning("%s", text)
