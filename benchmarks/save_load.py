"""Save and load side by side: this package, torch.save, stock DCP, safetensors, and a raw write of the same bytes.

    torchrun --standalone --nproc-per-node 2 benchmarks/save_load.py --mib 1024 --tensors 64 --dir /data/scratch
    torchrun --standalone --nproc-per-node 2 benchmarks/save_load.py --mib 10 --tensors 10000

The state is replicated on all ranks (data parallel), and every rank loads all of it. All arms run in every round,
in a new order each time; every save goes to new files and ends with an fsync, loads are from the page cache. Printed
are medians over the rounds as ratios: to a raw write (or read into place) of the same bytes by one process, and to
stock DCP; absolute times only on a GPU. What each arm gives is not the same: ours compares the copies, verifies every
block on load, and commits atomically; the others do none of that.
"""

import argparse
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from forgather_ckpt import CheckpointCoordinator, SharingPattern, StateComponent

State = dict[str, torch.Tensor]


class Holder:
    def __init__(self, state: State) -> None:
        self.state = state

    def state_dict(self) -> State:
        return self.state

    def load_state_dict(self, state: State) -> None:
        pass  # filled in place


def make_state(num_tensors: int, mib: float, device: torch.device) -> State:
    torch.manual_seed(0)
    count = max(1, int(mib * 2**20 / 4 / num_tensors))
    return {f"layers.{number}.weight": torch.randn(count).to(device) for number in range(num_tensors)}


def synced(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.close(descriptor)


def on_rank_0(action: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        if dist.get_rank() == 0:
            action()
        dist.barrier()

    return run


def arms(
    state: State, device: torch.device, directory: Path
) -> dict[str, tuple[Callable[[], None], Callable[[], None]]]:
    """Arm -> (save, load); each leaves its files under a name of its own."""
    host_bytes = [tensor.cpu().numpy().data.cast("B") for tensor in state.values()]

    def raw_save() -> None:
        with (directory / "raw").open("wb", buffering=0) as file:
            for data in host_bytes:
                file.write(data)
            os.fsync(file.fileno())

    def raw_load() -> None:
        with (directory / "raw").open("rb", buffering=0) as file:
            for tensor in state.values():
                if tensor.device.type == "cpu":
                    file.readinto(tensor.numpy().data.cast("B"))  # type: ignore[attr-defined]
                else:
                    tensor.copy_(torch.frombuffer(bytearray(file.read(tensor.nbytes)), dtype=tensor.dtype))

    def torch_save() -> None:
        torch.save(state, directory / "state.pt")
        synced(directory / "state.pt")

    def torch_load() -> None:
        loaded = torch.load(directory / "state.pt", map_location=device, weights_only=True)
        for name, tensor in state.items():
            tensor.copy_(loaded[name])

    def safetensors_save() -> None:
        safetensors.torch.save_file(state, directory / "state.safetensors")
        synced(directory / "state.safetensors")

    def safetensors_load() -> None:
        loaded = safetensors.torch.load_file(directory / "state.safetensors", device=str(device))
        for name, tensor in state.items():
            tensor.copy_(loaded[name])

    def dcp_save(threads: int) -> Callable[[], None]:
        def save() -> None:
            writer = dcp.FileSystemWriter(directory / f"dcp{threads}", thread_count=threads, sync_files=True)
            dcp.save(state, storage_writer=writer)

        return save

    def dcp_load(threads: int) -> Callable[[], None]:
        return lambda: dcp.load(state, checkpoint_id=directory / f"dcp{threads}")

    def ours(level: str) -> tuple[Callable[[], None], Callable[[], None]]:
        component = StateComponent("model", Holder(state), SharingPattern.REPLICATED, validation_level=level)
        coordinator = CheckpointCoordinator([component], directory / f"ours-{level}")
        return lambda: coordinator.save_checkpoint(1) and None, lambda: coordinator.load_checkpoint() and None

    return {
        "raw": (on_rank_0(raw_save), raw_load),
        "torch.save": (on_rank_0(torch_save), torch_load),
        "safetensors": (on_rank_0(safetensors_save), safetensors_load),
        "dcp": (dcp_save(1), dcp_load(1)),
        "dcp, 2 threads": (dcp_save(2), dcp_load(2)),
        "ours, quick": ours("quick"),
        "ours, none": ours("none"),
    }


def remove_contents(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def timed(action: Callable[[], None], device: torch.device) -> float:
    dist.barrier()
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - started


def join_job(scratch: str | None) -> tuple[torch.device, Path]:
    """This rank's device, and a directory that all ranks use."""
    torch.set_num_threads(1)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo")
    shared = [tempfile.mkdtemp(dir=scratch) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)
    return device, Path(str(shared[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, default=1024)
    parser.add_argument("--tensors", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", default=None, help="scratch space (default: the temporary directory)")
    args = parser.parse_args()
    device, directory = join_job(args.dir)
    state = make_state(args.tensors, args.mib, device)
    seconds: dict[str, tuple[list[float], list[float]]] = {}
    try:
        contenders = arms(state, device, directory)
        order = random.Random(0)
        for round_number in range(args.rounds + 1):
            names = list(contenders)
            order.shuffle(names)
            for name in names:
                save, load = contenders[name]
                times = (timed(save, device), timed(load, device))
                on_rank_0(lambda: remove_contents(directory))()
                if round_number:  # the first round warms up
                    saves, loads = seconds.setdefault(name, ([], []))
                    saves.append(times[0])
                    loads.append(times[1])
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(directory)
    if dist.get_rank() == 0:
        report(args, device, {name: (statistics.median(s), statistics.median(t)) for name, (s, t) in seconds.items()})
    dist.destroy_process_group()


def report(args: argparse.Namespace, device: torch.device, medians: dict[str, tuple[float, float]]) -> None:
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    print(
        f"{dist.get_world_size()} ranks, {machine}, torch {torch.__version__}, {args.mib:g} MiB in {args.tensors} tensors, "
        f"medians of {args.rounds} rounds"
    )
    print(f"{'arm':16} {'save / raw':>11} {'save / dcp':>11} {'load / raw':>11} {'load / dcp':>11}")
    for name, (save, load) in medians.items():
        columns = [
            save / medians["raw"][0],
            save / medians["dcp"][0],
            load / medians["raw"][1],
            load / medians["dcp"][1],
        ]
        seconds = f"   {save:.3f} s {load:.3f} s" if device.type == "cuda" else ""
        print(f"{name:16} " + " ".join(f"{ratio:10.2f}x" for ratio in columns) + seconds)


if __name__ == "__main__":
    main()
