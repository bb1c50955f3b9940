"""Where a job is in its data: one position for the whole job, from which each rank computes its share."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from forgather_ckpt.errors import LoadMismatch
from forgather_ckpt.topology import Topology


@dataclass(frozen=True)
class GlobalPosition:
    """A place in the job's sequence of samples.

    `seed`, `num_samples` and `shuffle` name the sequence, `epoch` and `samples` the place in it. World size
    and batch size are no part of it: they say how the sequence is shared out from here on, and may change.
    """

    num_samples: int
    seed: int = 0
    shuffle: bool = True
    epoch: int = 0
    samples: int = 0
    """Samples of this epoch that all ranks together have consumed: the trainer took them, in batches."""
    total_samples: int = 0
    """The same over all epochs."""

    def __post_init__(self) -> None:
        if not 0 <= self.samples <= self.num_samples or self.epoch < 0:
            raise LoadMismatch(
                f"there is no epoch {self.epoch}, sample {self.samples} in a dataset of {self.num_samples} samples"
            )

    def advanced_by(self, num_samples: int) -> Self:
        return replace(self, samples=self.samples + num_samples, total_samples=self.total_samples + num_samples)

    def next_epoch(self) -> Self:
        return replace(self, epoch=self.epoch + 1, samples=0)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        return cls(
            num_samples=int(state["num_samples"]),
            seed=int(state["seed"]),
            shuffle=bool(state["shuffle"]),
            epoch=int(state["epoch"]),
            samples=int(state["samples"]),
            total_samples=int(state["total_samples"]),
        )

    def resumed_from(self, state: Mapping[str, Any]) -> Self:
        """The saved position, if it lies in this sequence. The saved seed is kept: the order hangs on it."""
        try:
            saved = self.from_state_dict(state)
        except KeyError as err:
            raise LoadMismatch(f"this is no saved data position: {err} is missing; it has {sorted(state)}") from err
        if saved.num_samples != self.num_samples:
            raise LoadMismatch(
                f"the checkpoint's dataset had {saved.num_samples} samples, this one has {self.num_samples}, "
                "so the order of the samples would be another one. Resume with the dataset that the run began with, "
                "or load without the dataset component"
            )
        if saved.shuffle != self.shuffle:
            raise LoadMismatch(
                f"the checkpoint was made with shuffle={saved.shuffle}, this job has shuffle={self.shuffle}, "
                "so samples would be repeated and left out. Use the setting that the run began with"
            )
        return saved


def merge_positions(saved: Sequence[Mapping[str, Any]], old: Topology, new: Topology) -> dict[str, Any]:
    """The `on_resize` rule of a dataset: go on with the next sample at another world size, and when one rank reads for
    all that read for themselves before, or the other way round.

    Every rank saved the same global position, so any of them will do; that they agree is checked.
    """
    if not saved:
        raise LoadMismatch("the checkpoint has no data position to go on from")
    for member, state in enumerate(saved):
        if dict(state) != dict(saved[0]):
            raise LoadMismatch(
                f"ranks were at different places in the data: entry 0 of {len(saved)} says {dict(saved[0])}, "
                f"entry {member} says {dict(state)}. One global position is needed to go from "
                f"{old.world_size} to {new.world_size} ranks"
            )
    return dict(saved[0])
