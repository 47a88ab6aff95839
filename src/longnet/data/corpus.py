"""Which files a corpus consists of: folders walked in path order, and what is left out, counted."""

from __future__ import annotations

import collections
import dataclasses
import glob
import hashlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

HUB = "hf:"
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# What a file holds by its name, which may end with one of COMPRESSED besides; what is not listed is text.
KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet",
    ".fa": "fasta", ".fasta": "fasta", ".fna": "fasta", ".ffn": "fasta", ".faa": "fasta", ".frn": "fasta",
}  # fmt: skip

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
        between; it decides the split. Where two files would have the same name, more of the given paths' parts.
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
        """Return "hub", a value of KINDS, or "text"."""
        if isinstance(self.path, str):
            return "hub"
        return KINDS.get(Path(_uncompressed(self.path.name.lower())).suffix, "text")

    @property
    def compression(self) -> str:
        """Return the one of COMPRESSED that the name ends with, or ""."""
        name = "" if isinstance(self.path, str) else self.path.name.lower()
        return name[len(_uncompressed(name)) :]


@dataclasses.dataclass
class Corpus:
    """The files of a corpus, in the order of their tokens, and how many were left out for which reason.

    Attributes
    ----------
    unused
        Options that met no file, like "--exclude 'tets*'": misspelt, perhaps.
    """

    files: list[SourceFile]
    skipped: collections.Counter[str]
    unused: list[str] = dataclasses.field(default_factory=list)

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
    SUFFIXES, NAMES and KINDS but .json), hidden ones, version control, caches and installed packages are left out, and
    so is what matches one of the shell patterns in `exclude`: by its name, or by as many last parts of its path as the
    pattern has. Every file is taken once, however many ways lead to it.

    Raises FileNotFoundError where a source leads to nothing, and ValueError for an empty source or pattern, or where no
    file is left.
    """
    for option, values in (("a path", sources), ("--exclude", exclude), ("--suffixes", suffixes)):
        if not all(value.strip() for value in values):
            raise ValueError(f"{option} is empty: an unset variable of the shell, perhaps")
    for suffix in suffixes:
        if glob.has_magic(suffix) or "/" in suffix:
            raise ValueError(f"--suffixes takes suffixes like .py and whole names like Makefile, got {suffix!r}")
    walk = _Walk(tuple(suffixes), tuple(exclude))
    for source in sources:
        if source.startswith(HUB):
            if not source.removeprefix(HUB).partition(":")[0].strip("/ "):
                raise ValueError(f"{source} names no data set: write hf:OWNER/NAME[:CONFIG[:SPLIT]]")
            walk.begin(None)
            walk.files.append(SourceFile(source, source, source, 0, 0))
        elif Path(source).exists():
            walk.begin(Path(source))
            walk.take(Path(source), "")
        elif glob.has_magic(source):
            _take_glob(walk, source)
        else:
            raise FileNotFoundError(f"{source} does not exist: give files, folders, globs, or hf:NAME")
    if not walk.files:
        raise ValueError(f"no text in {' '.join(sources)}{describe(walk.skipped)}: give other paths, or --suffixes")
    return Corpus(walk.named(), walk.skipped, walk.unused)


def describe(skipped: collections.Counter[str]) -> str:
    """Return " (left out: 3 binary, 2 hidden)", or "" where nothing was."""
    counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
    return f" (left out: {counts})" if counts else ""


def _take_glob(walk: _Walk, pattern: str) -> None:
    parts = Path(pattern).parts
    fixed = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:fixed])
    found = sorted(glob.glob(pattern, recursive=True), key=lambda path: Path(path).parts)  # noqa: PTH207  # ** as shells
    if not found:
        raise FileNotFoundError(f"{pattern} matches nothing")
    walk.begin(root)
    for path in found:
        walk.take(Path(path), f"/{Path(path).relative_to(root).as_posix()}")


def _uncompressed(name: str) -> str:
    return next((name.removesuffix(suffix) for suffix in COMPRESSED if name.endswith(suffix)), name)


def _folder_of(name: str) -> str:
    return "/".join(name.split("/")[:2])


class _Walk:
    """Files found so far, and what has been seen.

    While the sources are walked a file's name is what follows the name of its source, which `named` puts in front.
    """

    def __init__(self, suffixes: tuple[str, ...], exclude: tuple[str, ...]) -> None:
        self.files: list[SourceFile] = []
        self.skipped: collections.Counter[str] = collections.Counter()
        self._suffixes, self._exclude = suffixes, exclude
        self._seen: set[tuple[int, int]] = set()
        self._used: set[str] = set()
        self._sources: list[tuple[str, ...]] = []  # the parts of each one's whole path
        self._of: list[int] = []  # how many files there were when each began

    @property
    def unused(self) -> list[str]:
        """Options that met nothing."""
        given = [("--exclude", self._exclude), ("--suffixes", self._suffixes)]
        return [f"{option} {value!r}" for option, values in given for value in values if value not in self._used]

    def begin(self, source: Path | None) -> None:
        """Begin with another source; None for a data set of the hub, which has its name."""
        whole = () if source is None else Path(os.path.abspath(source)).parts  # noqa: PTH100  # a link keeps its name
        self._sources.append(whole)
        self._of.append(len(self.files))

    def named(self) -> list[SourceFile]:
        """Return the files under their names, no two of which are the same."""
        depths = [1] * len(self._sources)
        owners = [
            source
            for source, (first, last) in enumerate(itertools.pairwise([*self._of, len(self.files)]))
            for _ in range(first, last)
        ]
        while True:
            names = [
                "/".join(part.strip("/") for part in self._sources[owner][-depths[owner] :]) + file.name
                for owner, file in zip(owners, self.files, strict=True)
            ]
            counts = collections.Counter(names)
            again = {owner for owner, name in zip(owners, names, strict=True) if counts[name] > 1}
            again = {owner for owner in again if depths[owner] < len(self._sources[owner])}
            if not again:
                break
            for owner in again:
                depths[owner] += 1
        return [
            dataclasses.replace(file, name=name, folder=_folder_of(name) if self._sources[owner] else name)
            for owner, name, file in zip(owners, names, self.files, strict=True)
        ]

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
            below = f"{name}/{entry.name}"
            try:
                reason = self._refusal(entry, below, root)
                is_folder = reason is None and entry.is_dir()
            except PermissionError:
                reason = "unreadable"
            if reason:
                self.skipped[reason] += 1
            elif is_folder:
                self._folder(Path(entry.path), below, root)
            else:
                self._file(Path(entry.path), below)

    def _file(self, path: Path, name: str) -> None:
        if self._again(path):
            self.skipped["reached twice"] += 1
            return
        status = path.stat()
        self.files.append(SourceFile(name, "", path, status.st_size, status.st_mtime_ns))

    def _again(self, path: Path) -> bool:
        """Return whether the path leads to what has been reached already."""
        status = path.stat()
        key = (status.st_dev, status.st_ino)
        known = key in self._seen
        self._seen.add(key)
        return known

    def _refusal(self, entry: os.DirEntry[str], name: str, root: Path) -> str | None:
        """Return why an entry of a folder is left out, or None."""
        if entry.name.startswith("."):
            return "hidden"
        path = PurePosixPath("/".join(self._sources[-1][-1:]) + name)
        matching = [pattern for pattern in self._exclude if path.match(pattern)]
        self._used.update(matching)
        if matching:
            return "excluded"
        if entry.is_symlink():
            if not os.path.exists(entry.path):  # noqa: PTH110  # pathlib raises for a link to itself
                return "broken links"
            if Path(entry.path).resolve().is_relative_to(root):
                return "links within the folder"  # what they lead to is reached by its own path
        if entry.is_dir():
            if not os.access(entry.path, os.R_OK | os.X_OK):
                return "unreadable"
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
        if self._suffixes:
            wanted = [(suffix, suffix.lower()) for suffix in self._suffixes]
            matching = [given for given, low in wanted if lower == low or (low[0] == "." and lower.endswith(low))]
            self._used.update(matching)
            return bool(matching)
        suffix = Path(_uncompressed(lower)).suffix
        return (
            name[: len(_uncompressed(lower))] in NAMES or suffix in SUFFIXES or (suffix in KINDS and suffix != ".json")
        )
