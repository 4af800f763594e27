import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from encoders.checkpoint import (
    build_checkpoint_model,
    load_encoder,
    load_model,
    load_tokenizers,
    save_checkpoint,
    wrap_model,
)
from encoders.checkpoint_files import CheckpointConfig, fingerprint, read_checkpoint_config
from encoders.create import _build_preprocess, create_checkpoint
from encoders.fusion import FusionSpec
from encoders.spec import EncoderSpec, PreprocessSpec
from encoders.towers import build_model, without_init

torch.set_num_threads(1)

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 64, "patch_size": 16, "image_size": 32},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
TOKENS = np.random.default_rng(0).integers(0, 64, (3, 8), dtype=np.int64)


@pytest.fixture
def architecture(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


@pytest.fixture
def checkpoint(tmp_path, architecture):
    directory = tmp_path / "checkpoint"
    create_checkpoint(EncoderSpec(architecture=architecture, pretrained="random"), directory)
    return directory


def flip_byte(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_round_trip_gives_the_same_vectors(tmp_path, checkpoint):
    first = load_encoder(checkpoint, device="cpu")
    model, config = load_model(checkpoint)
    again = save_checkpoint(model, config, tmp_path / "again")
    second = load_encoder(tmp_path / "again", device="cpu", expected_fingerprint=again)
    assert again == first.fingerprint
    np.testing.assert_array_equal(first.encode_images(PIXELS), second.encode_images(PIXELS))
    np.testing.assert_array_equal(first.encode_texts(TOKENS), second.encode_texts(TOKENS))


def test_bf16_rounds_the_matrices_of_a_loaded_encoder(checkpoint):
    exact = load_encoder(checkpoint, device="cpu", precision="fp32")
    rough = load_encoder(checkpoint, device="cpu", precision="bf16")
    assert (exact.precision, rough.precision) == ("fp32", "bf16")
    in_bf16 = {n for n, p in rough._model.named_parameters() if p.dtype == torch.bfloat16}
    assert "transformer.resblocks.0.attn.in_proj_weight" in in_bf16
    assert "transformer.resblocks.0.mlp.c_fc.weight" in in_bf16
    assert not any("ln_" in name or "embedding" in name for name in in_bf16)
    for name in ("encode_images", "encode_texts"):
        rows = PIXELS if name == "encode_images" else TOKENS
        cosines = (getattr(exact, name)(rows) * getattr(rough, name)(rows)).sum(axis=1)
        assert 0.999 < cosines.min() < 1


def test_a_model_that_is_only_wrapped_keeps_its_weights(checkpoint):
    model, config = load_model(checkpoint)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    encoder = wrap_model(model, config, fingerprint="x", device="cpu", precision="bf16")
    encoder.encode_images(PIXELS)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_auto_is_bf16_where_the_cpu_multiplies_in_it(checkpoint):
    found = torch.cpu.get_capabilities()
    has = any(found.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    assert load_encoder(checkpoint, device="cpu").precision == ("bf16" if has else "fp32")


def test_copied_checkpoint_is_the_same_encoder(tmp_path, checkpoint):
    spec = EncoderSpec(checkpoint=str(checkpoint))
    assert create_checkpoint(spec, tmp_path / "copy") == fingerprint(checkpoint)
    assert create_checkpoint(spec, checkpoint) == fingerprint(tmp_path / "copy")


def test_same_seed_same_fingerprint_and_global_generator_untouched(tmp_path, architecture):
    state = torch.get_rng_state()
    prints = [
        create_checkpoint(
            EncoderSpec(architecture=architecture, pretrained="random", seed=seed),
            tmp_path / str(number),
        )
        for number, seed in enumerate([5, 5, 6])
    ]
    assert prints[0] == prints[1] != prints[2]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ["encoder.json", "model.safetensors"])
def test_one_flipped_byte_is_another_fingerprint_and_refused(checkpoint, name):
    before = fingerprint(checkpoint)
    flip_byte(checkpoint / name, -5)
    assert fingerprint(checkpoint) != before
    with pytest.raises(ValueError, match="another space"):
        load_encoder(checkpoint, device="cpu", expected_fingerprint=before)


def test_missing_pretrained_is_refused():
    with pytest.raises(ValueError, match="random weights only when the config says"):
        EncoderSpec(architecture="ViT-B-32")


def test_two_sources_are_refused():
    with pytest.raises(ValueError, match="both set"):
        EncoderSpec(pretrained="random", checkpoint="somewhere")


@pytest.mark.parametrize(
    ("given", "files"),
    [
        ({"pretrained": "random"}, False),
        ({"pretrained": "laion2b_s34b_b79k"}, False),
        ({"pretrained": __file__}, True),
        ({"pretrained": "gone/weights.safetensors"}, True),
        ({"pretrained": "weights.pt"}, True),
        ({"pretrained": "random", "architecture": "own.json"}, True),
        ({"pretrained": "random", "image_weights": "trunk.safetensors"}, True),
        ({"checkpoint": "somewhere"}, True),
    ],
)
def test_what_names_files_may_change(given, files):
    assert EncoderSpec(**given).names_files is files


def test_unknown_names_are_refused(tmp_path, architecture):
    for spec, message in [
        (EncoderSpec(architecture="ViT-X", pretrained="random"), "unknown architecture"),
        (EncoderSpec(architecture="ViT-B-32", pretrained="nope"), "tags: .*laion2b"),
        (EncoderSpec(architecture=str(tmp_path / "no.json"), pretrained="random"), "no such file"),
        (EncoderSpec(checkpoint=str(tmp_path / "nowhere")), "no such file"),
    ]:
        with pytest.raises(ValueError, match=message):
            create_checkpoint(spec, tmp_path / "out")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_local_weights_file_is_loaded(tmp_path, architecture, checkpoint, suffix):
    weights = load_file(checkpoint / "model.safetensors")
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        prefixed = {f"module.{key}": value for key, value in weights.items()}
        torch.save({"state_dict": prefixed, "epoch": 3}, path)
    else:
        save_file(weights, path)
    spec = EncoderSpec(architecture=architecture, pretrained=str(path))
    assert create_checkpoint(spec, tmp_path / "out") == fingerprint(checkpoint)


def test_pickle_that_runs_code_is_refused(tmp_path, architecture):
    path = tmp_path / "evil.pt"
    torch.save({"state_dict": Path}, path)
    spec = EncoderSpec(architecture=architecture, pretrained=str(path))
    with pytest.raises(ValueError, match="no plain state dict"):
        create_checkpoint(spec, tmp_path / "out")


def test_weights_of_another_dimension_are_refused_in_one_line(checkpoint):
    path = checkpoint / "encoder.json"
    header = json.loads(path.read_text())
    header["model_config"]["embed_dim"] = 24
    path.write_text(json.dumps(header))
    with pytest.raises(
        ValueError, match=r"text_projection is \(32, 16\), expected \(32, 24\)"
    ) as e:
        load_encoder(checkpoint, device="cpu")
    assert "\n" not in str(e.value)


def test_missing_and_unknown_weights_are_named(tmp_path, architecture, checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    weights["extra"] = weights.pop("ln_final.bias")
    save_file(weights, tmp_path / "odd.safetensors")
    spec = EncoderSpec(architecture=architecture, pretrained=str(tmp_path / "odd.safetensors"))
    with pytest.raises(ValueError, match=r"missing ln_final\.bias; unknown extra"):
        create_checkpoint(spec, tmp_path / "out")


def test_corrupt_checkpoints_are_refused(checkpoint):
    weights = checkpoint / "model.safetensors"
    content = weights.read_bytes()
    for broken in (content[:-100], b"", b"x" * 100):
        weights.write_bytes(broken)
        with pytest.raises(ValueError, match="corrupt"):
            load_encoder(checkpoint, device="cpu")
    weights.unlink()
    with pytest.raises(ValueError, match="no such file"):
        load_encoder(checkpoint, device="cpu")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", 1, "format 1"),
        ("format_version", 99, "format 99"),
        ("kind", "other", "kind 'other'"),
        ("preprocess", {}, "incomplete"),
        ("fusion", {"kind": "sum", "alpha": 1}, "unknown keys: .*alpha"),
        ("fusion", {"kind": "sums"}, "fusion is 'sums'"),
        ("model_config", {}, "no open_clip model config"),
    ],
)
def test_unknown_formats_are_refused(checkpoint, key, value, message):
    path = checkpoint / "encoder.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=message):
        load_encoder(checkpoint, device="cpu")


def test_preprocessing_comes_from_the_tag():
    name, tag = "ViT-B-16-SigLIP", "webli"
    config = open_clip.get_model_config(name)
    preprocess = _build_preprocess(config, open_clip.get_pretrained_cfg(name, tag))
    assert preprocess.mean == preprocess.std == (0.5, 0.5, 0.5)
    assert (preprocess.resize_mode, preprocess.size_px) == ("squash", 224)


def test_custom_text_model_and_its_preprocessing_survive(tmp_path):
    preprocess_cfg = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "longest"}
    path = tmp_path / "custom.json"
    model_cfg = CONFIG | {"custom_text": True, "init_logit_bias": -10}
    path.write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}))
    spec = EncoderSpec(architecture=str(path), pretrained="random")
    create_checkpoint(spec, tmp_path / "out")
    assert read_checkpoint_config(tmp_path / "out").preprocess.resize_mode == "longest"
    assert load_encoder(tmp_path / "out", device="cpu").encode_texts(TOKENS).shape == (3, 16)


def test_demo_architecture_can_be_created(tmp_path):
    spec = EncoderSpec(architecture="vitrine-tiny", pretrained="random")
    create_checkpoint(spec, tmp_path / "demo")
    assert load_encoder(tmp_path / "demo", device="cpu").preprocess.size_px == 96


def test_spec_and_preprocess_import_no_torch():
    code = (
        "import sys, encoders.spec, encoders.preprocess;"
        "sys.exit(bool({'torch', 'open_clip'} & sys.modules.keys()))"
    )
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_size_that_is_not_the_models_is_refused(checkpoint):
    path = checkpoint / "encoder.json"
    header = json.loads(path.read_text())
    header["preprocess"]["size_px"] = 64
    path.write_text(json.dumps(header))
    with pytest.raises(ValueError, match="pixels of 64, but a model of 32"):
        load_encoder(checkpoint, device="cpu")


def test_fusion_is_kept_and_is_part_of_the_fingerprint(tmp_path, checkpoint):
    model, config = load_model(checkpoint)
    other = dataclasses.replace(config, fusion=FusionSpec(image_weight=0.8))
    assert save_checkpoint(model, other, tmp_path / "other") != fingerprint(checkpoint)
    assert load_encoder(tmp_path / "other", device="cpu").fusion.image_weight == 0.8


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green", "shoe", "hat"]
BERT = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}


ONES = torch.ones(2)


@pytest.fixture
def bert(tmp_path):
    """A local Hugging Face folder: a BERT of one layer with a head, and its tokenizer."""
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    (folder / "config.json").write_text(json.dumps(BERT))
    model = build_model(CONFIG | {"text_cfg": hf_text(folder)}, seed=9)
    state = {f"bert.{k}": v for k, v in model.text.transformer.state_dict().items()}
    state |= {"bert.pooler.dense.weight": torch.ones(16, 16), "cls.seq_relationship.bias": ONES}
    save_file({k: v.clone() for k, v in state.items()}, folder / "model.safetensors")
    return folder


def hf_text(folder):
    return {
        "hf_model_name": str(folder),
        "hf_tokenizer_name": str(folder),
        "hf_pooler_type": "mean_pooler",
        "hf_proj_type": "linear",
        "context_length": 8,
    }


def timm_vision():
    vision = {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"}
    return vision | {"timm_model_pretrained": False, "image_size": 32}


@pytest.fixture
def timm_file(tmp_path):
    torch.manual_seed(4)
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "timm.safetensors")
    return tmp_path / "timm.safetensors"


def write_architecture(tmp_path, **changes):
    path = tmp_path / "towers.json"
    path.write_text(json.dumps(CONFIG | changes))
    return str(path)


def hf_spec(tmp_path, folder, **changes):
    path = write_architecture(tmp_path, vision_cfg=timm_vision(), text_cfg=hf_text(folder))
    return EncoderSpec(architecture=path, pretrained="random", **changes)


def test_bert_and_timm_towers_come_from_their_own_files(tmp_path, bert, timm_file):
    spec = hf_spec(tmp_path, bert, text_weights=str(bert), image_weights=str(timm_file))
    create_checkpoint(spec, tmp_path / "out")
    model, _ = load_model(tmp_path / "out")
    texts = load_file(bert / "model.safetensors")
    for name, weight in model.text.transformer.state_dict().items():
        assert torch.equal(weight, texts[f"bert.{name}"]), name
    images = load_file(timm_file)
    for name, weight in model.visual.trunk.state_dict().items():
        assert torch.equal(weight, images[name]), name
    assert images.keys() - model.visual.trunk.state_dict().keys() == {"fc.weight", "fc.bias"}


def test_checkpoint_of_a_hugging_face_tower_needs_its_folder_no_more(tmp_path, bert, timm_file):
    spec = hf_spec(tmp_path, bert, text_weights=str(bert), image_weights=str(timm_file))
    written = create_checkpoint(spec, tmp_path / "out")
    texts = ["Red shoe", "", "green zebra hat"]
    before = load_encoder(tmp_path / "out", device="cpu").encode_texts(
        load_tokenizers(tmp_path / "out").product(texts)
    )
    shutil.rmtree(bert)
    copied = create_checkpoint(EncoderSpec(checkpoint=str(tmp_path / "out")), tmp_path / "copy")
    assert copied == written == fingerprint(tmp_path / "copy")
    shutil.rmtree(tmp_path / "out")
    tokenizers = load_tokenizers(tmp_path / "copy")
    tokens = tokenizers.query(texts)
    np.testing.assert_array_equal(
        tokens[:, :5], [[2, 5, 7, 3, 0], [2, 3, 0, 0, 0], [2, 6, 1, 8, 3]]
    )
    after = load_encoder(tmp_path / "copy", device="cpu", expected_fingerprint=copied)
    np.testing.assert_array_equal(after.encode_texts(tokens), before)
    with pytest.raises(ValueError, match="vocabulary has 9"):
        after.encode_texts(np.full((1, 8), 9))


def test_checkpoint_saved_again_or_over_another_has_the_same_fingerprint(
    tmp_path, bert, checkpoint
):
    written = create_checkpoint(hf_spec(tmp_path, bert), tmp_path / "out")
    model, config = load_model(tmp_path / "out")
    assert save_checkpoint(model, config, tmp_path / "out") == written
    assert save_checkpoint(model, config, tmp_path / "again") == written
    plain = load_model(checkpoint)
    assert save_checkpoint(*plain, tmp_path / "again") == fingerprint(checkpoint)
    create_checkpoint(EncoderSpec(checkpoint=str(checkpoint)), tmp_path / "out")
    assert fingerprint(tmp_path / "out") == fingerprint(checkpoint)


def test_fourth_tower_of_msr_keeps_its_own_folder(tmp_path, bert):
    config = CheckpointConfig(
        model_config=CONFIG,
        preprocess=PreprocessSpec(
            size_px=32,
            resize_mode="squash",
            interpolation="bicubic",
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
        fusion=FusionSpec(kind="mlp"),
        text_config=hf_text(bert),
    )
    written = save_checkpoint(build_checkpoint_model(config), config, tmp_path / "out")
    shutil.rmtree(bert)
    encoder = load_encoder(tmp_path / "out", device="cpu", expected_fingerprint=written)
    tokenizers = load_tokenizers(tmp_path / "out")
    assert tokenizers.product(["red shoe"]).tolist() == [[2, 5, 7, 3, 0, 0, 0, 0]]
    assert tokenizers.query(["red shoe"]).shape == (1, 16)
    words = np.concatenate([tokenizers.product(["red shoe", "hat"]), TOKENS[:2]], axis=1)
    assert encoder.encode_queries(None, words, image_weight=0.0).shape == (2, 32)
    plain = load_model(tmp_path / "out")[1]
    plain = dataclasses.replace(plain, text_config=None, fusion=FusionSpec())
    save_checkpoint(build_checkpoint_model(plain), plain, tmp_path / "out")
    assert not (tmp_path / "out/query-text-tower").exists()


def test_hugging_face_tokenizer_of_an_own_text_tower_is_kept(tmp_path, bert):
    text = CONFIG["text_cfg"] | {"hf_tokenizer_name": str(bert), "vocab_size": len(WORDS)}
    path = write_architecture(tmp_path, text_cfg=text)
    create_checkpoint(EncoderSpec(architecture=path, pretrained="random"), tmp_path / "out")
    shutil.rmtree(bert)
    tokens = load_tokenizers(tmp_path / "out").product(["red shoe"])
    assert tokens.tolist() == [[2, 5, 7, 3, 0, 0, 0, 0]]
    assert load_encoder(tmp_path / "out", device="cpu").encode_texts(tokens).shape == (1, 16)


def test_tokenizer_of_another_folder_leaves_the_towers_own_config(tmp_path, bert):
    other = tmp_path / "tokenizer"
    other.mkdir()
    (other / "vocab.txt").write_text("\n".join([*WORDS[:5], "hat", "red"]) + "\n")
    for name, content in (
        ("tokenizer_config.json", {"tokenizer_class": "BertTokenizer"}),
        ("config.json", BERT | {"hidden_size": 24}),
    ):
        (other / name).write_text(json.dumps(content))
    text = hf_text(bert) | {"hf_tokenizer_name": str(other)}
    path = write_architecture(tmp_path, text_cfg=text)
    create_checkpoint(EncoderSpec(architecture=path, pretrained="random"), tmp_path / "out")
    assert load_model(tmp_path / "out")[0].text.transformer.config.hidden_size == 16
    assert load_tokenizers(tmp_path / "out").product(["red"])[0, 1] == 6


def test_older_names_of_bert_weights_are_understood(tmp_path, bert):
    new = create_checkpoint(hf_spec(tmp_path, bert, text_weights=str(bert)), tmp_path / "new")
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    state = load_file(bert / "model.safetensors")
    for now, then in names.items():
        state = {key.replace(now, then): value for key, value in state.items()}
    (bert / "model.safetensors").unlink()
    torch.save(state, bert / "pytorch_model.bin")
    old = create_checkpoint(hf_spec(tmp_path, bert, text_weights=str(bert)), tmp_path / "old")
    assert old == new


def test_tower_weights_that_do_not_fit_are_named(tmp_path, bert, timm_file, architecture):
    texts, images = load_file(bert / "model.safetensors"), load_file(timm_file)
    out = tmp_path / "out"

    def create(**changes):
        create_checkpoint(hf_spec(tmp_path, bert, **changes), out)

    save_file(texts | {"bert.encoder.extra": ONES}, bert / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 differences: unknown encoder\.extra"):
        create(text_weights=str(bert))
    save_file(texts | {"bert.embeddings.LayerNorm.bias": ONES}, bert / "model.safetensors")
    with pytest.raises(ValueError, match=r"LayerNorm\.bias is \(2,\), expected \(16,\)"):
        create(text_weights=str(bert))
    save_file(images | {"layer9.weight": ONES}, timm_file)
    with pytest.raises(ValueError, match=r"unknown layer9\.weight"):
        create(image_weights=str(timm_file))
    save_file({k: v for k, v in images.items() if k != "conv1.0.weight"}, timm_file)
    with pytest.raises(ValueError, match=r"missing conv1\.0\.weight"):
        create(image_weights=str(timm_file))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds none of"):
        create(text_weights=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="neither a file"):
        create(image_weights=str(tmp_path / "nowhere.safetensors"))
    plain = EncoderSpec(architecture=architecture, pretrained="random", text_weights=str(bert))
    with pytest.raises(ValueError, match="no Hugging Face model"):
        create_checkpoint(plain, out)


def test_own_image_tower_takes_open_clips_names(tmp_path, architecture, checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    tower = {k.removeprefix("visual."): v + 1 for k, v in weights.items() if "visual." in k}
    save_file(tower, tmp_path / "tower.safetensors")
    spec = EncoderSpec(
        architecture=architecture,
        pretrained="random",
        image_weights=str(tmp_path / "tower.safetensors"),
    )
    create_checkpoint(spec, tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    for name, weight in weights.items():
        assert torch.equal(found[name], weight + 1 if "visual." in name else weight)


def test_tower_weights_beside_a_checkpoint_are_refused():
    with pytest.raises(ValueError, match="don't go with a checkpoint"):
        EncoderSpec(checkpoint="somewhere", text_weights="bert")


def test_nothing_is_filled_that_is_loaded_over():
    kept = torch.full((3, 3), 7.0)
    with without_init():
        torch.nn.init.normal_(kept)
        torch.nn.init.kaiming_uniform_(tensor=kept)
        assert torch.equal(kept + 1, torch.full((3, 3), 8.0))
    assert torch.equal(kept, torch.full((3, 3), 7.0))
    torch.nn.init.normal_(kept)
    assert not torch.equal(kept, torch.full((3, 3), 7.0))
