"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def appearing(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Files to write to, which take the places of ``paths`` together once the block ends without an error.

    That they can be written is found out at its beginning, before a long run.

    Raises:
        ValueError: no file can be written there.
    """
    drafts: list[Path] = []
    try:
        for path in paths:
            if path.is_dir():
                raise ValueError(f"--out: cannot write {path}: it is a folder")
            try:
                number, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            except OSError as error:
                raise ValueError(f"--out: cannot write {path}: {error.strerror}") from error
            os.close(number)
            drafts.append(Path(name))
        yield drafts
        mask = os.umask(0)
        os.umask(mask)
        for draft, path in zip(drafts, paths, strict=True):
            draft.chmod(0o666 & ~mask)  # as any new file has it
            draft.replace(path)
    finally:
        for draft in drafts:
            with suppress(FileNotFoundError):
                draft.unlink()
