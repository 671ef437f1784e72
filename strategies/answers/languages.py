"""Words of many languages around an answer: what announces it, what is a remark, how decimals are written.

Tables and the patterns made of them. Leaves out number words (`number_words`) and months (`dates`).
"""

from __future__ import annotations

import re

# "Answer" as a label: before a colon, or alone on a line with the value below.
_LABELS = (
    # Germanic and Nordic
    "antwort|endergebnis|ergebnis|lösung|antwoord|eindantwoord|svar|slutsvar|vastaus|lopullinen vastaus"
    # Romance
    "|réponse(?: finale| correcte)?|résultat|respuesta(?: final| correcta)?|resultado|resposta(?: final"
    "| correta)?"
    "|risposta(?: finale| corretta)?|soluzione|răspuns(?:ul)?(?: final| corect)?"
    # Slavic, Baltic, Greek, Hungarian
    "|(?:правильный |окончательный )?ответ|відповідь|отговор|одговор|odpowiedź|odpověď|odpoveď|odgovor"
    "|atsakymas"
    "|απάντηση|(?:vég)?válasz"
    # Turkic, Indonesian, Vietnamese, Swahili, Filipino
    "|cevap|yanıt|cavab|javob|жауап|jawaban(?:nya)?(?: akhir)?|jawapan|đáp án(?: cuối cùng)?|câu trả lời|trả"
    " lời"
    "|đáp số|jibu|sagot|kasagutan"
    # Semitic and Iranian
    "|الجواب|الإجابة|الاجابة|الإجابة النهائية|الإجابة الصحيحة|جواب|پاسخ|جواب نهایی|تشובה|תשובה|התשובה"
    # Indian
    "|(?:सही |अंतिम )?उत्तर|जवाब|(?:সঠিক )?উত্তর|জবাব|பதில்|விடை|సమాధానం|જવાબ|ઉત્તર|ಉತ್ತರ|ഉത്തരം|ਉੱਤਰ|ਜਵਾਬ"
    # Thai, Korean
    "|คำตอบ(?:สุดท้าย|ที่ถูกต้อง)?|(?:최종 ?)?(?:정답|답변|답)"
)
# A verb after such a label. In these languages the verb may come between: "Die richtige Antwort ist".
_VERBS = (
    "ist|lautet|sind|wäre|est|es|son|sería|è|é|são|seria|este|is|är|er|on|to|je|jest|είναι|adalah|ialah|là"
    "|ni|ay"
    "|هو|هي|است|היא|है|হল|হলো|হচ্ছে|คือ"
)
_CJK = (
    r"(?:正确|最终|标准|最後の|最終|最终的)?(?:答案|答え|回答|解答|正解|答)(?:选项)?(?:就是|应该是|应为|应是|是|为|為|は|:|=|→)"
    r"|(?:因此|所以|故)?[我应應]?(?:选择|選擇|選択|选|選)(?:了|项|項)?:?\s?(?=[(（]?[A-Za-z](?![A-Za-z]))|(?:答案|正解|答え|解答)\s?\n"
    r"|(?:정답|답)은"
)
FOREIGN_MARKER = re.compile(
    rf"(?<!\w)(?:{_LABELS})(?:\s[^\s.:;!?,=\n]{{1,20}}){{0,3}}?\s?(?::|=|→|—|–|\s-\s"
    rf"|\s(?:{_VERBS})(?!\w)[:\s]|\s?\n)"
    rf"|{_CJK}",
    re.IGNORECASE,
)
ENGLISH_MARKER = re.compile(
    r"(?<![-\w])answers?(?!\squestions?\b)(?:\s(?!is\b|was\b|are\b)[^\s.:;!?,=\n]{1,24}){0,8}?"
    r"(?:(?:(?<=[Aa]nswer)|(?<=[Aa]nswers)|(?<=ANSWER)|(?<=[a-z)]))\s?(?::|=|→|⇒)(?:\s?is\b)?"
    r"|\s(?:—|–|-)\s"
    r"|,?\s(?:therefore|then|thus|hence|so),?\s(?:is|are|was)\b"
    r"|\s(?:is|are|was|were|will be|would be|should be|must be|has to be|can be|could be|may be|might be"
    r"|seems to be|appears to be|turns out to be|comes out to|becomes|equals|remains)\b(?!\s?\?)"
    r"|(?=[ \t]?\n)|(?=\s(?:\([A-Za-z0-9]\)|[A-Z])\s?[.\n]|\s(?:\([A-Za-z0-9]\)|[B-HJ-Z])\s?$))"
    r"(?:\s?(?:equal to|simply|just|indeed|given by|approximately equal to|:))?:?"
    r"|(?<![\w'])ans(?:wer)?\s?[.:=]\s?"
    r"|\b(?:correct|right|best|final)\s(?:option|choice|letter|one|statement)\s?(?::|\bis\b|\bwould be\b|=)",
    re.IGNORECASE,
)
WEAK_LABEL = re.compile(
    r"^[\s#>*_-]{0,10}(?:final\s)?(?:result|solution|output|conclusion|total|final|value|response|A)\s?[:=]"
    r"|^[\s#>*_-]{0,10}(?:结果|结论|结论是|結果|결과|итог|итого)\s?[:是]",
    re.IGNORECASE | re.MULTILINE,
)
# In the words right before "answer": what follows is not what the model answers.
NO_ANSWER_BEFORE = re.compile(
    r"(?:\b(?:check(?:ing|ed)?|verif(?:y|ying|ied)|confirm(?:ing|s)?|validat(?:e|ing)|test(?:ing)?|wrong"
    r"|incorrect"
    r"|first|initial|previous|earlier|other|sample|example|possible|potential)\b[^.:;!?\n]{0,30}"
    r"|\b(?:if|whether|suppose|supposing|assum(?:e|ing)|unless|is|was|could|would"
    r"|does)\s(?:that\s)?(?:(?:the|my|our|its|this|that)\s)?"
    r"(?:(?:final|correct|right)\s)?"
    r"|\b(?:to|we|you|can|us|will|let's|please|must|i'll|not|no|any|an)\s)$",
    re.IGNORECASE,
)
# What begins a remark about an answer instead of an answer.
REMARK = re.compile(
    r"^[\s,;:*_-]{0,6}(?:(?:also|indeed|therefore|thus|then|now|clearly|actually|definitely|probably|likely"
    r"|not|very|quite|a|an|the"
    r"|still|really|most|almost|certainly)\s){0,3}"
    r"(?:correct|right|wrong|incorrect|consistent|reasonable|plausible|sensible|verified|confirmed|valid"
    r"|invalid"
    r"|accurate|checked|clear|obvious|unique|above|below|as follows|shown|supported|based on|rounded"
    r"|expressed"
    r"|measured|written|obtained|found|derived|calculated|computed|in agreement|in line|in (?:the"
    r" )?(?:units?|form|terms|simplest|lowest)"
    r"|because|since|that of|required|needed|complete|ready|easy|simple|straightforward|only|likely"
    r"|compatible"
    r"|justified|satisf\w{1,6}|match\w{0,3}|realistic|good|done|stated|provided|given in|choices?|options?"
    r"|yes or no|true or false"
    r"|letter of|(?:mathematical )?expression|word or|date,|number\b|integer"
    r"|key)\b"
    r"(?![\s:]{0,3}(?:\$|\\\(|-?\d))",
    re.IGNORECASE,
)
# A unit alone ("in square meters") or a bare preposition.
UNIT_REMARK = re.compile(r"^\s?in\s(?!\d)[^\d$\\.]{1,40}\.?\s?$", re.IGNORECASE)
# "I choose" in many languages, before the label of a choice. Verbs after it stand in `choices`.
_I_CHOOSE = (
    r"i(?:['’](?:d|ll|m)|\s(?:would|will|shall|am|have|must))?\s(?:(?:therefore|thus|then|so|now|finally"
    r"|hence"
    r"|rather)\s)?(?:choos(?:e|ing)|chosen?|pick(?:ed|ing)?|select(?:ed|ing)?|go(?:ing)?\s(?:with|for)"
    r"|went with"
    r"|opt(?:ed|ing)?\sfor|vote\sfor|settled?\s(?:on|for)|answer|guess)"
    r"|my\s(?:choice|pick|selection|guess|vote)\s(?:is|would be|goes to)|let(?:'s| us| me) (?:choose|pick"
    r"|go with)"
    r"|ich (?:wähle|nehme|entscheide mich für)|(?:wähle|nehme) ich|je (?:choisis|prends|sélectionne)"
    r"|j['’]opte pour"
    r"|elijo|escojo|selecciono|opto por|me quedo con|escolho|seleciono|fico com|scelgo|opto per|seleziono"
    r"|ik kies(?: voor)?|kies ik(?: voor)?|jag väljer|jeg (?:vælger|velger)|valitsen|aleg|вибираю|обираю"
    r"|выбираю|выберу|избирам|бирам|wybieram|vybírám|volím|vyberám|odabirem|pasirenku|επιλέγω|διαλέγω|chọn"
    r"|saya (?:memilih|pilih)|nachagua|pinipili ko|أختار|اخترت|(?:אני )?(?:בוחר|בוחרת)|(?:ผม|ฉัน)?เลือก"
)
_OPTION = (
    r"(?:(?:the|la|le|l['’]|die|den|de|het|el|a|o|to)\s?)?(?:option|choice|answer|letter"
    r"|antwort(?:möglichkeit)?"
    r"|möglichkeit|réponse|proposition|lettre|opción|respuesta|letra|alternativ[ae]?t?|opção|resposta|opzione"
    r"|risposta|lettera|optie|antwoord|svar|вариант|ответ|варіант|відповідь|opcję|odpowiedź|možnost|odpověď"
    r"|phương án|đáp án|opsi|pilihan|jawaban|الخيار|الإجابة|ข้อ|varianta|răspunsul|επιλογή|απάντηση)"
)
CHOOSE_MARKER = re.compile(
    rf"(?<![\w'’])(?:{_I_CHOOSE})\s?:?\s?(?:{_OPTION}\s)?"
    r"(?=[(\[\"'「]{0,2}(?-i:[A-ZБГЖЗ])(?![\w'’])|\([A-Za-z]\))",
    re.IGNORECASE,
)
REFUSAL = re.compile(
    r"\b(?:don'?t|do not|doesn'?t|does not|cannot|can'?t|could not|couldn'?t|unable to|not able to"
    r"|impossible to)\s"
    r"(?:\w{1,12}\s){0,2}?(?:know|determine|answer|tell|say|decide|be determined|solve)\b"
    r"|\bnot (?:sure|certain|enough information)\b|\bnone of (?:the|these|them|those)\b|\bno (?:idea|clue"
    r"|answer)\b"
    r"|\b(?:unknown|undetermined|insufficient information|not enough|n/a)\b",
    re.IGNORECASE,
)
# "I can't help with that": what else stands in such a text is no answer.
DECLINED = re.compile(
    r"\bI(?:['’]m| am)?\s(?:(?:sorry,?|afraid|simply|really|just|but|that|I|therefore)\s){0,4}"
    r"(?:can(?:['’]?t|not| not)|won['’]?t|will not|unable to|not able to|decline to|must decline to"
    r"|not allowed to"
    r"|not comfortable)\s(?:\w{1,12}\s){0,2}?(?:help|helping|assist|answer|answering|comply|respond|fulfill?"
    r"|do (?:that|this)|engage"
    r"|(?:provide|give|share)\s(?:\w{1,12}\s){0,3}?(?:answers?|that|this|assistance|help|information"
    r"|advice))\b"
    r"(?!\s(?:but|\w{2,12}ing)\b)"
    r"|(?:\bich kann|\bkann ich)\s[^.!?\n]{0,30}?\b(?:nicht|keine)\s[^.!?\n]{0,15}?(?:helfen|weiterhelfen"
    r"|antwort)"
    r"|\bje ne (?:peux|suis) pas\s[^.!?\n]{0,25}?(?:aider|répondre|fournir)"
    r"|\bno puedo\s[^.!?\n]{0,20}?(?:ayudar"
    r"|responder|contestar|proporcionar)|\bnão posso\s[^.!?\n]{0,20}?(?:ajudar|responder|fornecer)"
    r"|\bnon posso\s[^.!?\n]{0,15}?(?:aiutar|risponder|fornir)"
    r"|\bkan\s[^.!?\n]{0,25}?niet\s(?:mee\s)?(?:helpen"
    r"|beantwoorden)|\bkan (?:inte|ikke) (?:hjälpa|hjelpe|hjælpe|svara|svare)"
    r"|\bnie mogę\s[^.!?\n]{0,20}?(?:pomóc"
    r"|odpowiedzieć)|\bне (?:могу|можу)\s[^.!?\n]{0,20}?(?:помочь|ответить|предоставить|допомогти|відповісти)"
    r"|yardımcı olam|yanıtlayamam|cevaplayamam|không thể (?:giúp|trả lời|hỗ trợ|cung cấp)"
    r"|tidak (?:dapat|bisa) (?:membantu|menjawab)|لا (?:أستطيع|يمكنني)\s(?:\S{1,12}\s)?(?:مساعد|الإجابة|الرد)"
    r"|(?:मदद|उत्तर|जवाब)[^।\n]{0,20}?नहीं (?:कर|दे) सकत|(?:无法|無法|不能|没法)(?:回答|提供|协助|協助|帮|幫"
    r"|满足)"
    r"|(?:お答え|回答|お手伝い|お助け|対応)(?:することは|は)?でき(?:ません|ない)|(?:도와드릴|도울|답변드릴|답변할|답할|대답할"
    r"|제공할) 수(?:가)? 없",
    re.IGNORECASE,
)
UNKNOWN = re.compile(
    r"^\W{0,6}(?:it is\s|still\s|currently\s)?(?:unknown|undetermined|unclear|not (?:known|given|stated"
    r"|determined)"
    r"|i (?:don['’]?t|do not) know)\b",
    re.IGNORECASE,
)
UNDECIDED = re.compile(
    r"\b(?:i|we)\s(?:really\s|still\s)?(?:don['’]?t|do not|cannot|can['’]?t|could not|couldn['’]?t)\s"
    r"(?:\w{1,12}\s){0,1}?(?:know|determine|decide|answer)\b|\b(?:cannot|can['’]?t"
    r"|could not) be (?:determined|known"
    r"|computed|calculated|answered)\b|\b(?:not enough|insufficient)\s(?:information|data)\b"
    r"|\b(?:is|are|remains?)\s(?:still\s)?(?:unknown|undetermined|unclear)\b(?=\D{0,200}$)"
    r"|\b(?:impossible|not possible|unable) to (?:determine|know|answer)\b",
    re.IGNORECASE,
)
GOES_ON = re.compile(
    r"\b(?:but|however|so|still|thus|therefore|think|guess|probably|assum\w{1,4})\b|但|所以", re.I
)
SENTENCE_END = re.compile(r"(?:(?<=\w{4})|(?<=[\d)\]}$%°]))[.;!?](?=\s)\s|[。！？।؟॥]|\n")

# Words by which a text shows its language, where a comma is the decimal mark and a point groups thousands.
_COMMA = re.compile(
    r"(?<!\w)(?:antwort|der|die|das|und|ist|beträgt|euro|ergebnis|lösung|also|kostet|insgesamt"
    r"|la|le|les|réponse|est|donc|des|une|égale?|coûte|respuesta|es|el|los|las|son|entonces|resultado"
    r"|risposta|è|il|gli|della|quindi|resposta|é|um|uma|portanto|antwoord|het|een|dus"
    r"|odpowiedź|wynosi|jest|svar|svaret|är|er|och|vastaus|cevap|yanıt|ve|jawaban(?:nya)?|adalah|đáp án|là"
    r"|ответ|равен|равно|это|итого|відповідь|отговор|odpověď|je|απάντηση|είναι|răspuns(?:ul)?|este"
    r"|válasz)(?!\w)",
    re.IGNORECASE,
)
_POINT = re.compile(
    r"(?<!\w)(?:the|answer|is|are|was|of|and|so|we|therefore|total|has|there|in|to|it|for)(?!\w)",
    re.IGNORECASE,
)
_CYRILLIC_OR_GREEK = re.compile(r"[\u0400-\u04ff]{4}|[\u0370-\u03ff]{4}")
_SPANISH = re.compile(r"(?<!\w)(?:el|los|las|es|son|respuesta|entonces|una)(?!\w)", re.IGNORECASE)


def decimal_comma(text: str) -> bool:
    """Whether a text is in a language that writes 3,5 for three and a half."""
    text = text[-2000:]
    commas = sum(1 for _ in _COMMA.finditer(text)) + 3 * (_CYRILLIC_OR_GREEK.search(text) is not None)
    return commas > 0 and commas > sum(1 for _ in _POINT.finditer(text))


def groups_by_comma(text: str) -> bool:
    """Whether, in such a language, 12,500 is more likely twelve thousand: much of Latin America."""
    return _SPANISH.search(text[-2000:]) is not None
