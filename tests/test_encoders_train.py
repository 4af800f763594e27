import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from encoders.checkpoint import build_checkpoint_model, wrap_model
from encoders.checkpoint_files import CheckpointConfig
from encoders.fusion import FusionSpec, fuse_products
from encoders.objectives import PRESETS, MimTowers, MsrTowers
from encoders.spec import DEMO_MODEL_CONFIG, PreprocessSpec
from encoders.towers import build_model
from encoders.train import TrainBatch, Trainer, TrainSpec, learning_rate_at

torch.set_num_threads(1)

TEXT = {"context_length": 6, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
VISION = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
CLIP = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "shoe"]


def make_preprocess(size_px=32):
    return PreprocessSpec(
        size_px=size_px,
        resize_mode="squash",
        interpolation="bicubic",
        mean=(0.5,) * 3,
        std=(0.3,) * 3,
    )


def make_config(preset, kind="concat", clip=CLIP):
    return CheckpointConfig(
        model_config=clip,
        preprocess=make_preprocess(),
        fusion=FusionSpec(kind=kind if preset.startswith("msr") else "sum", image_weight=0.4),
        text_config=TEXT if preset == "msr4" else None,
    )


def make_trainer(preset, kind="concat", clip=CLIP, **changes):
    config = make_config(preset, kind, clip)
    model = build_checkpoint_model(config, seed=1)
    options = {"steps": 6, "batch_size": 8, "warmup_steps": 0, "learning_rate": 1e-2} | changes
    return Trainer(
        make_towers(model, config, preset), TrainSpec(preset=preset, **options), device="cpu"
    )


def make_towers(model, config, preset):
    if preset.startswith("msr"):
        return MsrTowers(model, config.preprocess, config.fusion.image_weight)
    return MimTowers(model, config.preprocess, preset)


def make_tokens(rng, rows, towers=1):
    tokens = rng.integers(1, 60, (rows, 6 * towers))
    for tower in range(towers):
        tokens[:, 6 * tower + 4], tokens[:, 6 * tower + 5] = 63, 0
    return torch.from_numpy(tokens)


def make_batch(preset, *, seed=0, size_px=32, texts="some", each=3):
    """Make 8 rows: repeated products, equal queries, missing texts, negatives to be masked."""
    rng = np.random.default_rng(seed)
    pixels = lambda rows: torch.from_numpy(  # noqa: E731
        rng.integers(0, 256, (rows, size_px, size_px, 3), dtype=np.uint8)
    )
    labels = {
        "product_ids": torch.tensor([0, 1, 2, 0, 3, 4, 1, 5]),
        "query_ids": torch.tensor([0, 1, 2, 3, 1, 5, 6, 7]),
    }
    there = {"some": [1, 1, 0, 1, 1, 1, 1, 0], "none": [0] * 8, "all": [1] * 8}[texts]
    if not preset.startswith("msr"):
        labels |= {
            "has_query_text": torch.tensor(there, dtype=torch.bool),
            "has_product_text": torch.tensor(there[::-1], dtype=torch.bool),
        }
        inputs = {
            "query_pixels": pixels(8),
            "product_pixels": pixels(8),
            "product_tokens": make_tokens(rng, 8),
            "query_tokens": make_tokens(rng, 8),
        }
        return TrainBatch(inputs=inputs, labels=labels)
    total = 8 + 8 * each
    labels["negative_ids"] = torch.from_numpy(rng.integers(0, 12, 8 * each))
    inputs = {
        "query_tokens": make_tokens(rng, 8, 2 if preset == "msr4" else 1),
        "product_pixels": pixels(total),
        "product_tokens": make_tokens(rng, total),
        "has_product_image": torch.from_numpy(rng.random(total) < 0.7),
        "has_product_text": torch.from_numpy((rng.random(total) < 0.7) & (texts != "none")),
    }
    return TrainBatch(inputs=inputs, labels=labels)


def take_share(batch, rank):
    """Return rows 4 * rank to 4 * rank + 4, and their own negatives."""

    def cut(tensor):
        each = (len(tensor) - 8) // 8
        start = 8 + 4 * each * rank
        return torch.cat([tensor[4 * rank : 4 * rank + 4], tensor[start : start + 4 * each]])

    labels = {k: v[4 * rank : 4 * rank + 4] for k, v in batch.labels.items() if k != "negative_ids"}
    if "negative_ids" in batch.labels:
        ids = batch.labels["negative_ids"]
        labels["negative_ids"] = ids.view(2, -1)[rank]
    return TrainBatch(inputs={k: cut(v) for k, v in batch.inputs.items()}, labels=labels)


def assert_same_gradients(found, expected, rtol=1e-5):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            found[1][name], gradient, rtol=rtol, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


CASES = [
    (preset, kind, accumulate, texts)
    for preset, kind in [
        ("mim4", "sum"),
        ("msr4", "concat"),
        ("msr4", "mlp"),
        ("msr3", "alpha_concat"),
    ]
    for accumulate in (1, 2)
    for texts in ("some",)
] + [("mim3", "sum", 1, "none"), ("msr4", "mlp", 1, "none"), ("msr4", "mlp", 2, "none")]


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = []
    for preset, kind, accumulate, texts in CASES:
        trainer = make_trainer(preset, kind, accumulate=accumulate)
        for seed in (5, 0):  # twice: the second waits for ever, or fails, if a weight was left out
            share = take_share(make_batch(preset, seed=seed, texts=texts), rank)
            gradients = trainer.gradients(share)
        trainer.run_step(share)
        results.append((gradients, trainer.state()["towers"]))
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(run_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, c)) for c in CASES])
def test_two_ranks_are_one_process_with_the_joined_batch(two_ranks, number):
    preset, kind, accumulate, texts = CASES[number]
    trainer = make_trainer(preset, kind, accumulate=accumulate)
    batch = make_batch(preset, texts=texts)
    expected = trainer.gradients(batch)
    first, second = two_ranks[0][number], two_ranks[1][number]
    assert_same_gradients(first[0], expected)
    assert_same_gradients(second[0], expected)
    for name, weight in first[1].items():
        torch.testing.assert_close(weight, second[1][name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("preset", "kind"),
    [
        ("image_only", "sum"),
        ("mim3", "sum"),
        ("mim4", "sum"),
        ("msr3", "mlp"),
        ("msr4", "alpha_concat"),
    ],
)
def test_accumulating_changes_no_gradient(preset, kind):
    batch = make_batch(preset)
    expected = make_trainer(preset, kind).gradients(batch)
    for parts in (2, 4, 8):
        assert_same_gradients(
            make_trainer(preset, kind, accumulate=parts).gradients(batch), expected
        )


def test_every_role_has_the_vectors_of_its_own_inputs():
    batch, config = make_batch("mim4"), make_config("mim4")
    model = build_checkpoint_model(config, seed=1)
    with torch.inference_mode():
        features = MimTowers(model, config.preprocess, "mim4").eval()(batch.inputs)
    encoder = wrap_model(model, config, fingerprint="roles", device="cpu", precision="fp32")
    inputs = {name: tensor.numpy() for name, tensor in batch.inputs.items()}
    for role in ("query", "product"):
        images = encoder.encode_images(inputs[f"{role}_pixels"])
        np.testing.assert_allclose(features[f"{role}_image"], images, atol=1e-5)
        texts = encoder.encode_texts(inputs[f"{role}_tokens"])
        np.testing.assert_allclose(features[f"{role}_text"], texts, atol=1e-5)


@pytest.mark.parametrize("preset", ["msr3", "msr4"])
def test_msr_roles_have_the_vectors_of_their_own_inputs(preset):
    batch, config = make_batch(preset), make_config(preset, "alpha_concat")
    model = build_checkpoint_model(config, seed=1)
    with torch.inference_mode():
        features = make_towers(model, config, preset).eval()(batch.inputs)
    encoder = wrap_model(model, config, fingerprint="roles", device="cpu", precision="fp32")
    inputs = {name: tensor.numpy() for name, tensor in batch.inputs.items()}
    masks = inputs["has_product_image"], inputs["has_product_text"]
    found = encoder.encode_products(inputs["product_pixels"], inputs["product_tokens"], *masks)
    weight = config.fusion.image_weight
    products = fuse_products(config.fusion, found["image"], found["text"], weight)
    there = masks[0] | masks[1]
    trained = torch.cat([features["product"], features["negative"]]).numpy()
    np.testing.assert_allclose(trained[there], products[there], atol=1e-5)
    queries = encoder.encode_queries(None, inputs["query_tokens"], image_weight=0.0)
    np.testing.assert_allclose(features["query"], queries, atol=1e-5)


def test_rows_that_cannot_be_cut_are_refused():
    with pytest.raises(ValueError, match="8 rows can't be cut into accumulate = 3"):
        make_trainer("mim3", accumulate=3).gradients(make_batch("mim3"))


def test_msr_without_mined_negatives_trains():
    loss, gradients = make_trainer("msr3", "mlp").gradients(make_batch("msr3", each=0))
    assert np.isfinite(loss)
    assert gradients["model.missing_text"].norm() > 0


def test_unused_texts_have_a_gradient_of_zero():
    gradients = make_trainer("mim3").gradients(make_batch("mim3", texts="none"))[1]
    assert (gradients["model.token_embedding.weight"] == 0).all()
    assert gradients["model.visual.conv1.weight"].norm() > 0


@pytest.fixture(scope="module")
def hf_clip(tmp_path_factory):
    """A model config: a BERT of one layer from a local folder, and a timm ResNet, with heads."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    bert = {
        "model_type": "bert",
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 16,
        "hidden_dropout_prob": 0.1,
    }
    (folder / "config.json").write_text(json.dumps(bert))
    text = {
        "hf_model_name": str(folder),
        "hf_tokenizer_name": str(folder),
        "hf_pooler_type": "mean_pooler",
        "hf_proj_type": "linear",
        "context_length": 6,
    }
    vision = {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"}
    return {"embed_dim": 12, "vision_cfg": vision | {"image_size": 32}, "text_cfg": text}


def record_features(trainer):
    seen = []
    trainer._towers.register_forward_hook(
        lambda _m, _i, out: seen.append({k: v.detach().clone() for k, v in out.items()})
    )
    return seen


def test_second_pass_of_a_part_drops_out_what_the_first_did(hf_clip):
    clip = CLIP | {"text_cfg": hf_clip["text_cfg"]}
    trainer = make_trainer("mim4", clip=clip, accumulate=2)
    seen = record_features(trainer)
    trainer.gradients(make_batch("mim4"))
    assert len(seen) == 4
    for first, second in zip(seen[:2], seen[2:], strict=True):
        for role, rows in first.items():
            torch.testing.assert_close(rows, second[role], rtol=0, atol=0)
    trainer.gradients(make_batch("mim4"))
    assert not torch.equal(seen[0]["query_text"], seen[4]["query_text"])  # it does drop out


def test_texts_of_padding_alone_leave_msr_gradients_finite(hf_clip):
    clip = CLIP | {"text_cfg": hf_clip["text_cfg"]}
    for texts in ("some", "none"):
        batch = make_batch("msr3", texts=texts)
        batch.inputs["product_tokens"][~batch.inputs["has_product_text"]] = 0
        loss, gradients = make_trainer("msr3", "mlp", clip).gradients(batch)
        assert np.isfinite(loss)
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def snapshot(trainer):
    return copy.deepcopy(trainer.state()["towers"])


def moved_names(trainer, batch, steps=2):
    before = snapshot(trainer)
    for _ in range(steps):
        trainer.run_step(batch)
    after = trainer.state()["towers"]
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("lock", ["image", "text"])
def test_locked_tower_stays_to_the_last_statistic_and_the_rest_moves(lock, accumulate):
    preprocess = make_preprocess(96)
    model = build_model(DEMO_MODEL_CONFIG | {"text_cfg": TEXT}, seed=0)
    spec = TrainSpec(
        preset="mim4", steps=2, batch_size=8, warmup_steps=0, learning_rate=1e-2, lock=lock,
        accumulate=accumulate,
    )  # fmt: skip
    trainer = Trainer(MimTowers(model, preprocess, "mim4"), spec, device="cpu")
    moved = moved_names(trainer, make_batch("mim4", size_px=96))
    images = {name for name in moved if name.startswith("model.visual.")}
    texts = moved - images
    assert (not images) == (lock == "image")
    assert (not texts) == (lock == "text")
    if lock == "text":
        assert any("running_mean" in name for name in images)


@pytest.mark.parametrize(
    ("lock", "stays", "head"),
    [
        ("image", "model.visual.trunk.", "model.visual.head."),
        ("text", "model.text.transformer.", "model.text.proj."),
    ],
)
def test_heads_of_timm_and_hugging_face_towers_stay_free(hf_clip, lock, stays, head):
    trainer = make_trainer("mim3", clip=hf_clip, lock=lock)
    moved = moved_names(trainer, make_batch("mim3"))
    assert not any(name.startswith(stays) for name in moved)
    assert any(name.startswith(head) for name in moved)


COCA = {
    "embed_dim": 16,
    "custom_text": True,
    "vision_cfg": VISION
    | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
    "multimodal_cfg": TEXT | {"attn_pooler_heads": 2, "dim_head": 16},
}


def test_weights_that_no_term_reads_are_frozen_in_coca():
    # DistributedDataParallel would wait for their gradients.
    trainer = make_trainer("mim4", clip=COCA)
    gradients = trainer.gradients(make_batch("mim4"))[1]
    free = {name for name, p in trainer._towers.named_parameters() if p.requires_grad}
    assert free == {name for name in gradients if name.startswith("model.")}


@pytest.mark.parametrize(
    ("lock", "stays"), [("image", "model.visual."), ("text", "model.text.transformer.")]
)
def test_towers_of_coca_can_be_locked(lock, stays):
    moved = moved_names(make_trainer("mim4", clip=COCA, lock=lock), make_batch("mim4"))
    assert moved
    assert not any(name.startswith(stays) for name in moved)


def test_locked_dropout_does_not_drop(hf_clip):
    trainer = make_trainer("mim3", clip=hf_clip, lock="text")
    seen = record_features(trainer)
    for _ in range(2):
        trainer.gradients(make_batch("mim3"))
    assert torch.equal(seen[0]["product_text"], seen[1]["product_text"])


def test_image_only_leaves_the_text_tower():
    moved = moved_names(make_trainer("image_only"), make_batch("image_only"))
    assert moved
    assert all(name.startswith("model.visual.") for name in moved)


def test_blank_pixels_of_missing_images_do_not_move_batch_statistics(hf_clip):
    clip = CLIP | {"vision_cfg": hf_clip["vision_cfg"]}
    statistics = []
    for blank in (0, 255):
        trainer = make_trainer("msr3", "mlp", clip)
        batch = make_batch("msr3")
        batch.inputs["product_pixels"][~batch.inputs["has_product_image"]] = blank
        trainer.run_step(batch)
        statistics.append(snapshot(trainer))
    for name, tensor in statistics[0].items():
        torch.testing.assert_close(tensor, statistics[1][name], rtol=0, atol=0)


def count_calls(module):
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("preset", ["mim4", "msr4"])
def test_gradient_checkpointing_changes_no_gradient(preset):
    batch = make_batch(preset)
    plain = make_trainer(preset)
    saving = make_trainer(preset, gradient_checkpointing=True)
    model = saving._towers.model
    clip, text = getattr(model, "clip", model), getattr(model, "text", model)
    calls = [count_calls(clip.visual.transformer.resblocks[0])]
    calls.append(count_calls(text.transformer.resblocks[0]))
    assert_same_gradients(saving.gradients(batch), plain.gradients(batch))
    # msr4's bi-encoder is called for queries and for products.
    assert [len(one) for one in calls] == [2, 4 if preset == "msr4" else 2]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_gradient_checkpointing_of_hugging_face_and_timm_towers(hf_clip, tmp_path):
    bert = json.loads(Path(hf_clip["text_cfg"]["hf_model_name"], "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(bert | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    )
    names = {"hf_model_name": str(tmp_path), "hf_tokenizer_name": str(tmp_path)}
    clip = hf_clip | {"text_cfg": hf_clip["text_cfg"] | names}
    saving = make_trainer("mim3", clip=clip, gradient_checkpointing=True)
    calls = count_calls(saving._towers.model.text.transformer.encoder.layer[0].intermediate)
    expected = make_trainer("mim3", clip=clip).gradients(make_batch("mim3"))
    assert_same_gradients(saving.gradients(make_batch("mim3")), expected, rtol=1e-4)
    assert len(calls) == 2


def test_resumed_run_ends_as_the_whole_one(hf_clip, tmp_path):
    clip = CLIP | {"text_cfg": hf_clip["text_cfg"]}  # with dropout: its draws have to resume too
    batches = [make_batch("mim4", seed=seed) for seed in range(6)]
    whole = make_trainer("mim4", clip=clip)
    metrics = [whole.run_step(batch) for batch in batches]
    first = make_trainer("mim4", clip=clip)
    for batch in batches[:3]:
        first.run_step(batch)
    torch.save(first.state(), tmp_path / "state.pt")
    torch.manual_seed(99)
    second = make_trainer("mim4", clip=clip)
    second.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [second.run_step(batch) for batch in batches[3:]] == metrics[3:]
    for part in ("towers", "objective"):
        for name, tensor in whole.state()[part].items():
            torch.testing.assert_close(second.state()[part][name], tensor, rtol=0, atol=0)


def test_state_of_another_run_is_refused():
    state = make_trainer("image_only").state()
    for preset in ("mim3", "msr3"):
        with pytest.raises(ValueError, match="another run"):
            make_trainer(preset).load_state(state)
    with pytest.raises(ValueError, match="another run"):
        make_trainer("mim3").load_state({"step": 3})


def test_metrics_and_scales_of_a_step():
    trainer = make_trainer("mim4", text_loss_weight=0.3)
    found = trainer.run_step(make_batch("mim4"))
    weights = [1 if term.kind == "image-image" else 0.3 for term in PRESETS["mim4"]]
    assert list(found.terms) == [term.name for term in PRESETS["mim4"]]
    assert found.loss == pytest.approx(np.dot(weights, list(found.terms.values())), rel=1e-5)
    assert set(found.scales) == {"image-image", "image-text", "text-text", "fused-image"}
    assert len(set(found.scales.values())) > 1
    assert all(1 <= scale <= 100.001 for scale in found.scales.values())
    assert (found.step, found.learning_rate) == (1, learning_rate_at(1, trainer.spec))
    assert not trainer._towers.training


def test_loss_that_is_not_finite_is_refused_before_the_update():
    trainer = make_trainer("mim3")
    with torch.no_grad():
        trainer._towers.model.ln_final.bias.fill_(float("nan"))
    before = trainer.state()["towers"]["model.visual.conv1.weight"].clone()
    with pytest.raises(ValueError, match="step 1 is not finite"):
        trainer.run_step(make_batch("mim3"))
    assert torch.equal(before, trainer.state()["towers"]["model.visual.conv1.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "four_tower"}, "preset is"),
        ({"lock": "both"}, "lock is"),
        ({"precision": "fp16"}, "precision is"),
        ({"batch_size": 1}, "batch_size 2 or more"),
        ({"accumulate": 0}, "accumulate"),
        ({"steps": 3, "warmup_steps": 4}, "warmup_steps is 4"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"text_loss_weight": -1.0}, "negative"),
        ({"preset": "image_only", "lock": "image"}, "can't be locked"),
    ],
)
def test_wrong_specs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainSpec(**changes)


def test_learning_rate_rises_then_falls_to_nearly_nothing():
    spec = TrainSpec(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate_at(step, spec) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 0.001


PRODUCTS = 32
LACKING_IMAGE, LACKING_TEXT = (3, 9, 20), (5, 14, 31)


def make_products(seed=0):
    """Draw 32 products: a picture of 4 x 4 coloured squares, a photo of it, a name of tokens."""
    rng = np.random.default_rng(seed)
    squares = rng.integers(0, 256, (PRODUCTS, 4, 4, 3))
    clean = squares.repeat(8, axis=1).repeat(8, axis=2)
    photos = np.clip(clean * 0.8 + rng.integers(-20, 21, clean.shape) + 15, 0, 255)
    names = np.zeros((PRODUCTS, 6), np.int64)
    names[:, 0], names[:, 1], names[:, 2], names[:, 3] = 61, 1 + np.arange(PRODUCTS), 62, 63
    words = names.copy()
    words[:, 0] = 60
    return clean.astype(np.uint8), photos.astype(np.uint8), names, words


def overfit(preset, kind, batch, steps):
    config = make_config(preset, kind, CLIP | {"embed_dim": 32})
    model = build_checkpoint_model(config, seed=0)
    spec = TrainSpec(
        preset=preset, steps=steps, batch_size=PRODUCTS, warmup_steps=5, learning_rate=3e-3
    )
    trainer = Trainer(make_towers(model, config, preset), spec, device="cpu")
    metrics = [trainer.run_step(batch) for _ in range(steps)]
    assert metrics[-1].loss < metrics[0].loss
    return wrap_model(model, config, fingerprint="overfit", device="cpu", precision="fp32")


def recall_at_1(queries, products, which):
    return np.mean((queries @ products.T).argmax(axis=1)[which] == np.arange(PRODUCTS)[which])


def to_batch(**arrays):
    return {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}


@pytest.mark.parametrize("preset", ["image_only", "mim3", "mim4"])
def test_mim_presets_overfit_32_products(preset):
    clean, photos, names, words = make_products()
    ids, has_text = np.arange(PRODUCTS), ~np.isin(np.arange(PRODUCTS), LACKING_TEXT)
    has_words = ~np.isin(ids, (0, 8))
    inputs = to_batch(
        query_pixels=photos, product_pixels=clean, product_tokens=names, query_tokens=words
    )
    labels = to_batch(
        product_ids=ids, query_ids=ids, has_query_text=has_words, has_product_text=has_text
    )
    encoder = overfit(preset, "sum", TrainBatch(inputs=inputs, labels=labels), steps=60)
    everything = np.ones(PRODUCTS, bool)
    found = encoder.encode_products(clean, names, everything, has_text)
    queries = encoder.encode_queries(photos, None, image_weight=1.0)
    assert recall_at_1(queries, found["image"], everything) == 1.0
    if preset == "mim3":
        assert recall_at_1(queries, np.nan_to_num(found["text"]), has_text) == 1.0
    if preset == "mim4":
        queries = encoder.encode_queries(None, words, image_weight=0.0)
        assert recall_at_1(queries, found["image"], has_words) == 1.0
        both = encoder.encode_queries(photos, words, image_weight=0.5)
        assert recall_at_1(both, found["image"], has_words) == 1.0


@pytest.mark.parametrize(
    ("preset", "kind"),
    [("msr3", "mlp"), ("msr3", "concat"), ("msr4", "alpha_concat"), ("msr4", "mlp")],
)
def test_msr_presets_overfit_32_products(preset, kind):
    clean, _, names, words = make_products()
    if preset == "msr4":
        words = np.concatenate([words, words], axis=1)
    ids = np.arange(PRODUCTS)
    has_image, has_text = ~np.isin(ids, LACKING_IMAGE), ~np.isin(ids, LACKING_TEXT)
    mined = np.random.default_rng(0).integers(0, PRODUCTS, 3 * PRODUCTS)
    everything = np.concatenate([ids, mined])
    inputs = to_batch(
        query_tokens=words,
        product_pixels=clean[everything],
        product_tokens=names[everything],
        has_product_image=has_image[everything],
        has_product_text=has_text[everything],
    )
    labels = to_batch(product_ids=ids, query_ids=ids, negative_ids=mined)
    encoder = overfit(preset, kind, TrainBatch(inputs=inputs, labels=labels), steps=60)
    found = encoder.encode_products(clean, names, has_image, has_text)
    if kind == "mlp":
        products = found["multimodal"]
    else:
        weight = encoder.fusion.image_weight
        products = fuse_products(encoder.fusion, found["image"], found["text"], weight)
    queries = encoder.encode_queries(None, words, image_weight=0.0)
    assert recall_at_1(queries, products, np.ones(PRODUCTS, bool)) == 1.0
