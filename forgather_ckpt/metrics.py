"""Numbers that say how good a checkpoint is: whether one can be ranked at all, and which way is better."""

import math
import re
from typing import Any, Literal

Mode = Literal["min", "max"]
"""Whether the lowest or the highest value is the best."""

# fmt: off
_LOWER_IS_BETTER = {
    "loss", "perplexity", "ppl", "error", "errors", "err", "nll", "bpb", "bpc", "bpw", "wer", "cer", "ter", "mse", "rmse",
    "mae", "mape", "fid", "kl", "divergence",
}
_HIGHER_IS_BETTER = {
    "accuracy", "acc", "f1", "precision", "recall", "auc", "auroc", "bleu", "sacrebleu", "chrf", "rouge", "rougel",
    "rougelsum", "meteor", "bertscore", "score", "map", "mrr", "ndcg", "iou", "miou", "dice", "psnr", "ssim", "reward",
    "r2", "mcc", "matthews", "pearson", "pearsonr", "spearman", "spearmanr",
}
# fmt: on


def mode_of(name: str) -> Mode | None:
    """Which way a metric of this name is better; None where its words do not tell, or contradict each other.

    Words are told apart by anything but letters and digits: `eval_loss` is "min", `eval_top5_accuracy` "max",
    `loss_of_accuracy` and `eval_quality` are None. Nothing is guessed: a wrong direction would keep the worst.
    """
    words = re.findall(r"[a-z]+[0-9]*", name.lower())
    words += [word.rstrip("0123456789") for word in words]
    found: set[Mode] = set()
    if not _LOWER_IS_BETTER.isdisjoint(words):
        found.add("min")
    if not _HIGHER_IS_BETTER.isdisjoint(words):
        found.add("max")
    return found.pop() if len(found) == 1 else None


def rankable(value: object) -> float | None:
    """The value as a finite number; None for NaN, infinities, and what is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def as_number(value: Any) -> Any:
    """The number in a tensor or numpy array of one element, or in a numpy scalar; other values as they are."""
    if not hasattr(value, "ndim"):
        return value
    try:
        return value.item()
    except (TypeError, ValueError, RuntimeError):  # several elements
        return value
