"""The folder of a learned router: `router.json` (names, settings, facts) and `router.safetensors` (tensors).

The names in both files are those of format 1 and stay, whatever the fields of the classes are called. The
embeddings are kept in half precision, outcomes as int8. Writing moves the last version to `previous/`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from viaticum.errors import DataError, InputError, one_line
from viaticum.files import atomic_file, atomic_write
from viaticum.routers.query.forest import Features, ForestHead
from viaticum.routers.query.heads import CalibratedMixture, Columns, DualHead, LogisticHead
from viaticum.routers.query.parameters import AddedPairs, RouterParameters, RTRSettings
from viaticum.routers.query.plans import Plan
from viaticum.routers.query.token_quantiles import TokenQuantiles
from viaticum.routers.query.trust import Trust
from viaticum.types import Pair

FORMAT = 1
DIGEST = "digest"  # in router.json, and in the metadata of router.safetensors
LONGEST_REASON = 200  # characters of what is wrong with a file
READS, SECONDS_BETWEEN_READS = 100, 0.02  # of files that another process is writing
ADDED_SETTINGS = {"savings": False}  # not in the files of earlier versions, which predict as they did
# Name in the file: name of the field.
TENSORS = {
    "static": "static_means",
    "stretch": "token_offsets",
    "rate": "prices",
    "worth": "cost_weights",
    "spend": "cost_ratios",
}
ADDED_TENSORS = {
    "weights": "weights",
    "offset": "offset",
    "alike": "similarity",
    "lengths": "token_offsets",
    "rate": "prices",
    "seconds": "seconds",
}
COLUMN_TENSORS = tuple(field.name for field in fields(Columns))
TOKEN_TENSORS = tuple(field.name for field in fields(TokenQuantiles))
FEATURE_TENSORS = tuple(field.name for field in fields(Features))
FOREST_TENSORS = ("feature", "threshold", "children", "leaf_of")
TRUST_TENSORS = ("similarity", "shares", "difficulty", "cost_factor", "widening")
MIXTURE_TENSORS = tuple(field.name for field in fields(CalibratedMixture))


def save_parameters(parameters: RouterParameters, folder: Path) -> None:
    """Write both files; each appears whole or not at all. A digest in both says that they belong together."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "router.json").exists():
        (folder / "previous").mkdir(exist_ok=True)
        for name in ("router.json", "router.safetensors"):
            shutil.copy2(folder / name, folder / "previous" / name)
    tensors = {name: each.contiguous().clone() for name, each in _tensors(parameters).items()}
    document = _document(parameters)
    document[DIGEST] = digest = _digest(document, tensors)
    with atomic_file(folder / "router.safetensors") as scratch:
        save_file(tensors, scratch, {DIGEST: digest})
    atomic_write(folder / "router.json", json.dumps(document, indent=1) + "\n")


def load_parameters(folder: Path) -> RouterParameters:
    """Read both files.

    Raises:
        InputError: there is no router in the folder.
        DataError: it is damaged, or of a later format.
    """
    document, tensors = _read(folder)
    if document.get("format") != FORMAT:
        raise DataError(
            f"the router in {folder} has format {document.get('format')}, this version reads {FORMAT}; "
            "fit it again"
        )
    try:
        parameters = _parse(document, tensors)
        _check(parameters)
    except (KeyError, RuntimeError, TypeError, ValueError, AttributeError, IndexError, InputError) as error:
        why = one_line(str(error), LONGEST_REASON)
        raise DataError(f"the router in {folder} is damaged ({why}); fit it again") from None
    return parameters


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of both files, of one router: another process may be writing a new one just now."""
    for _ in range(READS):
        document, tensors, digest = _read_once(folder)
        if digest == document.get(DIGEST):  # None in files of earlier versions
            return document, tensors
        time.sleep(SECONDS_BETWEEN_READS)
    raise DataError(
        f"router.json and router.safetensors in {folder} are of two routers: writing was interrupted, or one "
        "of them was copied alone; take both from previous/, or fit it again"
    )


def _read_once(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], str | None]:
    """What is in router.json, the tensors, and the digest that is kept with them."""
    from safetensors import SafetensorError, safe_open

    try:
        document = json.loads((folder / "router.json").read_text(encoding="utf-8"))
        with safe_open(folder / "router.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
            digest = (file.metadata() or {}).get(DIGEST)
    except OSError as error:
        raise InputError(
            f"no router in {folder} ({error.strerror or error}); make one with: viaticum router fit"
        ) from None
    except (ValueError, SafetensorError) as error:
        raise DataError(f"the router in {folder} is damaged ({error}); fit it again") from None
    if not isinstance(document, dict):
        raise DataError(f"the router in {folder} is damaged (router.json is no object); fit it again")
    return document, tensors, digest


def _digest(document: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    for name, each in sorted(tensors.items()):
        digest.update(name.encode() + each.numpy().tobytes())
    return digest.hexdigest()[:16]


def _check(parameters: RouterParameters) -> None:
    """Raise `ValueError` where names and tensors do not belong together."""
    pairs, plans = parameters.pairs, parameters.plans
    alone = [plan.pairs[0] for plan in plans[: len(pairs)] if len(plan.pairs) == 1]
    if tuple(alone) != pairs or parameters.columns.members.shape != (len(plans), len(pairs)):
        raise ValueError("its pairs, plans and tensors do not belong together")
    if unknown := set(parameters.settings.heads) - set(RTRSettings().heads):
        raise ValueError(f"unknown heads {', '.join(map(str, unknown))}")
    if "questions" not in parameters.facts or "encoder" not in parameters.facts:
        raise ValueError("its facts name no encoder and no questions")


def _tensors(parameters: RouterParameters) -> dict[str, Tensor]:
    """The content of router.safetensors."""
    added = parameters.added
    return {
        "embeddings": parameters.embeddings.half(),
        "right": _to_int8(parameters.correct),
        "cost": parameters.cost,
        "logistic": parameters.logistic.weights,
        **{f"mixture.{name}": getattr(parameters.mixture, name) for name in MIXTURE_TENSORS},
        **{name: getattr(parameters, field) for name, field in TENSORS.items()},
        "limits": parameters.trust.limits,
        **{f"trust.{name}": getattr(parameters.trust, name) for name in TRUST_TENSORS},
        **{f"columns.{name}": getattr(parameters.columns, name) for name in COLUMN_TENSORS},
        **{f"dual.{name}": each for name, each in parameters.dual.state_dict().items()},
        **({} if parameters.sharing is None else {"sharing": parameters.sharing}),
        **({} if parameters.seconds is None else {"seconds": parameters.seconds}),
        **({} if parameters.forest is None else _forest_tensors(parameters.forest)),
        **(
            {f"tokens.{name}": getattr(parameters.tokens, name) for name in TOKEN_TENSORS}
            if parameters.tokens
            else {}
        ),
        **(
            {f"added.{name}": getattr(added, field) for name, field in ADDED_TENSORS.items()} if added else {}
        ),
    }


def _forest_tensors(forest: ForestHead) -> dict[str, Tensor]:
    return {
        **{f"forest.{name}": getattr(forest, name) for name in FOREST_TENSORS},
        **{f"forest.features.{name}": getattr(forest.features, name) for name in FEATURE_TENSORS},
    }


def _document(parameters: RouterParameters) -> dict[str, Any]:
    """The content of router.json."""
    return {
        "router": "rtr",
        "format": FORMAT,
        "pairs": [str(pair) for pair in parameters.pairs],
        "plans": [
            {"pairs": [str(pair) for pair in plan.pairs], "need": plan.need} for plan in parameters.plans
        ],
        "added": [str(pair) for pair in parameters.added.pairs] if parameters.added else [],
        "settings": asdict(parameters.settings),
        "facts": parameters.facts,
        "profiles": parameters.profiles(),
    }


def _parse(document: dict[str, Any], tensors: dict[str, Tensor]) -> RouterParameters:
    columns = Columns(**{name: tensors[f"columns.{name}"] for name in COLUMN_TENSORS})
    correct, pairs = _from_int8(tensors["right"]), tuple(map(Pair.parse, document["pairs"]))
    dual = DualHead(columns, correct, torch.zeros(1, len(pairs)), tensors["embeddings"].shape[1])
    dual.load_state_dict(
        {name.removeprefix("dual."): each for name, each in tensors.items() if name.startswith("dual.")}
    )
    added, heads = tuple(map(Pair.parse, document["added"])), tuple(document["settings"]["heads"])
    return RouterParameters(
        pairs=pairs,
        plans=tuple(
            Plan(tuple(map(Pair.parse, plan["pairs"])), plan["need"], stored=True)
            for plan in document["plans"]
        ),
        embeddings=tensors["embeddings"].float(),
        correct=correct,
        cost=tensors["cost"],
        columns=columns,
        logistic=LogisticHead(tensors["logistic"]),
        dual=dual.freeze(),
        mixture=CalibratedMixture(*(tensors[f"mixture.{name}"] for name in MIXTURE_TENSORS)),
        # Ratios of free choices are NaN in files of earlier versions.
        **{field: tensors[name] for name, field in TENSORS.items()}
        | {"cost_ratios": tensors["spend"].nan_to_num(nan=1.0)},
        trust=_parse_trust(tensors, len(correct), len(pairs)),
        settings=RTRSettings(**(ADDED_SETTINGS | document["settings"] | {"heads": heads})),
        facts=document["facts"],
        tokens=TokenQuantiles(**{name: tensors[f"tokens.{name}"] for name in TOKEN_TENSORS})
        if "tokens.weights" in tensors  # not in the files of earlier versions
        else None,
        added=_parse_added(tensors, added) if added else None,
        sharing=tensors.get("sharing"),
        seconds=tensors.get("seconds"),
        forest=_parse_forest(tensors, correct) if "forest.feature" in tensors else None,
    )


def _parse_added(tensors: dict[str, Tensor], pairs: tuple[Pair, ...]) -> AddedPairs:
    """In files of earlier versions their seconds are not known."""
    found = {"added.seconds": torch.full((len(pairs),), float("nan"))} | tensors
    return AddedPairs(pairs, **{field: found[f"added.{name}"] for name, field in ADDED_TENSORS.items()})


def _parse_forest(tensors: dict[str, Tensor], correct: Tensor) -> ForestHead:
    features = Features(**{name: tensors[f"forest.features.{name}"] for name in FEATURE_TENSORS})
    nodes = {name: tensors[f"forest.{name}"] for name in FOREST_TENSORS}
    return ForestHead(features, **nodes, correct=correct, cost=tensors["cost"])


def _parse_trust(tensors: dict[str, Tensor], questions: int, pairs: int) -> Trust:
    """In files of earlier versions the heads alone count near the known questions, and the means far away."""
    earlier = {
        "similarity": torch.zeros(questions),
        "shares": torch.tensor([0.0, 1.0]),
        "difficulty": tensors.get("trust.shares", torch.tensor([0.0, 1.0])),
        "cost_factor": torch.tensor(1.0),
        "widening": torch.zeros(pairs),
    }
    found = {name: tensors.get(f"trust.{name}", each) for name, each in earlier.items()}
    return Trust(limits=tensors["limits"], **found)


def _to_int8(correct: Tensor) -> Tensor:
    """0, 1 and NaN as 0, 1 and -1."""
    return correct.nan_to_num(-1.0).to(torch.int8)


def _from_int8(stored: Tensor) -> Tensor:
    correct = stored.float()
    return correct.masked_fill(correct < 0, float("nan"))
