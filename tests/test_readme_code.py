"""The Python in the papers runs, where README's commands have been."""

from types import SimpleNamespace

import pytest
from readme_shop import link_shop, read_blocks, run_blocks

from jobs.store import Store


@pytest.fixture
def here(local_ray, tmp_path_factory, tmp_path, monkeypatch):
    link_shop(tmp_path_factory, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_runs_and_prints_what_it_shows(here):
    namespace = {}
    ran = list(run_blocks("README.md", namespace))
    assert [shown is not None for _, shown, _ in ran] == [True, False]
    for _, shown, printed in ran:
        # The encoder is another one, so that scores differ; what is shown of each product doesn't.
        assert printed.count("\n") == (shown or "").count("\n")
    assert len(namespace["results"]) == 3
    table, vectors = namespace["table"], namespace["vectors"]
    assert vectors.shape == (len(table), table.schema.field("image_embedding").type.list_size)
    assert vectors[-1].tolist() == table["image_embedding"][-1].as_py()


def test_search_and_load_take_three_lines():
    blocks = [code for code, _ in read_blocks("README.md")]
    searching, loading = ([line for line in code.splitlines() if line] for code in blocks)
    assert len([line for line in searching if "for " not in line and "print" not in line]) == 3
    assert len(loading) == 3


def test_python_page_runs(here, capfd):
    namespace = {}
    ran = list(run_blocks("docs/python.md", namespace))
    assert len(ran) == len(read_blocks("docs/python.md")) >= 6
    for _, shown, printed in ran:
        assert shown is None or printed == shown
    best, *others = ran[2][2].splitlines()  # the row itself comes first
    assert best == f"1.0 {namespace['table']['title'][0]}"
    assert len(others) == 2
    assert namespace["rows"] == namespace["table"].num_rows
    assert not namespace["result"].published
    assert "\x1b" not in capfd.readouterr().err


def test_serving_page_runs(here):
    namespace = {"photo": next((here / "sample/images/street").rglob("*.jpg")).read_bytes()}
    namespace["encode"] = lambda images, texts: namespace["searcher"].encode_batch(images, texts)
    ran = list(run_blocks("docs/serving.md", namespace, [("s3://shop/store", "store-trained")]))
    assert len(ran) == len(read_blocks("docs/serving.md")) >= 6
    assert len(namespace["answers"]) == 2
    service = SimpleNamespace(version=1, searcher=None)
    namespace["follow"](service, "store-trained")
    assert service.version == Store("store-trained").release().version
    assert service.searcher.search(text="rug")
