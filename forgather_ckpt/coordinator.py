"""`CheckpointCoordinator`: saves and loads what a trainer declares, on all ranks together."""

import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeGuard

from forgather_ckpt import commit, files, manifest, paths
from forgather_ckpt.bulk import Channels
from forgather_ckpt.component import StateComponent
from forgather_ckpt.declarations import Source
from forgather_ckpt.differences import ReplicationReport
from forgather_ckpt.discovery import ProcessGroups, connect
from forgather_ckpt.errors import DeclarationError
from forgather_ckpt.job import Job
from forgather_ckpt.lease import Lease
from forgather_ckpt.load import LoadReport, Torn, load, refuse_torn, torn_error
from forgather_ckpt.matching import Patterns, Rename, Rules
from forgather_ckpt.metrics import as_number
from forgather_ckpt.patterns import ValidationLevel
from forgather_ckpt.prepare import Request as LoadRequest
from forgather_ckpt.save import Request as SaveRequest
from forgather_ckpt.save import Saved, save
from forgather_ckpt.structure import collector_paused
from forgather_ckpt.topology import Topology
from forgather_ckpt.validate import Request as ValidationRequest
from forgather_ckpt.validate import validate
from forgather_ckpt.warm_start import Request as StartRequest
from forgather_ckpt.warm_start import WarmStartReport, warm_start

_DEFAULT_TIMEOUT_SECONDS = 600.0
_MAX_TIMEOUT_SECONDS = 1e9
"""More than that overflows the store's clocks."""


class CheckpointCoordinator:
    """Saves, loads and checks the components of a job. Every rank makes one and calls the same methods.

    >>> with CheckpointCoordinator(trainer, "runs/a") as coordinator:
    ...     coordinator.save_checkpoint(step=1000)
    ...     coordinator.load_checkpoint()

    `source` is any object with `get_state_components()` (asked at every save and load), or a list of components.
    `process_groups`, for PER_GROUP, is `{name: group}`, a `DeviceMesh`, or both; taken from the source where it has
    `get_process_groups()`. `timeout_seconds` is how long a rank may show no progress before the others give up and
    name it. `on_mismatch`: whether copies that differ are an error, or a warning and the majority's are stored.
    `training_args` go into the manifest, without secrets.

    Not thread-safe. Every failure is a `CheckpointError`, the same on all ranks, and leaves the coordinator usable.
    """

    def __init__(
        self,
        source: Source,
        output_dir: str | Path,
        *,
        process_groups: ProcessGroups = None,
        timeout_seconds: float = _DEFAULT_TIMEOUT_SECONDS,
        shared_filesystem: bool = True,
        on_mismatch: Literal["error", "warn"] = "error",
        training_args: Mapping[str, Any] | None = None,
    ) -> None:
        def prepare() -> ProcessGroups:
            if not shared_filesystem:
                raise DeclarationError(
                    "shared_filesystem=False is not available yet; use a directory that all nodes share"
                )
            if on_mismatch not in ("error", "warn"):
                raise DeclarationError(f"on_mismatch is {on_mismatch!r}; use 'error' or 'warn'")
            if not is_timeout:
                raise DeclarationError(
                    f"timeout_seconds is {timeout_seconds!r}; use a positive number of seconds, up to 1e9"
                )
            if not isinstance(output_dir, (str, Path)) or not str(output_dir):
                raise DeclarationError(f"output_dir is {output_dir!r}; use the path of a run directory")
            if training_args is not None and not isinstance(training_args, Mapping):
                raise DeclarationError(f"training_args is a {type(training_args).__name__}; use a dict, or None")
            _check_source(source)
            if process_groups is None and hasattr(source, "get_process_groups"):
                found: ProcessGroups = source.get_process_groups()
                return found
            return process_groups

        is_timeout = _is_number(timeout_seconds) and 0 < timeout_seconds <= _MAX_TIMEOUT_SECONDS
        # a rank with a wrong one must be able to tell the others
        comm, topology = connect(prepare, timeout_seconds=timeout_seconds if is_timeout else _DEFAULT_TIMEOUT_SECONDS)
        comm.begin_operation()
        run_id = comm.agree("naming the run", lambda: on_mismatch, _name_run)
        # rank 0's directory is everybody's: ranks may have been started in different ones
        run = comm.agree("choosing the run directory", lambda: None, lambda _: str(_run_directory(output_dir)))
        self._job = Job(
            comm, Channels(comm), topology, source, Path(run), run_id, on_mismatch, dict(training_args or {})
        )
        self._lease: Lease | None = None
        self._parent: dict[str, Any] | None = None
        self._torn: tuple[str, ...] = ()

    @property
    def topology(self) -> Topology:
        """The ranks, nodes and groups of the job."""
        return self._job.topology

    def save_checkpoint(
        self,
        step: int,
        *,
        epoch: float | None = None,
        metrics: Mapping[str, Any] | None = None,
        kind: str = "periodic",
        elapsed_seconds: float | None = None,
    ) -> Path:
        """Store the state of all components; returns the checkpoint's path, the same on every rank.

        When it returns, the checkpoint survives power loss; until then the previous one does. An earlier checkpoint
        of the same step is replaced. `kind` is "periodic", "epoch", "emergency" or "final". `metrics` are rank 0's, and
        so is `elapsed_seconds`, for which the run has been training.
        """

        def prepare() -> None:
            if isinstance(step, bool) or not isinstance(step, int) or step < 0:
                raise DeclarationError(f"step is {step!r}; use a number of steps, from 0")
            if step >= 2**63:
                raise DeclarationError(f"step is {step!r}; use a number of steps, below 2**63")
            if epoch is not None and not _is_number(epoch):
                raise DeclarationError(f"epoch is {epoch!r}; use a finite number, or None")
            if metrics is not None and not isinstance(metrics, Mapping):
                raise DeclarationError(f"metrics is {metrics!r}; use a dict of names and values, or None")
            if kind not in manifest.KINDS:
                raise DeclarationError(f"kind is {kind!r}; use one of {', '.join(manifest.KINDS)}")
            if self._torn:
                raise refuse_torn(self._torn)
            if elapsed_seconds is not None and not _is_number(elapsed_seconds):
                raise DeclarationError(f"elapsed_seconds is {elapsed_seconds!r}; use a finite number, or None")
            self.take_lease()

        told = {name: as_number(value) for name, value in metrics.items()} if isinstance(metrics, Mapping) else {}
        request = SaveRequest(step, epoch, kind, told, elapsed_seconds)
        saved: Saved = save(self._job, request, prepare=prepare, parent=self._parent)
        self._parent = saved.lineage()
        return saved.path

    def load_checkpoint(
        self,
        which: str | int | Path | None = None,
        *,
        components: Sequence[str] | None = None,
        strict: bool = True,
        staged: bool = False,
        avoid: Collection[str] = (),
        inspect: Callable[[manifest.CheckpointManifest], None] | None = None,
    ) -> LoadReport:
        """Load one checkpoint into the live state of all ranks.

        `which`: None or "latest" (the newest that is good; damaged ones are passed over), "latest~1", a step, or a
        path. `components` loads only those. `strict=False` skips what is optional or unknown, and the report says
        what. `staged=True` reads all into host memory first: a damaged checkpoint then touches nothing.

        `avoid`: digests of manifests that are not to be chosen as the newest. `inspect` is called with the manifest, on
        the ranks that give it, before anything is touched; what it raises is raised on all ranks.
        """
        job, keys = self._job, None
        if _is_list_of_keys(components):
            keys = tuple(sorted(set(components)))
        elif components is not None:
            job = replace(job, source=_Refused(DeclarationError(_not_keys(components))))
        request = LoadRequest(which, keys, strict, staged, tuple(sorted(avoid)), inspect)
        try:
            report = load(job, request)
        except Torn as torn:
            self._torn = tuple(dict.fromkeys((*self._torn, *torn.touched)))
            raise torn_error(torn) from torn.error.__cause__
        self._torn = tuple(key for key in self._torn if key not in report.loaded)
        self._parent = {"step": report.step, "sequence": report.sequence, "digest": report.digest}
        return report

    def warm_start(
        self,
        path: str | Path,
        components: Sequence[str] = ("model",),
        *,
        include: Patterns | None = None,
        exclude: Patterns | None = None,
        rename: Rename | None = None,
        cast: bool = False,
        missing: Literal["error", "keep"] = "error",
    ) -> WarmStartReport:
        """Start from some state of a checkpoint, of this run or another; all else stays as it is, and it is no resume.

        >>> coordinator.warm_start("runs/base@latest", include="encoder.*", rename={"backbone.": "encoder."}, cast=True)

        `path`: a checkpoint, `RUN@SELECTOR`, or a run directory, whose newest one it is. `include` and `exclude` are
        shell patterns of the job's item names. `rename`: `{old prefix: new prefix}`, from names in the checkpoint to
        names in the job, or a function of the whole name. `cast=True` converts tensors of another floating-point dtype
        to that of the job's. `missing="keep"` leaves what the checkpoint lacks as it is. The report names every item
        that was renamed, cast, kept or ignored. What does not fit is a `LoadMismatch`, and nothing has changed then.
        """
        job = self._job
        try:
            request = StartRequest.of(path, components, include, exclude, rename=rename, cast=cast, missing=missing)
        except DeclarationError as err:
            job, request = replace(job, source=_Refused(err)), StartRequest("", (), Rules())
        try:
            report = warm_start(job, request)
        except Torn as torn:
            self._torn = tuple(dict.fromkeys((*self._torn, *torn.touched)))
            raise torn_error(torn) from torn.error.__cause__
        whole = {key for key, start in report.components.items() if not start.kept}
        self._torn = tuple(key for key in self._torn if key not in whole)
        return report

    def validate_replication(
        self,
        level: ValidationLevel | str | None = None,
        components: Sequence[str] | None = None,
        *,
        step: int | None = None,
    ) -> Mapping[str, ReplicationReport]:
        """Compare the copies without saving: a report for each component, the same on all ranks.

        `level` is for all components; without it each has its own, and QUICK where that is NONE. Copies that differ
        are no error: ask `report.is_equal`, print `report.text()`, or `raise mismatch_error(reports.values())`
        (`forgather_ckpt.differences`). They leave `replication-report-<step>.json` in the run directory. Where there is
        one copy only the report says "not compared"; what keeps a component from being compared is an error.
        """

        def prepare() -> None:
            if components is not None and not _is_list_of_keys(components):
                raise DeclarationError(_not_keys(components))
            if level is not None and level not in list(ValidationLevel)[1:]:
                raise DeclarationError(
                    f"level is {level!r}; use 'quick', 'tensor' or 'full', or None for each one's own"
                )
            if step is not None and (isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**63):
                raise DeclarationError(f"step is {step!r}; use a number of steps, from 0, or None")

        chosen = ValidationLevel(level) if level in list(ValidationLevel) else None
        keys = tuple(sorted(set(components))) if _is_list_of_keys(components) else None
        with collector_paused():
            return validate(self._job, ValidationRequest(chosen, keys, step), prepare=prepare)

    def take_lease(self) -> None:
        """Inside the work of `agree`: take the run directory for this job now, and not at the first save.

        `RunDirectoryInUse` where another job writes to it.
        """
        if self._job.comm.rank == 0 and self._lease is None:
            self._lease = Lease(self._job.run)
            commit.sweep(self._job.run)

    @property
    def run_directory(self) -> Path:
        """As rank 0 has it, absolute."""
        return self._job.run

    def agree(self, what: str, work: Callable[[], Any], decide: Callable[[list[Any]], Any] | None = None) -> Any:
        """Run `work` on every rank, let rank 0 `decide` over all results, and return its decision on every rank.

        Results and decision are JSON. What `work` raises on any rank, or `decide` on rank 0, is raised on all. `what` is
        for messages, and the same on all ranks.
        """
        self._job.comm.begin_operation(what)
        return self._job.comm.agree(what, work, decide)

    def beat(self) -> None:
        """Inside the work of `agree`, or its decision: tell the others, who wait for this rank, that it is at work."""
        self._job.comm.beat()

    def ranks_that_died(self) -> list[int]:
        """After an error that may come of it: those whose processes have ended without closing their coordinators. Of other
        nodes it is known only once a rank there has noticed. Waits a little, as the end of a process takes its time."""
        return self._job.comm.ranks_that_died()

    def close(self, error: BaseException | None = None) -> None:
        """Give the run directory back to other jobs. A second call does nothing. Ranks that call a method of theirs from
        now on are told that this one has left, and of the `error` that it left with."""
        self._job.comm.say_goodbye(error)
        self._job.channels.close()
        self._job.comm.wait_until_heard()
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(error)


def _name_run(on_mismatch: list[str]) -> str:
    """A name for this start of the job, if all ranks want the same to happen to copies that differ."""
    for rank, wanted in enumerate(on_mismatch):
        if wanted != on_mismatch[0]:
            raise DeclarationError(
                f"on_mismatch is {on_mismatch[0]!r} on rank 0 and {wanted!r} on rank {rank}; give it alike on all ranks",
                rank=rank,
            )
    return secrets.token_hex(8)


class _Refused:
    """A source that fails: so that a wrong argument fails on all ranks, in their first agreement."""

    def __init__(self, error: DeclarationError) -> None:
        self._error = error

    def get_state_components(self) -> Sequence[StateComponent]:
        raise self._error


def _check_source(source: object) -> None:
    if isinstance(source, (str, bytes)):
        raise DeclarationError(
            f"the source is {source!r}; give an object that has get_state_components(), or a list of StateComponent"
        )
    if not (isinstance(source, Sequence) or callable(getattr(source, "get_state_components", None))):
        raise DeclarationError(
            f"{type(source).__name__} has no get_state_components(); give an object that has, or a list of "
            "StateComponent"
        )


def _run_directory(output_dir: str | Path) -> Path:
    """The absolute path of what is, or can become, a run directory."""
    with files.typed_errors(Path(output_dir), "looking at the run directory"):
        run = Path(output_dir).absolute()
        if run.is_file():
            raise DeclarationError(f"output_dir {str(run)!r} is a file; give a directory, or a path that is free")
        if (run / paths.MANIFEST).exists():
            raise DeclarationError(
                f"output_dir {str(run)!r} is a checkpoint; give the run directory that contains it, {str(run.parent)!r}"
            )
    return run


def _is_number(value: object) -> bool:
    """Whether `value` is a finite number that a manifest can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63


def _not_keys(components: object) -> str:
    return f"components is {components!r}; use a list of keys, such as ['model'], or None for all"


def _is_list_of_keys(components: object) -> TypeGuard[Collection[str]]:
    return (
        isinstance(components, Collection)
        and not isinstance(components, (str, bytes, Mapping))
        and all(isinstance(key, str) for key in components)
    )
