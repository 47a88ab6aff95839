"""Which files a corpus takes, in which order, and what it leaves out."""

import os

import pytest

from longnet.data.corpus import list_corpus


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "repo/a.py", "repo/a/z.py", "repo/a/b/c.C", "repo/b.txt", "repo/Makefile", "repo/.git/config.py",
        "repo/.hid.py", "repo/__pycache__/a.py", "repo/site-packages/p.py", "repo/env/pyvenv.cfg", "repo/env/lib/x.py",
        "repo/picture.png",
        "repo/tests/test_a.py", "repo/venv/module.py", "loose.xyz", "other/q.jsonl", "other/r.parquet",
        "other/s.JSONL.GZ", "other/t.json",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def names(*sources, **options):
    return [file.name for file in list_corpus(sources, **options).files]


def test_a_folder_in_path_order_without_what_is_no_text(tree):
    corpus = list_corpus(["repo"])
    assert [file.name for file in corpus.files] == [
        "repo/Makefile", "repo/a/b/c.C", "repo/a/z.py", "repo/a.py", "repo/b.txt", "repo/tests/test_a.py",
        "repo/venv/module.py",
    ]  # fmt: skip
    assert corpus.skipped == {"hidden": 2, "caches and installed packages": 3, "of another kind": 1}
    assert [file.folder for file in corpus.files][:4] == ["repo/Makefile", "repo/a", "repo/a", "repo/a.py"]


def test_sources_keep_their_order_and_files_are_taken_once(tree):
    assert names("repo/b.txt", "repo/a", "repo/a.py", "repo/a", "repo/b.txt") == ["b.txt", "a/b/c.C", "a/z.py", "a.py"]
    assert list_corpus(["repo/a", "repo/a"]).skipped == {"reached twice": 1}


def test_a_named_file_is_taken_whatever_it_is_called(tree):
    assert names("loose.xyz", "repo/.hid.py", "other/t.json") == ["loose.xyz", ".hid.py", "t.json"]
    assert names("repo/site-packages", "repo/.git") == ["site-packages/p.py", ".git/config.py"]


def test_globs(tree):
    assert names("repo/*.py", "loose.*") == ["repo/a.py", f"{tree.name}/loose.xyz"]
    assert names("repo/**/[apt]*.py") == [
        "repo/__pycache__/a.py", "repo/a.py", "repo/site-packages/p.py", "repo/tests/test_a.py",
    ]  # fmt: skip
    corpus = list_corpus(["repo/a*"])
    assert [file.name for file in corpus.files] == names("repo")[1:4]
    assert [file.folder for file in corpus.files] == ["repo/a", "repo/a", "repo/a.py"]
    with pytest.raises(FileNotFoundError, match="matches nothing"):
        list_corpus(["repo/*.rs"])


def test_a_file_whose_name_looks_like_a_glob(tree):
    (tree / "a[1].txt").write_text("x")
    assert names("a[1].txt") == ["a[1].txt"]


def test_records_have_their_kinds(tree):
    kinds = [file.kind for file in list_corpus(["other", "hf:owner/name:config"]).files]
    assert kinds == ["jsonl", "parquet", "jsonl", "hub"]
    packed = [file.compression for file in list_corpus(["other", "hf:owner/name.gz"]).files]
    assert packed == ["", "", ".gz", ""]


def test_suffixes_and_exclusions(tree):
    assert names("repo", suffixes=[".PNG", "makefile"]) == ["repo/Makefile", "repo/picture.png"]
    assert names("repo", exclude=["test*", "a*"]) == ["repo/Makefile", "repo/b.txt", "repo/venv/module.py"]
    assert list_corpus(["repo"], exclude=["test*", "a*"]).skipped["excluded"] == 3
    unused = list_corpus(["repo"], suffixes=[".PNG", "Rakefile"]).unused
    assert unused == ["--suffixes 'Rakefile'"]  # as it was typed
    with pytest.raises(ValueError, match=r"no text in repo \(left out: .* 8 of another kind\)"):
        list_corpus(["repo"], suffixes=[".rs"])


def test_links_and_loops(tree):
    (tree / "repo/loop").symlink_to(tree / "repo", target_is_directory=True)
    (tree / "repo/self").symlink_to("self")
    (tree / "repo/again.py").symlink_to("a.py")
    (tree / "repo/gone.py").symlink_to("nowhere.py")
    (tree / "repo/beside").symlink_to(tree / "other", target_is_directory=True)
    (tree / "other/back").symlink_to(tree / "other", target_is_directory=True)
    os.mkfifo(tree / "repo/pipe.py")
    corpus = list_corpus(["repo"])
    assert "repo/beside/q.jsonl" in [file.name for file in corpus.files]
    assert len(corpus.files) == 10
    assert corpus.skipped["links within the folder"] == 2
    assert corpus.skipped["broken links"] == 2
    assert corpus.skipped["reached twice"] == 1
    assert corpus.skipped["neither file nor folder"] == 1


def test_the_digest_changes_with_names_sizes_and_times(tree):
    before = list_corpus(["repo"]).digest()
    assert list_corpus(["repo"]).digest() == before
    os.utime(tree / "repo/a.py", ns=(1, 1))
    touched = list_corpus(["repo"]).digest()
    (tree / "repo/a.py").rename(tree / "repo/aa.py")
    assert len({before, touched, list_corpus(["repo"]).digest()}) == 3


def test_the_present_folder_has_its_name(tree, monkeypatch):
    monkeypatch.chdir(tree / "repo/a")
    assert names(".") == ["a/b/c.C", "a/z.py"]


def test_a_name_that_is_no_utf8(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path / "x") + b"\xff.txt")
    with open(path, "w") as file:  # noqa: PTH123
        file.write("x")
    assert len(list_corpus([str(tmp_path)]).digest()) == 32
