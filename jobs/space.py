"""What an encoder and the configuration make of products: resolved once, then carried around.

Light on purpose, neither torch nor FAISS: driver, embedding and index tasks all share it.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from encoders.fusion import FusionSpec
from encoders.spec import PreprocessSpec
from jobs.config import EmbedConfig
from jobs.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class VectorField:
    """One field of products, and what its vectors are computed from.

    Attributes:
        name: "image", "text" or "multimodal".
        dim: D of its vectors.
        fusion: With the weights in force.
    """

    name: str
    dim: int
    fusion: FusionSpec

    @property
    def columns(self) -> tuple[str, ...]:
        """The stored vectors that it is read from."""
        return self.fusion.columns((self.name,))


@dataclass(frozen=True, kw_only=True)
class VectorSpace:
    """One encoder as one job uses it.

    Attributes:
        encoder: The checkpoint's fingerprint.
        dim: D of the vectors that are stored.
        preprocess: How pictures become pixels.
        fusion: With the weights in force.
        fields: What an index is built of, sorted.
    """

    encoder: str
    dim: int
    preprocess: PreprocessSpec
    fusion: FusionSpec
    fields: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The vectors that are stored, in one order whatever that of the fields."""
        return self.fusion.columns(self.fields)

    @property
    def requires(self) -> tuple[str, ...]:
        """Which of image and text a live row can't lack; `multimodal` alone needs one of them."""
        return tuple(name for name in ("image", "text") if name in self.fields)

    @property
    def takes(self) -> tuple[str, ...]:
        """Which of image and text the stored vectors are made from."""
        return ("image", "text") if "multimodal" in self.columns else self.columns

    @property
    def recipe(self) -> str:
        """What is made of a row's content: a row of another recipe is embedded again.

        Neither the weights nor the order of the fields change what is stored.
        """
        return f"columns={','.join(self.columns)} required={','.join(self.requires)}"

    def field(self, name: str) -> VectorField:
        """Return one of the fields."""
        dim = self.fusion.field_dim(name, self.dim)
        return VectorField(name=name, dim=dim, fusion=self.fusion)


def resolve_space(
    embed: EmbedConfig, *, encoder: str, dim: int, preprocess: PreprocessSpec, fusion: FusionSpec
) -> VectorSpace:
    """Fill what the configuration leaves open from the checkpoint.

    Args:
        embed: The embed section.
        encoder: The checkpoint's fingerprint.
        dim: D of the vectors that it stores.
        preprocess: Its preprocessing.
        fusion: Its fusion, with its own weights.

    Raises:
        ConfigError: The encoder lacks a field, or its fusion has no weight to set.
    """
    return VectorSpace(
        encoder=encoder,
        dim=dim,
        preprocess=preprocess,
        fusion=_resolve_fusion(embed, fusion),
        fields=resolve_fields(embed, fusion),
    )


def resolve_fields(embed: EmbedConfig, fusion: FusionSpec) -> tuple[str, ...]:
    """Return the configured fields, sorted; by default image and text, or all of the encoder's.

    Raises:
        ConfigError: The encoder lacks a field.
    """
    if embed.fields is None:
        return ("image", "text") if fusion.kind == "sum" else tuple(sorted(fusion.fields))
    missing = [name for name in embed.fields if name not in fusion.fields]
    if missing:
        raise ConfigError(
            f"embed.fields has {', '.join(missing)}, this encoder (fusion {fusion.kind}) has "
            f"{', '.join(fusion.fields)}"
        )
    return embed.fields


def _resolve_fusion(embed: EmbedConfig, fusion: FusionSpec) -> FusionSpec:
    if embed.image_weight is not None and not fusion.weighted:
        raise ConfigError(
            f"embed.image_weight is {embed.image_weight}, but this encoder's fusion "
            f"({fusion.kind}) has no weight: leave it out"
        )
    names = ("image_weight", "query_image_weight")
    given = {name: getattr(embed, name) for name in names if getattr(embed, name) is not None}
    return replace(fusion, **given)


def describe_space(space: VectorSpace) -> dict[str, Any]:
    """Return plain values for JSON; `parse_space` reads them back."""
    return {
        "encoder": space.encoder,
        "dim": space.dim,
        "preprocess": asdict(space.preprocess),
        "fusion": asdict(space.fusion),
        "fields": {name: space.field(name).dim for name in space.fields},
    }


def parse_space(values: dict[str, Any]) -> VectorSpace:
    """Read the `query` part of a release's manifest.

    Raises:
        ValueError: A part is missing or wrong.
    """
    try:
        preprocess = dict(values["preprocess"])
        preprocess |= {name: tuple(preprocess[name]) for name in ("mean", "std")}
        return VectorSpace(
            encoder=values["encoder"],
            dim=values["dim"],
            preprocess=PreprocessSpec(**preprocess),
            fusion=FusionSpec(**values["fusion"]),
            fields=tuple(sorted(values["fields"])),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"the query contract is incomplete: {error}") from error
