"""The folder of a learned router: `router.json` (names, settings, facts) and `router.safetensors` (tensors).

The names in both files are those of format 1 and stay, whatever the fields of the classes are called. The
embeddings are kept in half precision, outcomes as int8. Writing moves the last version to `previous/`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from viaticum.errors import DataError, InputError
from viaticum.files import atomic_file, atomic_write
from viaticum.routers.query.forest import Features, ForestHead
from viaticum.routers.query.heads import CalibratedMixture, Columns, DualHead, LogisticHead
from viaticum.routers.query.parameters import AddedPairs, RouterParameters, RTRSettings
from viaticum.routers.query.plans import Plan
from viaticum.routers.query.token_quantiles import TokenQuantiles
from viaticum.routers.query.trust import Trust
from viaticum.types import Pair

FORMAT = 1
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
    """Write both files; each appears whole or not at all."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "router.json").exists():
        (folder / "previous").mkdir(exist_ok=True)
        for name in ("router.json", "router.safetensors"):
            shutil.copy2(folder / name, folder / "previous" / name)
    tensors = {name: each.contiguous().clone() for name, each in _tensors(parameters).items()}
    with atomic_file(folder / "router.safetensors") as scratch:
        save_file(tensors, scratch)
    atomic_write(folder / "router.json", json.dumps(_document(parameters), indent=1) + "\n")


def load_parameters(folder: Path) -> RouterParameters:
    """Read both files.

    Raises:
        InputError: there is no router in the folder.
        DataError: it is damaged, or of a later format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        document = json.loads((folder / "router.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "router.safetensors")
    except OSError as error:
        raise InputError(
            f"no router in {folder} ({error.strerror or error}); make one with: viaticum router fit"
        ) from None
    except (ValueError, SafetensorError) as error:
        raise DataError(f"the router in {folder} is damaged ({error}); fit it again") from None
    if document.get("format") != FORMAT:
        raise DataError(
            f"the router in {folder} has format {document.get('format')}, this version reads {FORMAT}; "
            "fit it again"
        )
    try:
        return _parse(document, tensors)
    except (KeyError, RuntimeError, TypeError) as error:
        raise DataError(f"the router in {folder} is damaged ({error}); fit it again") from None


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
        plans=tuple(Plan(tuple(map(Pair.parse, plan["pairs"])), plan["need"]) for plan in document["plans"]),
        embeddings=tensors["embeddings"].float(),
        correct=correct,
        cost=tensors["cost"],
        columns=columns,
        logistic=LogisticHead(tensors["logistic"]),
        dual=dual.freeze(),
        mixture=CalibratedMixture(*(tensors[f"mixture.{name}"] for name in MIXTURE_TENSORS)),
        **{field: tensors[name] for name, field in TENSORS.items()},
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
