"""The command line: wires the commands together, and turns errors into messages and exit codes.

Results go to stdout, progress to stderr. An error that Viaticum raises on purpose ends as one line and exit
code 1.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from importlib.util import find_spec

import typer

from viaticum.commands import answer, budget, keys, models, outcomes, router, sandbox, tokens
from viaticum.commands.batch import batch
from viaticum.commands.chat import chat
from viaticum.commands.demo import demo
from viaticum.commands.doctor import doctor
from viaticum.commands.profile import profile
from viaticum.commands.report import report
from viaticum.commands.run import run
from viaticum.commands.serve import serve
from viaticum.commands.shadow import shadow
from viaticum.commands.solve import solve
from viaticum.commands.spending import spending
from viaticum.commands.terminal import visible
from viaticum.commands.token_policy import policy, policy_evaluate
from viaticum.commands.trace import trace
from viaticum.commands.tune import tune
from viaticum.errors import MissingExtra, ViaticumError, WeightsError
from viaticum.signals import INTERRUPTED, CommandInterrupts

app = typer.Typer(
    invoke_without_command=True, help="An allowance for every question.", pretty_exceptions_enable=False
)
app.add_typer(models.app, name="models")
app.add_typer(router.app, name="router")
app.add_typer(outcomes.app, name="outcomes")
app.add_typer(tokens.app, name="tokens")
app.add_typer(sandbox.app, name="sandbox")
app.add_typer(budget.app, name="budget")
app.add_typer(keys.app, name="keys")
app.add_typer(answer.app, name="answer")
budget.app.command()(spending)
app.command()(batch)
app.command()(chat)
app.command()(demo)
app.command()(doctor)
app.command()(serve)
tokens.app.command()(policy)
tokens.app.command()(policy_evaluate)
app.command()(report)
app.command()(run)
app.command()(shadow)
app.command()(solve)
app.command()(profile)
app.command()(trace)
app.command()(tune)


FIRST_COMMANDS = """\
Viaticum gives every question an allowance and never spends more.

  viaticum solve "QUESTION" --budget 0.01     one question, for a cent at most
  viaticum batch QUESTIONS.csv --budget 5     a file of questions
  viaticum serve --budget 20                  OpenAI's API, routed and capped

What it gets on this machine, in minutes: viaticum demo. What works here: viaticum doctor.
All commands: viaticum --help.
"""


@app.callback()
def first_commands(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(FIRST_COMMANDS, nl=False)


_LOCAL = ("torch", "transformers", "sentence_transformers", "sklearn", "scipy", "tokenizers", "safetensors")
_EXTRAS = {
    **dict.fromkeys((*_LOCAL, "accelerate", "gguf", "pyarrow", "huggingface_hub"), "local"),
    **dict.fromkeys(("starlette", "uvicorn", "prometheus_client"), "server"),
    **dict.fromkeys(("altair", "vl_convert", "jinja2"), "reports"),
    **dict.fromkeys(("langchain", "langchain_core"), "langchain"),
    "litellm": "remote",
    "psycopg": "postgres",
    "ray": "ray",
}


def _first_steps(error: ViaticumError) -> str:
    """What to do on a machine where nothing is set up yet."""
    if isinstance(error, WeightsError) and "not on this machine" in str(error):
        also = "" if find_spec("torch") else "; models that run here also need: pip install 'viaticum[local]'"
        return f" (`viaticum models pull` without a name fetches all that is used by default{also})"
    return ""


def _drop_output() -> None:
    """Send what is still in the buffer of stdout nowhere: Python would write it once more at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Run the `viaticum` command.

    Exit codes: 0 done, 1 an error with its message, 2 wrong usage, 130 interrupted.
    """
    with CommandInterrupts() as interrupts:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars would break our lines
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # such as cp1252's: what it lacks is shown as an escape
                stream.reconfigure(errors="backslashreplace")
        try:
            try:
                app()
            finally:
                sys.stdout.flush()
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        except Exception as error:
            if interrupts.is_cause_of(error):
                sys.exit(INTERRUPTED)
            sys.stderr.write(_message(error))
            sys.exit(1)


def _message(error: Exception) -> str:
    """What is told of an error that ends a command; "" for nothing. Raises one that nobody expected."""
    if isinstance(error, OSError):  # a full disk, a file that may not be read
        _drop_output()
        if isinstance(error, BrokenPipeError):  # who read it has enough
            return ""
        where = f": {error.filename}" if error.filename else ""
        return visible(f"error: {error.strerror or error}{where}\n", sys.stderr)
    if isinstance(error, ViaticumError):
        return visible(f"error: {error}{_first_steps(error)}\n", sys.stderr)
    if isinstance(error, ModuleNotFoundError):  # a package of an extra, imported where it is needed
        package = (error.name or "").partition(".")[0]
        if package in _EXTRAS:
            return f"error: {MissingExtra(package, _EXTRAS[package])}\n"
    raise error
