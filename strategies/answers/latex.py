"""LaTeX and typographic spellings of numbers, in the plain spelling that `numbers` reads.

`clean` unwraps text commands, spells fractions, powers of ten and repeating decimals with ASCII, joins groups
of digits, and drops currency signs. Each step is one pass of a pattern. Leaves out formulas (`expressions`).
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from viaticum.strategies.answers.expressions import SUPERSCRIPTS

LATEX_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|tt|sf|normal)?|math(?:rm|bf|it|sf|tt|bb|cal)|[mh]box|operatorname|emph|underline"
    r"|boldsymbol|bm|boxed|fbox)\*?\s?\{([^{}]*)\}"
)
_COLOUR = re.compile(r"\\(?:textcolor|color|colorbox)\s?\{[^{}]{0,30}\}\s?(?:\{([^{}]*)\})?")
_SWITCH = re.compile(
    r"\\(?:bf|it|rm|displaystyle|textstyle|large|Large|huge|small|quad|qquad|left|right|limits)(?![A-Za-z])"
)
_SPACE = re.compile(r"\\[,;:> ]|~|\\\(|\\\)|\\\[|\\\]|\\(?:thin|med|thick)?space(?![A-Za-z])")
_NO_SPACE = re.compile(r"\\!")
_GROUP_SPACE = re.compile(r"(?<=\d)(?:\\[,;:> ]|~|[\u00a0\u2007\u2009\u202f])(?=\d{3}(?!\d))")
_PLAIN_GROUPS = re.compile(
    r"(?<![\d.,/-])(?<!\d )([1-9]\d{0,2})((?: \d{3})+)(?![\d.]*\d|,\d|\s?/\s?\d|\s\d|-\w)"
)
_QUOTE_GROUPS = re.compile(r"(?<![\d.,])(\d{1,3})((?:['’ʼ_]\d{3})+)(?!\d)")
_INDIAN_GROUPS = re.compile(r"(?<![\d.,])(\d{1,2})((?:,\d{2})+)(,\d{3})(?![\d,])")
_FRACTION = re.compile(
    r"(\d\s?)?\\(?:[dtcs]?frac|nicefrac)\s?"
    r"(?:\{\s?([-+]?[\d.,]{1,50})\s?\}|\s?(\d))\s?(?:\{\s?([-+]?[\d.,]{1,50})\s?\}|\s?(\d)(?!\d))"
)
_OVER = re.compile(r"\{\s?([-+]?\d{1,50})\s?\\over\s?([-+]?\d{1,50})\s?\}")
_POWER_OF_TEN = re.compile(
    r"(?<![\w.,/^])(\d[\d,]{0,50}(?:\.\d{1,50})?)\s?(?:×|·|\*|x|⋅|\\times|\\cdot)\s?10\s?"
    r"(?:(?:\^|\*\*)\s?(\{\s?[-+]?\d{1,3}\s?\}|\([-+]?\d{1,3}\)|[-+]?\d{1,3}(?!\d))|([⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,3}))"
)
_REPEATING = re.compile(r"(?<![\d.])(\d{0,15})\.(\d{0,15})\\(?:overline|bar|dot)\s?\{?\s?(\d{1,15})\s?\}?")
_ONE_CHARACTER_FRACTION = re.compile(r"(\d\s?)?([¼-¾⅐-⅞])")
_DEGREES = re.compile(
    r"\s?\^\s?(?:\\circ(?![A-Za-z])|\{\s?\\circ\s?\})|\\degree(?![A-Za-z])|\\textdegree(?![A-Za-z])"
)
_CURRENCY_NAME = (
    r"(?:US|A|C|R|HK|NZ|S)\\?\$(?=\s?\d)|(?:USD|EUR|GBP|INR|CHF|CAD|AUD|JPY|CNY|RMB|Rs\.?)(?=\s?\d)"
)
_SIGNED_CURRENCY = re.compile(rf"(?<![\w.)])([-+])\s?(?:{_CURRENCY_NAME}|\\?[$€£¥₹₩₽₺])\s?")
_MONEY_SCALE = re.compile(r"(?<=[$€£¥₹])(\s?\d[\d.,]{0,20})\s?(k|K|M|mn|B|bn|T)\b")
_CURRENCY = re.compile(rf"(?<![A-Za-z])(?:{_CURRENCY_NAME})|\\?[$€£¥₹₩₽₺]|\\(?:pounds|euro)(?![A-Za-z])")
_EURO_COMMA = re.compile(
    r"(?<![\d.,])(?<!\d )(\d{1,6}),(\d{1,2})(?=\s?(?:€|EUR\b|[Ee]uros?\b|zł|kr\b|₽|руб))|(?<=R\$"
    r" )(\d{1,6}),(\d{2})(?!\d)"
)
_CJK_PART = r"(\d[\d,]{0,20}(?:\.\d{1,20})?)\s?((?:[万萬亿億조만억兆]|百(?!分)|千(?![克米瓦卡焦字])){1,2})"
_CJK_SCALE = re.compile(rf"(?:{_CJK_PART}\s?){{1,5}}(?:(\d{{1,4}})(?![\d.,]))?")
_CJK_SCALE_PART = re.compile(_CJK_PART)
_CJK_SCALES = {
    "百": 2,
    "千": 3,
    "万": 4,
    "萬": 4,
    "만": 4,
    "亿": 8,
    "億": 8,
    "억": 8,
    "兆": 12,
    "조": 12,
}
_NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # scripts
_GLUED = re.compile(rf"(?<=[{_NO_SPACES}])(?=[-+]?[\d$])|(?<=[\d%])(?=[{_NO_SPACES}])")
_MINUS = re.compile(
    r"(?<![\w)]\s)(?<![\w)])[负負]\s?(?=\d)|(?<![\d)}]\s)\b(?:minus|negative|moins|menos|meno|минус)\s(?=[\d$])"
    r"|マイナス\s?(?=\d)",
    re.I,
)
_SIGNS = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "﹣": "-",
        "－": "-",
        "‐": "-",
        "‑": "-",
        "₋": "-",
        "⁄": "/",
        "∕": "/",
        "٫": ".",
        "٬": ",",
        "٪": "%",
        "％": "%",
        "，": ",",
        "．": ".",
        "、": ", ",
        "′": "'",
        "∶": ":",
        **{chr(0x2460 + index): f" {index + 1} " for index in range(20)},  # in circles
        "\u2008": " ",
        "\u200a": " ",
        "\u205f": " ",
    }
)
_WIDE_SPACE = re.compile("[\u00a0\u2000-\u200a\u202f\u3000]")
# What `clean` changes; most answers contain none of it.
_UNCLEAN = re.compile(
    r"[^\x00-\x7f]|[\\^*~${'_]|\d \d|\d,\d\d,|\b(?:minus|negative)\b|[A-Z]{3}", re.IGNORECASE
)


def clean(text: str) -> str:
    """Text with its numbers in plain spelling and without LaTeX wrappers and currency signs."""
    if _UNCLEAN.search(text) is None:
        return text
    if not text.isascii():
        text = _ascii_numbers(text)
    text = _NO_SPACE.sub("", text.replace("{,}", ",").replace("{.}", "."))
    text = _GROUP_SPACE.sub("", text)
    for pattern in (_QUOTE_GROUPS, _INDIAN_GROUPS, _PLAIN_GROUPS):
        text = pattern.sub(_join_groups, text)
    if "\\" in text:
        text = _COLOUR.sub(lambda match: match[1] or "", _SWITCH.sub(" ", text))
        text = _REPEATING.sub(_spell_repeating, _DEGREES.sub("°", text))
        for _ in range(2):  # wrappers inside wrappers
            text = LATEX_TEXT.sub(r" \1", text)
        text = _OVER.sub(r"\1/\2", text)
    text = _POWER_OF_TEN.sub(
        _write_exponent, _ONE_CHARACTER_FRACTION.sub(_spell_fraction, _DEGREES.sub("°", text))
    )
    if "\\" in text or "~" in text:
        text = _SPACE.sub(" ", _FRACTION.sub(_spell_latex_fraction, text)).replace("\\%", "%")
    text = _EURO_COMMA.sub(lambda each: each[0].replace(",", "."), text)
    text = _MONEY_SCALE.sub(_spell_scale, text)
    text = _CURRENCY.sub(" ", _SIGNED_CURRENCY.sub(r"\1", text))
    return _MINUS.sub("-", text)


def _ascii_numbers(text: str) -> str:
    text = text.translate(_SIGNS)
    text = "".join(
        str(unicodedata.decimal(letter)) if letter > "\x7f" and letter.isdecimal() else letter
        for letter in text
    )
    text = _WIDE_SPACE.sub(" ", _GROUP_SPACE.sub("", text))
    return _GLUED.sub(" ", _CJK_SCALE.sub(_write_cjk_scale, text))


def _join_groups(match: re.Match[str]) -> str:
    return re.sub(r"[^\d]", "", match[0])


def _spell_latex_fraction(match: re.Match[str]) -> str:
    r"""`3\frac{1}{2}` as 3 1/2."""
    whole = f"{match[1].strip()} " if match[1] else ""
    top, bottom = (match[2] or match[3]).replace(",", ""), (match[4] or match[5]).replace(",", "")
    if bottom.startswith("-"):
        top, bottom = (top[1:] if top.startswith("-") else f"-{top}"), bottom[1:]
    return f"{whole}{top}/{bottom}"


def _spell_repeating(match: re.Match[str]) -> str:
    r"""`0.1\overline{6}` as 15/90."""
    whole, fixed, repeated = match[1] or "0", match[2], match[3]
    bottom = (10 ** len(repeated) - 1) * 10 ** len(fixed)
    return f"{int(whole + fixed + repeated) - int(whole + fixed)}/{bottom}"


def _spell_scale(match: re.Match[str]) -> str:
    names = {"k": "thousand", "m": "million", "b": "billion", "t": "trillion"}
    return f"{match[1]} {names[match[2][0].lower()]}"


def _write_cjk_scale(match: re.Match[str]) -> str:
    """1.5亿 as 150000000, 3万5千 as 35000."""
    number = Fraction(match[3] or 0)
    for part in _CJK_SCALE_PART.finditer(match[0]):
        number += Fraction(part[1].replace(",", "")) * 10 ** sum(_CJK_SCALES[letter] for letter in part[2])
    return f"{number} " if number.denominator == 1 else f"{float(number)} "


def _write_exponent(match: re.Match[str]) -> str:
    """3 x 10^8 as 3e8."""
    exponent = (match[2] or match[3].translate(SUPERSCRIPTS)).strip("{}() ")
    return f"{match[1]}e{exponent} "


def _spell_fraction(match: re.Match[str]) -> str:
    """2½ as 2 1/2."""
    whole = f"{match[1].strip()} " if match[1] else ""
    return whole + unicodedata.normalize("NFKC", match[2]).replace("\N{FRACTION SLASH}", "/")
