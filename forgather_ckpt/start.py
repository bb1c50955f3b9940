"""What a run goes on from: chosen, loaded, and on trial until a step has been done."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from forgather_ckpt import attempts, catalog, choice, prompt, pruning
from forgather_ckpt.changes import compare_arguments, refuse_risky, told
from forgather_ckpt.control import refuse_unlike
from forgather_ckpt.coordinator import CheckpointCoordinator
from forgather_ckpt.errors import CheckpointError, CheckpointNotFound, DeclarationError, RankTimeout
from forgather_ckpt.load import LoadReport
from forgather_ckpt.manifest import CheckpointManifest
from forgather_ckpt.policies import Policy, bests
from forgather_ckpt.resume import is_by_rank
from forgather_ckpt.retention import countable

logger = logging.getLogger(__name__)


class Start:
    """The start of a run, from one of its checkpoints or afresh. Every rank makes one.

    `saves`: whether the run will write into its directory; else nothing is noted there.
    """

    def __init__(
        self,
        coordinator: CheckpointCoordinator,
        policy: Policy,
        *,
        saves: bool,
        max_load_attempts: int,
        training_args: Mapping[str, Any],
        strict_args: bool,
        is_interrupted: Callable[[], bool],
    ) -> None:
        self._coordinator = coordinator
        self._rank = coordinator.topology.rank
        self._run = coordinator.run_directory
        self._bests = bests(policy)
        self._saves = saves
        self._max_load_attempts = max_load_attempts
        self._training_args = training_args
        self._strict_args = strict_args
        self._is_interrupted = is_interrupted
        self._is_on_trial = False
        """Rank 0: a checkpoint is being loaded, or was, and no step has been done since: if the job dies now, it may be
        because of that. An error, or the end of the training, is no death."""

    def load(self, which: bool | int | str | Path | None) -> LoadReport | None:
        """What was loaded, None for a fresh start. `which` is that of `CheckpointManager.resume`."""
        asked = str(which)
        answer = self._coordinator.agree("choosing how to start", lambda: {"resume": asked}, self._choose)
        if which is None:
            which = answer
        if which is False:
            self._tell_fresh_start()
            return None
        if isinstance(which, str) and is_by_rank(which) and self._bests:
            which = self._coordinator.agree("choosing the best", lambda: None, lambda _: self._path_of_best(str(which)))
        is_newest = which is True or which in ("latest", "auto")
        avoid: Sequence[str] = self._exhausted() if is_newest else ()
        try:
            return self._coordinator.load_checkpoint(
                None if is_newest else which, avoid=avoid, inspect=None if self._rank else self._inspect
            )
        except CheckpointNotFound as err:
            if avoid:
                raise  # there are checkpoints: a fresh start would go over them
            if which == "auto":
                return None
            if is_newest:
                raise CheckpointNotFound(
                    f"{self._run} has no checkpoint to resume from; with "
                    'resume_from_checkpoint="auto" the run starts fresh where there is none',
                    path=str(self._run),
                ) from err
            raise

    # What to go on from

    def _choose(self, asked: Sequence[Mapping[str, str]]) -> prompt.Answer | None:
        """Rank 0: the person's answer, where nothing else says what to go on from."""
        refuse_unlike(asked)
        return self._ask() if asked[0]["resume"] == str(None) else None

    def _ask(self) -> prompt.Answer:
        """Rank 0: what the person who started the job wants to go on from."""
        found = pruning.survey(catalog.scan(self._run))
        if all(one.is_quarantined for one in found) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            # which tells of damaged or quarantined ones, or else starts fresh; torchrun's restarts go on with the job
            return "auto"
        if not prompt.is_terminal():
            raise DeclarationError(prompt.without_terminal(self._run, found), path=str(self._run))
        best = next(iter(self._bests), None)
        return prompt.ask(self._run, found, best=best, while_waiting=self._while_waiting)

    def _while_waiting(self) -> None:
        """While the person takes their time: the other ranks hear that this one is alive, and Ctrl-C is obeyed."""
        self._coordinator.beat()
        if self._is_interrupted():
            raise KeyboardInterrupt

    def _tell_fresh_start(self) -> None:
        """Rank 0: what there is of an earlier run is not safe from this one."""
        found = pruning.survey(catalog.scan(self._run)) if self._rank == 0 and self._saves else []
        if found:
            logger.warning(
                "a fresh start in %s, which holds %d checkpoints, the newest of step %d: this run's policy counts them with "
                "its own and removes what it does not keep, and its saves replace those of the same step",
                self._run,
                len(found),
                found[0].step,
            )

    def _path_of_best(self, which: str) -> str:
        """Rank 0: of the best checkpoint, or the next best, by the policy of this job."""
        best, found = self._bests[0], catalog.scan(self._run)
        ranked = [one.path for one, _ in best.ranked(countable(pruning.survey(found)))]
        if not ranked:
            choice.usable(found)  # that all are quarantined is another error
            raise CheckpointNotFound(
                f"{self._run} has no best checkpoint: none has a finite {best.metric!r}; name another one, 'latest' or a "
                "step",
                path=str(self._run),
            )
        return str(choice.chosen_of(found, which, ranked=ranked)[0].path)

    # What is noted of it

    def _exhausted(self) -> list[str]:
        """The digests of the checkpoints on which the job has died too often."""

        def look(_: list[None]) -> list[str]:
            given_up = attempts.exhausted(self._run, self._max_load_attempts)
            return [
                one.manifest.digest for one in catalog.scan(self._run).checkpoints if one.manifest.digest in given_up
            ]

        found: list[str] = self._coordinator.agree("looking at earlier attempts", lambda: None, look)
        return found

    def _inspect(self, manifest: CheckpointManifest) -> None:
        """Rank 0: before a checkpoint touches anything."""
        if manifest.training_args and self._training_args:
            self._tell_changes(manifest)
        if self._saves:
            attempts.begin(self._run, manifest.digest)
            self._is_on_trial = True

    def _tell_changes(self, manifest: CheckpointManifest) -> None:
        found = compare_arguments(
            manifest.training_args,
            self._training_args,
            saved_world_size=manifest.world_size,
            world_size=self._coordinator.topology.world_size,
            step=manifest.step,
        )
        if self._strict_args:
            refuse_risky(found)
        if text := told(found):
            logger.warning("arguments that are not those of the checkpoint of step %d:\n%s", manifest.step, text)

    def end_trial(self) -> None:
        """A step has been done since the load: it does not kill the job."""
        if self._is_on_trial:
            self._is_on_trial = False
            attempts.succeeded(self._run, self._max_load_attempts)

    def end(self, error: BaseException | None) -> None:
        """The training ends, perhaps by an error, which is no death."""
        if self._is_on_trial and not self._is_of_a_death(error):
            self.end_trial()

    def _is_of_a_death(self, error: BaseException | None) -> bool:
        """Whether another rank died, and this one is left to tell. Torch's own exchanges fail without saying why."""
        if isinstance(error, RankTimeout):
            return True
        is_torchs = isinstance(error, RuntimeError) and not isinstance(error, CheckpointError)
        return is_torchs and bool(self._coordinator.ranks_that_died())
