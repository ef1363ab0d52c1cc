import pytest

from mergewell.report import numbers


@pytest.mark.parametrize(
    ("fraction", "shown"),
    [(0.934, "93.4 %"), (1.0, "100.0 %"), (0.0, "0 %"), (0.0001, "<0.1 %"), (-0.05, "−5.0 %")],
)
def test_percentages_have_one_decimal_and_traces_are_not_zero(fraction: float, shown: str) -> None:
    assert numbers.percent(fraction) == shown.replace(" ", "\N{NO-BREAK SPACE}")


def test_an_interval_names_its_unit_once() -> None:
    assert numbers.percent_range(0.918, 0.949) == "91.8–94.9\N{NO-BREAK SPACE}%"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (0.0912, "0.0912"), (2.04, "2.04"), (1234.5, "1,234"), (1.1e-5, "1.10e−5")],
)
def test_numbers_keep_three_figures(value: float, shown: str) -> None:
    assert numbers.number(value) == shown


def test_a_rounded_zero_has_no_sign() -> None:
    assert numbers.fixed(-0.001) == "0.00"
    assert numbers.fixed(-0.014) == "−0.01"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.421, "0.42 s"), (12.34, "12.3 s"), (59.97, "1 min 00 s"), (185, "3 min 05 s")],
)
def test_times(value: float, shown: str) -> None:
    assert numbers.seconds(value) == shown


def test_lists_and_counts_read_as_english() -> None:
    assert numbers.listed(("a",)) == "a"
    assert numbers.listed(("a", "b", "c")) == "a, b and c"
    assert (numbers.counted(1, "layer"), numbers.counted(33, "layer")) == ("1 layer", "33 layers")
    assert (numbers.in_words(4), numbers.in_words(12)) == ("four", "12")


def test_small_shares_and_differences_keep_two_figures() -> None:
    told = [numbers.fine_percent(x) for x in (0, 0.0000072, 0.000357, 0.0075, 0.05, 0.364)]
    plain = [text.replace("\N{NO-BREAK SPACE}", " ") for text in told]
    assert plain == ["0 %", "7.2e−4 %", "0.036 %", "0.75 %", "5.0 %", "36 %"]
    told = [numbers.points(x) for x in (0, 0.0125, -0.004, 0.063, -0.000078, 0.118)]
    assert told == ["0.0", "+1.2", "−0.40", "+6.3", "−0.0078", "+11.8"]
