"""Files are written whole; the text for a missing extra; and the checks of pictures see what they are for."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from matplotlib.figure import Figure
from pictures import check_picture

from engram_jax import files, pictures
from engram_jax.errors import missing_extra


def test_a_file_is_whole_or_as_before(tmp_path):
    path = tmp_path / "numbers.json"
    files.write_json(path, {"a": [1, 2]})
    assert json.loads(path.read_text()) == {"a": [1, 2]} and path.read_text().endswith("}\n")

    def fail():
        with files.replacing(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert json.loads(path.read_text()) == {"a": [1, 2]} and list(tmp_path.iterdir()) == [path]


def test_several_may_write_the_same_file(tmp_path):
    path = tmp_path / "text.txt"

    def write(number):
        files.write_text(path, str(number) * 10_000)
        text = path.read_text()
        return len(text) == 10_000 and len(set(text)) == 1

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(write, [number % 10 for number in range(200)]))
    assert list(tmp_path.iterdir()) == [path]


def test_whether_a_file_can_be_written_is_tried_without_traces(tmp_path):
    files.check_writable(tmp_path / "new.txt")
    assert not list(tmp_path.iterdir())
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "folder", tmp_path / "absent" / "new.txt", tmp_path / "file" / "new.txt"):
        with pytest.raises(OSError):
            files.check_writable(path)


def test_a_missing_extra_is_told_for_clone_and_package():
    assert missing_extra("lm_eval", "eval") == (
        "lm_eval is not installed: it comes with the extra 'eval'. In a clone: uv run --extra eval COMMAND; "
        "from PyPI: pip install 'engram_jax[eval]'."
    )


# --- tests/pictures.py sees the faults that pictures had ---


def figure(**title):
    made = Figure(figsize=(6, 3), dpi=100)
    axes = made.subplots(1, 2)
    for one, its_title in zip(axes, (title, {}), strict=True):
        one.plot([0, 1], [0, 1])
        one.set_title(**{"label": "title", "loc": "left", **its_title})
    return made


def test_a_good_picture_passes(tmp_path):
    check_picture(figure())
    pictures.save(figure(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("title", "message"),
    [({"label": 60 * "long "}, "leaves the canvas"), ({"fontsize": 5}, "has 5"), ({"label": 8 * "long "}, "overlaps")],
)
def test_a_bad_picture_is_seen(title, message):
    with pytest.raises(AssertionError, match=message):
        check_picture(figure(**title))
