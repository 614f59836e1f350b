"""Relative names are looked up in the current folder, the toolkit's and the user's, in this order."""

from pathlib import Path

import pytest

from ldm import places
from ldm.places import cache_path, candidates, find, folders, hub_files


@pytest.fixture
def three(tmp_path, monkeypatch):
    """The three folders, all empty; the first is the current one."""
    here, own, user = (tmp_path / name for name in ("here", "own", "user/ldm-v1"))
    for folder in (here, own, user):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setattr(places, "ROOT", own)
    monkeypatch.setenv("XDG_DATA_HOME", str(user.parent))
    return here, own, user


def test_the_first_folder_that_has_the_file_counts(three):
    _, own, user = three
    assert find("models/a.ckpt") == Path("models/a.ckpt")
    for folder, expected in ((user, user / "a.ckpt"), (own, own / "a.ckpt"), (Path(), Path("a.ckpt"))):
        (folder / "a.ckpt").touch()
        assert find("a.ckpt") == expected
    assert candidates("a.ckpt") == [Path("a.ckpt"), own / "a.ckpt", user / "a.ckpt"]


def test_an_absolute_path_is_only_itself(three):
    _, own, _ = three
    assert candidates(own / "a.ckpt") == [own / "a.ckpt"]
    assert find("/no/such/file") == Path("/no/such/file")


def test_a_broken_link_counts_so_that_it_can_be_named(three):
    _, own, user = three
    (user / "a.ckpt").touch()
    (own / "a.ckpt").symlink_to("nowhere")
    assert find("a.ckpt") == own / "a.ckpt"


def test_installed_files_take_the_place_of_the_checkout(three, tmp_path, monkeypatch):
    """Nothing is looked up in the folder that packages are installed in."""
    _, own, user = three
    (own / "configs").mkdir()
    monkeypatch.setattr(places, "_installed_files", lambda: tmp_path / "assets")
    assert list(folders()) == ["current folder", "installed package", "user folder"]
    assert candidates("configs") == [Path("configs"), tmp_path / "assets/configs", user / "configs"]
    assert find("configs") == Path("configs")


@pytest.mark.parametrize(
    ("variable", "usual", "place"),
    [
        ("XDG_CACHE_HOME", ".cache", lambda: cache_path("x")),
        ("XDG_DATA_HOME", ".local/share", lambda: candidates("x")[-1]),
    ],
)
def test_a_relative_folder_in_the_environment_counts_as_none(monkeypatch, tmp_path, variable, usual, place):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(variable, "relative")
    assert place() == tmp_path / usual / "ldm-v1/x"
    monkeypatch.setenv(variable, "/elsewhere")
    assert place() == Path("/elsewhere/ldm-v1/x")


def test_a_user_without_a_home_folder_has_no_user_folder(monkeypatch):
    """As in a container that runs under a user id without a name."""
    for name in ("HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert list(folders()) == ["current folder", "checkout"]
    assert find("configs/shapes/text.yaml").is_file()


def test_files_of_the_hub_are_those_that_its_library_finds(tmp_path, monkeypatch):
    """The revision of the main branch comes first; others are found, which the library looks up by name only."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--some--model"
    for revision in ("a1", "b2", "c3"):
        (folder / "snapshots" / revision).mkdir(parents=True)
        (folder / "snapshots" / revision / "x.txt").write_text(revision)
    assert [path.read_text() for path in hub_files(["no/model", "some/model"], ["x.txt"])] == [
        "a1",
        "b2",
        "c3",
    ]
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("b2")
    found = list(hub_files(["some/model"], ["y.txt", "x.txt"]))
    assert [path.read_text() for path in found] == ["b2", "a1", "c3"]
    assert str(found[0]) == hub.try_to_load_from_cache("some/model", "x.txt", cache_dir=tmp_path)
    assert str(found[2]) == hub.try_to_load_from_cache(
        "some/model", "x.txt", cache_dir=tmp_path, revision="c3"
    )
