"""What an index is made of, as a typed spec: its FAISS factory string, its bytes, its cost.

Letters used in shapes across this package: N rows, Q queries, K neighbours, D dimension.
Vectors are float32 rows of unit length; similarity is the inner product; ids are int64.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NoReturn, get_args

from indexing import estimate
from indexing.vectors import Float32Array as Float32Array
from indexing.vectors import Int64Array as Int64Array
from indexing.vectors import check_unit_rows as check_unit_rows

Rotation = Literal["none", "pca", "opq"]
Coarse = Literal["flat", "hnsw"]
Codec = Literal["flat", "fp16", "sq8", "sq6", "sq4", "pq", "pqfs", "rabitq", "rabitqfs"]
Refine = Literal["none", "fp16", "sq8"]

TRAINING_ROWS_PER_CENTROID = 39  # FAISS's ClusteringParameters.min_points_per_centroid
MAX_PQ_NBITS = 8  # IndexIVFPQ has no search kernel for longer codes
FASTSCAN_NBITS = 4
HNSW_LINKS = 32
ID_BYTES = 8

_ROTATION = re.compile(
    r"PCAR?(?P<pca>[1-9][0-9]*)|OPQ(?P<opq_m>[1-9][0-9]*)(?:_(?P<opq>[1-9][0-9]*))?"
)
_LISTS = re.compile(r"IVF(?P<nlist>[1-9][0-9]*)(?P<hnsw>_HNSW(?P<links>[0-9]*))?")
_PQ = re.compile(r"PQ(?P<m>[1-9][0-9]*)(?:x(?P<nbits>[1-9][0-9]*))?(?P<kind>fs|np)?")
_CODECS: Mapping[str, Codec] = {
    "Flat": "flat",
    "SQfp16": "fp16",
    "SQ8": "sq8",
    "SQ6": "sq6",
    "SQ4": "sq4",
    "RaBitQ": "rabitq",
    "RaBitQfs": "rabitqfs",
}
_CODEC_NAMES: Mapping[Codec, str] = {codec: name for name, codec in _CODECS.items()}
_REFINES: Mapping[str, Refine] = {"Refine(SQfp16)": "fp16", "Refine(SQ8)": "sq8"}
_REFINE_NAMES: Mapping[Refine, str] = {refine: name for name, refine in _REFINES.items()}


@dataclass(frozen=True, kw_only=True)
class IndexSpec:
    """Describe a FAISS index by inner product: flat, or IVF with any codec and re-rank store.

    Equal indexes compare equal: what 0 stands for in `rotated_dim` and `pq_nbits` is filled in.

    Attributes:
        dim: D, the length of every vector, > 0.
        nlist: How many inverted lists; 0: none, search is exhaustive and the rest is default.
        coarse: What finds the lists nearest to a vector: all centroids, or an HNSW graph.
        rotation: What is applied first: nothing, PCA followed by a random rotation (which
            spreads the variance over all dimensions), or OPQ (needs a PQ codec).
        rotated_dim: Dimensions after the rotation, at most dim; 0: dim.
        codec: How a vector is stored in its list: whole, as float16, scalar quantized to 8, 6
            or 4 bits a dimension, PQ, 4-bit FastScan PQ, or RaBitQ, plain or FastScan.
        pq_m: How many sub-quantizers, a divisor of the rotated dimension; 0: codec isn't PQ.
        pq_nbits: Bits a sub-quantizer: 1 to 8 for pq, 4 for pqfs; 0: 8 for pq, 4 for pqfs.
        refine: What whole vectors are kept as beside the index, to re-rank with.
    """

    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "forbid"}

    dim: int
    nlist: int = 0
    coarse: Coarse = "flat"
    rotation: Rotation = "none"
    rotated_dim: int = 0
    codec: Codec = "flat"
    pq_m: int = 0
    pq_nbits: int = 0
    refine: Refine = "none"

    def __post_init__(self) -> None:
        """Fill in what 0 stands for, and refuse what FAISS can't build or would waste.

        Raises:
            ValueError: A number is out of range, or two settings exclude each other.
        """
        self._check_ranges()
        if not self.nlist:
            self._check_flat()
        self._check_rotation()
        if self.rotation != "none" and not self.rotated_dim:
            object.__setattr__(self, "rotated_dim", self.dim)
        if self.codec in ("pq", "pqfs") and not self.pq_nbits:
            own = FASTSCAN_NBITS if self.codec == "pqfs" else MAX_PQ_NBITS
            object.__setattr__(self, "pq_nbits", own)
        self._check_pq()

    def _check_ranges(self) -> None:
        if self.dim < 1:
            raise ValueError(f"dim is {self.dim}: at least 1 is needed")
        for name in ("nlist", "rotated_dim", "pq_m", "pq_nbits"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: 0 or more is needed")
        kinds = {"coarse": Coarse, "rotation": Rotation, "codec": Codec, "refine": Refine}
        for name, kind in kinds.items():
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ValueError(f"{name} is {getattr(self, name)!r}: one of {known} is needed")

    def _check_flat(self) -> None:
        defaults = {"coarse": "flat", "rotation": "none", "codec": "flat", "refine": "none"}
        for name, default in defaults.items():
            found = getattr(self, name)
            if found != default:
                raise ValueError(f"{name} is {found} without lists: set nlist, or {name} {default}")

    def _check_rotation(self) -> None:
        if self.rotation == "none" and self.rotated_dim:
            raise ValueError(f"rotated_dim is {self.rotated_dim} without a rotation: set rotation")
        if self.rotated_dim > self.dim:
            raise ValueError(f"rotated_dim is {self.rotated_dim}, more than dim {self.dim}")
        if self.rotation == "opq" and self.codec not in ("pq", "pqfs"):
            raise ValueError(
                f"rotation is opq with codec {self.codec}: OPQ is learned for PQ codes, "
                "set codec to pq or pqfs, or rotation to pca"
            )

    def _check_pq(self) -> None:
        if self.codec not in ("pq", "pqfs"):
            for name in ("pq_m", "pq_nbits"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} is {getattr(self, name)} with codec {self.codec}: set codec to "
                        f"pq or pqfs, or {name} to 0"
                    )
            return
        if not self.pq_m:
            raise ValueError(f"codec is {self.codec} without pq_m: set pq_m, codes a vector")
        if self.inner_dim % self.pq_m:
            whose = "dim" if self.rotation == "none" else "rotated_dim"
            raise ValueError(f"pq_m {self.pq_m} does not divide {whose} {self.inner_dim}")
        if self.codec == "pqfs" and self.pq_nbits != FASTSCAN_NBITS:
            raise ValueError(f"pq_nbits is {self.pq_nbits}: FastScan codes have {FASTSCAN_NBITS}")
        if self.pq_nbits > MAX_PQ_NBITS:
            raise ValueError(f"pq_nbits is {self.pq_nbits}: 1 to {MAX_PQ_NBITS} is needed")

    @classmethod
    def parse(cls, factory: str, dim: int) -> IndexSpec:
        """Read a FAISS factory string, of the kinds that `factory` prints.

        'PCA64' is read as 'PCAR64', and 'PQ16' as 'PQ16np': polysemous codes are never trained.

        Args:
            factory: Such as 'Flat' or 'PCAR256,IVF1024_HNSW32,PQ128x4fs,Refine(SQ8)'.
            dim: D, the length of every vector.

        Raises:
            ValueError: A part isn't understood, or together they are impossible.
        """
        parts = factory.replace(" ", "").split(",")
        if parts == ["Flat"]:
            return cls(dim=dim)
        fields: dict[str, Any] = {}
        if rotation := _ROTATION.fullmatch(parts[0]):
            fields |= _parse_rotation(rotation)
            del parts[0]
        found = dict(enumerate(parts))
        fields |= _parse_lists(factory, found.get(0, ""))
        fields |= _parse_codec(factory, found.get(1, ""))
        if len(parts) > 2:
            if parts[2] not in _REFINES or len(parts) > 3:
                _refuse(factory, ",".join(parts[2:]), f"nothing, {' or '.join(_REFINES)}")
            fields["refine"] = _REFINES[parts[2]]
        opq_m = fields.pop("opq_m", None)
        if opq_m not in (None, fields.get("pq_m", opq_m)):
            raise ValueError(f"index {factory!r}: OPQ{opq_m} is learned for another PQ")
        return cls(dim=dim, **fields)

    @classmethod
    def for_catalog(
        cls,
        ntotal: int,
        dim: int,
        *,
        memory_budget_bytes: int | None = None,
        target_intersection: float = 0.95,
        partitions: int = 1,
    ) -> tuple[IndexSpec, list[str]]:
        """Choose an index for a catalog of a given size; see `indexing.choose.choose_spec`.

        Raises:
            ValueError: A number is out of range, or nothing fits the budget.
        """
        from indexing.choose import choose_spec  # which needs this class

        return choose_spec(
            ntotal,
            dim,
            memory_budget_bytes=memory_budget_bytes,
            target_intersection=target_intersection,
            partitions=partitions,
        )

    @property
    def factory(self) -> str:
        """Return the factory string of the whole, e.g. 'IVF64,PQ8np,Refine(SQ8)'."""
        refine = f",{_REFINE_NAMES[self.refine]}" if self.refine != "none" else ""
        return self.base_factory + refine

    @property
    def base_factory(self) -> str:
        """Return what FAISS builds: the factory string without the re-rank store.

        'np' turns off polysemous training, which FAISS does by default: it makes training
        several times slower for codes that are never used here.
        """
        if not self.nlist:
            return "Flat"
        lists = f"IVF{self.nlist}" + (f"_HNSW{HNSW_LINKS}" if self.coarse == "hnsw" else "")
        rotations = {
            "none": "",
            "pca": f"PCAR{self.rotated_dim},",
            "opq": f"OPQ{self.pq_m}_{self.rotated_dim},",
        }
        nbits = "" if self.pq_nbits == MAX_PQ_NBITS else f"x{self.pq_nbits}"
        codecs = {
            **_CODEC_NAMES,
            "pq": f"PQ{self.pq_m}{nbits}np",
            "pqfs": f"PQ{self.pq_m}x{FASTSCAN_NBITS}fs",
        }
        return f"{rotations[self.rotation]}{lists},{codecs[self.codec]}"

    @property
    def inner_dim(self) -> int:
        """Return the dimension after the rotation."""
        return self.rotated_dim or self.dim

    @property
    def code_bytes(self) -> int:
        """Return the bytes of one code, as FAISS's code_size; FastScan's stand in blocks."""
        bits: dict[Codec, int] = {
            "flat": 32 * self.inner_dim,
            "fp16": 16 * self.inner_dim,
            "sq8": 8 * self.inner_dim,
            "sq6": 6 * self.inner_dim,
            "sq4": 4 * self.inner_dim,
            "pq": self.pq_m * self.pq_nbits,
            "pqfs": (self.pq_m + self.pq_m % 2) * FASTSCAN_NBITS,
            "rabitq": self.inner_dim + 64,
            "rabitqfs": self.inner_dim + 64,
        }
        return (bits[self.codec] + 7) // 8

    @property
    def bytes_per_vector(self) -> int:
        """Return the bytes one vector takes in the index file: its code and its 8-byte id."""
        return self.code_bytes + ID_BYTES

    @property
    def refine_bytes_per_vector(self) -> int:
        """Return the bytes one vector takes in the re-rank store, on disk; 0 without one.

        A float16 row, or 8 bits a dimension and a float32 scale; and its 8-byte id.
        """
        code = {"none": -ID_BYTES, "fp16": 2 * self.dim, "sq8": self.dim + 4}
        return code[self.refine] + ID_BYTES

    @property
    def is_fastscan(self) -> bool:
        """Say whether codes stand in blocks of 32, which are always read into memory."""
        return self.codec in ("pqfs", "rabitqfs")

    @property
    def is_mappable(self) -> bool:
        """Say whether FAISS can leave the codes on disk, and map them into memory."""
        return not self.is_fastscan

    @property
    def min_training_rows(self) -> int:
        """Return the fewest training rows; 0 for flat.

        39 for each centroid, of the lists and of PQ, as FAISS asks; for PCA as many as dim.
        """
        if not self.nlist:
            return 0
        centroids = max(self.nlist, 2**self.pq_nbits if self.pq_m else 0)
        pca_rows = self.dim if self.rotation == "pca" else 0
        return max(TRAINING_ROWS_PER_CENTROID * centroids, pca_rows)

    @property
    def fixed_bytes(self) -> int:
        """Return the bytes of memory of an empty index; see `indexing.estimate.fixed_bytes`."""
        return estimate.fixed_bytes(self)

    def memory_bytes(self, ntotal: int, *, partitions: int = 1) -> int:
        """Return the most memory it takes; see `indexing.estimate.memory_bytes`."""
        return estimate.memory_bytes(self, ntotal, partitions=partitions)

    def training_bytes(self, rows: int) -> int:
        """Return about what training takes; see `indexing.estimate.training_bytes`."""
        return estimate.training_bytes(self, rows)

    def training_gflops(self, rows: int) -> float:
        """Return about what training takes; see `indexing.estimate.training_gflops`."""
        return estimate.training_gflops(self, rows)


def _parse_rotation(found: re.Match[str]) -> dict[str, Any]:
    if found["pca"]:
        return {"rotation": "pca", "rotated_dim": int(found["pca"])}
    rotated_dim = int(found["opq"] or 0)
    return {"rotation": "opq", "rotated_dim": rotated_dim, "opq_m": int(found["opq_m"])}


def _parse_lists(factory: str, part: str) -> dict[str, Any]:
    found = _LISTS.fullmatch(part)
    if not found or found["links"] not in (None, "", str(HNSW_LINKS)):
        _refuse(factory, part, f"IVF1024 or IVF1024_HNSW{HNSW_LINKS}, PCAR64 or OPQ16_64 before it")
    return {"nlist": int(found["nlist"]), "coarse": "hnsw" if found["hnsw"] else "flat"}


def _parse_codec(factory: str, part: str) -> dict[str, Any]:
    if part in _CODECS:
        return {"codec": _CODECS[part]}
    found = _PQ.fullmatch(part)
    if not found:
        _refuse(factory, part, f"{', '.join(_CODECS)}, PQ16np, PQ16x6np or PQ16x4fs")
    codec = "pqfs" if found["kind"] == "fs" else "pq"
    nbits = int(found["nbits"] or MAX_PQ_NBITS)
    return {"codec": codec, "pq_m": int(found["m"]), "pq_nbits": nbits}


def _refuse(factory: str, part: str, understood: str) -> NoReturn:
    raise ValueError(f"index {factory!r}: found {part!r}, understood here: {understood}")
