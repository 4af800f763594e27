import copy

import numpy as np
import pytest
import torch

from encoders.short_texts import STEP_TOKENS, ShortTexts
from encoders.spec import DEMO_MODEL_CONFIG
from encoders.towers import build_model

torch.set_num_threads(1)

END, WIDTH, VOCABULARY = 60, 77, 61
TEXT = {"context_length": WIDTH, "vocab_size": VOCABULARY, "width": 64, "heads": 2, "layers": 2}
LENGTHS = [2, 5, 15, 16, 17, 40, 64, 65, 76, 77]
MULTIMODAL = {"context_length": WIDTH, "vocab_size": VOCABULARY, "width": 64, "heads": 2,
              "layers": 1}  # fmt: skip
NARROW = {
    "clip": ({}, {}),
    "its own tower": ({"custom_text": True}, {}),
    "end token": ({"custom_text": True}, {"pool_type": "eos", "eos_id": END}),
}
WHOLE = {
    "sees all": ({"custom_text": True}, {"no_causal_mask": True, "pool_type": "last"}),
    "last": ({"custom_text": True}, {"pool_type": "last"}),
    "class token": ({"custom_text": True}, {"embed_cls": True, "pad_id": 0}),
}


def make_model(config, text):
    return build_model(DEMO_MODEL_CONFIG | config | {"text_cfg": TEXT | text}, seed=1)


def make_tokens():
    """One text a length: its last token is the end's, and padding follows."""
    tokens = np.zeros((len(LENGTHS), WIDTH), np.int64)
    rng = np.random.default_rng(0)
    for row, length in zip(tokens, LENGTHS, strict=True):
        row[:length] = rng.integers(1, END, length)
        row[length - 1] = END
    return tokens


def encode_groups(model, tokens):
    """Vectors in the order of the tokens, and the widths that the model was run at."""
    found, widths = np.full((len(tokens), DEMO_MODEL_CONFIG["embed_dim"]), np.nan), []
    with torch.inference_mode():
        for places, short, cut in ShortTexts(model).groups(tokens):
            assert np.isnan(found[places]).all()
            found[places] = short.encode_text(torch.from_numpy(cut)).numpy()
            widths.append(cut.shape[1])
    return found, widths


def encode_whole(model, tokens):
    with torch.inference_mode():
        return model.encode_text(torch.from_numpy(tokens)).numpy()


@pytest.mark.parametrize(("config", "text"), NARROW.values(), ids=NARROW)
def test_a_short_text_has_the_vector_of_the_whole_width(config, text):
    model, tokens = make_model(config, text), make_tokens()
    found, widths = encode_groups(model, tokens)
    assert widths == [STEP_TOKENS, 2 * STEP_TOKENS, 3 * STEP_TOKENS, 4 * STEP_TOKENS, WIDTH]
    np.testing.assert_allclose(found, encode_whole(model, tokens), atol=1e-5)


@pytest.mark.parametrize(("config", "text"), WHOLE.values(), ids=WHOLE)
def test_a_tower_that_looks_at_padding_keeps_it(config, text):
    model, tokens = make_model(config, text), make_tokens()
    found, widths = encode_groups(model, tokens)
    assert widths == [WIDTH]
    np.testing.assert_array_equal(found, encode_whole(model, tokens))


def test_coca_keeps_its_padding():
    model = make_model(
        {"custom_text": True, "multimodal_cfg": MULTIMODAL},
        {"embed_cls": True, "output_tokens": True},
    )
    tokens = make_tokens()[:, : WIDTH - 1]
    found, widths = encode_groups(model, tokens)
    assert widths == [WIDTH - 1]
    np.testing.assert_array_equal(found, encode_whole(model, tokens))


def test_masked_padding_of_a_hugging_face_tower_is_left_out(tmp_path):
    from transformers import BertConfig

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=WIDTH, pad_token_id=0,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    text = {"hf_model_name": str(tmp_path), "hf_tokenizer_name": str(tmp_path),
            "hf_pooler_type": "mean_pooler", "hf_proj_type": "mlp"}  # fmt: skip
    model = build_model(DEMO_MODEL_CONFIG | {"text_cfg": text}, seed=1)
    tokens = make_tokens()
    found, widths = encode_groups(model, tokens)
    assert widths[0] == STEP_TOKENS
    np.testing.assert_allclose(found, encode_whole(model, tokens), atol=1e-5)


def test_narrow_models_share_weights_and_leave_the_model_as_it_was():
    model = make_model({"custom_text": True}, {})
    before = copy.deepcopy(model.state_dict())
    short = next(short for _, short, _ in ShortTexts(model).groups(make_tokens()[:1]))
    assert short.text.token_embedding.weight is model.text.token_embedding.weight
    assert short.text.positional_embedding.shape[0] == STEP_TOKENS
    assert model.text.positional_embedding.shape[0] == WIDTH
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name])
