import pytest

from jobs.config import JobConfig
from jobs.config_file import read_config
from jobs.config_keys import config_keys
from jobs.errors import ConfigError

GOOD = """
store: stores/one
catalog: {path: catalog.parquet}
encoder: {architecture: vitrine-tiny, pretrained: random}
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(GOOD)
    return path


def test_reads_a_file_with_defaults(config_file):
    config = read_config(config_file)
    assert config.store == "stores/one"
    assert config.encoder.pretrained == "random"
    assert config.embed.fields is None
    assert config.gate.max_reject_share == 0.2


def test_set_overrides_nested_keys_as_yaml(config_file):
    config = read_config(
        config_file,
        [
            "store=s3://b/x",
            "catalog.path=other",
            "catalog.columns.product_id=asin",
            "embed.fields=[text]",
            "gate.max_reject_share=0.5",
            "index.factory=null",
        ],
    )
    assert (config.store, config.catalog.path) == ("s3://b/x", "other")
    assert config.catalog.columns == {"product_id": "asin"}
    assert config.embed.fields == ("text",)
    assert config.gate.max_reject_share == 0.5
    assert config.index.factory is None


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("catalog.pth=x", "catalog.pth", "catalog.path"),
        ("embed.batchsize=3", "embed.batchsize", "embed.batch_size"),
        ("encoder.pretrainde=random", "encoder.pretrainde", "encoder.pretrained"),
        ("imagse.timeout_s=3", "imagse", "images"),
        ("images.timeout=3", "images.timeout", "images.timeout_s"),
        ("stroe=x", "stroe", "store"),
    ],
)
def test_misspelt_key_is_named_with_the_nearest(config_file, override, key, nearest):
    with pytest.raises(ConfigError) as caught:
        read_config(config_file, [override])
    assert f"'{key}'" in str(caught.value)
    assert f"did you mean '{nearest}'?" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("embed.batch_size=many", "embed.batch_size"),
        ("embed.batch_size=0", "embed.batch_size"),
        ("embed.fields=[picture]", "embed.fields"),
        ("embed.fields=[]", "embed.fields"),
        ("gate.max_reject_share=2", "gate.max_reject_share"),
        ("catalog=3", "catalog"),
        ("store=3", "store"),
        ("embed.image_weight=.nan", "embed.image_weight"),
    ],
)
def test_wrong_value_names_its_key(config_file, override, key):
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        read_config(config_file, [override])


@pytest.mark.parametrize("override", ["store", "=x", "store.x=1", "embed.fields=[", "a.b.c"])
def test_malformed_override_is_named(config_file, override):
    with pytest.raises(ConfigError, match="--set"):
        read_config(config_file, [override])


def test_all_faults_are_told_at_once(config_file):
    with pytest.raises(ConfigError) as caught:
        read_config(config_file, ["catalog.pth=x", "embed.batch_size=0"])
    assert "catalog.pth" in str(caught.value)
    assert "embed.batch_size" in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        read_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("store", ["s3:/bucket", "gs://bucket/prefix", "https://host/a"])
def test_store_is_a_folder_or_on_s3(config_file, store):
    with pytest.raises(ConfigError, match=f"store: expected a folder or s3://.*found '{store}'"):
        read_config(config_file, [f"store={store}"])


@pytest.mark.parametrize("store", ["s3://bucket/a", "file:///a", "/a", "a:b", "C:d/e"])
def test_other_stores_are_taken(config_file, store):
    assert read_config(config_file, [f"store={store}"]).store == store


@pytest.mark.parametrize("again", ["store: other", "catalog: {path: b, path: c}"])
def test_key_that_is_there_twice(tmp_path, again):
    path = tmp_path / "job.yaml"
    path.write_text(f"store: a\nembed: {{}}\n{again}\n")
    name = "store" if "store" in again else "path"
    line = 1 if "store" in again else 3
    with pytest.raises(ConfigError, match=f"line 3, .*'{name}' is there already, on line {line}"):
        read_config(path)


def test_folder_is_no_config(tmp_path):
    with pytest.raises(ConfigError, match="can't be read"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words"])
def test_no_mapping(tmp_path, text):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"is empty|is no YAML mapping"):
        read_config(path)


@pytest.mark.parametrize(
    "content",
    [
        b"a: [1",
        b"a: \xff\xfe",
        b"a: !!python/object:os.system {}",
        b"store: 2024-13-45",
        b"store: " + b"[" * 5000,
    ],
)
def test_no_yaml(tmp_path, content):
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert "\n" not in str(caught.value)


def test_set_with_a_date_that_is_none(config_file):
    with pytest.raises(ConfigError, match="month must be in"):
        read_config(config_file, ["store=2024-13-45"])


@pytest.mark.parametrize("override", ["images.timeout_s=.nan", "embed.commit_interval_s=.inf"])
def test_limits_are_finite(config_file, override):
    with pytest.raises(ConfigError, match="finite number"):
        read_config(config_file, [override])


def test_required_keys_are_named(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("catalog: {text: '{title}'}\n")
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert all(f"{key} is missing" in str(caught.value) for key in ("store", "catalog.path"))


@pytest.mark.parametrize("encoder", ["{}", "{architecture: ViT-B-32}"])
def test_encoder_without_weights_asks_for_the_word_random(config_file, encoder):
    with pytest.raises(ConfigError, match="pretrained: random"):
        read_config(config_file, [f"encoder={encoder}"])


def test_encoder_with_two_sources_of_weights(config_file):
    with pytest.raises(ConfigError, match="both set"):
        read_config(config_file, ["encoder.checkpoint=/x"])


def test_recall_bar_needs_queries(config_file):
    with pytest.raises(ConfigError, match=r"evaluate\.queries"):
        read_config(config_file, ["gate.min_recall_at_10=0.1"])


def test_hash_depends_on_the_values_alone(config_file, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("\n".join(reversed(GOOD.strip().splitlines())) + "\nembed: {batch_size: 64}\n")
    assert read_config(config_file).hash() == read_config(other).hash()
    assert read_config(config_file).hash() != read_config(config_file, ["store=x"]).hash()
    assert len(read_config(config_file).hash()) == 64


def test_every_key_says_what_it_means():
    keys = list(config_keys(JobConfig))
    assert {"store", "catalog.path", "encoder.pretrained"} <= {name for name, _, _ in keys}
    assert [name for name, _, meaning in keys if not meaning] == []
