"""Runs in the virtual environment of llmrouter-lib: trains its routers on a folder and writes their choices.

    python _llmrouter_worker.py FOLDER SEED

FOLDER has routing.jsonl, train.pt and test.pt (see `_llmrouter.py`); routes.json is written to it. The
package's own classes train and route; only the function that would embed a question with Longformer is
replaced by a look-up.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

# Module, router, trainer and settings of the package's training configurations.
ROUTERS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "kNN": ("knnrouter", "KNNRouter", "KNNRouterTrainer", {"n_neighbors": 5}),
    "SVM": (
        "svmrouter",
        "SVMRouter",
        "SVMRouterTrainer",
        {"kernel": "rbf", "C": 1.0, "gamma": "scale", "probability": True},
    ),
    "MLP": (
        "mlprouter",
        "MLPRouter",
        "MLPTrainer",
        {
            "hidden_layer_sizes": [128, 64],
            "activation": "relu",
            "lr": 0.001,
            "epochs": 100,
            "batch_size": 32,
            "alpha": 0.0001,
        },
    ),
    "MF": (
        "mfrouter",
        "MFRouter",
        "MFRouterTrainer",
        {"latent_dim": 128, "lr": 0.001, "epochs": 5, "noise_alpha": 0.0},
    ),
}


def choices(folder: Path, name: str, asked: torch.Tensor) -> list[str]:
    module_name, router_name, trainer_name, settings = ROUTERS[name]
    package = importlib.import_module(f"llmrouter.models.{module_name}")
    module = importlib.import_module(f"llmrouter.models.{module_name}.router")
    module.get_longformer_embedding = lambda query: asked[int(query)]  # queries are row numbers
    saved = str(folder / module_name / "model.pkl")
    config = {
        "data_path": {
            "routing_data_train": str(folder / "routing.jsonl"),
            "query_embedding_data": str(folder / "train.pt"),
        },
        "model_path": {"ini_model_path": "", "save_model_path": saved, "load_model_path": saved},
        "metric": {"weights": {"performance": 1, "cost": 0, "llm_judge": 0}},
        "hparam": settings | ({"text_dim": asked.shape[1]} if name == "MF" else {}),
    }
    file = folder / f"{module_name}.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / module_name).mkdir()
    router = getattr(package, router_name)(str(file))
    getattr(package, trainer_name)(router, device="cpu").train()
    return [str(router.route_single({"query": str(row)})["model_name"]) for row in range(len(asked))]


def main() -> None:
    folder, seed = Path(sys.argv[1]).resolve(), int(sys.argv[2])
    asked = torch.load(folder / "test.pt")
    routes = {}
    for name in ROUTERS:
        torch.manual_seed(seed)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            routes[name] = choices(folder, name, asked)
        sys.stderr.write(f"{name} done\n")
    (folder / "routes.json").write_text(json.dumps(routes), encoding="utf-8")


if __name__ == "__main__":
    main()
