"""Who is in the job and where: the first exchange, which yields a `Topology` and a `Comm`.

Node identity is torchrun's group rank, never the host name, so that two agents on one machine are two nodes;
without torchrun it is Slurm's or the MPI launcher's node number, then the machine's boot id.
"""

import itertools
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeAlias

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from forgather_ckpt.comm import GRACE_SECONDS, Comm, one_error
from forgather_ckpt.errors import CheckpointError, DeclarationError, RankFailed, RankTimeout, from_wire
from forgather_ckpt.liveness import ProcessId
from forgather_ckpt.replication import describe
from forgather_ckpt.topology import Group, Ranks, Topology

ProcessGroups: TypeAlias = "DeviceMesh | Mapping[str, dist.ProcessGroup | DeviceMesh | None] | None"
"""`{name: group}`, a named `DeviceMesh`, or both: a mesh may be a value of the mapping, under any key.

A mesh of one axis, such as the slice `mesh["dp"]`, is a group of that key and of the axis' name.
"""

_NODE_SOURCES = (
    ("GROUP_RANK", "torchrun group rank"),
    ("SLURM_NODEID", "slurm node id"),
    ("PALS_NODEID", "mpi node number"),
)
_POLL_SECONDS = 0.005
_connections = itertools.count()


def connect(prepare: Callable[[], ProcessGroups], *, timeout_seconds: float) -> tuple[Comm, Topology]:
    """Join the ranks of the job. Every rank calls it, as often as the others and in the same order.

    `prepare` is local work whose failure all ranks shall hear of; it returns the process groups. Which ranks exist
    comes from the default process group where there is one, else from RANK and WORLD_SIZE; a process that is alone
    needs neither.
    """
    store, rank, world_size = _job_store(timeout_seconds)
    hello: dict[str, Any] = {"token": secrets.token_hex(8)}
    cause: BaseException | None = None
    try:
        hello |= {"process": ProcessId.own().to_json(), **_local_facts(prepare())}
    except Exception as err:
        cause = err
        known = err if isinstance(err, CheckpointError) else RankFailed(f"{type(err).__name__}: {err}")
        hello["error"] = known.at(rank=rank).to_wire()
    store = dist.PrefixStore(f"forgather_ckpt/{next(_connections)}", store)
    meeting = _Meeting(store, rank, world_size, timeout_seconds)
    nonce, hellos = meeting.host(hello) if rank == 0 else meeting.attend(hello)
    try:
        failures = {rank: hello for rank, hello in enumerate(hellos) if "error" in hello}
        if failures:
            raise one_error("connecting", failures)
        topology = assemble(hellos, rank)
    except CheckpointError as err:
        raise err from cause
    processes = [ProcessId.from_json(hello["process"]) for hello in hellos]
    return Comm(dist.PrefixStore(nonce, store), rank, processes, timeout_seconds=timeout_seconds), topology


def assemble(hellos: Sequence[Mapping[str, Any]], rank: int) -> Topology:
    """The topology from what every rank said of itself: pure, the same on all ranks."""
    sources = [next(iter(hello["node"].items())) for hello in hellos]
    kinds = {source for source, _ in sources}
    if len(kinds) > 1:
        raise DeclarationError(f"the ranks name their nodes in different ways: {sorted(kinds)}")
    nodes: dict[Any, list[int]] = {}
    for number, (_, node) in enumerate(sources):
        nodes.setdefault(node, []).append(number)
    ordered = nodes.values() if kinds == {"boot id"} else [nodes[node] for node in sorted(nodes)]
    return Topology(
        rank=rank,
        world_size=len(hellos),
        nodes=tuple(tuple(ranks) for ranks in ordered),
        node_source=kinds.pop(),
        groups=_groups(hellos),
    )


def _groups(hellos: Sequence[Mapping[str, Any]]) -> dict[str, Group]:
    bare, meshes = _bare_groups(hellos), _mesh_groups(hellos)
    for name in sorted(bare.keys() & meshes.keys()):
        given, expected = (set(map(frozenset, groups[name].sets)) for groups in (bare, meshes))
        if not given <= expected:
            raise DeclarationError(
                f"{name!r} is the axis of a mesh, with the groups {sorted(map(sorted, expected))}, and was also given as "
                f"{sorted(map(sorted, given))}; name them differently"
            )
    return {**bare, **meshes}


def _bare_groups(hellos: Sequence[Mapping[str, Any]]) -> dict[str, Group]:
    groups: dict[str, Group] = {}
    lines = [hello.get("lines", {}) for hello in hellos]
    required = {name for hello in hellos for name in hello["groups"]}
    for name in sorted(required.union(*lines)):
        sets: dict[Ranks, None] = {}
        for number, hello in enumerate(hellos):
            if name in required and name not in hello["groups"] and name not in lines[number]:
                raise DeclarationError(
                    f"rank {number} gives no process group {name!r}, other ranks do; every rank returns every name, "
                    "with None where it is not a member",
                    rank=number,
                )
            if (members := hello["groups"].get(name, lines[number].get(name))) is not None:
                sets[tuple(members)] = None
        members = [rank for ranks in sets for rank in ranks]
        if len(members) != len(set(members)):
            raise DeclarationError(
                f"the process groups {name!r} overlap: {sorted(sets)}; one name means disjoint groups"
            )
        is_one_mesh = len(sets) == 1 and all(name in own for own in lines)
        # the same mesh of one axis on all ranks is a mesh without other axes, and is found again on other ranks
        groups[name] = Group(tuple(sorted(sets)), ((),) if is_one_mesh else None)
    return groups


def _mesh_groups(hellos: Sequence[Mapping[str, Any]]) -> dict[str, Group]:
    groups: dict[str, Group] = {}
    for mesh in {json.dumps(mesh): mesh for hello in hellos for mesh in hello["meshes"]}.values():
        axes, places = mesh["axes"], {tuple(place): rank for place, rank in mesh["places"]}
        sizes = [1 + max(place[i] for place in places) for i in range(len(axes))]
        for i, axis in enumerate(axes):
            sets: dict[tuple[int, ...], list[int]] = {}
            for place in sorted(places):
                sets.setdefault(place[:i] + place[i + 1 :], []).append(places[place])
            others = [(name, size) for name, size in zip(axes, sizes, strict=True) if name != axis]
            group = Group(
                tuple(tuple(ranks) for ranks in sets.values()),
                tuple(tuple((name, at, size) for (name, size), at in zip(others, rest, strict=True)) for rest in sets),
            )
            if groups.setdefault(axis, group) != group:
                raise DeclarationError(
                    f"two meshes have an axis {axis!r} of different ranks; name the axes differently"
                )
    return groups


def _local_facts(process_groups: ProcessGroups) -> dict[str, Any]:
    groups: dict[str, Ranks | None] = {}
    lines: dict[str, Ranks] = {}
    meshes: list[dict[str, Any]] = []
    for name, group in _named(process_groups).items():
        if not isinstance(name, str) or not name:
            raise DeclarationError(f"process_groups has the name {name!r}; use non-empty strings: {{name: group}}")
        if isinstance(group, DeviceMesh) and group.ndim == 1:
            ranks = tuple(sorted(int(rank) for rank in group.mesh))
            groups[name] = ranks
            for alias in {name, *(group.mesh_dim_names or ())}:
                if lines.setdefault(alias, ranks) != ranks:
                    raise DeclarationError(
                        f"two meshes have an axis {alias!r} of different ranks; name the axes differently"
                    )
        elif isinstance(group, DeviceMesh):
            meshes.append(_mesh_facts(group, name))
        elif isinstance(group, dist.ProcessGroup):
            groups[name] = tuple(sorted(dist.get_process_group_ranks(group)))
        elif group is None or _is_non_member(group):
            groups[name] = None
        else:
            raise DeclarationError(
                f"process_groups[{name!r}] is {group!r}; use a ProcessGroup, a DeviceMesh, or None on a rank that is not a "
                "member"
            )
    for name in sorted(groups.keys() & lines.keys()):
        if (given := groups[name]) != lines[name]:
            raise DeclarationError(
                f"{name!r} is the axis of a mesh of ranks {list(lines[name])}, and was also given as "
                f"{None if given is None else list(given)}; name them differently"
            )
    return {"node": _node(), "groups": groups, "lines": lines, "meshes": meshes}


def _named(process_groups: ProcessGroups) -> Mapping[Any, Any]:
    if process_groups is None:
        return {}
    if isinstance(process_groups, DeviceMesh):
        axes = process_groups.mesh_dim_names
        return {axes[0] if axes is not None and process_groups.ndim == 1 else "mesh": process_groups}
    if not isinstance(process_groups, Mapping):
        raise DeclarationError(
            f"process_groups is a {type(process_groups).__name__}; pass {{name: group}}, or a DeviceMesh with named axes"
        )
    return process_groups


def _is_non_member(group: object) -> bool:
    sentinel: object = dist.GroupMember.NON_GROUP_MEMBER
    return type(group) is type(sentinel) and group == sentinel


def _mesh_facts(mesh: DeviceMesh, name: str) -> dict[str, Any]:
    axes = mesh.mesh_dim_names
    if axes is None:
        raise DeclarationError(f"the device mesh {name!r} has no axis names; pass mesh_dim_names=")
    places = [[list(place), int(mesh.mesh[place])] for place in itertools.product(*map(range, mesh.mesh.shape))]
    return {"axes": list(axes), "places": places}


def _node() -> dict[str, Any]:
    for variable, source in _NODE_SOURCES:
        if variable in os.environ:
            return {source: int(os.environ[variable])}
    return {"boot id": ProcessId.own().realm}


def _job_store(timeout_seconds: float) -> tuple[dist.Store, int, int]:
    """A connection of our own to the job's store, this rank, the world size."""
    if dist.is_initialized():
        store: Any = dist.distributed_c10d._get_default_store()
        return store.clone(), dist.get_rank(), dist.get_world_size()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return dist.HashStore(), 0, 1
    rank = int(os.environ["RANK"])
    store, _, _ = next(
        dist.rendezvous("env://", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_seconds))
    )
    return store, rank, world_size


class _Meeting:
    """The first exchange, in a store that may still hold an earlier generation's messages (elastic restarts).

    Every hello carries a fresh token. Rank 0 publishes the hellos it read under a fresh nonce; a rank accepts
    them only if its own token is among them, and rank 0 goes only when all have accepted. Otherwise a hello was
    stale: rank 0 sees it change and publishes anew.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout_seconds: float) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._timeout_seconds = timeout_seconds
        self._deadline = time.monotonic() + timeout_seconds

    def host(self, hello: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
        try:
            return self._welcome(hello)
        except RankTimeout as err:
            tokens = [json.loads(self._store.get(f"hello/{rank}"))["token"] for rank in self._others_here()]
            self._store.set("given up", json.dumps({"error": err.to_wire(), "tokens": tokens}))
            raise

    def _others_here(self) -> list[int]:
        return [rank for rank in range(1, self._world_size) if self._store.check([f"hello/{rank}"])]

    def _welcome(self, hello: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
        others = range(1, self._world_size)
        self._wait(lambda: sorted(set(others) - set(self._others_here())))
        while True:
            nonce = secrets.token_hex(8)
            hellos = [hello] + [json.loads(self._store.get(f"hello/{rank}")) for rank in others]
            self._store.set("welcome", json.dumps({"nonce": nonce, "hellos": hellos}))
            if self._all_accept(nonce, hellos):
                self._store.set(f"go/{nonce}", "1")
                return nonce, hellos

    def _all_accept(self, nonce: str, hellos: list[dict[str, Any]]) -> bool:
        def missing() -> list[int]:
            return [rank for rank in range(1, self._world_size) if not self._store.check([f"accept/{nonce}/{rank}"])]

        def is_stale(rank: int) -> bool:
            return bool(json.loads(self._store.get(f"hello/{rank}"))["token"] != hellos[rank]["token"])

        stale: list[int] = []

        def waited_for() -> list[int]:
            pending = missing()
            stale.extend(rank for rank in pending if is_stale(rank))
            return [] if stale else pending

        self._wait(waited_for)
        return not stale

    def attend(self, hello: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
        self._store.set(f"hello/{self._rank}", json.dumps(hello))
        accepted: dict[str, Any] = {}
        self._deadline += GRACE_SECONDS  # rank 0, which knows who is missing, speaks first

        def waited_for() -> list[int]:
            if self._store.check(["given up"]):
                given_up = json.loads(self._store.get("given up"))
                if hello["token"] in given_up["tokens"]:
                    raise from_wire(given_up["error"])
            if self._store.check(["welcome"]):
                welcome = json.loads(self._store.get("welcome"))
                if any(other["token"] == hello["token"] for other in welcome["hellos"]):
                    accepted.update(welcome)
                    self._store.set(f"accept/{welcome['nonce']}/{self._rank}", "1")
            return [] if accepted and self._store.check([f"go/{accepted['nonce']}"]) else [0]

        self._wait(waited_for)
        return accepted["nonce"], accepted["hellos"]

    def _wait(self, waited_for: Callable[[], list[int]]) -> None:
        while pending := waited_for():
            if time.monotonic() > self._deadline:
                raise RankTimeout(
                    f"connecting failed: no answer from ranks {describe(tuple(pending))} within "
                    f"{self._timeout_seconds:g} s; every rank must make its coordinator",
                    rank=pending[0],
                )
            time.sleep(_POLL_SECONDS)
