"""Every error that Viaticum raises on purpose. Standard library only.

    ViaticumError
    ├── InputError                  an argument or input cannot be used (also a ValueError)
    │   ├── UnknownName             no model, strategy or policy of that name
    │   ├── PromptTooLong           prompt plus answer do not fit the model's context
    │   ├── DataError               a broken line or column in a file, with its position
    │   └── VocabularyMismatch      the models of a pair have different vocabularies
    ├── BudgetError
    │   ├── BudgetExceeded          the worst case does not fit what is left
    │   │   └── DecisionNeeded      the same, and the policy asks: raise the limit, go cheaper, or stop
    │   ├── BudgetClosed            the scope, or one above it, is paused or closed
    │   ├── UnknownPrice            a call without a price is refused
    │   ├── HoldError               a hold that does not exist, is resolved, or differs from its key
    │   └── LedgerError             the file is no ledger, is damaged, or is newer than this version
    ├── WeightsError                weights missing, corrupt, or impossible to fetch or write
    ├── ModelError                  a model failed while it was answering (NaN logits, out of memory)
    │   ├── ModelUnavailable        it cannot answer now: busy or not reached; the workflow retries
    │   ├── SequencesFailed         some sequences of a call failed; the others can go on
    │   ├── RateLimited             a provider takes no more calls for now; retries did not help
    │   ├── ProviderUnavailable     a provider cannot be reached, or failed; retries did not help
    │   │   └── ProviderTimeout     no answer in time, which may be charged for: no further try
    │   ├── ProviderWait            a provider's limit lasts longer than this call may wait for it here
    │   ├── DeadlineExceeded        max_seconds are over, or nothing can be expected to end in time
    │   ├── QuotaExhausted          the account at a provider has no credit left
    │   ├── AuthenticationFailed    a provider rejects the key, or there is none
    │   └── ContentRefused          a provider refuses the content
    ├── ModelNotAllowed             a restriction of where data may go refuses the model
    ├── Draining                    this process is about to end and takes no new work
    ├── ClientClosed                the client was closed, or belongs to the process that forked this one
    ├── SandboxError                no sandbox can run programs on this machine
    └── MissingExtra                an optional dependency is not installed

A message says what was wrong, with the value, and what to do, in one line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

MOST_NAMES = 20  # that a message lists: a ledger may have thousands of budgets


def one_line(message: object, most: int | None = None) -> str:
    """A message, of another library say, on one line: runs of white space become one space.

    most: characters after which it is cut, with an ellipsis.
    """
    text = " ".join(str(message).split())
    return text if most is None or len(text) <= most else f"{text[: most - 3]}..."


def reason(error: BaseException) -> str:
    """What another library or the system says went wrong, on one line, without the number of an `OSError`."""
    return one_line(getattr(error, "strerror", None) or error) or type(error).__name__


class ViaticumError(Exception):
    """The root of all errors that are raised on purpose."""


class InputError(ViaticumError, ValueError):
    """An argument or input cannot be used."""


class UnknownName(InputError):
    """No model, strategy or policy has that name; the message names the nearest one."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind, self.name, self.known = kind, name, tuple(known)
        near = get_close_matches(name, self.known, n=1) if isinstance(name, str) else ()
        more = f" and {len(self.known) - MOST_NAMES} more" if len(self.known) > MOST_NAMES else ""
        names = ", ".join(self.known[:MOST_NAMES]) or "none"
        hint = f"did you mean {near[0]!r}?" if near else f"known: {names}{more}"
        super().__init__(f"unknown {kind} {name!r}; {hint}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.kind, self.name, self.known)


class PromptTooLong(InputError):
    """Prompt plus answer do not fit the model's context."""


class DataError(InputError):
    """A broken line or column in a file; the message names the file and the line."""


class VocabularyMismatch(InputError):
    """The models of a pair have different vocabularies; the message names the first difference."""


class BudgetError(ViaticumError):
    """A budget refused a call, or its ledger cannot be used."""


class BudgetExceeded(BudgetError):
    """The worst case of a call does not fit what is left. Nothing was held or charged.

    Attributes:
        budget: name of the scope.
        needed, left: in `unit`.
        unit: "nanousd" or "tokens".
    """

    def __init__(
        self, message: str, *, budget: str = "", needed: int = 0, left: int = 0, unit: str = "nanousd"
    ) -> None:
        self.budget, self.needed, self.left, self.unit = budget, needed, left, unit
        super().__init__(message)


class DecisionNeeded(BudgetExceeded):
    """The worst case does not fit what is left, and the policy is to ask.

    Attributes:
        options: what still fits, best first.
        thread_id: from the SDK, to be given to `Viaticum.resume` with a decision.
        question: from the SDK, all that is known about the shortage (see docs/reference/workflow.md).
    """

    def __init__(
        self,
        message: str,
        *,
        budget: str = "",
        needed: int = 0,
        left: int = 0,
        unit: str = "nanousd",
        options: Iterable[str] = (),
        thread_id: str = "",
        question: Mapping[str, object] | None = None,
    ) -> None:
        self.options, self.thread_id, self.question = tuple(options), thread_id, dict(question or {})
        super().__init__(message, budget=budget, needed=needed, left=left, unit=unit)


class BudgetClosed(BudgetError):
    """The scope, or one above it, is paused or closed: it takes no new calls."""


class UnknownPrice(BudgetError):
    """A call whose price is not known is refused, not made for free."""


class HoldError(BudgetError):
    """A hold does not exist, is already resolved in another way, or differs from what its key stands for."""


class LedgerError(BudgetError):
    """The file is no ledger, is damaged, or is newer than this version."""


class WeightsError(ViaticumError):
    """Weights are missing, corrupt, or cannot be fetched or written."""


class ModelError(ViaticumError):
    """A model failed while it was answering."""


class ModelUnavailable(ModelError):
    """A rate limit, an overload or a lost connection; the workflow retries."""


class SequencesFailed(ModelError):
    """Some sequences of a call failed; the others can go on.

    Attributes:
        failures: the error of each, by slot.
    """

    def __init__(self, failures: Mapping[int, ModelError]) -> None:
        self.failures = dict(failures)
        super().__init__("; ".join(dict.fromkeys(map(str, self.failures.values()))))

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.failures,)


class ModelNotAllowed(ViaticumError):
    """A restriction of where data may go refuses the model, or all that could answer. Nothing was sent.

    Attributes:
        models: labels of the refused models, by name.
        only: the restrictions: of each the labels, of which a model has to have one.
    """

    def __init__(
        self,
        message: str,
        *,
        models: Mapping[str, Iterable[str]] | None = None,
        only: Iterable[Iterable[str]] = (),
    ) -> None:
        self.models = {name: tuple(sorted(labels)) for name, labels in (models or {}).items()}
        self.only = tuple(tuple(group) for group in only)
        super().__init__(message)


class Draining(ViaticumError):
    """This process is about to end and takes no new work.

    Attributes:
        thread_id: of a run that was stopped between two calls, all of them settled; `solve` with this id,
            here or elsewhere, continues it.
    """

    def __init__(self, message: str, *, thread_id: str = "") -> None:
        self.thread_id = thread_id
        super().__init__(message)


class ClientClosed(ViaticumError):
    """The client was closed, or belongs to the process that forked this one; open another one."""


class RateLimited(ModelError):
    """A provider takes no more calls for now.

    Attributes:
        retry_after: seconds; None where the provider does not say.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class ProviderUnavailable(ModelError):
    """A provider cannot be reached, or failed while it answered.

    Attributes:
        retry_after: seconds; None where the provider does not say.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class ProviderTimeout(ProviderUnavailable):
    """A model did not answer a call in time. What it read and wrote is charged; there is no further try."""


class ProviderWait(ModelError):
    """The limit of a provider lasts longer than a call may wait for it. Its caller waits, without a hold.

    Attributes:
        seconds: to wait.
        is_refusal: the provider was asked, and refused; the error is the cause.
    """

    def __init__(self, message: str, seconds: float, *, is_refusal: bool) -> None:
        self.seconds, self.is_refusal = seconds, is_refusal
        super().__init__(message)


class DeadlineExceeded(ModelError):
    """The seconds of a run, a call or a request (`max_seconds`) are over, those of a batch in which questions
    begin (`deadline`), or no model can be expected to end in time. What was in flight is ended, and charged
    for what it read and wrote."""


class QuotaExhausted(ModelError):
    """The account at a provider has no credit left, or no quota of this model. No retry helps."""


class AuthenticationFailed(ModelError):
    """A provider rejects the key, or there is none."""


class ContentRefused(ModelError):
    """A provider refused the call for its content."""


class SandboxError(ViaticumError):
    """No sandbox can run programs on this machine."""


class MissingExtra(ViaticumError, ImportError):
    """An optional dependency is not installed, or not as needed; the message names the extra."""

    def __init__(self, package: str, extra: str, problem: str = "") -> None:
        problem = problem or f"{package} is not installed"
        super().__init__(f"{problem}; run: pip install 'viaticum[{extra}]'")
