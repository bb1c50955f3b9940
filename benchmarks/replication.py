"""What the replication check costs, side by side with a reduction, `torch.hash_tensor`, a broadcast, and hashing on the host.

    torchrun --standalone --nproc-per-node 2 benchmarks/replication.py --mib 4096 --tensors 200
    torchrun --standalone --nproc-per-node 2 benchmarks/replication.py --mib 1024 --tensors 20000

The state is replicated on all ranks, on GPUs where there are any. All arms run in every round, in a new order each time;
printed are medians over the rounds as ratios to the arm named in each row: of the whole call as its caller waits for it,
and, on a GPU, of the time that the device is busy with it (from torch's profiler, in rounds of its own). Absolute times only
on a GPU.

With `--one-gpu` all ranks share a GPU that only rank 0 reads: the others give the digests that they took once, as ranks
with GPUs of their own would at the same time. There is no broadcast then; `compare, no transfer` is FULL's comparison of
the bytes, with a copy on the device in the place of each broadcast.

`digests` is what QUICK and TENSOR do with the bytes; the rest of a check is Python over the items and the exchange.
"""

import argparse
import atexit
import hashlib
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from xxhash import xxh3_128

from forgather_ckpt import CheckpointCoordinator, SharingPattern, StateComponent, bulk, bytewise, digests
from forgather_ckpt.digests import Blocks
from forgather_ckpt.structure import TensorItem, capture

Arms = dict[str, Callable[[], object]]

COMPARED_WITH = {
    "digests": ("reduction", "xxh3"),
    "check, quick": ("reduction", "xxh3"),
    "check, tensor": ("reduction", "xxh3"),
    "check, full": ("broadcast", "broadcast"),
    "compare, no transfer": ("copy", "copy"),
    "reduction per tensor": ("reduction", "xxh3"),
    "torch.hash_tensor": ("reduction", "xxh3"),
    "copy to the host, xxh3": ("reduction", "xxh3"),
    "copy to the host, SHA-1": ("reduction", "xxh3"),
    "xxh3": ("reduction", "xxh3"),
    "SHA-1": ("reduction", "xxh3"),
    "reduction": ("reduction", "xxh3"),
    "broadcast": ("reduction", "xxh3"),
    "copy": ("reduction", "xxh3"),
}
"""Arm -> what its ratio is to, on a GPU and on a CPU."""


class Holder:
    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        raise AssertionError("a check loads nothing")


class Loopback:
    """In the place of a `bulk.Channel`: a broadcast is a copy, on the device, of this rank's own bytes."""

    def __init__(self, flat: torch.Tensor) -> None:
        self.ranks = (1, 0)
        self._bytes = flat.view(torch.uint8)
        self._sent = 0

    def broadcast(self, data: torch.Tensor, source: int) -> None:
        data.copy_(self._bytes[self._sent : self._sent + len(data)])
        self._sent += len(data)

    def finish(self, work: None) -> None:
        pass

    def settle(self) -> None:
        torch.cuda.synchronize()


def begin_once() -> Callable[..., Callable[[], Blocks]]:
    """`digests.begin` that reads the tensors of each set of keys only the first time."""
    begin, known = digests.begin, dict[tuple[str, ...], Blocks]()

    def begun(items: Iterable[TensorItem], *args: Any, **options: Any) -> Callable[[], Blocks]:
        own = list(items)
        keys = tuple(item.key for item in own)
        if keys not in known:
            known[keys] = begin(own, *args, **options)()
        return lambda: known[keys]

    return begun


def arms(flat: torch.Tensor, tensors: list[torch.Tensor], directory: Path, args: argparse.Namespace) -> Arms:
    state = {f"layers.{number}.weight": tensor for number, tensor in enumerate(tensors)}
    items = list(capture(state).tensors.values())
    coordinator = CheckpointCoordinator([StateComponent("model", Holder(state), SharingPattern.REPLICATED)], directory)
    atexit.register(coordinator.close)

    def check(level: str) -> Callable[[], object]:
        def run() -> None:
            [report] = coordinator.validate_replication(level).values()
            assert report.is_equal

        return run

    def host(hasher: Callable[[memoryview], object]) -> Callable[[], object]:
        return lambda: [hasher(tensor.cpu().numpy().data.cast("B")) for tensor in tensors]

    found: Arms = {
        "reduction": lambda: flat.sum().item(),
        "reduction per tensor": lambda: torch.stack([tensor.sum() for tensor in tensors]).cpu(),
        "digests": lambda: digests.block_digests(items),
        "check, quick": check("quick"),
        "check, tensor": check("tensor"),
    }
    if args.one_gpu:
        copy = torch.empty_like(flat)

        def compare() -> None:
            found = bytewise._differing_segments(cast(bulk.Channel, Loopback(flat)), items, flat.device, 0)
            assert not list(found)

        found["compare, no transfer"], found["copy"] = compare, lambda: copy.copy_(flat)
        if dist.get_rank() != 0:
            digests.begin = begin_once()
            return {name: arm if name.startswith("check") else lambda: None for name, arm in found.items()}
    else:
        found["check, full"] = check("full")
        found["broadcast"] = lambda: dist.broadcast(flat, 0)
    if hasattr(torch, "hash_tensor") and not args.one_gpu:
        words = [tensor.view(torch.int32) for tensor in tensors]
        found["torch.hash_tensor"] = lambda: torch.stack([torch.hash_tensor(one) for one in words]).cpu()
    if flat.device.type == "cpu":
        found["xxh3"] = lambda: xxh3_128(flat.numpy().data.cast("B")).digest()
        found["SHA-1"] = lambda: hashlib.sha1(flat.numpy().data.cast("B")).digest()
    elif not (args.skip_host or args.one_gpu):
        found["copy to the host, xxh3"] = host(lambda data: xxh3_128(data).digest())
        found["copy to the host, SHA-1"] = host(lambda data: hashlib.sha1(data).digest())
    return found


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def busy_seconds_of(action: Callable[[], object]) -> float:
    """How long the device computes or copies, kernels that overlap counted twice."""
    dist.barrier()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        action()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=4096)
    parser.add_argument("--tensors", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skip-host", action="store_true", help="leave out the arms that hash on the host")
    parser.add_argument("--one-gpu", action="store_true", help="all ranks share one GPU, which only rank 0 reads")
    args = parser.parse_args()
    torch.set_num_threads(1)
    number = 0 if args.one_gpu else int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", number) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cuda:nccl,cpu:gloo" if device.type == "cuda" and not args.one_gpu else "gloo")
    torch.manual_seed(0)
    count = args.mib * 2**20 // 4 // args.tensors // 4 * 4  # whole vectors of 16 bytes, as allocators give them
    flat = torch.randn(count * args.tensors, device=device)
    walls: dict[str, list[float]] = {}
    busy: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        contenders = arms(flat, list(flat.split(count)), Path(directory), args)
        order = random.Random(0)
        for round_number in range(args.rounds + 1):
            names = list(contenders)
            order.shuffle(names)
            for name in names:
                spent = seconds_of(contenders[name], device)
                if round_number:  # the first round warms up
                    walls.setdefault(name, []).append(spent)
        if device.type == "cuda":
            for name in [name for name in contenders if not name.startswith("copy to")] * 3:
                busy.setdefault(name, []).append(busy_seconds_of(contenders[name]))
    if dist.get_rank() == 0:
        report(
            args, device, *({name: statistics.median(all_) for name, all_ in some.items()} for some in (walls, busy))
        )
    dist.destroy_process_group()


def report(args: argparse.Namespace, device: torch.device, walls: dict[str, float], busy: dict[str, float]) -> None:
    is_gpu = device.type == "cuda"
    machine = torch.cuda.get_device_name() if is_gpu else f"{os.cpu_count()} CPU cores"
    print(
        f"{dist.get_world_size()} ranks, {machine}, torch {torch.__version__}, {args.mib} MiB in {args.tensors} tensors, "
        f"medians of {args.rounds} rounds"
    )
    for name, pair in COMPARED_WITH.items():
        if name not in walls:
            continue
        base = pair[0] if is_gpu else pair[1]
        line = f"{name:24} {walls[name] / walls[base]:8.2f} x {base:10}"
        if name in busy:
            line += f" {busy[name] / busy[base]:8.2f} x on the device, {1e3 * busy[name]:9.3f} ms"
        if is_gpu:
            line += f"   {1e3 * walls[name]:9.2f} ms in all"
        print(line)


if __name__ == "__main__":
    main()
