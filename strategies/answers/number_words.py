"""Numbers written in words: twelve, zweiundvierzig, quatre-vingt-dix, treinta y dos, 一百二十三.

`read_words` reads the number at the beginning of a text, `find_words` the first one in it. English is
recognised anywhere in a sentence; words of other languages ("due", "once" and "elf" are English words too)
only where they are all of the text up to a unit. Leaves out ordinals and digits.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

WORDS_CHARACTERS = 200  # only the beginning of a text is searched for words
_WORD_CHARACTERS = 60  # longest compound


def _table(units: str, tens: str, scales: str, more: str = "") -> dict[str, int]:
    """Words for 0, 1, 2 ..., for 20, 30, ... 90, and `word=value` for the rest; `/` parts other spellings."""
    table: dict[str, int] = {}
    for values, words in ((range(len(units.split())), units), (range(20, 100, 10), tens)):
        for value, spellings in zip(values, words.split(), strict=False):
            table |= dict.fromkeys(spellings.split("/"), value)
    for pair in f"{scales} {more}".split():
        word, _, number = pair.partition("=")
        table[word] = int(number)
    return table


_ENGLISH = _table(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    " seventeen eighteen nineteen",
    "twenty thirty forty/fourty fifty sixty seventy eighty ninety",
    "hundred=100 thousand=1000 million=1000000 billion=1000000000 trillion=1000000000000 dozen=12",
)
_OTHERS = (
    _table(
        "null eins/ein/eine/einen zwei drei vier fünf sechs/sech sieben/sieb acht neun zehn elf zwölf"
        " dreizehn"
        " vierzehn fünfzehn sechzehn siebzehn achtzehn neunzehn",
        "zwanzig dreißig/dreissig vierzig fünfzig sechzig siebzig achtzig neunzig",
        "hundert=100 tausend=1000 million=1000000 millionen=1000000 milliarde=1000000000",
        "milliarden=1000000000 und=0",
    ),
    _table(
        "zéro un/une deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize",
        "vingt/vingts trente quarante cinquante soixante septante huitante/octante nonante",
        "cent=100 cents=100 mille=1000 million=1000000 millions=1000000 milliard=1000000000 et=0",
    ),
    _table(
        "cero uno/un/una dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince"
        " dieciséis/dieciseis diecisiete dieciocho diecinueve",
        "veinte/veinti treinta cuarenta cincuenta sesenta setenta ochenta noventa",
        "cien=100 ciento=100 doscientos=200 trescientos=300 cuatrocientos=400 quinientos=500 seiscientos=600",
        "setecientos=700 ochocientos=800 novecientos=900 mil=1000 millón=1000000 millones=1000000 y=0",
    ),
    _table(
        "zero uno/un/una due tre/tré quattro cinque sei sette otto nove dieci undici dodici tredici"
        " quattordici"
        " quindici sedici diciassette diciotto diciannove",
        "venti/vent trenta/trent quaranta/quarant cinquanta/cinquant sessanta/sessant settanta/settant"
        " ottanta/ottant novanta/novant",
        "cento=100 mille=1000 mila=1000 milione=1000000 milioni=1000000 e=0",
    ),
    _table(
        "zero um/uma dois/duas três quatro cinco seis sete oito nove dez onze doze treze catorze/quatorze"
        " quinze dezesseis/dezasseis dezessete/dezassete dezoito dezenove/dezanove",
        "vinte trinta quarenta cinquenta/cinqüenta sessenta setenta oitenta noventa",
        "cem=100 cento=100 duzentos=200 trezentos=300 quatrocentos=400 quinhentos=500 seiscentos=600",
        "setecentos=700 oitocentos=800 novecentos=900 mil=1000 milhão=1000000 milhões=1000000 e=0",
    ),
    _table(
        "nul een/één twee drie vier vijf zes zeven acht negen tien elf twaalf dertien veertien vijftien"
        " zestien"
        " zeventien achttien negentien",
        "twintig dertig veertig vijftig zestig zeventig tachtig negentig",
        "honderd=100 duizend=1000 miljoen=1000000 miljard=1000000000 en=0 ën=0",
    ),
    _table(
        "ноль/нуль один/одна/одно два/две три четыре пять шесть семь восемь девять десять одиннадцать"
        " двенадцать"
        " тринадцать четырнадцать пятнадцать шестнадцать семнадцать восемнадцать девятнадцать",
        "двадцать тридцать сорок пятьдесят шестьдесят семьдесят восемьдесят девяносто",
        "сто=100 двести=200 триста=300 четыреста=400 пятьсот=500 шестьсот=600 семьсот=700 восемьсот=800",
        "девятьсот=900 тысяча=1000 тысячи=1000 тысяч=1000 миллион=1000000 миллиона=1000000 миллионов=1000000",
    ),
    _table(
        "zero jeden/jedna/jedno dwa/dwie trzy cztery pięć sześć siedem osiem dziewięć dziesięć jedenaście"
        " dwanaście trzynaście czternaście piętnaście szesnaście siedemnaście osiemnaście dziewiętnaście",
        "dwadzieścia trzydzieści czterdzieści pięćdziesiąt sześćdziesiąt siedemdziesiąt osiemdziesiąt"
        " dziewięćdziesiąt",
        "sto=100 dwieście=200 trzysta=300 czterysta=400 pięćset=500 tysiąc=1000 tysiące=1000 tysięcy=1000",
    ),
    _table(
        "noll en/ett två tre fyra fem sex sju åtta nio tio elva tolv tretton fjorton femton sexton sjutton"
        " arton"
        " nitton",
        "tjugo trettio fyrtio femtio sextio sjuttio åttio nittio",
        "hundra=100 tusen=1000 miljon=1000000 miljoner=1000000",
    ),
    _table(
        "sıfır bir iki üç dört beş altı yedi sekiz dokuz on",
        "yirmi otuz kırk elli altmış yetmiş seksen doksan",
        "yüz=100 bin=1000 milyon=1000000",
    ),
)
_TOKEN = re.compile(r"[^\W\d_]{1,60}")
_ENGLISH_WORD = "|".join(sorted(_ENGLISH, key=len, reverse=True))
_ENGLISH_NEXT = re.compile(rf"\s(?:{_ENGLISH_WORD})\b", re.IGNORECASE)
_HALF = re.compile(
    r"^[\s-]{1,2}and\s(?:a|one)[\s-](half|quarter|third)\b|^[\s-]{1,2}and\sthree[\s-](quarters)\b", re.I
)
_PARTS = re.compile(
    r"(?:(?P<half>half|one[\s-]half|a half)|(?P<top>one|two|three|four|five|a)[\s-]"
    r"(?P<part>halves|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?))\b",
    re.IGNORECASE,
)
_PART_SIZES = {
    "hal": 2,
    "thi": 3,
    "qua": 4,
    "fou": 4,
    "fif": 5,
    "six": 6,
    "sev": 7,
    "eig": 8,
    "nin": 9,
    "ten": 10,
}
_IS_ONE = re.compile(r"(?:^|\b(?:is|are|be|was|only|exactly|just|has|equals)\s)$", re.IGNORECASE)
_MINUS = re.compile(r"\s{0,3}(minus|negative|moins|menos|meno|min|минус|eksi)\s", re.IGNORECASE)
_CJK_DIGITS = {letter: value for value, letter in enumerate("零一二三四五六七八九")} | {
    "〇": 0,
    "两": 2,
    "兩": 2,
    "壱": 1,
    "弐": 2,
    "参": 3,
}
_CJK_TENS = {"十": 10, "百": 100, "千": 1000}
_CJK_SCALES = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
CJK_NUMERAL = re.compile(
    "[负負]?[零〇一二三四五六七八九两兩壱弐参十百千万萬亿億]{1,30}(?:点[零〇一二三四五六七八九]{1,20})?"
)

_CJK_PARTS = re.compile("([零一二三四五六七八九十百千]{1,9})分之([零一二三四五六七八九十百千]{1,9})")
# Korean: Chinese numerals in Hangul, and its own up to 99, mostly before a counter.
_SINO = str.maketrans("영공일이삼사오육륙칠팔구십백천만억", "零零一二三四五六六七八九十百千万亿")
_OWN_TENS = {
    "열": 10,
    "스물": 20,
    "스무": 20,
    "서른": 30,
    "마흔": 40,
    "쉰": 50,
    "예순": 60,
    "일흔": 70,
    "여든": 80,
    "아흔": 90,
}
_OWN_UNITS = {
    "하나": 1,
    "둘": 2,
    "셋": 3,
    "넷": 4,
    "다섯": 5,
    "여섯": 6,
    "일곱": 7,
    "여덟": 8,
    "아홉": 9,
    "한": 1,
    "두": 2,
    "세": 3,
    "네": 4,
}
_BEFORE_COUNTERS = ("한", "두", "세", "네")
_KOREAN = re.compile(
    r"(?<!\w)(?:(?P<sino>(?:[영공일이삼사오육륙칠팔구십백천만억]|(?<=[만억])\s){1,30})"
    rf"|(?P<hundred>백)?(?P<tens>{'|'.join(_OWN_TENS)})?(?P<unit>{'|'.join(_OWN_UNITS)})?)"
    r"\s?(?P<counter>개월|개|명|원|살|권|마리|번|시간|분|초|일|년|월|달러|센트|킬로미터|미터|그램|킬로그램|리터|대|잔|장|송이|자루"
    r"|그루|퍼센트|가지|사람|점|쪽|팀|도|배)?(?P<end>입니다|이다|이에요|예요|이었습니다|이야|임|의|가|이|를|을|은|는|로|씩)?(?!\w)"
)


def read_words(text: str) -> Fraction | None:
    """The number in words that a text begins with; outside English, only one that it consists of."""
    text = text[:WORDS_CHARACTERS].strip(" .,;:!\"'()*$。")
    sign = 1
    if minus := _MINUS.match(f"{text} "):
        sign, text = -1, text[minus.end() :]
    if parts := _CJK_PARTS.match(text):
        top, bottom = _cjk(parts[2]), _cjk(parts[1])
        if parts[1] == "百":  # a percentage
            return top
        return top / bottom if top is not None and bottom else None
    if numeral := CJK_NUMERAL.match(text):
        return _cjk(numeral[0])
    if (korean := _KOREAN.match(text)) and (korean["counter"] or korean.end() == len(text)):
        return _korean(korean)
    number = _english(text)
    if number is None:
        number = _other(text.casefold())
    return None if number is None else sign * number


def find_words(text: str) -> Fraction | None:
    """The first number in words: one that begins the text, else an English one, else Chinese numerals.

    A lone "one", "a" or Chinese numeral inside a text is hardly ever a quantity and is left out.
    """
    number = read_words(text)
    if number is not None:
        return number
    text = text[:WORDS_CHARACTERS]
    for match in re.finditer(
        rf"\b(?:(minus|negative)\s)?(?=(?:{_ENGLISH_WORD}|half)\b)", text, re.IGNORECASE
    ):
        number = _english(text[match.end() :])
        lone = number == 1 and not _IS_ONE.search(text[: match.start()])
        if number is not None and not lone:
            return -number if match[1] else number
    counted = [each for each in _KOREAN.finditer(text) if each["counter"] and _korean(each) is not None]
    if counted:
        return _korean(counted[-1])
    found = [each for each in CJK_NUMERAL.findall(text) if len(each) > 1 or each in _CJK_TENS]
    return _cjk(found[-1]) if found else None


def _korean(match: re.Match[str]) -> Fraction | None:
    """Of 이만 오천 and 열다섯; several digits without a ten, hundred ... ("오이") are a word."""
    if sino := (match["sino"] or "").replace(" ", ""):
        return _cjk(sino.translate(_SINO)) if len(sino) == 1 or re.search("[십백천만억]", sino) else None
    if not (match["tens"] or match["unit"]):
        return None
    if match["unit"] in _BEFORE_COUNTERS and not (match["tens"] or match["counter"]):
        return None
    hundred = 100 if match["hundred"] else 0
    return Fraction(hundred + _OWN_TENS.get(match["tens"] or "", 0) + _OWN_UNITS.get(match["unit"] or "", 0))


def _english(text: str) -> Fraction | None:
    if part := _PARTS.match(text):
        if part["half"]:
            return Fraction(1, 2)
        top = 1 if part["top"].lower() == "a" else _ENGLISH[part["top"].lower()]
        return Fraction(top, _PART_SIZES[part["part"][:3].lower()])
    if re.match(r"an?\s(?:hundred|thousand|million|billion|dozen)\b", text, re.IGNORECASE):
        text = "one" + text[text.index(" ") :]
    values, end = [], 0
    for token in _TOKEN.finditer(text):
        word = token[0].lower()
        between = text[end : token.start()]
        if end and (between.strip(" -") or len(between) > 3):
            break
        if word in _ENGLISH:
            values.append(_ENGLISH[word])
            end = token.end()
        elif word == "and" and values and values[-1] >= 100 and _ENGLISH_NEXT.match(text, token.end()):
            end = token.end()
        else:
            break
    if not values:
        return None
    if point := re.match(r"\s?point\s", text[end:]):
        return _with_decimals(values, text[end + point.end() :])
    number = Fraction(_sum(values))
    if half := _HALF.match(text[end:]):
        number += {"half": Fraction(1, 2), "quarter": Fraction(1, 4), "third": Fraction(1, 3)}.get(
            (half[1] or "").lower(), Fraction(3, 4)
        )
    return number


def _with_decimals(values: list[int], text: str) -> Fraction:
    """Three point one four."""
    digits = ""
    for word in text.split():
        value = _ENGLISH.get(word.lower().strip(".,;"))
        if value is None or value > 9:
            break
        digits += str(value)
    return Fraction(f"{_sum(values)}.{digits or 0}")


def _sum(values: list[int], *, french: bool = False) -> int:
    """Two hundred and five: smaller numbers are added, hundreds and larger ones multiply what came before."""
    total = current = 0
    for value in values:
        if value == 100:
            current = (current or 1) * 100
        elif value >= 1000:
            total, current = total + (current or 1) * value, 0
        elif value == 12 and 0 < current < 12 and not french:
            current *= 12  # two dozen
        elif french and value == 20 and current % 100 == 4:
            current += 76  # quatre-vingts
        else:
            current += value
    return total + current


def _other(text: str) -> Fraction | None:
    """A number in another language at the beginning, followed by one word at most."""
    for index, table in enumerate(_OTHERS):
        values: list[int] = []
        rest = 0
        for token in _TOKEN.finditer(text):
            pieces = _split(token[0], index) if not rest else None
            if pieces is None:
                rest += 1
                if rest > 1:
                    break
            else:
                values += pieces
        if values and rest <= 1 and _split((_TOKEN.search(text) or [""])[0], index) is not None:
            return Fraction(
                _sum([value for value in values if value or values == [0]], french=table is _OTHERS[1])
            )
    return None


@lru_cache(maxsize=1000)
def _split(word: str, index: int) -> tuple[int, ...] | None:
    """The values of a compound (`zwei-und-vierzig`), by the longest parts first; None if it is no number."""
    table = _OTHERS[index]
    if word in table:
        return (table[word],)
    if len(word) > _WORD_CHARACTERS:
        return None
    # best[i]: the parts of the first i letters, longest part last; every prefix is tried once.
    best: list[tuple[int, ...] | None] = [(), *[None] * len(word)]
    for end in range(1, len(word) + 1):
        for begin in range(max(0, end - 20), end):
            before = best[begin]
            if before is not None and word[begin:end] in table:
                best[end] = (*before, table[word[begin:end]])
                break
    return best[-1]


def _cjk(numeral: str) -> Fraction | None:
    """Of 一百二十三, 二〇二四, 三点五, 十五万."""
    sign = -1 if numeral[0] in "负負" else 1
    whole, _, decimals = numeral.lstrip("负負").partition("点")
    if not whole:
        return None
    if len(whole) > 1 and all(letter in _CJK_DIGITS for letter in whole):  # digit by digit
        total = int("".join(str(_CJK_DIGITS[letter]) for letter in whole))
    else:
        total = section = digit = 0
        for letter in whole:
            if letter in _CJK_DIGITS:
                digit = _CJK_DIGITS[letter]
            elif letter in _CJK_TENS:
                section, digit = section + (digit or 1) * _CJK_TENS[letter], 0
            else:
                scale, section, digit = _CJK_SCALES[letter], section + digit, 0
                below = 0 < total < scale  # 三千万亿
                total = (total + section) * scale if below else total + (section or 1) * scale
                section = 0
        total += section + digit
    tail = "".join(str(_CJK_DIGITS[letter]) for letter in decimals)
    return sign * Fraction(f"{total}.{tail or 0}")
