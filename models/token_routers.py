"""The token router that a pair's catalogue entry names: R-Stitch, R-Stitch+, R2R, or none (drafts alone).

A learned router belongs to the weights it was trained on; another pair's is refused. Leaves out the routers
themselves (`viaticum.routers.token`) and their training (`viaticum.training`).
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import InputError
from viaticum.weights import fingerprint

if TYPE_CHECKING:
    from viaticum.decoders import Runner
    from viaticum.routers.token import TokenRouter
    from viaticum.routers.token.neural import LearnedDivergenceRouter, TrainedRouter
    from viaticum.routers.token.policy import RStitchPlus, TrainedPolicy

SPECULATIVE = "speculative"  # the large model writes every token, and verifies what the small one drafts


def token_router(spec: ModelSpec, catalogue: Catalogue, small: Runner) -> TokenRouter:
    """Return the token router of a pair. small: the runner of its small model.

    Raises:
        InputError: the router's name is unknown, or a learned one was trained on other weights.
    """
    from viaticum.routers.token import AlwaysLarge, EntropyRouter

    if spec.router == SPECULATIVE:
        return AlwaysLarge()
    if spec.router == "r2r":
        return learned_router(spec, catalogue, small)
    if spec.router == "r-stitch+":
        return learned_policy(spec, catalogue, small)
    if spec.router != "r-stitch":
        raise InputError(
            f"{spec.name}: unknown token router {spec.router!r}; known: r-stitch, r-stitch+, r2r, speculative"
        )
    assert spec.tau is not None, "the catalogue checks that a pair has a tau"
    return EntropyRouter(spec.tau)


def learned_router(spec: ModelSpec, catalogue: Catalogue, small: Runner) -> LearnedDivergenceRouter:
    """Return R2R's router of a pair, with the entry's threshold or else the calibrated one."""
    from viaticum.routers.token.drift import ShareController
    from viaticum.routers.token.neural import LearnedDivergenceRouter, TrainedRouter

    trained = TrainedRouter.load(router_folder(spec))
    check_members(trained, spec, catalogue)
    threshold = trained.threshold if spec.share is None else trained.threshold_for(spec.share)
    drift = None
    if spec.drift:
        target = trained.metadata["calibration"].get("share") if spec.share is None else spec.share
        drift = ShareController(target)
    return LearnedDivergenceRouter(
        trained.network,
        small.embeddings,
        threshold if spec.threshold is None else spec.threshold,
        drift,
    )


def learned_policy(spec: ModelSpec, catalogue: Catalogue, small: Runner) -> RStitchPlus:
    """Return R-Stitch+'s router of a pair, with the entry's tau and threshold or else the policy's own."""
    from viaticum.routers.token.policy import RStitchPlus, TrainedPolicy

    trained = TrainedPolicy.load(router_folder(spec))
    check_members(trained, spec, catalogue)
    return RStitchPlus(
        trained.policy.to(small.device),
        trained.tau if spec.tau is None else spec.tau,
        trained.threshold if spec.threshold is None else spec.threshold,
    )


def check_members(trained: TrainedRouter | TrainedPolicy, spec: ModelSpec, catalogue: Catalogue) -> None:
    """Raise `InputError` unless a router was trained on the weights that this pair's members have here.

    The weights of a served model are elsewhere, and are not compared.
    """
    for role, name in zip(("small", "large"), spec.members, strict=True):
        if catalogue[name].engine == "served":
            continue
        trained.check_weights(role, name, fingerprint(catalogue[name]))


def router_folder(spec: ModelSpec) -> Path:
    """Return the folder of a pair's learned router: the entry's router_path, else the packaged one.

    Raises:
        InputError: the entry names no folder and none is packaged.
    """
    if spec.router_path is not None:
        return Path(spec.router_path).expanduser()
    packaged = Path(str(resources.files("viaticum") / "token_routers" / spec.file_name))
    if not packaged.is_dir():
        command = "policy" if spec.router == "r-stitch+" else "train"
        raise InputError(
            f"{spec.name}: no router is packaged for it; train one with `viaticum tokens {command}` and give "
            "its folder as router_path"
        )
    return packaged
