"""`viaticum.budget`: a budget that holds for every model call of the code inside it, whatever made the call.

Calls of OpenAI's and Anthropic's clients, of LiteLLM, and of LangChain over them are seen where they leave:
in httpx. Each reserves its worst case and settles what its provider reports. What does not fit is not sent:
its client gets a response with status 402, which it reports as an error of the provider and does not retry.

Threads and tasks that are started inside belong to the budget; budgets may be nested. Leaves out how requests
are read (`requests`, `usage`) and priced (`prices`), and where they are met (`http_hooks`).
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from weakref import WeakKeyDictionary

from viaticum.agents.instrumentation import context, http_hooks, threads
from viaticum.agents.instrumentation.joint import joined
from viaticum.agents.instrumentation.prices import CallPrices, count_bytes, counter
from viaticum.agents.instrumentation.requests import ModelCall
from viaticum.budgets import Budget, Ledger
from viaticum.catalogue import Catalogue
from viaticum.checks import checked_count
from viaticum.errors import BudgetClosed, BudgetExceeded, InputError, LedgerError
from viaticum.models.remote.prices import check_cache_writes
from viaticum.models.remote.prompt_tokens import PromptRatio
from viaticum.money import Price, as_price, budget_nanousd, format_usd
from viaticum.residency import ANY_LABEL, NO_RESTRICTION, Only, Residency, checked_only
from viaticum.types import TokenCount

MAX_TOKENS = 8192  # new tokens of a call whose request sets no limit
# A tool costs money and no tokens: in the ledger one nano-dollar is one millisecond at this price.
TOOL_PRICE = Price(0, 0, nanousd_per_second=1000, version="tool")
LEAST_TOKENS = 256  # the limit is lowered so far where money is short
Dollars = str | int | float
Unheld = Literal["refuse", "allow"]
Prices = Mapping[str, Price | tuple[Dollars, Dollars]]
_log = logging.getLogger("viaticum")


class BudgetScope:
    """A budget around code, as a context manager, sync or async. Made by `budget`.

    Attributes:
        ledger: where its calls are booked.
        name: the budget's name there.
        calls: calls that were sent under it, by model.
        refused: calls that were not sent, by reason.
        unheld: what was sent without a hold, by what it was.
    """

    def __init__(
        self,
        ledger: Ledger,
        name: str,
        *,
        prices: CallPrices,
        max_tokens: int = MAX_TOKENS,
        count: Callable[[str], int] | None = None,
        image_tokens: int | None = None,
        holds: Literal["bound", "estimated"] = "bound",
        unheld: Unheld = "refuse",
        residency: Residency = NO_RESTRICTION,
        parent: BudgetScope | None = None,
    ) -> None:
        self.ledger, self.name, self.residency = ledger, name, residency
        self.calls: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.unheld: Counter[str] = Counter()
        self._prices, self._max_tokens, self._count = prices, max_tokens, count
        self._image_tokens, self._estimates, self._unheld = image_tokens, holds == "estimated", unheld
        self._process = os.getpid()
        self._ratios: dict[str, PromptRatio] = {}
        self._kept: dict[str, int] = {}
        self._lock = threading.RLock()  # a stream that is collected meanwhile is settled in the same thread
        self._entered: list[object] = []
        self._within = WeakKeyDictionary[BudgetScope, bool]()  # a scope stays where it is in its tree
        self.parent = parent

    def left(self) -> Budget:
        """The state of the budget."""
        return self.ledger.budget(self.name)

    def is_within(self, payer: object) -> bool:
        """Whether it is the other budget, or below it in the same database, however that was opened."""
        if not isinstance(payer, BudgetScope):
            return False
        if payer not in self._within:
            is_same = self.ledger.is_same(payer.ledger)
            names = [each.name for each in self.ledger.lineage(self.name)] if is_same else []
            self._within[payer] = payer.name in names
        return self._within[payer]

    def reserve(self, call: ModelCall) -> HeldCall:
        """Reserve the worst case of a call, and record that it is being sent.

        Without a limit of its own a call gets `max_tokens`, or fewer where no more can be paid for.

        Raises:
            BudgetExceeded: it does not fit.
            BudgetClosed: the budget, or one above it, is paused or closed.
            InputError: something in the call has no bound before it is sent.
            UnknownPrice: the model has no price.
            ModelNotAllowed: the budget is for models with other labels.
            LedgerError: the ledger failed, or is in the memory of another process.
        """
        self._check_process()
        labels = self._prices.labels(call)
        if not self.residency.allows(labels):
            raise self.residency.refusal({call.model: labels})
        price = self._prices.price(call)
        count = self._count or counter(call.host, call.model)
        check_cache_writes(call.body, price, call.model)
        limit = call.limit
        if limit is None:
            limit = min(self._max_tokens, self._prices.output_limit(call) or self._max_tokens)
        if call.api == "embeddings":
            limit = 0
        worst = call.worst_case(limit, count or count_bytes, image_tokens=self._image_tokens, kept=self._kept)
        read = worst.input_tokens
        if self._estimates and count is None:
            read = self._ratio(call.model).estimate(read)
        key = f"{self.name}-{uuid.uuid4().hex}"
        while True:
            held = TokenCount(read, limit * call.answers)
            try:
                self.ledger.reserve(
                    self.name,
                    key,
                    {call.model: held},
                    {call.model: price},
                    tags={"model": call.model, "door": "http", "host": call.host or "-"},
                    dispatch=True,
                    hint="" if count else "no tokenizer is known, so every byte counts as a token",
                    labels=labels,
                )
                break
            except BudgetExceeded:
                if call.limit is not None or limit <= LEAST_TOKENS:
                    raise
                limit = max(LEAST_TOKENS, limit // 2)
        with self._lock:
            self.calls[call.model] += 1
        return HeldCall(self, key, call, limit, worst.input_tokens)

    def reserve_amount(self, tool: str, amount: int) -> Callable[[int | None], None]:
        """Reserve nano-dollars for a call of a tool; returns what posts its real cost, None for nothing.

        Raises:
            BudgetExceeded: it does not fit.
            BudgetClosed: the budget, or one above it, is paused or closed.
            LedgerError: the ledger failed, or is in the memory of another process.
        """
        self._check_process()
        key, model = f"{self.name}-{uuid.uuid4().hex}", f"tool:{tool}"
        usage = {model: TokenCount(milliseconds=amount)}
        try:
            self.ledger.reserve(
                self.name,
                key,
                usage,
                {model: TOOL_PRICE},
                tags={"tool": tool, "door": "tool"},
                dispatch=True,
                labels=ANY_LABEL,
            )
        except (BudgetExceeded, BudgetClosed):
            self.note_refusal("the budget is used up")
            raise
        with self._lock:
            self.calls[model] += 1

        def settle(cost: int | None) -> None:
            if cost is None:
                self.ledger.void(key)
            else:
                self.ledger.settle(key, {model: TokenCount(milliseconds=cost)})

        return settle

    def _check_process(self) -> None:
        if self.ledger.is_in_memory and os.getpid() != self._process:
            raise LedgerError(
                "this budget is in the memory of the process that was forked; give it a file: ledger=PATH"
            )

    def refuses(self, what: str) -> bool:
        """Note what cannot be held, and say whether it is refused.

        A budget that restricts where data may go refuses it always.
        """
        is_restricted = bool(self.residency & self.ledger.residency(self.name))
        is_refused = self._unheld == "refuse" or is_restricted
        with self._lock:
            (self.refused if is_refused else self.unheld)[what] += 1
        return is_refused

    def note_refusal(self, reason: str) -> None:
        with self._lock:
            self.refused[reason] += 1

    def note_unheld(self, what: str) -> None:
        with self._lock:
            self.unheld[what] += 1

    def _ratio(self, model: str) -> PromptRatio:
        with self._lock:
            return self._ratios.setdefault(model, PromptRatio())

    def _learn(self, held: HeldCall, count: TokenCount, kept: Mapping[str, int]) -> None:
        self._ratio(held.call.model).learn(held.read, count.input_tokens)
        with self._lock:
            self._kept.update(kept)
            for name in list(itertools.islice(self._kept, max(0, len(self._kept) - 10_000))):
                del self._kept[name]

    def __enter__(self) -> Self:
        http_hooks.install()
        threads.install()
        self._entered.append(context.enter(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        context.leave(self, self._entered.pop())
        self.tell_unheld()

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)

    def tell_unheld(self) -> None:
        """Warn of what was sent without a hold."""
        if self.unheld:
            what = ", ".join(f"{name} ({number})" for name, number in self.unheld.items())
            _log.warning("the budget %s did not hold: %s", self.name, what)

    def __repr__(self) -> str:
        state = self.left()
        limit = "no limit" if state.limit_nanousd is None else f"of {format_usd(state.limit_nanousd)}"
        return f"<budget {self.name}: {format_usd(state.posted_nanousd)} {limit}, {self.calls.total()} calls>"


class HeldCall:
    """A call that was reserved and is being sent. It ends once, whoever ends it."""

    def __init__(self, scope: BudgetScope, key: str, call: ModelCall, limit: int, read: int) -> None:
        self.scope, self.key, self.call, self.limit, self.read = scope, key, call, limit, read
        self._ended = False
        self._lock = threading.Lock()

    def settle(self, count: TokenCount | None, kept: Mapping[str, int] | None = None) -> None:
        """Post what was used; None posts all that was held."""
        if self._end():
            if count is not None:
                self.scope._learn(self, count, kept or {})
            self._try(
                lambda: self.scope.ledger.settle(
                    self.key, None if count is None else {self.call.model: count}
                )
            )

    def void(self) -> None:
        """Nothing is charged for the call."""
        if self._end():
            self._try(lambda: self.scope.ledger.void(self.key))

    def _end(self) -> bool:
        with self._lock:
            ended, self._ended = self._ended, True
        return not ended

    def _try(self, step: Callable[[], Any]) -> None:
        """The answer is there: a ledger that fails now keeps the hold, and is told."""
        try:
            step()
        except LedgerError as error:
            _log.warning("the call %s stays held: %s", self.key, error)
            self.scope.note_unheld("a call whose cost could not be posted; it stays held")


def budget(
    limit: Dollars | None = None,
    *,
    name: str | None = None,
    ledger: Ledger | str | Path | None = None,
    prices: Prices | None = None,
    catalogue: Catalogue | str | Path | None = None,
    unpriced: Iterable[str] = (),
    max_tokens: int = MAX_TOKENS,
    count: Callable[[str], int] | None = None,
    image_tokens: int | None = None,
    holds: Literal["bound", "estimated"] = "bound",
    unheld: Unheld = "refuse",
    only: Only | None = None,
) -> BudgetScope:
    """A budget for every model call inside a `with` block.

    Inside another budget it takes over that one's ledger, and its prices, catalogue, unpriced models, count
    and image_tokens where it has none of its own.

    Args:
        limit: dollars; None inside another budget, or for a budget that exists in the ledger.
        name: of the budget in the ledger, created if it does not exist; None for a new name.
        ledger: an open `Ledger`, or its address; by default that of the budget around it, else in memory.
            Processes that are forked inside need a file or a database.
        prices: by the name that requests give a model, a `Price` or dollars per million input and output
            tokens. Others are looked up in the catalogue, then in LiteLLM's list.
        catalogue: the catalogue to look in, or its file; by default the user's.
        unpriced: names of models that cost nothing.
        max_tokens: maximum of new tokens of calls that set none; lowered to what can still be paid for, down
            to 256.
        count: an upper bound of the tokens of a text; by default the tokenizer of OpenAI's models, and bytes
            for others.
        image_tokens: an upper bound of the tokens of an image; without it calls with images are refused.
        holds: `estimated` holds prompts without a tokenizer by the ratio that the provider reported before,
            with a margin; overruns are recorded.
        unheld: `refuse` answers what cannot be held (an unknown price, a tool that the provider runs) with an
            error; `allow` sends it, and tells it at the end.
        only: labels of models, one of which the catalogue's entry of a model has to have; what cannot be held
            is then refused in any case. Of a new budget.

    Raises:
        InputError: a setting is out of range, a budget inside another names a ledger, or two budgets pay here
            already (`BudgetMiddleware(hold_tools=True)` inside another budget).
        BudgetError: the ledger has a budget of that name with another limit.
    """
    if unheld not in ("refuse", "allow") or holds not in ("bound", "estimated"):
        raise InputError(f"unheld is refuse or allow, holds is bound or estimated; got {unheld!r}, {holds!r}")
    checked_count("max_tokens", max_tokens)
    if image_tokens is not None:
        checked_count("image_tokens", image_tokens)
    outer = context.current()
    outer = getattr(outer, "around", outer)  # of one that only counts attempts
    if not isinstance(outer, BudgetScope | None):  # it would be paid from neither
        raise InputError("a budget in what two budgets pay for is a part of neither; open it outside")
    if outer is not None and ledger is not None and not _is_over(outer.ledger, ledger):
        raise InputError("a budget inside another is in the same ledger; leave ledger out")
    shared = outer.ledger if outer is not None else None
    opened = shared or (ledger if isinstance(ledger, Ledger) else Ledger(ledger or "memory:"))
    name = name or f"code-{uuid.uuid4().hex[:12]}"
    parent = None if outer is None else outer.name
    if limit is None and parent is None:
        existing = opened.budget(name)
        if only is not None and existing.only != checked_only(only):
            raise InputError(f"budget {name!r} exists, and where its data may go stays; leave only out")
    elif limit is None:
        opened.create(name, parent=parent, only=only)
    else:
        opened.create(name, limit_nanousd=budget_nanousd(limit), parent=parent, only=only)
    known = {model: as_price(each) for model, each in (prices or {}).items()}
    entries = catalogue if isinstance(catalogue, Catalogue | None) else Catalogue.load(catalogue)
    if outer is None:
        call_prices = CallPrices(known, Catalogue.load() if entries is None else entries, tuple(unpriced))
    else:
        call_prices = outer._prices.within(known, entries, tuple(unpriced))
        count, image_tokens = count or outer._count, image_tokens or outer._image_tokens
    return BudgetScope(
        opened,
        name,
        prices=call_prices,
        max_tokens=max_tokens,
        count=count,
        image_tokens=image_tokens,
        holds=holds,
        unheld=unheld,
        parent=outer,
    )


def _is_over(ledger: Ledger, given: Ledger | str | Path) -> bool:
    """Whether an open ledger, or an address of one, is over the same database."""
    if isinstance(given, Ledger):
        return ledger.is_same(given)
    address = str(given)
    is_server = address.startswith(("postgresql://", "postgres://"))
    if not is_server and not Path(address).is_file():
        return False
    with Ledger(given) as opened:
        return ledger.is_same(opened)


def paying_from(
    ledger: Ledger,
    name: str,
    prices: Mapping[str, Price],
    *,
    unpriced: Iterable[str] = (),
    count: Callable[[str], int] | None = None,
    residency: Residency = NO_RESTRICTION,
) -> Callable[[], AbstractContextManager[None]]:
    """A function that makes contexts, in any number of threads and tasks, whose calls a budget pays for.

    A budget around such a context goes on paying too, unless it is one above this.

    Args:
        ledger, name: of a budget that exists.
        prices, unpriced, count: as of `budget`.
        residency: where data may go, beside what the budget says of it.
    """
    http_hooks.install()
    threads.install()
    known = CallPrices(prices, Catalogue.load(), tuple(unpriced))
    scope = BudgetScope(ledger, name, prices=known, count=count, residency=residency)

    def inside() -> AbstractContextManager[None]:
        return context.Inside(joined(context.current(), scope))

    return inside
