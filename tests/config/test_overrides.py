"""Text in Hydra's grammar: what composes to which value, against Hydra's own parser, and the argument that an error
line gives to paste."""

import re
import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import given, settings
from hypothesis import strategies as st

from plrd_train.config.compose import compose
from plrd_train.config.overrides import check, literal, readable
from plrd_train.errors import UserError

TINY = ("experiment=tinystories", "parent.path=p", "data.train=t", "data.validation=v")
SIGNS = "abZ019._-/\\'\"=,:;()[]{}<>$~#&!?*+|%@^` üßé漢🙂"
# What no file is named after: an interpolation, Hydra's mark for a value that is missing, and spaces at the ends, which
# Hydra drops.
paths = st.text(SIGNS, max_size=12).filter(lambda s: not re.search(r"\$\{.*\}", s) and s != "???" and s == s.strip(" "))
often_split = st.lists(paths, min_size=30, max_size=60)  # composing takes a quarter of a second, however many there are


def composed(values: list[str], *flags: str) -> list[dict]:
    """The values of the keys x.k0, x.k1, … that are given `values`, as they would be typed, for each job."""
    jobs = compose([*flags, *TINY, "+x={}", *(f"x.k{i}={value}" for i, value in enumerate(values))])
    return [list(job["x"].values()) for job in jobs]


@settings(max_examples=5, deadline=None)
@given(often_split)
def test_literal_text_composes_to_itself(texts):
    assert composed([literal(text) for text in texts]) == [texts]


@pytest.mark.parametrize(
    "text",
    [
        "${run_dir}",
        "a\\${b}",
        "\\\\${a:${b}}",
        "C:\\x\\",
        "'",
        '\\"',
        "",
        "null",
        "3",
        "[a]",
        "a\nb\tc",
        " a ",
        "\udcff",
    ],
)
def test_literal_text_that_means_something_elsewhere(text):
    assert composed([literal(text)]) == [[text]]


def in_hydra(value: str) -> object:
    """What Hydra's own parser reads where no sweep is; None where it cannot. (`null` counts as such here.)"""
    try:
        parsed = OverridesParser.create().parse_override(f"k={value}")
    except HydraException:
        return None
    return None if parsed.is_sweep_override() else parsed.value()


def pasted(argument: str, *, sweep: bool = False) -> str | None:
    """The argument that the shell makes of what the line for `argument` gives to paste; None where there is no such
    line."""
    try:
        check(argument, sweep=sweep)
    except UserError as error:
        line = str(error)
        assert line.startswith(f"{argument}: ") and "\n" not in line
        (again,) = shlex.split(
            re.split(r"quote it: |by itself: |text is quoted: ", line.removeprefix(argument), maxsplit=1)[1]
        )
        return again
    return None


@settings(max_examples=5, deadline=None)
@given(often_split)
def test_a_value_is_hydras_or_the_text_itself_or_refused_with_one_to_paste(texts):
    """What Hydra can read keeps its meaning; all else is taken as it stands, or refused with an argument that composes
    to it."""
    texts = [text for text in texts if in_hydra(text) is not None or text.lower() != "null"]
    values = [(pasted(f"k={text}") or f"k={text}").removeprefix("k=") for text in texts]
    expected = [text if in_hydra(text) is None else in_hydra(text) for text in texts]
    assert repr(composed(values)) == repr([expected])  # by repr: nan


def test_which_text_needs_no_quotes():
    values = ["/größe/mein Lauf", "~/x", "a#b;c&d", "größe-${seed}", " ü "]
    assert composed(values) == [["/größe/mein Lauf", "~/x", "a#b;c&d", "größe-0", "ü"]]


@pytest.mark.parametrize(
    "argument",
    ["a=b", "a=[1,2]", "a='ü'", "a=3", "a=b,c", "a=choice(a,b)", "--x=ü", "ü", "a=\\,", "a=${x:ü,y}", "a=ü=b"],
)
def test_what_hydra_reads_is_left_alone(argument):
    assert readable(argument) == argument


def test_the_values_of_a_sweep_are_quoted_one_by_one():
    assert composed(["~/ü,b,c d"], "--multirun") == [["~/ü"], ["b"], ["c d"]]
    again = pasted("x=/a=b,/c=d", sweep=True)
    assert again == 'x="/a=b","/c=d"'
    assert composed([again.removeprefix("x=")], "--multirun") == [["/a=b"], ["/c=d"]]
    assert pasted("x='a',b=c", sweep=True) == 'x="…","…"'
    assert pasted("x=a=${seed},ü", sweep=True) == 'x="a=${seed}","ü"'


def test_an_interpolation_stays_one_in_what_is_given_to_paste():
    again = pasted("x=lr=${seed}")
    assert again == 'x="lr=${seed}"' and composed([again.removeprefix("x=")]) == [["lr=0"]]


def test_an_interpolation_that_omegaconf_cannot_read_is_named():
    with pytest.raises(UserError, match=r"x\.k0=\$\{oc\.env:NO_SUCH_NAME,über\}: token recognition error at: 'ü'"):
        composed(["${oc.env:NO_SUCH_NAME,über}"])


def test_the_last_of_equal_overrides_counts():
    assert [job["seed"] for job in compose([*TINY, "seed=1", "seed=2", "seed=1"])] == [1]
