"""Which way a metric is better is told by its words, or not at all; what cannot be ranked is said to be none."""

import math

import pytest

from forgather_ckpt.metrics import mode_of, rankable


@pytest.mark.parametrize(
    ("mode", "names"),
    [
        ("min", "loss eval_loss train/loss val-loss Perplexity eval_ppl word_error_rate wer eval_bpb rmse nll eval_loss_2"),
        ("max", "accuracy eval_accuracy eval_top5_accuracy f1 f1_macro eval_rouge1 rougeLsum bleu-4 mAP eval/auroc r2"),
        (None, "eval_quality lossless accurate grad_norm step accuracy_loss reward_error 5 _ ''"),
    ],
)  # fmt: skip
def test_b57_the_words_of_a_name_tell_which_way_is_better(mode, names):
    assert {name: mode_of(name) for name in names.split()} == dict.fromkeys(names.split(), mode)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (0, 0.0),
        (0.0, 0.0),
        (-2, -2.0),
        (2.5, 2.5),
        (2**70, float(2**70)),
        (math.nan, None),
        (math.inf, None),
        (-math.inf, None),
        (10**400, None),
        (True, None),
        (None, None),
        ("2.5", None),
        ({"$float": "nan"}, None),
        ([2.5], None),
    ],
)
def test_only_finite_numbers_can_be_ranked(value, number):
    assert rankable(value) == number
