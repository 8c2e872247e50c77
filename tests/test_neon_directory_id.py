"""A directory is told from the one that takes its place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from walproto.neon.directory_id import directory_id


def test_it_stays_the_same_whatever_becomes_of_it(tmp_path: Path) -> None:
    path = tmp_path / "it"
    path.mkdir()
    known = directory_id(path)
    (path / "file").touch()
    path.chmod(0o700)
    os.utime(path, (1, 2))
    assert directory_id(path) == known
    renamed = path.rename(tmp_path / "renamed")
    path.symlink_to(renamed)
    assert directory_id(path) == known


def test_another_one_is_another_even_if_it_has_its_number(tmp_path: Path) -> None:
    path, seen = tmp_path / "it", set()
    path.mkdir()
    _, _, born = directory_id(path)
    if not born:
        pytest.skip("the file system does not know when a directory was made")
    assert abs(born / 10**9 - os.stat(path).st_ctime) < 1
    for _ in range(100):
        before = directory_id(path)
        path.rmdir()
        path.mkdir()
        while directory_id(path)[2] == before[2]:  # in the same tick of the kernel's clock
            path.rmdir()
            path.mkdir()
        seen.add(directory_id(path))
    assert len(seen) == 100
    print(f"{len({inode for _, inode, _ in seen})} numbers for 100 directories")


def test_one_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        directory_id(tmp_path / "it")
