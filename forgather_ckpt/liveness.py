"""Is a process still alive? Asked of the kernel, so a stopped or busy process is never taken for a dead one.

Only processes of the same boot and the same pid namespace can be asked about; of others nothing is known.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class ProcessId:
    """A process, told apart from a later one that got the same pid by its start time."""

    realm: str
    """Boot id and pid namespace: pids mean something only inside one realm. Empty where the system tells neither."""
    pid: int
    started: str

    @classmethod
    def own(cls) -> Self:
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            namespace = Path("/proc/self/ns/pid").stat().st_ino
            return cls(f"{boot}:{namespace}", os.getpid(), _stat(os.getpid())[1])
        except OSError:
            return cls("", os.getpid(), "")

    @classmethod
    def from_json(cls, data: list[Any]) -> Self:
        return cls(*data)

    def to_json(self) -> list[Any]:
        return [self.realm, self.pid, self.started]

    def is_dead(self, observer: Self) -> bool:
        """Whether `observer` can tell for sure that this process is gone (a zombie is)."""
        if not self.realm or self.realm != observer.realm:
            return False
        try:
            state, started = _stat(self.pid)
        except OSError:
            return True
        return started != self.started or state in "ZX"


def _stat(pid: int) -> tuple[str, str]:
    """State and start time of a process, from the fields behind its (arbitrary) name."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]
