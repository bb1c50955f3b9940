"""The options for resuming, for anybody's script."""

import argparse
from pathlib import Path

from forgather_ckpt import resume


def add_resume_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--resume-from-checkpoint WHICH`, `--auto-resume` and `--fresh`, of which one may be given, and `--strict-args`.

        options = parser.parse_args()
        args = TrainingArguments(
            output_dir, resume_from_checkpoint=resume_choice(options), strict_args=options.strict_args
        )

    With none of the three, `resume_choice` is None: where there are checkpoints, the person at the terminal is asked.
    `fgckpt resume-command` writes commands with these options.
    """
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--resume-from-checkpoint",
        "--resume_from_checkpoint",
        type=_which,
        metavar="WHICH",
        help="auto: the newest good checkpoint, a fresh start if there is none; latest: an error if there is none; best; "
        "no: a fresh start; or a step, another selector of `fgckpt --help`, or the path of a checkpoint",
    )
    which.add_argument(
        "--auto-resume",
        "--auto_resume",
        action="store_const",
        const="auto",
        dest="resume_from_checkpoint",
        help="the same as --resume-from-checkpoint auto: for jobs that nobody watches",
    )
    which.add_argument(
        "--fresh",
        action="store_const",
        const=False,
        dest="resume_from_checkpoint",
        help="the same as --resume-from-checkpoint no; a checkpoint of a step that is saved again is replaced",
    )
    parser.add_argument(
        "--strict-args",
        "--strict_args",
        action="store_true",
        help="refuse to resume with arguments that are risky to change",
    )


def resume_choice(options: argparse.Namespace) -> bool | int | str | None:
    """What the options say, as a value for `resume_from_checkpoint`; None where they say nothing."""
    choice: bool | int | str | None = options.resume_from_checkpoint
    return choice


def _which(text: str) -> bool | int | str:
    if text == "no":
        return False
    if text.isascii() and text.isdigit():
        return int(text)
    if text == "auto" or resume.is_selector(text) or Path(text).is_absolute() or "/" in text:
        return text
    if text and Path(text).is_dir():
        return text
    raise argparse.ArgumentTypeError(
        f"{text!r} is no checkpoint: write auto, latest, best, no, a step, another selector of `fgckpt --help`, or the path of "
        "a checkpoint directory"
    )
