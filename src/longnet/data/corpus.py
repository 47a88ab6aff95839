"""Which files a corpus consists of: folders walked in path order, and what is left out, counted."""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import glob
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

RECORDS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
HUB = "hf:"

_TEXT = """
    .txt .md .markdown .rst .tex .org .adoc .texi .pod
    .py .pyi .pyx .pxd .ipy .c .h .cc .cpp .cxx .c++ .hh .hpp .hxx .inl .ipp .tpp .cu .cuh .cl .m .mm .s .asm .lds
    .java .kt .kts .scala .groovy .gradle .clj .cljs .cljc .cs .fs .fsi .fsx .vb .go .rs .zig .nim .d .v .sv .svh .vhd
    .vhdl .js .jsx .mjs .cjs .ts .tsx .mts .cts .vue .svelte .html .htm .css .scss .sass .less .php .rb .erb .rake .pl
    .pm .t .raku .lua .tcl .r .jl .f .for .f77 .f90 .f95 .f03 .f08 .pas .pp .ada .adb .ads .hs .lhs .ml .mli .elm .ex
    .exs .erl .hrl .swift .dart .el .lisp .lsp .scm .ss .rkt .fth .forth .pro .lean .thy .agda .idr .sol .sql .proto
    .thrift .graphql .sh .bash .zsh .fish .ksh .csh .ps1 .psm1 .bat .cmd .awk .sed .vim .y .yy .l .ll .g4 .m4 .ac .am
    .in .mk .mak .cmake .bzl .ninja .nix .tf .toml .yaml .yml .cfg .ini .conf .dts .dtsi .td .mlir .wat .glsl .vert
    .frag .comp .hlsl .wgsl .metal
"""
_NAMED = """
    Makefile GNUmakefile Kbuild Kconfig Dockerfile Containerfile Rakefile Gemfile Vagrantfile Jenkinsfile BUILD
    WORKSPACE SConstruct SConscript README LICENSE COPYING NEWS CHANGES CHANGELOG AUTHORS INSTALL TODO
    MAINTAINERS CREDITS HISTORY THANKS
"""
# What a folder's files must be called to be taken. Data and generated files (.json, .csv, .svg, .lock) are left out.
SUFFIXES = frozenset(_TEXT.split())
NAMES = frozenset(_NAMED.split())
_NO_SOURCE = frozenset({"__pycache__", "node_modules", "site-packages", "dist-packages", "CVS", "_darcs"})
_MARKERS = ("pyvenv.cfg", "CACHEDIR.TAG")  # a folder that holds one is a virtual environment, or calls itself a cache


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file, or a data set on the hub, that documents are read from.

    Attributes
    ----------
    name
        The last part of the given path (of a glob the folder before its first pattern) and the way below it, with "/"
        between; it decides the split.
    folder
        The first two parts of it, so the highest folder below the given path, or else the file itself: what
        `--split-by folder` keeps whole.
    path
        Where to open it; for the hub what the user gave.
    size, modified
        Bytes, and nanoseconds since the epoch.
    """

    name: str
    folder: str
    path: Path | str
    size: int
    modified: int

    @property
    def kind(self) -> str:
        """Return "hub", one of RECORDS, or "text"."""
        if isinstance(self.path, str):
            return "hub"
        return next((suffix for suffix in RECORDS if self.path.name.lower().endswith(suffix)), "text")


@dataclasses.dataclass
class Corpus:
    """The files of a corpus, in the order of their tokens, and how many were left out for which reason."""

    files: list[SourceFile]
    skipped: collections.Counter[str]

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(file.size for file in self.files)

    def digest(self) -> str:
        """Return a digest of every file's name, size and time."""
        digest = hashlib.blake2b(digest_size=16)
        for file in self.files:
            digest.update(f"{file.name}\0{file.size}\0{file.modified}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def list_corpus(sources: Sequence[str], *, suffixes: Sequence[str] = (), exclude: Sequence[str] = ()) -> Corpus:
    """Return the files that the sources name: paths of files and folders, globs, or hf:NAME.

    A file that is named, itself or by a glob, is taken whatever it is called. A folder is walked in path order, so that
    the files of each folder below it stay together; in it files need one of `suffixes` (a suffix or a whole name; none:
    SUFFIXES, NAMES and RECORDS), hidden ones, version control, caches and installed packages are left out, and so is
    what matches one of the shell patterns in `exclude`. Every file is taken once, however many ways lead to it.

    Raises FileNotFoundError where a source leads to nothing, and ValueError where no file is left.
    """
    walk = _Walk(tuple(suffix.lower() for suffix in suffixes) or None, tuple(exclude))
    for source in sources:
        if source.startswith(HUB):
            walk.files.append(SourceFile(source, source, source, 0, 0))
        elif Path(source).exists():
            walk.take(Path(source), _name(Path(source)))
        elif glob.has_magic(source):
            _take_glob(walk, source)
        else:
            raise FileNotFoundError(f"{source} does not exist: give files, folders, globs, or hf:NAME")
    if not walk.files:
        raise ValueError(f"no text in {' '.join(sources)}{describe(walk.skipped)}: give other paths, or --suffixes")
    return Corpus(walk.files, walk.skipped)


def describe(skipped: collections.Counter[str]) -> str:
    """Return ", left out 3 binary, 2 hidden" or nothing."""
    counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
    return f" (left out: {counts})" if counts else ""


def _take_glob(walk: _Walk, pattern: str) -> None:
    parts = Path(pattern).parts
    fixed = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:fixed])
    found = sorted(glob.glob(pattern, recursive=True), key=lambda path: Path(path).parts)  # noqa: PTH207  # ** as shells
    if not found:
        raise FileNotFoundError(f"{pattern} matches nothing")
    for path in found:
        walk.take(Path(path), f"{_name(root)}/{Path(path).relative_to(root).as_posix()}")


def _name(path: Path) -> str:
    return path.name or path.resolve().name


class _Walk:
    """Files found so far, and what has been seen."""

    def __init__(self, suffixes: tuple[str, ...] | None, exclude: tuple[str, ...]) -> None:
        self.files: list[SourceFile] = []
        self.skipped: collections.Counter[str] = collections.Counter()
        self._suffixes, self._exclude = suffixes, exclude
        self._seen: set[tuple[int, int]] = set()

    def take(self, path: Path, name: str) -> None:
        """Take a path that the user named."""
        if path.is_dir():
            self._folder(path, name, path.resolve())
        elif path.is_file():
            self._file(path, name)
        else:
            self.skipped["neither file nor folder"] += 1

    def _folder(self, folder: Path, name: str, root: Path) -> None:
        if self._again(folder):
            self.skipped["reached twice"] += 1
            return
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except PermissionError:
            self.skipped["unreadable"] += 1
            return
        for entry in entries:
            reason = self._refusal(entry, root)
            if reason:
                self.skipped[reason] += 1
            elif entry.is_dir():
                self._folder(Path(entry.path), f"{name}/{entry.name}", root)
            else:
                self._file(Path(entry.path), f"{name}/{entry.name}")

    def _file(self, path: Path, name: str) -> None:
        if self._again(path):
            self.skipped["reached twice"] += 1
            return
        status = path.stat()
        folder = "/".join(name.split("/")[:2])
        self.files.append(SourceFile(name, folder, path, status.st_size, status.st_mtime_ns))

    def _again(self, path: Path) -> bool:
        """Return whether the path leads to what has been reached already."""
        status = path.stat()
        key = (status.st_dev, status.st_ino)
        known = key in self._seen
        self._seen.add(key)
        return known

    def _refusal(self, entry: os.DirEntry[str], root: Path) -> str | None:
        """Return why an entry of a folder is left out, or None."""
        if entry.name.startswith("."):
            return "hidden"
        if any(fnmatch.fnmatch(entry.name, pattern) for pattern in self._exclude):
            return "excluded"
        if entry.is_symlink():
            if not os.path.exists(entry.path):  # noqa: PTH110  # pathlib raises for a link to itself
                return "broken links"
            if Path(entry.path).resolve().is_relative_to(root):
                return "links within the folder"  # what they lead to is reached by its own path
        if entry.is_dir():
            if entry.name in _NO_SOURCE or any(Path(entry.path, marker).exists() for marker in _MARKERS):
                return "caches and installed packages"
            return None
        if not entry.is_file():
            return "neither file nor folder"
        if not self._wanted(entry.name):
            return "of another kind"
        return None if os.access(entry.path, os.R_OK) else "unreadable"

    def _wanted(self, name: str) -> bool:
        lower = name.lower()
        if self._suffixes is not None:
            return lower.endswith(tuple(s for s in self._suffixes if s.startswith("."))) or lower in self._suffixes
        return name in NAMES or lower.endswith(RECORDS) or Path(lower).suffix in SUFFIXES
