"""The whole configuration of a job, as frozen models; `jobs.config_file` reads them from YAML.

Every key, its default and its meaning is a field here; `docs/config.md` is generated from it.
"""

import hashlib
import json
import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from encoders.spec import EncoderSpec
from indexing.drift import DriftLimits
from jobs.images import ImagesConfig

FieldName = Literal["image", "text", "multimodal"]
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")


class Section(BaseModel):
    """A part of the configuration: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CatalogConfig(Section):
    """Where the products are and what their columns are called."""

    path: str = Field(
        description="Parquet: a file, a folder (Hive partitions too) or a glob, local or s3://."
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Our name to the catalog's: {product_id: asin, image_uri: photos}.",
    )
    text: str = Field(
        default="{title}", description="Template over columns: the text that is embedded."
    )
    max_text_chars: int = Field(
        default=100_000, gt=0, description="A longer text is rejected as text_too_long."
    )


class EmbedConfig(Section):
    """How products become vectors."""

    fields: tuple[FieldName, ...] | None = Field(
        default=None,
        min_length=1,
        description="Which vectors a product has; none: image and text, or multimodal for an MSR "
        "encoder. A row is live only if all of them exist; multimodal alone needs one of image "
        "and text.",
    )
    image_weight: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of the image in a product's `multimodal` vector; none: the "
        "checkpoint's. Another one embeds nothing again.",
    )
    query_image_weight: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of the photo in a query of photo and words; none: the checkpoint's.",
    )
    batch_size: int = Field(
        default=64, gt=0, description="Rows a batch of an actor; on CPUs encoded in parts."
    )
    actors: int = Field(
        default=0,
        ge=0,
        description="Embedding actors; 0: as many as the machines have room for, and more when "
        "machines join.",
    )
    gpus_per_actor: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="GPUs that an embedding actor asks for; 0.5: two share one. None: 1 where the "
        "cluster has a GPU when embedding starts, else 0. Name it where GPU workers are started "
        "on demand.",
    )
    cpus_per_actor: int | None = Field(
        default=None,
        gt=0,
        description="CPUs of an embedding actor; none: 1, or with a GPU none for itself: the "
        "tasks that decode for it ask for 1 each.",
    )
    memory_mb_per_actor: int | None = Field(
        default=None,
        gt=0,
        description="MiB of memory that an embedding actor asks for, so that no machine is given "
        "more actors than it can hold; none: nothing is asked.",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="auto: bf16 on a GPU, and on a CPU that multiplies in it (AMX, AVX512_BF16), "
        "if it leaves the encoder's canaries at cosine 0.999 of fp32; else fp32.",
    )
    rows_per_file: int = Field(
        default=2048,
        gt=0,
        description="Most rows in one data file: what a killed job loses at most an actor.",
    )
    commit_interval_s: float = Field(
        default=30.0, gt=0, description="Written files are committed together, at most this often."
    )
    duplicate_cache_rows: int = Field(
        default=100_000,
        ge=0,
        description="Image vectors that are kept to be given to byte-identical images; 0: none.",
    )

    @field_validator("fields")
    @classmethod
    def _sort(cls, fields: tuple[FieldName, ...] | None) -> tuple[FieldName, ...] | None:
        """Sort them: the order in which they are named changes nothing."""
        return fields and tuple(sorted(set(fields)))


class IndexConfig(Section):
    """How vectors become indexes. What is not given is chosen from the catalog's size."""

    factory: str | None = Field(
        default=None,
        description="FAISS factory string, as IVF1024,SQ8 or PCAR256,IVF4096_HNSW32,PQ128x4fs,"
        "Refine(SQ8); none: chosen from the catalog's size, the budget and the target.",
    )
    memory_budget_mb: int | None = Field(
        default=None,
        gt=0,
        description="Most MiB of memory that one field's index may take where it is served; a "
        "refine store is mapped from disk and does not count.",
    )
    train_rows: int | None = Field(
        default=None,
        gt=0,
        description="Most rows in the uniform training sample; none: 64 a list, at least 65,536.",
    )
    max_partition_vectors: int = Field(
        default=20_000_000,
        gt=0,
        description="Most vectors in one index file: what merging holds in memory. Above it an "
        "index has several files, searched together.",
    )
    target_intersection: float = Field(
        default=0.95,
        gt=0,
        le=1,
        description="The cheapest search that finds this share of the 10 nearest is taken.",
    )
    seed: int = Field(default=0, ge=0, description="Seeds the sample and k-means.")
    drift: Annotated[
        DriftLimits, Field(description="A limit that is passed trains the index anew.")
    ] = DriftLimits()


class EvaluateConfig(Section):
    """What the release is measured with."""

    queries: str | None = Field(
        default=None,
        description="Parquet of labelled queries: query_image_uri and/or query_text, product_id; "
        "optional query_id (its rows are one query) and gain (right is what is above 0).",
    )
    sample_rows: int = Field(
        default=1000, gt=0, description="Catalog vectors used as queries against exact search."
    )
    max_queries: int = Field(default=1000, gt=0, description="Most labelled queries to run.")
    category: str | None = Field(
        default=None,
        description="Catalog column that `evaluate` breaks its figures down by; of a list, its "
        "first element. None: `category`, where the catalog has it.",
    )


class GateConfig(Section):
    """The bar a release must pass to be published."""

    max_reject_share: float = Field(
        default=0.2, ge=0, le=1, description="Rejected rows over rows in."
    )
    min_intersection_at_10: float = Field(
        default=0.8, ge=0, le=1, description="Index against exact search, each field."
    )
    min_self_retrieval: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="Share of sampled vectors that find themselves, or an equal vector, among the "
        "10 nearest.",
    )
    min_recall_at_10: float = Field(
        default=0.0, ge=0, le=1, description="Labelled queries; needs evaluate.queries if set."
    )
    max_live_drop: float = Field(
        default=0.3, ge=0, le=1, description="Live rows lost since the newest release, a share."
    )
    min_overlap_at_10: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="Neighbours of sampled vectors that the newest release finds too; "
        "not asked of another encoder or other weights.",
    )


class TrainConfig(Section):
    """How an encoder is trained from pairs."""

    pairs: str = Field(description="Parquet of training pairs.")
    validation: str | None = Field(
        default=None, description="Parquet of validation pairs; without it the last step is kept."
    )
    preset: Literal["image_only", "mim3", "mim4", "msr3", "msr4"] = Field(
        default="mim3", description="Which roles are contrasted: see the README."
    )
    init_from: str | None = Field(
        default=None,
        description="A checkpoint to start from, instead of `encoder`: mim4 starts from mim3.",
    )
    steps: int = Field(default=600, gt=0, description="Optimiser steps.")
    batch_size: int = Field(default=64, gt=1, description="Pairs a step, over all workers.")
    accumulate: int = Field(
        default=1,
        gt=0,
        description="Parts a worker's share of a batch is encoded in; negatives stay the batch's.",
    )
    learning_rate: float = Field(default=1e-3, gt=0, description="Peak, after the warm-up.")
    warmup_steps: int | None = Field(
        default=None, ge=0, description="Steps of linear rise; none: a tenth, at most 50."
    )
    weight_decay: float = Field(default=0.1, ge=0, description="Of AdamW, on matrices only.")
    max_gradient_norm: float = Field(default=1.0, gt=0, description="Longer ones are clipped.")
    text_loss_weight: float = Field(
        default=0.5, ge=0, description="Lambda of the terms with a text (our reconstruction)."
    )
    query_image_weight: float = Field(
        default=0.5, ge=0, le=1, description="Share of the photo in the fused query of mim4's loss."
    )
    augment: bool = Field(
        default=True, description="Crop, flip, recolour and blur street photos at random."
    )
    lock: Literal["none", "image", "text"] = Field(
        default="none", description="A tower of the CLIP model that stays as it is (LiT-style)."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Compute activations twice, to save memory."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="auto: bf16 autocast on a GPU, fp32 on a CPU."
    )
    fusion: Literal["concat", "alpha_concat", "mlp"] = Field(
        default="mlp", description="How msr presets fuse a product's text and image."
    )
    image_weight: float = Field(
        default=0.5, ge=0, le=1, description="1 - alpha of alpha_concat while training."
    )
    text_encoder: EncoderSpec | None = Field(
        default=None,
        description="msr4: the encoder whose text tower is the bi-encoder of query and product.",
    )
    hard_negatives: int = Field(
        default=3, ge=0, description="msr: mined wrong products a query, at each validation anew."
    )
    validate_every: int | None = Field(
        default=None, gt=0, description="Steps between validations; none: a tenth of all."
    )
    validation_queries: int = Field(
        default=1000, gt=0, description="Most validation pairs that are searched."
    )
    workers: int = Field(
        default=0, ge=0, description="Training processes; 0: one a GPU, or one on the CPU."
    )
    seed: int = Field(default=0, ge=0, description="Seeds weights, order and augmentation.")


class RayConfig(Section):
    """Where the job runs."""

    address: str | None = Field(
        default=None, description="A running cluster's address; none: a local one is started."
    )
    object_store_mb: int = Field(
        default=512, ge=100, description="Object store of a local cluster, MiB."
    )
    bucket_rows: int = Field(
        default=4_000_000,
        gt=0,
        description="About how many images one task compares at a time, some 200 bytes each.",
    )


class JobConfig(Section):
    """One job: the store it keeps, the catalog it reads, and how."""

    store: str = Field(description="Root of everything written: a folder or s3://bucket/prefix.")
    catalog: CatalogConfig
    encoder: EncoderSpec = Field(
        description="architecture + pretrained (tag, file, or the word random), or checkpoint."
    )
    images: Annotated[
        ImagesConfig, Field(description="Limits on images and how they are fetched.")
    ] = ImagesConfig()
    embed: EmbedConfig = EmbedConfig()
    index: IndexConfig = IndexConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    gate: GateConfig = GateConfig()
    train: TrainConfig | None = None
    ray: RayConfig = RayConfig()

    @field_validator("store")
    @classmethod
    def _is_folder_or_s3(cls, store: str) -> str:
        if SCHEME.match(store) and not store.startswith(("s3://", "s3a://", "file://")):
            raise ValueError("expected a folder or s3://bucket/prefix")
        return store

    @model_validator(mode="after")
    def _recall_needs_queries(self) -> "JobConfig":
        if self.gate.min_recall_at_10 > 0 and self.evaluate.queries is None:
            raise ValueError("gate.min_recall_at_10 needs evaluate.queries")
        return self

    def hash(self) -> str:
        """Return the SHA-256 of the resolved configuration in canonical JSON, as hex."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
