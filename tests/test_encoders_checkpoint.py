import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from encoders.checkpoint import (
    _build_preprocess,
    create_checkpoint,
    fingerprint,
    load_encoder,
    load_model,
    read_checkpoint_config,
    save_checkpoint,
)
from encoders.spec import EncoderSpec

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
    model, config, preprocess = load_model(checkpoint)
    again = save_checkpoint(model, config, preprocess, tmp_path / "again")
    second = load_encoder(tmp_path / "again", device="cpu", expected_fingerprint=again)
    assert again == first.fingerprint
    np.testing.assert_array_equal(first.encode_images(PIXELS), second.encode_images(PIXELS))
    np.testing.assert_array_equal(first.encode_texts(TOKENS), second.encode_texts(TOKENS))


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
        ("format_version", 99, "format 99"),
        ("kind", "other", "kind 'other'"),
        ("preprocess", {}, "incomplete"),
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
    assert read_checkpoint_config(tmp_path / "out")[1].resize_mode == "longest"
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
