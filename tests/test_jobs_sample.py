import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.render import PATTERNS, SILHOUETTES
from jobs.sample import CATALOG_SCHEMA, PAIRS_SCHEMA, write_sample
from jobs.sample_products import CATEGORIES, FAMILY_PRODUCTS, describe_product

PX = 128


def read_tree(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    dest = tmp_path_factory.mktemp("sample") / "catalog"
    return dest, write_sample(dest, products=12, seed=7, image_px=PX)


def test_same_seed_gives_the_same_bytes(sample, tmp_path):
    write_sample(tmp_path / "again", products=12, seed=7, image_px=PX)
    assert read_tree(tmp_path / "again") == read_tree(sample[0])


def test_product_does_not_depend_on_the_number_of_products(sample, tmp_path):
    write_sample(tmp_path / "few", products=3, seed=7, image_px=PX)
    few, many = read_tree(tmp_path / "few" / "images"), read_tree(sample[0] / "images")
    assert len(few) == 3 * 5
    assert all(many[name] == content for name, content in few.items())


def test_workers_render_the_same_bytes(tmp_path, monkeypatch):
    write_sample(tmp_path / "here", products=60, seed=1, image_px=32, street_per_product=1)
    monkeypatch.setattr("jobs.sample._IN_PROCESS_BELOW", 1)
    write_sample(tmp_path / "pool", products=60, seed=1, image_px=32, street_per_product=1)
    assert read_tree(tmp_path / "here") == read_tree(tmp_path / "pool")


def test_other_seed_gives_other_products():
    assert describe_product(1, 1).look != describe_product(1, 2).look


def test_products_are_distinct():
    products = [describe_product(number, 3) for number in range(1, 8_001)]
    seen = {(p.look.category, p.look.design.pattern, p.color, p.second_color) for p in products}
    assert len(seen) == len(products)
    assert len({p.look for p in products}) == len(products)
    assert {p.look.category for p in products} == set(CATEGORIES) == set(SILHOUETTES)
    assert {p.look.design.pattern for p in products} == set(PATTERNS)


def test_far_products_repeat_words_but_not_looks():
    rounds = 3 * 10 * 14 * 13 * FAMILY_PRODUCTS
    first, later = describe_product(1, 3), describe_product(1 + rounds, 3)
    assert first.look.category == later.look.category
    assert first.look.design.pattern == later.look.design.pattern
    assert first.look.design != later.look.design


def test_family_shares_one_design_across_categories():
    family = [describe_product(number, 5).look for number in range(1, FAMILY_PRODUCTS + 1)]
    assert len({look.design for look in family}) == 1
    assert len({look.category for look in family}) == FAMILY_PRODUCTS


def test_tables_have_their_columns_counts_and_pictures(sample):
    dest, summary = sample
    catalog = pq.read_table(summary.catalog)
    assert catalog.schema.equals(CATALOG_SCHEMA)
    assert catalog.num_rows == summary.products == 12
    assert catalog["image_uri"][0].as_py() == "images/shop/000/P0000001.jpg"
    counts = (summary.train_pairs, summary.val_pairs, summary.query_count)
    assert counts == (24, 12, 12)
    text_of = {
        row["product_id"]: f"{row['title']}. {row['description']}" for row in catalog.to_pylist()
    }
    seen = set()
    for path, count in zip(
        (summary.pairs_train, summary.pairs_val, summary.queries), counts, strict=True
    ):
        pairs = pq.read_table(path)
        assert pairs.schema.equals(PAIRS_SCHEMA)
        assert pairs.num_rows == count
        for row in pairs.to_pylist():
            assert row["query_id"] not in seen
            seen.add(row["query_id"])
            assert (dest / row["query_image_uri"]).is_file()
            assert (dest / row["product_image_uri"]).is_file()
            assert row["product_text"] == text_of[row["product_id"]]
            assert row["query_text"]


def test_shop_is_white_around_and_street_is_not(sample):
    dest, summary = sample
    for row in pq.read_table(summary.queries).to_pylist():
        shop = np.asarray(Image.open(dest / row["product_image_uri"]))
        street = np.asarray(Image.open(dest / row["query_image_uri"]))
        assert shop.shape == street.shape == (PX, PX, 3)
        corners = shop[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert (corners == 255).all()
        assert np.abs(shop.astype(int) - street).mean() > 20


def test_earlier_sample_is_replaced(tmp_path):
    calls = []
    write_sample(tmp_path, products=4, seed=1, image_px=32)
    write_sample(tmp_path, products=2, seed=1, image_px=32, progress=calls.append)
    assert len(list((tmp_path / "images" / "shop").rglob("*.jpg"))) == 2
    assert pq.read_table(tmp_path / "catalog.parquet").num_rows == 2
    assert calls == [2]


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        write_sample(tmp_path, products=1, seed=0)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "wrong", [{"products": 0}, {"seed": -1}, {"street_per_product": 0}, {"image_px": 8}]
)
def test_arguments_out_of_range_are_refused(tmp_path, wrong):
    arguments = {"products": 1, "seed": 0, **wrong}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        write_sample(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()
