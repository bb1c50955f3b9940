"""From copies that differ to what people need to know: which items, on which ranks, and how far apart.

One rank speaks for all that have equal copies, so what is exchanged grows with the number of different states, not
with the number of ranks; of more than `MAX_STATES`, the others are named but not looked into.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch

from forgather_ckpt import elements, hashtree, memory, names
from forgather_ckpt.bytewise import HOST, Suspects
from forgather_ckpt.differences import Copy, ElementDifference, ItemDifference, SetDifference
from forgather_ckpt.digests import Blocks
from forgather_ckpt.errors import CheckpointError
from forgather_ckpt.hashtree import DIGEST_BYTES, block_bounds
from forgather_ckpt.holdings import Holding
from forgather_ckpt.job import Job
from forgather_ckpt.portions import Portion
from forgather_ckpt.replication import Verdict, vote
from forgather_ckpt.topology import Ranks

logger = logging.getLogger(__name__)

MAX_STATES = 16
MAX_ITEMS = 1000
"""So many items of a portion are named."""
MAX_MEASURED = 256
"""Of so many tensors of a portion the elements are compared."""
_MAX_SHOWN_CHARS = 200

Record = tuple[str, bytes, bytes]
"""Name, structure and digest of an item, as `hashtree.state_digest` takes it."""


class _Item(TypedDict):
    """What the ranks agree on about an item whose copies differ."""

    name: str
    kind: str
    dtype: str | None
    shape: list[int] | None
    box: list[list[int]] | None
    """Of a part of a tensor: where it lies in it."""
    classes: list[list[int]]
    """The ranks with equal copies of this item; first the majority."""
    shown: list[str | None]
    """The value that each class has."""
    blocks: list[int]
    """Of a tensor that is to be measured: the blocks in which some class differs from the majority."""
    is_suspect: bool
    """Digests are equal; bytes in its neighbourhood were not."""


@dataclass(frozen=True)
class Evidence:
    """What this rank knows of its copies of the portions that differ, by portion number."""

    held: Mapping[int, Holding]
    leaves: Mapping[int, Sequence[Record]]
    blocks: Mapping[int, Blocks]
    suspects: Suspects


def locate(
    job: Job, portions: Sequence[Portion], differing: Mapping[int, Verdict], evidence: Evidence
) -> dict[int, SetDifference]:
    """What differs in the portions of `differing`, by number; the same on every rank.

    Three exchanges: which items, what they are, how far apart.
    """
    held, leaves, suspects = evidence.held, evidence.leaves, evidence.suspects
    speaking = {number: _speakers(verdict) for number, verdict in differing.items()}
    own = [number for number, ranks in speaking.items() if job.comm.rank in ranks]
    keys = {number: sorted(key for key, _, _ in leaves[number]) for number in own}

    def tell_leaves() -> dict[str, Any]:
        job.comm.beat()
        return {str(number): _leaf_column(leaves[number], suspects.get(number, {})) for number in own}

    places = job.comm.agree(
        "finding the items that differ", tell_leaves, lambda reports: _differing_places(differing, speaking, reports)
    )

    def tell_items() -> dict[str, Any]:
        return {
            str(number): [
                _description(held[number], name, evidence.blocks[number], suspects.get(number, {}))
                for name in (keys[number][place] for place, _ in places[str(number)]["items"])
            ]
            for number in own
        }

    items: dict[str, list[_Item]] = job.comm.agree(
        "describing the items that differ", tell_items, lambda reports: _items(differing, speaking, places, reports)
    )
    measured = _measure(job, held, speaking, items)
    return {
        number: _difference(
            portions[number], verdict, places[str(number)]["count"], items[str(number)], measured[number]
        )
        for number, verdict in differing.items()
    }


def _speakers(verdict: Verdict) -> Ranks:
    """The rank that speaks for each of the first classes."""
    return tuple(ranks[0] for ranks in verdict.classes[:MAX_STATES])


def _leaf_column(leaves: Iterable[Record], suspects: Mapping[str, Sequence[int]]) -> list[Any]:
    """The digests of all items in the order of their names, and the places of those that only their bytes told apart."""
    ordered = sorted(leaves)
    column = b"".join(digest for _, _, digest in ordered).hex()
    return [column, [place for place, (name, _, _) in enumerate(ordered) if name in suspects]]


def _differing_places(
    differing: Mapping[int, Verdict], speaking: Mapping[int, Ranks], reports: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """By portion: how many items differ, and of the first ones the place among all names and what each speaker has,
    as a number that is equal where the copies are."""
    told: dict[str, Any] = {}
    width = 2 * DIGEST_BYTES
    for number in differing:
        columns = [reports[rank][str(number)] for rank in speaking[number]]
        found = []
        for place in range(len(columns[0][0]) // width):
            at = place * width
            copies = [
                (column[at : at + width], speaker if place in odd else -1)
                for speaker, (column, odd) in enumerate(columns)
            ]
            if len(set(copies)) > 1:
                found.append([place, [copies.index(copy) for copy in copies]])
        told[str(number)] = {"count": len(found), "items": found[:MAX_ITEMS]}
    return told


def _description(holding: Holding, name: str, blocks: Blocks, suspects: Mapping[str, Sequence[int]]) -> list[Any]:
    """Of a tensor: dtype, shape, block digests, the blocks that only their bytes told apart, and where a part lies."""
    if name in holding.tensors:
        item = holding.tensors[name]
        digests = b"".join(blocks[name]).hex()
        return [name, "tensor", item.dtype, item.shape, digests, list(suspects.get(name, ())), item.box]
    if name in holding.values:
        return [name, "value", _shortened(holding.values[name].data.decode())]
    return [name, "alias", _shortened(holding.aliases[name].target)]


def _shortened(text: str) -> str:
    """Texts that differ still do."""
    if len(text) <= _MAX_SHOWN_CHARS:
        return text
    return (
        f"{text[: _MAX_SHOWN_CHARS - 1]}… ({len(text)} characters, digest {hashtree.digest(text.encode()).hex()[:8]})"
    )


def _items(
    differing: Mapping[int, Verdict],
    speaking: Mapping[int, Ranks],
    places: Mapping[str, Any],
    reports: Sequence[Mapping[str, Any]],
) -> dict[str, list[_Item]]:
    told: dict[str, list[_Item]] = {}
    for number, verdict in differing.items():
        columns = [reports[rank][str(number)] for rank in speaking[number]]
        told[str(number)] = items = []
        num_measured = 0
        for row, (_, states) in enumerate(places[str(number)]["items"]):
            # a state is told by the number of the first speaker that has it
            state_of = {rank: state for ranks, state in zip(verdict.classes, states, strict=False) for rank in ranks}
            classes = vote(state_of).classes
            described = [columns[state_of[ranks[0]]][row] for ranks in classes]
            name, kind, *facts = described[0]
            items.append(
                _Item(
                    name=name,
                    kind=kind,
                    dtype=None,
                    shape=None,
                    box=None,
                    classes=[],
                    shown=[],
                    blocks=[],
                    is_suspect=False,
                )
            )
            items[-1]["classes"] = [list(ranks) for ranks in classes]
            if kind == "tensor":
                items[-1]["dtype"], items[-1]["shape"], items[-1]["box"] = facts[0], facts[1], facts[4]
                items[-1]["shown"] = [None] * len(classes)
                items[-1]["is_suspect"] = len({one[4] for one in described}) == 1
                num_measured += 1
                if num_measured <= MAX_MEASURED:
                    items[-1]["blocks"] = _differing_blocks(described)
            else:
                items[-1]["shown"] = [one[2] for one in described]
    return told


def _differing_blocks(described: Sequence[Sequence[Any]]) -> list[int]:
    width = 2 * DIGEST_BYTES
    columns = [one[4] for one in described]
    found = {block for one in described for block in one[5]}
    for block in range(len(columns[0]) // width):
        if len({column[block * width : (block + 1) * width] for column in columns}) > 1:
            found.add(block)
    return sorted(found)


Measured = dict[tuple[int, int], ElementDifference]
"""(item, class) -> how far it is from the majority."""


def _measure(
    job: Job, held: Mapping[int, Holding], speaking: Mapping[int, Ranks], items: Mapping[str, Sequence[_Item]]
) -> dict[int, Measured]:
    """Compare the elements of tensors that differ, by portion; empty where the bytes could not be sent."""

    def work() -> dict[str, list[Any]]:
        return {
            str(number): _measure_portion(job, held[number], ranks, items[str(number)])
            for number, ranks in sorted(speaking.items())
            if job.comm.rank in ranks and any(item["blocks"] for item in items[str(number)])
        }

    def decide(reports: Sequence[Mapping[str, list[Any]]]) -> dict[str, list[Any]]:
        return {str(number): [row for one in reports for row in one.get(str(number), ())] for number in speaking}

    try:
        with job.channels.guard():
            told = job.comm.agree("measuring the differences", work, decide)
    except CheckpointError as err:
        # that copies differ is known, and shall be told whatever happened to the figures
        logger.warning("the differences could not be measured: %s", err.message)
        told = {}
    return {
        number: {
            (place, state): ElementDifference.from_json(figures) for place, state, figures in told.get(str(number), ())
        }
        for number in speaking
    }


def _measure_portion(job: Job, holding: Holding, ranks: Ranks, items: Sequence[_Item]) -> list[Any]:
    """`[item, class, figures]` of the items in which this rank speaks for a class that is not the majority."""
    channel = job.channels.among(ranks, HOST)
    rows = []
    for place, item in enumerate(items):
        if not item["blocks"]:
            continue
        tensor = holding.tensors[item["name"]].tensor
        speakers = [next(rank for rank in ranks if rank in some) for some in item["classes"]]
        own = next(state for state, some in enumerate(item["classes"]) if job.comm.rank in some)
        is_measured = own > 0 and speakers[own] == job.comm.rank
        total = ElementDifference(0)
        for block, (start, stop) in enumerate(block_bounds(tensor.numel() * tensor.element_size())):
            if block not in item["blocks"] and not is_measured:
                continue
            mine = memory.byte_range(tensor, start, stop).to(HOST)
            other = mine  # where the digests agree, so do the bytes
            if block in item["blocks"]:
                other = mine if speakers[0] == job.comm.rank else torch.empty_like(mine)
                channel.finish(channel.broadcast(other, speakers[0]))
            if is_measured:
                first = start // tensor.element_size()
                measured = elements.measure(other, mine, str(item["dtype"]), tensor.shape, first)
                total = total.merge(measured)
        if is_measured:
            total = total.moved([start for start, _ in item["box"] or ()])
            rows.append([place, own, total.to_json()])
    return rows


def _difference(
    portion: Portion, verdict: Verdict, num_items: int, items: Sequence[_Item], measured: Measured
) -> SetDifference:
    told = [_item_difference(place, item, measured) for place, item in enumerate(items)]
    # where bytes were compared in large slots, small tensors beside one that differs have come under suspicion too
    cleared = [_cleared(one) if item["is_suspect"] else one for one, item in zip(told, items, strict=True)]
    guilty = [one for one in cleared if one.minorities] or told
    return SetDifference(
        entry=portion.entry,
        holders=portion.holders,
        majority=verdict.majority,
        minority=verdict.minority,
        items=tuple(guilty),
        num_items_not_shown=num_items - len(told),
        num_not_measured=sum(
            item.kind == "tensor" and any(copy.elements is None for copy in item.minorities) for item in guilty
        ),
        num_sets=portion.num_sets,
    )


def _item_difference(place: int, item: _Item, measured: Measured) -> ItemDifference:
    return ItemDifference(
        names.item_name(item["name"]),
        item["kind"],
        item["dtype"],
        None if item["shape"] is None else tuple(item["shape"]),
        tuple(item["classes"][0]),
        tuple(
            Copy(tuple(ranks), measured.get((place, state)), item["shown"][state])
            for state, ranks in enumerate(item["classes"])
            if state > 0
        ),
        item["shown"][0],
        None if item["box"] is None else tuple((start, stop) for start, stop in item["box"]),
    )


def _cleared(item: ItemDifference) -> ItemDifference:
    """Without the copies in which no element was found to differ: those are the majority's too."""
    equal = [copy for copy in item.minorities if copy.elements is not None and not copy.elements.num_different]
    return replace(
        item,
        majority=tuple(sorted([*item.majority, *(rank for copy in equal for rank in copy.ranks)])),
        minorities=tuple(copy for copy in item.minorities if copy not in equal),
    )
