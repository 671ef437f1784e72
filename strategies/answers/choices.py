"""The letter, digit or Roman numeral of a choice in a statement, and yes or no.

`read_choice` reads what follows "The answer is"; `guess_choice` looks through a text without such a
statement. Several letters ("A and B") and refusals ("I don't know") are no choice. Knows nothing of the
question's own labels, so a letter is any from A to Z.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import pairwise

from viaticum.strategies.answers.languages import GOES_ON, REFUSAL, SENTENCE_END
from viaticum.strategies.answers.latex import clean

NO_CHOICE = ""  # the statement says that there is no single choice

# Letters of other alphabets that label choices. Cyrillic ones that look Latin are taken for Latin.
_OTHER_LETTERS = str.maketrans(
    dict(zip("АВСЕКМНОРТХД", "ABCEKMHOPTXD", strict=True))
    | {
        letter: label
        for letters in ("أبجد", "אבגד", "অবডঢ", "কখগঘ", "कखगघ")
        for letter, label in zip(letters, "ABCD", strict=True)
    }
)
# Labels that only Cyrillic has stay as they are: in А, Б, В, Г the third is written "B", as its gold is.
_CAPITAL, _ANY = "A-ZБГЖЗ", "A-Za-zБГЖЗбгжз"
_WORD = re.compile(  # a preposition or conjunction of one letter that begins a Russian sentence
    r"(?:^|(?<=[.!?;:\n]\s)|(?<=\n))[АВСКО]\s(?=[а-яё]{2})(?!(?:не)?(?:верн|правильн|явля|подход))"
)
_SMALL = re.compile(r"(?<![^\W\d_])[авсекд](?=\s?\))")
_LETTER = (
    rf"(?<![A-Za-zА-яЁё\\])(?<![A-Za-z]['’])([{_CAPITAL}])(?![A-Za-zА-яЁё_^{{]|['’](?!y?[iıuü]\s)[A-Za-z])"
)
_TOKEN = re.compile(rf"{_LETTER}|\(([{_ANY}])\)|(?:option|choice)\s([a-z])(?![A-Za-z])")
_LABEL = re.compile(  # at the beginning, with something that ends a label
    r"^[\s(\[{<\"'*:.#-]{0,8}(?:(?:option|choice|answer|letter|opción|opción|opção|option|réponse|antwort|选项"
    r"|選項|варіант|вариант)\s{0,2}"
    r"[\s(\[{<\"'*:#-]{0,6})?"
    rf"([{_ANY}])\s?(?:[)\]}}>]|[.:](?!\w)|\s[-–—]\s|[-–—]\s|$)",
    re.IGNORECASE,
)
_ALONE = re.compile(rf"^[\s(\[{{<\"'*:.#_-]{{0,8}}([{_ANY}])[\s)\]}}>\"'*:.,;!_。．、-]{{0,8}}$")
_ROMAN = re.compile(
    r"^[\s(\[\"'*:.]{0,6}(?:(?:option|choice|statement)\s)?\(?(i{1,3}|iv|vi{0,3}|ix|x)(?=[\s)\].,:;]"
    r"|$)(?!\s[a-z])",
    re.I,
)
_DIGIT = re.compile(
    r"^[\s(\[\"'*:.#]{0,6}(?:(?:option|choice|number|no\.?|第)\s?)?[\s(\[]{0,3}(\d{1,2})(?=[\s)\].,:;]|$"
    r"|[^\W\d_])(?!\.\d|,\d)",
    re.I,
)
_OPTION_DIGIT = re.compile(r"\b(?:option|choice|answer)\s\(?(\d{1,2})\)?(?![\w.,]\d)", re.IGNORECASE)
_NOT_BEFORE = re.compile(
    r"(?:\b(?:not|n't|never|neither|nor|rul(?:e|es|ed|ing) out|eliminat\w{1,4}|exclud\w{1,4}|reject\w{0,3}"
    r"|rather than"
    r"|instead of|unlike|except|other than|cannot be|can't be|isn't|wasn't|discard\w{0,3}|dismiss\w{0,3}"
    r"|over|against"
    r"|nicht|kein|pas|no es|не)\b[^.;!?\n]{0,24}|(?:不是|并非|排除|而不是|ではなく)[^。；\n]{0,6})$",
    re.IGNORECASE,
)
_BUT = re.compile(
    r"\b(?:but|leaving|leaves|so|therefore|sondern|mais|sino|а|rather)\b|而是|,\s(?:it|the answer)",
    re.IGNORECASE,
)
_NOT_AFTER = re.compile(
    r"^[\s)\"'*]{0,4}(?:(?:is|are|was|were|seems|looks|can be|must be|would be)\s(?:\w{1,12}\s)?"
    r"(?:incorrect|wrong|false|not|eliminated|ruled|out|impossible|invalid|excluded|a trap|a distractor|too"
    r"|also wrong)\b"
    r"|(?:isn't|wasn't|can't|cannot|does not|doesn't|fails)\b"
    r"|[不错錯][对正误確誤]?|(?:项|選項|选项)?(?:错误|不正确|不对|排除))",
    re.IGNORECASE,
)
_RIGHT_AFTER = re.compile(
    r"^[\s)\"'*]{0,4}(?:(?:is|seems|looks|would be|must be)\s(?:\w{1,12}\s)?(?:correct|right|true|best|the"
    r" answer)\b"
    r"|(?:项|選項|选项)?(?:正确|正しい|是对的)|fits\b|选项|項|项"
    r"|верен\b|верно\b|верный\b|является правильн|이다|입니다|이에요|예요|[가이]\s(?:맞|정답|옳)"
    r"|[을를]?\s?(?:선택|고르|고릅|골)"
    r"|を選|['’]?y?[iıuü]?\sseç|\sको चुन"
    r"|\sرا انتخاب|-[etá]{1,3}\sválaszt|ist richtig|est correcte?|es correcta|é a correta)",
    re.IGNORECASE,
)
_CHOSEN_BEFORE = re.compile(
    r"(?:\b(?:option|choice|answer|letter|so|hence|thus|therefore|it's|it is|is|be|with|pick|choose|select"
    r"|chose|prefer"
    r"|say|guess|for|leaving|leaves|left|then|but|only|instead|rather|→|=>|opción|opção"
    r"|вариант|ответ|варіант|верно|правильно|это)\b[\s:,(\[\"'*]{1,4}"
    r"|[选選択項项为為是][\s:(\[]{0,3}|→\s?|=>\s?|\()$",
    re.IGNORECASE,
)
_JOINED = re.compile(
    r"^[\s)\]*,]{0,4}(?:and|or|und|oder|et|ou|y|o|e|и|или|和|或|&|/|,|\+|、)[\s(\[*]{0,4}(?:option\s)?$",
    re.IGNORECASE,
)
_NOTHING_AFTER = re.compile(
    r"^[\s)\]}>\"'*]{0,4}(?:$|[.,;:!)\]—–-]|(?:because|since|as|is|and|or|but|due|for|which|with|by|fits"
    r"|not)\b)",
    re.I,
)
_FORMULA = re.compile(r"\\[A-Za-z]|[=^<>≪≫_]")

_NEXT_OPTION = re.compile(
    rf"\b(?:(?:next|now|lastly)[,:]?\s(?:(?:for|to|is|comes|option|choice|answer|statement)\s){{0,3}}"
    r"|(?:consider\w{0,3}|look\w{0,3} at|examin\w{1,3}|check\w{0,3}|evaluat\w{1,3}|turn\w{0,3} to|as for"
    r"|what about"
    r"|mov\w{1,3} (?:on )?to|analy[sz]\w{1,3}|discuss\w{0,3})\s(?:\w{1,12}\s){0,2})"
    rf"\(?(?-i:[{_CAPITAL}])\)?[\s:,]*$",
    re.IGNORECASE,
)
_LISTED = re.compile(rf"\s*\(?([{_CAPITAL}])([.):])")
_BEGUN = re.compile(rf"\W{{0,3}}(?:[Oo]ption\s|[Cc]hoice\s)?\(?([{_CAPITAL}])\)?\s(?=[a-z])")
_LABELS = re.compile(
    rf"\W{{0,4}}(?:(?:options?|choices?|answers?)\s)?\(?[{_ANY}]\)?"
    rf"(?:\s?(?:[,;/&+、]\s?(?:and\s)?|\s(?:and|und|et|y|e|и)\s|[和및と])\s?\(?[{_ANY}]\)?){{1,20}}\W{{0,4}}"
)
_ANSWER_LABEL = re.compile(
    r"^\W{0,4}(?:(?:option|choice|answer)(?![a-z]))?[\s:]{0,3}[(\[]?\s?"
    rf"([{_CAPITAL}]|\d{{1,2}})\s?(?:[)\].:]|\W{{0,4}}$)",
    re.IGNORECASE,
)


def labels(answer: str) -> str | None:
    """The label of an answer to a choice; of several, such as "C and A" or "AC", all in order: "A, C"."""
    text = _readable(answer).strip()
    if _LABELS.fullmatch(text) or (re.fullmatch(r"[A-H]{2,8}", text) and len(set(text)) == len(text)):
        text = re.sub(r"(?i)options?|choices?|answers?|\b(?:and|und|et|y|e|и)\b", " ", text)
        return ", ".join(sorted({letter.upper() for letter in re.findall(rf"[{_ANY}]", text)}))
    match = _ANSWER_LABEL.search(text)
    return match[1].upper() if match else None


def read_choice(text: str, *, digits: bool = True) -> str | None:
    """The choice that a statement names; `NO_CHOICE` for none or several; None if it is not about one."""
    text = _readable(text)
    if (label := _LABEL.match(text)) or (label := _ALONE.match(text)):
        first = label[1]
        rest = text[label.end(1) :]
        pronoun = first == "I" and re.match(r"\s[a-z']", rest)
        if not pronoun and not _several(rest):
            return first.upper()
    sentences = [each for each in SENTENCE_END.split(text) if each.strip()]
    refused = False
    for sentence in sentences[:6]:
        found = _letters(sentence)
        if found == NO_CHOICE:
            return NO_CHOICE
        if found is not None:
            return found
        refused = refused or REFUSAL.search(sentence) is not None
    if refused:
        return NO_CHOICE
    if (roman := _ROMAN.match(text)) and len(roman[1]) > 1:
        return roman[1].upper()
    return (
        digit[1].lstrip("0") or "0"
        if digits and (digit := _DIGIT.match(text) or _OPTION_DIGIT.search(text))
        else None
    )


def whole_choice(text: str) -> str | None:
    """The label of a choice at the beginning of an answer ("(B) blue" or "b", "2", "iii"), else None."""
    found = read_choice(text)
    return found or None


def guess_choice(text: str) -> str | None:
    """The choice that an unmarked text ends with: a line that is a label, else its last decided letter."""
    text = _readable(text, keep_lines=True)
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return None
    label = _LABEL.match(text) if len(lines) == 1 and len(text) <= 200 else None
    if label and (label[1] != "I" or _ALONE.match(text)) and not _several(text[label.end(1) :]):
        return label[1].upper()
    if _ends_in_options(text, lines):
        return None
    for line in reversed(lines):
        if alone := _ALONE.match(line):
            return alone[1].upper()
    if len(lines) == 1 and (digit := re.fullmatch(r"\W{0,4}(\d{1,2})\W{0,4}", lines[0])):
        return digit[1]
    for sentence in reversed([each for each in SENTENCE_END.split(text)[-200:] if each.strip()]):
        positive = [letter for letter, good, decided in _tokens(sentence) if good and decided]
        if positive:
            return positive[-1] if len(set(positive)) == 1 or not _lists(sentence) else None
        if REFUSAL.search(sentence):
            return None
    options = [digit[1] for digit in _OPTION_DIGIT.finditer(text)]
    return options[-1] if options else None


def _ends_in_options(text: str, lines: list[str]) -> bool:
    """Whether the text breaks off among the options: after "Next, option C", or with "C." below "B."."""
    if _NEXT_OPTION.search(text):
        return True
    if len(lines) > 1 and (last := _LISTED.match(lines[-1])) and not lines[-1][last.end() :].strip():
        before = _LISTED.match(lines[-2])
        if before and lines[-2][before.end() :].strip():
            return before[2] == last[2] and ord(before[1]) + 1 == ord(last[1])
    if re.search(r"[.!?。…)\]\"'*]\s*$", text):
        return False
    sentences = [each.strip() for each in SENTENCE_END.split(text)[-20:] if each.strip()]
    begun = [match[1] for each in sentences if (match := _BEGUN.match(each))]
    current = _BEGUN.match(sentences[-1]) if sentences else None
    return (
        current is not None
        and chr(ord(current[1]) - 1) in begun[:-1]
        and not any(decided for _, _, decided in _tokens(sentences[-1]))
    )


def _readable(text: str, *, keep_lines: bool = False) -> str:
    text = (
        unicodedata.normalize("NFKC", clean(text))
        if not text.isascii() or "\\" in text or "$" in text
        else text
    )
    if not text.isascii():
        text = _SMALL.sub(lambda m: m[0].upper(), _WORD.sub(lambda m: m[0].lower(), text))
        text = re.sub(
            r"(?<![^\W\d_])[^\W\d_A-Za-z](?![^\W\d_])", lambda m: m[0].translate(_OTHER_LETTERS), text
        )
    return text if keep_lines else " ".join(text.split())


def _several(rest: str) -> bool:
    """Whether another letter is joined to the one before: "A, B and C" or "A or B"."""
    other = re.match(r"^(.{1,10}?)([A-ZБГЖЗ])(?![A-Za-z'’])", rest)
    return other is not None and _JOINED.match(other[1]) is not None


def _letters(sentence: str) -> str | None:
    """The one letter of a sentence that is not denied; `NO_CHOICE` for several; None without any."""
    tokens = [token for token in _tokens(sentence) if token[1]]
    if _FORMULA.search(sentence):
        return None
    letters = list(dict.fromkeys(letter for letter, _, _ in tokens))
    if len(letters) <= 1:
        return letters[0] if letters else None
    first = re.match(rf"^\W{{0,4}}{_LETTER}", sentence)
    if first and not _several(sentence[first.end() :]):
        return letters[0]
    if _lists(sentence):
        return NO_CHOICE
    decided = [letter for letter, _, decides in tokens if decides]
    return decided[-1] if decided else letters[-1]


def _tokens(sentence: str) -> list[tuple[str, bool, bool]]:
    """Letter, whether it is not denied, and whether the words around it decide for it, of each label."""
    found = []
    for match in list(_TOKEN.finditer(sentence))[-50:]:
        letter = next(group for group in match.groups() if group)
        before, after = (
            sentence[max(0, match.start() - 60) : match.start()],
            sentence[match.end() : match.end() + 30],
        )
        bare = match[1] is not None
        if (
            bare
            and letter in "AI"
            and not _NOTHING_AFTER.match(after)
            and not re.match(r"^[^\x00-\x7f]", after.lstrip())
        ):
            continue  # an article or a pronoun
        if bare and letter == "I" and re.match(r"^\s(?:am|is|was|and|or|but|not|as)\b", after):
            continue
        if bare and re.match(r"^\s?[=+*/<>≤≥]", after):
            continue  # a variable
        denied = _NOT_AFTER.match(after) is not None
        if not denied and (no := _NOT_BEFORE.search(before)):
            denied = _BUT.search(no[0]) is None
        decided = _CHOSEN_BEFORE.search(before) is not None or _RIGHT_AFTER.match(after) is not None
        found.append((letter.upper(), not denied, decided or not bare))
    return found


def _lists(sentence: str) -> bool:
    """Whether two letters that are not denied are joined by no more than "and", "or" or a comma."""
    places = [(m.start(), m.end()) for m in _TOKEN.finditer(sentence)]
    for (_, end), (start, stop) in pairwise(places):
        if _JOINED.match(sentence[end:start]) and not _NOT_AFTER.match(sentence[stop : stop + 30]):
            return _NOT_BEFORE.search(sentence[max(0, end - 40) : end - 1]) is None
    return False


_YES = (
    "yes|yeah|yep|true|correct|ja|oui|vrai|sí|si|verdadero|sì|vero|sim|verdadeiro|да|верно"
    "|истина|tak|evet|ya|نعم|صحيح|हाँ|হ্যাঁ"
)
_NO = (
    "no|nope|false|incorrect|untrue|wrong|nein|falsch|non|faux|falso|não"
    "|нет|неверно|ложь|nie|hayır|tidak|لا|خطأ|नहीं|না"
)
BOOLEAN = re.compile(
    rf"(?<![\w'])(?:(?P<yes>{_YES}|wahr|richtig)|(?P<no>{_NO}))(?!\w)|(?P<yes_cjk>是的?|对|正确|はい|正しい|예|맞"
    rf"|네(?=[\s.,!]|$))"
    r"|(?P<no_cjk>不是|否|不对|不正确|错误|いいえ|誤り|아니)",
    re.IGNORECASE,
)
_DETERMINER_NO = re.compile(
    r"^\s(?!(?:he|she|it|they|we|you|i|the|this|that|these|there|because|since|as)\b)[a-z]", re.IGNORECASE
)
_DENIED = re.compile(
    r"(?:\b(?:not|isn't|wasn't|never|cannot be|can't be|nicht|pas|не)|n't(?: be)?)\s(?:\w{1,10}\s)?$",
    re.IGNORECASE,
)
_YES_LETTER = {"t": "yes", "y": "yes", "f": "no", "n": "no"}


def read_boolean(text: str) -> str | None:
    """Yes or no in a statement: its first word of that kind, turned round by a "not" before it."""
    if letter := re.fullmatch(r"\W{0,4}([TFYNtfyn])\W{0,4}", text):
        return _YES_LETTER[letter[1].lower()]
    refused = REFUSAL.search(text)
    if refused and not re.match(r"\W{0,4}(?:yes|no|true|false)\b", text, re.IGNORECASE):
        if not GOES_ON.search(text, refused.end()):
            return NO_CHOICE
        text = text[refused.end() :]
    if re.search(r"\byes and no\b|\b(?:both|neither) (?:yes|true|no)\b", text, re.IGNORECASE):
        return NO_CHOICE
    for match in BOOLEAN.finditer(text):
        word = match[0].lower()
        at_start = not text[: match.start()].strip(" \"'*([{:.,-")
        if word == "no" and not at_start and _DETERMINER_NO.match(text[match.end() : match.end() + 30]):
            continue
        value = bool(match["yes"] or match["yes_cjk"])
        if _DENIED.search(text[max(0, match.start() - 30) : match.start()]):
            value = not value
        return "yes" if value else "no"
    return None


def guess_boolean(text: str) -> str | None:
    """The yes or no that a text begins with, else that of its last sentence that has one."""
    if re.match(rf"\W{{0,4}}(?:{_YES}|{_NO})(?!\w)(?!\s(?:one|answer|matter))", text, re.IGNORECASE):
        return read_boolean(text[:200]) or None
    for sentence in reversed([each for each in SENTENCE_END.split(text)[-200:] if each.strip()]):
        found = read_boolean(sentence[-600:])
        if found is not None:
            return found or None
    return None
