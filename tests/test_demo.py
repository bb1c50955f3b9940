"""The demo: its text, model and log, the accidents that it stages, and that none of them changes what a run comes to."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from forgather_ckpt import catalog, load_component
from forgather_ckpt.demo import __main__ as demo
from forgather_ckpt.demo import compare, losses
from forgather_ckpt.demo.damage import damage
from forgather_ckpt.demo.gpt import GPT
from forgather_ckpt.demo.text import StandardLibrary
from tests.torchrun import torchrun

TINY = [
    "--max-steps=6",
    "--save-steps=2",
    "--logging-steps=1",
    "--per-device-train-batch-size=2",
    "--context=16",
    "--width=32",
    "--heads=2",
    "--layers=1",
    "--device=cpu",
]


@pytest.fixture
def _settings_restored() -> Iterator[None]:
    logger = logging.getLogger("forgather_ckpt")
    level = logger.level
    yield
    logger.setLevel(level)
    torch.use_deterministic_algorithms(False)


# ---- flags


def test_the_help_opens_with_an_example(capsys):
    with pytest.raises(SystemExit, match="0"):
        demo.parse(["--help"])
    assert "torchrun --standalone --nproc-per-node 2 -m forgather_ckpt.demo" in capsys.readouterr().out[:200]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", "auto"),
        ("latest", "latest"),
        ("no", False),
        ("40", 40),
        ("runs/a/checkpoint-40", "runs/a/checkpoint-40"),
    ],
)
def test_what_to_resume_from(text, expected):
    options = demo.parse(["--resume-from-checkpoint", text])
    assert demo.training_arguments(options).resume_from_checkpoint == expected


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--save-steps=0"], "save_steps must be"),
        (["--width=100", "--heads=3"], "not a multiple of --heads 3"),
        (["--kill-in-save=30"], "nothing is saved at that step, only every 20"),
        (["--backend=gloo"], "start it with torchrun"),
        (["--preserve-n-best=2"], "needs --eval-steps"),
        (["--fresh", "--auto-resume"], "not allowed with argument"),
    ],
)
def test_wrong_flags_are_refused(flags, problem, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="2"):
        demo.parse(flags)
    assert problem in capsys.readouterr().err


# ---- text, model, log


def test_the_text_is_cut_into_windows_that_share_one_byte(tmp_path):
    for name, content in {
        "b.py": "4567",
        "a/z.py": "0123",
        "test/c.py": "no",
        "a/site-packages/d.py": "no",
        "e.txt": "no",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    text = StandardLibrary(context=4, root=tmp_path)
    assert [bytes(text[i]["window"].tolist()) for i in range(len(text))] == [b"0123\n", b"\n4567"]
    with pytest.raises(IndexError):
        text[2]
    with pytest.raises(ValueError, match="9 bytes of Python sources; a window takes 10"):
        StandardLibrary(context=9, root=tmp_path)


def test_this_machine_has_a_text():
    assert len(StandardLibrary(context=128)) > 10_000


def test_the_model_begins_with_no_knowledge_and_ties_its_embeddings():
    torch.manual_seed(0)
    model = GPT(context=16, width=32, num_heads=2, num_layers=1)
    assert model(torch.randint(256, (4, 17), dtype=torch.uint8)).item() == pytest.approx(math.log(256), abs=0.2)
    assert model.head.weight is model.embedding.weight


def test_the_log_keeps_every_bit_and_forgets_the_steps_that_are_done_again(tmp_path):
    losses.cut(tmp_path, before=1)
    for step, loss in enumerate((0.1, 2 / 3, 5e-324), start=1):
        losses.append(tmp_path, step, loss)
    assert losses.read(tmp_path) == [(1, 0.1), (2, 2 / 3), (3, 5e-324)]
    with (tmp_path / losses.NAME).open("a") as stream:
        stream.write("4 0x1.8")  # no newline: cut off by a crash
    losses.cut(tmp_path, before=3)
    assert losses.read(tmp_path) == [(1, 0.1), (2, 2 / 3)]


# ---- accidents


@pytest.mark.usefixtures("_settings_restored")
def test_a_damaged_checkpoint_is_passed_over_and_changes_nothing(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.delenv("RANK", raising=False)
    spoiled, undisturbed, other = (str(tmp_path / name) for name in ("spoiled", "undisturbed", "other"))
    for run, flags in ((spoiled, []), (undisturbed, []), (other, ["--seed=1"])):
        assert demo.main([*TINY, "--output-dir", run, *flags]) == 0
    said = damage(Path(spoiled) / "checkpoint-6", "model")
    assert demo.main([*TINY, "--output-dir", spoiled, "--auto-resume"]) == 0
    assert "checkpoint-6 is passed over" in caplog.text
    assert said.split("tensor ")[1].split("'")[1] in caplog.text
    assert f"resumed from {spoiled}/checkpoint-4 at step 4" in caplog.text

    def compared(*runs: str) -> tuple[int | str, str]:
        monkeypatch.setattr("sys.argv", ["compare", *runs])
        capsys.readouterr()
        return compare.main(), capsys.readouterr().out

    code, line = compared(spoiled, undisturbed)
    assert (code, line.count("\n")) == (0, 1)
    assert line.startswith("identical, bit for bit: ") and line.endswith(" of 6 components at step 6, 6 losses\n")
    code, line = compared(undisturbed, other)
    assert (code, line.count("\n")) == (1, 1)
    assert line.startswith("different: ") and line.endswith("6 of 6 losses, the first at step 1\n")
    assert compared(undisturbed, str(tmp_path))[0] == f"error: {tmp_path} has no checkpoint"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_rank_that_is_killed_in_mid_save_changes_nothing(tmp_path):
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    command = ["-m", "forgather_ckpt.demo", *TINY, "--auto-resume", "--output-dir"]
    # torchrun starts the same command again
    result = torchrun(["--max-restarts=1", *command, killed, "--kill-in-save=4"], 2)
    assert result.returncode == 0, result.output
    assert "exitcode: -9" in result.output
    assert f"resumed from {killed}/checkpoint-2 at step 2" in result.output
    result = torchrun([*command, undisturbed, "--dispatch-batches"], 2)
    assert result.returncode == 0, result.output
    assert [found.manifest.step for found in catalog.scan(killed).checkpoints] == [6, 4, 2]
    found, _ = compare.differences(killed, undisturbed)
    assert [one for one in found if "dataset" not in one] == []


@pytest.mark.parametrize(
    "device", [["--device=cpu"], pytest.param(["--device=cuda:0", "--backend=gloo"], marks=pytest.mark.gpu)], ids=str
)
@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_run_whose_learning_rate_is_raised_a_hundredfold_ends_by_itself_and_its_best_are_there(tmp_path, device):
    """In the size of the quickstart: evaluated every 5 steps, spoiled after step 30."""
    flags = [*device, "--save-steps=10", "--eval-steps=5", "--preserve-n-best=2", "--save-total-limit=1"]
    flags += ["--spoil-at=30", "--output-dir", str(tmp_path)]
    result = torchrun(["-m", "forgather_ckpt.demo", *flags], 2)
    assert result.returncode == 0, result.output
    assert "Training ended: at step 35 the short average of eval_loss is " in result.output
    summary = result.output[result.output.rindex("Best checkpoints (N=2):") :].splitlines()[1:3]
    assert [line.split(":")[0].strip() for line in summary] == [f"{tmp_path}/checkpoint-{step}" for step in (30, 20)]
    assert [found.manifest.step for found in catalog.scan(tmp_path).checkpoints] == [35, 30, 20]
    held_out = demo.held_out(StandardLibrary(128))[1][0]
    for step in (30, 20):
        model = GPT(context=128, width=192, num_heads=6, num_layers=3)
        model.load_state_dict(load_component(tmp_path / f"checkpoint-{step}", "model"))
        model.eval()
        with torch.no_grad():
            assert model(held_out["window"].unsqueeze(0)).item() < 3.5
