"""Control messages among the ranks: one outcome a rank to rank 0, one verdict back to all.

They go through the job's store, never through a process group, so they work with a gloo, an NCCL-only or no
default group, name the ranks that are missing, and leave nothing broken behind when a rank fails. Nobody else in
the package talks to the store or calls a collective.

The rule that prevents hangs (DESIGN invariant 4): local work runs *inside* `agree`, so no `return`, `raise` or
rank test can stand between a rank and an exchange that its peers will enter.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch.distributed as dist

from forgather_ckpt.errors import CheckpointError, RankFailed, RankTimeout, from_wire
from forgather_ckpt.liveness import ProcessId
from forgather_ckpt.replication import describe
from forgather_ckpt.topology import Ranks

logger = logging.getLogger(__name__)

T = TypeVar("T")

GRACE_SECONDS = 2.0
"""How much longer than rank 0 the others wait, so that rank 0, which knows who is missing, speaks first."""
_LIVENESS_SECONDS = 0.25
_MAX_POLL_SECONDS = 0.05
_DECIDING, _SPOKEN = "deciding", "spoken"
"""What rank 0 claims a phase with; an impatient rank claims it with its error, and the first one counts for all."""
_KEPT_OPERATIONS = 64
"""Messages of so many operations stay in the store, for ranks that come late to one that has failed."""


class _Interrupted(Exception):
    """Raised out of local work by `beat`: the phase has failed elsewhere, there is nothing left to work for."""


class Comm:
    """The ranks of a job, joined through a store of their own (see `discovery.connect`).

    Not thread-safe: one operation at a time, on one thread.
    """

    def __init__(self, store: dist.Store, rank: int, processes: Sequence[ProcessId], *, timeout_seconds: float) -> None:
        self.rank = rank
        self.world_size = len(processes)
        self.timeout_seconds = timeout_seconds
        self._store = store
        self._processes = processes
        self._operation = 0
        self._phase = 0
        self._posted: list[list[str]] = []
        self._next_beat = 0.0
        self._working_on: str | None = None

    def begin_operation(self, request: str = "") -> None:
        """Start a save, load or check: every rank starts the same ones in the same order. Fresh keys for each, so
        that a failed operation leaves the next one untouched.

        `request` says what is asked. Where the others have given up on another request than this rank's, this rank
        never made that call, and where they ask the same again, it cannot matter whether it did: it takes its place in
        the next operation, and is not behind for ever.
        """
        with _store_errors("beginning"):
            self._begin(request)

    def _begin(self, request: str) -> None:
        self._operation += 1
        while self._is_over(self._operation) and (
            self._request_of(self._operation) != request or self._request_of(self._operation + 1) == request
        ):
            logger.warning("the other ranks asked for %s without this one", self._request_of(self._operation))
            self._operation += 1
        self._phase = 0
        self._posted.append([f"{self._operation}/request"])
        self._store.compare_set(f"{self._operation}/request", "", request)
        while len(self._posted) > _KEPT_OPERATIONS:
            for key in self._posted.pop(0):
                self._store.delete_key(key)

    def _is_over(self, operation: int) -> bool:
        """Whether the others have given up waiting in an operation's first phase, as when a rank never comes to it."""
        verdict, claim = f"{operation}/1/verdict", f"{operation}/1/claim"
        if self._store.check([verdict]):
            error = json.loads(self._store.get(verdict)).get("error", {})
            return bool(error.get("type") == RankTimeout.__name__)
        if not self._store.check([claim]):
            return False
        return self._store.get(claim) not in (_DECIDING.encode(), _SPOKEN.encode())

    def _request_of(self, operation: int) -> str:
        key = f"{operation}/request"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def agree(self, phase: str, work: Callable[[], Any], decide: Callable[[list[Any]], Any] | None = None) -> Any:
        """Run `work` on every rank, let rank 0 `decide` over all results, and return its decision on every rank.

        Results and decision must be JSON. If `work` raises on any rank, or `decide` on rank 0, or a rank does not
        answer in time, every rank raises the same error. Without `decide` only the success is agreed.
        """
        with _store_errors(phase):
            return self._agree(phase, work, decide)

    def _agree(self, phase: str, work: Callable[[], Any], decide: Callable[[list[Any]], Any] | None) -> Any:
        self._phase += 1
        prefix = f"{self._operation}/{self._phase}"
        message, cause = self._attempt(prefix, work)
        self._post(f"{prefix}/{self.rank}", message)
        if "error" in message:
            self._raise_flag(prefix)
        if cause is not None and not isinstance(cause, Exception):
            # KeyboardInterrupt, SystemExit: this rank obeys, after the others have been told
            if self.rank == 0:
                self._post(f"{prefix}/verdict", {"error": one_error(phase, {0: message}).to_wire()})
            self._announce_exit(cause)
            raise cause
        try:
            verdict = self._lead(prefix, phase, decide) if self.rank == 0 else self._follow(prefix, phase)
        except BaseException as err:
            self._announce_exit(err)
            raise
        if self.rank != 0:
            self._store.set(f"heard/{self.rank}", prefix)
        if "error" in verdict:
            raise from_wire(verdict["error"]) from cause
        return verdict["ok"]

    def together(self, phase: str, work: Callable[[], T]) -> T:
        """Run `work` on every rank, and return this rank's own result, which may be anything, when all have succeeded."""
        results: list[T] = []
        self.agree(phase, lambda: results.append(work()))
        return results[0]

    def wait_until_heard(self) -> None:
        """Before this rank may end: rank 0, whose process may be the one that hosts the store, waits a little until the
        others have its last verdict."""
        if self.rank != 0:
            return
        prefix = f"{self._operation}/{self._phase}".encode()
        pending = list(range(1, self.world_size))
        deadline = time.monotonic() + GRACE_SECONDS
        with suppress(dist.DistError):
            while pending := [rank for rank in pending if not (self._has_heard(rank, prefix) or self._is_dead(rank))]:
                if time.monotonic() > deadline:
                    return
                time.sleep(0.001)

    def say_goodbye(self, error: BaseException | None = None) -> None:
        """This rank comes to nothing any more, because of `error` or as it is done: who waits for it need not. Its process
        may end from now on: that is no death."""
        reason = "" if error is None else f" after {type(error).__name__}: {error}"
        with suppress(dist.DistError):
            self._store.set(f"goodbye/{self.rank}", reason)

    def ranks_that_died(self) -> list[int]:
        """Those that have ended without a goodbye; found by a rank that waits up to the grace for the others to do either."""
        deadline = time.monotonic() + GRACE_SECONDS
        pending = [rank for rank in range(self.world_size) if rank != self.rank]
        with suppress(dist.DistError):
            while True:
                pending = [rank for rank in pending if not self._has_left(rank)]
                if (dead := [rank for rank in pending if self._is_dead(rank)]) or not pending:
                    # who said goodbye and ended between the two questions is not dead
                    return [rank for rank in dead if not self._has_left(rank)]
                if time.monotonic() > deadline:
                    break
                time.sleep(_MAX_POLL_SECONDS)
        return []

    def _has_heard(self, rank: int, prefix: bytes) -> bool:
        key = f"heard/{rank}"
        return self._store.check([key]) and self._store.get(key) == prefix

    def beat(self) -> None:
        """Tell the others that this rank makes progress: their deadline starts anew. Cheap, call it often.

        Inside the work of a phase it also leaves that work when the phase has failed elsewhere.
        """
        now = time.monotonic()
        if now < self._next_beat:
            return
        self._next_beat = now + min(0.5, self.timeout_seconds / 10)
        self._store.add(f"beat/{self.rank}", 1)
        self._leave_if_failed()

    def wait_for(self, others: Ranks, is_done: Callable[[], bool], what: str) -> None:
        """Inside the work of a phase: wait for what the work of `others` brings about, such as a broadcast.

        Leaves when the phase has failed elsewhere. `RankTimeout` names who died or, at the deadline, who shows no sign
        of life; where all do, that nothing came of it.
        """
        started = time.monotonic()
        next_look = started + _LIVENESS_SECONDS
        signs: dict[int, tuple[int, float]] = {}
        pause = 0.0
        while not is_done():
            time.sleep(pause)
            now = time.monotonic()
            if now < next_look:
                pause = min((now - started) / 8, 0.002)  # what takes long is seen late by a small part of that
                continue
            next_look = now + _LIVENESS_SECONDS
            self._store.add(f"waits/{self.rank}", 1)
            self._leave_if_failed()
            if dead := [rank for rank in others if self._is_dead(rank)]:
                raise RankTimeout(f"{what} failed: {self._name_dead(dead)}", rank=dead[0])
            for rank in others:
                sign = self.progress_of(rank) + int(self._store.add(f"waits/{rank}", 0))
                if rank not in signs or signs[rank][0] != sign:
                    signs[rank] = (sign, now)
            if now - started > self.timeout_seconds:
                silent = [rank for rank, (_, seen) in signs.items() if now - seen > self._silence_seconds]
                told = f"no sign of life from {_ranks(silent)}" if silent else "all ranks wait, and nothing comes"
                raise RankTimeout(
                    f"{what} failed: {told} within {self.timeout_seconds:g} s (timeout_seconds)",
                    rank=silent[0] if silent else None,
                )

    def blame_the_dead(self, others: Ranks, what: str) -> None:
        """Inside the work of a phase, after a transfer has failed: `RankTimeout` if that is because one of `others`
        died, which its connections tell sooner than the kernel does."""
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline:
            self._leave_if_failed()
            if dead := [rank for rank in others if self._is_dead(rank)]:
                raise RankTimeout(f"{what} failed: {self._name_dead(dead)}", rank=dead[0])
            time.sleep(_MAX_POLL_SECONDS)

    @property
    def _silence_seconds(self) -> float:
        """After so long without a sign a rank counts as silent: several times what lies between two of its signs."""
        return min(4.0, self.timeout_seconds / 2)

    def channel_store(self, name: str) -> dist.Store:
        """A connection to the job's store of its own, for a process group among some ranks; fresh in every phase."""
        store: Any = self._store
        return dist.PrefixStore(f"{self._operation}/{self._phase}/{name}", store.clone())

    def _leave_if_failed(self) -> None:
        prefix = self._working_on
        # there can be no good verdict yet: that takes this rank's message
        if prefix and (self._store.check([f"{prefix}/failed"]) or self._store.check([f"{prefix}/verdict"])):
            raise _Interrupted

    def _attempt(self, prefix: str, work: Callable[[], Any]) -> tuple[dict[str, Any], BaseException | None]:
        self._working_on = prefix
        try:
            return {"ok": work()}, None
        except _Interrupted:
            return {"ok": None}, None
        except CheckpointError as err:
            return {"error": err.at(rank=self.rank).to_wire()}, err
        except BaseException as err:
            failure = RankFailed(f"{type(err).__name__}: {err}", rank=self.rank)
            return {"error": failure.to_wire()}, err
        finally:
            self._working_on = None

    def _announce_exit(self, err: BaseException) -> None:
        """Tell the others, who may go on to the next phase, that this rank was interrupted and will not come to it."""
        failure = RankFailed(f"interrupted by {type(err).__name__}", rank=self.rank)
        prefix = f"{self._operation}/{self._phase + 1}"
        message = {"error": failure.to_wire()}
        self._post(f"{prefix}/{self.rank}", message)
        if self.rank == 0:
            self._post(f"{prefix}/verdict", {"error": one_error("the operation", {0: message}).to_wire()})
        self._raise_flag(prefix)

    def _raise_flag(self, prefix: str) -> None:
        self._posted[-1].append(f"{prefix}/failed")
        self._store.add(f"{prefix}/failed", 1)

    def _post(self, key: str, message: dict[str, Any]) -> None:
        self._posted[-1].append(key)
        self._store.set(key, json.dumps(message))

    def _lead(self, prefix: str, phase: str, decide: Callable[[list[Any]], Any] | None) -> dict[str, Any]:
        claim = ""
        try:
            messages = self._collect(prefix, phase)
            failures = {rank: message for rank, message in messages.items() if "error" in message}
            if failures:
                raise one_error(phase, failures)
            self._claim(prefix)
            claim = _DECIDING
            results = [messages[rank]["ok"] for rank in range(self.world_size)]
            verdict = {"ok": decide(results) if decide else None}
        except CheckpointError as err:
            verdict = {"error": err.to_wire()}
        except Exception as err:
            verdict = {"error": RankFailed(f"{phase} failed on rank 0: {type(err).__name__}: {err}", rank=0).to_wire()}
        except BaseException as err:
            failure = RankFailed(f"{phase} was interrupted on rank 0 by {type(err).__name__}", rank=0)
            self._post(f"{prefix}/verdict", {"error": failure.to_wire()})
            raise
        return self._speak(prefix, verdict, claim)

    def _speak(self, prefix: str, verdict: dict[str, Any], claim: str) -> dict[str, Any]:
        """Publish the verdict; if the others have given up on this rank by now, their error is everybody's."""
        self._posted[-1].append(f"{prefix}/claim")
        current = self._store.compare_set(f"{prefix}/claim", claim, _SPOKEN)
        if current != _SPOKEN.encode():
            verdict = {"error": json.loads(current)}
        self._post(f"{prefix}/verdict", verdict)
        # `set` does not wait for the store: this rank may exit now, and must not be taken for one that died before
        self._store.check([f"{prefix}/verdict"])
        return verdict

    def _claim(self, prefix: str) -> None:
        """Decide only if nobody has given up on this phase: an impatient rank's error is the verdict then."""
        current = self._store.compare_set(f"{prefix}/claim", "", _DECIDING)
        if current != _DECIDING.encode():
            raise from_wire(json.loads(current))

    def _collect(self, prefix: str, phase: str) -> dict[int, dict[str, Any]]:
        keys = {rank: f"{prefix}/{rank}" for rank in range(self.world_size)}
        patience = _Patience(self)
        while not self._store.check(list(keys.values())):
            if self._store.check([f"{prefix}/failed"]):
                present = {rank: key for rank, key in keys.items() if self._store.check([key])}
                return {rank: json.loads(self._store.get(key)) for rank, key in present.items()}
            if patience.look_around():
                pending = [rank for rank, key in keys.items() if not self._store.check([key])]
                gone = [rank for rank in pending if self._has_left(rank) and not self._store.check([keys[rank]])]
                if gone:
                    raise RankFailed(f"{phase} failed: {self._name_gone(gone[0])}", rank=gone[0])
                dead = [rank for rank in pending if self._is_dead(rank) and not self._store.check([keys[rank]])]
                if dead:
                    raise RankTimeout(f"{phase} failed: {self._name_dead(dead)}", rank=dead[0])
                if late := patience.late(pending):
                    raise RankTimeout(
                        f"{phase} failed: no answer from {_ranks(late)} within {self.timeout_seconds:g} s "
                        f"(timeout_seconds); stopped, stuck before this point, or cut off",
                        rank=late[0],
                    )
        return dict(enumerate(map(json.loads, self._values(list(keys.values())))))

    def _values(self, keys: list[str]) -> list[bytes]:
        """Of keys that are there: all in one request, where the store has such."""
        store: Any = self._store
        return store.multi_get(keys) if store.has_extended_api() else list(map(store.get, keys))

    def _follow(self, prefix: str, phase: str) -> dict[str, Any]:
        key = f"{prefix}/verdict"
        patience = _Patience(self, grace_seconds=GRACE_SECONDS)
        has_given_up = False
        error: CheckpointError
        while not self._store.check([key]):
            if not patience.look_around():
                continue
            for rank in range(1, self.world_size):  # rank 0 cannot see processes of other nodes
                if rank != self.rank and self._processes[rank].is_dead(self._processes[self.rank]):
                    self._store.set(f"dead/{rank}", "1")
            if self._has_left(0):
                error = RankFailed(f"{phase} failed: {self._name_gone(0)}", rank=0)
            elif self._is_dead(0):
                error = RankTimeout(f"{phase} failed: {self._name_dead([0])}", rank=0)
            elif patience.late([0]):
                error = RankTimeout(f"{phase} failed: no verdict from rank 0 within the deadline", rank=0)
            else:
                continue
            if self._store.check([key]):
                break  # it spoke, and then its process ended
            # If rank 0 has begun to decide, its verdict counts: wait for it once more, then withdraw the claim from it.
            told, is_over = json.dumps(error.to_wire()), has_given_up or self._is_dead(0) or self._has_left(0)
            current = self._store.compare_set(f"{prefix}/claim", "", told)
            if is_over and current == _DECIDING.encode():
                current = self._store.compare_set(f"{prefix}/claim", _DECIDING, told)
            if current not in (_DECIDING.encode(), _SPOKEN.encode()):
                return {"error": json.loads(current)}
            if is_over and not self._store.check([key]):
                return {"error": error.to_wire()}
            has_given_up, patience = True, _Patience(self, grace_seconds=GRACE_SECONDS)
        verdict: dict[str, Any] = json.loads(self._store.get(key))
        return verdict

    def _is_dead(self, rank: int) -> bool:
        return self._processes[rank].is_dead(self._processes[self.rank]) or self._store.check([f"dead/{rank}"])

    def _has_left(self, rank: int) -> bool:
        return self._store.check([f"goodbye/{rank}"])

    def _name_gone(self, rank: int) -> str:
        return f"rank {rank} has closed its coordinator{self._store.get(f'goodbye/{rank}').decode()}"

    def _name_dead(self, ranks: Sequence[int]) -> str:
        return ", ".join(f"rank {rank} (pid {self._processes[rank].pid})" for rank in ranks) + " died"

    def progress_of(self, rank: int) -> int:
        return int(self._store.add(f"beat/{rank}", 0))


@contextmanager
def _store_errors(phase: str) -> Iterator[None]:
    try:
        yield
    except dist.DistError as err:
        raise RankTimeout(
            f"{phase} failed: the job's store does not answer ({str(err).splitlines()[0]}); the process that hosts it has "
            "ended or is cut off: torchrun's agent or, in a job without torchrun, rank 0"
        ) from err


class _Patience:
    """Waiting with a deadline that progress extends: short sleeps, and now and then a look at the others."""

    def __init__(self, comm: Comm, *, grace_seconds: float = 0.0) -> None:
        self._comm = comm
        self._limit = comm.timeout_seconds + grace_seconds
        self._pause = 0.0
        now = time.monotonic()
        self._started = now
        self._next_look = now + _LIVENESS_SECONDS
        self._seen: dict[int, tuple[int, float]] = {}

    def look_around(self) -> bool:
        """Sleep a little; True when it is time to ask who is alive."""
        time.sleep(self._pause)
        self._pause = min(self._pause * 1.5 + 20e-6, _MAX_POLL_SECONDS)
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._next_look = now + _LIVENESS_SECONDS
        return True

    def late(self, ranks: Sequence[int]) -> list[int]:
        """Those of `ranks` that have shown no progress for longer than the limit."""
        now = time.monotonic()
        late = []
        for rank in ranks:
            beats = self._comm.progress_of(rank)
            seen = self._seen.get(rank)
            if seen is None:
                self._seen[rank] = (beats, self._started)
            elif seen[0] != beats:
                self._seen[rank] = (beats, now)
                self._comm.beat()  # who waits for a rank that makes progress makes progress
            if now - self._seen[rank][1] > self._limit:
                late.append(rank)
        return late


def _ranks(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {describe(tuple(ranks))}"


def one_error(phase: str, failures: dict[int, dict[str, Any]]) -> CheckpointError:
    """One error for all ranks: the lowest failing rank's type, and every different message with its ranks."""
    by_message: dict[str, list[int]] = {}
    for rank, message in sorted(failures.items()):
        by_message.setdefault(message["error"]["message"], []).append(rank)
    told = "; ".join(f"on {_ranks(ranks)}: {text}" for text, ranks in list(by_message.items())[:4])
    more = f"; and {len(by_message) - 4} more" if len(by_message) > 4 else ""
    first = failures[min(failures)]["error"]
    return from_wire({**first, "message": f"{phase} failed {told}{more}"})
