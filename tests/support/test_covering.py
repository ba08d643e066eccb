"""`covering` leaves no need open, chooses few rows, and chooses the same ones again."""

from itertools import product

from covering import covering, open_needs, quick

SIDES, COLOURS, SIZES = range(7), "rgb", ("small", "large")
ROWS = list(product(SIDES, COLOURS, SIZES))
PAIRS = [
    (lambda side, colour, size: (side, colour), 1),
    (lambda side, colour, size: (side, size), 1),
    (lambda side, colour, size: (colour, size), 1),
]


def test_each_value_occurs_often_enough():
    needs = ((lambda side, colour, size: side, 2), (lambda side, colour, size: colour, 4))
    chosen = covering(ROWS, *needs)
    assert len(chosen) == 14 and not open_needs(ROWS, chosen, needs)
    assert all(sum(row[0] == side for row in chosen) == 2 for side in SIDES)
    assert all(sum(row[1] == colour for row in chosen) >= 4 for colour in COLOURS)


def test_pairs_of_three_lists_need_no_more_rows_than_the_two_longest():
    chosen = covering(ROWS, *PAIRS)
    assert {(side, colour) for side, colour, _ in chosen} == set(product(SIDES, COLOURS))
    assert {(side, size) for side, _, size in chosen} == set(product(SIDES, SIZES))
    assert len(chosen) == len(SIDES) * len(COLOURS) < len(ROWS)


def test_a_row_that_is_missing_is_an_open_need():
    chosen = covering(ROWS, *PAIRS)
    for i in range(len(chosen)):
        assert open_needs(ROWS, chosen[:i] + chosen[i + 1 :], PAIRS)


def test_a_value_that_is_rare_is_taken_as_often_as_there_is_one():
    rows = [("often", 1), ("often", 2), ("often", 3), ("once", 4)]
    assert covering(rows, (lambda word, number: word, 2)) == [("often", 1), ("often", 2), ("once", 4)]


def test_the_choice_is_the_same_in_every_process():
    assert covering(ROWS, *PAIRS)[:4] == [(0, "r", "small"), (0, "g", "large"), (0, "b", "small"), (1, "r", "large")]


def test_what_is_left_out_is_slow():
    rows = quick(ROWS, *PAIRS)
    assert [row.values for row in rows] == ROWS
    assert [row.values for row in rows if not row.marks] == covering(ROWS, *PAIRS)
    assert {mark.name for row in rows for mark in row.marks} == {"slow"}
