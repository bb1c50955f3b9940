"""Sharded state, saved and loaded side by side with stock DCP: in the same layout, and in another one.

    torchrun --standalone --nproc-per-node 2 benchmarks/sharded.py --mib 512 --tensors 64 --dir /data/scratch
    torchrun --standalone --nproc-per-node 2 benchmarks/sharded.py --mib 10 --tensors 5000

Every rank has its rows of each tensor, as under FSDP. "columns" loads the same checkpoint into tensors that are cut
across their rows, so that every rank needs a part of every file. Both arms run in every round, in a new order; saves
end with an fsync, loads are from the page cache. Printed are medians as ratios to DCP; absolute times only on a GPU.
Ours verifies every block that it reads, and commits atomically; DCP does neither.
"""

import argparse
import os
import random
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from save_load import Holder, join_job, remove_contents, timed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from forgather_ckpt import CheckpointCoordinator, SharingPattern, StateComponent

State = dict[str, DTensor]
PHASES = ("save", "load", "load, columns")
COLUMNS = 256


def make_state(mesh: DeviceMesh, num_tensors: int, mib: float, dim: int) -> State:
    """Tensors of rows of 256 floats, cut in dimension `dim`."""
    rows = max(1, int(mib * 2**20 / 4 / COLUMNS / num_tensors))
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn((rows, COLUMNS), generator=generator).to(mesh.device_type)
    return {
        f"layers.{n}.weight": distribute_tensor(whole, mesh, [Shard(dim)], src_data_rank=None)
        for n in range(num_tensors)
    }


def arms(rows: State, columns: State, directory: Path) -> dict[str, dict[str, Callable[[], object]]]:
    """Arm -> phase -> action."""

    def ours(state: State) -> CheckpointCoordinator:
        component = StateComponent("model", Holder(state), SharingPattern.REPLICATED)  # type: ignore[arg-type]
        return CheckpointCoordinator([component], directory / "ours")

    by_rows, by_columns = ours(rows), ours(columns)
    writer = dcp.FileSystemWriter(directory / "dcp", sync_files=True)
    return {
        "ours": {
            "save": lambda: by_rows.save_checkpoint(1),
            "load": by_rows.load_checkpoint,
            "load, columns": by_columns.load_checkpoint,
        },
        "dcp": {
            "save": lambda: dcp.save(rows, storage_writer=writer),
            "load": lambda: dcp.load(rows, checkpoint_id=directory / "dcp"),
            "load, columns": lambda: dcp.load(columns, checkpoint_id=directory / "dcp"),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, default=512)
    parser.add_argument("--tensors", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", default=None, help="scratch space (default: the temporary directory)")
    args = parser.parse_args()
    device, directory = join_job(args.dir)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    rows, columns = (make_state(mesh, args.tensors, args.mib, dim) for dim in (0, 1))
    seconds: dict[tuple[str, str], list[float]] = {}
    order = random.Random(0)
    try:
        contenders = arms(rows, columns, directory)
        for round_number in range(args.rounds + 1):
            names = list(contenders)
            order.shuffle(names)
            for name in names:
                for phase in PHASES:
                    took = timed(contenders[name][phase], device)  # type: ignore[arg-type]
                    if round_number:  # the first round warms up
                        seconds.setdefault((name, phase), []).append(took)
                if dist.get_rank() == 0:
                    remove_contents(directory)
                dist.barrier()
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(directory)
    if dist.get_rank() == 0:
        machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
        print(
            f"{dist.get_world_size()} ranks, {machine}, torch {torch.__version__}, {args.mib:g} MiB in {args.tensors} "
            f"tensors cut by rows, medians of {args.rounds} rounds"
        )
        for phase in PHASES:
            ours, stock = (statistics.median(seconds[name, phase]) for name in ("ours", "dcp"))
            absolute = f"   {ours:.3f} s, {stock:.3f} s" if device.type == "cuda" else ""
            print(f"{phase:14} ours / dcp {ours / stock:6.2f} x{absolute}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
