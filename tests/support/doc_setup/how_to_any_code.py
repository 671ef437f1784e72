"""An agent that calls a model through the SDK of OpenAI, and prices of that model at its server."""

import os
from pathlib import Path

from openai import OpenAI

_file = Path(os.environ["XDG_CONFIG_HOME"]) / "viaticum" / "catalogue.toml"
_file.write_text(
    _file.read_text()
    + f'[models.mini]\ndescription = "d"\nkind = "remote"\nlitellm_model = "openai/gpt-4o-mini"\n'
    f'api_base = "{os.environ["OPENAI_BASE_URL"]}"\ncontext_length = 8192\n'
    "input_price = 0.15\noutput_price = 0.60\n"
)


def run_my_agent() -> None:
    with OpenAI() as client:
        client.chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": "Hello"}])
