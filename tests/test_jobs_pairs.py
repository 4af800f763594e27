import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.errors import CatalogError
from jobs.pairs import read_pairs


def test_columns_and_folder(tmp_path):
    pq.write_table(pa.table({"product_id": ["a"], "x": [1]}), tmp_path / "p.parquet")
    table, root = read_pairs(str(tmp_path / "p.parquet"), ["product_id"], key="train.pairs")
    assert (table.column_names, root) == (["product_id"], str(tmp_path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "can't be read"),
        (b"no parquet", "can't be read"),
        ({"product_id": ["a"]}, "has no column query_text"),
        ({"product_id": pa.array([], pa.string()), "query_text": pa.array([])}, "is empty"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, content, words):
    path = tmp_path / "p.parquet"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        pq.write_table(pa.table(content), path)
    with pytest.raises(CatalogError, match=f"evaluate.queries .*p.parquet {words}"):
        read_pairs(str(path), ["product_id", "query_text"], key="evaluate.queries")
