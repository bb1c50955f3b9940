"""Which checkpoints are kept: pure, over what the catalog found and what was noted beside each.

    policy = Latest(3) | Best(2, "eval_loss") | Epochs() | Emergency(10)
    for verdict in decide(policy, found, protected): ...

Kept is the union: what any policy wants stays, so the best lie outside the limit of the latest. Everything is
decided anew from what is there, after each commit; nothing is remembered in between, so a resume forgets nothing.

- "Newest" is the highest sequence. Steps order nothing: after a resume from an earlier step they come again. Two
  checkpoints of one step, such as one that was renamed before the step was saved anew, count as two.
- Of equal metrics the checkpoint that was saved first ranks first: an equal one later displaces nothing.
- A metric that is missing, NaN or infinite never ranks.
- Copies of one checkpoint (the same manifest) count once.
- Never removed, whatever the policies say: the newest, the newest of those whose bytes were verified, the one resumed
  from, those in flight, pinned ones, quarantined ones (which count for no policy), and what is not ours to remove.

What a verdict keeps does not depend on what it removes. So a removal that was interrupted anywhere, and decided again,
ends in the same state.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgather_ckpt.errors import DeclarationError
from forgather_ckpt.metrics import Mode, mode_of, rankable
from forgather_ckpt.policies import Best, Emergency, Epochs, Latest, Policy, Stored, is_count, parts


@dataclass(frozen=True)
class Protected:
    """What the running job still needs: digests of manifests."""

    resumed_from: str | None = None
    in_flight: AbstractSet[str] = frozenset()
    """Being read, copied or sent at this moment."""
    verified: AbstractSet[str] = frozenset()
    """Read back, every byte, and found good: the newest of them is the one to fall back on."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of one checkpoint. `reasons` are those for keeping it, or, where it goes, those against it."""

    checkpoint: Stored
    keep: bool
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{'keep' if self.keep else 'remove'} {self.checkpoint.path.name}: {'; '.join(self.reasons)}"


def decide(policy: Policy, found: Sequence[Stored], protected: Protected = Protected()) -> list[Verdict]:
    """What becomes of each checkpoint that is there, newest first.

    >>> [str(verdict) for verdict in decide(Latest(2), [one, two, three])]
    ['keep checkpoint-3: newest; latest 1 of 2', 'keep checkpoint-2: latest 2 of 2', 'remove checkpoint-1: latest 3, 2 kept']
    """
    ordered = _newest_first(found)
    counted = countable(found)
    wanted: dict[Path, list[str]] = {one.path: [] for one in ordered}
    unwanted: dict[Path, list[str]] = {one.path: [] for one in ordered}
    for one, reason in _inviolable(ordered, counted, protected):
        wanted[one.path].append(reason)
    for opinion in policy.judge(counted):
        (wanted if opinion.keep else unwanted)[opinion.checkpoint.path].append(opinion.reason)
    counted_paths = {one.path for one in counted}
    for one in ordered:
        if one.path not in counted_paths:
            unwanted[one.path].append("a copy of another one")
    return [
        Verdict(one, bool(wanted[one.path]), _unique(wanted[one.path] or unwanted[one.path] or ["no policy keeps it"]))
        for one in ordered
    ]


def countable(found: Sequence[Stored]) -> list[Stored]:
    """What policies rank, newest first: of copies one, ours rather than a person's, and no quarantined ones, nor copies of
    those."""
    aside = {one.digest for one in found if one.is_quarantined}
    distinct: dict[str, Stored] = {}
    for one in _newest_first(found):
        if one.digest not in aside:
            distinct.setdefault(one.digest, one)
    return list(distinct.values())


def _inviolable(
    ordered: Sequence[Stored], counted: Sequence[Stored], protected: Protected
) -> Iterator[tuple[Stored, str]]:
    """What no policy may remove, with the reason."""
    for one in counted:
        if one.sequence == counted[0].sequence:
            yield one, "newest"
    if verified := next((one for one in counted if one.digest in protected.verified), None):
        yield verified, "newest verified"
    for one in ordered:
        if one.digest == protected.resumed_from:
            yield one, "resumed from"
        if one.digest in protected.in_flight:
            yield one, "in flight"
        if one.is_pinned:
            yield one, "pinned"
        if one.is_quarantined:
            yield one, "quarantined: set aside for a person to look at"
        if one.hold is not None:
            yield one, one.hold


def _newest_first(found: Sequence[Stored]) -> list[Stored]:
    return sorted(found, key=lambda one: (-one.sequence, one.hold is not None, one.path))


def _unique(reasons: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(reasons))


# ---- the best, told


def best_checkpoints_summary(best: Best, found: Sequence[Stored]) -> str:
    """The best checkpoints with their values, for the end of a training: a line each, the best first."""
    ranked = best.ranked(countable(found))[: best.n]
    if not ranked:
        return f"Best checkpoints: none; no checkpoint has a finite {best.metric!r}"
    lines = [f"  {one.path}: {best.metric}={value:.6g}" for one, value in ranked]
    return "\n".join([f"Best checkpoints (N={len(ranked)}):", *lines])


def unranked_newest(policy: Policy, found: Sequence[Stored]) -> list[str]:
    """Why the newest checkpoint is no candidate for the best, a sentence for each policy that asks for them."""
    newest = countable(found)[:1]
    return [
        f"{one.path.name} cannot be among the best: {part.why_unranked(one)}{_way_out(part, one)}"
        for part in parts(policy)
        if isinstance(part, Best)
        for one in newest
        if rankable(one.metrics.get(part.metric)) is None
    ]


def _way_out(best: Best, one: Stored) -> str:
    if best.metric in one.metrics:
        return ""
    others = f", only {', '.join(map(repr, sorted(one.metrics)))}" if one.metrics else ""
    if one.kind == "emergency":
        return f"{others}; after a signal there is no time to evaluate"
    if any(name.startswith("eval_") for name in one.metrics):
        return f"{others}; rank by one of these (best_model_metric)"
    return f"{others}; evaluate before each save (eval_on_save=True, with an eval_dataset)"


# ---- the arguments of a trainer


def from_arguments(
    *,
    save_total_limit: int | None = 10,
    preserve_best_model: bool = False,
    preserve_n_best: int = 1,
    best_model_metric: str = "loss",
    best_model_greater_is_better: bool | None = None,
    keep_epoch_checkpoints: bool | int = False,
    keep_emergency_checkpoints: int = 10,
) -> Policy:
    """The policy that a trainer's arguments mean: `save_total_limit` newest, and the rest beyond that limit.

    `save_total_limit=None` keeps all. `best_model_metric` is a metric of the evaluation: "loss" and "eval_loss" are the
    same. `keep_epoch_checkpoints`: True for all, or how many. `keep_emergency_checkpoints=0` keeps none. What makes no
    sense is a `DeclarationError` that says what to write.
    """
    if save_total_limit is not None and not (is_count(save_total_limit) and save_total_limit > 0):
        raise DeclarationError(
            f"save_total_limit is {save_total_limit!r}; use None to keep all checkpoints, or a number from 1 (the newest is "
            "never removed)"
        )
    if not isinstance(preserve_best_model, bool):
        raise DeclarationError(f"preserve_best_model is {preserve_best_model!r}; use True or False")
    if not (is_count(preserve_n_best) and preserve_n_best > 0):
        raise DeclarationError(
            f"preserve_n_best is {preserve_n_best!r}; use a number from 1, or preserve_best_model=False to keep none"
        )
    if not isinstance(keep_epoch_checkpoints, bool) and not is_count(keep_epoch_checkpoints):
        raise DeclarationError(
            f"keep_epoch_checkpoints is {keep_epoch_checkpoints!r}; use True for all, False for none, or how many"
        )
    if not is_count(keep_emergency_checkpoints):
        raise DeclarationError(f"keep_emergency_checkpoints is {keep_emergency_checkpoints!r}; use a number, from 0")
    policy: Policy = Latest(save_total_limit)
    if preserve_best_model:
        policy |= _best(preserve_n_best, best_model_metric, best_model_greater_is_better)
    if keep_epoch_checkpoints:
        policy |= Epochs(None if keep_epoch_checkpoints is True else keep_epoch_checkpoints)
    if keep_emergency_checkpoints:
        policy |= Emergency(keep_emergency_checkpoints)
    return policy


def from_training_arguments(arguments: Mapping[str, Any]) -> Policy | None:
    """The policy of a run, from the training arguments in a manifest; None where they say nothing of what to keep.

    `DeclarationError` as above.
    """
    names = inspect.signature(from_arguments).parameters
    given = {name: arguments[name] for name in names if name in arguments}
    return from_arguments(**given) if given else None


def ranking(arguments: Mapping[str, Any]) -> Best:
    """By what the checkpoints of a run are ranked, whether or not it keeps the best: from the training arguments in a manifest.

    The lowest `eval_loss`, where `best_model_metric` and `best_model_greater_is_better` say nothing else. Arguments that
    make no sense are a `DeclarationError`.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    return _best(
        given.get("preserve_n_best", 1),
        given.get("best_model_metric", "loss"),
        given.get("best_model_greater_is_better"),
    )


def _best(n: int, metric: str, greater_is_better: bool | None) -> Best:
    if not isinstance(metric, str) or not metric:
        raise DeclarationError(f"best_model_metric is {metric!r}; use the name of a metric, such as 'loss'")
    mode: Mode | None
    match greater_is_better:
        case True | False:
            mode = "max" if greater_is_better else "min"
        case None:
            mode = mode_of(metric)
        case other:
            raise DeclarationError(
                f"best_model_greater_is_better is {other!r}; use True, False, or None to ask the name"
            )
    if mode is None:
        raise DeclarationError(
            f"the name best_model_metric={metric!r} does not tell which way is better; say "
            "best_model_greater_is_better=True or best_model_greater_is_better=False"
        )
    return Best(n, metric if metric.startswith("eval_") else f"eval_{metric}", mode)


_REPLACED = {
    "load_best_model_at_end": "preserve_best_model",
    "metric_for_best_model": "best_model_metric",
    "greater_is_better": "best_model_greater_is_better",
}


def refuse_replaced(given: Mapping[str, Any]) -> None:
    """Refuse arguments of Hugging Face's trainer that have no meaning here, and show what to write instead.

    `given`: argument names and values, as they were passed.
    """
    old = {name: given[name] for name in _REPLACED if name in given}
    if not old:
        return
    asked = {name: value for name, value in old.items() if value is not None}
    if asked.get("load_best_model_at_end") is False:
        del asked["load_best_model_at_end"]
    new = {_REPLACED[name]: value for name, value in asked.items()}
    if new:
        new = {"preserve_best_model": True, **new, "eval_on_save": True}
    raise DeclarationError(
        f"{_written(old)} is not supported: the best checkpoints are kept beside the latest, and nothing is loaded behind "
        f"your back when training ends. {f'Write {_written(new)}' if new else 'Leave it out'}"
    )


def _written(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())
