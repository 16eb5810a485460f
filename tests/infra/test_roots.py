"""What a data set names is read below its root, and nothing else is."""

import os
import socket

import pytest

from vlfoundry.infra.core.errors import ConfigError, DataError
from vlfoundry.infra.core.roots import Root, what_is_wrong


@pytest.fixture
def folder(tmp_path):
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    (data / "sub" / "a b.png").write_bytes(b"inside")
    (data / "~odd").write_bytes(b"tilde")
    (tmp_path / "secret").write_bytes(b"outside")
    (data / "out").symlink_to(tmp_path / "secret")
    (data / "in").symlink_to(data / "sub")
    (data / "loop").symlink_to(data / "loop")
    os.mkfifo(data / "pipe")
    (data / "device").symlink_to("/dev/zero")
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(data)  # the name of a socket is short
    server.bind("socket")
    os.chdir(here)
    with (data / "sparse").open("wb") as file:
        file.truncate(8 << 30)
    return data


def test_what_is_below_the_root_is_read(folder):
    root = Root(folder)
    assert root.read("sub/a b.png") == b"inside"
    assert root.read("in/a b.png") == b"inside"
    assert root.read("./sub/./a b.png") == b"inside"
    assert root.read("~odd") == b"tilde"
    (folder / "sub" / "._a b.png").write_bytes(b"of macOS")
    assert root.names("sub") == ["a b.png"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../secret", r"without `\.\.`"),
        ("sub/../../secret", r"without `\.\.`"),
        ("out", "leads out of .* through a link"),
        ("device", "leads out of .* through a link"),
        ("pipe", "is a named pipe, expected a plain file"),
        ("socket", "cannot be read"),
        ("sub", "is a directory, expected a plain file"),
        ("loop", "cannot be read"),
        ("gone.png", "there is no such file"),
        ("x" * 300, "cannot be read.*too long"),
        ("y/" * 3000, "at most 4096 characters"),
        ("a\0b", "text without NUL"),
        ("\ud83d.png", "without halves of surrogate pairs"),
        ("", "expected a path"),
        (7, "expected a path"),
        (None, "expected a path"),
        ("file:///etc/passwd", "which alone may be a URL"),
        ("http://127.0.0.1:9/x.png", "which alone may be a URL"),
        ("zip://a::file:///b", "which alone may be a URL"),
        ("data:image/png;base64,AAAA", "which alone may be a URL"),
    ],
)
def test_everything_else_is_refused(folder, name, message):
    with pytest.raises(DataError, match=message):
        Root(folder).read(name)


def test_an_absolute_name_needs_a_root_that_says_so(folder):
    place = str(folder / "sub" / "a b.png")
    with pytest.raises(DataError, match="say so with `root: /`"):
        Root(folder).read(place)
    assert Root("/").read(place) == b"inside"
    with pytest.raises(DataError, match="is a device, expected a plain file"):
        Root("/").read("/dev/zero")


def test_a_huge_file_is_not_read(folder):
    with pytest.raises(DataError, match="more than 1 MiB"):
        Root(folder).read("sparse", limit_bytes=1 << 20)


def test_a_root_may_be_a_url_and_a_name_may_not_leave_it():
    import fsspec

    for name in ("b.png", ".DS_Store"):
        with fsspec.open(f"memory://roots/a/{name}", "wb") as stream:
            stream.write(b"there")
    root = Root("memory://roots/a")
    assert root.read("b.png") == b"there"
    assert root.names() == ["b.png"]
    with pytest.raises(DataError, match=r"without `\.\.`"):
        root.read("../a/b.png")
    with pytest.raises(DataError, match="there is no such file"):
        root.read("c.png")


def test_a_root_of_an_unknown_kind():
    with pytest.raises(
        ConfigError, match=r"root 'nosuch://x' cannot be opened .*expected a folder"
    ):
        Root("nosuch://x")


def test_a_root_on_a_server_that_is_not_there():
    with pytest.raises(DataError, match=r"cannot be read below http://127\.0\.0\.1:9"):
        Root("http://127.0.0.1:9").read("x.png")


def test_the_text_of_a_refusal_is_for_people():
    assert what_is_wrong("a/b.png") is None
    assert what_is_wrong("/a/b.png", absolute=True) is None
    assert what_is_wrong("a..b/..c") is None
