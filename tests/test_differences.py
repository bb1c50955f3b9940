"""What a replication check found, as text, as the one line of an error, and as JSON."""

from __future__ import annotations

import math
import random

import pytest

from forgather_ckpt import strict_json
from forgather_ckpt.differences import (
    MIN_WIDTH,
    Copy,
    ElementDifference,
    ItemDifference,
    ReplicationReport,
    SetDifference,
    error_text,
    report_json,
)
from forgather_ckpt.patterns import ValidationLevel
from tests.golden_files import golden

CREATED = "2024-01-02T03:04:05+00:00"


def weight(name: str = "layers.2.weight", **elements) -> ItemDifference:
    told = ElementDifference(**{**dict(num_elements=262144, num_different=17, first_index=(17, 4)), **elements})
    return ItemDifference(name, "tensor", "float32", (512, 512), (0, 2, 3), (Copy((1,), told),))


def rate(name: str = "groups.a.lr", value: str | None = "0.1", *others: tuple[int, str | None]) -> ItemDifference:
    copies = tuple(Copy((rank,), value=other) for rank, other in others or [(1, "0.2")])
    return ItemDifference(name, "value", None, None, (0, 2, 3), copies, value)


def one_set(*items: ItemDifference, **fields) -> SetDifference:
    ranks = {"entry": "all", "holders": (0, 1, 2, 3), "majority": (0, 2, 3), "minority": (1,)}
    return SetDifference(**{**ranks, **fields}, items=items)


def report(*sets: SetDifference, **fields) -> ReplicationReport:
    head = {"component": "model", "group": None, "level": ValidationLevel.TENSOR, "num_items": 148}
    return ReplicationReport(**{**head, "excluded": (), "seconds": 0.312, **fields}, differences=sets)


def sample() -> dict[str, ReplicationReport]:
    """Reports with something in every field."""
    three = ItemDifference(
        "state/~i0/exp_avg",
        "tensor",
        "bfloat16",
        (4,),
        (0, 4),
        (
            Copy((1,), ElementDifference(4, 1, (3,), math.inf, 2**64 - 1, 0, 1, 0, 0)),
            Copy((2, 5), ElementDifference(4, 4, (0,), None, None, 4, 0, 0, 0)),
            Copy((3,)),
        ),
    )
    alias = ItemDifference("head.weight", "alias", None, None, (6,), (Copy((7,), value="other"),), "embedding.weight")
    scale = ItemDifference("scale", "tensor", "float64", (), (6,), (Copy((7,), ElementDifference(1, 1, (), 0.25, 9)),))
    return {
        "model": report(
            one_set(weight(max_abs=3.1e-4, max_ulp=4, nan=1), rate(), num_items_not_shown=2, num_not_measured=1),
            excluded=("running_mean", "running_var"),
        ),
        "optimizer": report(
            SetDifference("pp=0/2", (0, 1, 2, 3, 4, 5), (0, 4), (1, 2, 3, 5), (three,)),
            SetDifference("pp=1/2", (6, 7), (6,), (7,), (alias, scale)),
            component="optimizer",
            group="dp",
            level=ValidationLevel.FULL,
            num_items=12,
            seconds=12.3456,
        ),
        "scheduler": report(component="scheduler", level=ValidationLevel.QUICK, num_items=1),
        "rng": report(component="rng", level=ValidationLevel.NONE, num_items=0, seconds=0.0),
    }


TEXTS = {
    "model": """\
model: DIFFERS at level tensor (148 items compared, 2 excluded, 0.31 s)
  all: ranks 0, 2-3 against 1
    layers.2.weight  float32 [512, 512]
      rank 1: 17 of 262144 elements, first at [17, 4], max |Δ| 3.1e-4, 4 ulp, NaN 0 against 1
    groups.a.lr      value 0.1
      rank 1: 0.2
    and 2 more items
    1 tensor not compared element by element""",
    "optimizer": """\
optimizer (dp): DIFFERS at level full (12 items compared, 12.35 s)
  pp=0/2: ranks 0, 4 against 1-3, 5
    state/~i0/exp_avg  bfloat16 [4]
      rank 1: 1 of 4 elements, first at [3], max |Δ| inf, 18446744073709551615 ulp, Inf 0 against 1
      ranks 2, 5: 4 of 4 elements, first at [0], NaN 0 against 4
      rank 3: differs
  pp=1/2: rank 6 against 7
    head.weight  alias embedding.weight
      rank 7: other
    scale        float64 []
      rank 7: 1 of 1 element, max |Δ| 0.25, 9 ulp""",
    "scheduler": "scheduler: equal at level quick (1 item compared, 0.31 s)",
    "rng": "rng: not compared",
}


@pytest.mark.parametrize("component", TEXTS)
def test_the_text_of_a_report(component):
    assert sample()[component].text() == TEXTS[component]


def test_a_narrow_text_breaks_lines_and_keeps_both_ends_of_names():
    assert sample()["model"].text(40) == (
        """\
model: DIFFERS at level tensor (148
    items compared, 2 excluded, 0.31 s)
  all: ranks 0, 2-3 against 1
    layers.2.weight  float32 …12, 512]
      rank 1: 17 of 262144 elements,
          first at [17, 4], max |Δ|
          3.1e-4, 4 ulp, NaN 0 against 1
    groups.a.lr      value 0.1
      rank 1: 0.2
    and 2 more items
    1 tensor not compared element by
        element"""
    )


def huge() -> ReplicationReport:
    """1,024 ranks, 100,000 items, long names, and as many states as ranks."""
    odd = tuple(range(1, 1024, 2))
    even = tuple(range(0, 1024, 2))
    copies = tuple(
        Copy((rank,), ElementDifference(10**12, 10**12, (10**6,) * 8, 1e300, 2**60, 7, 7, 7, 7)) for rank in odd
    )
    values = tuple(Copy((rank,), value="[" + "0.123456789, " * 1000 + f"{rank}]") for rank in odd)
    items = [
        ItemDifference(f"{'block.' * 50}{number}.weight", "tensor", "float32", (10**6,) * 8, even, copies)
        for number in range(15)
    ]
    items += [ItemDifference(f"v{number}", "value", None, None, even, values, "x" * 10**6) for number in range(100)]
    sets = [
        SetDifference(f"set-{number}", tuple(range(1024)), even, odd, tuple(items), 99_885, 500)
        for number in range(512)
    ]
    return report(*sets, component="m" * 100, group="g" * 200, excluded=tuple(map(str, range(100_000))))


@pytest.mark.parametrize("width", [1, MIN_WIDTH, 80, 100, 137, 1000])
def test_the_text_is_bounded_however_much_differs(width):
    lines = huge().text(width).splitlines()
    assert max(map(len, lines)) <= max(width, MIN_WIDTH)
    assert len(lines) < 10 * (20 * 30 + 10)
    assert lines[-1] == "  and 502 more sets"
    assert lines.count("    and 99980 more items") == 10  # 20 of 115 + 99,885
    assert lines.count("      and 508 more states") == 200
    assert any("… (512 ranks)" in line for line in lines)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (("a" * 41, "a" * 40 + "b"), ("…" + "a" * 39, "…" + "a" * 38 + "b")),
        (("[" + "1, " * 90 + "2]", "[" + "1, " * 30 + "7, " + "1, " * 59 + "2]"), ("… 1, 1, 1, 1,", "… 1, 1, 1, 7,")),
        (("b" + "a" * 99, "c" + "a" * 99), ("baaa", "caaa")),
        (("a" * 50, "a" * 99), ("…" + "a" * 9, "…" + "a" * 9)),
    ],
)
def test_of_long_values_the_place_is_shown_where_they_differ(values, shown):
    found = report(one_set(rate("v", values[0], (1, values[1]))))
    majority, minority = [line.split() for line in found.text().splitlines()[-2:]]
    assert " ".join(majority[2:]).startswith(shown[0])
    assert " ".join(minority[2:]).startswith(shown[1])
    assert f"'v' ({shown[0]}" in error_text([found])
    assert f" against {shown[1]}" in error_text([found])


def test_names_and_values_do_not_move_the_cursor():
    item = rate("a\nb\x1b[2J", "line\none", (1, "line\ttwo"))
    text = report(one_set(item, entry="se\rt"), component="mo\ndel").text()
    assert text.splitlines()[0].startswith(r"mo\ndel: DIFFERS")
    assert r"a\nb\x1b[2J  value line\none" in text
    assert r"rank 1: line\ttwo" in text
    assert all(line.isprintable() for line in text.splitlines())
    long = report(one_set(rate("\n" * 10**5, "\x1b" * 10**7))).text(60)
    assert all(len(line) <= 60 and line.isprintable() for line in long.splitlines())
    message = error_text([report(one_set(item))])
    assert message.isprintable()


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ([report(), report(component="other")], ""),
        (
            [report(one_set(weight(max_abs=3.1e-4), majority=(0,), minority=(3, 7), holders=(0, 3, 7)), group="dp")],
            "'model' differs between rank 0 and ranks [3, 7] at 'layers.2.weight' (first at [17, 4], max |Δ| 3.1e-4); "
            "expected identical state in dp (0, 3, 7)",
        ),
        (  # of two groups, which share the item
            [report(one_set(rate("v"), num_sets=2), group="dp")],
            "'model' differs between ranks [0, 2-3] and rank 1 at 'v' (0.1 against 0.2); "
            "expected identical state in all holders (0-3)",
        ),
        (
            [report(one_set(weight("it's"), rate(), rate("text", None, (1, None))))],
            "'model' differs between ranks [0, 2-3] and rank 1 at \"it's\" (first at [17, 4]), "
            "'groups.a.lr' (0.1 against 0.2), 'text'; expected identical state in all holders (0-3)",
        ),
        (
            [report(one_set(rate("v", "0", *[(rank, str(rank)) for rank in range(1, 6)]), minority=(1, 2, 3, 4, 5)))],
            "'model' differs between ranks [0, 2-3] and ranks [1-5] at 'v' (0 against 1, 2, 3, …); "
            "expected identical state in all holders (0-3)",
        ),
        (
            [report(one_set(*[rate(f"v{number}", None, (1, None)) for number in range(7)], num_items_not_shown=93))],
            "'model' differs between ranks [0, 2-3] and rank 1 at 'v0', 'v1', 'v2', 'v3', 'v4' and 95 more items; "
            "expected identical state in all holders (0-3)",
        ),
        (
            [report(one_set(rate("v", None, (1, None)), num_items_not_shown=1)), report(one_set(), component="b")],
            "'model' differs between ranks [0, 2-3] and rank 1 at 'v' and 1 more item; expected identical state in all "
            "holders (0-3); 'b' differs between ranks [0, 2-3] and rank 1; expected identical state in all holders (0-3)",
        ),
        (
            [report(one_set(num_items_not_shown=3))],
            "'model' differs between ranks [0, 2-3] and rank 1 in 3 items; expected identical state in all holders (0-3)",
        ),
        (
            [report(one_set(weight(num_different=0, first_index=None)))],
            "'model' differs between ranks [0, 2-3] and rank 1 at 'layers.2.weight'; "
            "expected identical state in all holders (0-3)",
        ),
    ],
)
def test_the_line_of_an_error(reports, expected):
    assert error_text(reports) == expected


def test_the_line_of_an_error_tells_the_first_place_and_the_largest_distance_of_all_copies():
    copies = (
        Copy((1,), ElementDifference(9, 1, (2, 0), 4.0, 1)),
        Copy((2,)),
        Copy((3,), ElementDifference(9, 1, (1, 2), 0.5, 1)),
    )
    item = ItemDifference("w", "tensor", "float32", (3, 3), (0,), copies)
    assert "at 'w' (first at [1, 2], max |Δ| 4); expected" in error_text([report(one_set(item))])


def test_the_line_of_an_error_is_bounded_however_much_differs():
    message = error_text([huge()])
    assert message.endswith("; and 507 more sets of ranks")
    assert message.count(" differs between ") == 5
    assert message.count("and 99995 more items") == 5
    assert "\n" not in message and len(message) < 15_000


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0.0, "0"),
        (0.25, "0.25"),
        (3.1e-4, "3.1e-4"),
        (0.001, "0.001"),
        (2.0**-149, "1.4e-45"),
        (1.0, "1"),
        (999.4, "999"),
        (12345.0, "12345"),
        (1e6, "1e6"),
        (2.0**64, "1.84e19"),
        (math.inf, "inf"),
    ],
)
def test_how_far_apart_is_short(number, expected):
    assert f"max |Δ| {expected}, 3 ulp" in ElementDifference(5, 1, (0,), number, 3).text()


def test_the_minority_of_an_item_is_everybody_who_has_another_state():
    copies = (Copy((1, 7)), Copy((2,)), Copy((3, 5)))
    assert ItemDifference("w", "tensor", "int8", (1,), (0, 4, 6), copies).minority == (1, 2, 3, 5, 7)


def test_a_report_is_equal_if_no_set_differs():
    reports = sample()
    assert [key for key, one in reports.items() if one.is_equal] == ["scheduler", "rng"]
    assert reports["model"].differences[0].num_items == 4


def test_the_file_is_as_it_was():
    data = strict_json.pretty(report_json(sample(), 1000, CREATED, "error"))
    assert golden("replication-report-1000.json", data) == data


def test_the_file_is_strict_json_that_says_what_the_report_says():
    reports = sample()
    told = report_json(reports, None, CREATED, "warn")
    read = strict_json.loads(strict_json.dumps(told), what="the report", max_bytes=1 << 20)
    assert read == told
    assert (read["step"], read["on_mismatch"], list(read["components"])) == (None, "warn", list(reports))
    assert [part["result"] for part in read["components"].values()] == ["differed", "differed", "equal", "not compared"]
    copies = read["components"]["optimizer"]["differences"][0]["items"][0]["minorities"]
    assert [copy["elements"] and copy["elements"]["max_abs"] for copy in copies] == ["inf", None, None]


def test_a_nan_is_a_string_in_json():
    read = strict_json.dumps(report(seconds=math.nan).to_json())
    assert b'"seconds":"nan"' in read


def test_merging_takes_the_first_place_and_the_largest_distances():
    one = ElementDifference(10, 2, (1, 3), 0.5, 7, 1, 2, 3, 4)
    other = ElementDifference(5, 1, (0, 9), 0.75, 6, 10, 20, 30, 40)
    merged = ElementDifference(15, 3, (0, 9), 0.75, 7, 11, 22, 33, 44)
    assert one.merge(other) == other.merge(one) == merged
    assert one.merge(ElementDifference(4)) == ElementDifference(14, 2, (1, 3), 0.5, 7, 1, 2, 3, 4)
    assert ElementDifference(4).merge(ElementDifference(1)) == ElementDifference(5)
    # a first place without dimensions, and distances of zero, are not the same as none
    scalar = ElementDifference(1, 1, (), 0.0, 1)
    assert scalar.merge(ElementDifference(0)) == scalar == ElementDifference(0).merge(scalar)


def test_merging_is_associative():
    chance = random.Random(3)

    def drawn() -> ElementDifference:
        place = chance.choice([None, (chance.randrange(3), chance.randrange(3))])
        counts = [chance.randrange(5) for _ in range(4)]
        absolute = chance.choice([None, 0.0, chance.random(), math.inf])
        return ElementDifference(9, chance.randrange(9), place, absolute, chance.choice([None, 1, 2**64]), *counts)

    for _ in range(200):
        a, b, c = drawn(), drawn(), drawn()
        assert a.merge(b).merge(c) == a.merge(b.merge(c))
