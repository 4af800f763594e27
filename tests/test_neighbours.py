"""Other tools read the embeddings as the page says, and find what exact search finds."""

import numpy as np
import pytest
from readme_shop import ROOT, link_shop, run_blocks

from jobs.embeddings import iter_embeddings, load_embeddings

PAGE = "docs/neighbours.md"


@pytest.fixture(scope="module")
def ran(local_ray, tmp_path_factory):
    """The names that the page's code leaves."""
    folder, namespace = tmp_path_factory.mktemp("neighbours"), {}
    link_shop(tmp_path_factory, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number, _ in enumerate(run_blocks(PAGE, namespace)):
            if number == 0:
                namespace["query"] = separate(namespace["query"])
        yield namespace


def separate(query):
    """Return a query of one product's own: untrained, the encoder hardly tells photos apart."""
    table = load_embeddings("store-trained", field="image")
    vectors = np.array(table["image_embedding"].to_pylist(), np.float32)
    own = vectors - vectors.mean(axis=0)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    assert own[0].shape == query.shape
    best = np.sort(own @ vectors.T, axis=1)[:, -2:]
    return own[np.argmax(best[:, 1] - best[:, 0])]


@pytest.fixture(scope="module")
def exact(ran):
    """Products and scores of the page's query, best first."""
    table = load_embeddings("store-trained", field="image", columns=["title"])
    vectors = np.array(table["image_embedding"].to_pylist(), np.float32)
    scores = vectors @ ran["query"]
    order = np.argsort(-scores)[:3]
    assert scores[order[0]] - scores[order[1]] > 2e-4  # far more than float16 takes away
    return [(table["product_id"][int(n)].as_py(), float(scores[n])) for n in order]


def test_duckdb(ran, exact):
    assert ran["nearest"][0][0] == exact[0][0]
    np.testing.assert_allclose(
        [score for _, score in ran["nearest"]], [score for _, score in exact], atol=1e-4
    )


def test_polars(ran, exact):
    assert ran["best"] == exact[0][0]
    assert ran["vectors"].shape == (len(ran["frame"]), len(ran["query"]))


def test_lancedb(ran, exact):
    assert [row["product_id"] for row in ran["found"]] == [product for product, _ in exact]
    scores = [1 - row["_distance"] for row in ran["found"]]
    np.testing.assert_allclose(scores, [score for _, score in exact], atol=1e-4)
    assert ran["found"][0]["title"]


def test_qdrant(ran, exact):
    assert [one.payload["product_id"] for one in ran["points"]] == [name for name, _ in exact]
    scores = [one.score for one in ran["points"]]
    np.testing.assert_allclose(scores, [score for _, score in exact], atol=1e-4)


def test_duckdb_and_polars_read_the_stream(ran):
    import duckdb
    import polars

    table = load_embeddings("store-trained", field="image")
    stream = duckdb.from_arrow(iter_embeddings("store-trained", field="image"))
    assert stream.aggregate("count(*)").fetchall() == [(len(table),)]
    assert len(duckdb.from_arrow(table).fetchall()) == len(table)
    assert polars.from_arrow(table).height == len(table)


def test_pgvector_is_said_not_to_have_been_run():
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    section = text.partition("## pgvector\n")[2]
    assert section.lstrip().startswith("Not run")
    (code,) = section.split("```py\n")[1:]
    compile(code.partition("```")[0], PAGE, "exec")
