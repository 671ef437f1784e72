"""Program of thought (arXiv 2211.12588, in the style of PAL, 2211.10435): run a program the model writes.

What the program prints in the sandbox is the answer. The worked examples name every quantity and comment
every step: programs that only print one expression skip the reasoning and are mostly wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from viaticum.strategies.base import Example, PromptStrategy, is_truncated
from viaticum.strategies.programs import end_in_answer, find_program, read_output
from viaticum.strategies.sandbox import Limits, Sandbox, default_sandbox
from viaticum.strategies.sandbox.base import LIMITS, PROGRAM_CHARACTERS
from viaticum.types import Completion, Query, Reading

SYSTEM = (
    "You solve problems by writing a short Python program. First give every fact of the question a variable "
    "with a clear name. Then compute one step per line, each with a comment that says why. Store the result "
    "in answer and print it. Reply with the program only, in a ```python block."
)

EXAMPLES = (
    Example(
        "A library shelf holds 14 cookbooks, three times as many novels as cookbooks, and 5 fewer atlases "
        "than cookbooks. How many books are on the shelf?",
        "```python\n"
        "cookbooks = 14\n"
        "# three times as many novels as cookbooks\n"
        "novels = 3 * cookbooks\n"
        "# 5 fewer atlases than cookbooks\n"
        "atlases = cookbooks - 5\n"
        "# all the books on the shelf\n"
        "answer = cookbooks + novels + atlases\n"
        "print(answer)\n"
        "```",
    ),
    Example(
        "A rain barrel holds 200 litres. Omar uses 30% of the water on Monday and a quarter of what is left "
        "on Tuesday. On Wednesday rain adds 15 litres. How many litres are in the barrel then?",
        "```python\n"
        "litres_at_start = 200\n"
        "rain_on_wednesday = 15\n"
        "# 30% of the water is used on Monday\n"
        "used_on_monday = litres_at_start * 30 / 100\n"
        "left_after_monday = litres_at_start - used_on_monday\n"
        "# a quarter of what is left is used on Tuesday\n"
        "used_on_tuesday = left_after_monday / 4\n"
        "left_after_tuesday = left_after_monday - used_on_tuesday\n"
        "# rain adds water on Wednesday\n"
        "answer = left_after_tuesday + rain_on_wednesday\n"
        "print(answer)\n"
        "```",
    ),
    Example(
        "Ines walks 45 minutes to work and 45 minutes back, 4 days a week. By bicycle each way takes her a "
        "third of that time. How many hours does she save in a week by cycling?",
        "```python\n"
        "minutes_walking_each_way = 45\n"
        "ways_per_day = 2\n"
        "days_per_week = 4\n"
        "# by bicycle each way takes a third of that time\n"
        "minutes_cycling_each_way = minutes_walking_each_way / 3\n"
        "# minutes saved on each way, then in a week\n"
        "saved_each_way = minutes_walking_each_way - minutes_cycling_each_way\n"
        "saved_per_week = saved_each_way * ways_per_day * days_per_week\n"
        "# the question asks for hours\n"
        "answer = saved_per_week / 60\n"
        "print(answer)\n"
        "```",
    ),
    Example(
        "Four flatmates buy a sofa. A voucher takes $60 off its price, and they share the rest equally, "
        "paying $75 each. How much did the sofa cost before the voucher?",
        "```python\n"
        "flatmates = 4\n"
        "paid_each = 75\n"
        "voucher = 60\n"
        "# what they paid together is the price after the voucher\n"
        "price_after_voucher = flatmates * paid_each\n"
        "# the price before the voucher was higher\n"
        "answer = price_after_voucher + voucher\n"
        "print(answer)\n"
        "```",
    ),
    Example(
        "A bakery bakes 240 rolls. It sells five eighths of them before noon at $0.80 each and the rest "
        "after noon at half that price. How much money does it take in that day?",
        "```python\n"
        "rolls = 240\n"
        "price_before_noon = 0.80\n"
        "# five eighths are sold before noon\n"
        "sold_before_noon = rolls * 5 / 8\n"
        "# the rest is sold after noon, at half that price\n"
        "sold_after_noon = rolls - sold_before_noon\n"
        "price_after_noon = price_before_noon / 2\n"
        "# all the money of the day\n"
        "answer = sold_before_noon * price_before_noon + sold_after_noon * price_after_noon\n"
        "print(answer)\n"
        "```",
    ),
    Example(
        "Mara is 4 years older than twice her brother's age. Together they are 40 years old. How old will "
        "Mara be in 5 years?",
        "```python\n"
        "years_more_than_twice = 4\n"
        "together = 40\n"
        "years_from_now = 5\n"
        "# brother + (2 * brother + 4) = together\n"
        "brother = (together - years_more_than_twice) / 3\n"
        "# Mara is 4 years older than twice her brother's age\n"
        "mara = 2 * brother + years_more_than_twice\n"
        "# the question asks for her age in 5 years\n"
        "answer = mara + years_from_now\n"
        "print(answer)\n"
        "```",
    ),
    Example(
        "A car's tank holds 50 litres, and the car uses 8 litres for every 100 km. It starts with a full "
        "tank. What percentage of the fuel is left after a drive of 350 km?",
        "```python\n"
        "tank = 50\n"
        "litres_per_100_km = 8\n"
        "km = 350\n"
        "# litres used on the drive\n"
        "used = km / 100 * litres_per_100_km\n"
        "# litres left of the full tank\n"
        "left = tank - used\n"
        "# as a percentage of the fuel at the start\n"
        "answer = left / tank * 100\n"
        "print(answer)\n"
        "```",
    ),
    Example(
        "A shop raises the price of a $120 jacket by 25%, then takes 10% off the new price. How much more "
        "than at first does the jacket cost now?",
        "```python\n"
        "first_price = 120\n"
        "# raised by 25%\n"
        "raised_price = first_price * (1 + 25 / 100)\n"
        "# 10% off the new price\n"
        "price_now = raised_price * (1 - 10 / 100)\n"
        "# how much more than at first\n"
        "answer = price_now - first_price\n"
        "print(answer)\n"
        "```",
    ),
)


@dataclass(frozen=True)
class Pot(PromptStrategy):
    """A program that computes the answer, run in a sandbox.

    Attributes:
        sandbox: where programs run; None for the shared sandbox of this process.
        limits: resource limits of one program.
    """

    system: str | None = SYSTEM
    examples: tuple[Example, ...] = EXAMPLES
    sandbox: Sandbox | None = field(default=None, compare=False)
    limits: Limits = LIMITS

    name = "pot"
    description = (
        "Writes a short Python program with named steps and runs it to get the answer. "
        "Exact arithmetic at few tokens; good for calculations, counting, dates and simulations."
    )
    needs = frozenset({"sandbox"})
    stop = ("\n```\n",)

    def read(self, completion: Completion, query: Query) -> Reading:
        """Run the program and read what it prints.

        Raises:
            SandboxError: no sandbox works on this machine. Never because of what a model wrote.
        """
        reading = self._run(completion.text, query)
        if reading.answered or not is_truncated(completion):
            return reading
        return Reading(None, f"{reading.reason}; the text was cut (finish reason {completion.finish_reason})")

    def _run(self, text: str, query: Query) -> Reading:
        program = find_program(text)
        if program is None:
            return Reading(None, "no program in the text")
        if len(program) > PROGRAM_CHARACTERS:
            return Reading(None, f"the program is longer than {PROGRAM_CHARACTERS} characters")
        result = (self.sandbox or default_sandbox()).run(end_in_answer(program), self.limits)
        if not result.ok:
            return Reading(None, result.error)
        if not result.stdout.strip():
            return Reading(None, "the program printed nothing")
        value = read_output(result.stdout, program, query.kind)
        if value is None:
            last = result.stdout.strip().splitlines()[-1]
            return Reading(None, f"the program printed no answer: {last[:80]!r}")
        return Reading(value)
