"""The packaged token routers: small, made for the catalogue's weights, readable without extras."""

from __future__ import annotations

import pytest

from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.models.token_routers import router_folder
from viaticum.routers.token.neural import TrainedRouter
from viaticum.routers.token.policy import TrainedPolicy

MOST_BYTES = 20_000_000
LEARNED = [spec for spec in Catalogue.load().values() if spec.router in ("r2r", "r-stitch+")]


@pytest.mark.parametrize("spec", LEARNED, ids=lambda spec: spec.name)
def test_a_packaged_router_is_small_and_for_the_weights_of_its_pair(spec: ModelSpec) -> None:
    folder, catalogue = router_folder(spec), Catalogue.load()
    assert sum(path.stat().st_size for path in folder.iterdir()) < MOST_BYTES
    trained = (TrainedRouter if spec.router == "r2r" else TrainedPolicy).load(folder)
    for role, name in zip(("small", "large"), spec.members, strict=True):
        trained.check_weights(role, name, catalogue[name].sources[0].sha256)


def test_the_catalogue_offers_learned_routers_of_both_kinds() -> None:
    assert {spec.name for spec in LEARNED} >= {"r2r", "r-stitch+"}


def test_what_it_says_of_itself_names_no_question() -> None:
    """The split keeps ids, which are lines of a file; no text of a data set is shipped."""
    facts = TrainedRouter.load(router_folder(Catalogue.load()["r2r"])).metadata
    assert all(name.isdecimal() for part in facts["split"].values() for name in part)
    assert facts["metrics"]["router"]["all"]["auc"] > 0.85
