import pytest

from tpu.accelerators import GENERATIONS, parse_type
from tpu.errors import TpuError


@pytest.mark.parametrize(
    ("text", "gcloud_name", "chips", "hosts", "dollars"),
    [
        ("v5e-8", "v5litepod-8", 8, 1, 9.60),
        ("v5litepod-16", "v5litepod-16", 16, 4, 19.20),
        ("V6e-256", "v6e-256", 256, 64, 691.20),
        ("v5p-8", "v5p-8", 4, 1, 16.80),
        ("v5p-128", "v5p-128", 64, 16, 268.80),
        ("v5p-12288", "v5p-12288", 6144, 1536, 25804.80),
        ("v4-8", "v4-8", 4, 1, 12.88),
    ],
)
def test_types(text, gcloud_name, chips, hosts, dollars):
    type = parse_type(text)
    assert (type.gcloud_name, type.chips, type.hosts) == (gcloud_name, chips, hosts)
    assert type.dollars_per_hour == pytest.approx(dollars)


@pytest.mark.parametrize(
    "text", ["v5e-12", "v5e-08", "v5e-", "v5e", "v5p-100", "v5p-12416", "v5e-٨", "v5e-8; rm -rf /"]
)
def test_types_that_do_not_exist_are_answered_with_those_that_do(text):
    with pytest.raises(TpuError, match=r"v5e-1, 4, 8, 16|v5p-8, 16, 32, 64 and multiples of 128 up to 12288"):
        parse_type(text)


def test_an_unknown_generation_names_all_and_the_nearest():
    with pytest.raises(TpuError, match="did you mean v6e") as error:
        parse_type("v6a-8")
    assert all(name in str(error.value) for name in GENERATIONS)


@pytest.mark.parametrize("text", ["tpu7x-8", "v7x-16", "ironwood"])
def test_tpu7x_is_gke_only(text):
    with pytest.raises(TpuError, match="GKE"):
        parse_type(text)
