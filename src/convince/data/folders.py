"""Folders of class folders, with or without train, val and test above them; what is not used is listed."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convince.data.found import UNLABELLED, Found, class_name, coded, group_codes, natural, part_of, shown
from convince.data.pool import Skipped
from convince.errors import Mistake


@dataclass
class _Walk:
    root: Path
    files: list[Path] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def name(self, path: str | Path) -> str:
        return shown(Path(path).relative_to(self.root).as_posix())

    def skip(self, path: str | Path, reason: str) -> None:
        self.skipped.append(Skipped(self.name(path), reason))


def from_folder(root: Path, origin: str, group: Any = None, flat: bool = False) -> Found:
    """Image files in class folders: ``root/cat/1.jpg``, or ``root/train/cat/1.jpg`` beside ``test`` and ``val``.

    Files stand directly in their class folder; deeper folders, hidden files and strays are listed as
    skipped. A folder ``unlabelled`` holds images without a label; with ``flat`` those directly in ``root`` have none
    either. ``group`` is a regular expression whose
    first parenthesis, searched for in the file's path below ``root``, names its group.
    """
    walk = _Walk(root)
    entries = _entries(walk, root)
    folders = {entry.name: Path(entry.path) for entry in entries if _is_folder(entry)}
    visible = {name: path for name, path in folders.items() if not _hidden(name)}
    parts = {name: part for name in visible if (part := part_of(name)) is not None}
    split = 0 in parts.values() and any(_has_folders(visible[name]) for name, part in parts.items() if part == 0)
    for entry in entries:
        if flat and not split and entry.name not in folders and not _hidden(entry.name):
            walk.files.append(Path(entry.path))
            walk.labels.append(UNLABELLED[0])
            walk.parts.append(-1)
        elif entry.name not in visible:
            reason = "a hidden folder" if entry.name in folders else _stray(entry)
            walk.skip(entry.path, reason)
        elif split and entry.name in parts:
            _part(walk, visible[entry.name], parts[entry.name])
        elif split:
            walk.skip(entry.path, "a folder beside train that is no part of the split")
        else:
            _class(walk, visible[entry.name], -1)
    if not walk.files:
        raise Mistake(_nothing(root, walk, bool(visible)))
    y, classes = coded([None if label.lower() in UNLABELLED else label for label in walk.labels])
    names = [walk.name(path) for path in walk.files]
    number = np.array(walk.parts, np.int8) if split and len(set(walk.parts)) > 1 else None
    if number is not None and not (number == 0).any():
        raise Mistake(f"{root}: its train folder holds no files; put the training images there, one folder a class")
    groups = None if group is None else _groups(names, group)
    return Found(origin, y, classes, walk.files, names=names, parts=number, groups=groups, skipped=walk.skipped)


def _entries(walk: _Walk, folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: natural(entry.name))
    except PermissionError:
        if folder == walk.root:
            raise Mistake(f"{folder}: no permission to read this folder; change its mode or owner") from None
        walk.skip(folder, "no permission to read this folder")
    except OSError as error:
        if folder == walk.root:
            raise Mistake(f"{folder}: cannot be read: {error.strerror}") from None
        loop = error.errno == errno.ELOOP
        walk.skip(folder, "a link that leads to itself" if loop else f"cannot be read: {error.strerror}")
    return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _has_folders(folder: Path) -> bool:
    try:
        with os.scandir(folder) as found:
            return any(_is_folder(entry) for entry in found if not _hidden(entry.name))
    except OSError:
        return False


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in ("Thumbs.db", "desktop.ini", "__MACOSX")


def _stray(entry: os.DirEntry[str]) -> str:
    return "a hidden file" if _hidden(entry.name) else "stands beside the class folders, not in one"


def _part(walk: _Walk, folder: Path, part: int) -> None:
    for entry in _entries(walk, folder):
        if _is_folder(entry) and not _hidden(entry.name):
            _class(walk, Path(entry.path), part)
        else:
            walk.skip(entry.path, "a hidden folder" if _is_folder(entry) else _stray(entry))


def _class(walk: _Walk, folder: Path, part: int) -> None:
    entries = _entries(walk, folder)
    for entry in entries:
        if _is_folder(entry):
            walk.skip(entry.path, "a folder inside a class folder; images must stand directly in the class folder")
        elif _hidden(entry.name):
            walk.skip(entry.path, "a hidden file")
        else:
            walk.files.append(Path(entry.path))
            walk.labels.append(class_name(folder.name.encode("utf-8", "backslashreplace").decode()))
            walk.parts.append(part)
    if not entries and not any(row.file == walk.name(folder) for row in walk.skipped):
        walk.skip(folder, "an empty folder")


def _nothing(root: Path, walk: _Walk, folders: bool) -> str:
    layout = f"Make one folder a class and put its images inside: {root.name}/cat/1.jpg, {root.name}/dog/1.jpg"
    if not walk.skipped:
        return f"{root}: the folder is empty. {layout}"
    if not folders:
        return f"{root}: holds {len(walk.skipped)} file(s) and no class folders. {layout}"
    first = walk.skipped[0]
    count = len(walk.skipped)
    return f"{root}: no class folder holds a file; {count} skipped, first {first.file}: {first.reason}. {layout}"


def _groups(names: list[str], group: Any) -> np.ndarray:
    """The group of each file, as the pattern's first parenthesis finds it."""
    if not isinstance(group, str):
        raise Mistake(
            "group: for a folder give a regular expression that finds the group in the file's path, "
            r"such as r'patient(\d+)_'; codes by row need a table or arrays"
        )
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise Mistake(f"group={group!r} is no regular expression: {error}") from None
    if pattern.groups < 1:
        raise Mistake(rf"group={group!r} has no parenthesis around the group's name; for instance r'patient(\d+)_'")
    found = [pattern.search(name) for name in names]
    for name, match in zip(names, found, strict=True):
        if match is None or match.group(1) is None:
            raise Mistake(f"group={group!r} finds nothing in {name!r}; every file needs a group")
    return group_codes([match.group(1) for match in found if match], "group")
