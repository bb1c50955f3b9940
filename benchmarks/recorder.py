"""What a `DigestRecorder` costs beside a training step: time and bytes of log.

    python benchmarks/recorder.py --width 768 --layers 12
    python benchmarks/recorder.py --width 2048 --layers 24 --batch 4

One process trains a transformer with AdamW on random data, on a GPU where there is one, in bfloat16 there. Each round
is a step, then a recording of it by each arm, in a new order; printed are medians over the rounds as ratios to the step.
Absolute times only on a GPU.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forgather_ckpt import DigestRecorder, NamedOptimizer

ARMS: dict[str, dict[str, Any]] = {
    "all": {},
    "without groups": {"exclude": ["groups.*"]},
    "model": {"components": ["model"]},
}
"""What is recorded, and by which options."""


def training(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """A model, its optimizer, and a step of theirs."""
    layer = nn.TransformerEncoderLayer(args.width, args.width // 64, 4 * args.width, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, args.layers, enable_nested_tensor=False).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    inputs = torch.randn(args.batch, args.tokens, args.width, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, optimizer, step = training(args, device)
    components = {"model": model, "optimizer": NamedOptimizer(optimizer, [model])}
    spent: dict[str, list[float]] = {name: [] for name in ("step", *ARMS)}
    log_bytes: dict[str, int] = {}
    order = random.Random(0)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        recorders = {
            name: stack.enter_context(DigestRecorder(directory / name, strict=True, **options))
            for name, options in ARMS.items()
        }
        for number in range(args.rounds + 2):
            seconds = {"step": seconds_of(step, device)}
            for name in order.sample(sorted(ARMS), len(ARMS)):
                before = size_of(directory / name)
                seconds[name] = seconds_of(partial(recorders[name].record, number, components), device)
                log_bytes[name] = size_of(directory / name) - before
            if number >= 2:  # the first ones warm up
                for name, one in seconds.items():
                    spent[name].append(one)
    report(args, device, components, {name: statistics.median(all_) for name, all_ in spent.items()}, log_bytes)


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.fgdl"))


def report(
    args: argparse.Namespace,
    device: torch.device,
    components: dict[str, Any],
    medians: dict[str, float],
    log_bytes: dict[str, int],
) -> None:
    is_gpu = device.type == "cuda"
    machine = torch.cuda.get_device_name() if is_gpu else f"one of {os.cpu_count()} CPU cores"
    tensors = [
        one
        for component in components.values()
        for one in component.state_dict().values()
        if isinstance(one, torch.Tensor)
    ]
    num_bytes = sum(one.nbytes for one in tensors)
    print(
        f"{machine}, torch {torch.__version__}, {sum(one.numel() for one in components['model'].parameters()):,} parameters, "
        f"{len(tensors)} tensors of {num_bytes / 1e9:.2f} GB, {args.batch} x {args.tokens} tokens, medians of {args.rounds} rounds"
    )
    for name, median in medians.items():
        line = f"{name:16} {median / medians['step']:8.3f} x step"
        line += f" {1e3 * median:9.2f} ms" if is_gpu else ""
        print(line + (f" {log_bytes[name]:8,} bytes of log" if name in log_bytes else ""))


if __name__ == "__main__":
    main()
