import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.csv_columns import clean_name
from jobs.csv_images import http_host, place_image, split_images
from jobs.csv_numbers import NumberProfile
from jobs.csv_products import plain_text


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["$12.99", "$1,299"], [12.99, 1299.0]),
        (["12.99 USD", "USD 5"], [12.99, 5.0]),
        (["1.299 €", "2.500 €"], [1299.0, 2500.0]),
        (["1 299,00", "0,5"], [1299.0, 0.5]),
        (["CHF 1'299.00", "-5.00"], [1299.0, -5.0]),
        (["5,-", ""], [5.0, None]),
        (["1,299", "1.299,5"], [1.299, 1299.5]),
        (["12.99 USD", "12.99 EUR"], None),
        (["12.99", "12,99"], None),
        (["12 - 15"], None),
        (["007.5"], None),
        (["9" * 400], None),
        ([""], None),
    ],
)
def test_prices(cells, values):
    profile = NumberProfile()
    for cell in cells:
        profile.add(cell)
    form = profile.format(price=True)
    assert (form and [form.parse(cell) for cell in cells]) == values


@given(st.lists(st.text("0123456789.,-eE€$ '", max_size=12), max_size=6), st.booleans())
def test_a_profiled_column_parses_whole(cells, price):
    profile = NumberProfile()
    for cell in cells:
        profile.add(cell)
    form = profile.format(price=price)
    if form is not None:
        assert all(isinstance(form.parse(cell), int | float | None) for cell in cells)


@pytest.mark.parametrize(
    ("cell", "images"),
    [
        ("", []),
        ("https://a/x,w_3.jpg,https://b/y z.jpg", ["https://a/x,w_3.jpg", "https://b/y z.jpg"]),
        ("https://a/1.jpg | https://a/2.jpg;", ["https://a/1.jpg", "https://a/2.jpg"]),
        ("https://a/1.jpg\nhttps://a/1.jpg", ["https://a/1.jpg"]),
        ("//cdn.example/1.jpg", ["https://cdn.example/1.jpg"]),
        ('["https:\\/\\/a\\/1.jpg", "https://a/2.jpg"]', ["https://a/1.jpg", "https://a/2.jpg"]),
        ("['1.jpg', 'b/2.png']", ["1.jpg", "b/2.png"]),
        ("1.jpg,b/2.png", ["1.jpg", "b/2.png"]),
        ("my photo.jpg", ["my photo.jpg"]),
        ("my photo.jpg; b, c.jpg", ["my photo.jpg", "b, c.jpg"]),
        ("images/one", ["images/one"]),
    ],
)
def test_images_of_a_cell(cell, images):
    assert split_images(cell) == images


def test_named_root_takes_paths_from_the_root():
    assert place_image("/m/1.jpg", "https://a/media/", given=True) == "https://a/media/m/1.jpg"
    assert place_image("%2e%2e/1.jpg", "/x", given=True) == "%2e%2e/1.jpg"
    assert place_image("s3://b/1.jpg", "/x", given=True) == "s3://b/1.jpg"


def test_ip_literals_are_never_listed_as_hosts():
    private = ("http://127.0.0.1:80/x", "http://[::1]/x", "http://127.1/x", "http://0x7f000001/x")
    assert [http_host(uri) for uri in private] == [None] * 4
    assert http_host("https://A.example:8443/x") == "a.example:8443"
    assert http_host("https://b\xfccher.example:443/x") == "xn--bcher-kva.example"
    assert http_host("http://[bad/x") is http_host("pics/1.jpg") is None


def test_other_names_are_kept_apart():
    assert clean_name("g:Image Link") == "image_link"
    assert clean_name("Preço (R$)") == "preco_r"
    assert clean_name("productId") == "product_id"
    assert clean_name("3D view") == "column_3d_view"
    assert clean_name("商品名") == "商品名"


def test_html_is_taken_off_but_not_a_comparison():
    assert plain_text("<style>p{}</style><p>5 < 7 &gt; 3</p><br/>x") == "5 < 7 > 3 x"
