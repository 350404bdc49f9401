"""Overrides, `key=value`, in Hydra's grammar: quoting, and error messages.

In that grammar `=`, commas, brackets, braces, parentheses, quotes and backslashes have a meaning. Letters beyond ASCII
and signs such as `~` or `#` are not in it at all.
"""

import re
import shlex

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from plrd_train.errors import UserError

_STRUCTURE = re.compile(r"""[=()\[\]{}'"\\]""")
_GROUPING = re.compile(r"""[(\[{'"]""")
_FOREIGN = re.compile(r"[^\w/+.$%*@?|:, \t-]", re.ASCII)
_INTERPOLATION = re.compile(r"\$\{[^{}]*\}")
_SPACE = " \t"  # which Hydra drops at the ends of a value
_COMMA = re.compile(r",(?![^{]*\})")  # outside interpolations


def literal(text: str) -> str:
    """`text` quoted so that Hydra and OmegaConf compose it to exactly `text`."""
    # To OmegaConf `\${` begins no interpolation, and `\\` before it is `\`.
    return _quoted(re.sub(r"(\\*)\$\{", r"\1\1\\${", text))


def readable(argument: str) -> str:
    """`argument` with its value quoted where the value must be text: it has a character that Hydra's grammar lacks, and
    none of its structure characters.

    The values of a sweep are quoted one by one. Interpolations are not quoted.
    """
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith("-") or _STRUCTURE.search(_plain(value)):
        return argument
    parts = _COMMA.split(value)
    return f"{key}={','.join(_quoted(part.strip(_SPACE)) if _FOREIGN.search(_plain(part)) else part for part in parts)}"


def check(argument: str, *, sweep: bool) -> None:
    """Raise UserError, which suggests how to quote it, where Hydra cannot parse the override `argument`, or parses it
    as a sweep though `sweep` is false."""
    parsed = _parse(readable(argument))
    if isinstance(parsed, Override) and (sweep or not parsed.is_sweep_override()):
        return
    key, _, value = argument.partition("=")
    mend = shlex.quote(f"{key}={_suggested(value)}")
    if isinstance(parsed, Override):
        a_list = f"a list stands in brackets, {shlex.quote(f'{key}=[{value}]')}; " if parsed.is_choice_sweep() else ""
        why = f"these are several values, a sweep, which takes --multirun; {a_list}text is quoted"
    elif not isinstance(_parse(f"{key}="), Override):
        raise UserError(f"{_shown(argument)}: {_shown(key)} is no key; give KEY=VALUE, with a key of conf/")
    elif sweep and "," in value:
        why = f"Hydra cannot read these values ({parsed}); quote each text by itself"
        # Where a text begins and ends is plain only without brackets and quotes.
        texts = ["…", "…"] if _GROUPING.search(_plain(value)) else _COMMA.split(value)
        mend = shlex.quote(f"{key}={','.join(map(_suggested, texts))}")
    else:
        why = f"Hydra cannot read this value ({parsed}); if it is text, quote it"
    raise UserError(_shown(f"{argument}: {why}: ") + (mend if mend.isprintable() else f"'{key}=\"…\"'"))


def _parse(override: str) -> Override | str:
    """What Hydra parses, or the reason why it cannot."""
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        token = getattr(error.__cause__, "offendingToken", None)
        at = token.start if token is not None else getattr(error.__cause__, "startIndex", None)
        return (
            str(error) if at is None else f"it stops at {override[at:]}" if override[at:] else "something is not closed"
        )


def _suggested(value: str) -> str:
    """A value in quotes. A complete interpolation stays one: nobody means it as text."""
    return _quoted(value) if _INTERPOLATION.search(value) else literal(value)


def _plain(value: str) -> str:
    return _INTERPOLATION.sub("", value)


def _shown(text: str) -> str:
    """`text` in one line, with control characters escaped."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def _quoted(text: str) -> str:
    return QuotedString(text, Quote.double).with_quotes()
