"""The query contract: a foreign query tower, or one that was changed, is refused."""

import base64
import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from encoders.checkpoint import load_encoder, load_model, load_tokenizers, save_checkpoint
from encoders.checkpoint_files import fingerprint, read_checkpoint_config
from encoders.create import create_checkpoint
from encoders.spec import EncoderSpec
from jobs.config import EmbedConfig, JobConfig
from jobs.contract import (
    MIN_COSINE,
    QueryEncoder,
    allowed_precision,
    check_contract,
    check_encoder,
    make_contract,
    read_contract,
)
from jobs.errors import FingerprintError, JobError
from jobs.images import ImagesConfig
from jobs.progress import Progress
from jobs.refresh import refresh
from jobs.search import Searcher
from jobs.space import resolve_space
from jobs.store import Store


def make_encoder(folder, seed=0):
    create_checkpoint(
        EncoderSpec(architecture="vitrine-tiny", pretrained="random", seed=seed), folder
    )
    return load_encoder(folder, device="cpu")


def query_path(encoder, folder, image_weight=0.5):
    return QueryEncoder(
        encoder=encoder,
        tokenizer=load_tokenizers(folder).query,
        images=ImagesConfig(),
        image_weight=image_weight,
    )


def make_space(folder):
    config = read_checkpoint_config(folder)
    return resolve_space(
        EmbedConfig(fields=("multimodal",)),
        encoder=fingerprint(folder),
        dim=config.dim,
        preprocess=config.preprocess,
        fusion=config.fusion,
    )


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A checkpoint, its live encoder, and its contract as it comes out of a manifest."""
    folder = tmp_path_factory.mktemp("own")
    encoder = make_encoder(folder)
    made = make_contract(folder, make_space(folder))
    return folder, encoder, json.loads(json.dumps(made, sort_keys=True))


def signed(contract, **changes):
    """Change a contract as somebody would who also sets its checksum right."""
    from jobs.contract import _digest

    changed = contract | changes
    return changed | {"sha256": _digest(changed)}


def test_contract_says_all_that_serving_needs(own):
    _, encoder, contract = own
    space = read_contract(contract)
    assert (space.encoder, space.dim) == (encoder.fingerprint, encoder.dim)
    assert (space.preprocess, space.fusion) == (encoder.preprocess, encoder.fusion)
    assert contract["fields"] == {"multimodal": encoder.dim}
    kinds = [(c["image"] is not None, c["text"] is not None) for c in contract["canaries"]]
    assert (kinds.count((False, True)), kinds.count((True, False))) == (3, 2)
    assert kinds.count((True, True)) == 1


def test_own_encoder_keeps_it_in_any_arithmetic(own):
    folder, encoder, contract = own
    check_contract(contract, query_path(encoder, folder).encode)
    half = load_encoder(folder, device="cpu", precision="bf16")
    check_contract(contract, query_path(half, folder).encode)


def test_bf16_is_allowed_where_it_leaves_the_canaries_in_place(own):
    folder, _, contract = own
    half = load_encoder(folder, device="cpu", precision="bf16")
    images = [c["image"] and base64.b64decode(c["image"]) for c in contract["canaries"]]
    texts = [c["text"] for c in contract["canaries"]]
    exact = query_path(load_encoder(folder, device="cpu", precision="fp32"), folder)
    vectors, rough = exact.encode(images, texts), query_path(half, folder).encode(images, texts)
    assert contract["bf16_cosine"] == pytest.approx((vectors * rough).sum(axis=1).min(), abs=1e-5)
    assert allowed_precision(contract | {"bf16_cosine": 0.9991}) == "auto"
    assert allowed_precision(contract | {"bf16_cosine": 0.9989}) == "fp32"


def test_an_encoder_that_bf16_moves_runs_in_fp32_and_must_be_asked_in_it(tmp_path):
    """Large numbers that cancel: what is left of a text is the digits that bf16 has not."""
    make_encoder(tmp_path / "plain")
    model, config = load_model(tmp_path / "plain")
    with torch.no_grad():
        model.ln_final.bias.fill_(1000)
        model.text_projection.sub_(model.text_projection.mean(dim=0))
    save_checkpoint(model, config, tmp_path / "sharp")
    contract = make_contract(tmp_path / "sharp", make_space(tmp_path / "sharp"))
    assert contract["bf16_cosine"] < 0.999
    assert allowed_precision(contract) == "fp32"
    assert {canary["min_cosine"] for canary in contract["canaries"]} == {0.999}


def test_code_of_another_runtime_checks_itself(own):
    folder, encoder, contract = own

    def one_by_one(images, texts):
        path = query_path(encoder, folder)
        return np.concatenate(
            [path.encode([i], [t]) for i, t in zip(images, texts, strict=True)]
        ).tolist()

    check_contract(contract, one_by_one)


def test_other_weights_of_the_same_architecture_are_refused(own, tmp_path):
    _, _, contract = own
    other = make_encoder(tmp_path, seed=1)
    with pytest.raises(FingerprintError, match="the encoder given is"):
        check_encoder(read_contract(contract), other)
    with pytest.raises(FingerprintError, match=r"canary '.+': cosine .+ at least 0\.999"):
        check_contract(contract, query_path(other, tmp_path).encode)


def test_edited_preprocessing_is_refused(own):
    folder, _, contract = own
    encoder = load_encoder(folder, device="cpu")
    encoder.preprocess = dataclasses.replace(encoder.preprocess, resize_mode="longest")
    with pytest.raises(FingerprintError, match="resize_mode='longest'"):
        check_encoder(read_contract(contract), encoder)


def test_edited_weights_are_refused_whatever_they_call_themselves(own):
    folder, _, contract = own
    encoder = load_encoder(folder, device="cpu")
    with torch.no_grad():
        for weight in encoder._model.visual.parameters():
            weight += 0.3 * weight.abs().mean() * torch.randn(weight.shape)
    check_encoder(read_contract(contract), encoder)
    with pytest.raises(FingerprintError, match="photo"):
        check_contract(contract, query_path(encoder, folder).encode)


def test_edited_contract_is_refused(own):
    folder, encoder, contract = own
    fusion = contract["fusion"] | {"image_weight": 0.6}
    with pytest.raises(FingerprintError, match="edited"):
        check_contract(contract | {"fusion": fusion}, query_path(encoder, folder).encode)
    with pytest.raises(FingerprintError, match="incomplete"):
        read_contract(signed({k: v for k, v in contract.items() if k != "fusion"}))
    short = base64.b64encode(np.ones(3, "<f4")).decode()
    canaries = [contract["canaries"][0] | {"vector": short}]
    with pytest.raises(FingerprintError, match="shape"):
        check_contract(signed(contract, canaries=canaries), query_path(encoder, folder).encode)


def test_another_query_weight_is_refused(own):
    folder, encoder, contract = own
    path = query_path(encoder, folder, image_weight=0.9)
    with pytest.raises(FingerprintError, match="'photo and text'"):
        check_contract(contract, path.encode)


def test_queries_of_all_kinds_in_one_batch(own):
    folder, encoder, contract = own
    path = query_path(encoder, folder)
    photo = base64.b64decode(contract["canaries"][3]["image"])
    rows = path.encode([photo, None, photo, None], ["a", "a", None, "b"])
    assert rows.shape == (4, encoder.dim)
    for row, (image, text) in zip(
        rows, [(photo, "a"), (None, "a"), (photo, None), (None, "b")], strict=True
    ):
        assert row @ path.encode([image], [text])[0] > 1 - 1e-5
    with pytest.raises(JobError, match="an image, a text, or both"):
        path.encode([None], [None])
    with pytest.raises(JobError, match="as many"):
        path.encode([None], ["a", "b"])


@pytest.fixture(scope="module")
def release(tmp_path_factory, sample_catalog, own, local_ray):
    folder = tmp_path_factory.mktemp("release")
    table = pq.read_table(sample_catalog / "catalog.parquet").slice(0, 6)
    pq.write_table(table, sample_catalog / "six.parquet")
    config = JobConfig.model_validate(
        {
            "store": str(folder / "store"),
            "catalog": {"path": str(sample_catalog / "six.parquet")},
            "encoder": {"checkpoint": str(own[0])},
            "embed": {"fields": ["image", "text", "multimodal"], "query_image_weight": 0.3},
        }
    )
    result = refresh(config, Progress(quiet=True))
    return Store(config.store), result.run


def test_searcher_takes_an_encoder_of_the_callers_own(release, own):
    folder, encoder, contract = own
    searcher = Searcher(*release, encoder=encoder)
    photo = base64.b64decode(contract["canaries"][3]["image"])
    for given, used in ((None, 0.3), (1.0, 1.0), (0.0, 0.0)):
        vector = searcher.encode(photo, "red", image_weight=given)
        expected = query_path(encoder, folder, image_weight=used).encode([photo], ["red"])[0]
        assert vector @ expected > 1 - 1e-6
    assert searcher.search(image=photo, text="red", k=3, image_weight=0.7)
    with pytest.raises(JobError, match="image_weight is 2"):
        searcher.search(image=photo, text="red", image_weight=2)


def test_searcher_refuses_a_foreign_encoder(release, own, tmp_path):
    other = make_encoder(tmp_path, seed=1)
    with pytest.raises(FingerprintError, match="the encoder given is"):
        Searcher(*release, encoder=other)
    other.fingerprint = own[1].fingerprint
    with pytest.raises(FingerprintError, match="canary"):
        Searcher(*release, encoder=other)
    with pytest.raises(FingerprintError, match="not to"):
        Searcher(*release, encoder="f" * 64)


def test_searcher_refuses_a_manifest_with_other_weights(release):
    store, run = release
    manifest = store.read_json("indexes", run, "manifest.json")
    for change in (lambda contract: contract, signed):
        query = json.loads(json.dumps(manifest["query"]))
        query["fusion"]["query_image_weight"] = 0.9
        changed = manifest | {"query": change(query)}
        store.write_text(json.dumps(changed), "indexes", "tampered", "manifest.json")
        with pytest.raises(FingerprintError, match=r"edited|canary 'photo and text'"):
            Searcher(store, "tampered")
    assert MIN_COSINE > 0.9


def test_rounding_to_bf16_keeps_the_contract_of_any_encoder(tmp_path):
    """The bound follows what bf16 does to this encoder; a foreign one is still refused."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"layers": 6, "width": 64, "patch_size": 8, "image_size": 32},
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 6,
        },
    }
    (tmp_path / "deep.json").write_text(json.dumps(config))
    spaces = {}
    for seed in (0, 1):
        spec = EncoderSpec(architecture=str(tmp_path / "deep.json"), pretrained="random", seed=seed)
        fingerprint = create_checkpoint(spec, tmp_path / str(seed))
        found = read_checkpoint_config(tmp_path / str(seed))
        spaces[seed] = resolve_space(
            EmbedConfig(),
            encoder=fingerprint,
            dim=found.dim,
            preprocess=found.preprocess,
            fusion=found.fusion,
        )
    contract = make_contract(tmp_path / "0", spaces[0])
    assert all(canary["min_cosine"] <= MIN_COSINE for canary in contract["canaries"])
    for seed, precision in ((0, "fp32"), (0, "bf16"), (1, "fp32")):
        path = QueryEncoder(
            encoder=load_encoder(tmp_path / str(seed), device="cpu", precision=precision),
            tokenizer=load_tokenizers(tmp_path / str(seed)).query,
            images=ImagesConfig(),
            image_weight=0.5,
        )
        if seed == 0:
            check_contract(contract, path.encode)
        else:
            with pytest.raises(FingerprintError, match="canary"):
                check_contract(contract, path.encode)
